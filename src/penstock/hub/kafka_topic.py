"""The topic that is a hub: it is made, or the one that is there is checked (docs/kafka.md)."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import Final

from confluent_kafka import KafkaError, KafkaException
from confluent_kafka.admin import NewTopic

from penstock.errors import HubUnavailable, SettingsError
from penstock.hub.kafka_cluster import FORBIDDEN, RETRY_S, WRITE, Cluster, Topic, code_of

KNOWN_S: Final = 3.0
RECORD_BYTES_MIN: Final = 1_000_000
"""What the topic must take: a frame with its sources is smaller. Azure Event Hubs takes 1 MiB."""


def create(
    cluster: Cluster, topic: str, *, partitions: int, replicas: int, in_sync: int, retention_s: float
) -> Sequence[str]:
    """Make the topic, or check the one that is there; the names of settings that the brokers do not tell, which were not checked.

    Raises SettingsError that names everything that does not fit, HubUnavailable.
    """
    wanted = {
        "message.timestamp.type": "LogAppendTime",
        "cleanup.policy": "delete",
        "retention.ms": str(int(retention_s * 1000)),
        "retention.bytes": "-1",
        "min.insync.replicas": str(in_sync),
        "unclean.leader.election.enable": "false",
    }
    found = cluster.describe(topic)
    if found is None:
        new = NewTopic(topic, num_partitions=partitions, replication_factor=replicas, config=wanted)
        try:
            cluster.answers(
                lambda: cluster.admin.create_topics([new], request_timeout=cluster.answer_s), patience_s=cluster.start_s
            )
        except KafkaException as error:
            if code_of(error) in FORBIDDEN:
                raise cluster.forbidden(f"create the topic {topic}") from error
            if code_of(error) != KafkaError.TOPIC_ALREADY_EXISTS:  # another API was faster
                raise SettingsError(
                    f"The topic {topic} with {partitions} partitions, --replicas {replicas} and --in-sync-replicas {in_sync} "
                    f"cannot be created: {error.args[0].str()}"
                ) from error
        found = described(cluster, topic)
        if found is None:
            raise HubUnavailable(f"The topic {topic} was created, and the brokers at {cluster.servers} do not know it.")
    return _checked(cluster, topic, found, wanted, partitions, replicas)


def check_event_hub(cluster: Cluster, topic: str, *, partitions: int | None, retention_s: float) -> Sequence[str]:
    """As `create`, for an event hub: whoever owns it makes it, and Azure replicates it. Without `partitions`: as many as it has."""
    found = described(cluster, topic)
    if found is None:
        raise SettingsError(
            f"There is no event hub {topic} at {cluster.servers}. Make it in Azure, with its partitions and a retention of "
            f"{retention_s / 3600:.0f} h: no client can."
        )
    wanted = {
        "message.timestamp.type": "LogAppendTime",
        "cleanup.policy": "delete",
        "retention.ms": str(int(retention_s * 1000)),
    }
    return _checked(cluster, topic, found, wanted, partitions or found.partitions, 0)


def _checked(
    cluster: Cluster, topic: str, found: Topic, wanted: Mapping[str, str], partitions: int, replicas: int
) -> Sequence[str]:
    cluster.needs(WRITE, topic, found)
    told = cluster.settings_of(topic, patience_s=cluster.start_s)
    wrong = _misfits(found, told, wanted, partitions, replicas)
    if wrong:
        raise SettingsError(
            f"The topic {topic} is there and does not fit: {'; '.join(wrong)}. Nothing was touched: change the topic, or what is asked for."
        )
    return [name for name in wanted if name not in told]


def described(cluster: Cluster, topic: str) -> Topic | None:
    """Of a topic that was just made not all brokers know yet. None: there is none. Raises HubUnavailable."""
    until = cluster.clock.monotonic() + KNOWN_S
    while (found := cluster.describe(topic)) is None and cluster.clock.monotonic() < until:
        cluster.clock.wait(threading.Event(), RETRY_S)
    return found


def _misfits(
    found: Topic, settings: Mapping[str, str], wanted: Mapping[str, str], partitions: int, replicas: int
) -> list[str]:
    wrong = []
    if found.partitions != partitions:
        wrong.append(f"it has {found.partitions} partitions, not {partitions}")
    if found.replicas < replicas:
        wrong.append(f"it has {found.replicas} replicas, not {replicas}")
    for name in ("message.timestamp.type", "cleanup.policy", "retention.bytes", "unclean.leader.election.enable"):
        if name in settings and settings[name] != wanted.get(name, settings[name]):
            wrong.append(f"{name} is {settings[name]}, not {wanted[name]}")
    for name, least in (
        ("retention.ms", int(wanted["retention.ms"])),
        ("min.insync.replicas", int(wanted.get("min.insync.replicas", "0"))),
        ("max.message.bytes", RECORD_BYTES_MIN),
    ):
        has = int(settings.get(name, least))
        if 0 <= has < least:
            wrong.append(f"{name} is {has}, less than {least}")
    return wrong
