"""A Kafka cluster as this process reaches it: its address, its clients, and what their errors mean.

The clients are librdkafka's and have threads: a `Cluster` is made after the fork of its process. What the settings are for is said
beside them; where they were measured: docs/kafka.md.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from enum import Enum
from typing import Final, NamedTuple

from confluent_kafka import Consumer, KafkaError, KafkaException, Producer, TopicCollection
from confluent_kafka.admin import (
    AclOperation,
    AdminClient,
    ConfigEntry,
    ConfigResource,
    TopicDescription,
)

from penstock.clock import Clock, SystemClock
from penstock.errors import HubUnavailable, SettingsError
from penstock.hub.kafka_asking import Asked, K, V
from penstock.hub.kafka_security import Option, Security
from penstock.hub.kafka_trouble import Trouble

DELIVERY_S: Final = 8.0
"""A record that is not acknowledged within this is given up, and its batches are answered 503: longer than a leader's election."""
EVENT_HUBS_DELIVERY_S: Final = 20.0
"""Half of it is for one request, and Event Hubs asks producers for 10 s."""
ANSWER_S: Final = 5.0
PATIENCE_S: Final = 5.0
RETRY_S: Final = 0.1
OTHERS_S: Final = 1.0
STARTS: Final = 3
"""Who begins waits so many times as long as for any other answer: more than the session of a broker that stands still."""
_POLL_S: Final = 0.05
RETRY_AFTER_S: Final = 2.0

_ADDRESS = re.compile(r"kafka://([A-Za-z0-9._:\[\],-]+)/([A-Za-z0-9._-]{1,249})")
_SERVER = re.compile(r"(?:\[[0-9a-fA-F:]+\]|[A-Za-z0-9._-]+):[0-9]{1,5}")
# Whoever asks again gets the same answer.
_FINAL = frozenset(
    (
        KafkaError.UNKNOWN_TOPIC_OR_PART,
        KafkaError.TOPIC_ALREADY_EXISTS,
        KafkaError.TOPIC_EXCEPTION,
        KafkaError.INVALID_PARTITIONS,
        KafkaError.INVALID_REPLICATION_FACTOR,
        KafkaError.INVALID_CONFIG,
        KafkaError.POLICY_VIOLATION,
        KafkaError.TOPIC_AUTHORIZATION_FAILED,
        KafkaError.CLUSTER_AUTHORIZATION_FAILED,
        KafkaError.UNSUPPORTED_VERSION,
        KafkaError._UNSUPPORTED_FEATURE,
    )
)
FORBIDDEN = frozenset((KafkaError.TOPIC_AUTHORIZATION_FAILED, KafkaError.CLUSTER_AUTHORIZATION_FAILED))
_UNTOLD = frozenset((*FORBIDDEN, KafkaError.UNSUPPORTED_VERSION, KafkaError._UNSUPPORTED_FEATURE))
_MOVED = frozenset(
    (KafkaError.FENCED_LEADER_EPOCH, KafkaError.UNKNOWN_LEADER_EPOCH, KafkaError.NOT_LEADER_FOR_PARTITION)
)


class Address(NamedTuple):
    """`kafka://HOST:PORT[,HOST:PORT]/TOPIC`."""

    servers: str
    topic: str

    def __str__(self) -> str:
        return f"kafka://{self.servers}/{self.topic}"


def parse_url(url: str) -> Address:
    """Raises SettingsError."""
    match = _ADDRESS.fullmatch(url)
    if match is None or not all(_SERVER.fullmatch(server) for server in match[1].split(",")):
        raise SettingsError(f"{url} is not an address of the form kafka://HOST:PORT[,HOST:PORT]/TOPIC.")
    return Address(match[1], match[2])


WRITE: Final = AclOperation.WRITE
READ: Final = AclOperation.READ
_ACTS: Final = {WRITE: "write into", READ: "read"}


class Topic(NamedTuple):
    """A topic as the brokers describe it. `id` is new when it is created again: the hub's identity."""

    id: str
    partitions: int
    replicas: int
    rights: frozenset[Enum] | None = None
    """What this process may do with it; None: the brokers do not say."""


class Cluster:
    """Makes clients, asks the brokers. Thread-safe. `delivery_s`: a record's time to be acknowledged; `answer_s`: any other answer's.

    `start_s`: how long those wait who begin.
    """

    def __init__(
        self,
        servers: str,
        security: Security | None = None,
        *,
        delivery_s: float | None = None,
        answer_s: float = ANSWER_S,
        clock: Clock | None = None,
    ) -> None:
        self.servers = servers
        self.clock = clock or SystemClock()
        self.answer_s = answer_s
        self.start_s = STARTS * answer_s
        self._never = threading.Event()
        self._security = security or Security()
        self.is_event_hubs = self._security.event_hubs
        self._delivery_s = delivery_s or (EVENT_HUBS_DELIVERY_S if self.is_event_hubs else DELIVERY_S)
        self._trouble = Trouble(servers, self._security)
        self._shared: dict[str, Option] = {
            "bootstrap.servers": servers,
            "client.id": "penstock",
            "log_level": 0,  # what matters is raised; without a broker there would be 20 lines a second
            "reconnect.backoff.ms": 50,
            "reconnect.backoff.max.ms": 1000,
            **self._security.options(),
        }
        self.admin = self._made_admin()

    def _made_admin(self) -> AdminClient:
        """The one client that is asked what goes wrong: what it hears lies in a queue until somebody polls. Raises SettingsError."""
        try:
            return AdminClient({**self._shared, "error_cb": self._trouble.hear})  # type: ignore[dict-item]
        except KafkaException as error:
            raise SettingsError(
                f"With these settings there is no way to the Kafka brokers at {self.servers}: {error.args[0].str()}."
            ) from error

    def check(self) -> None:
        """Come in once. Raises SettingsError where the brokers do not let this process in, HubUnavailable where there are none."""
        began = again = self.clock.monotonic()
        until = began + self.start_s
        asked: Asked[str, object] = Asked()
        failed: Exception = TimeoutError("no answer")
        while (now := self.clock.monotonic()) < until:
            if now >= again:
                if now > began:
                    self.admin = self._made_admin()
                asked.put(self.admin, {"": self.admin.describe_cluster(request_timeout=self.answer_s)})
                again = now + OTHERS_S
            asked.hear(_POLL_S)
            if self._trouble.is_final:  # of several brokers another may let it in
                until = min(until, now + OTHERS_S)
            elif self._trouble.all_are_down:  # and none stands still
                until = min(until, began + self.answer_s)
            try:
                if asked.answer() is not None:
                    self._trouble.over()
                    return
            except KafkaException as error:
                failed = error
        if self._trouble.is_final:
            raise SettingsError(self._trouble.sentence()) from failed
        raise self.unavailable(failed) from failed

    def producer(self) -> Producer:
        """One that loses and doubles nothing while it lives: every in-sync replica, idempotent. Its first record costs half a second."""
        return Producer(
            self._shared
            | {
                "acks": "all",
                "enable.idempotence": True,
                "linger.ms": 0,  # frames are batches already, and zipped
                "compression.type": "none",
                "message.timeout.ms": int(self._delivery_s * 1000),
                "request.timeout.ms": max(1000, int(self._delivery_s * 500)),
                "retry.backoff.ms": 20,
                "retry.backoff.max.ms": 500,
                "topic.metadata.propagation.max.ms": 500,  # a deleted topic is said at once
            }
        )

    def consumer(self) -> Consumer:
        """One for `assign`: it is in no group, and where it reads is for our leases to say."""
        return Consumer(
            self._shared
            | {
                "group.id": "penstock",
                "enable.auto.commit": False,
                "enable.auto.offset.store": False,
                "auto.offset.reset": "error",  # never skip
                "enable.partition.eof": True,
                "isolation.level": "read_uncommitted",  # the end is then the high watermark, whatever others do
                "fetch.wait.max.ms": 5,  # going elsewhere waits for the fetch before; nobody fetches at the end of a log
                "queued.min.messages": 1000,
                "queued.max.messages.kbytes": 2048,  # of each partition that is read
                "fetch.queue.backoff.ms": 5,  # where so much lay ready; else whoever reads a backlog waits a second for each piece of it
            }
        )

    def answers(
        self,
        ask: Callable[[], Mapping[K, Future[V]]],
        *,
        final: frozenset[int] = _FINAL,
        patience_s: float = PATIENCE_S,
    ) -> dict[K, V]:
        """What the brokers answer; asked again while they change places, and of others while one stands still.

        Raises HubUnavailable, and KafkaException when that is final.
        """
        until = self.clock.monotonic() + patience_s
        asked: Asked[K, V] = Asked()
        failed: Exception = TimeoutError("no answer")
        while True:
            asked.put(self.admin, ask())
            asked.wait(OTHERS_S)
            self.admin.poll(0)  # what it was told of the brokers
            is_lost = True
            try:
                if (found := asked.answer()) is not None:
                    self._trouble.over()
                    return found
            except KafkaException as error:
                if code_of(error) in final:
                    raise
                failed, is_lost = error, code_of(error) in _MOVED
            if is_lost:
                # librdkafka 2.16 goes on asking the leader that it knew first, be it dead, and with the epoch that it knew first.
                self.admin = self._made_admin()
            if self.clock.monotonic() >= until:
                raise self.unavailable(failed) from failed
            self.clock.wait(self._never, RETRY_S)

    def describe(self, topic: str) -> Topic | None:
        """None if there is no such topic. Raises HubUnavailable."""
        told = {"include_authorized_operations": not self.is_event_hubs, "request_timeout": self.answer_s}
        try:
            found = self.answers(
                lambda: self.admin.describe_topics(TopicCollection([topic]), **told), patience_s=self.start_s
            )
        except KafkaException as error:
            if code_of(error) == KafkaError.UNKNOWN_TOPIC_OR_PART:
                return None
            if code_of(error) in FORBIDDEN:
                raise self.forbidden(f"see the topic {topic}") from error
            raise self.unavailable(error) from error
        [description] = found.values()
        assert isinstance(description, TopicDescription), description
        replicas = min((len(partition.replicas) for partition in description.partitions), default=0)
        topic_id = _named_id(self.servers, topic) if self.is_event_hubs else _id(str(description.topic_id))
        rights = None if self.is_event_hubs else frozenset(description.authorized_operations or ())
        return Topic(topic_id, len(description.partitions), replicas, rights)

    def needs(self, right: AclOperation, topic: str, found: Topic) -> None:
        """Raises SettingsError where this process is known not to have it."""
        if found.rights is not None and right not in found.rights:
            raise self.forbidden(f"{_ACTS[right]} the topic {topic} (the right {right.name} is missing)")

    def settings_of(self, topic: str, *, patience_s: float = PATIENCE_S) -> dict[str, str]:
        """The topic's settings, the brokers' defaults among them; nothing of what they do not tell. Raises HubUnavailable."""
        resource = ConfigResource(ConfigResource.Type.TOPIC, topic)
        not_yet = {KafkaError.UNKNOWN_TOPIC_OR_PART}  # by the broker that was asked: the topic was just made
        try:
            [found] = self.answers(
                lambda: self.admin.describe_configs([resource], request_timeout=self.answer_s),
                final=_FINAL - not_yet,
                patience_s=patience_s,
            ).values()
        except KafkaException as error:
            if code_of(error) in _UNTOLD:
                return {}
            raise self.unavailable(error) from error
        entries = {name: entry.value for name, entry in found.items() if isinstance(entry, ConfigEntry)}
        return {name: str(value) for name, value in entries.items() if value is not None}

    def unavailable(self, error: object, act: str = "") -> HubUnavailable:
        """What a foreign error means to whoever asked, with what the brokers say beside it. `act`: what a right may lack for."""
        inner = error.args[0] if isinstance(error, KafkaException) and error.args else error
        if act and isinstance(inner, KafkaError) and inner.code() in FORBIDDEN:
            detail = f"The Kafka brokers at {self.servers} do not let {self._security.who} {act}."
            return HubUnavailable(detail, retry_after_s=RETRY_AFTER_S)
        text = inner.str() if isinstance(inner, KafkaError) else str(inner) or type(inner).__name__
        self.admin.poll(0)
        why = self._trouble.sentence()
        detail = f"The Kafka brokers at {self.servers} do not do what was asked: {text}.{' ' if why else ''}{why}"
        return HubUnavailable(detail, retry_after_s=RETRY_AFTER_S)

    def forbidden(self, act: str) -> SettingsError:
        return SettingsError(
            f"The Kafka brokers at {self.servers} do not let {self._security.who} {act}. Nothing was touched."
        )


def _id(topic_id: str) -> str:
    """A topic's uuid, as Kafka writes it, in hex."""
    try:
        found = base64.b64decode(topic_id + "==", altchars=b"-_" if set("-_") & set(topic_id) else b"+/")
    except binascii.Error as error:
        raise SettingsError(f"The brokers give the topic the id {topic_id!r}, which is none.") from error
    if len(found) != 16 or not any(found):
        raise SettingsError("The brokers give topics no ids: Penstock needs Apache Kafka 2.8 or newer, or its like.")
    return found.hex()


def _named_id(servers: str, topic: str) -> str:
    """In place of the uuid that Event Hubs does not give: names of namespaces are unique in the world, and so is this."""
    return hashlib.sha256(f"{servers}/{topic}".encode()).hexdigest()[:32]


def code_of(error: KafkaException) -> int:
    """librdkafka's code."""
    inner = error.args[0] if error.args else None
    return inner.code() if isinstance(inner, KafkaError) else 0
