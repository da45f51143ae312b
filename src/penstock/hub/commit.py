"""One commit of the embedded hub: batches in, frames and producers' entries into a write transaction.

Short groups of several batches that go to the same partition share a plain frame, so that many small posts cost few puts. A batch is
judged after those before it in the same commit were added, so two copies that meet in one commit are one store and one duplicate.
"""

from __future__ import annotations

import struct

import lmdb
import msgspec

from penstock.events import Appended, Batch, FrameKind, Group, Source
from penstock.hub import Refused
from penstock.hub.layout import EVENTS, KEY, MARKER, META_COUNTERS, META_POSITIONS, Databases, Meta
from penstock.hub.producers import Producer, decode, encode, judge, lost_before, remember
from penstock.hub.reading import is_open
from penstock.wire.frame import PLAIN_BYTES_MAX, crc32, pack, pack_source

_FLOOR = struct.Struct("<q")
_POSITION = struct.Struct("<QqQ")


class Positions:
    """Where each partition ends, and how much it took in the running period: the hub's `positions` record."""

    def __init__(self, record: bytearray) -> None:
        self.record = record

    @staticmethod
    def bytes_for(partitions: int) -> int:
        return _FLOOR.size + partitions * _POSITION.size

    @property
    def floor_ms(self) -> int:
        """Nothing will be enqueued before this."""
        floor: int = _FLOOR.unpack_from(self.record)[0]
        return floor

    @floor_ms.setter
    def floor_ms(self, value: int) -> None:
        _FLOOR.pack_into(self.record, 0, value)

    def get(self, partition: int) -> tuple[int, int, int]:
        """Next sequence number, start of the period of the last event in ms, events accepted in it."""
        found: tuple[int, int, int] = _POSITION.unpack_from(self.record, _FLOOR.size + partition * _POSITION.size)
        return found

    def set(self, partition: int, following: int, period_ms: int, accepted: int) -> None:
        _POSITION.pack_into(self.record, _FLOOR.size + partition * _POSITION.size, following, period_ms, accepted)

    def next(self, partition: int) -> int:
        return self.get(partition)[0]

    def period(self, partition: int) -> tuple[int, int]:
        return self.get(partition)[1:]


class _Run:
    """A plain frame that is still growing."""

    def __init__(self, first: int) -> None:
        self.first = first
        self.count = 0
        self.raw_bytes = 0
        self.bodies: list[bytes] = []
        self.sources: list[bytes] = []


class Commit:
    """Built inside a write transaction; `finish` writes what is left, the caller commits."""

    def __init__(self, txn: lmdb.Transaction, databases: Databases, meta: Meta, now_ms: int) -> None:
        self._txn = txn
        self._databases = databases
        self._positions = Positions(bytearray(txn.get(META_POSITIONS, db=databases.meta)))
        # One time for the whole commit, never before an earlier commit's, whatever the clock does.
        self._at_ms = max(now_ms, self._positions.floor_ms)
        self._period_ms = self._at_ms - self._at_ms % (meta.period_s * 1000)
        self._next: dict[int, int] = {}
        self._runs: dict[int, _Run] = {}
        self._producers: dict[str, Producer] = {}
        self._counts: dict[str, int] = {}

    def add(self, batch: Batch) -> Appended | Refused:
        """Store the batch, or say why not."""
        known = None
        if batch.retry_safe:
            known = self._known(batch.producer)
            answer = judge(known, batch)
            if answer is not None:
                if isinstance(answer, Appended):
                    self.count("duplicates")
                return answer
            if known is None and batch.sequence > 1:
                self.count("dedup_window_passed")
            if lost_before(known, batch):
                self.count("lost_batches")
        ranges = [self._add_group(batch, group) for group in batch.groups]
        if batch.retry_safe:
            self._producers[batch.producer] = remember(known, batch, self._at_ms, tuple(ranges))
        return Appended(batch.accepted, duplicate=False)

    def _known(self, producer: str) -> Producer | None:
        known = self._producers.get(producer)
        if known is None:
            entry = self._txn.get(producer.encode(), db=self._databases.producers)
            known = decode(entry) if entry is not None else None
        return known

    def _add_group(self, batch: Batch, group: Group) -> tuple[int, int, int]:
        partition = group.partition
        first = self._next.get(partition)
        if first is None:
            first = self._positions.next(partition)
        source = pack_source(
            Source(
                batch.producer,
                batch.epoch,
                batch.sequence,
                group.count,
                batch.sha256,
                batch.properties,
                batch.device_field,
            )
        )
        run = self._runs.get(partition)
        if run is not None and (group.zipped or run.raw_bytes + group.raw_bytes >= PLAIN_BYTES_MAX):
            self._put_run(partition, self._runs.pop(partition))
            run = None
        if group.zipped:
            self._put(FrameKind.GZIP, first, group, source)
        else:
            if run is None:
                run = self._runs[partition] = _Run(first)
            run.count += group.count
            run.raw_bytes += group.raw_bytes
            run.bodies.append(group.body)
            run.sources.append(source)
        self._next[partition] = first + group.count
        return partition, first, first + group.count

    def _put(self, kind: FrameKind, first: int, group: Group, source: bytes) -> None:
        packed = pack(
            kind,
            group.partition,
            first,
            group.count,
            self._at_ms,
            group.raw_bytes,
            group.content_crc,
            group.body_crc,
            (source,),
            group.body,
        )
        self._txn.put(KEY.pack(first, EVENTS), packed, db=self._databases.frames[group.partition], append=True)

    def _put_run(self, partition: int, run: _Run) -> None:
        body = b"".join(run.bodies)
        crc = crc32(body)
        packed = pack(
            FrameKind.PLAIN, partition, run.first, run.count, self._at_ms, len(body), crc, crc, run.sources, body
        )
        self._txn.put(KEY.pack(run.first, EVENTS), packed, db=self._databases.frames[partition], append=True)

    def mark(self, partition: int, kind: FrameKind) -> int:
        """Put a marker behind a partition's events, if a file may be open there: if its last record is events.

        A time marker only when those are of an earlier period. Returns the partition's end.
        """
        end, period_ms, _ = self._positions.get(partition)
        due = kind is FrameKind.CUT_MARKER or period_ms < self._period_ms
        if due and is_open(self._txn.cursor(self._databases.frames[partition])):
            packed = pack(kind, partition, end, 0, self._at_ms, 0, 0, 0, (), b"")
            self._txn.put(KEY.pack(end, MARKER), packed, db=self._databases.frames[partition], append=True)
        return end

    def count(self, name: str, by: int = 1) -> None:
        self._counts[name] = self._counts.get(name, 0) + by

    def finish(self) -> None:
        """Everything that waits goes into the transaction."""
        for partition, run in self._runs.items():
            self._put_run(partition, run)
        positions = self._positions
        for partition, following in self._next.items():
            first, period_ms, accepted = positions.get(partition)
            if period_ms != self._period_ms:
                if accepted:
                    key = Databases.ACCEPTED.pack(period_ms, partition)
                    self._txn.put(key, accepted.to_bytes(8, "little"), db=self._databases.accepted)
                accepted = 0
            positions.set(partition, following, self._period_ms, accepted + following - first)
        positions.floor_ms = self._at_ms
        self._txn.put(META_POSITIONS, bytes(positions.record), db=self._databases.meta)
        for producer, entry in self._producers.items():
            self._txn.put(producer.encode(), encode(entry), db=self._databases.producers)
        if self._counts:
            counters = self._databases.counters(self._txn)
            for name, by in self._counts.items():
                counters[name] += by
            self._txn.put(META_COUNTERS, msgspec.json.encode(counters), db=self._databases.meta)
