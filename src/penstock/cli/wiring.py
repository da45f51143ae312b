"""The composition root: builds every part from settings. Nothing below sees a settings object."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import msgspec

from penstock.archive.begin import join
from penstock.archive.hours import refuse_older
from penstock.archive.ledger import Owner, claim, owner
from penstock.blobs import BlobStore
from penstock.blobs.connection import connect, is_url, parse_url
from penstock.blobs.disk import DiskBlobs
from penstock.blobs.probe import probe
from penstock.cli import topic
from penstock.cli.security import certificates, make_guard
from penstock.cli.serving import Serving
from penstock.cli.supervisor import EXIT_HUB_BROKEN
from penstock.clock import Clock, SystemClock, timestamp
from penstock.errors import NotFound, SettingsError, StorageFull
from penstock.files import Files
from penstock.hub import embedded
from penstock.hub.embedded import EmbeddedHub
from penstock.hub.kafka_security import Security
from penstock.kinds import Address
from penstock.server import units
from penstock.server.answers import KeptBatch, Producer, Range
from penstock.server.app import App, Service, make_app, run_worker
from penstock.server.housekeeping import Housekeeping
from penstock.server.ingest import Ingest
from penstock.server.parser import Limits
from penstock.server.quota import Quota
from penstock.server.read import Reads
from penstock.server.status import build_status
from penstock.settings import Values
from penstock.telemetry.log import Log, open_log
from penstock.wire.route import Router, is_field

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


def _listening(address: Address) -> socket.socket:
    """One more socket on a reserved port. SO_REUSEADDR is for the next start: connections inherit it, and what is left of
    them when all processes were killed does not keep the port then."""
    listening = socket.socket(socket.AF_INET6 if ":" in address.host else socket.AF_INET, socket.SOCK_STREAM)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    listening.bind(tuple(address))
    listening.listen(4096)
    return listening


def part_log(name: str, values: Values) -> Log:
    return open_log(name, clock=SystemClock(), level=values.text("log-level"), stream=sys.stderr)


def run_api(
    number: int, values: Values, where: Layout, *, listen: Address, admin: Address, held: memoryview | None
) -> int:
    """An API worker, from its fork to its exit code."""
    name = worker_name(number)
    clock = SystemClock()
    log = part_log(name, values)
    store = open_store(where)
    broken = threading.Event()
    stop = threading.Event()

    def end() -> None:
        # What waits is answered 503 while the worker drains; the exit code tells the supervisor why it ended.
        broken.set()
        os.kill(os.getpid(), signal.SIGTERM)

    with contextlib.ExitStack() as opened:
        if where.topic:
            in_topic = topic.opened(where, store, clock, frame_bytes_max=values.count("frame-bytes-max"))
            serving = topic.serving(opened.enter_context(in_topic), where, store, clock, log)
        else:
            hub = EmbeddedHub(
                where.hub,
                bytes_max=values.count("hub-bytes-max"),
                clock=clock,
                held=held,
                frame_bytes_max=values.count("frame-bytes-max"),
            )
            serving = _serving(opened.enter_context(hub), store, values, where, clock, log)
        service = Service(
            listen=[_listening(listen)],
            admin=[_listening(admin)],
            limits=_limits(values),
            drain_timeout_s=values.seconds("stop-timeout") / 2,
            clock=clock,
            log=log,
            core=_core(number, values.count("workers")),
            certificates=certificates(values, log),
        )
        keeper = threading.Thread(target=serving.keep, args=(stop, end), name="housekeeping")
        keeper.start()
        try:
            run_worker(service, lambda: _app(serving, values, where, clock, log, end), ready=lambda: None)
        finally:
            stop.set()
            keeper.join()
    return EXIT_HUB_BROKEN if broken.is_set() else 0


def worker_name(number: int) -> str:
    return f"api-{number}"


def _core(number: int, workers: int) -> int | None:
    """The processor of a worker, where there is just one for each. With fewer workers the system finds the processors that are free."""
    cores = sorted(os.sched_getaffinity(0))
    return cores[number] if workers == len(cores) else None


def _serving(hub: EmbeddedHub, store: BlobStore, values: Values, where: Layout, clock: Clock, log: Log) -> Serving:
    housekeeping = Housekeeping(
        hub,
        store,
        retention_s=values.seconds("retention"),
        archived=values.text("archive") == "on",
        clock=clock,
        log=log,
    )

    def check() -> None:
        if hub.usage().full:
            raise StorageFull("The hub's storage is full: new events are refused.")

    return Serving(
        hub,
        groups=hub.groups,
        status=lambda throughput: build_status(hub, store, run_folder=where.run, clock=clock, throughput=throughput),
        producer=lambda producer, owner: _producer(hub, producer, owner),
        check=check,
        keep=lambda stop, broken: housekeeping.run(stop, lambda _error: broken()),
    )


def _app(serving: Serving, values: Values, where: Layout, clock: Clock, log: Log, broken: Callable[[], None]) -> App:
    import asyncio

    router = Router(
        serving.hub.partitions(),
        events_max=values.count("batch-events-max"),
        event_bytes_max=values.count("event-bytes-max"),
        frame_bytes_max=values.count("frame-bytes-max"),
    )
    shared, buckets = units.open_buckets(where.data, where.run, Files(), serving.hub.partitions())
    ingest = Ingest(
        serving.hub,
        router,
        clock,
        log,
        device_field=values.text("device-field"),
        unzipped_bytes_max=values.count("batch-bytes-max"),
        waiting_max=values.count("queue-batches-max"),
        wait_s_max=values.seconds("queue-wait-max"),
        broken=broken,
        quota=Quota(shared, buckets, clock, log, device_events_per_s=values.count("device-events-per-s")),
    )
    ingest.start(asyncio.get_running_loop())

    def status() -> Mapping[str, object]:
        report = msgspec.to_builtins(serving.status(units.report(buckets, clock)))
        assert isinstance(report, dict)
        return report

    return make_app(
        ingest,
        Reads(serving.hub, groups=serving.groups, status=status, producer=serving.producer, check=serving.check),
        close=ingest.close,
        log=log,
        units=units.Units(where.data, where.run, Files(), shared, buckets, clock),
        guard=make_guard(values, where.data, clock, log),
    )


def _producer(hub: EmbeddedHub, producer: str, owner: str) -> Producer | None:
    try:
        found = hub.producer(producer)
    except NotFound:
        return None
    if owner and found.owner != owner:
        return None
    kept = [
        KeptBatch(
            one.epoch,
            one.sequence,
            one.sha256.hex(),
            one.accepted,
            timestamp(one.enqueued_at_ms),
            [Range(*each) for each in one.ranges],
        )
        for one in found.kept
    ]
    return Producer(producer, found.epoch, found.sequence, timestamp(found.seen_at_ms), kept)


def _limits(values: Values) -> Limits:
    return Limits(
        body_bytes_max=values.count("body-bytes-max"),
        header_bytes_max=values.count("header-bytes-max"),
        header_s=values.seconds("header-timeout"),
        body_s=values.seconds("body-timeout"),
        idle_s=values.seconds("idle-timeout"),
        write_s=values.seconds("write-timeout"),
        connections_max=values.count("connections-max"),
        connections_per_address_max=values.count("connections-per-address-max"),
    )
