"""Hour manifests: when every partition has archived an hour, `_hours/{hour}.json` lists its files.

An hour is complete when in every partition nothing can be enqueued in it any more and the `$archive` checkpoint has
reached the first frame or marker behind it. From then on its records can neither change nor grow in number, so the
manifest is a pure function of the ledger and whoever creates it writes the same bytes. An hour without events has none.
"""

from __future__ import annotations

from typing import Final

import msgspec

from penstock.archive.cut import hour_start_ms
from penstock.archive.ledger import Ledger, Record
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


class Manifest(msgspec.Struct, frozen=True):
    """`_hours/{hour}.json` (docs/formats.md)."""

    hub: str
    hour: str
    files: tuple[ManifestFile, ...]
    events: int
    raw_bytes: int


def manifest_name(hour: str) -> str:
    return f"_hours/{hour}.json"


def manifest(hub_id: str, hour: str, records: list[Record]) -> bytes:
    """The manifest of an hour from all its ledger records, in any order."""
    ordered = sorted(records, key=lambda record: (record.partition, record.first))
    return msgspec.json.encode(
        Manifest(
            hub=hub_id,
            hour=hour,
            files=tuple(
                ManifestFile(r.file, r.partition, r.first, r.next, r.events, r.raw_bytes, r.crc32) for r in ordered
            ),
            events=sum(record.events for record in ordered),
            raw_bytes=sum(record.raw_bytes for record in ordered),
        )
    )


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
    """

    def __init__(self, hub: Hub, store: BlobStore, *, group: str = ARCHIVE_GROUP) -> None:
        self._hub = hub
        self._store = store
        self._group = group
        self._cursors: dict[int, int] | None = None
        self._pending: dict[str, list[Record]] = {}

    def publish(self) -> list[str]:
        """Create the manifests of the hours that are complete by now; their names. Raises StoreError, ArchiveError."""
        done = self._checkpoints()
        if done is None:
            return []
        # The ledgers are followed after the checkpoints were read: a checkpoint behind the hour proves all its records.
        self._follow()
        published: list[str] = []
        for hour in sorted(self._pending):
            if not self._complete(hour, done):
                break
            self._create(hour)
            del self._pending[hour]
            published.append(hour)
        return published

    def _checkpoints(self) -> list[int] | None:
        done = [checkpoint(self._store, partition, self._group) for partition in range(self._hub.partitions())]
        known = [number for number in done if number is not None]
        return known if len(known) == len(done) else None

    def _complete(self, hour: str, done: list[int]) -> bool:
        end_ms = hour_start_ms(hour) + self._hub.period_s * 1000
        return all(
            self._hub.bounds(partition).enqueued_last_ms >= end_ms
            and number >= int(self._hub.locate(partition, end_ms))
            for partition, number in enumerate(done)
        )

    def _create(self, hour: str) -> None:
        body = manifest(self._hub.id, hour, self._pending[hour])
        # Whoever creates it creates these bytes, so only the whole body can tell a right one from a wrong one.
        answer = self._store.create(manifest_name(hour), body, id=body.decode())
        if isinstance(answer, Exists) and answer.blob.body != body:
            raise ArchiveError(f"{manifest_name(hour)} is not what the ledger says", hour=hour)

    def _follow(self) -> None:
        if self._cursors is None:
            self._cursors = self._resume()
        for partition, first in self._cursors.items():
            for record in self._ledger(partition).chain(first):
                self._pending.setdefault(record.hour, []).append(record)
                self._cursors[partition] = record.next

    def _resume(self) -> dict[int, int]:
        """Where to follow each ledger from: behind the last published hour, since hours are published in order.

        Listings are hints here too: one that hides names makes this begin earlier, and a manifest that exists is compared.
        """
        published = max((blob.name for blob in self._store.list("_hours/")), default="")
        return {partition: self._first_after(partition, published) for partition in range(self._hub.partitions())}

    def _first_after(self, partition: int, published: str) -> int:
        ledger = self._ledger(partition)
        for number in reversed(ledger.listed()):
            record = ledger.read(number)
            if record is not None and manifest_name(record.hour) <= published:
                return record.next
        return ledger.origin(self._hub.bounds(partition).first)

    def _ledger(self, partition: int) -> Ledger:
        return Ledger(self._store, self._hub.id, partition)
