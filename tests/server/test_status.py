"""The state of an installation, also when parts of it cannot be read."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec
import pytest

from penstock.blobs import Blob
from penstock.errors import StoreUnavailable
from penstock.files import Files
from penstock.hub.groups import Progress, Reader
from penstock.processor.lease import Lease, encode_lease, lease_name
from penstock.server.parts import PartState, Retention, Run, read_runs, remove_dead, remove_run, write_run
from penstock.server.status import RetentionStatus, build_status
from penstock.server.units import Throughput
from penstock.testing import FakeClock, MemoryBlobs, MemoryHub

DEAD_PID = 2**22 + 1


class Usage(msgspec.Struct):
    used: int
    limit: int
    full: bool


class Groups:
    def __init__(self) -> None:
        self.known: list[Reader] = []

    def all(self) -> list[Reader]:
        return self.known


class Hub(MemoryHub):
    used, limit, full = 50, 100, False

    def __init__(self, partitions: int, *, clock: FakeClock) -> None:
        super().__init__(partitions, clock=clock)
        self.groups = Groups()

    def usage(self) -> Usage:
        return Usage(self.used, self.limit, self.full)

    def counters(self) -> dict[str, int]:
        return {"duplicates": 3}


def test_positions_leases_and_lags(tmp_path: Path) -> None:
    clock, store = FakeClock(), MemoryBlobs()
    hub = Hub(2, clock=clock)
    hub.put(0, [b'{"deviceId":"a"}'] * 10)
    clock.advance(5)
    hub.put(0, [b'{"deviceId":"a"}'] * 30)
    clock.advance(7)
    store.create(lease_name("$archive", 0), encode_lease(Lease(0, "up", "x-1", 4, "10", 10)), id="x-1")
    report = build_status(hub, store, run_folder=tmp_path, clock=clock)
    assert report.ok
    assert (report.totals.accepted, report.totals.archived, report.totals.lag_events) == (40, 10, 30)
    first, second = report.partitions
    assert (first.owner, first.epoch, first.offset, first.checkpoint) == ("up", 4, "10", 10)
    assert (first.lag_events, first.lag_s) == (30, 7.0)
    assert (second.owner, second.checkpoint, second.lag_events, second.lag_s) == (None, None, 0, 0.0)
    assert (report.storage.state, report.counters) == ("ok", {"duplicates": 3})


def runs(folder: Path, *retention: Retention | None) -> None:
    for number, one in enumerate(retention):
        (folder / f"parts-{os.getpid()}{'0' * number}.json").write_bytes(
            msgspec.json.encode(Run(os.getpid(), "", "", [], one))
        )


@pytest.mark.parametrize(
    ("running", "owner", "left", "whole"),
    [
        ((), "up", None, RetentionStatus(None, "kept", None, None)),
        ((None,), "up", None, RetentionStatus(None, "kept", None, None)),
        ((Retention(100, True),), "up", 93.0, RetentionStatus(100, "kept", 93.0, None)),
        ((Retention(5, True),), "up", 0.0, RetentionStatus(5, "kept", 0.0, None)),
        ((Retention(100, False),), "", 93.0, RetentionStatus(100, "deleted", 93.0, None)),
        ((Retention(100, False),), "up", 93.0, RetentionStatus(100, "kept", 93.0, None)),
        ((None, Retention(100, True), Retention(50, False)), "", 43.0, RetentionStatus(50, "deleted", 43.0, None)),
    ],
)
def test_time_until_retention_reaches_what_is_not_archived(
    tmp_path: Path, running: list[Retention], owner: str, left: float | None, whole: RetentionStatus
) -> None:
    clock, store = FakeClock(), MemoryBlobs()
    hub = Hub(1, clock=clock)
    hub.put(0, [b'{"deviceId":"a"}'] * 10)
    clock.advance(100)
    hub.cut()  # a marker from before the event must not make that older
    clock.advance(100)
    hub.put(0, [b'{"deviceId":"a"}'])
    clock.advance(7)
    hub.used = 0
    store.create(lease_name("$archive", 0), encode_lease(Lease(0, owner, "x-1", 4, "10", 10)), id="x-1")
    runs(tmp_path, *running)
    report = build_status(hub, store, run_folder=tmp_path, clock=clock)
    assert report.retention is not None
    assert (report.partitions[0].lag_s, report.partitions[0].retention_left_s) == (7.0, left)
    assert msgspec.structs.replace(report.retention, full_in_s=None) == whole


@pytest.mark.parametrize(
    ("retention", "owner", "done", "full_in_s"),
    [
        (None, "up", 0, None),  # nothing comes in
        (Retention(130, True), "up", 60, 119),  # full before what there is gets old enough
        (Retention(118, True), "up", 60, None),  # what there is makes room
        (Retention(118, True), "up", 120, None),
        (Retention(118, True), "up", 0, 119),  # old enough already, but not archived
        (Retention(30, True), "up", 60, 119),
        (Retention(30, False), "up", 0, 119),
        (Retention(30, False), "", 0, None),
    ],
)
def test_when_the_hub_is_full_at_the_rate_of_the_last_minute(
    tmp_path: Path, retention: Retention | None, owner: str, done: int, full_in_s: int | None
) -> None:
    clock, store = FakeClock(), MemoryBlobs()
    hub = Hub(1, clock=clock)
    event = b'{"deviceId":"a","n":%08d}'
    for second in range(120):
        hub.put(0, [event % second])
        clock.advance(1)
    size = hub.bounds(0).bytes / 120
    hub.limit, hub.used = round(1000 * size / 0.9), round(881 * size)
    store.create(lease_name("$archive", 0), encode_lease(Lease(0, owner, "x-1", 4, str(done), done)), id="x-1")
    runs(tmp_path, retention)
    report = build_status(hub, store, run_folder=tmp_path, clock=clock)
    assert report.retention is not None
    found = report.retention.full_in_s
    assert (None if found is None else round(found)) == full_in_s


def test_a_hub_that_gets_nothing_does_not_get_full(tmp_path: Path) -> None:
    clock = FakeClock()
    hub = Hub(1, clock=clock)
    assert build_status(hub, MemoryBlobs(), run_folder=tmp_path, clock=clock).retention == RetentionStatus(
        None, "kept", None, None
    )
    hub.put(0, [b'{"deviceId":"a"}'])
    runs(tmp_path, Retention(100, True))
    clock.advance(61)
    report = build_status(hub, MemoryBlobs(), run_folder=tmp_path, clock=clock)
    assert report.retention and report.retention.full_in_s is None


def test_an_archiver_that_reads_over_http_archives_too(tmp_path: Path) -> None:
    """Its leases may be in a store of which this installation knows nothing."""
    clock = FakeClock()
    hub = Hub(1, clock=clock)
    hub.put(0, [b'{"deviceId":"a"}'] * 10)
    hub.groups.known = [Reader("$archive", 0, Progress(2, 7, clock.now_ms()))]
    runs(tmp_path, Retention(100, False))
    report = build_status(hub, MemoryBlobs(), run_folder=tmp_path, clock=clock)
    assert (report.totals.archived, report.partitions[0].lag_events, report.partitions[0].epoch) == (7, 3, 2)
    assert report.retention is not None and report.retention.unread == "kept"


def test_groups_that_read_over_http_are_shown(tmp_path: Path) -> None:
    clock = FakeClock()
    hub = Hub(2, clock=clock)
    hub.put(1, [b'{"deviceId":"a"}'] * 10)
    hub.put(1, [b'{"deviceId":"a"}'] * 10)
    hub.trim(1, before="10")
    at_ms = clock.now_ms()
    hub.groups.known = [Reader("alarms", 0, Progress(2, 0, at_ms)), Reader("alarms", 1, Progress(3, 4, at_ms - 500))]
    clock.advance(2)
    report = build_status(hub, MemoryBlobs(), run_folder=tmp_path, clock=clock)
    assert [msgspec.to_builtins(one) for one in report.groups] == [
        {"group": "alarms", "partition": 0, "epoch": 2, "checkpoint": 0, "lag_events": 0, "age_s": 2.0},
        {"group": "alarms", "partition": 1, "epoch": 3, "checkpoint": 4, "lag_events": 10, "age_s": 2.5},
    ]


def test_problems_are_named() -> None:
    clock, store = FakeClock(), MemoryBlobs()
    hub = Hub(2, clock=clock)
    hub.full = True
    store.create(lease_name("$archive", 0), b"{", id="{")
    store.create(lease_name("$archive", 1), encode_lease(Lease(1, "up", "x-1", 4, "9", 9)), id="x-1")
    report = build_status(hub, store, run_folder=Path("/nowhere"), clock=clock)
    assert not report.ok
    assert [problem.split(":")[0] for problem in report.problems] == [
        "lease unreadable",
        "The checkpoint of partition 1 lies beyond the end of the log.",
        "The hub's storage is full",
    ]


@pytest.mark.parametrize(
    ("units", "used", "warned"), [(None, 10**13, False), (2, 168 * 10**9, False), (2, 168 * 10**9 + 1, True)]
)
def test_more_stored_than_the_units_are_for_is_a_warning_and_no_problem(
    tmp_path: Path, units: int | None, used: int, warned: bool
) -> None:
    hub = Hub(1, clock=FakeClock())
    hub.used, hub.limit = used, 10**14
    throughput = Throughput(units, None, None, 0.0, 0.0, {}, 0)
    report = build_status(hub, MemoryBlobs(), run_folder=tmp_path, clock=FakeClock(), throughput=throughput)
    assert (report.ok, report.throughput) == (True, throughput)
    assert [one.code for one in report.warnings] == ["storage_full"] * warned


def test_a_store_that_does_not_answer_is_a_problem_and_no_error(tmp_path: Path) -> None:
    class Gone(MemoryBlobs):
        def get(self, name: str) -> Blob:
            raise StoreUnavailable("the store is away")

    report = build_status(Hub(1, clock=FakeClock()), Gone(), run_folder=tmp_path, clock=FakeClock())
    assert (report.ok, report.problems) == (False, ["the store is away"])


def test_runs_of_processes_that_are_gone_are_none(tmp_path: Path) -> None:
    files, me = Files(), os.getpid()
    alive = Run(me, "127.0.0.1:1", "127.0.0.1:2", [PartState("api-0", me, "…"), PartState("api-1", DEAD_PID, "…", 2)])
    write_run(tmp_path, files, alive)
    write_run(tmp_path, files, Run(DEAD_PID, "", "", [PartState("api-0", me, "…")]))
    (tmp_path / "parts-7x.json").write_bytes(b"{")
    (run,) = read_runs(tmp_path)
    assert (run.pid, [part.name for part in run.parts]) == (me, ["api-0"])
    remove_dead(tmp_path, files)
    assert not (tmp_path / f"parts-{DEAD_PID}.json").exists()
    remove_run(tmp_path, files, me)
    assert read_runs(tmp_path) == []
