"""A question to brokers of which one may stand still: it is put again through another client, and the first answer counts.

A client of librdkafka puts most questions to one broker, which it takes for the controller: on KRaft any that lives, as the last metadata
named it. It waits for that one, although others would answer. A new client hears a name of its own, and what stands still is named by
nobody any more when its session is over (9 s by default, and later where it was the controller itself).
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Future, wait
from typing import Generic, TypeVar

from confluent_kafka.admin import AdminClient

K = TypeVar("K")
V = TypeVar("V")


class Asked(Generic[K, V]):
    """One question of several parts, as often as it was put. For one thread. A client that is gone answers no more, so they are kept."""

    def __init__(self) -> None:
        self._put: list[tuple[AdminClient, Mapping[K, Future[V]]]] = []

    def put(self, client: AdminClient, parts: Mapping[K, Future[V]]) -> None:
        self._put.append((client, parts))

    def wait(self, timeout_s: float) -> None:
        """Until the client that was asked last has answered."""
        wait(self._put[-1][1].values(), timeout_s)

    def hear(self, timeout_s: float) -> None:
        """Wait, and let all clients say what goes wrong."""
        for client, _ in self._put[:-1]:
            client.poll(0)
        self._put[-1][0].poll(timeout_s)

    def answer(self) -> dict[K, V] | None:
        """Of any client; None: there is none yet. Raises KafkaException, once for each client whose answer that was."""
        for number, (_, parts) in enumerate(self._put):
            if all(part.done() for part in parts.values()):
                del self._put[number]
                return {key: part.result() for key, part in parts.items()}
        return None
