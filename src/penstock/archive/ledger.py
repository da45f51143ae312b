"""The ledger: which events are in which hour file, decided for ever by creating records (guarantees.md, L1 to L3).

For each partition the ledger is a chain: the record at `first` names `next`, and so the name of the record behind it, before
anyone knows what that will say. Records are created create-only and never changed, therefore at most one stands under each
name, whoever wanted which; and because the chain begins at 0, and a record behind it is created only by one that has read (or
made) the record before, all records of a partition lie on one chain without holes or overlaps. Events that no file holds, such
as those that were gone when the archive began, have a record too: a gap says which and why (begin.py makes the first).

What follows for readers: *any* record of a partition that a `get` returns is on the chain, and where there is none at 0 there
is none at all. So a listing may be used to find a place to begin, as a hint that a `get` proves; going on is always by `next`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from typing import Final, Protocol, TypeAlias

import msgspec

from penstock.archive.cut import ClosedBy, file_name, hour_start_ms
from penstock.blobs import BlobStore, Exists
from penstock.clock import Clock, timestamp
from penstock.errors import ArchiveError, BlobNotFound, SettingsError
from penstock.hub import Hub

HUB_BLOB: Final = "_hub.json"
_RECORD_NAME: Final = re.compile(r"_ledger/\d+/(\d{20})\.json")
_LOST_NAME: Final = re.compile(r"_ledger/\d+/(\d{20})\.lost\.json")


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


class Gap(msgspec.Struct, frozen=True, gc=False):
    """Events `[first, next)` of a partition that are in no hour file, and why (docs/formats.md).

    `host` and `epoch` are those under which it was made: empty and 0 where nobody had the partition's lease yet.
    """

    hub: str
    partition: int
    first: int
    next: int
    offset_next: str
    reason: str
    host: str
    epoch: int
    id: str
    at: str


Link: TypeAlias = Record | Gap
"""A record of a chain. Only a gap has a reason."""


class Each(Protocol):
    """`map`, or a pool's."""

    def __call__(self, act: Callable[[int], bytes | None], numbers: Sequence[int], /) -> Iterator[bytes | None]: ...


class _Kind(msgspec.Struct, frozen=True):
    reason: object = msgspec.UNSET


class Owner(msgspec.Struct, frozen=True, omit_defaults=True):
    """`_hub.json`: whose store this is. `period` in seconds. `place_bits`: as the hub's; without them sequence numbers count events."""

    hub: str
    partitions: int
    period: int
    created: str
    place_bits: int = 0


def record_name(partition: int, first: int) -> str:
    return f"_ledger/{partition}/{first:020}.json"


def lost_name(partition: int, first: int) -> str:
    return f"_ledger/{partition}/{first:020}.lost.json"


def decode(body: bytes) -> Link:
    """A record of either kind. Raises what msgspec raises."""
    is_gap = msgspec.json.decode(body, type=_Kind).reason is not msgspec.UNSET
    return msgspec.json.decode(body, type=Gap) if is_gap else msgspec.json.decode(body, type=Record)


def claim(store: BlobStore, hub: Hub, clock: Clock) -> None:
    """Make the store this hub's, or see that it is. Raises SettingsError if it is another's, and leaves it alone."""
    mine = Owner(hub.id, hub.partitions(), hub.period_s, timestamp(clock.now_ms()), hub.place_bits)
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
        self._fetched: dict[int, bytes] = {}

    def fetch(self, numbers: Sequence[int], each: Each) -> None:
        """Read the records at these places, of which a listing tells, for the `chain` that will come to them. They never change."""
        bodies = zip(numbers, each(self._body, numbers), strict=True)
        self._fetched = {first: body for first, body in bodies if body is not None}

    def read(self, first: int) -> Link | None:
        """The record at `first`; None if it is undecided what comes there. Raises ArchiveError if it is not right."""
        body = self._fetched.pop(first, None) or self._body(first)
        return None if body is None else self._checked(body, first, record_name(self._partition, first))

    def create(self, record: Link) -> Link:
        """Decide what comes there, or learn how it was decided: returns the record that stands, `record` or another's.

        To be called only by one that knows the record before (L1) and has confirmed its file (L4).
        """
        name = record_name(self._partition, record.first)
        answer = self._store.create(name, msgspec.json.encode(record), id=record.id)
        return self._checked(answer.blob.body, record.first, name) if isinstance(answer, Exists) else record

    def lost(self, first: int) -> Gap | None:
        """Why the file of the record at `first` will never be there (skip.py); None if nobody said so. Raises ArchiveError."""
        try:
            blob = self._store.get(lost_name(self._partition, first))
        except BlobNotFound:
            return None
        found = self._checked(blob.body, first, lost_name(self._partition, first))
        if not isinstance(found, Gap):
            raise ArchiveError(f"{lost_name(self._partition, first)} says no reason", partition=self._partition)
        return found

    def lose(self, gap: Gap) -> None:
        """Say that the file of the record at `gap.first` will never be there, unless that is said already."""
        self._store.create(lost_name(self._partition, gap.first), msgspec.json.encode(gap), id=gap.id)

    def chain(self, first: int) -> Iterator[Link]:
        """The record at `first` and all behind it."""
        while (record := self.read(first)) is not None:
            yield record
            first = record.next

    def tail(self, first: int) -> Link | None:
        """The last record of the chain from `first` on; None if there is none at `first`."""
        last = None
        while (record := self.read(first)) is not None:
            last, first = record, record.next
        return last

    def last(self) -> Link | None:
        """The last record of the whole chain; None if it has none. A listing only shortens the way to it."""
        listed = self.listed()
        return (self.tail(listed[-1]) if listed else None) or self.tail(0)

    def before(self, first: int) -> Link | None:
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
        return sorted(self._shown(_RECORD_NAME))

    def listed_lost(self) -> set[int]:
        """`first` of the records whose files a listing shows to be declared lost."""
        return set(self._shown(_LOST_NAME))

    def _shown(self, pattern: re.Pattern[str]) -> Iterator[int]:
        names = (pattern.fullmatch(blob.name) for blob in self._store.list(f"_ledger/{self._partition}/"))
        return (int(match[1]) for match in names if match)

    def _body(self, first: int) -> bytes | None:
        try:
            return self._store.get(record_name(self._partition, first)).body
        except BlobNotFound:
            return None

    def _hints(self, first: int) -> list[int]:
        return [max(earlier)] if (earlier := [n for n in self.listed() if n < first]) else []

    def _checked(self, body: bytes, first: int, name: str) -> Link:
        try:
            record = decode(body)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise ArchiveError(f"{name} cannot be read: {error}", record=name) from error
        if (record.hub, record.partition, record.first) != (self._hub_id, self._partition, first):
            raise ArchiveError(
                f"{name} is of hub {record.hub}, partition {record.partition}, {record.first}", record=name
            )
        if record.next <= first or (isinstance(record, Record) and not _names_its_file(record)):
            raise ArchiveError(f"{name} contradicts itself", record=name)
        return record


def _names_its_file(record: Record) -> bool:
    hour_start_ms(record.hour)
    return record.part >= 0 and record.file == file_name(record.partition, record.hour, record.part)
