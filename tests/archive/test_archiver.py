from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, BinaryIO, TypeVar

import pytest

from penstock.archive.ledger import claim
from penstock.blobs import Blob, BlobStore, Created, Exists, Listed
from penstock.errors import ArchiveError, FrameDamaged, StoreUnavailable
from penstock.events import Frame, Slice
from penstock.processor import CloseReason
from penstock.testing import Fault, FaultyBlobs

T = TypeVar("T")
Rig = Any  # the fixture's class lives in conftest.py


def three_hours(rig: Rig) -> None:
    """Small and large frames, an empty hour between, a cut, and an hour that only a marker closes."""
    for _ in range(6):
        rig.put(3)
    rig.put(60, width=100)
    rig.put(2)
    rig.next_period(2)
    rig.put(4)
    rig.hub.cut()
    rig.put(5)
    rig.next_period()
    rig.put(1)
    rig.close_hour()


def test_hours_become_files(rig: Rig) -> None:
    three_hours(rig)
    rig.run()
    assert [(record.file, record.closed_by) for record in rig.records()] == [
        ("0/2026-11-22T14-00-00.json.gz", "time"),
        ("0/2026-11-22T14-00-20.json.gz", "cut"),
        ("0/2026-11-22T14-00-20_001.json.gz", "time"),
        ("0/2026-11-22T14-00-30.json.gz", "time"),
    ]
    assert rig.checkpoints[0] == "90"
    rig.check()


def test_an_open_hour_stays_out_of_the_store(rig: Rig) -> None:
    rig.put(3)
    rig.run()
    assert rig.records() == []
    assert rig.checkpoints[0] == "0"
    assert [blob.name for blob in rig.store.list("0/")] == []
    assert rig.audited().problems == []
    assert rig.audited().totals.pending == 3


@pytest.mark.parametrize("bytes_max", [1, 100, 1 << 20])
def test_how_the_log_is_sliced_changes_nothing(rig: Rig, bytes_max: int) -> None:
    three_hours(rig)
    rig.run(bytes_max=bytes_max)
    assert [record.next for record in rig.records()] == [80, 84, 89, 90]
    crcs = [hash(rig.store.get(record.file).body) for record in rig.records()]
    for record in rig.records():
        rig.store.delete(record.file)
    rig.checkpoints[0] = "0"
    rig.run(bytes_max=777)
    assert [hash(rig.store.get(record.file).body) for record in rig.records()] == crcs


def test_a_file_is_split_by_size_and_no_frame_is(rig: Rig) -> None:
    for _ in range(10):
        rig.put(2, width=20)
    rig.put(50, width=20)
    rig.put(1)
    rig.close_hour()
    rig.run(file_bytes_max=400)
    assert [record.closed_by for record in rig.records()][:-1] == ["size"] * (len(rig.records()) - 1)
    assert [record.part for record in rig.records()] == list(range(len(rig.records())))
    assert max(record.raw_bytes for record in rig.records()) > 400  # the frame of 50 alone
    rig.check()


def test_markers_that_are_seen_twice_count_once(rig: Rig) -> None:
    rig.put(2)
    rig.hub.cut()
    archiver = rig.archiver()
    read = rig.hub.read(0, "0", bytes_max=1 << 20)
    assert archiver.process(read) == "2"
    again = rig.hub.read(0, "2", bytes_max=1 << 20)
    assert [frame.is_marker for frame in again.frames] == [True]
    assert archiver.process(again) is None
    archiver.close(CloseReason.SHUTDOWN)
    assert len(rig.records()) == 1


def test_three_empty_days(rig: Rig) -> None:
    rig.put(1)
    rig.next_period(3 * 8640)
    rig.put(1)
    rig.close_hour()
    rig.run()
    assert [record.hour for record in rig.records()] == ["2026-11-22T14-00-00", "2026-11-25T14-00-00"]
    rig.check()


def test_a_late_frame_goes_to_the_hour_that_is_open(rig: Rig) -> None:
    """The embedded hub never gives one; a log that did must not reopen a closed hour."""
    rig.next_period()
    rig.put(1)
    rig.hub.cut()
    rig.put(1)
    log = rig.hub._logs[0]
    late = {name: getattr(log[-1], name) for name in Frame.__struct_fields__}
    log[-1] = Frame(**late | {"enqueued_at_ms": late["enqueued_at_ms"] - 10_000})
    rig.close_hour()
    rig.run()
    assert [record.file for record in rig.records()] == [
        "0/2026-11-22T14-00-10.json.gz",
        "0/2026-11-22T14-00-10_001.json.gz",
    ]
    assert rig.archived() == rig.logged()


# --- crashes, at every step ---------------------------------------------------------------------------------------------


class Killed(BaseException):
    pass


class Mortal:
    """A store whose user is killed before or after its n-th operation."""

    def __init__(self, store: BlobStore, at: int, *, before: bool) -> None:
        self._store = store
        self._left = at
        self._before = before

    def _call(self, act: Callable[[], T]) -> T:
        self._left -= 1
        if self._left == 0 and self._before:
            raise Killed
        try:
            return act()
        finally:
            if self._left == 0:
                raise Killed

    def create(self, name: str, body: bytes, *, id: str) -> Created | Exists:
        return self._call(lambda: self._store.create(name, body, id=id))

    def put(self, name: str, body: BinaryIO) -> None:
        self._call(lambda: self._store.put(name, body))

    def get(self, name: str) -> Blob:
        return self._call(lambda: self._store.get(name))

    def size(self, name: str) -> int:
        return self._call(lambda: self._store.size(name))

    def list(self, prefix: str) -> Iterator[Listed]:
        return self._call(lambda: self._store.list(prefix))


@pytest.mark.parametrize("before", [True, False])
def test_killed_at_each_step_and_started_again(rig: Rig, before: bool) -> None:
    three_hours(rig)
    step, deaths = 0, 0
    alive = False
    while not alive:
        step += 1
        rig.store = type(rig.store)()
        rig.checkpoints[0] = "0"
        claim_again(rig)
        try:
            rig.run(store=Mortal(rig.store, step, before=before))
            alive = True
        except Killed:
            deaths += 1
        rig.run()
        assert [record.next for record in rig.records()] == [80, 84, 89, 90]
        rig.check()
    assert deaths > 12  # before, listing, get, create, put, size of each of the four files


@pytest.mark.parametrize("lost", [0, 80, 84])
def test_killed_before_the_checkpoint_was_written(rig: Rig, lost: int) -> None:
    """Case 37 too: a checkpoint that is older than the ledger walks forward and adopts."""
    three_hours(rig)
    rig.run()
    before = rig.records()
    rig.checkpoints[0] = str(lost)
    rig.run()
    assert rig.records() == before
    assert rig.checkpoints[0] == "90"
    rig.check()


def claim_again(rig: Rig) -> None:
    claim(rig.store, rig.hub, rig.clock)


# --- unknown outcomes, races --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", [Fault.NOTHING_DONE, Fault.DONE, Fault.LATE])
@pytest.mark.parametrize("operation", ["get", "list", "create", "put", "size"])
def test_an_unknown_outcome_at_each_operation(rig: Rig, operation: str, fault: Fault) -> None:
    three_hours(rig)
    for number in range(1, 6):
        rig.store = type(rig.store)()
        rig.checkpoints[0] = "0"
        claim_again(rig)
        seen = 0

        def plan(called: str, _name: str, number: int = number) -> Fault | None:
            nonlocal seen
            seen += called == operation
            return fault if called == operation and seen == number else None

        faulty = FaultyBlobs(rig.store, plan)
        rig.run(store=faulty, tries=3)
        faulty.land()
        rig.check()


@pytest.mark.parametrize("seed", range(20))
def test_a_store_that_fails_often(rig: Rig, seed: int) -> None:
    three_hours(rig)
    faulty = FaultyBlobs.random(rig.store, seed=seed, rate=0.15)
    rig.run(store=faulty, tries=60)
    faulty.land()
    rig.check()


def test_two_archivers_with_other_sizes_make_one_chain(rig: Rig) -> None:
    for _ in range(30):
        rig.put(2)
    rig.close_hour()
    ours, theirs = rig.archiver(file_bytes_max=300), rig.archiver(file_bytes_max=700, host="b")
    read = rig.hub.read(0, "0", bytes_max=1 << 20)
    half = Slice(0, "0", read.frames[:5], "10", read.end_offset)
    rest = Slice(0, "10", read.frames[5:], read.next_offset, read.end_offset)
    theirs.process(half)  # has looked for a record and found none
    ours.process(half)
    ours.process(rest)
    before = rig.records()
    with pytest.raises(StoreUnavailable, match="begin again"):
        theirs.process(rest)
    theirs.close(CloseReason.FAILED)
    ours.close(CloseReason.SHUTDOWN)
    rig.run(file_bytes_max=700)
    assert rig.records() == before
    rig.check()


def test_two_archivers_that_agree_make_one_chain(rig: Rig) -> None:
    rig.put(4)
    one, two = rig.archiver(), rig.archiver(host="b")
    read = rig.hub.read(0, "0", bytes_max=1 << 20)
    one.process(read)
    two.process(read)
    rig.close_hour()
    marker = rig.hub.read(0, "4", bytes_max=1 << 20)
    assert one.process(marker) == two.process(marker) == "4"
    one.close(CloseReason.SHUTDOWN)
    two.close(CloseReason.SHUTDOWN)
    assert [record.host for record in rig.records()] == ["a"]
    rig.check()


def test_a_put_that_lands_an_hour_later_does_no_harm(rig: Rig) -> None:
    three_hours(rig)
    faults = iter([Fault.LATE])
    faulty = FaultyBlobs(rig.store, lambda called, _: next(faults, None) if called == "put" else None, late_by=10_000)
    rig.run(store=faulty, tries=2)
    rig.check()
    faulty.land()
    rig.check()


# --- what must stop a partition -----------------------------------------------------------------------------------------


def test_a_checkpoint_newer_than_the_ledger_stops(rig: Rig) -> None:
    """Case 38."""
    three_hours(rig)
    rig.run()
    rig.put(1)
    rig.close_hour()
    rig.store.delete(f"_ledger/0/{89:020}.json")
    with pytest.raises(ArchiveError, match="nothing in the ledger ends there"):
        rig.run()


def test_a_last_file_that_was_deleted_stops(rig: Rig) -> None:
    """Case 36. Older files may go: that is somebody's right."""
    three_hours(rig)
    rig.run()
    rig.store.delete(rig.records()[0].file)
    rig.put(1)
    rig.close_hour()
    rig.run()
    rig.store.delete(rig.records()[-1].file)
    with pytest.raises(ArchiveError, match="not in the store"):
        rig.run()


def test_a_checkpoint_inside_of_a_file_stops(rig: Rig) -> None:
    three_hours(rig)
    rig.run()
    rig.checkpoints[0] = "3"
    with pytest.raises(ArchiveError):
        rig.run()


@pytest.mark.parametrize(
    "change",
    [
        {"next": 79},
        {"next": 81},
        {"next": 9000},
        {"crc32": 1},
        {"events": 79},
        {"hub": "1" * 32},
        {"partition": 1},
        {"file": "0/x.json.gz"},
        {"hour": "2026-11-22T14:00"},
        {"part": 1},
        {"first": "0"},
    ],
)
def test_a_record_that_is_not_right_stops(rig: Rig, change: dict[str, object]) -> None:
    three_hours(rig)
    rig.run()
    rig.rewrite(f"_ledger/0/{0:020}.json", **change)
    rig.checkpoints[0] = "0"
    with pytest.raises(ArchiveError):
        rig.run()


def test_a_gap_in_the_log_stops(rig: Rig) -> None:
    rig.put(2)
    rig.put(2)
    rig.put(2)
    del rig.hub._logs[0][1]
    with pytest.raises(ArchiveError, match="goes on at 4 instead of 2"):
        rig.run()


def test_a_damaged_frame_stops_and_nothing_behind_it_is_archived(rig: Rig) -> None:
    rig.put(2)
    rig.put(2)
    good = {name: getattr(rig.hub._logs[0][1], name) for name in Frame.__struct_fields__}
    rig.hub._logs[0][1] = Frame(**good | {"body": good["body"].replace(b"d-1", b"d-2")})
    rig.close_hour()
    with pytest.raises(FrameDamaged):
        rig.run()
    assert rig.records() == []


def test_a_full_disk_is_tried_again(rig: Rig) -> None:
    three_hours(rig)
    missing = rig.folder / "missing"
    rig.folder = missing
    with pytest.raises(StoreUnavailable, match="work file"):
        rig.run()
    missing.mkdir()
    rig.run()
    rig.check()


@pytest.mark.parametrize("width", [0, 9000])
def test_what_an_event_holds_is_never_looked_at(rig: Rig, width: int) -> None:
    """Case 52: it was judged when it was taken in, and nothing in it can stop an archiver."""
    poison = [
        b"",
        b"\x00",
        b"\xff\xfe",
        b'{"deviceId":',
        b"[" * 5000,
        b'{"receivedAt":1e999}',
        b"\x1f\x8b\x08" * 100,
        b"0" * 9999,
    ]
    rig.hub.put(0, [event + b"x" * width for event in poison])
    rig.close_hour()
    rig.run()
    assert rig.archived() == rig.logged() == [event + b"x" * width for event in poison]


def test_a_deleted_lease_begins_behind_the_epochs_that_were(rig: Rig) -> None:
    """Case 39: whoever claims it anew has no epoch that somebody had before."""
    assert rig.start().epoch == 1
    three_hours(rig)
    rig.run()
    assert rig.start().epoch == rig.records()[-1].epoch + 1


# --- where a lease begins -----------------------------------------------------------------------------------------------


def test_a_lease_begins_where_the_ledger_ends(rig: Rig) -> None:
    assert rig.start()[:2] == ("0", 0)
    three_hours(rig)
    rig.run()
    assert rig.start()[:2] == ("90", 90)
    rig.store.delete(rig.records()[-1].file)
    assert rig.start()[:2] == ("89", 89)
    rig.checkpoints[0] = "89"
    rig.run()
    rig.check()


@pytest.mark.parametrize("shown", [0, 1, 3])
def test_a_listing_that_hides_names_changes_nothing(rig: Rig, shown: int) -> None:
    three_hours(rig)
    rig.run()
    listed = [*rig.store.list("_ledger/0/")][:shown]
    rig.store.list = lambda prefix: iter(listed)
    assert rig.start()[:2] == ("90", 90)
    rig.put(1)
    rig.close_hour()
    rig.run()
    assert rig.records()[-1].first == 90
    assert rig.archived() == rig.logged()


def test_a_log_that_was_trimmed(rig: Rig) -> None:
    three_hours(rig)
    rig.run()
    rig.hub.trim(0, before="84")
    rig.put(1)
    rig.close_hour()
    rig.run()
    assert rig.verified().problems == []
    assert rig.audited().problems == []
    assert rig.audited().totals.archived == 91
