"""Why an hour is as it is: each state and each reason, with the hub and from the store alone."""

from __future__ import annotations

from typing import Any

import pytest

from penstock.archive.begin import gap
from penstock.archive.ledger import Ledger, lost_name, owner
from penstock.archive.why import Explanation, Inquiry
from penstock.errors import ArchiveError, FrameDamaged, NotFound
from penstock.events import Slice
from penstock.processor.lease import Lease, encode_lease, lease_name
from tests.archive.conftest import START_MS

Rig = Any

FIRST, SECOND = START_MS, START_MS + 10_000


def explain(
    rig: Rig, at_ms: int = FIRST, *, partition: int = 0, hub: bool = True, now_ms: int | None = None, age_s: float = 0.0
) -> Explanation:
    known = owner(rig.store)
    assert known is not None
    inquiry = Inquiry(
        rig.store,
        known,
        rig.hub if hub else None,
        now_ms=rig.clock.now_ms() if now_ms is None else now_ms,
        lease_s=30.0,
        lease_age_s={0: age_s},
    )
    return inquiry.explain(partition, at_ms)


def give_lease(rig: Rig, host: str, done: int, *, partition: int = 0) -> None:
    rig.replace(lease_name("$archive", partition), encode_lease(Lease(partition, host, "h-1", 2, str(done), done)))


@pytest.mark.parametrize("hub", [True, False])
def test_a_closed_hour_says_for_each_file_why_it_ends(rig: Rig, hub: bool) -> None:
    rig.put(3)
    rig.hub.cut()
    rig.put(2, width=400)
    rig.put(2, width=400)
    rig.close_hour()
    rig.run(file_bytes_max=1000)
    found = explain(rig, FIRST + 9_999, hub=hub)
    assert (found.hour, found.begins, found.ends) == (
        *("2026-11-22T14-00-00", "2026-11-22T14:00:00.000Z", "2026-11-22T14:00:10.000Z"),
    )
    assert (found.state, found.why, found.due) == ("closed", (), None)
    assert found.lag_events == (0 if hub else None)
    assert [(f.part, f.first, f.next, f.events, f.closed_by, f.host, f.in_store) for f in found.files] == [
        (0, 0, 3, 3, "cut", "a", True),
        (1, 3, 5, 2, "size", "a", True),
        (2, 5, 7, 2, "time", "a", True),
    ]
    assert [f.why for f in found.files] == [
        "`penstock flush` put a cut marker behind event 2",
        "with the frame at 5 it would have been larger than --file-bytes-max",
        "a later hour began: before event 7 the log has a frame or time marker of it",
    ]
    assert not found.manifest.published
    assert found.manifest.why.startswith("Every partition has archived the hour: the next host that looks")


def test_the_manifest_names_the_partitions_that_are_missing(rig2: Rig) -> None:
    rig = rig2
    rig.put(3)
    rig.put(2, partition=1)
    assert [one.why for one in explain(rig).manifest.missing] == [
        "the hub's time has not passed the end of the hour"
    ] * 2
    rig.close_hour()
    rig.run(0)
    manifest = explain(rig).manifest
    assert (manifest.why, [(one.partition, one.why) for one in manifest.missing]) == (
        "1 of 2 partitions have not archived the hour yet.",
        [(1, "no host has ever had its lease")],
    )
    rig.write_lease(1)
    assert [one.why for one in explain(rig).manifest.missing] == ["its checkpoint is 0, and must be 2"]
    assert [one.partition for one in explain(rig, hub=False).manifest.missing] == [1]
    rig.replace(lease_name("$archive", 1), b"{")
    assert "lease unreadable" in explain(rig).manifest.missing[0].why
    rig.run(1)
    assert explain(rig).manifest.missing == explain(rig, hub=False).manifest.missing == ()
    rig.store.create("_hours/2026-11-22T14-00-00.json", b"{}", id="")
    assert (explain(rig).manifest.published, explain(rig, hub=False).manifest.published) == (True, True)


def test_an_hour_that_goes_on_says_until_when(rig: Rig) -> None:
    rig.put(3)
    rig.write_lease(0)
    found = explain(rig)
    assert (found.state, found.due, found.lag_events) == ("open", "2026-11-22T14:00:10.000Z", 3)
    assert found.why[0].startswith(
        "The hour goes on until 2026-11-22T14:00:10.000Z: its file closes with the first frame"
    )
    assert found.why[1] == "3 events of it wait in the log."
    rig.hub.cut()
    rig.run()
    found = explain(rig)
    assert (found.state, found.why[1], [f.closed_by for f in found.files]) == (
        *("open", "No event of it waits in the log.", ["cut"]),
    )
    alone = explain(rig, hub=False)
    assert (alone.state, alone.lag_events, len(alone.files)) == ("open", None, 1)
    assert alone.why[1].startswith("The ledger of this partition ends at event 3; whether the log has later")


@pytest.mark.parametrize("hub", [True, False])
def test_an_hour_that_has_not_begun(rig: Rig, hub: bool) -> None:
    found = explain(rig, SECOND, hub=hub)
    assert (found.state, found.files) == ("future", ())
    assert "begins at 2026-11-22T14:00:10.000Z" in found.why[0]


def test_an_hour_that_is_over_while_the_hub_writes_no_marker(rig: Rig) -> None:
    rig.put(3)
    found = explain(rig, now_ms=SECOND + 5_000)
    assert (found.state, found.lag_events) == ("waiting", 3)
    assert "the hub's time stands at 2026-11-22T14:00:00.000Z" in found.why[0]
    assert "does `penstock up` or `api` run?" in found.why[0]
    assert found.why[-1] == "No host has ever had its lease: does an archiver run?"


@pytest.mark.parametrize("hub", [True, False])
def test_an_hour_without_an_event(rig: Rig, hub: bool) -> None:
    rig.put(1)
    rig.next_period(2)
    rig.put(1)
    rig.close_hour()
    rig.run()
    found = explain(rig, SECOND, hub=hub)
    assert (found.state, found.why) == (
        "empty",
        ("No event was enqueued in it: the ledger goes from event 0 to 1, in hour 2026-11-22T14-00-20.",),
    )
    assert found.manifest.why == "No partition has an event of the hour: it gets none."
    found = explain(rig, FIRST - 10_000, hub=hub)
    assert (found.state, found.why) == (
        "empty",
        ("No event was enqueued in it: the first one of the partition is in hour 2026-11-22T14-00-00.",),
    )
    rig.next_period(3)
    rig.hub.maintain()
    found = explain(rig, rig.clock.now_ms() - 20_000, hub=hub)
    assert found.state == ("empty" if hub else "unknown")


def test_the_log_alone_proves_an_hour_empty(rig2: Rig) -> None:
    rig = rig2
    rig.write_lease(0)
    rig.next_period(3)
    rig.put(1, partition=1)
    assert (explain(rig).state, explain(rig).why) == ("empty", ("No event was enqueued in it.",))
    assert explain(rig, hub=False).state == "unknown"
    assert (
        explain(rig, hub=False)
        .why[0]
        .startswith("The ledger has no file; whether the log has later events cannot be told")
    )


def test_an_archiver_that_is_behind(rig: Rig) -> None:
    rig.put(3)
    rig.write_lease(0)
    rig.close_hour()
    rig.put(5)
    found = explain(rig)
    assert (found.state, found.lag_events, found.owner) == ("waiting", 3, "a")
    assert found.why[:3] == (
        "It is over, and 3 events of it are in no file yet.",
        "It ends before the time marker at 3, of 2026-11-22T14:00:10.000Z.",
        "The archiver's checkpoint is 0, 8 events behind the end of the log.",
    )
    assert found.why[3].startswith(
        "a holds its lease, in epoch 1. If the checkpoint does not move, the host has parked"
    )
    assert "a's, who has not renewed it for 31 s" in explain(rig, age_s=31.0).why[-1]
    give_lease(rig, "", 0)
    assert explain(rig).why[-1] == "No host holds its lease, it was given back: does an archiver run?"
    rig.store.delete(lease_name("$archive", 0))
    assert explain(rig).why[-1] == "No host has ever had its lease: does an archiver run?"
    rig.replace(lease_name("$archive", 0), b"{")
    assert "lease unreadable" in explain(rig).why[-1]


def test_a_partition_without_its_marker_waits_for_it(rig2: Rig) -> None:
    """The hub's time is one for all partitions: an event in another one has brought it past the end."""
    rig = rig2
    rig.put(3)
    rig.write_lease(0)
    rig.next_period()
    rig.put(1, partition=1)
    assert explain(rig).why[1].startswith("No later frame or marker is in this partition yet")
    rig.put(1)
    assert explain(rig).why[1] == "It ends before the frame at 3, of 2026-11-22T14:00:10.000Z."


def test_a_file_that_is_decided_and_not_written_yet(rig: Rig) -> None:
    rig.put(3)
    rig.close_hour()
    rig.run()
    file = explain(rig).files[0].file
    rig.store.delete(file)
    found = explain(rig)
    assert (found.state, found.files[0].in_store) == ("closed", False)
    assert found.why == (f"{file} was in the store, and is not there any more: see `penstock verify`.",)
    order = gap(rig.hub, 0, 0, 3, "skipped: gone", host="ann@ops", epoch=1, clock=rig.clock)
    Ledger(rig.store, rig.hub.id, 0).lose(order)
    assert explain(rig).why == (f"{file} is lost, and will never be there: skipped: gone (ann@ops, {order.at}).",)
    rig.store.delete(lost_name(0, 0))
    give_lease(rig, "b", 0)
    found = explain(rig)
    assert found.state == "waiting"
    assert found.why[0] == f"{file} is decided, but not in the store yet: whoever has the lease writes it from the log."


@pytest.mark.parametrize(
    ("done", "says"),
    [
        (9, "the checkpoint 9 lies beyond the end of the log, 8; the hub is older than its archive."),
        (1, "the log begins at 2, behind the checkpoint 1."),
        (4, "nothing in the ledger ends at the checkpoint 4."),
    ],
)
def test_what_parks_a_partition_is_found(rig: Rig, done: int, says: str) -> None:
    rig.put(2)
    rig.put(1)
    rig.put(1)
    rig.close_hour()
    rig.put(4)
    rig.next_period()
    rig.hub.maintain()
    rig.hub.trim(0, before="2")
    rig.write_lease(0)
    give_lease(rig, "b", done)
    found = explain(rig)
    assert found.state == "waiting"
    assert found.why[3] == (
        f"The partition is parked, or will be: {says} Nothing was skipped; `penstock audit` and `verify` say more."
    )


def test_a_damaged_frame_and_a_missing_file_park_a_partition(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    rig.put(2)
    rig.close_hour()
    rig.run()
    rig.put(1)
    rig.close_hour()
    assert "holds its lease" in explain(rig, SECOND).why[3], "nothing is wrong"
    whole = rig.hub.read

    def damaged(partition: int, offset: str, *, bytes_max: int) -> Slice:
        read: Slice = whole(partition, offset, bytes_max=bytes_max)
        if any(not frame.is_marker for frame in read.frames):
            raise FrameDamaged("the frame at 0/2 does not hold what its header says")
        return read

    with monkeypatch.context() as patched:
        patched.setattr(rig.hub, "read", damaged)
        assert "parked, or will be: the frame at 0/2" in " ".join(explain(rig, SECOND).why)
    rig.store.delete(rig.records()[0].file)
    assert "2026-11-22T14-00-00.json.gz is behind the checkpoint 2 and not in the store." in explain(rig, SECOND).why[3]


def test_events_that_were_deleted_without_an_archive(rig: Rig) -> None:
    rig.put(2)
    rig.next_period(2)
    rig.put(1)
    rig.hub.trim(0, before="2")
    found = explain(rig)
    assert (found.state, found.why) == (
        "unknown",
        (
            "The log begins at event 2 and the archive ends at 0: what was between was deleted without "
            "being archived (`--archive none`).",
        ),
    )
    rig.begin()
    gone = "Events 0 to 1 are in no file, and may have been of this hour: events before this were gone before the archive began."
    assert (explain(rig).state, explain(rig).why) == ("unknown", (gone,))
    rig.close_hour()
    rig.run()
    for hub in (True, False):
        assert (explain(rig, hub=hub).state, explain(rig, hub=hub).why) == ("unknown", (gone,))
        found = explain(rig, START_MS + 20_000, hub=hub)
        assert (found.state, found.why, len(found.files)) == ("closed", (gone,), 1)
    rig.put(1)
    rig.next_period()
    rig.put(1)
    rig.close_hour()
    rig.run()
    for hub in (True, False):
        assert explain(rig, START_MS + 30_000, hub=hub).why == (), "what comes later has nothing to do with it"


@pytest.mark.parametrize("shown", [0, 1, 2, 5])
def test_what_a_listing_hides_changes_no_answer(rig: Rig, shown: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for _ in range(5):
        rig.put(1)
        rig.close_hour()
    rig.run()
    hours = [START_MS + period * 10_000 for period in range(-1, 5)]
    before = [explain(rig, at_ms) for at_ms in hours]
    listed = list(rig.store.list("_ledger/0/"))
    with monkeypatch.context() as patched:
        patched.setattr(rig.store, "list", lambda prefix: iter(listed[1 : 1 + shown]))
        assert [explain(rig, at_ms) for at_ms in hours] == before
    assert [one.state for one in before] == ["empty", *["closed"] * 5]


def test_no_such_partition_and_a_damaged_record(rig: Rig) -> None:
    with pytest.raises(NotFound):
        explain(rig, partition=1)
    rig.put(1)
    rig.close_hour()
    rig.run()
    rig.rewrite(f"_ledger/0/{0:020}.json", next=0)
    with pytest.raises(ArchiveError, match="contradicts itself"):
        explain(rig)
