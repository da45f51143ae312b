"""The ledger: which events are in which hour file, decided for ever by creating records (guarantees.md, L1 to L3).

For each partition the ledger is a chain: the record at `first` names `next`, and so the name of the record behind it, before
anyone knows what that will say. Records are created create-only and never changed, therefore at most one stands under each
name, whoever wanted which; and because one is created only by an archiver that has read (or made) the record before it, all
records of a partition lie on one chain without gaps or overlaps.

What follows for readers: *any* record of a partition that a `get` returns is on the chain. So a listing may be used to find
a place to begin, as a hint that a `get` proves; going on is always by `next`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Final

import msgspec

from penstock.archive.cut import ClosedBy, file_name, hour_start_ms
from penstock.blobs import BlobStore, Exists
from penstock.clock import Clock, timestamp
from penstock.errors import ArchiveError, BlobNotFound, SettingsError
from penstock.hub import Hub
from penstock.processor.lease import Start

HUB_BLOB: Final = "_hub.json"
_RECORD_NAME: Final = re.compile(r"_ledger/\d+/(\d{20})\.json")


class Record(msgspec.Struct, frozen=True, gc=False):
    """One hour file: events `[first, next)` of a partition (docs/formats.md)."""

    hub: str
    partition: int
    file: str
    hour: str
    part: int
    first: int
    next: int
    offset_next: str
    events: int
    raw_bytes: int
    crc32: int
    closed_by: ClosedBy
    host: str
    epoch: int
    id: str
    at: str


class Owner(msgspec.Struct, frozen=True):
    """`_hub.json`: whose store this is. `period` in seconds."""

    hub: str
    partitions: int
    period: int
    created: str


def record_name(partition: int, first: int) -> str:
    return f"_ledger/{partition}/{first:020}.json"


def claim(store: BlobStore, hub: Hub, clock: Clock) -> None:
    """Make the store this hub's, or see that it is. Raises SettingsError if it is another's, and leaves it alone."""
    mine = Owner(hub.id, hub.partitions(), hub.period_s, timestamp(clock.now_ms()))
    body = msgspec.json.encode(mine)
    answer = store.create(
        HUB_BLOB, body, id=body.decode()
    )  # the hub's id alone would pass another number of partitions
    if not isinstance(answer, Exists):
        return
    owner = _owner(answer.blob.body)
    for what, theirs, ours in (
        ("hub", owner.hub, mine.hub),
        ("number of partitions", owner.partitions, mine.partitions),
        ("period in seconds", owner.period, mine.period),
    ):
        if theirs != ours:
            raise SettingsError(f"the store belongs to another archive: its {what} is {theirs}, not {ours}")


def owner(store: BlobStore) -> Owner | None:
    """Whose store this is; None if nobody's yet. Raises SettingsError if that cannot be read."""
    try:
        return _owner(store.get(HUB_BLOB).body)
    except BlobNotFound:
        return None


def _owner(body: bytes) -> Owner:
    try:
        return msgspec.json.decode(body, type=Owner)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise SettingsError(f"{HUB_BLOB} in the store cannot be read: {error}") from error


class Ledger:
    """The ledger of one partition."""

    def __init__(self, store: BlobStore, hub_id: str, partition: int) -> None:
        self._store = store
        self._hub_id = hub_id
        self._partition = partition

    def read(self, first: int) -> Record | None:
        """The record of the file that begins at `first`; None if that is undecided. Raises ArchiveError if it is not right."""
        try:
            blob = self._store.get(record_name(self._partition, first))
        except BlobNotFound:
            return None
        return self._checked(blob.body, first)

    def create(self, record: Record) -> Record:
        """Decide a file, or learn how it was decided: returns the record that stands, `record` or another's.

        To be called only by one that knows the record before (L1) and has confirmed its file (L4).
        """
        name = record_name(self._partition, record.first)
        answer = self._store.create(name, msgspec.json.encode(record), id=record.id)
        return self._checked(answer.blob.body, record.first) if isinstance(answer, Exists) else record

    def chain(self, first: int) -> Iterator[Record]:
        """The record at `first` and all behind it."""
        while (record := self.read(first)) is not None:
            yield record
            first = record.next

    def tail(self, first: int) -> Record | None:
        """The last record of the chain from `first` on; None if there is none at `first`."""
        last = None
        while (record := self.read(first)) is not None:
            last, first = record, record.next
        return last

    def before(self, first: int) -> Record | None:
        """The record whose `next` is `first`; None if there is none.

        Unique, since all records are on one chain. Found from the nearest earlier record that a listing shows, and if the
        listing hides it, by walking; so the answer depends on the ledger alone.
        """
        for start in (*self._hints(first), 0):
            if start >= first:
                continue
            for record in self.chain(start):
                if record.next == first:
                    return record
                if record.next > first:
                    return None
        return None

    def listed(self) -> list[int]:
        """`first` of the records that a listing shows, in order: a hint."""
        blobs = self._store.list(f"_ledger/{self._partition}/")
        matches = [_RECORD_NAME.fullmatch(blob.name) for blob in blobs]
        return sorted(int(match[1]) for match in matches if match)

    def origin(self, log_first: int) -> int:
        """Where the chain begins: 0, or the first event that the log held when the archive began. `log_first`: holds now."""
        return 0 if self.read(0) is not None else min((*self.listed(), log_first))

    def _hints(self, first: int) -> list[int]:
        return [max(earlier)] if (earlier := [n for n in self.listed() if n < first]) else []

    def _checked(self, body: bytes, first: int) -> Record:
        name = record_name(self._partition, first)
        try:
            record = msgspec.json.decode(body, type=Record)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise ArchiveError(f"{name} cannot be read: {error}", record=name) from error
        if (record.hub, record.partition, record.first) != (self._hub_id, self._partition, first):
            raise ArchiveError(
                f"{name} is of hub {record.hub}, partition {record.partition}, {record.first}", record=name
            )
        hour_start_ms(record.hour)
        if (
            record.next <= first
            or record.part < 0
            or record.file != file_name(record.partition, record.hour, record.part)
        ):
            raise ArchiveError(f"{name} contradicts itself", record=name)
        return record


def start(store: BlobStore, hub: Hub, partition: int) -> Start:
    """Where a lease begins that does not exist: at the end of what the ledger has decided, in an epoch behind the last that it names.

    All files but the last are confirmed (L4). If the last one is missing, its writer died between record and file; then
    the lease begins at that file, and whoever holds it adopts the record and writes the file.
    """
    ledger = Ledger(store, hub.id, partition)
    log_first = hub.bounds(partition).first
    listed = ledger.listed()
    last = ledger.tail(listed[-1] if listed else 0)
    if last is None:
        return Start(str(log_first), log_first)
    try:
        store.size(last.file)
    except BlobNotFound:
        return Start(str(last.first), last.first, last.epoch + 1)
    return Start(last.offset_next, last.next, last.epoch + 1)
