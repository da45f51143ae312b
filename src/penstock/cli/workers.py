"""API workers, built from settings: what `penstock up` and `penstock api` run in their child processes.

Apart from wiring.py, because most commands need no server and start in half the time without it.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import msgspec

from penstock.blobs import BlobStore
from penstock.cli import topic
from penstock.cli.security import certificates, make_guard
from penstock.cli.serving import Serving
from penstock.cli.supervisor import EXIT_HUB_BROKEN
from penstock.cli.wiring import Layout, open_store, part_log
from penstock.clock import Clock, SystemClock, timestamp
from penstock.errors import NotFound, StorageFull
from penstock.files import Files
from penstock.hub.embedded import EmbeddedHub
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
from penstock.server.topic import NoGroups, build_topic_status, mark
from penstock.settings import Values
from penstock.telemetry.log import Log
from penstock.wire.route import Router

if TYPE_CHECKING:
    from penstock.hub.kafka import KafkaHub


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
            serving = _serving_topic(opened.enter_context(in_topic), where, store, clock, log)
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


def _listening(address: Address) -> socket.socket:
    """One more socket on a reserved port. SO_REUSEADDR is for the next start: connections inherit it, and what is left of
    them when all processes were killed does not keep the port then."""
    listening = socket.socket(socket.AF_INET6 if ":" in address.host else socket.AF_INET, socket.SOCK_STREAM)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    listening.bind(tuple(address))
    listening.listen(4096)
    return listening


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


def _serving_topic(hub: KafkaHub, where: Layout, store: BlobStore, clock: Clock, log: Log) -> Serving:
    """What is served of a hub in a topic."""

    def check() -> None:
        hub.bounds(0)

    return Serving(
        hub,
        groups=NoGroups(),
        status=lambda throughput: build_topic_status(
            hub, store, run_folder=where.run, clock=clock, throughput=throughput
        ),
        producer=lambda _producer, _owner: None,
        check=check,
        keep=lambda stop, _broken: mark(hub, stop, clock, log),
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
