"""Records into a topic, each partition's one after the other: what was written of them when something fails is a prefix."""

from __future__ import annotations

import functools
import threading
from collections import deque
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from confluent_kafka import KafkaError, KafkaException, Message, Producer

from penstock.hub.kafka_cluster import Cluster

SHARES = "shares"
OWNERS = "owners"
_POLL_S = 0.5


class Outgoing(NamedTuple):
    """A record that is to be written. `shares` and `owners`: as penstock.hub.duplicates packs them."""

    value: bytes
    shares: bytes = b""
    owners: bytes = b""

    @property
    def headers(self) -> list[tuple[str, str | bytes | None]]:
        return [(name, value) for name, value in ((SHARES, self.shares), (OWNERS, self.owners)) if value]


class Writer:
    """Thread-safe: one write at a time."""

    def __init__(self, cluster: Cluster, topic: str) -> None:
        self._cluster = cluster
        self._topic = topic
        self._producer: Producer | None = None
        self._one = threading.Lock()

    def write(self, records: Mapping[int, Sequence[Outgoing]]) -> int:
        """By partition; returns when every record is acknowledged by all in-sync replicas: the latest time that the brokers gave, in ms.

        Of a partition each record is sent after the acknowledgement of the one before, and none after one that failed. Raises
        HubUnavailable within some seconds; then nothing is under way any more, and of each partition's records any prefix may be written.
        """
        with self._one:
            if self._producer is None:
                self._producer = self._cluster.producer()
            run = _Run(self._producer, self._topic, records)
            error = run.finished()
            if error is None:
                return run.at_ms
            if run.fatal:
                self._producer = None  # a new one begins anew
        raise self._cluster.unavailable(error, f"write into the topic {self._topic}")


class _Run:
    """One write."""

    def __init__(self, producer: Producer, topic: str, records: Mapping[int, Sequence[Outgoing]]) -> None:
        self.at_ms = 0
        self.fatal = False
        self._producer = producer
        self._topic = topic
        self._left = {partition: deque(of) for partition, of in records.items()}
        self._under_way = 0
        self._error: KafkaError | None = None

    def finished(self) -> KafkaError | None:
        """Send everything; the first error, when nothing is under way any more: each record is reported within its time."""
        for partition in self._left:
            self._send(partition)
        while self._under_way:
            try:
                self._producer.poll(_POLL_S)
            except (
                KafkaException
            ) as error:  # the producer can do nothing more, and reports what is under way all the same
                self._fail(error.args[0])
        return self._error

    def _send(self, partition: int) -> None:
        if self._error is not None or not self._left[partition]:
            return
        record = self._left[partition].popleft()
        try:
            self._producer.produce(
                self._topic,
                value=record.value,
                partition=partition,
                headers=record.headers,
                on_delivery=functools.partial(self._reported, partition),
            )
        except KafkaException as error:
            self._fail(error.args[0])
        except BufferError:
            self._fail(KafkaError(KafkaError._QUEUE_FULL))
        else:
            self._under_way += 1

    def _reported(self, partition: int, error: KafkaError | None, message: Message) -> None:
        """In `poll`, on the same thread."""
        self._under_way -= 1
        if error is not None:
            self._fail(error)
            return
        self.at_ms = max(self.at_ms, message.timestamp()[1])
        self._send(partition)

    def _fail(self, error: KafkaError) -> None:
        self._error = self._error or error
        self.fatal = self.fatal or error.fatal()
