"""Where an archive begins whose log did not begin at 0, and that nothing which a listing hides makes it begin elsewhere."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from penstock.archive.archiver import Archiver
from penstock.archive.begin import BEGAN_LATE, OLDER, join
from penstock.archive.hours import HourKeeper
from penstock.archive.ledger import Gap, Ledger, Record, record_name
from penstock.blobs import Created, Exists, Listed
from penstock.errors import ArchiveError, StoreUnavailable
from penstock.processor import CloseReason
from penstock.processor.lease import lease_name
from penstock.testing import MemoryBlobs

Rig = Any
LEASE = lease_name("$archive", 0)


class Hiding(MemoryBlobs):
    """The same blobs; listings show of the ledger only what is `shown`, and nothing else if `files` are hidden too."""

    def __init__(self, store: MemoryBlobs, shown: tuple[int, ...] = (), *, files: bool = True) -> None:
        super().__init__()
        self._blobs = store._blobs
        self._shown = {record_name(0, first) for first in shown}
        self._files = files

    def list(self, prefix: str) -> Iterator[Listed]:
        for blob in super().list(prefix):
            if blob.name in self._shown if blob.name.startswith("_ledger/") else self._files:
                yield blob


def begun_late(rig: Rig) -> None:
    """Frames of two events each; 0 to 3 are gone when the archive begins, 4 to 11 are in two files of one hour and one of the next."""
    for _ in range(3):
        rig.put(2)
    rig.hub.trim(0, before="4")
    rig.begin()
    rig.hub.cut()
    rig.put(2)
    rig.put(2)
    rig.close_hour()
    rig.put(2)
    rig.close_hour()
    rig.run()


def gaps(rig: Rig) -> list[tuple[int, int, str]]:
    links = Ledger(rig.store, rig.hub.id, 0).chain(0)
    return [(link.first, link.next, link.reason) for link in links if isinstance(link, Gap)]


def test_an_archive_that_begins_late_says_so_in_its_first_record(rig: Rig) -> None:
    begun_late(rig)
    assert gaps(rig) == [(0, 4, BEGAN_LATE)]
    assert [(record.first, record.next, record.part) for record in rig.records()] == [
        (4, 6, 0),
        (6, 10, 1),
        (10, 12, 0),
    ]
    assert len(HourKeeper(rig.hub, rig.store).publish()) == 2
    for report in (rig.verified(), rig.audited()):
        assert report.problems == []
        assert [(gap.partition, gap.first, gap.next) for gap in report.gaps] == [(0, 0, 4)]
    assert (rig.audited().totals.archived, rig.audited().totals.accepted) == (8, 12)


def test_a_deleted_lease_and_a_listing_that_hides_all_archive_nothing_twice(rig: Rig) -> None:
    """Retention stands in the middle of a file: one that took the log's beginning for the ledger's would write its rest again,
    under the name of the whole."""
    begun_late(rig)
    rig.hub.trim(0, before="8")
    before = {blob.name: rig.store.get(blob.name).body for blob in rig.store.list("")}
    rig.store.delete(LEASE)
    rig.begin(store=Hiding(rig.store))
    assert rig.checkpoints[0] == "12"
    rig.run(store=Hiding(rig.store))
    assert {blob.name: rig.store.get(blob.name).body for blob in rig.store.list("")} == before
    rig.put(2)
    rig.close_hour()
    rig.run(store=Hiding(rig.store))
    assert [record.first for record in rig.records()] == [4, 6, 10, 12]
    assert rig.verified().problems == rig.audited().problems == []


@pytest.mark.parametrize("missing", [True, False])
def test_no_listing_changes_where_a_lease_begins(rig: Rig, missing: bool) -> None:
    begun_late(rig)
    if missing:
        rig.store.delete(rig.records()[-1].file)
    for count in range(5):
        for shown in itertools.combinations((0, 4, 6, 10), count):
            assert rig.start(store=Hiding(rig.store, shown)) == (("10", 10, 2) if missing else ("12", 12, 2))


def test_a_log_that_holds_nothing_any_more_is_all_gap(rig: Rig) -> None:
    rig.put(3)
    rig.hub.trim(0, before="3")
    rig.begin()
    assert (rig.checkpoints[0], gaps(rig)) == ("3", [(0, 3, BEGAN_LATE)])
    rig.put(1)
    rig.close_hour()
    rig.run()
    assert [record.first for record in rig.records()] == [3]
    assert rig.verified().problems == rig.audited().problems == []


class Slow(MemoryBlobs):
    """Before the first create of a record something else happens."""

    def __init__(self, store: MemoryBlobs, meanwhile: Callable[[], object]) -> None:
        super().__init__()
        self._blobs = store._blobs
        self._meanwhile: Callable[[], object] | None = meanwhile

    def create(self, name: str, body: bytes, *, id: str) -> Created | Exists:
        meanwhile, self._meanwhile = self._meanwhile, None
        if meanwhile is not None:
            meanwhile()
        return super().create(name, body, id=id)


def test_of_two_that_begin_the_first_decides(rig: Rig) -> None:
    """The slower one saw less trimmed, or more: it begins where the other's record says, and both are on one chain."""
    for _ in range(4):
        rig.put(2)
    rig.hub.trim(0, before="2")
    assert rig.start(store=Slow(rig.store, rig.start))[:2] == ("2", 2)
    assert gaps(rig) == [(0, 2, BEGAN_LATE)]

    rig.store.delete(record_name(0, 0))
    trimmed_since = Slow(rig.store, lambda: (rig.hub.trim(0, before="4"), rig.start()))
    assert rig.start(store=trimmed_since)[:2] == ("4", 4)
    assert gaps(rig) == [(0, 4, BEGAN_LATE)]


def test_of_two_that_begin_one_may_have_archived_meanwhile(rig: Rig) -> None:
    for _ in range(4):
        rig.put(2)
    rig.hub.trim(0, before="2")
    rig.close_hour()
    assert rig.start(store=Slow(rig.store, lambda: (rig.begin(), rig.run())))[:2] == ("8", 8)
    assert [record.first for record in rig.records()] == [2]


def test_retention_may_go_on_until_there_is_a_lease(rig: Rig) -> None:
    """Whoever made the gap died before its lease; without one retention waits for nobody (`--archive none`)."""
    for _ in range(4):
        rig.put(2)
    for before in ("2", "6"):
        rig.hub.trim(0, before=before)
        rig.begin()
    assert gaps(rig) == [(0, 2, BEGAN_LATE), (2, 6, BEGAN_LATE)]
    rig.close_hour()
    rig.run()
    assert [record.first for record in rig.records()] == [6]
    assert rig.verified().problems == rig.audited().problems == []


def test_what_is_lost_behind_a_file_is_never_passed_over(rig: Rig) -> None:
    """Only a person may decide that: the lease begins where the ledger ends, and there the partition stops."""
    begun_late(rig)
    rig.put(2)
    rig.put(2)
    rig.hub.trim(0, before="14")
    rig.store.delete(LEASE)
    assert rig.start()[:2] == ("12", 12)
    assert gaps(rig) == [(0, 4, BEGAN_LATE)]


def feed(rig: Rig, archiver: Archiver) -> str | None:
    return archiver.process(rig.hub.read(0, "0", bytes_max=1 << 20))


def test_an_archiver_that_read_what_was_gone_for_another_throws_it_away(rig: Rig) -> None:
    """A zombie: it holds a lease that was deleted, and the events that retention has deleted since."""
    rig.put(2)
    rig.put(2)
    early, late = rig.archiver(), rig.archiver()
    assert feed(rig, early) is None
    read = rig.hub.read(0, "0", bytes_max=1 << 20)
    rig.hub.trim(0, before="2")
    rig.begin()
    rig.close_hour()
    marker = rig.hub.read(0, "4", bytes_max=1 << 20)
    for archiver, act in ((early, lambda: early.process(marker)), (late, lambda: late.process(read))):
        with pytest.raises(StoreUnavailable, match=r"0 to 2 of partition 0 are in no file .*: begin again"):
            act()
        archiver.close(CloseReason.LEASE_LOST)
    rig.run()
    assert [record.first for record in rig.records()] == [2]
    assert rig.verified().problems == rig.audited().problems == []


@pytest.mark.parametrize("same_hour", [True, False])
def test_a_gap_in_the_middle_keeps_names_and_hours_apart(rig: Rig, same_hour: bool) -> None:
    """As it will be where a broker has deleted what was not archived."""
    rig.put(2)
    rig.hub.cut()
    rig.run()
    rig.put(2)
    rig.hub.trim(0, before="4")
    if not same_hour:
        rig.next_period()
    rig.put(2)
    rig.close_hour()
    gap = Gap(rig.hub.id, 0, 2, 4, "4", "the broker deleted them", "a", 1, "id", "2026-11-22T14:00:00.000Z")
    Ledger(rig.store, rig.hub.id, 0).create(gap)
    assert rig.start()[:2] == ("4", 4)
    rig.begin()
    rig.run()
    assert [(record.first, record.part) for record in rig.records()] == [(0, 0), (4, int(same_hour))]
    assert len({record.file for record in rig.records()}) == 2
    assert len(HourKeeper(rig.hub, rig.store).publish()) == (1 if same_hour else 2)
    assert rig.verified().problems == rig.audited().problems == []


# --- stores of an earlier version ---------------------------------------------------------------------------------------


def older(rig: Rig) -> None:
    """As it left them: the chain begins where the log did, and no record says so."""
    begun_late(rig)
    rig.store.delete(record_name(0, 0))


def join_all(rig: Rig, store: MemoryBlobs | None = None) -> None:
    join(store or rig.store, rig.hub, clock=rig.clock)


def test_a_store_of_an_earlier_version_is_joined_when_a_host_starts(rig: Rig) -> None:
    older(rig)
    assert rig.verified().problems == ["partition 0: no record for 0 to 4"]
    for _ in range(2):
        join_all(rig)
        assert gaps(rig) == [(0, 4, OLDER)]
    rig.put(2)
    rig.close_hour()
    rig.run()
    assert len(HourKeeper(rig.hub, rig.store).publish()) == 3
    assert rig.verified().problems == rig.audited().problems == []
    rig.store.delete(LEASE)
    rig.hub.trim(0, before="8")
    assert rig.start(store=Hiding(rig.store))[:2] == ("14", 14)


def test_a_lease_that_is_gone_joins_too(rig: Rig) -> None:
    older(rig)
    rig.store.delete(LEASE)
    join_all(rig)
    assert gaps(rig) == [(0, 4, OLDER)]
    assert rig.start() == ("12", 12, 2)
    assert rig.verified().problems == []


def test_a_ledger_that_began_and_has_no_file_yet_is_joined(rig: Rig) -> None:
    rig.put(2)
    rig.put(2)
    rig.hub.trim(0, before="2")
    rig.checkpoints[0] = "2"
    rig.write_lease(0)
    join_all(rig)
    assert gaps(rig) == [(0, 2, OLDER)]
    rig.close_hour()
    rig.run()
    assert rig.verified().problems == rig.audited().problems == []


@pytest.mark.parametrize("trimmed", ["4", "8", "12"])
@pytest.mark.parametrize("files", [True, False])
def test_whatever_is_hidden_while_joining_no_event_is_archived_again(rig: Rig, files: bool, trimmed: str) -> None:
    """A join that saw less than there is either waits for a better listing or is named; the chain goes on where it ended."""
    older(rig)
    rig.hub.trim(0, before=trimmed)
    before = dict(rig.store._blobs)
    for count in range(4):
        for shown in itertools.combinations((4, 6, 10), count):
            rig.store._blobs.clear()
            rig.store._blobs.update(before)
            join_all(rig, Hiding(rig.store, shown, files=files))
            found = gaps(rig)
            blind = trimmed == "12" and not files
            assert found == [(0, min(shown), OLDER)] if shown else found == ([(0, 12, OLDER)] if blind else [])
            assert (rig.verified().problems == []) == (found == [(0, 4, OLDER)])
            files_before = {name: blob for name, blob in before.items() if name.startswith("0/")}
            rig.store._blobs.pop(LEASE)
            if found:
                assert rig.start(store=Hiding(rig.store, shown))[:2] == ("12", 12)
            assert {name: blob for name, blob in rig.store._blobs.items() if name.startswith("0/")} == files_before


def test_an_unjoined_ledger_stops_its_partition(rig: Rig) -> None:
    older(rig)
    rig.store.delete(record_name(0, 10))
    rig.put(2)
    rig.close_hour()
    with pytest.raises(ArchiveError, match="nothing in the ledger ends there"):
        rig.run()


@pytest.mark.parametrize("damage", [b"{", b'{"reason":"x"}'])
def test_a_record_that_is_not_right_is_left_to_its_partition(rig2: Rig, damage: bytes) -> None:
    older(rig2)
    rig2.write_lease(0)
    rig2.store.create(record_name(0, 0), damage, id="")
    join_all(rig2)
    assert rig2.store.get(record_name(0, 0)).body == damage
    assert isinstance(Ledger(rig2.store, rig2.hub.id, 0).read(4), Record)
