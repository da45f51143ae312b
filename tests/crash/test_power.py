"""Power cuts: everything that was answered is there after the journal's replay, whatever was in memory is not.

All processes are stopped before the cut, so that no answer leaves at the very moment: what was answered was answered before.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.crash.disk import PowerCutDisk
from tests.crash.load import Load
from tests.e2e.oracle import problems
from tests.e2e.system import ROUNDS, SEED, System, wait_for

Make = Callable[..., System]
PARTITIONS = 8
CARELESS = Path(__file__).with_name("careless_up.py")


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[PowerCutDisk]:
    made = PowerCutDisk(tmp_path / "disk")
    yield made
    made.close()


@pytest.fixture
def make(disk: PowerCutDisk, make_system: Make) -> Make:
    """Made after the disk, so ended before it is unmounted."""

    def on_disk(**options: object) -> System:
        limits = ("--hub-bytes-max", "96MiB")
        more = options.pop("options", ())
        assert isinstance(more, tuple)
        data = disk.folder / "data"
        return make_system(data=data, period="1s", partitions=PARTITIONS, options=(*limits, *more), **options)

    return on_disk


def _await_batches(load: Load, count: int) -> None:
    goal = load.confirmed + count
    wait_for(f"{count} more batches answered", lambda: load.confirmed >= goal)


def test_power_is_cut_at_any_moment(make: Make, disk: PowerCutDisk) -> None:
    rounds = ROUNDS or 8
    chosen = random.Random(SEED)
    print(f"PENSTOCK_SEED={SEED} PENSTOCK_ROUNDS={rounds}")
    system = make().start()
    load = Load(lambda: system.url, seed=SEED).start()
    for _ in range(rounds):
        _await_batches(load, chosen.randrange(1, 250))
        system.up.freeze_anywhere()
        disk.cut_power()
        system.kill()
        disk.restore_power()
        system.start()
    _await_batches(load, 50)
    load.stop()
    system.settle()
    assert problems(system.store, PARTITIONS, load.batches) == []
    assert load.repeated > 0, "no cut met a request: the test shows nothing"
    assert system.stop() == 0


def test_a_disk_that_fails_is_never_an_answer_of_200(make: Make, disk: PowerCutDisk) -> None:
    """The same, but the processes live on and see EIO: 503, until the disk is back and all is started again."""
    system = make().start()
    load = Load(lambda: system.url, seed=SEED).start()
    _await_batches(load, 100)
    system.up.freeze()
    wait_for("what was answered has been read", lambda: load.is_quiet(0.3))
    before = load.confirmed
    disk.cut_power()
    system.up.thaw()
    wait_for("503 hub_unavailable", lambda: "hub_unavailable" in load.codes)
    # What was synced before and only its answer was missing; the oracle says whether it is there.
    assert load.confirmed <= before + len(load.lanes)
    wait_for("all parts are started again", lambda: "all parts are started again" in system.up.text())
    system.kill()
    disk.restore_power()
    system.start()
    _await_batches(load, 50)
    load.stop()
    system.settle()
    assert problems(system.store, PARTITIONS, load.batches) == []


@pytest.mark.parametrize("without", ["hub", "files"])
def test_without_sync_a_power_cut_is_noticed(make: Make, disk: PowerCutDisk, without: str) -> None:
    """The negative control: the same cut, without the sync of the hub or that of the store's files."""
    chosen = random.Random(SEED)
    options = ("--archive", "none") if without == "hub" else ()
    system = make(program=(str(CARELESS), without), options=options).start()
    load = Load(lambda: system.url, seed=SEED).start()
    _await_batches(load, 300 + chosen.randrange(100))
    if without == "files":
        wait_for(
            "some files are in the store", lambda: len(list(system.store.glob("[0-9]*/*.json.gz"))) > 2 * PARTITIONS
        )
    system.up.freeze()
    disk.cut_power()
    system.kill()
    load.abandon()
    disk.restore_power()
    assert _noticed(make(), load)


def _noticed(system: System, load: Load) -> bool:
    """Whether any of what ends every test sees it: start, flush, audit, verify, the oracle."""
    try:
        system.start()
        system.settle()
    except AssertionError as failed:
        print(failed)
        return True
    found = problems(system.store, PARTITIONS, load.batches)
    print(found)
    return found != []
