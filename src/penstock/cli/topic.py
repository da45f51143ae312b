"""The hub in a Kafka topic, built from settings: for API workers and for hosts, on any number of machines.

The period and the number of partitions stand in the store's `_hub.json`, which the first API makes; the topic's own id is the hub's.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

import click

from penstock.archive.topic import address, is_topic, let_in, reached, topic_of
from penstock.blobs import BlobStore
from penstock.cli.options import beats
from penstock.clock import Clock, SystemClock
from penstock.errors import SettingsError
from penstock.settings import Values
from penstock.wire.frame import FRAME_BYTES_MAX

if TYPE_CHECKING:
    from penstock.cli.wiring import Layout
    from penstock.hub.kafka import KafkaHub


def placed(where: Layout, values: Values) -> Layout:
    """Where an API or host has its hub: `where`, with the topic if `--hub` names one. Raises SettingsError."""
    if not is_topic(values.text("hub")):
        return where
    if (where.hub / "data.mdb").exists():
        raise SettingsError(
            f"There is an embedded hub in {where.data}: give --data another folder for what belongs to this machine."
        )
    return _in_topic(where, values)


def asks(values: Values, *others: str) -> bool:
    """Whether a command asks a topic: `--hub` names one, and no setting of `others` is given more plainly. Raises SettingsError."""
    url = values.text("hub")
    if url and not is_topic(url) and values.source("hub") == "flag":
        raise SettingsError(
            f"--hub {url}: a command asks a Kafka topic, kafka://HOST:PORT/TOPIC, or an API with --url."
        )
    return is_topic(url) and beats(values, "hub", *others)


def asked(where: Layout, values: Values, *others: str) -> Layout:
    """What a command asks: `where`, with the topic if it `asks` one. Raises SettingsError."""
    return _in_topic(where, values) if asks(values, *others) else where


def _in_topic(where: Layout, values: Values) -> Layout:
    if values.source("store") == "default":
        raise SettingsError("With --hub the store must be named: --store, the same for all APIs and hosts of this hub.")
    at, security = reached(values.text("hub"), values)
    return where._replace(topic=str(at), security=security)


def prepare(where: Layout, values: Values, store: BlobStore) -> int:
    """Make topic and store, or check that they are as the settings say; the number of partitions. Raises SettingsError, HubUnavailable."""
    from penstock.archive.begin import join
    from penstock.archive.hours import refuse_older
    from penstock.archive.ledger import claim
    from penstock.blobs.probe import probe
    from penstock.hub.kafka import KafkaHub
    from penstock.hub.kafka_topic import check_event_hub, create

    probe(store, name=where.store_name)
    at, period_s = address(where.topic), int(values.seconds("period"))
    cluster = let_in(at.servers, where.security)
    retention_s, partitions = values.seconds("retention"), values.count("partitions")
    if cluster.is_event_hubs:
        given = partitions if values.source("partitions") != "default" else None
        untold = check_event_hub(cluster, at.topic, partitions=given, retention_s=retention_s)
    else:
        copies, in_sync = values.count("replicas"), values.count("in-sync-replicas")
        untold = create(
            cluster, at.topic, partitions=partitions, replicas=copies, in_sync=in_sync, retention_s=retention_s
        )
    if untold:
        said = f"The brokers do not tell {', '.join(untold)} of the topic {at.topic}: not checked."
        click.echo(f"penstock: {said}", err=True)
    with KafkaHub(cluster, at.topic, period_s=period_s, clock=SystemClock()) as hub:
        claim(store, hub, SystemClock())
        refuse_older(store, hub)
        join(store, hub, clock=SystemClock())
        return hub.partitions()


@contextlib.contextmanager
def opened(
    where: Layout, store: BlobStore, clock: Clock, *, frame_bytes_max: int = FRAME_BYTES_MAX
) -> Iterator[KafkaHub]:
    """The hub of a store that an API has made. Raises SettingsError, HubUnavailable."""
    at = address(where.topic)
    name, most = where.store_name, frame_bytes_max
    cluster = let_in(at.servers, where.security)
    with topic_of(store, cluster, at.topic, store_name=name, clock=clock, frame_bytes_max=most) as hub:
        yield hub
