"""The way on behind events that are gone: one record of it, whatever happens meanwhile, and the archive goes on."""

from __future__ import annotations

import contextlib
import gzip
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from penstock.archive import skip as skip_module
from penstock.archive.archiver import Archiver
from penstock.archive.begin import start
from penstock.archive.check import verify
from penstock.archive.hours import HourKeeper, Manifest, manifest_name
from penstock.archive.judged import audit
from penstock.archive.ledger import Gap, Ledger, lost_name, record_name
from penstock.archive.skip import skip
from penstock.blobs import BlobStore
from penstock.errors import (
    ArchiveError,
    BlobNotFound,
    FrameDamaged,
    LostRace,
    OffsetTrimmed,
    PenstockError,
    SettingsError,
)
from penstock.events import Slice
from penstock.files import Files
from penstock.processor import Checkpoint, CloseReason
from penstock.processor.lease import Holding, Lease, Writer, claim, decode_lease, encode_lease, lease_name, take_over
from penstock.processor.skip import EARLIEST, Order, Skipped, skip_name
from penstock.processor.skip import skip as skip_group
from penstock.testing import FakeClock, Fault, FaultyBlobs, MemoryBlobs
from penstock.wire.frame import member
from tests.archive import test_filter
from tests.archive.test_filter import BITS, Topic

LEASE = lease_name("$archive", 0)
REASON = "the host's disk was broken for two weeks"
FORWARD = Order(0, EARLIEST, REASON, "ann@ops")


class Stopped(Exception):
    """An archiver dies here."""


class Rig(test_filter.Rig):
    """One partition of a topic, with a lease in the store and a host that takes it."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.clock = FakeClock(test_filter.START_MS, jumps=True)
        self.hosts = itertools.count(1)
        self.sent = itertools.count(1)
        self.made: list[Archiver] = []

    def put(self, count: int = 3) -> None:
        self.topic.put(("p", 1, next(self.sent), range(count), count))

    def take(self) -> Holding:
        name = f"host-{next(self.hosts)}"
        writer = Writer(name, f"i-{name}")
        try:
            blob = self.store.get(LEASE)
        except BlobNotFound:
            begin = start(self.store, self.topic, 0, host=name, clock=self.clock)
            return claim(self.store, self.clock, "$archive", 0, writer, start=begin)
        return take_over(self.store, self.clock, "$archive", decode_lease(blob.body, 0), blob.etag, writer)

    def archiver(self, holding: Holding, store: BlobStore | None = None) -> Archiver:
        made = Archiver(
            self.topic, store or self.store, 0, host=holding.lease.owner, epoch=lambda: 1, clock=self.clock, files=Files(),
            folder=self.folder, file_bytes_max=1 << 20, log=self.log, checkpoint=lambda: holding.lease.sequence_number,
        )  # fmt: skip
        self.made.append(made)
        return made

    def close(self) -> None:
        for archiver in self.made:
            archiver.close(CloseReason.SHUTDOWN)

    def feed(self, archiver: Archiver, holding: Holding, *, until: int | None = None) -> None:
        """From the checkpoint to the end of the log, or to an offset."""
        offset = holding.lease.offset
        while until is None or int(offset) < until:
            read = self.topic.read(0, offset, bytes_max=1)
            given = archiver.process(read)
            if given is not None:
                holding.checkpoint(*(Checkpoint(given, int(given) << BITS) if isinstance(given, str) else given))
            if read.next_offset == read.end_offset:
                return
            offset = read.next_offset

    def host(self, store: BlobStore | None = None) -> None:
        """Takes the lease, archives to the end, gives it back. Raises what stops it."""
        holding = self.take()
        archiver = self.archiver(holding, store)
        try:
            self.feed(archiver, holding)
        finally:
            archiver.close(CloseReason.SHUTDOWN)
        holding.release()

    def dies_before_its_file(self) -> None:
        """Behind the record; nobody is left."""

        def plan(operation: str, name: str) -> Fault | None:
            if operation == "put" and name.endswith(".gz"):
                raise Stopped
            return None

        with pytest.raises(Stopped):
            self.host(FaultyBlobs(self.store, plan))

    @property
    def lease(self) -> Lease:
        return decode_lease(self.store.get(LEASE).body, 0)

    def skip(self, order: Order = FORWARD, store: BlobStore | None = None, watch_s: float = 1.0) -> Skipped:
        return skip(store or self.store, self.topic, order, clock=self.clock, watch_s=watch_s)

    def gaps(self) -> list[tuple[int, int]]:
        """As offsets."""
        links = Ledger(self.store, self.topic.id, 0).chain(0)
        return [(link.first >> BITS, link.next >> BITS) for link in links if isinstance(link, Gap)]

    def everything(self) -> dict[str, bytes]:
        return {blob.name: self.store.get(blob.name).body for blob in self.store.list("")}

    def archived(self) -> list[bytes]:
        """Of the files that are there: `verify` says what is missing that should be."""
        there = {blob.name for blob in self.store.list("")}
        files = [gzip.decompress(self.store.get(one.file).body) for one in self.records() if one.file in there]
        return [line for file in files for line in file.splitlines()]

    def left_out(self) -> int:
        """Events of the log that are in no file; each other one is there once, in order."""
        archived = self.archived()
        assert sorted(set(archived), key=self.logged().index) == archived
        return len(self.logged()) - len(archived)


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    """One hour archived (offset 0, its marker 1), two not: events at 2, 4 and 5, markers at 3 and 6. The log begins at 4."""
    rig = Rig(tmp_path)
    rig.put()
    rig.close_period()
    rig.host()
    rig.put()
    rig.close_period()
    rig.put()
    rig.put()
    rig.close_period()
    rig.topic.first = 4
    yield rig
    rig.close()


def test_a_checkpoint_below_the_log_stops_the_archive_until_somebody_says_why(rig: Rig) -> None:
    before = rig.everything()
    with pytest.raises(OffsetTrimmed):
        rig.host()
    done = rig.skip()
    assert (done.offset, done.offset_next, done.records) == ("2", "4", [record_name(0, 1 << BITS)])
    assert (rig.lease.owner, rig.lease.offset, rig.lease.sequence_number) == ("", "4", 4 << BITS)
    gap = Ledger(rig.store, rig.topic.id, 0).read(1 << BITS)
    assert isinstance(gap, Gap)
    assert (gap.first, gap.next, gap.reason, gap.host, gap.epoch) == (
        1 << BITS, 4 << BITS, f"skipped: {REASON}", "ann@ops", 2,
    )  # fmt: skip
    rig.host()
    assert rig.left_out() == 3
    assert [record.events for record in rig.records()] == [3, 6]
    report = verify(rig.store)
    assert report.problems == []
    assert [(one.first, one.next, one.reason) for one in report.gaps] == [(gap.first, gap.next, gap.reason)]
    files = {name: body for name, body in before.items() if name.startswith(("0/", "_ledger/"))}
    assert files.items() <= rig.everything().items()


def test_without_the_record_the_archive_does_not_go_on(rig: Rig) -> None:
    """The negative control: a lease that is merely moved."""
    skip_module.move(rig.store, "$archive", 0, offset="4", sequence_number=4 << BITS)
    with pytest.raises(ArchiveError, match="nothing in the ledger ends there"):
        rig.host()


@pytest.mark.parametrize(
    ("to", "first", "says"),
    [
        ("5", 4, "events between are in the log"),
        ("3", 4, "what lies between is gone"),
        (EARLIEST, 2, "Nothing of partition 0 is gone"),
        ("4", 0, "Nothing of partition 0 is gone"),
    ],
)
def test_what_is_there_is_not_passed_over(rig: Rig, to: str, first: int, says: str) -> None:
    rig.topic.first = first
    before = rig.everything()
    with pytest.raises(SettingsError, match=says):
        rig.skip(FORWARD._replace(to=to))
    assert rig.everything() == before


@pytest.mark.parametrize("to", ["2", "1", "8"])
def test_not_even_by_force_does_it_go_back_or_beyond_the_end(rig: Rig, to: str) -> None:
    with pytest.raises(SettingsError, match="is no place ahead of it"):
        rig.skip(FORWARD._replace(to=to, forced=True))


def test_by_force_it_passes_over_what_cannot_be_read(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    rig.topic.first = 0
    whole = rig.topic.read

    def read(partition: int, offset: str, *, bytes_max: int) -> Slice:
        if int(offset) in (4, 5):
            raise FrameDamaged("damaged", where="0/4")
        return whole(partition, offset, bytes_max=bytes_max)

    monkeypatch.setattr(rig.topic, "read", read)
    with pytest.raises(FrameDamaged):
        rig.host()
    with pytest.raises(FrameDamaged):  # it is no place to go on from
        rig.skip(FORWARD._replace(to="5", forced=True))
    rig.skip(FORWARD._replace(to="6", forced=True))
    rig.put()
    rig.close_period()
    rig.host()
    assert (rig.left_out(), rig.gaps(), verify(rig.store).problems) == (6, [(3, 6)], [])
    assert (audit(rig.topic, rig.store).totals.lost, audit(rig.topic, rig.store, deep=True).problems) == (6, [])


def test_a_file_that_was_decided_behind_where_it_leads_is_not_left_out(rig: Rig) -> None:
    """Its host died between record and file, and the file before it is there: that is what the order passes over."""
    rig.topic.first = 0
    holding = rig.take()
    rig.feed(rig.archiver(holding), holding)
    first, last = rig.records()[-2:]
    rig.store.delete(last.file)
    behind = msgspec.structs.replace(rig.lease, offset="2", sequence_number=first.first, owner="", token="x-1")
    rig.store.delete(LEASE)
    rig.store.create(LEASE, encode_lease(behind), id="x-1")
    done = rig.skip(FORWARD._replace(to="3", forced=True))
    assert (done.records, rig.lease.sequence_number) == ([], first.next)
    rig.host()
    assert (rig.left_out(), rig.gaps(), verify(rig.store).problems) == (0, [], [])


def test_one_that_reads_on_by_itself_is_left_alone(rig: Rig) -> None:
    rig.topic.first = 2
    holding = rig.take()

    class Waiting(FakeClock):
        def wait(self, event: Any, timeout_s: float) -> bool:
            rig.feed(rig.archiver(holding), holding)
            rig.topic.first = 7
            return False

    with pytest.raises(SettingsError, match="moves, from 2 to 7"):
        skip(rig.store, rig.topic, FORWARD, clock=Waiting(), watch_s=1.0)
    assert rig.gaps() == []


def test_an_archiver_that_still_has_the_events_and_is_slower_throws_them_away(rig: Rig) -> None:
    rig.topic.first = 2
    holding = rig.take()
    archiver = rig.archiver(holding)
    rig.feed(archiver, holding, until=3)
    rig.topic.first = 4
    rig.skip()
    with pytest.raises(PenstockError, match=r"are in no file \(skipped: "):
        archiver.process(rig.topic.read(0, "4", bytes_max=1))
    with pytest.raises(LostRace):
        holding.renew()
    rig.host()
    assert (rig.left_out(), verify(rig.store).problems) == (3, [])


def test_an_archiver_that_still_has_the_events_and_is_faster_has_its_file(rig: Rig) -> None:
    rig.topic.first = 2
    holding = rig.take()
    archiver = rig.archiver(holding)
    rig.feed(archiver, holding, until=3)
    rig.topic.first = 4

    def meanwhile() -> None:
        archiver.process(rig.topic.read(0, "4", bytes_max=1))

    with pytest.raises(ArchiveError, match="was decided by host-2 meanwhile"):
        rig.skip(store=Between(rig.store, meanwhile, when=lambda operation, name: operation == "create"))
    assert (rig.lease.owner, rig.lease.offset, rig.gaps()) == ("host-2", "2", [])
    rig.skip()  # behind its file
    rig.host()
    assert (rig.left_out(), rig.gaps(), verify(rig.store).problems) == (0, [(3, 4)], [])


@pytest.mark.parametrize("first", [3, 4, 6])
def test_a_file_that_was_decided_and_will_never_be_there(rig: Rig, first: int) -> None:
    """Its events were gone before its host came back: all, or the first of them, or more."""
    rig.topic.first = 0
    rig.dies_before_its_file()
    decided = rig.records()[-1]
    rig.topic.first = first
    with pytest.raises(OffsetTrimmed):
        rig.host()
    done = rig.skip()
    assert rig.gaps() == ([(3, first)] if first > 3 else [])
    assert done.records == [lost_name(0, decided.first), *([record_name(0, decided.next)] if first > 3 else [])]
    rig.host()
    for report in (verify(rig.store), audit(rig.topic, rig.store), audit(rig.topic, rig.store, deep=True)):
        assert report.problems == []
        assert [(file, gap.reason, gap.host) for file, gap in report.lost.items()] == [
            (decided.file, f"skipped: {REASON}", "ann@ops")
        ]
        [row] = [row for row in report.rows if row.hour == decided.hour]
        assert (row.lost, row.archived, row.files, report.totals.lost) == (3, 0, 0, 3)
        assert report.totals.archived == len(rig.archived())
    assert (row.logged, report.totals.logged) == (3, 3 + report.totals.archived)
    HourKeeper(rig.topic, rig.store).publish()
    listed = msgspec.json.decode(rig.store.get(manifest_name(decided.hour)).body, type=Manifest)
    assert ([file.file for file in listed.lost], listed.files, listed.events) == ([decided.file], (), 0)
    assert verify(rig.store).problems == []
    rig.store.delete(LEASE)
    rig.host()
    assert verify(rig.store).problems == []


def test_a_lost_file_that_is_there_after_all_is_archived(rig: Rig) -> None:
    """Its archiver was alive, and later than the order."""
    rig.topic.first = 0
    rig.dies_before_its_file()
    decided = rig.records()[-1]
    rig.topic.first = 4
    rig.skip()
    late = b"".join(line + b"\n" for line in rig.logged()[3:6])
    rig.store.create(decided.file, member(late), id="late")
    rig.host()
    for report in (verify(rig.store), audit(rig.topic, rig.store, deep=True)):
        assert (report.problems, report.lost, report.totals.lost) == ([], {}, 0)
        assert report.totals.archived == len(rig.archived()) == 12
    assert rig.store.get(lost_name(0, decided.first))


def test_a_lost_file_is_missing_where_nobody_said_so(rig: Rig) -> None:
    rig.topic.first = 0
    rig.dies_before_its_file()
    rig.topic.first = 4
    rig.skip()
    rig.store.delete(lost_name(0, rig.records()[-1].first))
    assert [problem for problem in verify(rig.store).problems if "missing" in problem] != []
    with pytest.raises(ArchiveError, match="not in the store"):
        rig.host()


def test_what_somebody_has_removed_is_no_lost_file(rig: Rig) -> None:
    rig.store.delete(rig.records()[-1].file)
    rig.skip()
    with pytest.raises(ArchiveError, match="not in the store"):
        rig.host()


def test_a_lease_that_is_deleted(rig: Rig) -> None:
    rig.store.delete(LEASE)
    with pytest.raises(OffsetTrimmed):
        rig.host()
    rig.store.delete(LEASE)
    rig.skip()
    rig.host()
    assert (rig.left_out(), rig.gaps(), verify(rig.store).problems) == (3, [(1, 4)], [])


def test_a_checkpoint_that_nothing_ends_at_is_not_made_to_be_one(rig: Rig) -> None:
    rig.store.delete(LEASE)
    wrong = Lease(0, "", "x-1", 3, "2", 2 << BITS)
    rig.store.create(LEASE, encode_lease(wrong), id="x")
    before = rig.everything()
    with pytest.raises(ArchiveError, match="nothing in the ledger ends there"):
        rig.skip()
    assert rig.everything() == before


class Between:
    """A store with something that happens before one of the requests, or an end: `when` says before which."""

    def __init__(self, store: BlobStore, act: Callable[[], object], *, when: Callable[[str, str], bool]) -> None:
        self._store = store
        self._act: Callable[[], object] | None = act
        self._when = when

    def __getattr__(self, operation: str) -> Any:
        done = getattr(self._store, operation)

        def request(name: str, *more: Any, **named: Any) -> Any:
            if self._act is not None and self._when(operation, name):
                act, self._act = self._act, None
                act()
            return done(name, *more, **named)

        return request


class Nth:
    """True at the n-th request."""

    def __init__(self, number: int) -> None:
        self.left = number

    def __call__(self, _operation: str, _name: str) -> bool:
        self.left -= 1
        return self.left == -1


def _dies() -> None:
    raise Stopped


def _renews(rig: Rig, holding: Holding) -> None:
    try:
        holding.renew()
    except LostRace:
        return


def _more_is_deleted(rig: Rig, _holding: Holding) -> None:
    rig.topic.first = 5


def _another_orders_the_same(rig: Rig, _holding: Holding) -> None:
    rig.skip(watch_s=0)


def _another_passes_over_more(rig: Rig, _holding: Holding) -> None:
    rig.skip(FORWARD._replace(to="5", forced=True), watch_s=0)


def _a_host_takes_the_lease(rig: Rig, _holding: Holding) -> None:
    rig.take()


def _the_lease_is_deleted(rig: Rig, _holding: Holding) -> None:
    rig.store.delete(LEASE)


def _an_archiver_that_has_them_writes_its_file(rig: Rig, holding: Holding) -> None:
    rig.late.process(rig.marker)  # type: ignore[attr-defined]


def _an_archiver_that_has_them_dies_before_its_file(rig: Rig, holding: Holding) -> None:
    rig.late._put = lambda record, work: _dies()  # type: ignore[attr-defined]
    with contextlib.suppress(Stopped):
        rig.late.process(rig.marker)  # type: ignore[attr-defined]


MEANWHILE = [
    _renews, _more_is_deleted, _another_orders_the_same, _another_passes_over_more, _a_host_takes_the_lease, _the_lease_is_deleted,
    _an_archiver_that_has_them_writes_its_file, _an_archiver_that_has_them_dies_before_its_file,
]  # fmt: skip


@pytest.mark.parametrize("meanwhile", MEANWHILE)
@pytest.mark.parametrize("decided", [False, True])
@pytest.mark.parametrize("dies", [False, True])
def test_whatever_happens_between_two_requests(tmp_path: Path, meanwhile: Any, decided: bool, dies: bool) -> None:
    """Before each request of an order in turn; that goes on or dies there. Given again until it is done, it leaves one chain."""
    for number in itertools.count():
        rig = _with_an_archiver_that_has_what_is_gone(tmp_path, decided)
        holding = rig.holding  # type: ignore[attr-defined]

        def act(rig: Rig = rig, holding: Holding = holding) -> None:
            with contextlib.suppress(PenstockError):  # its own affair
                meanwhile(rig, holding)
            if dies:
                _dies()

        when = Nth(number)
        with contextlib.suppress(Stopped, PenstockError):
            rig.skip(store=Between(rig.store, act, when=when))
        if when.left >= 0:
            rig.close()
            assert number > 5
            return
        for _ in range(4):
            try:
                rig.host()
                break
            except OffsetTrimmed:
                try:
                    rig.skip()
                except SettingsError:
                    continue
        rig.close()
        report = verify(rig.store)
        assert report.problems == [], (number, report)
        assert rig.lease.sequence_number == rig.records()[-1].next
        assert rig.left_out() in (0, 3, 6)


def _with_an_archiver_that_has_what_is_gone(folder: Path, decided: bool) -> Any:
    rig: Any = Rig(folder)
    rig.put()
    rig.close_period()
    rig.host()
    rig.put()
    rig.close_period()
    rig.put()
    rig.put()
    rig.close_period()
    if decided:
        rig.dies_before_its_file()
    rig.holding = rig.take()
    rig.late = rig.archiver(rig.holding)
    rig.feed(rig.late, rig.holding, until=3)
    rig.marker = rig.topic.read(0, "3", bytes_max=1)
    if decided:  # it has adopted the record, and its file is there
        rig.store.delete(rig.records()[-1].file)
        back = msgspec.structs.replace(rig.lease, token="i-back", offset="2", sequence_number=1 << BITS)
        rig.store.delete(LEASE)
        rig.store.create(LEASE, encode_lease(back), id="back")
    rig.topic.first = 4
    return rig


class TestOtherGroups:
    GROUP = "alarms"

    @pytest.fixture
    def store(self) -> MemoryBlobs:
        store = MemoryBlobs()
        held = Lease(0, "host", "i-1", 3, "1", 1 << BITS)
        store.create(lease_name(self.GROUP, 0), encode_lease(held), id="i-1")
        return store

    def order(self, store: BlobStore, topic: Topic, to: str = EARLIEST) -> Skipped:
        order = Order(0, to, REASON, "ann@ops")
        return skip_group(store, topic, self.GROUP, order, clock=FakeClock(jumps=True), watch_s=0.0)

    def topic(self, first: int) -> Topic:
        topic = Topic()
        for number in range(6):
            topic.put(("p", 1, number + 1, range(2), 2))
        topic.first = first
        return topic

    def test_goes_on_behind_what_is_gone_and_leaves_a_record(self, store: MemoryBlobs) -> None:
        done = self.order(store, self.topic(3))
        [name] = done.records
        assert name == skip_name(self.GROUP, 0, 1)
        said = msgspec.json.decode(store.get(name).body)
        assert (said["offset"], said["offset_next"], said["reason"], said["by"]) == ("1", "3", REASON, "ann@ops")
        lease = decode_lease(store.get(lease_name(self.GROUP, 0)).body, 0)
        assert (lease.owner, lease.epoch, lease.offset, lease.sequence_number) == ("", 3, "3", 3 << BITS)

    def test_a_crash_before_the_lease(self, store: MemoryBlobs) -> None:
        def plan(operation: str, _name: str) -> Fault | None:
            if operation == "replace":
                _dies()
            return None

        with pytest.raises(Stopped):
            self.order(FaultyBlobs(store, plan), self.topic(3))
        done = self.order(store, self.topic(5))  # by then more is gone
        assert done.records == [skip_name(self.GROUP, 0, 1), skip_name(self.GROUP, 0, 3)]
        assert decode_lease(store.get(lease_name(self.GROUP, 0)).body, 0).offset == "5"

    def test_what_is_there_is_not_passed_over(self, store: MemoryBlobs) -> None:
        for first, to in ((0, EARLIEST), (1, EARLIEST), (3, "4"), (3, "2")):
            with pytest.raises(SettingsError, match="Nothing was skipped"):
                self.order(store, self.topic(first), to)
        assert [blob.name for blob in store.list("")] == [lease_name(self.GROUP, 0)]

    def test_without_a_lease_there_is_nothing_to_skip(self) -> None:
        with pytest.raises(SettingsError, match="has no lease of partition 0"):
            self.order(MemoryBlobs(), self.topic(3))
