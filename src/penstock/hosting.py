"""`EventProcessorHost`: a group's processors on a hub that another machine serves, a Kafka topic, or a data folder of this machine.

    class Alarm:
        def __init__(self, partition: int) -> None: ...
        def process(self, events: Events) -> str | None: ...
        def close(self, reason: CloseReason) -> None: ...          # may be left out

    EventProcessorHost("http://127.0.0.1:8480", store="./leases", group="alarms").run(Alarm)

Like cli/wiring.py, it only puts together what is made below; what hosts, leases and pumps do is in `processor/`. How to use it, and
what is promised: docs/hosts.md.
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
import secrets
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Final, Literal, NamedTuple, Self, cast

import msgspec

from penstock.access import Access
from penstock.archive.fresh import Counts, Fresh
from penstock.archive.topic import is_topic, let_in, reached, topic_of
from penstock.blobs import BlobStore
from penstock.blobs.connection import connect, is_url
from penstock.blobs.disk import DiskBlobs
from penstock.blobs.probe import probe
from penstock.clock import SystemClock
from penstock.errors import SettingsError
from penstock.events import Slice
from penstock.files import Files
from penstock.hub import Hub
from penstock.hub.kafka_security import Security, as_argument
from penstock.hub.remote import RemoteHub
from penstock.processor import host as processor_host
from penstock.processor.lease import Start
from penstock.processor.pump import Log
from penstock.processor.user import Called, Factory, Fed, Function
from penstock.telemetry.log import open_log

LEASE_S_LEAST = 1.0
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


_DEFAULTS: Final = {"kafka-security": Security.protocol, "kafka-mechanism": Security.mechanism}


class _Topic(NamedTuple):
    """A Kafka topic as the hub, and what opens its brokers."""

    servers: str
    name: str
    security: Security


class _Arguments:
    """What a program gives, by the names of settings: an argument, or else the environment variable that commands have too."""

    def __init__(self, given: Mapping[str, str | None]) -> None:
        self._given = given

    def text(self, name: str) -> str:
        return self._given.get(name) or self._in_environment(name) or _DEFAULTS.get(name, "")

    def source(self, name: str) -> str:
        if self._given.get(name):
            return "flag"
        return "environment" if self._in_environment(name) else "default"

    def _in_environment(self, name: str) -> str:
        return os.environ.get("PENSTOCK_" + name.upper().replace("-", "_"), "")


class PartitionState(msgspec.Struct, frozen=True):
    """A partition that this host reads: `offset` is next; everything below the sequence number `checkpoint` is done for good.

    `failures` are those of the user's code since the host began, `last_failure` the last of them. `parked` says why the partition
    stands still, if it does: nothing of it is skipped, and it goes on in a host that is started anew. Of a Kafka topic `copies` and
    `dead` are events that were left out since then (docs/hosts.md).
    """

    partition: int
    epoch: int
    offset: str
    checkpoint: int
    stalled_s: float
    parked: str | None
    failures: int
    last_failure: str | None
    copies: int = 0
    dead: int = 0


class EventProcessorHost:
    """One host of a consumer group. Hosts of one group share its partitions through leases in `store`, each partition read by one.

    `hub` is the address of an API or a connection string, a Kafka topic (`kafka://HOST:PORT/TOPIC`), or a data folder of this machine.
    `key`, `ca` and `certificate` are for an API, as in Client; `kafka_…`, `ca` and `certificate` are for brokers, by the names of the
    settings of `penstock host` (docs/kafka.md). What is not given comes from the same environment variables. `store` is where the group's
    leases and checkpoints lie, the same for all its hosts; with a data folder it may be left out and is the installation's own.
    `archive`, for a topic, is the store of its APIs, where that is another. Tests hand in hub and store ready-made (penstock.testing).
    `name` must be the host's own (default: machine and random digits). A partition without a lease begins at the oldest event that is
    kept, or, with `begin="end"`, with the events to come. A lease that a host did not renew for `lease_s` is taken over. `log` is called
    with a sentence and fields, as loggers of structlog are; default: lines on standard error. Raises SettingsError.
    """

    def __init__(
        self,
        hub: str | Path | Hub,
        *,
        group: str,
        store: str | Path | BlobStore | None = None,
        archive: str | Path | BlobStore | None = None,
        key: str | None = None,
        ca: str | None = None,
        certificate: str | None = None,
        certificate_key: str | None = None,
        kafka_security: str | None = None,
        kafka_mechanism: str | None = None,
        kafka_user: str | None = None,
        kafka_password: str | None = None,
        kafka_password_file: str | None = None,
        name: str | None = None,
        begin: Literal["start", "end"] = "start",
        lease_s: float = 30.0,
        log: Log | None = None,
    ) -> None:
        self.name = name or unique_name()
        _check(group, self.name, begin, lease_s)
        if store is None and isinstance(hub, str | Path) and "://" not in str(hub):
            store = Path(hub) / "store"
        if store is None:
            raise SettingsError(f"Where the leases of group {group} lie must be said: `store` is missing.")
        given = {"key": key, "ca": ca, "certificate": certificate, "certificate-key": certificate_key}
        given |= {"kafka-security": kafka_security, "kafka-mechanism": kafka_mechanism, "kafka-user": kafka_user}
        given |= {"kafka-password": kafka_password, "kafka-password-file": kafka_password_file}
        self._hub = _reached(hub, given) if isinstance(hub, str) else hub
        self._store = open_store(store) if isinstance(store, str | Path) else store
        self._archive_name = str(archive or store)
        self._archive = open_store(archive) if isinstance(archive, str | Path) else archive or self._store
        self._store_name = str(store)
        self._clock = SystemClock()
        self._group = group
        self._begin = begin
        self._lease_s = lease_s
        self._log = log or open_log(self.name, clock=self._clock, level="info", stream=sys.stderr)
        self._failures: dict[int, tuple[int, str]] = {}
        self._counts: dict[int, Counts] = {}
        self._open: set[Fed] = set()
        self._closing = contextlib.ExitStack()
        self._host: processor_host.EventProcessorHost | None = None
        self._asked = threading.Event()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def run(self, processor: Factory | Function) -> None:
        """`start`, then block until the host is stopped, or Ctrl-C. Raises what ended it, if that was neither."""
        try:
            host, factory = self._prepare(processor)
            host.run(factory)
        except KeyboardInterrupt:
            # That is how people end it; its leases are given back like with `stop`.
            self.ask_stop()
        finally:
            self.stop()

    def start(self, processor: Factory | Function) -> None:
        """Begin in the background. `processor` is a class, made once for each partition with its number, or one function.

        A host starts once. Raises HubUnavailable, StoreUnavailable when they do not answer, SettingsError when they are not usable.
        """
        host, factory = self._prepare(processor)
        host.start(factory)

    def ask_stop(self) -> None:
        """Stop soon; does not wait, so a signal handler or a processor may call it."""
        self._asked.set()
        if self._host is not None:
            self._host.ask_stop()

    def stop(self) -> None:
        """Close the processors, write their checkpoints, give the leases back. Waits for it, 5 s at most for a processor."""
        self._asked.set()
        if self._host is not None:
            self._host.stop()
            # A processor that did not end may still have a read under way, which would lose its map.
            if not self._open:
                self._closing.close()

    @property
    def error(self) -> Exception | None:
        """What ended the host, if it did not end on request."""
        return self._host.error if self._host else None

    def state(self) -> list[PartitionState]:
        """The partitions that this host reads now."""
        return [
            PartitionState(
                partition=pump.partition,
                epoch=pump.epoch,
                offset=pump.offset,
                checkpoint=pump.checkpoint,
                stalled_s=pump.stalled_s,
                parked=pump.parked,
                failures=self._failures.get(pump.partition, (0, ""))[0],
                last_failure=self._failures[pump.partition][1] if pump.partition in self._failures else None,
                copies=self._counts[pump.partition].copies if pump.partition in self._counts else 0,
                dead=self._counts[pump.partition].dead if pump.partition in self._counts else 0,
            )
            for pump in (self._host.state() if self._host else ())
        ]

    def _prepare(self, processor: Factory | Function) -> tuple[processor_host.EventProcessorHost, Callable[[int], Fed]]:
        if self._host is not None:
            raise SettingsError("A host starts once: make another.")
        if not callable(processor):
            raise SettingsError(
                f"A processor is a class, such as Alarm and not Alarm(), or a function; not {processor!r}."
            )
        with contextlib.ExitStack() as opened:
            hub = opened.enter_context(self._open_hub())
            probe(self._store, name=self._store_name)
            pool = opened.enter_context(ThreadPoolExecutor(processor_host.RENEWALS_AT_ONCE, "renew"))
            self._host = processor_host.EventProcessorHost(
                hub=hub,
                store=self._store,
                group=self._group,
                name=self.name,
                clock=self._clock,
                log=self._log,
                lease_s=self._lease_s,
                start=_at_end(hub) if self._begin == "end" else None,
                each=pool.map,
            )
            announce(hub, self._host, self._group)
            self._closing = opened.pop_all()
        if self._asked.is_set():
            # Asked meanwhile, by a signal maybe: there was nobody yet to be told.
            self._host.ask_stop()
        return self._host, self._factory(processor, hub)

    @contextlib.contextmanager
    def _open_hub(self) -> Iterator[Hub]:
        if isinstance(self._hub, Access):
            with RemoteHub(self._hub) as remote:
                yield remote
        elif isinstance(self._hub, _Topic):
            cluster, name = let_in(self._hub.servers, self._hub.security), self._archive_name
            with topic_of(self._archive, cluster, self._hub.name, store_name=name, clock=self._clock) as topic:
                yield topic
        elif not isinstance(self._hub, Path):
            yield self._hub
        else:
            from penstock.hub.embedded import EmbeddedHub  # hosts of other machines need no LMDB

            data = self._hub
            if not (data / "hub" / "data.mdb").exists():
                raise SettingsError(f"There is no hub in {data}: start one with `penstock up --data {data}`.")
            with EmbeddedHub(data / "hub", bytes_max=0, clock=self._clock, read_only=True) as embedded:
                yield embedded

    def _factory(self, processor: Factory | Function, hub: Hub) -> Callable[[int], Fed]:
        kind = processor.func if isinstance(processor, functools.partial) else processor
        function = cast(Function, processor)
        make = cast(Factory, processor) if isinstance(kind, type) else lambda _partition: Called(function)
        return lambda partition: Fed(make, partition, self._open, self._failed, self._fresh(hub, partition))

    def _fresh(self, hub: Hub, partition: int) -> Callable[[Slice], Slice] | None:
        """Where the hub keeps no producers, readers leave out what is there twice."""
        if not hub.place_bits:
            return None
        counts = self._counts.setdefault(partition, Counts())
        return Fresh(hub, self._archive, partition, counts, self._log).passed

    def _failed(self, partition: int, error: Exception) -> None:
        count, _ = self._failures.get(partition, (0, ""))
        self._failures[partition] = (count + 1, f"{type(error).__name__}: {error}")


def _check(group: str, name: str, begin: str, lease_s: float) -> None:
    """Raises SettingsError."""
    for what, text in (("group", group), ("host", name)):
        if not _NAME.fullmatch(text):
            raise SettingsError(f"The name of a {what} is at most 64 of A-Z a-z 0-9 . _ -, not {text!r}.")
    if begin not in ("start", "end"):
        raise SettingsError(f'begin is "start" or "end", not {begin!r}.')
    if not lease_s >= LEASE_S_LEAST:
        raise SettingsError(f"lease_s is at least {LEASE_S_LEAST:g} s, not {lease_s!r}.")


def _reached(hub: str, given: Mapping[str, str | None]) -> Path | Access | _Topic:
    """A hub by its address, with what opens it of `given`: by the names of settings. Raises SettingsError."""
    if is_topic(hub):
        at, security = reached(hub, _Arguments(given), as_argument)
        return _Topic(at.servers, at.topic, security)
    if "://" not in hub:
        return Path(hub)
    key, ca, certificate, certificate_key = (given[name] for name in ("key", "ca", "certificate", "certificate-key"))
    return Access.from_environment(hub, key=key, ca=ca, certificate=certificate, certificate_key=certificate_key)


def unique_name() -> str:
    """A host's name that no other host has."""
    return f"{socket.gethostname()}-{secrets.token_hex(4)}"


def open_store(store: str | Path) -> BlobStore:
    """The store at a folder, `file:///folder`, or in a cloud (docs/stores.md). Raises SettingsError."""
    text = str(store)
    if is_url(text):
        return connect(text, os.environ)
    return DiskBlobs(Path(text.removeprefix("file://")), Files())


def announce(hub: Hub, host: processor_host.EventProcessorHost, group: str) -> None:
    """A hub that is read over HTTP learns which epoch reads a partition and how far it is."""
    if not isinstance(hub, RemoteHub):
        return

    def position(partition: int) -> tuple[int, int] | None:
        return next(((state.epoch, state.checkpoint) for state in host.state() if state.partition == partition), None)

    hub.announce(group, position)


def _at_end(hub: Hub) -> Callable[[int], Start]:
    def start(partition: int) -> Start:
        end = hub.bounds(partition).next
        return Start(str(end >> hub.place_bits), end)

    return start
