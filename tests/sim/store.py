"""A blob store as a cloud's client sees it: requests that fail in every way, unknown outcomes resolved by reading back."""

from __future__ import annotations

import enum
import io
from collections.abc import Callable, Iterator
from typing import BinaryIO, Protocol, TypeVar

from penstock.blobs import Blob, Created, Exists, Listed
from penstock.errors import BlobNotFound, LostRace, PenstockError, StoreUnavailable
from penstock.testing import MemoryBlobs
from tests.sim.broken import Broken

T = TypeVar("T")


class Fate(enum.Enum):
    """What becomes of a request."""

    FINE = "is answered"
    NOT_DONE = "is not done, and there is no answer"
    DONE = "is done, and there is no answer"
    LATE = "is done later, and there is no answer"
    TWICE = "is done, and sent again by the client: already there"


FINE = Fate.FINE
WRITING = {"create", "replace", "put", "delete"}
WRITES = (Fate.NOT_DONE, Fate.DONE, Fate.LATE, Fate.TWICE)
READS = (Fate.NOT_DONE,)


class Line(Protocol):
    """Between a client and its store: where others get their turn, and where things go wrong."""

    def before(self, operation: str, name: str) -> Fate:
        """Called before each request; it is carried out when this returns."""
        ...

    def after(self, answer: object) -> None:
        """Called when it is carried out (or not), before the client hears of it."""
        ...

    def later(self, name: str, what: tuple[object, ...], write: Callable[[], object]) -> None:
        """A write that was sent and is still under way: equal `what` do the same. It may raise a PenstockError when it lands."""
        ...

    def listing(self, prefix: str, fresh: list[Listed]) -> list[Listed]:
        """What a listing shows."""
        ...


class Unknown(Exception):
    """The client cannot say whether it was done."""


class SimBlobs:
    """A BlobStore on `blobs` at the other end of `line`."""

    def __init__(self, blobs: MemoryBlobs, line: Line, broken: Broken | None = None) -> None:
        self._blobs = blobs
        self._line = line
        self._broken = broken

    def create(self, name: str, body: bytes, *, id: str) -> Created | Exists:
        broken = self._broken if name.startswith("_ledger/") else None
        try:
            if broken is Broken.OVERWRITES:
                answer = self._write("create", name, (body,), lambda: self._overwrite(name, body, id), _nothing)
            else:
                answer = self._write("create", name, (body,), lambda: self._blobs.create(name, body, id=id), _nothing)
        except Unknown:
            if broken is Broken.UNKNOWN_IS_DONE:
                return Created("?")
        else:
            if isinstance(answer, Created):
                return answer
            if broken is Broken.EXISTS_IS_MINE:
                return Created("?")
        # "Exists" may be said of one's own write too: the client sends a request again when there is no answer.
        try:
            there = self.get(name)
        except BlobNotFound as error:
            raise StoreUnavailable(f"create {name}: unknown", blob=name) from error
        return Created(there.etag) if id.encode() in there.body else Exists(there)

    def replace(self, name: str, body: bytes, *, etag: str, id: str) -> str:
        def write() -> str:
            return self._blobs.replace(name, body, etag=etag, id=id)

        try:
            made = self._write("replace", name, (body, etag), write, _lost)
        except (Unknown, LostRace) as error:
            there = self.get(name)
            if id.encode() in there.body:
                return there.etag
            if isinstance(error, LostRace):
                raise
            raise StoreUnavailable(f"replace {name}: unknown", blob=name) from error
        assert made is not None, "one that is refused raises LostRace"
        return made

    def put(self, name: str, body: BinaryIO) -> None:
        whole = body.read()
        try:
            self._write("put", name, (whole,), lambda: self._blobs.put(name, io.BytesIO(whole)), _nothing)
        except Unknown as error:
            raise StoreUnavailable(f"put {name}: unknown", blob=name) from error

    def get(self, name: str) -> Blob:
        return self._read("get", name, lambda: self._blobs.get(name))

    def size(self, name: str) -> int:
        return self._read("size", name, lambda: self._blobs.size(name))

    def stream(self, name: str) -> Iterator[bytes]:
        return self._read("stream", name, lambda: self._blobs.stream(name))

    def list(self, prefix: str) -> Iterator[Listed]:
        return iter(self._read("list", prefix, lambda: self._line.listing(prefix, [*self._blobs.list(prefix)])))

    def delete(self, name: str) -> None:
        try:
            self._write("delete", name, (), lambda: self._blobs.delete(name), _nothing)
        except Unknown as error:
            raise StoreUnavailable(f"delete {name}: unknown", blob=name) from error

    def _overwrite(self, name: str, body: bytes, id: str) -> Created | Exists:
        self._blobs.delete(name)
        return self._blobs.create(name, body, id=id)

    def _read(self, operation: str, name: str, read: Callable[[], T]) -> T:
        if self._line.before(operation, name) is not FINE:
            self._line.after("no answer")
            raise StoreUnavailable(f"{operation} {name}: no answer", blob=name)
        return self._answered(read)

    def _write(
        self,
        operation: str,
        name: str,
        what: tuple[object, ...],
        write: Callable[[], T],
        again: Callable[[], T | None],
    ) -> T | None:
        """`again`: what the store says when it gets the same a second time after it was done."""
        fate = self._line.before(operation, name)
        if fate is FINE:
            return self._answered(write)
        if fate is Fate.LATE:
            self._line.later(name, what, write)
        elif fate is not Fate.NOT_DONE:
            try:
                write()
            except PenstockError:
                if fate is Fate.TWICE:
                    self._line.after("refused")
                    raise
        self._line.after("no answer")
        if fate is Fate.TWICE:
            return again()
        raise Unknown

    def _answered(self, request: Callable[[], T]) -> T:
        try:
            answer = request()
        except PenstockError as error:
            self._line.after(error)
            raise
        self._line.after(answer)
        return answer


def _nothing() -> None:
    """An answer without content."""


def _lost() -> str:
    raise LostRace("the store's client tried twice")
