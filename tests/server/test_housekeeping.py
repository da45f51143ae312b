"""Retention never passes the archive's checkpoint; alarms are said once; a broken hub ends it."""

from __future__ import annotations

import threading
from pathlib import Path

import msgspec
import pytest

from penstock.errors import HubBroken, StorageFull
from penstock.events import Batch
from penstock.events import Group as EventGroup
from penstock.hub.embedded import EmbeddedHub, create
from penstock.hub.groups import SEEN_MS, Progress, Reader, seen_at_ms
from penstock.processor.lease import Lease, encode_lease, lease_name
from penstock.server.housekeeping import CLOCK_DOUBTED_S, LISTENED_S, READER_LAG_MOST, Housekeeping
from penstock.telemetry.log import open_log
from penstock.testing import FakeClock, FaultyBlobs, MemoryBlobs, MemoryHub

RETENTION_S = 100.0


class Usage(msgspec.Struct):
    used: int = 1
    limit: int = 100
    full: bool = False
    reader_lag: int = 0


class Groups:
    """Groups in memory; `forget` as the hub's."""

    def __init__(self) -> None:
        self.known: list[Reader] = []

    def all(self) -> list[Reader]:
        return self.known

    def forget(self, group: str, *, not_since_ms: int) -> bool:
        mine = [reader for reader in self.known if reader.group == group]
        if seen_at_ms(mine) >= not_since_ms:
            return False
        self.known = [reader for reader in self.known if reader.group != group]
        return True


class Hub(MemoryHub):
    def __init__(self, clock: FakeClock) -> None:
        super().__init__(1, clock=clock)
        self.groups = Groups()
        self.state = Usage()
        self.fails: Exception | None = None
        self.expired: list[bool] = []

    def usage(self) -> Usage:
        return self.state

    def counters(self) -> dict[str, int]:
        return {}

    def maintain(self, *, expire: bool = True) -> None:
        if self.fails:
            raise self.fails
        self.expired.append(expire)
        super().maintain(expire=expire)


class Lines:
    """A stream that keeps what is logged."""

    def __init__(self) -> None:
        self.written: list[dict[str, object]] = []

    def write(self, text: str) -> int:
        self.written.append(msgspec.json.decode(text))
        return len(text)

    def flush(self) -> None:
        return

    def isatty(self) -> bool:
        return False


class House:
    def __init__(self, *, archived: bool = True) -> None:
        self.clock = FakeClock(jumps=True)
        self.hub, self.store, self.lines = Hub(self.clock), MemoryBlobs(), Lines()
        log = open_log("api-0", clock=self.clock, level="info", stream=self.lines)  # type: ignore[arg-type]
        self.keeping = Housekeeping(
            self.hub, self.store, retention_s=RETENTION_S, archived=archived, clock=self.clock, log=log
        )
        self.keeping._retain_s = 0.0  # at each round

    def checkpoint(self, number: int, *, owner: str = "up") -> None:
        name = lease_name("$archive", 0)
        self.store.delete(name)
        self.store.create(name, encode_lease(Lease(0, owner, f"x-{number}", 1, str(number), number)), id=f"x-{number}")

    def reads(self, number: int, *, group: str = "alarms", age_s: float = 0.0, epoch: int = 1) -> None:
        """A group reads over HTTP, or did so some time ago."""
        self.hub.groups.known = [reader for reader in self.hub.groups.known if reader.group != group]
        at_ms = self.clock.now_ms() - round(age_s * 1000)
        self.hub.groups.known.append(Reader(group, 0, Progress(epoch, number, at_ms)))

    def said(self) -> list[object]:
        return [line["event"] for line in self.lines.written]


def aged(house: House) -> None:
    """Two frames that are older than the retention, and one that is not."""
    house.hub.put(0, [b'{"deviceId":"a"}'] * 10)
    house.clock.advance(10)
    house.hub.put(0, [b'{"deviceId":"a"}'] * 10)
    house.clock.advance(RETENTION_S + 1)
    house.hub.put(0, [b'{"deviceId":"a"}'] * 10)


def test_what_is_old_and_archived_is_trimmed() -> None:
    house = House()
    aged(house)
    house.checkpoint(30)
    house.keeping.round()
    assert house.hub.bounds(0).first == 20
    assert house.said() == []


@pytest.mark.parametrize(("checkpoint", "first"), [(None, 0), (0, 0), (10, 10), (15, 10)])
def test_what_is_not_archived_stays_and_is_said_once(checkpoint: int | None, first: int) -> None:
    house = House()
    aged(house)
    if checkpoint is not None:
        house.checkpoint(checkpoint)
    house.keeping.round()
    house.keeping.round()
    assert house.hub.bounds(0).first == first
    assert house.said() == ["Retention waits for the archive in partitions [0]."]
    house.checkpoint(30)
    house.keeping.round()
    assert house.hub.bounds(0).first == 20
    assert house.said()[1:] == ["Over."]


def test_control_without_waiting_for_the_archive_it_would_be_gone() -> None:
    house = House(archived=False)
    aged(house)
    house.keeping.round()
    assert house.hub.bounds(0).first == 20


@pytest.mark.parametrize(("owner", "first"), [("host-2", 10), ("", 20)])
def test_without_an_archiver_here_retention_waits_for_one_elsewhere(owner: str, first: int) -> None:
    """One that gave its lease back archives no more."""
    house = House(archived=False)
    aged(house)
    house.checkpoint(10, owner=owner)
    house.keeping.round()
    assert house.hub.bounds(0).first == first


def test_a_checkpoint_that_the_hub_has_not_reached_is_none() -> None:
    """A hub that was restored from an older copy: what it took since was never archived."""
    house = House()
    aged(house)
    house.checkpoint(31)
    house.keeping.round()
    assert house.hub.bounds(0).first == 0


@pytest.mark.parametrize("seconds", [15 * 24 * 3600.0, -3600.0])
def test_nothing_is_deleted_for_its_age_for_a_while_after_the_clock_was_set(seconds: float) -> None:
    house = House()
    house.hub.put(0, [b'{"deviceId":"a"}'] * 10)
    house.checkpoint(10)
    house.keeping.round()
    house.clock.step(seconds)
    house.keeping.round()
    assert house.hub.bounds(0).first == 0
    assert house.hub.expired == [True, False]
    assert str(house.said()[-1]).startswith("The clock was set by ")
    house.clock.step(-seconds)
    house.keeping.round()
    house.clock.advance(CLOCK_DOUBTED_S - 1)
    house.keeping.round()
    assert house.hub.expired == [True, False, False, False]
    house.clock.advance(1)
    house.keeping.round()
    assert house.hub.expired[-1]
    assert house.hub.bounds(0).first == 10
    assert house.said()[-1] == "Over."


@pytest.mark.parametrize(("number", "first"), [(0, 0), (10, 10), (15, 10), (20, 20), (30, 20)])
def test_what_a_group_has_not_read_over_http_stays_and_is_said_once(number: int, first: int) -> None:
    house = House()
    aged(house)
    house.checkpoint(30)
    house.reads(number)
    house.keeping.round()
    house.keeping.round()
    assert house.hub.bounds(0).first == first
    waits = "Retention waits for groups that read over HTTP: group alarms in partitions [0]."
    assert house.said() == ([waits] if first < 20 else [])
    house.reads(30)
    house.keeping.round()
    assert house.hub.bounds(0).first == 20


def test_control_without_the_groups_what_they_have_not_read_would_be_gone() -> None:
    house = House()
    aged(house)
    house.checkpoint(30)
    house.reads(10)
    reached = house.keeping._reached
    house.keeping._reached = lambda partition, end: {"$archive": reached(partition, end)["$archive"]}  # type: ignore[method-assign]
    house.keeping.round()
    assert house.hub.bounds(0).first == 20


def test_the_archives_leases_are_read_a_hundred_times_in_the_retention_and_not_each_second() -> None:
    house = House()
    asked: list[str] = []
    counting = FaultyBlobs(house.store, lambda operation, name: asked.append(name))  # type: ignore[arg-type, func-returns-value]
    keeping = Housekeeping(
        house.hub, counting, retention_s=RETENTION_S, archived=True, clock=house.clock, log=house.keeping._log
    )
    aged(house)
    house.checkpoint(10)
    for _ in range(10 * round(RETENTION_S)):
        house.clock.advance(0.1)
        keeping.round()
    assert 80 <= len(asked) <= 101
    assert house.hub.bounds(0).first == 10


@pytest.mark.parametrize("waits", [True, False], ids=["waits", "control: does not wait"])
def test_retention_of_the_embedded_hub_waits_for_a_group(tmp_path: Path, waits: bool) -> None:
    clock, store, line = FakeClock(jumps=True), MemoryBlobs(), b'{"deviceId":"a"}\n'
    create(tmp_path, partitions=1, period_s=3600, bytes_max=64 << 20, clock=clock)
    with EmbeddedHub(tmp_path, bytes_max=64 << 20, clock=clock) as hub:
        log = open_log("api-0", clock=clock, level="info", stream=Lines())  # type: ignore[arg-type]
        keeping = Housekeeping(hub, store, retention_s=RETENTION_S, archived=False, clock=clock, log=log)
        keeping._retain_s = 0.0
        for number in (1, 2):
            hub.append([Batch("p", 1, number, 10, (EventGroup(0, 10, line * 10),))])
        if waits:
            hub.groups.heard("alarms", 0, 1, 0)
            hub.groups.heard("alarms", 0, 1, 10)
        clock.advance(RETENTION_S + 1)
        keeping.round()
        assert hub.bounds(0).first == (10 if waits else 20)
        clock.advance(RETENTION_S + 1)
        if waits:
            assert hub.read(0, "10", bytes_max=1).next_offset == "20"
            keeping.round()
            keeping.round()
        assert (hub.groups.all(), hub.bounds(0).first) == ([], 20)


def test_a_group_that_was_not_heard_of_for_the_retention_is_forgotten() -> None:
    house = House()
    aged(house)
    house.checkpoint(30)
    silent_s = RETENTION_S + 2 * SEEN_MS / 1000
    house.reads(10, age_s=silent_s)
    house.reads(15, group="other", age_s=silent_s - 1)
    house.keeping.round()
    assert ([reader.group for reader in house.hub.groups.known], house.hub.bounds(0).first) == (["alarms", "other"], 10)
    house.reads(15, group="other")
    house.clock.advance(0.001)
    house.keeping.round()
    assert [reader.group for reader in house.hub.groups.known] == ["other"]
    forgotten = [line for line in house.lines.written if "forgotten" in str(line["event"])]
    assert [(line["group"], line["checkpoints"]) for line in forgotten] == [("alarms", {"0": 10})]
    assert house.hub.bounds(0).first == 10


@pytest.mark.parametrize("retention_s", [RETENTION_S, 7 * 24 * 3600.0])
def test_a_group_that_could_not_be_heard_is_not_forgotten_at_once(retention_s: float) -> None:
    """The API was away for longer than the retention, and its groups have had no time to come back."""
    house = House()
    house.keeping._retention_ms = round(retention_s * 1000)
    house.reads(10, age_s=2 * retention_s)
    house.clock.advance(min(retention_s, LISTENED_S) - 1)
    house.keeping.round()
    assert len(house.hub.groups.known) == 1
    house.clock.advance(1)
    house.keeping.round()
    assert house.hub.groups.known == []


def test_the_whole_group_is_heard_of_in_any_of_its_partitions() -> None:
    """A partition that is parked is not read, and its events are still to come."""
    house = House()
    aged(house)
    house.checkpoint(30)
    house.reads(10, age_s=10 * RETENTION_S)
    house.hub.groups.known.append(Reader("alarms", 1, Progress(1, 0, house.clock.now_ms())))
    house.keeping.round()
    assert (len(house.hub.groups.known), house.hub.bounds(0).first) == (2, 10)


def test_nothing_is_forgotten_while_the_clock_is_doubted() -> None:
    house = House()
    aged(house)
    house.checkpoint(30)
    house.reads(10)
    house.keeping.round()
    house.clock.step(30 * 24 * 3600.0)
    house.keeping.round()
    assert len(house.hub.groups.known) == 1


@pytest.mark.parametrize("age_s", [0.0, 100 * RETENTION_S])
def test_an_archiver_that_reads_over_http_is_the_archive(age_s: float) -> None:
    """With `--archive none` the log is the only copy of what it has not read, however long it is away."""
    house = House(archived=False)
    aged(house)
    house.reads(10, group="$archive", age_s=age_s)
    house.keeping.round()
    assert house.hub.bounds(0).first == 10
    assert house.said() == ["Retention waits for the archive in partitions [0]."]


def test_where_an_archiver_runs_its_lease_says_more_than_what_was_read_over_http() -> None:
    house = House()
    aged(house)
    house.checkpoint(30)
    house.reads(10, group="$archive", age_s=100 * RETENTION_S)
    house.keeping.round()
    assert house.hub.bounds(0).first == 20


def test_what_is_young_stays() -> None:
    house = House()
    house.hub.put(0, [b'{"deviceId":"a"}'] * 10)
    house.checkpoint(10)
    house.clock.advance(RETENTION_S - 1)
    house.keeping.round()
    assert house.hub.bounds(0).first == 0


def test_alarms_are_said_when_they_begin_and_when_they_end() -> None:
    house = House()
    house.hub.state = Usage(full=True, reader_lag=READER_LAG_MOST + 1)
    house.keeping.round()
    house.keeping.round()
    house.hub.state = Usage()
    house.keeping.round()
    assert [str(line)[:28] for line in house.said()] == [
        "The hub's storage is full: n",
        "A reader has been open for t",
        "Over.",
        "Over.",
    ]


def test_it_goes_on_after_a_failure_and_ends_when_the_hub_is_broken() -> None:
    house, rounds = House(), 0
    errors = [StorageFull("full"), StorageFull("full"), None, ZeroDivisionError("a bug"), HubBroken("gone")]

    def usage() -> Usage:
        nonlocal rounds
        rounds += 1
        return Usage()

    class Failing(Hub):
        def maintain(self, *, expire: bool = True) -> None:
            error = errors.pop(0)
            if error:
                raise error

    house.hub = Failing(house.clock)
    house.hub.usage = usage  # type: ignore[method-assign]
    house.keeping._hub = house.hub
    broken: list[HubBroken] = []
    house.keeping.run(threading.Event(), broken.append)
    assert [error.detail for error in broken] == ["gone"]
    assert (house.said(), rounds) == (["full", "Over.", "Housekeeping failed: ZeroDivisionError('a bug')."], 1)


def test_it_stops_when_it_is_asked_to() -> None:
    stop = threading.Event()
    stop.set()
    House().keeping.run(stop, lambda _error: None)
