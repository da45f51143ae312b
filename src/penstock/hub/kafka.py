"""A hub in a Kafka topic: partitions are the topic's, a record is a frame or marker, and the brokers keep and delete (docs/kafka.md).

Where the embedded hub decides inside its write transaction, here the brokers do, or readers:

- *offsets* are the brokers'; a frame's first sequence number is its offset × 2^20, whatever its header says, which is 0 there;
- *times* are the brokers' LogAppendTime, never a writer's. A new leader's clock may be behind the last one's, so they are clamped while
  they are read. What was read before a reader began is not known to it: the archiver clamps again, from its ledger (archive/cut.py);
- *idle* partitions have a marker in each period, so that everybody sees that it is over, and the checkpoints of those who read
  move on before the brokers delete what is below them;
- *durable* is what all in-sync replicas have. A batch is in the topic when each of its frames is; a failure can leave some of them,
  of each partition those from its first on, because they are sent one after the other;
- *producers' numbers* are judged by readers (hub/duplicates.py): writers hold no state, so there may be any number of them.

The topic's own id is the hub's: a topic that is deleted and made again is another hub. The period is fixed in the archive's store, where
it is written down with the number of partitions; a topic to which partitions were added has moved its devices, and is refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Final, Self

import msgspec
from confluent_kafka import KafkaException, Message, TopicPartition
from confluent_kafka.admin import ListOffsetsResultInfo, OffsetSpec

from penstock.clock import Clock
from penstock.errors import FrameDamaged, HubError, NotFound, SettingsError
from penstock.events import Appended, Batch, Bounds, Frame, FrameKind, Slice
from penstock.hub import Refused
from penstock.hub.duplicates import Share, pack_owners, pack_shares
from penstock.hub.kafka_cluster import READ, Cluster
from penstock.hub.kafka_reading import Readers
from penstock.hub.kafka_topic import described
from penstock.hub.kafka_writing import OWNERS, SHARES, Outgoing, Writer
from penstock.wire import frame
from penstock.wire.draft import Draft, drafts
from penstock.wire.frame import FRAME_BYTES_MAX

PLACE_BITS: Final = 20
"""A frame has fewer events: 256 KiB of lines, or one batch's."""
_LOOK_BYTES: Final = 1 << 20


class KafkaHub:
    """The hub in `topic`. Thread-safe. Made after the fork of its process. Raises SettingsError when there is no topic to be read."""

    def __init__(
        self, cluster: Cluster, topic: str, *, period_s: int, clock: Clock, frame_bytes_max: int = FRAME_BYTES_MAX
    ) -> None:
        found = described(cluster, topic)
        if found is None:
            raise SettingsError(f"There is no topic {topic} at {cluster.servers}: `penstock api` makes it.")
        cluster.needs(READ, topic, found)
        self._cluster = cluster
        self._topic = topic
        self._id, self._count = found.id, found.partitions
        self._period_s = period_s
        self._clock = clock
        self._frame_bytes_max = frame_bytes_max
        self._readers = Readers(cluster, topic)
        self._writer = Writer(cluster, topic)
        self._marker = Writer(cluster, topic)  # a batch does not wait while a marker waits for brokers
        self._floors: dict[int, tuple[int, int]] = {}
        self._settled: dict[int, int] = {}
        self._marks_from_ms = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()

    def close(self) -> None:
        """No other call may be running."""
        self._readers.close()

    @property
    def id(self) -> str:
        return self._id

    @property
    def period_s(self) -> int:
        return self._period_s

    @property
    def place_bits(self) -> int:
        return PLACE_BITS

    def partitions(self) -> int:
        return self._count

    def append(self, batches: Sequence[Batch]) -> Sequence[Appended | Refused]:
        records: dict[int, list[Outgoing]] = {}
        done: dict[tuple[int, int], int] = {}
        for draft in drafts(batches, frame_bytes_max=self._frame_bytes_max):
            shares = list(_shares(draft, batches, done))
            record = Outgoing(draft.placed(0, 0), pack_shares(shares), pack_owners(shares))
            records.setdefault(draft.partition, []).append(record)
        self._writer.write(records)
        return [Appended(batch.accepted, duplicate=False) for batch in batches]

    def read(self, partition: int, offset: str, *, bytes_max: int) -> Slice:
        start = self._number(partition, offset)
        found = self._readers.read(partition, start, bytes_max=bytes_max)
        frames: list[Frame] = []
        reached = found.next
        for message in found.records:
            try:
                frames.append(self._frame(message))
            except FrameDamaged:
                if not frames:
                    raise
                reached = message.offset() or 0  # what is before it is good; the next read says what is wrong
                break
        return Slice(partition, offset, frames, str(reached), str(found.end))

    def bounds(self, partition: int) -> Bounds:
        self._number(partition, "0")
        first = self._edges([partition], OffsetSpec.earliest())[partition]
        following = self._edges([partition], OffsetSpec.latest())[partition]
        oldest = self._offsets([partition], OffsetSpec.for_timestamp(0))[partition].timestamp
        newest = self._newest_ms(partition, first, following)
        return Bounds(first << PLACE_BITS, following << PLACE_BITS, 0, max(0, oldest), max(0, newest))

    def _newest_ms(self, partition: int, first: int, end: int) -> int:
        if not self._cluster.is_event_hubs:
            return self._offsets([partition], OffsetSpec.max_timestamp())[partition].timestamp
        # There, nobody says that this can be asked for; and times are Azure's own, so that the last is the latest.
        return max([frame.enqueued_at_ms for frame in self._between(partition, max(first, end - 1), end)], default=0)

    def locate(self, partition: int, at_ms: int) -> str:
        self._number(partition, "0")
        found = self._offsets([partition], OffsetSpec.for_timestamp(max(0, at_ms)))[partition].offset
        if found < 0:
            found = self._edges([partition], OffsetSpec.latest())[partition]
        return str(found)

    def retention(self) -> tuple[float | None, int | None] | None:
        """The brokers delete what is older than so many seconds, and the oldest beyond so many bytes of a partition; None: they do not.

        Whole segments at a time, so a record may be kept longer. None in place of both: they do not tell.
        """
        settings = self._cluster.settings_of(self._topic)
        if "retention.ms" not in settings:
            return None
        after_ms, bytes_max = (int(settings.get(name, -1)) for name in ("retention.ms", "retention.bytes"))
        return (after_ms / 1000 if after_ms >= 0 else None), (bytes_max if bytes_max >= 0 else None)

    def cut(self) -> Sequence[str]:
        every = range(self._count)
        firsts, ends = self._edges(every, OffsetSpec.earliest()), self._edges(every, OffsetSpec.latest())
        due, reached = [], []
        for partition in every:
            end = ends[partition]
            last = list(self._between(partition, max(firsts[partition], end - 1), end))
            is_cut = bool(last) and last[0].kind is FrameKind.CUT_MARKER
            reached.append(str(end - is_cut))
            if end > firsts[partition] and not is_cut:
                due.append(partition)
        self._mark(due, FrameKind.CUT_MARKER)
        return reached

    def maintain(self) -> None:
        """Once a second or so: a time marker into each partition that has no record of the running period yet.

        It closes the file of the period before, and says that nothing of it can come any more. Ours is the clock that says when to look,
        the brokers' are those that count: a marker that they date into the period before says nothing, and is written again when
        by their clock it is time. All API workers do this, in any number.
        """
        now_ms = self._clock.now_ms()
        since_ms = now_ms - now_ms % (self._period_s * 1000)
        unsettled = [p for p in range(self._count) if self._settled.get(p, -1) < since_ms]
        if not unsettled or now_ms < self._marks_from_ms:
            return
        due = []
        for partition, found in self._offsets(unsettled, OffsetSpec.for_timestamp(since_ms)).items():
            if found.offset >= 0:
                self._settled[partition] = since_ms
            else:
                due.append(partition)
        if due:
            self._marks_from_ms = now_ms + since_ms - self._mark(due, FrameKind.TIME_MARKER)

    def _mark(self, partitions: Sequence[int], kind: FrameKind) -> int:
        """Markers into these partitions; the latest time that they were given."""
        return self._marker.write(
            {
                partition: [Outgoing(frame.pack(kind, partition, 0, 0, 0, 0, 0, 0, b"", 0, b""))]
                for partition in partitions
            }
        )

    def _between(self, partition: int, start: int, end: int) -> Iterator[Frame]:
        while start < end:
            found = self._readers.read(partition, start, bytes_max=_LOOK_BYTES)
            for message in found.records:
                if (message.offset() or 0) < end:
                    yield self._frame(message)
            start = found.next

    def _frame(self, message: Message) -> Frame:
        """A record. Its time is never before that of a record which this process has read before it."""
        partition, offset = message.partition() or 0, message.offset() or 0
        found = frame.decode(message.value() or b"", where=f"{partition}/{offset}")
        if found.partition != partition:
            raise FrameDamaged(
                f"The record at {partition}/{offset} is a frame of partition {found.partition}.",
                where=f"{partition}/{offset}",
            )
        since, floor_ms = self._floors.get(partition, (0, 0))
        at_ms = message.timestamp()[1]
        if offset >= since:
            at_ms = max(at_ms, floor_ms)
            self._floors[partition] = (offset, at_ms)
        headers = dict(message.headers() or ())
        return msgspec.structs.replace(
            found,
            first=offset << PLACE_BITS,
            enqueued_at_ms=at_ms,
            place_bits=PLACE_BITS,
            shares=_bytes(headers.get(SHARES)),
            owners=_bytes(headers.get(OWNERS)),
        )

    def _edges(self, partitions: Sequence[int], which: OffsetSpec) -> Mapping[int, int]:
        """Where each partition begins or ends. "Nowhere" is no answer: whoever took it for one would believe that all is archived."""
        found = {partition: info.offset for partition, info in self._offsets(partitions, which).items()}
        if unknown := [partition for partition, offset in found.items() if offset < 0]:
            raise self._cluster.unavailable(f"they do not say where the partitions {unknown} begin or end")
        return found

    def _offsets(self, partitions: Sequence[int], which: OffsetSpec) -> Mapping[int, ListOffsetsResultInfo]:
        """Where it is in each partition; an offset of -1: nowhere."""
        ask = {TopicPartition(self._topic, partition): which for partition in partitions}
        try:
            found = self._cluster.answers(
                lambda: self._cluster.admin.list_offsets(ask, request_timeout=self._cluster.answer_s)
            )
        except KafkaException as error:
            raise self._cluster.unavailable(error) from error
        return {place.partition: info for place, info in found.items()}

    def _number(self, partition: int, offset: str) -> int:
        if not 0 <= partition < self._count:
            raise NotFound(f"There is no partition {partition}; this hub has 0 to {self._count - 1}.")
        if not (offset.isascii() and offset.isdigit() and len(offset) < 20):
            raise HubError(f"{offset!r} is not an offset of this hub.")
        return int(offset)


def _shares(draft: Draft, batches: Sequence[Batch], done: dict[tuple[int, int], int]) -> Iterator[Share]:
    """For each source of the draft. `done`: events of each batch and partition in the drafts before."""
    for index, count in draft.members:
        key = index, draft.partition
        start = done.get(key, 0)
        whole = sum(group.count for group in batches[index].groups if group.partition == draft.partition)
        done[key] = start + count
        yield Share(start, whole, batches[index].owner)


def _bytes(header: object) -> bytes:
    return header if isinstance(header, bytes) else b""
