"""Records out of a topic, from an offset on: one consumer for each place where somebody reads.

A consumer that goes on where it was has the next records at hand. One that is sent elsewhere first waits for the fetch that is under
way, so readers are kept by where they are. At the end of a log none fetches: whoever asks there asks the brokers for the end.
"""

from __future__ import annotations

import threading
from collections import deque
from typing import Final, NamedTuple

from confluent_kafka import Consumer, KafkaError, KafkaException, Message, TopicPartition

from penstock.errors import HubUnavailable, OffsetBeyondEnd, OffsetTrimmed
from penstock.hub.kafka_cluster import RETRY_AFTER_S, RETRY_S, Cluster

READ_S: Final = 10.0
READERS_KEPT: Final = 32
_AT_ONCE: Final = 1000
_POLL_S: Final = 0.1


class Found(NamedTuple):
    """What one read of the topic gave: `next` is where to go on, `end` the end of the log."""

    records: list[Message]
    next: int
    end: int


class Readers:
    """The readers of one topic. Thread-safe."""

    def __init__(self, cluster: Cluster, topic: str) -> None:
        self._cluster = cluster
        self._topic = topic
        self._idle: list[Reader] = []
        self._one = threading.Lock()

    def close(self) -> None:
        """No read may be under way."""
        with self._one:
            idle, self._idle = self._idle, []
        for reader in idle:
            reader.close()

    def read(self, partition: int, offset: int, *, bytes_max: int) -> Found:
        """Records from `offset` on, at least one if there is any. Raises OffsetTrimmed, OffsetBeyondEnd, HubUnavailable."""
        reader = self._taken(partition, offset)
        try:
            return reader.read(partition, offset, bytes_max=bytes_max)
        finally:
            self._put_back(reader)

    def _taken(self, partition: int, offset: int) -> Reader:
        with self._one:
            for index, reader in enumerate(self._idle):
                if reader.at == (partition, offset):
                    return self._idle.pop(index)
            if len(self._idle) >= READERS_KEPT:
                return self._idle.pop(0)
        return Reader(self._cluster, self._topic)

    def _put_back(self, reader: Reader) -> None:
        with self._one:
            self._idle.append(reader)
            extra = self._idle.pop(0) if len(self._idle) > READERS_KEPT else None
        if extra is not None:
            extra.close()


class Reader:
    """One consumer. For one thread at a time. `at`: the partition and offset that it would go on from."""

    def __init__(self, cluster: Cluster, topic: str) -> None:
        self.at: tuple[int, int] | None = None
        self._cluster = cluster
        self._topic = topic
        self._consumer: Consumer = cluster.consumer()
        self._assigned = False
        self._ahead: deque[Message] = deque()
        self._ended_at = -1
        self._refused: KafkaError | None = None

    def close(self) -> None:
        self._consumer.close()

    def read(self, partition: int, offset: int, *, bytes_max: int) -> Found:
        if self.at != (partition, offset):
            self._leave()
        self.at = (partition, offset)
        if self._assigned and not self._ahead:
            self._take(self._consumer.consume(_AT_ONCE, 0))
        end = -1
        if not self._ahead:
            end = self._end(partition, offset)
            if offset == end:
                self._leave()
                return Found([], offset, end)
            self._await(partition, offset, end)
        found = self._next(bytes_max)
        reached = (found[-1].offset() or 0) + 1 if found else self._ended_at
        end = max(end, reached, self._known_end(partition))
        if reached == end:
            self._leave()  # whoever reads may never come again, and would leave a consumer that asks all the time
        self.at = (partition, reached)
        return Found(found, reached, end)

    def _leave(self) -> None:
        if self._assigned:
            self._consumer.unassign()
        self._assigned, self._ended_at, self._refused = False, -1, None
        self._ahead.clear()

    def _end(self, partition: int, offset: int) -> int:
        """The end of the log. Raises when `offset` is not in it."""
        first, end = self._watermarks(partition)
        if offset < first:
            raise OffsetTrimmed(
                f"Offset {offset} of partition {partition} was trimmed; the log begins at {first}.", first=str(first)
            )
        if offset > end:
            raise OffsetBeyondEnd(
                f"Offset {offset} of partition {partition} lies beyond the end of the log, {end}.", end=str(end)
            )
        return end

    def _watermarks(self, partition: int) -> tuple[int, int]:
        """Asked again while brokers change places: the first question to one that is no leader any more only learns that."""
        clock, never = self._cluster.clock, threading.Event()
        until = clock.monotonic() + self._cluster.answer_s
        while True:
            left_s = until - clock.monotonic()
            try:
                found = self._consumer.get_watermark_offsets(self._place(partition), timeout=max(left_s, RETRY_S))
            except KafkaException as error:
                if left_s <= 0:
                    raise self._cluster.unavailable(error) from error
                clock.wait(never, RETRY_S)
            else:
                if found is None:
                    raise self._cluster.unavailable("no answer")
                return found

    def _known_end(self, partition: int) -> int:
        """As of the last fetch."""
        found = self._consumer.get_watermark_offsets(self._place(partition), cached=True)
        return found[1] if found else -1

    def _await(self, partition: int, offset: int, end: int) -> None:
        """Until there is a record, or it is known that there is none up to `end`: where transactions were ended no record lies."""
        if not self._assigned:
            self._consumer.assign([self._place(partition, offset)])
            self._assigned = True
        until = self._cluster.clock.monotonic() + READ_S
        while not self._ahead and self._ended_at < end:
            message = self._consumer.poll(_POLL_S)
            if message is not None:
                self._take([message, *self._consumer.consume(_AT_ONCE, 0)])
            if self._refused is not None:
                refused = self._refused
                self._leave()
                raise self._cluster.unavailable(refused, f"read the topic {self._topic}")
            if not self._assigned or self._cluster.clock.monotonic() > until:
                self._leave()
                raise HubUnavailable(
                    f"The Kafka brokers at {self._cluster.servers} gave nothing of partition {partition} from {offset} on, "
                    f"and it ends at {end}.",
                    retry_after_s=RETRY_AFTER_S,
                )

    def _take(self, messages: list[Message]) -> None:
        for message in messages:
            error = message.error()
            if error is None:
                # Nothing from where this consumer was before.
                if self.at is not None and message.partition() == self.at[0] and (message.offset() or 0) >= self.at[1]:
                    self._ahead.append(message)
            elif error.code() == KafkaError._PARTITION_EOF:
                self._ended_at = message.offset() or 0
            elif error.code() == KafkaError._AUTO_OFFSET_RESET and not self._ahead:
                self._leave()  # it was trimmed under the reader: the next read says so
            elif error.code() == KafkaError.TOPIC_AUTHORIZATION_FAILED:
                self._refused = error

    def _next(self, bytes_max: int) -> list[Message]:
        found: list[Message] = []
        size = 0
        while self._ahead:
            size += len(self._ahead[0])
            if found and size > bytes_max:
                break
            found.append(self._ahead.popleft())
        return found

    def _place(self, partition: int, offset: int = 0) -> TopicPartition:
        return TopicPartition(self._topic, partition, offset)
