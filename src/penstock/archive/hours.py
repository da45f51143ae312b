"""Hour manifests: when every partition has archived an hour, `_hours/{hour}.json` lists its files.

An hour is complete when in every partition nothing can be enqueued in it any more and the `$archive` checkpoint has
reached the first frame or marker behind it. From then on its records can neither change nor grow in number, so the
manifest is a pure function of the ledger and whoever creates it writes the same bytes. An hour without events has none.

It lists files that are there. One that was declared lost (lost.py) stands apart; only of such a file two writers may think differently,
if its archiver was alive all the same.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Final, NamedTuple

import msgspec

from penstock.archive.cut import hour_start_ms
from penstock.archive.ledger import Gap, Ledger, Record
from penstock.archive.lost import declared, in_store
from penstock.blobs import BlobStore, Exists
from penstock.errors import ArchiveError, SettingsError
from penstock.hub import Hub
from penstock.processor.lease import Lease, read_leases

ARCHIVE_GROUP: Final = "$archive"


class ManifestFile(msgspec.Struct, frozen=True, gc=False):
    """A file of the hour, as its ledger record says."""

    file: str
    partition: int
    first: int
    next: int
    events: int
    raw_bytes: int
    crc32: int


class Manifest(msgspec.Struct, frozen=True, omit_defaults=True):
    """`_hours/{hour}.json` (docs/formats.md). `events` and `raw_bytes` are of `files`, which are there; `lost` will never be."""

    hub: str
    hour: str
    files: tuple[ManifestFile, ...]
    events: int
    raw_bytes: int
    lost: tuple[ManifestFile, ...] = ()


def manifest_name(hour: str) -> str:
    return f"_hours/{hour}.json"


def _is_manifest(name: str) -> bool:
    try:
        hour_start_ms(name.removeprefix("_hours/").removesuffix(".json"))
    except ArchiveError:
        return False
    return name.endswith(".json")


def manifest(hub_id: str, hour: str, records: list[Record], lost: Collection[str] = ()) -> bytes:
    """The manifest of an hour from all its ledger records, in any order. `lost`: those of their files that are."""
    ordered = sorted(records, key=lambda record: (record.partition, record.first))
    there = [record for record in ordered if record.file not in lost]
    return msgspec.json.encode(
        Manifest(
            hub=hub_id,
            hour=hour,
            files=tuple(map(_entry, there)),
            events=sum(record.events for record in there),
            raw_bytes=sum(record.raw_bytes for record in there),
            lost=tuple(_entry(record) for record in ordered if record.file in lost),
        )
    )


def _entry(r: Record) -> ManifestFile:
    return ManifestFile(r.file, r.partition, r.first, r.next, r.events, r.raw_bytes, r.crc32)


def is_right(body: bytes, hub_id: str, hour: str, records: list[Record], may_be_lost: Collection[str]) -> bool:
    """Whether these bytes are the manifest, if each of these files was lost for its writer or was there."""
    try:
        lost = {file.file for file in msgspec.json.decode(body, type=Manifest).lost}
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return False
    return lost <= set(may_be_lost) and body == manifest(hub_id, hour, records, lost)


class HourRecords(NamedTuple):
    """What a ledger has of an hour: its records, and the first one behind it.

    `gaps` lie between the last file before the hour and the first one behind: their events may have been of the hour. `next`: up to
    where the chain was followed; None if there is none.
    """

    records: list[Record]
    later: Record | None
    gaps: list[Gap]
    next: int | None

    @property
    def whole(self) -> bool:
        """The ledger alone says that nothing of the hour can come any more."""
        return self.later is not None or bool(self.records and self.records[-1].closed_by == "time")


def find_hour(ledger: Ledger, start_ms: int) -> HourRecords:
    """The records of the hour that begins then.

    Halves the listed records to where the hour must begin, and from there follows the chain: a listing is a hint.
    """
    listed = ledger.listed()
    low, high = 0, len(listed)
    while low < high:
        middle = (low + high) // 2
        record = ledger.read(listed[middle])
        if isinstance(record, Record) and hour_start_ms(record.hour) < start_ms:
            low = middle + 1
        else:
            high = middle
    records: list[Record] = []
    gaps: list[Gap] = []
    reached: int | None = None
    for record in ledger.chain(listed[low - 1] if low else 0):
        reached = record.next
        if isinstance(record, Gap):
            gaps.append(record)
        elif hour_start_ms(record.hour) > start_ms:
            return HourRecords(records, record, gaps, reached)
        elif hour_start_ms(record.hour) == start_ms:
            records.append(record)
        else:
            gaps.clear()
    return HourRecords(records, None, gaps, reached)


def checkpoint(store: BlobStore, partition: int, group: str = ARCHIVE_GROUP) -> int | None:
    """The sequence number up to which the group is done, as its lease says; None if the lease is missing or unreadable."""
    lease = archive_lease(store, partition, group)
    return lease.sequence_number if lease else None


def archive_lease(store: BlobStore, partition: int, group: str = ARCHIVE_GROUP) -> Lease | None:
    """The archive's lease; None if it is missing or unreadable."""
    return read_leases(store, group, (partition,), unreadable=lambda _partition, _error: None)[0]


def refuse_older(store: BlobStore, hub: Hub) -> None:
    """Raises SettingsError if more was archived than the hub has ever held: it was restored from an older copy.

    What it takes from then on would lie behind the checkpoint: never archived, and deleted as if it were.
    """
    for partition in range(hub.partitions()):
        done, end = checkpoint(store, partition), hub.bounds(partition).next
        if done is not None and done > end:
            raise SettingsError(
                f"The hub is older than its archive: partition {partition} ends at {end}, and {done} events of it were archived. "
                "Restore the newest copy of the hub, or start on another data folder and store; nothing was touched."
            )


class HourKeeper:
    """Publishes manifests. One instance a host, called now and then from one thread (each round of the host will do).

    It remembers how far it followed each ledger, so a call costs one `get` a partition for its lease and one for the record
    that is not there yet. Several hosts may do the same at the same time.

    Every host publishes the hours in their order, so when it starts it goes on behind the last one that a listing shows. Where in
    a ledger that is, a listing may say too early; then records of published hours come again, which are passed over. What was
    followed must reach the checkpoint; if it does not, because records are gone, nothing is published and the next call starts anew.
    """

    def __init__(self, hub: Hub, store: BlobStore, *, group: str = ARCHIVE_GROUP) -> None:
        self._hub = hub
        self._store = store
        self._group = group
        self._cursors: dict[int, int] | None = None
        self._published = ""
        self._pending: dict[str, list[Record]] = {}

    def publish(self) -> list[str]:
        """Create the manifests of the hours that are complete by now; their names. Raises StoreError, ArchiveError."""
        done = self._checkpoints()
        if done is None:
            return []
        # The ledgers are followed after the checkpoints were read: a checkpoint behind the hour proves all its records.
        self._follow()
        self._check_reached(done)
        published: list[str] = []
        for hour in sorted(self._pending):
            if not self._complete(hour, done):
                break
            self._create(hour)
            del self._pending[hour]
            published.append(hour)
        return published

    def _checkpoints(self) -> list[Lease] | None:
        done = [archive_lease(self._store, partition, self._group) for partition in range(self._hub.partitions())]
        known = [lease for lease in done if lease is not None]
        return known if len(known) == len(done) else None

    def _complete(self, hour: str, done: list[Lease]) -> bool:
        end_ms = hour_start_ms(hour) + self._hub.period_s * 1000
        return all(
            self._hub.bounds(partition).enqueued_last_ms >= end_ms
            and int(lease.offset) >= int(self._hub.locate(partition, end_ms))
            for partition, lease in enumerate(done)
        )

    def _create(self, hour: str) -> None:
        records = self._pending[hour]
        # Asked behind the checkpoints: what an order passed over, it had declared lost before.
        may_be = {file for record in records for file in declared(self._ledger(record.partition), [record])}
        body = manifest(self._hub.id, hour, records, {file for file in may_be if not in_store(self._store, file)})
        # Whoever creates it creates these bytes, so only the whole body can tell a right one from a wrong one.
        answer = self._store.create(manifest_name(hour), body, id=body.decode())
        if isinstance(answer, Exists) and not is_right(answer.blob.body, self._hub.id, hour, records, may_be):
            raise ArchiveError(f"{manifest_name(hour)} is not what the ledger says", hour=hour)

    def _follow(self) -> None:
        if self._cursors is None:
            self._resume()
        assert self._cursors is not None, "_resume sets it"
        for partition, first in self._cursors.items():
            for record in self._ledger(partition).chain(first):
                if isinstance(record, Record) and manifest_name(record.hour) > self._published:
                    self._pending.setdefault(record.hour, []).append(record)
                self._cursors[partition] = record.next

    def _check_reached(self, done: list[Lease]) -> None:
        """Every checkpoint stands where a record ends, or at 0: who does not get there did not see all."""
        assert self._cursors is not None, "called behind _follow"
        for partition, lease in enumerate(done):
            reached = self._cursors[partition]
            if reached < lease.sequence_number:
                self._cursors, self._pending = None, {}
                raise ArchiveError(
                    f"the ledger of partition {partition} was followed to {reached}, and its checkpoint is {lease.sequence_number}: "
                    "no hour is published before that is read again",
                    partition=partition,
                )

    def _resume(self) -> None:
        """Where to follow each ledger from: behind the last published hour."""
        names = (blob.name for blob in self._store.list("_hours/"))
        self._published = max((name for name in names if _is_manifest(name)), default="")
        self._cursors = {partition: self._first_after(partition) for partition in range(self._hub.partitions())}

    def _first_after(self, partition: int) -> int:
        ledger = self._ledger(partition)
        for number in reversed(ledger.listed()):
            record = ledger.read(number)
            if isinstance(record, Record) and manifest_name(record.hour) <= self._published:
                return record.next
        return 0

    def _ledger(self, partition: int) -> Ledger:
        return Ledger(self._store, self._hub.id, partition)
