"""Every interleaving of two archivers over the end of a period, with every fault at every request.

Two real pumps with real archivers feed on one partition: events of one period, then one of the next, then a cut marker. At each
moment a choice is made: which of the two makes its next request, and whether that is answered or fails in one of the ways, or
whether a write that was under way lands. Both take the lease, so each is a zombie in turn; with a second life it takes it back.
They want different files, read in slices of different size, and the clock of one is a period behind.

The search is complete: executions end (faults and lives are bounded), and every choice is tried in every state; but where a
request changes nothing and is answered alike for ever, only it is tried, for it makes no difference to the others when. A state is the
content of the store, the writes under way, and where each archiver stands. What an archiver does next depends on nothing but
the answers that it had, so it is asked once for each row of answers (`Actor`): the real code runs from its beginning, is given
these, and stands where it makes one request more. When it reads the log again it has forgotten them, but for what is in its
fields (`digest`).

In another scene the archive begins late: the log's first event is gone, there is no lease and no record yet, both archivers begin,
and at any moment the lease is deleted.
"""

from __future__ import annotations

import io
import itertools
import zlib
from collections.abc import Callable, Iterator
from contextlib import nullcontext, suppress
from pathlib import Path, PosixPath
from types import FunctionType, MethodType, SimpleNamespace
from typing import Any, BinaryIO, NamedTuple
from unittest.mock import patch

import pytest

from penstock.archive import archiver as archiver_module
from penstock.archive import begin as begin_module
from penstock.archive import check as check_module
from penstock.archive.archiver import Archiver
from penstock.archive.cut import OpenFile
from penstock.archive.hours import ARCHIVE_GROUP
from penstock.archive.ledger import Gap, Ledger, Record, claim
from penstock.blobs import Blob, BlobStore, Created, Listed
from penstock.errors import BlobNotFound, LostRace, StoreUnavailable
from penstock.events import FrameKind, Slice
from penstock.processor import Checkpoint, CloseReason
from penstock.processor import lease as lease_module
from penstock.processor import pump as pump_module
from penstock.processor.lease import Holding, Lease, Writer, decode_lease, encode_lease, lease_name, take_over
from penstock.processor.lease import claim as claim_lease
from penstock.processor.pump import Pump
from penstock.testing import FakeClock
from tests.archive.conftest import CountingHub
from tests.sim.broken import Broken, breaking
from tests.sim.member import BAD_NEWS, SimFiles
from tests.sim.oracle import Line, Violation, WatchedBlobs, hour_of, judge
from tests.sim.scheduler import InPlace
from tests.sim.store import WRITING, Fate, SimBlobs, Unknown

PERIOD_S = 3600
START_MS = 1_795_356_000_000
LEASE = lease_name(ARCHIVE_GROUP, 0)
STATES_MAX = 5_000_000

Request = tuple[Any, ...]
"""Operation, name, and what a write is made of."""

NO_ANSWER, LOST = "no answer", "lost"
"""Answers; others are an etag, True of a create, a body, a size, what is listed, or None of what is not there (or there already)."""


class Log:
    """The log that is archived; it does not change. `blobs` is the store as it is at first, `coming` the writes that land some time."""

    def __init__(self, *, late: bool) -> None:
        clock = FakeClock(START_MS)
        self.hub = CountingHub(1, clock=clock, period_s=PERIOD_S)
        self.lines: list[Line] = []
        self.coming: tuple[Request, ...] = (("delete", LEASE),) if late else ()
        for count, then_s in ((2, 0), (1, PERIOD_S), (1, 0)):
            lines = [b'{"deviceId":"d","n":%d}' % (len(self.lines) + n) for n in range(count)]
            self.hub.put(0, lines)
            self.lines += [(hour_of(clock.now_ms(), PERIOD_S), line) for line in lines]
            clock.advance(then_s)
        (self.end,) = self.hub.cut()
        self.blobs = MarkedBlobs()
        claim(self.blobs, self.hub, clock)
        if late:
            self.hub.trim(0, before="2")
            del self.lines[:2]
        else:
            old = Lease(0, "old", "old-1", 1, "0", 0)
            self.blobs.create(LEASE, encode_lease(old), id=old.token)


class MarkedBlobs(WatchedBlobs):
    """A content of the store; it does not change. Equal content is equal, whatever was written before: the etag is its sum."""

    def __init__(self) -> None:
        super().__init__()
        self.after: dict[Request, tuple[MarkedBlobs, Any]] = {}

    @property
    def state(self) -> object:
        blobs = sorted((name, blob.etag) for name, blob in self._blobs.items())
        return tuple(blobs), tuple(sorted(self._owners.items()))

    def answer(self, request: Request) -> tuple[MarkedBlobs, Any]:
        """What the store is when this was done, and what it says to it. Raises Violation."""
        operation, name, *what = request
        if operation == "get":
            return self, self.there(name)
        if operation == "size":
            body = self.there(name)
            return self, body and len(body)
        if operation == "list":
            return self, tuple(self.list(name))
        new = self.copy()
        if operation == "create":
            return (new, True) if isinstance(new.create(name, what[0], id=""), Created) else (self, None)
        if operation == "replace":
            with suppress(LostRace, BlobNotFound):
                return new, new.replace(name, what[0], etag=what[1], id="")
            return self, LOST
        if operation == "put":
            return new, new.write(name, what[0])
        new.delete(name)
        return new, None

    def settled(self, request: Request) -> bool:
        """Whether this request changes nothing and is answered alike for ever: by what is never changed once it is there."""
        operation, name, *what = request
        if operation == "replace":  # An etag that is gone never comes back.
            return name not in self._blobs or self._blobs[name].etag != what[1]
        if operation == "get":
            return name.endswith(".lost.json") or (
                name.startswith("_ledger/") and name in self._blobs
            )  # nobody orders a skip
        # A lease may be deleted, and then be created after all.
        return operation in ("create", "put", "size") and name in self._blobs and name != LEASE

    def copy(self) -> MarkedBlobs:
        new = MarkedBlobs()
        for kept in ("_blobs", "_contents", "_ends", "_owners"):
            setattr(new, kept, getattr(self, kept).copy())
        return new

    def write(self, name: str, body: bytes) -> str:
        """Whatever was there."""
        return self._write(name, body)

    def _write(self, name: str, body: bytes) -> str:
        self._writes = zlib.crc32(body)
        return super()._write(name, body)


class Remote:
    """The store at the other end of a line: every request becomes one call of `ask`."""

    def __init__(self, ask: Callable[[Request], Any]) -> None:
        self._ask = ask

    def create(self, name: str, body: bytes, *, id: str) -> Created | None:
        return Created("?") if self._write("create", name, body) else None

    def replace(self, name: str, body: bytes, *, etag: str, id: str) -> str:
        answer: str = self._write("replace", name, body, etag)
        if answer == LOST:
            raise LostRace(name)
        return answer

    def put(self, name: str, body: BinaryIO) -> None:
        self._write("put", name, body.read())

    def delete(self, name: str) -> None:
        self._write("delete", name)

    def get(self, name: str) -> Blob:
        body = self._read("get", name)
        etag = str(zlib.crc32(body) + 1)
        return Blob(body, etag, etag)

    def size(self, name: str) -> int:
        size: int = self._read("size", name)
        return size

    def list(self, prefix: str) -> Iterator[Listed]:
        return iter(self._read("list", prefix))

    def _write(self, *request: Any) -> Any:
        answer = self._ask(request)
        if answer == NO_ANSWER:
            raise Unknown
        return answer

    def _read(self, *request: Any) -> Any:
        answer = self._ask(request)
        if answer == NO_ANSWER:
            raise StoreUnavailable(f"{request}: no answer")
        if answer is None:
            raise BlobNotFound(f"{request}: not there")
        return answer


class Plain:
    """A line on which nothing goes wrong: here it goes wrong in the store's answers."""

    def before(self, operation: str, name: str) -> Fate:
        return Fate.FINE

    def after(self, answer: object) -> None: ...

    def later(self, name: str, what: tuple[object, ...], write: Callable[[], object]) -> None: ...

    def listing(self, prefix: str, fresh: list[Listed]) -> list[Listed]:
        return fresh


class Feed:
    """The hub, as one pump reads it: in slices of so many bytes. `reads` is called before each."""

    def __init__(self, hub: CountingHub, bytes_max: int, reads: Callable[[], object]) -> None:
        self.id = hub.id
        self.period_s, self.place_bits = hub.period_s, hub.place_bits
        self.bounds = hub.bounds
        self._hub = hub
        self._bytes_max = bytes_max
        self._reads = reads

    def read(self, partition: int, offset: str, *, bytes_max: int) -> Slice:
        self._reads()
        return self._hub.read(partition, offset, bytes_max=min(bytes_max, self._bytes_max))


class StillClock:
    """Time stands still. A pump that waits goes on at once, or ends if it has read and settled all."""

    def __init__(self, now_ms: int, end: str) -> None:
        self.pump: Pump | None = None
        self._now_ms = now_ms
        self._end = end

    def now_ms(self) -> int:
        return self._now_ms

    def monotonic(self) -> float:
        return 0.0

    def wait(self, event: object, timeout_s: float) -> bool:
        pump = self.pump
        assert pump is not None
        if pump.offset == self._end and pump._markers and pump._due is None:
            pump.stop(CloseReason.SHUTDOWN)
        return False


class Quiet:
    """A log of which only what must not be there is of interest."""

    def info(self, event: str, **fields: Any) -> None: ...

    def warning(self, event: str, **fields: Any) -> None: ...

    def error(self, event: str, **fields: Any) -> None:
        if event in BAD_NEWS:
            raise Violation(f"{event}: {fields}")


class Thread:
    """Runs in place of the one that starts it."""

    def __init__(self, *, target: Callable[[], None], name: str, daemon: bool) -> None:
        self.start = target


class Flag:
    def __init__(self) -> None:
        self._set = False

    def set(self) -> None:
        self._set = True

    def is_set(self) -> bool:
        return self._set


class Asks(BaseException):
    """The answers are at their end, and it has one request more."""


class Stand:
    """Where an archiver stands: the request that it makes next, None at its end; `after` an answer it stands elsewhere."""

    def __init__(self, request: Request | None, life: int, answers: tuple[Any, ...]) -> None:
        self.request = request
        self.life = life
        self.answers = answers
        self.after: dict[Any, Stand] = {}


class Actor:
    """A pump with an archiver that takes the lease, as often as it has lives."""

    def __init__(
        self,
        log: Log,
        name: str,
        broken: Broken | None,
        *,
        lives: int,
        wall_ms: int,
        read_bytes: int,
        file_bytes_max: int,
    ) -> None:
        self.name = name
        self._lives = lives
        self._stands: dict[object, Stand] = {}
        blobs: Any = Remote(self._ask)
        self._store = SimBlobs(blobs, Plain(), broken)
        self._feed: Any = Feed(log.hub, read_bytes, self._reads)
        self._clock: Any = StillClock(wall_ms, log.end)
        self._file_bytes_max = file_bytes_max
        self._answers: Iterator[Any] = iter(())
        self._known: list[Any] = []
        self._heard: list[Any] = []
        self._request: Request | None = None
        self._life = 0
        self._ids = 0

    def begins(self) -> Stand:
        return self._stand(1, ())

    def hears(self, stand: Stand, answer: Any) -> Stand:
        """Where it stands after this answer."""
        there = stand.after.get(answer)
        if there is None:
            there = stand.after[answer] = self._stand(stand.life, (*stand.answers, answer))
        return there

    def id(self) -> SimpleNamespace:
        """In the place of a random one."""
        self._ids += 1
        return SimpleNamespace(hex=f"id-{self._life}{self.name}-{self._ids:04}")

    def _stand(self, life: int, answers: tuple[Any, ...]) -> Stand:
        """Where it stands with these answers since that life began."""
        self._answers = iter(answers)
        self._request = None
        uuid = SimpleNamespace(uuid4=self.id)
        with suppress(Asks), patch.object(archiver_module, "uuid", uuid), patch.object(begin_module, "uuid", uuid):
            self._live(life)
        key = self._request and (self._life, self._ids, tuple(self._known), self._request)
        return self._stands.setdefault(key, Stand(self._request, self._life, tuple(self._heard)))

    def _ask(self, request: Request) -> Any:
        for answer in self._answers:
            self._known.append(answer)
            self._heard.append(answer)
            return answer
        self._request = request
        raise Asks

    def _live(self, life: int) -> None:
        for number in range(life, self._lives + 1):
            self._life = number
            self._known = []
            self._heard = []
            self._ids = 0
            try:
                holding = take(self._feed, self._store, self._clock, Writer(self.name, f"{self._life}{self.name}"))
            except (StoreUnavailable, LostRace):
                continue
            feed(self._feed, self._store, holding, self._clock, self.name, self._file_bytes_max)
            if holding.held:
                return

    def _reads(self) -> None:
        """A pump that is about to read has forgotten all answers but for what it made of them."""
        self._known = [digest(self._clock.pump)]


WHOLE = {type(None), bool, int, float, str, bytes, Checkpoint, Lease, Record, Gap, OpenFile, CloseReason}
FIXED = {SimBlobs, Feed, StillClock, Quiet, SimFiles, PosixPath, Thread, nullcontext, FunctionType, MethodType}
PARTS = {Pump, Holding, Archiver, Ledger, Writer}


def digest(thing: Any) -> object:
    """All that a pump knows, as a value. What stays the same for as long as an actor lives is left out."""
    kind = type(thing)
    if kind in WHOLE:
        return thing
    if kind in FIXED:
        return None
    if kind in PARTS:
        return tuple([digest(value) for value in vars(thing).values()])
    if kind is tuple:
        return tuple([digest(value) for value in thing])
    if kind is dict:
        return tuple(thing.items())
    if kind is Flag:
        return thing.is_set()
    if kind is io.BytesIO:
        return thing.getvalue()
    if kind is FrameKind or kind is itertools.count:
        return str(thing)
    raise AssertionError(f"a new kind of state, which has to be taken into account: {thing!r}")


def take(hub: Any, store: BlobStore, clock: Any, writer: Writer) -> Holding:
    """The lease, from whoever has it."""
    try:
        blob = store.get(LEASE)
    except BlobNotFound:
        begins = begin_module.start(store, hub, 0, host=writer.owner, clock=clock)
        return claim_lease(store, clock, ARCHIVE_GROUP, 0, writer, start=begins)
    return take_over(store, clock, ARCHIVE_GROUP, decode_lease(blob.body, 0), blob.etag, writer)


def feed(hub: Any, store: BlobStore, holding: Holding, clock: Any, name: str, file_bytes_max: int) -> None:
    """Pump the whole log into an archiver, or until the lease is lost."""

    def make(partition: int) -> Archiver:
        return Archiver(
            hub,
            store,
            partition,
            host=name,
            epoch=lambda: 1,
            clock=clock,
            files=SimFiles(bool),
            folder=Path("nowhere"),
            file_bytes_max=file_bytes_max,
            log=Quiet(),
        )

    clock.pump = Pump(hub, holding, make, clock=clock, log=Quiet(), lease_s=30.0, fatal=fatal)
    clock.pump.start()


def fatal(error: Exception) -> None:
    raise Violation(f"a pump ended: {error!r}") from error


class State(NamedTuple):
    store: MarkedBlobs
    stands: tuple[Stand, ...]
    late: tuple[Request, ...] = ()
    faults: int = 0


Choice = tuple[tuple[Any, ...], State]
Trail = tuple[tuple[Any, ...], "Trail"] | None


class Explorer:
    """Tries everything. `run` returns when nothing is left to try, or raises the Violation that it has found."""

    def __init__(self, faults: int, lives: int, broken: Broken | None, *, late: bool) -> None:
        self.seen: set[State] = set()
        self.tried = 0
        self.ends: set[tuple[MarkedBlobs, tuple[Request, ...]]] = set()
        self._faults = faults
        self._broken = broken
        self._log = Log(late=late)
        self._stores = {self._log.blobs.state: self._log.blobs}
        self._actors = [
            Actor(self._log, "A", broken, lives=lives, wall_ms=START_MS, read_bytes=1 << 20, file_bytes_max=1 << 20),
            Actor(
                self._log, "B", broken, lives=lives, wall_ms=START_MS + PERIOD_S * 1000, read_bytes=1, file_bytes_max=60
            ),
        ]

    def run(self) -> None:
        todo: list[tuple[State, Trail]] = []
        stands = tuple(actor.begins() for actor in self._actors)
        self._reach(State(self._log.blobs, stands, self._log.coming), None, todo)
        while todo:
            state, trail = todo.pop()
            try:
                for what, after in self._choices(state):
                    self.tried += 1
                    if after not in self.seen:
                        self._reach(after, (what, trail), todo)
            except Violation as violation:
                violation.add_note("\n".join(told(trail)))
                raise
            assert len(self.seen) < STATES_MAX, "too many states to try them all"

    def _reach(self, state: State, trail: Trail, todo: list[tuple[State, Trail]]) -> None:
        self.seen.add(state)
        todo.append((state, trail))
        end = state.store, state.late
        if end not in self.ends:
            self.ends.add(end)
            self._finish(*end)

    def _choices(self, state: State) -> Iterator[Choice]:
        for number, stand in enumerate(state.stands):
            if stand.request is not None and self._settled(state.store, stand.request):
                yield from self._requests(state, number, stand.request)
                return
        for number, stand in enumerate(state.stands):
            if stand.request is not None:
                yield from self._requests(state, number, stand.request)
        for at, request in enumerate(state.late):
            store, _ = self._carried_out(state.store, request)
            late = state.late[:at] + state.late[at + 1 :]
            yield ("lands late", request), self._normal(state._replace(store=store, late=late))

    def _requests(self, state: State, number: int, request: Request) -> Iterator[Choice]:
        """All that may become of a request."""
        done, answer = self._carried_out(state.store, request)
        outcomes = [(done, answer, False)]
        if state.faults < self._faults:
            outcomes.append((state.store, NO_ANSWER, False))
            if request[0] == "list":
                outcomes.append((state.store, (), False))
            elif request[0] in WRITING and done is not state.store:
                again = {"create": None, "replace": LOST}.get(request[0], answer)
                outcomes += [(done, NO_ANSWER, False), (state.store, NO_ANSWER, True), (done, again, False)]
        for faulty, (store, answer, is_late) in enumerate(outcomes):
            stands = list(state.stands)
            stands[number] = self._actors[number].hears(stands[number], answer)
            late = tuple(sorted((*state.late, request))) if is_late else state.late
            what = self._actors[number].name, request, answer, "later" if is_late else ""
            yield what, self._normal(State(store, tuple(stands), late, state.faults + (faulty > 0)))

    def _normal(self, state: State) -> State:
        """Without the late writes that will change nothing."""
        late = tuple(request for request in state.late if not self._settled(state.store, request))
        return state if late == state.late else state._replace(late=late)

    def _settled(self, store: MarkedBlobs, request: Request) -> bool:
        # Where records are overwritten, nothing is.
        return self._broken is not Broken.OVERWRITES and store.settled(request)

    def _carried_out(self, store: MarkedBlobs, request: Request) -> tuple[MarkedBlobs, Any]:
        found = store.after.get(request)
        if found is None:
            after, answer = store.answer(request)
            found = store.after[request] = self._stores.setdefault(after.state, after), answer
        return found

    def _finish(self, store: MarkedBlobs, late: tuple[Request, ...]) -> None:
        """Both die here. Another archiver completes what is not, then what was under way lands. Raises Violation."""
        blobs: Any = store.copy()
        clock: Any = StillClock(START_MS, self._log.end)
        holding = take(self._log.hub, blobs, clock, Writer("last", "last"))
        feed(self._log.hub, blobs, holding, clock, "last", 1 << 20)
        for request in late:
            blobs, _ = blobs.answer(request)
        judge(self._log.hub, blobs, [self._log.lines])


def told(trail: Trail) -> Iterator[str]:
    if trail is not None:
        yield from told(trail[1])
        yield " ".join(str(part) for part in trail[0])


def explored(faults: int, lives: int, broken: Broken | None = None, *, late: bool = False) -> Explorer:
    """An explorer that has tried everything. Raises Violation."""
    threads = SimpleNamespace(Thread=Thread, Event=Flag, Lock=nullcontext)
    with (
        patch.object(pump_module, "threading", threads),
        patch.object(lease_module, "threading", threads),
        patch.object(check_module, "ThreadPoolExecutor", InPlace),
        breaking(broken),
    ):
        explorer = Explorer(faults, lives, broken, late=late)
        explorer.run()
    return explorer


@pytest.mark.parametrize(("faults", "lives", "late"), [(2, 1, False), (1, 2, False), (1, 1, True)])
def test_no_course_of_things_harms_the_archive(
    faults: int, lives: int, late: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    explorer = explored(faults, lives, late=late)
    with capsys.disabled():
        print(
            f"\ninterleavings{', begun late' if late else ''}: with at most {faults} faults and {lives} lives there are "
            f"{len(explorer.seen):,} states and {explorer.tried:,} choices, all tried; if all dies there are "
            f"{len(explorer.ends):,} different things to complete"
        )
    assert len(explorer.ends) > 100


@pytest.mark.parametrize(
    "broken", [one for one in Broken if one not in (Broken.WALL_CLOCK, Broken.UNSAID, Broken.UNHEARD)]
)
def test_a_step_that_is_taken_away_is_missed(broken: Broken) -> None:
    with pytest.raises(Violation):
        explored(1, 1, broken, late=broken is Broken.NO_GAP)
