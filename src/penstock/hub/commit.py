"""One commit of the embedded hub: frames and producers' entries into a write transaction.

A batch is judged after those before it in the same commit were, so two copies that meet in one commit are one store and one
duplicate. The frames were made of all batches before the lock was taken; only when a batch turns out not to be stored (again) are they
made anew without it.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

import lmdb
import msgspec

from penstock.errors import HubBroken
from penstock.events import Appended, Batch, FrameKind
from penstock.hub import Refused
from penstock.hub.layout import EVENTS, KEY, MARKER, META_COUNTERS, META_POSITIONS, Databases, Meta
from penstock.hub.producers import Producer, decode, encode, judge, lost_before, remember
from penstock.hub.reading import is_open
from penstock.wire.draft import Draft, drafts
from penstock.wire.frame import pack

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
        self._producers: dict[str, Producer] = {}
        self._counts: dict[str, int] = {}

    def add(
        self, batches: Sequence[Batch], ready: Sequence[Draft], *, frame_bytes_max: int
    ) -> Sequence[Appended | Refused]:
        """Store the batches that are to be stored, of which `ready` are the frames; an answer for each."""
        ranges: list[list[tuple[int, int, int]]] = [[] for _ in batches]
        answers = [self._judged(batch, into) for batch, into in zip(batches, ranges, strict=True)]
        if any(answer is not None for answer in answers):
            kept = [index for index, answer in enumerate(answers) if answer is None]
            ready = drafts([batches[index] for index in kept], frame_bytes_max=frame_bytes_max)
            self._place(ready, [ranges[index] for index in kept])
        else:
            self._place(ready, ranges)
        return [answer or Appended(b.accepted, duplicate=False) for b, answer in zip(batches, answers, strict=True)]

    def _judged(self, batch: Batch, ranges: list[tuple[int, int, int]]) -> Appended | Refused | None:
        """None when the batch is to be stored; then `ranges` is what its entry will say, once it is filled."""
        if not batch.retry_safe:
            return None
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
        self._producers[batch.producer] = remember(known, batch, self._at_ms, ranges)
        return None

    def _known(self, producer: str) -> Producer | None:
        known = self._producers.get(producer)
        if known is None:
            entry = self._txn.get(producer.encode(), db=self._databases.producers)
            known = decode(entry) if entry is not None else None
        return known

    def _place(self, ready: Sequence[Draft], ranges: Sequence[list[tuple[int, int, int]]]) -> None:
        """Give each frame its sequence numbers and put it."""
        for draft in ready:
            partition = draft.partition
            first = number = self._next.get(partition, -1)
            if first < 0:
                first = number = self._positions.next(partition)
            for index, count in draft.members:
                ranges[index].append((partition, number, number + count))
                number += count
            self._next[partition] = number
            self._append(partition, KEY.pack(first, EVENTS), draft.placed(first, self._at_ms))

    def mark(self, partition: int, kind: FrameKind) -> int:
        """Put a marker behind a partition's events, if a file may be open there: if its last record is events.

        A time marker only when those are of an earlier period. Returns the partition's end.
        """
        end, period_ms, _ = self._positions.get(partition)
        due = kind is FrameKind.CUT_MARKER or period_ms < self._period_ms
        if due and is_open(self._txn.cursor(self._databases.frames[partition])):
            packed = pack(kind, partition, end, 0, self._at_ms, 0, 0, 0, b"", 0, b"")
            self._append(partition, KEY.pack(end, MARKER), packed)
        return end

    def _append(self, partition: int, key: bytes, value: bytes) -> None:
        """LMDB says no, and writes nothing, when the key does not come behind the last: then `positions` is not the log's."""
        if not self._txn.put(key, value, db=self._databases.frames[partition], append=True):
            raise HubBroken(
                f"The log of partition {partition} goes on behind the end that the hub has written down. Nothing of this commit was "
                "stored; restore the hub from a backup."
            )

    def count(self, name: str, by: int = 1) -> None:
        self._counts[name] = self._counts.get(name, 0) + by

    def finish(self) -> None:
        """Everything that waits goes into the transaction."""
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
