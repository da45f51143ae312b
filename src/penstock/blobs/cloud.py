"""The blob store on Azure Blob Storage, S3 and what is compatible with it, and Google Cloud Storage, through obstore.

What a cloud answers is not always what it did. obstore sends a conditional write again after a 5xx or a cut connection, and
the second one meets what the first has written: "already exists" may be said of one's own blob. A 409 may also mean that a
container is being deleted or that two requests crossed, with nothing written; after a timeout nothing is known at all. So
only a success is taken at its word. Every other outcome of `create` and `replace` is settled by reading the blob back:

- it holds `id`: this write was done, whatever was said of it;
- `create`, and it holds something else: that was there before, or came after. Either way the name is not ours;
- `replace`, and its etag is neither the one to be replaced nor holds it `id`: another was faster. Perhaps ours was written
  and replaced since; the etag that it had is worth nothing either way, so that is a lost race all the same;
- there is no such blob, or it still has the old etag: nothing was done *yet*. The request may be on its way and be done
  later, so this is StoreUnavailable and never "not done". (`replace` finds no blob: nothing can be replaced any more.)

A read sees what was written before it, in all three clouds.

`etag` is what the store compares: the generation on GCS, the ETag elsewhere. On S3 that is the MD5 of the content, so equal
content has an equal etag; bodies that are replaced never have (they carry an `id` that was used for no other).

A lease has to be renewed within its time, by calls that come one after the other. A request for a record takes
RECORD_TIMEOUT_S at most and is repeated until RECORD_RETRY_S have passed: with the last pause and the last try 5 s, and with
the reading back 10 s, of the 30 s that a lease lasts. Hour files go in parts with more patience; they hold up nobody's lease.
"""

from __future__ import annotations

import contextlib
import itertools
import re
from collections.abc import Iterator, Mapping
from datetime import timedelta
from typing import TYPE_CHECKING, Any, BinaryIO, Final

import obstore
from obstore.exceptions import BaseError
from obstore.store import AzureStore, GCSStore, S3Store

from penstock.blobs import Blob, Created, Exists, Listed
from penstock.blobs.connection import AZURE, GCS, S3, Place, options, parse_url
from penstock.blobs.disk import check_name
from penstock.errors import BlobNotFound, LostRace, SettingsError, StoreUnavailable

if TYPE_CHECKING:
    from obstore import ObjectMeta, UpdateVersion
    from obstore.store import ClientConfig, ObjectStore, RetryConfig

RECORD_TIMEOUT_S: Final = 3.0
RECORD_RETRY_S: Final = 1.5
FILE_TIMEOUT_S: Final = 60.0
FILE_RETRY_S: Final = 20.0
# S3 takes 10,000 parts: files of 80 GB. Two parts under way, one being read and one full make 32 MiB.
PART_BYTES: Final = 8 << 20
PARTS_AT_ONCE: Final = 2
STREAM_BYTES: Final = 1 << 20
RECORD_BYTES_MAX: Final = 64 << 20

# NotFound is the system's FileNotFoundError. A source that cannot be read is an OSError too.
_FOREIGN: Final = (BaseError, OSError, NotImplementedError)
_STATUS: Final = re.compile(r"\bstatus(?: code)?: (\d{3})\b")
_CODE: Final = re.compile(r"<Code>([A-Za-z]{1,64})</Code>")
_NO_CONTAINER: Final = ("ContainerNotFound", "ContainerBeingDeleted", "NoSuchBucket")


def open_cloud(url: str, environ: Mapping[str, str]) -> CloudBlobs:
    """The store at `az://container/prefix`, `s3://bucket/prefix` or `gs://bucket/prefix`; asks it nothing yet.

    Raises SettingsError when address or environment are not enough to find it and sign in.
    """
    place = parse_url(url)
    config, plain_http = options(place, environ)
    try:
        records = _connect(place, config, plain_http, timeout_s=RECORD_TIMEOUT_S, retry_s=RECORD_RETRY_S, pause_s=0.5)
        files = _connect(place, config, plain_http, timeout_s=FILE_TIMEOUT_S, retry_s=FILE_RETRY_S, pause_s=5.0)
    except (BaseError, ValueError):
        # Not `from` the error: what obstore says may repeat a key that it could not read.
        raise SettingsError(
            f"The store {place} cannot be opened: account, key or endpoint in the environment is missing or has a wrong form "
            "(docs/stores.md). Nothing was touched."
        ) from None
    return CloudBlobs(place, records, files)


def _connect(
    place: Place, config: Mapping[str, str], plain_http: bool, *, timeout_s: float, retry_s: float, pause_s: float
) -> ObjectStore:
    kind: Any = {AZURE: AzureStore, S3: S3Store, GCS: GCSStore}[place.scheme]
    client: ClientConfig = {
        "timeout": timedelta(seconds=timeout_s),
        "connect_timeout": timedelta(seconds=min(timeout_s, 5.0)),
        "allow_http": plain_http,
    }
    retry: RetryConfig = {
        "max_retries": 10,
        "retry_timeout": timedelta(seconds=retry_s),
        "backoff": {"init_backoff": timedelta(milliseconds=100), "max_backoff": timedelta(seconds=pause_s), "base": 2},
    }
    store: ObjectStore = kind(
        place.container, prefix=place.prefix or None, config=dict(config), client_options=client, retry_config=retry
    )
    return store


class CloudBlobs:
    """A BlobStore on two connections to one place: an impatient one for records, a patient one for hour files."""

    def __init__(self, place: Place, records: ObjectStore, files: ObjectStore) -> None:
        self._place = place
        self._records = records
        self._files = files

    def create(self, name: str, body: bytes, *, id: str) -> Created | Exists:
        check_name(name)
        try:
            return Created(self._etag(obstore.put(self._records, name, body, mode="create")))
        except _FOREIGN as error:
            unknown = error
        try:
            there = self.get(name)
        except BlobNotFound:
            raise self._unavailable("create", name, unknown) from unknown
        return Created(there.etag) if id.encode() in there.body else Exists(there)

    def replace(self, name: str, body: bytes, *, etag: str, id: str) -> str:
        check_name(name)
        # The other key is left out: None would be a TypeError.
        condition: UpdateVersion = {"version": etag} if self._place.scheme == GCS else {"e_tag": etag}
        try:
            return self._etag(obstore.put(self._records, name, body, mode=condition))
        except _FOREIGN as error:
            unknown = error
        there = self.get(name)
        if id.encode() in there.body:
            return there.etag
        if there.etag == etag:
            raise self._unavailable("replace", name, unknown) from unknown
        raise LostRace(f"{name} was changed by another", blob=name)

    def put(self, name: str, body: BinaryIO) -> None:
        check_name(name)
        with self._translated("write", name):
            parts = _parts(body)
            first = next(parts, b"")
            if len(first) < PART_BYTES:
                obstore.put(self._files, name, first, use_multipart=False)
                return
            obstore.put(
                self._files,
                name,
                itertools.chain([first], parts),
                use_multipart=True,
                chunk_size=PART_BYTES,
                max_concurrency=PARTS_AT_ONCE,
            )

    def get(self, name: str) -> Blob:
        check_name(name)
        with self._found("read", name):
            try:
                # The answer to a range tells how long the blob is, beside how long the answer is: half a record must not pass for one.
                found = obstore.get(self._records, name, options={"range": (0, RECORD_BYTES_MAX)})
                size = found.meta["size"]
            except BaseError as error:
                if not _is_empty(error):
                    raise
                found, size = obstore.get(self._records, name), 0
            meta, body = found.meta, bytes(found.bytes())
        self._whole(name, len(body), size)
        return Blob(body, self._etag(meta), _mark(meta))

    def size(self, name: str) -> int:
        check_name(name)
        with self._found("look at", name):
            return obstore.head(self._records, name)["size"]

    def stream(self, name: str) -> Iterator[bytes]:
        check_name(name)
        with self._found("look at", name):
            whole = obstore.head(self._files, name)
        for at in range(0, whole["size"], PART_BYTES):
            end = min(at + PART_BYTES, whole["size"])
            with self._found("read", name):
                found = obstore.get(self._files, name, options={"range": (at, end)})
                meta, part = found.meta, memoryview(found.bytes())
            if self._etag(meta) != self._etag(whole):
                raise StoreUnavailable(
                    f"{name} in {self._place} was replaced while it was read: read it again", blob=name
                )
            self._whole(name, len(part), end - at)
            for begin in range(0, len(part), STREAM_BYTES):
                yield bytes(part[begin : begin + STREAM_BYTES])

    def list(self, prefix: str) -> Iterator[Listed]:
        # A prefix ends at a `/` for obstore. Not every store lists by name (S3 Express, Azure with folders), so this sorts.
        folder = prefix[: prefix.rfind("/") + 1]
        found = []
        with self._translated("list", prefix or "/"):
            for page in obstore.list(self._records, check_name(folder[:-1]) if folder else None, chunk_size=1000):
                found += [
                    Listed(one["path"], one["size"], _mark(one)) for one in page if one["path"].startswith(prefix)
                ]
        found.sort(key=lambda blob: blob.name)
        return iter(found)

    def delete(self, name: str) -> None:
        check_name(name)
        with contextlib.suppress(BlobNotFound), self._found("delete", name):
            obstore.delete(self._records, name)

    def _etag(self, answer: Mapping[str, Any]) -> str:
        etag = answer["version" if self._place.scheme == GCS else "e_tag"]
        if not etag:
            raise StoreUnavailable(f"{self._place} tells no etag of what it stores: it is not a store for Penstock")
        return str(etag)

    def _whole(self, name: str, got: int, size: int) -> None:
        if got != size:
            raise StoreUnavailable(f"{name} in {self._place}: {got} bytes came instead of {size}", blob=name)

    @contextlib.contextmanager
    def _found(self, what: str, name: str) -> Iterator[None]:
        """For what is about one blob. A container that is not there has no blobs either, but that is no answer about them."""
        with self._translated(what, name):
            try:
                yield
            except FileNotFoundError as error:
                if any(code in str(error) for code in _NO_CONTAINER):
                    raise
                raise BlobNotFound(f"there is no blob {name}", blob=name) from error

    @contextlib.contextmanager
    def _translated(self, what: str, name: str) -> Iterator[None]:
        try:
            yield
        except _FOREIGN as error:
            raise self._unavailable(what, name, error) from error

    def _unavailable(self, what: str, name: str, error: Exception) -> StoreUnavailable:
        return StoreUnavailable(f"{self._place} did not {what} {name}: {_reason(error)}", blob=name)


def _mark(meta: ObjectMeta) -> str:
    """The ETag as a listing and a read both have it: with quotes or without. On S3 it changes with the content, like the etag.

    The time of the last change is no part of it: stores tell fractions of its second in a listing and not in a read, and a
    lease whose mark flips never expires.
    """
    return (meta["e_tag"] or "").strip('"')


def _is_empty(error: Exception) -> bool:
    """Whether there is no such range: of nothing there is none (RFC 9110, 15.5.17)."""
    status = _STATUS.search(str(error))
    return status is not None and status[1] == "416"


def _reason(error: Exception) -> str:
    """Half a sentence of our own: what obstore says is a page, with addresses that may hold signatures."""
    text = str(error)
    status, code = _STATUS.search(text), _CODE.search(text)
    if code and code[1] in _NO_CONTAINER:
        return f"the container or bucket is not there ({code[1]}): make it first"
    if status and status[1] in ("401", "403"):
        return f"the key or token is not accepted ({status[1]}{' ' + code[1] if code else ''}): see docs/stores.md"
    if status:
        return f"it answers {status[1]}{' ' + code[1] if code else ''}"
    for sign, reason in (
        ("timed out", "it gives no answer in time"),
        ("TimedOut", "it gives no answer in time"),
        ("Connection refused", "nothing listens at its address"),
        ("ConnectionRefused", "nothing listens at its address"),
        ("dns error", "its address is not known"),
        ("certificate", "its certificate is not trusted"),
    ):
        if sign in text:
            return reason
    return getattr(error, "strerror", None) or f"the connection failed ({type(error).__name__})"


def _parts(body: BinaryIO) -> Iterator[bytes]:
    """PART_BYTES each but the last, which is shorter and may be empty."""
    part = b" " * PART_BYTES
    while len(part) == PART_BYTES:
        part = body.read(PART_BYTES)
        while 0 < len(part) < PART_BYTES and (more := body.read(PART_BYTES - len(part))):  # raw files may give less
            part += more
        yield part
