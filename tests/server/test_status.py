"""The state of an installation, also when parts of it cannot be read."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec

from penstock.blobs import Blob
from penstock.errors import StoreUnavailable
from penstock.files import Files
from penstock.processor.lease import Lease, encode_lease, lease_name
from penstock.server.parts import PartState, Run, read_runs, remove_dead, remove_run, write_run
from penstock.server.status import build_status
from penstock.testing import FakeClock, MemoryBlobs, MemoryHub

DEAD_PID = 2**22 + 1


class Usage(msgspec.Struct):
    used: int
    limit: int
    full: bool


class Hub(MemoryHub):
    full = False

    def usage(self) -> Usage:
        return Usage(50, 100, self.full)

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
