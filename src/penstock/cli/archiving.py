"""The archiver host as a process: what it reads, where it writes, and its end. Built from settings, as cli/wiring.py builds the API.

`up` runs one beside its workers, `penstock host` one alone.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Final

import click

from penstock.archive.archiver import archivers
from penstock.archive.begin import join, start
from penstock.archive.hours import ARCHIVE_GROUP, HourKeeper
from penstock.archive.ledger import claim
from penstock.blobs import BlobStore
from penstock.blobs.probe import probe
from penstock.cli import topic
from penstock.cli.reach import access
from penstock.cli.wiring import Layout, open_store, part_log, reading_hub
from penstock.clock import Clock, SystemClock
from penstock.errors import PenstockError, SettingsError, StoreUnavailable
from penstock.files import Files
from penstock.hub import Hub
from penstock.processor.host import RENEWALS_AT_ONCE, EventProcessorHost
from penstock.settings import Values
from penstock.telemetry.log import Log

STORE_S_MAX: Final = 60.0
PUBLISHER_S_MAX: Final = 5.0


@contextlib.contextmanager
def host_hub(where: Layout, values: Values, url: str) -> Iterator[Hub]:
    """What a host reads: a topic, the hub of the API at `url`, or that of the data folder. Raises SettingsError, HubUnavailable."""
    if not url:
        with reading_hub(where, values) as hub:
            yield hub
        return
    if where.topic:
        with topic.opened(where, open_store(where), SystemClock()) as in_topic:
            yield in_topic
        return
    from penstock.access import is_connection_string

    if not url.startswith(("http://", "https://")) and not is_connection_string(url):
        raise SettingsError(
            f"--hub {url}: it is http://HOST:PORT, https://HOST:PORT, a connection string, or kafka://HOST:PORT/TOPIC."
        )
    if values.source("store") == "default":
        raise SettingsError("With --hub the store must be named: --store, the same for all hosts of this hub.")
    from penstock.hub.remote import RemoteHub  # http.client and ssl, which workers do without

    with RemoteHub(access(values, url)) as remote:
        yield remote


def claim_store(where: Layout, hub: Hub, clock: Clock) -> None:
    """See that the store is good and this hub's. Hosts come and go by themselves: one that starts while the store is away waits for it."""
    until, said = clock.monotonic() + STORE_S_MAX, False
    while True:
        try:
            store = open_store(where)
            probe(store, name=where.store_name)
            claim(store, hub, clock)
            join(store, hub, clock=clock)
            return
        except StoreUnavailable as error:
            if clock.monotonic() >= until:
                raise
            if not said:
                click.echo(f"penstock: {error}; tried again for {STORE_S_MAX:.0f} s", err=True)
            said = True
        clock.wait(threading.Event(), 1.0)


def run_host(name: str, values: Values, where: Layout, *, part: str, url: str = "") -> int:
    """An archiver host, from its start to its exit code. `url`: as for `host_hub`."""
    clock = SystemClock()
    log = part_log(part, values)
    store = open_store(where)
    stop = threading.Event()
    with host_hub(where, values, url) as hub, ThreadPoolExecutor(RENEWALS_AT_ONCE, "renew") as pool:
        host = EventProcessorHost(
            hub=hub,
            store=store,
            group=ARCHIVE_GROUP,
            name=name,
            clock=clock,
            log=log,
            lease_s=values.seconds("lease"),
            start=lambda partition: start(store, hub, partition, host=name, clock=clock),
            each=pool.map,
        )
        if url:
            from penstock.hosting import announce

            announce(hub, host, ARCHIVE_GROUP)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda _number, _frame: host.ask_stop())
        factory = archivers(
            hub,
            store,
            host=name,
            epoch=host.epoch,
            clock=clock,
            files=Files(),
            folder=where.work,
            file_bytes_max=values.count("file-bytes-max"),
            log=log,
            checkpoint=host.checkpoint if hub.place_bits else None,
        )
        publisher = threading.Thread(target=_publish, args=(hub, store, clock, stop, log), name="hours", daemon=True)
        publisher.start()
        try:
            host.run(factory)
        finally:
            stop.set()
            publisher.join(PUBLISHER_S_MAX)
            if (
                publisher.is_alive()
            ):  # in a request that the store does not answer; whoever comes next publishes the same
                log.warning("The publisher of hour manifests did not end.", waited_s=PUBLISHER_S_MAX)
    return 0


def _publish(hub: Hub, store: BlobStore, clock: Clock, stop: threading.Event, log: Log) -> None:
    """Hour manifests, soon after their hour is complete."""
    keeper = HourKeeper(hub, store)
    said = ""
    while not clock.wait(stop, max(0.5, min(10.0, hub.period_s / 10))):
        try:
            published = keeper.publish()
        except Exception as error:  # the top of the thread: it must not end unseen
            if said != str(error):
                log.warning(
                    "Hour manifests wait.",
                    exc_info=None if isinstance(error, PenstockError) else error,
                    detail=str(error),
                )
            said = str(error)
            continue
        said = ""
        for name in published:
            log.info("Hour is complete.", manifest=name)


def host_name(values: Values) -> str:
    from penstock.hosting import unique_name

    return values.text("name") or unique_name()
