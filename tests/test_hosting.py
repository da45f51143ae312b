"""`EventProcessorHost` as users have it: what a processor may be, what it is given, and what becomes of its errors."""

from __future__ import annotations

import contextlib
import functools
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from penstock import CloseReason, EventProcessorHost, Events
from penstock.archive.ledger import claim
from penstock.clock import SystemClock
from penstock.errors import SettingsError, WrongHub
from penstock.events import Batch, Event, Group
from penstock.hub import WholeHub
from penstock.hub.embedded import EmbeddedHub, create
from penstock.hub.remote import RemoteHub
from penstock.processor import host as processor_host
from penstock.processor import pump
from penstock.processor.lease import Lease, decode_lease, lease_name
from penstock.testing import MemoryBlobs, MemoryHub, MemoryLog
from penstock.wire.frame import content
from tests.hub.served import served
from tests.kafka_broker import Brokers, made_topic
from tests.processor.conftest import until

PARTITIONS = 2


class Bench:
    """A hub in a data folder and its API, or one in a Kafka topic and the archive's store; and hosts on either.

    `end` is the sequence number at which each partition goes on.
    """

    def __init__(self, folder: Path) -> None:
        self.data = folder / "data"
        self.leases = folder / "leases"
        self.log = MemoryLog()
        self.url = ""
        self.end = 0
        self.bits = 0
        self._archive: MemoryBlobs | None = None
        self._sent = 0
        options: Any = {"bytes_max": 64 << 20, "clock": SystemClock()}
        create(self.data / "hub", partitions=PARTITIONS, period_s=3600, **options)
        self.open = functools.partial(EmbeddedHub, self.data / "hub", **options)

    @contextlib.contextmanager
    def opened(self, where: str, kafka: Callable[[], Brokers]) -> Iterator[WholeHub]:
        """The hub, while hosts may read it at `url` (`http`, `topic`) or cannot yet (`data`)."""
        if where == "topic":
            from penstock.hub.kafka import KafkaHub

            cluster, topic = (
                (kafka().client, self.url.rpartition("/")[2]) if self.url else made_topic(kafka(), PARTITIONS)
            )
            self.url = f"kafka://{cluster.servers}/{topic}"
            with KafkaHub(cluster, topic, period_s=3600, clock=SystemClock()) as far:
                self.bits = far.place_bits
                if self._archive is None:
                    self._archive = MemoryBlobs()
                    claim(self._archive, far, SystemClock())
                yield far
            return
        with self.open() as near:
            if where == "data":
                yield near
                return
            with served(near, near.groups) as self.url:
                yield near

    def fill(self, hub: WholeHub, count: int, properties: bytes = b"") -> list[int]:
        """Each partition gets `count` events more, as one frame: their sequence numbers."""
        self._sent += 1
        numbers = list(range(self.end, self.end + count))
        self.end += 1 << self.bits if self.bits else count
        groups = []
        for partition in range(PARTITIONS):
            text = b"".join(b'{"deviceId":"d-%d","n":%d}\n' % (partition, n) for n in range(count))
            groups.append(Group(partition, count, text))
        hub.append([Batch("p", 1, self._sent, PARTITIONS * count, tuple(groups), properties=properties)])
        return numbers

    def host(self, hub: str | Path | None = None, **options: Any) -> EventProcessorHost:
        given: dict[str, Any] = {"store": self.leases, "group": "g", "name": "one", "lease_s": 1.0, "log": self.log}
        given["archive"] = self._archive
        return EventProcessorHost(self.url if hub is None else hub, **given | options)

    def lease(self, partition: int, group: str = "g") -> Lease:
        return decode_lease((self.leases / lease_name(group, partition)).read_bytes(), partition)


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


@pytest.fixture
def hub(bench: Bench) -> Iterator[EmbeddedHub]:
    """The hub, served over HTTP."""
    with bench.open() as near, served(near, near.groups) as url:
        bench.url = url
        yield near


@pytest.fixture(params=["http", "topic"])
def either(request: pytest.FixtureRequest, bench: Bench) -> Iterator[WholeHub]:
    """The hub of an API, and one in a Kafka topic: for what holds on both."""
    with bench.opened(request.param, functools.partial(request.getfixturevalue, "kafka")) as hub:
        yield hub


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pump, "BACKOFF_S_MAX", 0.005)


class Notes:
    """A processor class that writes down all it sees in `into`."""

    def __init__(self, partition: int, into: list[tuple[int, Event]]) -> None:
        self._partition = partition
        self._into = into

    def process(self, events: Events) -> str | None:
        assert events.partition == self._partition
        self._into += [(events.partition, event) for event in events]
        return events.next_offset


def test_a_function_is_given_every_event(bench: Bench, either: WholeHub) -> None:
    numbers = bench.fill(either, 3, b'{"site":"A"}')
    before = datetime.now(UTC) - timedelta(seconds=1)
    seen: list[tuple[int, Event]] = []
    offsets: list[tuple[str, str, str]] = []

    def take(events: Events) -> str:
        seen.extend((events.partition, event) for event in events)
        offsets.append((events.offset, events.next_offset, events.end_offset))
        assert sum(content(frame).count(b"\n") for frame in events.frames) == 3
        return events.next_offset

    with bench.host() as host:
        host.start(take)
        until(lambda: len(seen) == 6)
        until(lambda: [state.checkpoint for state in host.state()] == [bench.end, bench.end])
        states = [(state.partition, state.epoch, state.parked, state.failures) for state in host.state()]
        assert states == [(0, 1, None, 0), (1, 1, None, 0)]
    times = {partition: event.enqueued_at_ms for partition, event in seen}
    assert sorted(seen, key=lambda one: (one[0], one[1].sequence_number)) == [
        (
            p,
            Event(
                f"d-{p}",
                b'{"deviceId":"d-%d","n":%d}' % (p, n),
                number,
                str(number >> bench.bits),
                times[p],
                b'{"site":"A"}',
            ),
        )
        for p in range(PARTITIONS)
        for n, number in enumerate(numbers)
    ]
    end = str(bench.end >> bench.bits)
    assert offsets == [("0", end, end)] * 2
    at = seen[0][1].enqueued_at
    assert before < at < datetime.now(UTC) + timedelta(seconds=1)
    assert round(at.timestamp() * 1000) == seen[0][1].enqueued_at_ms
    assert [(lease.owner, lease.sequence_number) for lease in map(bench.lease, range(2))] == [("", bench.end)] * 2


@pytest.mark.parametrize("where", ["http", "data", "topic"])
def test_a_class_is_made_for_each_partition_and_goes_on_at_the_checkpoint(
    bench: Bench, where: str, request: pytest.FixtureRequest
) -> None:
    made: list[int] = []
    reasons: list[CloseReason] = []
    seen: list[tuple[int, Event]] = []

    class Noting(Notes):
        def __init__(self, partition: int) -> None:
            made.append(partition)
            super().__init__(partition, seen)

        def close(self, reason: CloseReason) -> None:
            reasons.append(reason)

    numbers: list[int] = []
    for round_ in (1, 2):
        with bench.opened(where, functools.partial(request.getfixturevalue, "kafka")) as hub:
            numbers += bench.fill(hub, 5)
            if where != "data":
                with bench.host() as host:
                    host.start(Noting)
                    until(lambda: len(seen) == round_ * 10)  # noqa: B023
        if where == "data":
            with bench.host(bench.data) as host:
                host.start(Noting)
                until(lambda: len(seen) == round_ * 10)  # noqa: B023
    assert (sorted(made), reasons) == ([0, 0, 1, 1], [CloseReason.SHUTDOWN] * 4)
    assert sorted((p, event.sequence_number) for p, event in seen) == [(p, n) for p in (0, 1) for n in numbers]


def test_a_partial_of_a_class_is_one(bench: Bench, hub: EmbeddedHub) -> None:
    bench.fill(hub, 5)
    seen: list[tuple[int, Event]] = []
    with bench.host() as host:
        host.start(functools.partial(Notes, into=seen))
        until(lambda: len(seen) == 10)


@pytest.mark.usefixtures("either")
def test_two_hosts_share_the_partitions(bench: Bench) -> None:
    with bench.host(name="a") as first:
        first.start(lambda events: events.next_offset)
        until(lambda: len(first.state()) == 2)
        with bench.host(name="b") as second:
            second.start(lambda events: events.next_offset)
            until(lambda: (len(first.state()), len(second.state())) == (1, 1))
        until(lambda: len(first.state()) == 2)


def test_the_hub_learns_who_reads_and_how_far_it_is(bench: Bench, hub: EmbeddedHub) -> None:
    bench.fill(hub, 5)
    with bench.host() as host:
        host.start(lambda events: events.next_offset)

        def known() -> dict[int, tuple[str, int, int]]:
            hub.groups.keep()
            return {r.partition: (r.group, r.progress.epoch, r.progress.checkpoint) for r in hub.groups.all()}

        until(lambda: known() == {0: ("g", 1, 5), 1: ("g", 1, 5)})


@pytest.mark.parametrize("asks", [True, False], ids=["asks", "control: does not say who asks"])
def test_a_group_holds_the_log_before_it_has_read_anything(
    bench: Bench, hub: EmbeddedHub, asks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the moment on when a host asks where to begin: what it is told is not deleted before it gets there."""
    if not asks:
        reader = RemoteHub._reader
        monkeypatch.setattr(RemoteHub, "_reader", lambda self, partition, *, asks: reader(self, partition, asks=False))
    bench.fill(hub, 5)
    hold, reads = threading.Event(), threading.Event()
    heard = hub.groups.heard

    def slow(group: str, partition: int, epoch: int, checkpoint: int) -> None:
        if epoch:
            reads.set()
            assert hold.wait(10)
        heard(group, partition, epoch, checkpoint)

    hub.groups.heard = slow  # type: ignore[method-assign]
    with bench.host() as host:
        host.start(lambda events: events.next_offset)
        assert reads.wait(10)
        known = [(reader.group, reader.progress.epoch, reader.progress.checkpoint) for reader in hub.groups.all()]
        assert ("g", 0, 0) in known if asks else known == []
        hold.set()


def test_a_group_may_begin_with_what_is_to_come(bench: Bench, either: WholeHub) -> None:
    bench.fill(either, 5)
    seen: list[tuple[int, Event]] = []
    with bench.host(begin="end") as host:
        host.start(functools.partial(Notes, into=seen))
        until(lambda: len(host.state()) == 2)
        numbers = bench.fill(either, 2)
        until(lambda: len(seen) == 4)
    assert sorted(event.sequence_number for _, event in seen) == sorted(numbers * 2)


@pytest.mark.usefixtures("quick")
def test_code_that_fails_is_tried_again_at_the_checkpoint_and_then_parked_by_name(
    bench: Bench, either: WholeHub
) -> None:
    bench.fill(either, 5)
    tries: list[int] = []

    def fail(events: Events) -> str:
        if events.partition == 1:
            tries.append(next(iter(events)).sequence_number)
            raise ZeroDivisionError("by zero")
        return events.next_offset

    with bench.host() as host:
        host.start(fail)
        until(lambda: any(state.parked for state in host.state()))
        bench.fill(either, 5)
        until(lambda: host.state()[0].checkpoint == bench.end)
        good, bad = host.state()
        assert (good.parked, good.failures, good.last_failure) == (None, 0, None)
        assert (bad.parked, bad.failures, bad.last_failure, bad.checkpoint) == (
            "ZeroDivisionError: by zero",
            pump.TRIES,
            "ZeroDivisionError: by zero",
            0,
        )
    assert tries == [0] * pump.TRIES
    assert bench.log.count("processor failed", partition=1) == pump.TRIES
    assert bench.log.count("partition parked", partition=1, reason="ZeroDivisionError: by zero") == 1
    assert bench.lease(1).sequence_number == 0
    with bench.host() as again:
        seen: list[tuple[int, Event]] = []
        again.start(functools.partial(Notes, into=seen))
        until(lambda: len(seen) == 10)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("wrong", [5, b"5", True, "six"])
def test_what_is_no_checkpoint_is_an_error_of_the_processor(bench: Bench, hub: EmbeddedHub, wrong: object) -> None:
    bench.fill(hub, 5)
    with bench.host() as host:
        host.start(lambda _: wrong)  # type: ignore[arg-type, return-value]
        until(lambda: all(state.parked for state in host.state()) and len(host.state()) == 2)
    assert [bench.lease(partition).sequence_number for partition in (0, 1)] == [0, 0]


@pytest.mark.usefixtures("quick")
def test_a_class_that_cannot_be_made_is_parked_too(bench: Bench, hub: EmbeddedHub) -> None:
    class Failing:
        def __init__(self, partition: int) -> None:
            raise ValueError(f"no {partition}")

        def process(self, events: Events) -> str | None: ...

    bench.fill(hub, 1)
    with bench.host() as host:
        host.start(Failing)
        until(lambda: [state.parked for state in host.state()] == ["ValueError: no 0", "ValueError: no 1"])
        assert [state.failures for state in host.state()] == [pump.TRIES] * 2


def test_run_blocks_until_it_is_told_to_stop(bench: Bench, hub: EmbeddedHub) -> None:
    host = bench.host()
    bench.fill(hub, 1)

    def take(events: Events) -> str:
        host.ask_stop()
        return events.next_offset

    running = threading.Thread(target=host.run, args=(take,))
    running.start()
    running.join(20)
    assert not running.is_alive() and host.error is None
    leases = [decode_lease(path.read_bytes(), int(path.stem)) for path in bench.leases.glob("_leases/g/*.json")]
    assert {lease.owner for lease in leases} == {""}


def test_another_hub_at_the_address_ends_the_host_and_parks_nothing() -> None:
    """As after a new installation."""
    before, after = MemoryHub(PARTITIONS), MemoryHub(PARTITIONS)
    after.id = "1" * 32
    store, log = MemoryBlobs(), MemoryLog()
    with served(before) as url:
        host = EventProcessorHost(url, store=store, group="g", name="one", lease_s=1.0, log=log)
        host.start(lambda events: events.next_offset)
        until(lambda: len(host.state()) == PARTITIONS)
    with served(after, port=urlsplit(url).port or 0):
        until(lambda: host.error is not None)
    host.stop()
    assert isinstance(host.error, WrongHub)
    assert before.id in str(host.error) and after.id in str(host.error)
    assert log.count("processor failed") == log.count("partition parked") == 0
    leases = [decode_lease(store.get(lease_name("g", partition)).body, partition) for partition in range(PARTITIONS)]
    assert [lease.owner for lease in leases] == [""] * PARTITIONS


def test_a_newer_epoch_ends_the_reading_of_a_partition(bench: Bench, hub: EmbeddedHub) -> None:
    """A host whose store was cut off, and that somebody else has declared dead."""
    reasons: list[CloseReason] = []

    class Closing(Notes):
        def __init__(self, partition: int) -> None:
            super().__init__(partition, [])

        def close(self, reason: CloseReason) -> None:
            reasons.append(reason)

    bench.fill(hub, 5)
    with bench.host() as host:
        host.start(Closing)
        until(lambda: [state.checkpoint for state in host.state()] == [5, 5])
        hub.groups.heard("g", 0, 7, 5)
        until(lambda: bench.log.count("reader fenced", partition=0))
        until(lambda: reasons == [CloseReason.LEASE_LOST])
    assert reasons == [CloseReason.LEASE_LOST, CloseReason.SHUTDOWN]


@pytest.mark.parametrize("where", ["data", "topic"])
def test_a_processor_that_does_not_end_keeps_the_hub_open(
    bench: Bench, where: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The map of the data folder, or the clients of the brokers, must not be taken from under a read that is still to come."""
    monkeypatch.setattr(processor_host, "STOP_S_MAX", 0.01)
    with bench.opened(where, functools.partial(request.getfixturevalue, "kafka")) as hub:
        bench.fill(hub, 5)
    hold, began, after = threading.Event(), threading.Event(), threading.Event()

    def slow(events: Events) -> str:
        began.set()
        assert hold.wait(20)
        after.set()
        return events.next_offset

    host = bench.host(bench.data if where == "data" else None)
    host.start(slow)
    assert began.wait(20)
    host.stop()
    assert bench.log.count("processor did not end") >= 1
    hold.set()
    assert after.wait(20)
    until(lambda: not any(thread.name.startswith("pump-") for thread in threading.enumerate()))
    assert host.error is None
    host.stop()


def test_a_processor_can_be_tested_in_memory() -> None:
    hub, store = MemoryHub(partitions=2), MemoryBlobs()
    hub.put(0, [b'{"deviceId":"d-1","temperature":21.4}'])
    seen: list[tuple[int, Event]] = []
    with EventProcessorHost(hub, store=store, group="alarms", log=MemoryLog()) as host:
        host.start(functools.partial(Notes, into=seen))
        until(lambda: [(state.partition, state.checkpoint) for state in host.state()] == [(0, 1), (1, 0)])
    assert [event.device for _, event in seen] == ["d-1"]
    assert decode_lease(store.get(lease_name("alarms", 0)).body, 0).sequence_number == 1


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"group": "$archive"}, "name of a group"),
        ({"group": "a/b"}, "name of a group"),
        ({"group": ""}, "name of a group"),
        ({"name": "a b"}, "name of a host"),
        ({"hub": "http://127.0.0.1:1", "store": None}, "must be said"),
        ({"store": "ftp://x/y"}, "The store's address is none"),
        ({"begin": "END"}, "begin is"),
        ({"lease_s": 0}, "lease_s is at least 1 s"),
        ({"lease_s": float("nan")}, "lease_s is at least 1 s"),
    ],
)
def test_what_makes_no_host(bench: Bench, options: dict[str, Any], says: str) -> None:
    with pytest.raises(SettingsError, match=says.replace("$", r"\$")):
        bench.host(**{"hub": bench.data} | options)


@pytest.mark.parametrize("processor", [None, Exception(), "Alarm"])
def test_what_is_no_processor(bench: Bench, processor: Any) -> None:
    with pytest.raises(SettingsError, match="A processor is a class"):
        bench.host(bench.data).run(processor)


def test_a_host_that_was_asked_to_stop_before_it_began_ends_at_once(bench: Bench) -> None:
    """As by a signal while it looks for hub and store."""
    host = bench.host(bench.data)
    host.ask_stop()
    host.run(lambda events: events.next_offset)
    assert bench.log.count("host ends") == 0
    with pytest.raises(SettingsError, match="starts once"):
        host.start(lambda events: events.next_offset)


def test_a_folder_without_a_hub(bench: Bench, tmp_path: Path) -> None:
    host = bench.host(tmp_path / "nothing")
    with pytest.raises(SettingsError, match="There is no hub in"):
        host.run(lambda _: None)
    assert not bench.leases.exists()
    assert (host.state(), host.error) == ([], None)


def test_leases_of_a_data_folder_lie_in_its_own_store(bench: Bench) -> None:
    with bench.open() as hub:
        bench.fill(hub, 1)
    with EventProcessorHost(bench.data, group="g", log=bench.log) as host:
        host.start(lambda events: events.next_offset)
        until(lambda: [state.checkpoint for state in host.state()] == [1, 1])
    lease = decode_lease((bench.data / "store" / lease_name("g", 0)).read_bytes(), 0)
    assert (lease.sequence_number, lease.owner) == (1, "")


def test_hosts_without_a_name_have_one_each(bench: Bench) -> None:
    assert len({bench.host(bench.data, name=None).name for _ in range(3)}) == 3


@pytest.mark.parametrize(
    ("module", "without"),
    [
        ("penstock", ("lmdb", "obstore", "http.client", "penstock.hub")),
        ("penstock.hosting", ("lmdb", "obstore", "click", "uvloop", "asyncio")),
    ],
)
def test_what_an_import_brings_along(module: str, without: tuple[str, ...]) -> None:
    code = f"import sys, {module}; sys.exit(str([name for name in {without!r} if name in sys.modules]))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.stderr.strip() == "[]"
