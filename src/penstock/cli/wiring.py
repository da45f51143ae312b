"""The composition root: builds every part from settings. Nothing below sees a settings object.

What all commands need; API workers are built in workers.py, archiver hosts in archiving.py.
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from penstock.archive.ledger import Owner, claim, owner
from penstock.blobs import BlobStore
from penstock.blobs.connection import connect, is_url, parse_url
from penstock.blobs.disk import DiskBlobs
from penstock.cli import topic
from penstock.clock import SystemClock
from penstock.errors import SettingsError
from penstock.files import Files
from penstock.hub import embedded
from penstock.hub.embedded import EmbeddedHub
from penstock.kinds import Address
from penstock.settings import Values
from penstock.telemetry.log import Log, open_log

if TYPE_CHECKING:
    from penstock.hub.kafka_security import Security

UP_HOST = "up"


class Layout(NamedTuple):
    """What lies where in a data folder. `cloud` is the store's address where it is none of this machine's folders.

    `topic` is the hub's address where that is a Kafka topic, and `security` what opens its brokers: then DATA has what belongs to this
    machine alone.
    """

    data: Path
    hub: Path
    run: Path
    work: Path
    lock: Path
    store: Path
    cloud: str = ""
    topic: str = ""
    security: Security | None = None

    @property
    def store_name(self) -> str:
        """For people."""
        return self.cloud or str(self.store)


def layout(values: Values) -> Layout:
    data = Path(values.text("data"))
    store = values.text("store")
    cloud = ""
    if values.source("store") == "default":
        folder = data / "store"
    elif is_url(store):
        folder, cloud = data / "store", str(parse_url(store))
    else:
        folder = Path(store.removeprefix("file://"))
    return Layout(data, data / "hub", data / "run", data / "work", data / "lock", folder, cloud)


def open_store(where: Layout) -> BlobStore:
    """The store of an installation. Not before a fork, for the client of a cloud's store has threads. Raises SettingsError."""
    return connect(where.cloud, os.environ) if where.cloud else DiskBlobs(where.store, Files())


@contextlib.contextmanager
def reading_hub(where: Layout, values: Values) -> Iterator[EmbeddedHub]:
    """The hub for reading. Raises SettingsError when there is none; makes nothing."""
    if not (where.hub / "data.mdb").exists():
        raise SettingsError(f"There is no hub in {where.data}: start one with `penstock up --data {where.data}`.")
    with EmbeddedHub(where.hub, bytes_max=values.count("hub-bytes-max"), clock=SystemClock(), read_only=True) as hub:
        yield hub


def owner_of(where: Layout, store: BlobStore) -> Owner:
    """Whose store this is. Raises SettingsError when it is nobody's."""
    known = owner(store)
    if known is None:
        raise SettingsError(
            f"There is no hub in {where.data}, and the store {where.store_name} is nobody's: "
            f"start one with `penstock up --data {where.data}`, or name another with --data or --store."
        )
    return known


@contextlib.contextmanager
def hub_of(known: Owner, where: Layout, values: Values) -> Iterator[EmbeddedHub | None]:
    """The hub of a store, for reading; None when it is not in the data folder.

    Raises SettingsError when another one is in the folder that was asked for.
    """
    if not (where.hub / "data.mdb").exists():
        yield None
        return
    with reading_hub(where, values) as hub:
        if hub.id != known.hub and values.source("data") != "default":
            raise SettingsError(f"The store {where.store_name} belongs to another hub than the one in {where.data}.")
        yield hub if hub.id == known.hub else None


def prepare(where: Layout, values: Values) -> None:
    """Make hub and store, or check that they are what the settings say. Raises SettingsError and leaves them alone."""
    if not where.cloud and not where.topic:
        _prepare(where, values)
        return
    from concurrent.futures import ProcessPoolExecutor
    from multiprocessing import get_context

    # In a process of its own: the clients of a cloud's store and of Kafka have threads, and after them this process must not fork.
    with ProcessPoolExecutor(1, get_context("fork")) as apart:
        apart.submit(_prepare, where, values).result()


def _prepare(where: Layout, values: Values) -> None:
    from penstock.archive.begin import join
    from penstock.archive.hours import refuse_older
    from penstock.blobs.probe import probe
    from penstock.wire.route import is_field

    if not is_field(values.text("device-field")):
        raise SettingsError(f"--device-field {values.text('device-field')!r} cannot name a field.")
    store = open_store(where)
    if where.topic:
        _prepare_units(where, values, topic.prepare(where, values, store))
        return
    if not (where.hub / "data.mdb").exists() and owner(store) is not None:
        raise SettingsError(
            f"The store {where.store_name} belongs to another hub than the one to be made in {where.data}."
        )
    probe(store, name=where.store_name)
    embedded.create(
        where.hub,
        partitions=values.count("partitions"),
        period_s=int(values.seconds("period")),
        bytes_max=values.count("hub-bytes-max"),
        clock=SystemClock(),
    )
    Files().sync_folder(where.hub)  # the names that LMDB has made
    with reading_hub(where, values) as hub:
        claim(store, hub, SystemClock())
        refuse_older(store, hub)
        join(store, hub, clock=SystemClock())
        _prepare_units(where, values, hub.partitions())


def _prepare_units(where: Layout, values: Values, partitions: int) -> None:
    from penstock.server import units

    given = values.count("throughput-units") if values.source("throughput-units") != "default" else None
    units.prepare(where.data, where.run, partitions, given)


def make_folders(where: Layout) -> None:
    files = Files()
    for folder in (where.data, where.hub, where.run, where.work, *(() if where.cloud else (where.store,))):
        files.make_folders(folder)


def reserve(address: Address) -> tuple[socket.socket, Address]:
    """A socket that keeps the port for the workers, and the address with its port. Raises SettingsError if it is in use.

    Asked for first without SO_REUSEPORT: with it, a second installation of the same user would get a share of the
    requests of the first. The socket does not listen, so the kernel gives it no connection.
    """
    family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
    kept = socket.socket(family, socket.SOCK_STREAM)
    try:
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(tuple(address))
            port = probe.getsockname()[1]
        kept.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        kept.bind((address.host, port))
    except OSError as error:
        kept.close()
        raise SettingsError(f"Cannot listen on {address}: {error.strerror}. Nothing was started.") from error
    return kept, Address(address.host, port)


def part_log(name: str, values: Values) -> Log:
    return open_log(name, clock=SystemClock(), level=values.text("log-level"), stream=sys.stderr)
