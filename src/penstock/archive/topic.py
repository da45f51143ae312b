"""A Kafka topic as the hub of a store: for everyone on it but the API that makes both."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

from penstock.archive.ledger import owner
from penstock.blobs import BlobStore
from penstock.clock import Clock
from penstock.errors import SettingsError
from penstock.wire.frame import FRAME_BYTES_MAX

if TYPE_CHECKING:
    from penstock.hub.kafka import KafkaHub
    from penstock.hub.kafka_access import Given
    from penstock.hub.kafka_cluster import Address, Cluster
    from penstock.hub.kafka_security import Called, Security

SCHEME = "kafka://"


def is_topic(url: str) -> bool:
    """Whether it names a topic, well or badly."""
    return url.startswith(SCHEME)


def address(url: str) -> Address:
    """Raises SettingsError, also where the package is missing that speaks to brokers."""
    with _package_of(url):
        from penstock.hub.kafka_cluster import parse_url
    return parse_url(url)


def reached(url: str, given: Given, called: Called | None = None) -> tuple[Address, Security]:
    """As kafka_access has it. Raises SettingsError, also where the package is missing."""
    with _package_of(url):
        from penstock.hub import kafka_access
    return kafka_access.reached(url, given, called) if called else kafka_access.reached(url, given)


@contextlib.contextmanager
def _package_of(url: str) -> Iterator[None]:
    try:
        yield
    except ModuleNotFoundError as error:
        raise SettingsError(
            f"{url} needs the package {error.name}: install it with `pip install 'penstock[kafka]'`."
        ) from error


def let_in(servers: str, security: Security | None) -> Cluster:
    """The brokers, which let this process in. Raises SettingsError, HubUnavailable."""
    from penstock.hub.kafka_cluster import Cluster

    cluster = Cluster(servers, security)
    cluster.check()
    return cluster


@contextlib.contextmanager
def topic_of(
    store: BlobStore,
    cluster: Cluster,
    topic: str,
    *,
    store_name: str,
    clock: Clock,
    frame_bytes_max: int = FRAME_BYTES_MAX,
) -> Iterator[KafkaHub]:
    """The topic that `store` belongs to. Raises SettingsError, HubUnavailable, StoreError."""
    from penstock.hub.kafka import KafkaHub

    known = owner(store)
    if known is None:
        hub = f"kafka://{cluster.servers}/{topic}"
        raise SettingsError(
            f"The store {store_name} is nobody's: start `penstock api --hub {hub} --store {store_name}` first."
        )
    with KafkaHub(cluster, topic, period_s=known.period, clock=clock, frame_bytes_max=frame_bytes_max) as hub_of_store:
        if hub_of_store.id != known.hub:
            raise SettingsError(
                f"The store {store_name} belongs to another hub than the topic {topic}: a topic that is made again is another."
            )
        if hub_of_store.partitions() != known.partitions:
            raise SettingsError(
                f"The topic {topic} was made with {known.partitions} partitions and has {hub_of_store.partitions()}. A device's partition "
                "follows from their number, so that devices have moved: nothing was started. Go on with a new topic and a new store."
            )
        yield hub_of_store
