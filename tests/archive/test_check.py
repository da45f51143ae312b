"""Every kind of damage is found and named; an undamaged archive is not accused, also while it grows."""

from __future__ import annotations

import gzip
import threading
from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from penstock.archive.check import audit, verify
from penstock.archive.hours import HourKeeper, Manifest
from penstock.archive.ledger import lost_name, record_name
from penstock.archive.skip import skip
from penstock.blobs import Blob
from penstock.errors import FrameDamaged
from penstock.events import Frame, Slice
from penstock.processor.skip import Order
from penstock.testing import FakeClock, FaultyBlobs
from penstock.wire.frame import member
from penstock.wire.members import measure

Rig = Any
FILE = "0/2026-11-22T14-00-10.json.gz"


def fill(rig: Rig) -> None:
    """Four hours: records at 0, 63, 66 and 69."""
    for _ in range(3):
        rig.put(3)
        if not rig.records():
            rig.put(60, width=100)
        rig.close_hour()
        rig.run()
    rig.put(2)
    rig.hub.cut()
    rig.put(2)
    rig.close_hour()
    rig.run()
    HourKeeper(rig.hub, rig.store).publish()


def test_a_good_archive(rig: Rig) -> None:
    fill(rig)
    report = rig.verified()
    assert (report.ok, report.problems) == (True, [])
    assert (report.totals.files, report.totals.archived, report.totals.pending) == (5, 73, 0)
    assert [(row.hour[-2:], row.archived, row.files) for row in report.rows] == [
        ("00", 63, 1),
        ("10", 3, 1),
        ("20", 3, 1),
        ("30", 4, 2),
    ]
    assert rig.audited().ok
    assert rig.audited().totals.accepted == rig.audited().totals.logged == rig.audited().totals.archived == 73
    assert msgspec.json.decode(msgspec.json.encode(report))["ok"] is True


def flip(rig: Rig, name: str, at: int) -> None:
    body = bytearray(rig.store.get(name).body)
    body[at] ^= 0x10
    rig.replace(name, bytes(body))


def other_content(rig: Rig) -> None:
    plain = gzip.decompress(rig.store.get(FILE).body)
    rig.replace(FILE, member(plain.replace(b"d-1", b"d-2", 1)))


def without_a_line(rig: Rig) -> None:
    plain = gzip.decompress(rig.store.get(FILE).body)
    rig.replace(FILE, member(plain[plain.index(b"\n") + 1 :]))


def without_last_line_feed(rig: Rig) -> None:
    plain = gzip.decompress(rig.store.get(FILE).body)
    rig.replace(FILE, member(plain[:-1]) + member(b"\n"))


DAMAGE: list[tuple[str, Callable[[Rig], object], str]] = [
    ("a file is missing", lambda rig: rig.store.delete(FILE), "missing"),
    ("the last file is missing", lambda rig: rig.store.delete("0/2026-11-22T14-00-30_001.json.gz"), "missing"),
    ("a file is empty", lambda rig: rig.replace(FILE, b""), "events 0, the ledger says 3"),
    ("a file is cut short", lambda rig: rig.replace(FILE, rig.store.get(FILE).body[:-3]), "cut short"),
    ("a file goes on", lambda rig: rig.replace(FILE, rig.store.get(FILE).body + b"\0"), "damaged"),
    ("a byte of a file is wrong", lambda rig: flip(rig, FILE, 30), FILE),
    ("the crc of a file is wrong", lambda rig: flip(rig, FILE, -6), FILE),
    ("a file has another content", other_content, "crc32"),
    ("a file lacks a line", without_a_line, "events 2, the ledger says 3"),
    ("a file has a line twice", lambda rig: rig.replace(FILE, rig.store.get(FILE).body * 2), "events 6"),
    ("a member lacks its line feed", without_last_line_feed, "line feed"),
    ("a file is too many", lambda rig: rig.replace("0/2026-11-22T13.json.gz", b"x"), "no record in the ledger"),
    ("a partition is too many", lambda rig: rig.replace("7/2026-11-22T14.json.gz", b"x"), "no record in the ledger"),
    ("a record is missing", lambda rig: rig.store.delete(record_name(0, 63)), "no record for 63 to 66"),
    ("the first record is missing", lambda rig: rig.store.delete(record_name(0, 0)), "no record for 0 to 63"),
    ("the first file has no record", lambda rig: rig.store.delete(record_name(0, 0)), "no record in the ledger"),
    ("the last record is missing", lambda rig: rig.store.delete(record_name(0, 71)), "beyond the ledger's end"),
    ("a record is unreadable", lambda rig: rig.replace(record_name(0, 63), b"{"), "cannot be read"),
    ("a record ends too early", lambda rig: rig.rewrite(record_name(0, 63), next=65), "no record for 65 to 66"),
    ("a record ends too late", lambda rig: rig.rewrite(record_name(0, 63), next=67), "lies inside"),
    ("a record's events are wrong", lambda rig: rig.rewrite(record_name(0, 63), events=4), "4 events from 63"),
    ("a record's crc is wrong", lambda rig: rig.rewrite(record_name(0, 63), crc32=4), "crc32"),
    ("a record's bytes are wrong", lambda rig: rig.rewrite(record_name(0, 63), raw_bytes=4), "raw bytes"),
    ("a record's part is wrong", lambda rig: rig.rewrite(record_name(0, 63), part=4), "contradicts itself"),
    (
        "a part does not follow",
        lambda rig: rig.rewrite(record_name(0, 63), part=1, file="0/2026-11-22T14-00-10_001.json.gz"),
        "part 1 does not follow",
    ),
    (
        "an hour goes back",
        lambda rig: rig.rewrite(record_name(0, 63), hour="2026-11-22T13-00-00", file="0/2026-11-22T13-00-00.json.gz"),
        "its hour is before",
    ),
    (
        "an hour is none",
        lambda rig: rig.rewrite(record_name(0, 63), hour="2026-11-22T14-00-11", file="0/2026-11-22T14-00-11.json.gz"),
        "not the start of a period",
    ),
    ("a record is another hub's", lambda rig: rig.rewrite(record_name(0, 63), hub="1" * 32), "is of hub"),
    ("a manifest is wrong", lambda rig: rig.rewrite("_hours/2026-11-22T14-00-10.json", events=4), "_hours/"),
    ("a manifest is too many", lambda rig: rig.replace("_hours/2026-11-22T13.json", b"{}"), "_hours/2026-11-22T13"),
    ("the owner is missing", lambda rig: rig.store.delete("_hub.json"), "_hub.json is missing"),
    ("the owner is unreadable", lambda rig: rig.replace("_hub.json", b"{"), "_hub.json"),
]


@pytest.mark.parametrize(("damage", "named"), [each[1:] for each in DAMAGE], ids=[each[0] for each in DAMAGE])
def test_verify_finds(rig: Rig, damage: Callable[[Rig], object], named: str) -> None:
    fill(rig)
    damage(rig)
    report = rig.verified()
    assert not report.ok
    assert any(named in problem for problem in report.problems), report.problems


def test_every_flipped_byte_of_a_file_is_found(rig: Rig) -> None:
    """All but the ten bytes of a gzip header that say nothing about the content: time, flags of the compressor, system."""
    fill(rig)
    body = rig.store.get(FILE).body
    silent = set(range(4, 10))
    for at in range(len(body)):
        rig.replace(FILE, body)
        flip(rig, FILE, at)
        assert at in silent or not rig.verified().ok, at


def test_a_file_that_is_decided_and_not_written_yet_is_pending(rig: Rig) -> None:
    fill(rig)
    rig.checkpoints[0] = "71"
    rig.write_lease(0)
    rig.store.delete("0/2026-11-22T14-00-30_001.json.gz")
    assert rig.verified().problems == []
    assert rig.verified().totals.pending == 2


def shorten_log(rig: Rig) -> None:
    del rig.hub._logs[0][3]


def damage_frame(rig: Rig) -> None:
    log = rig.hub._logs[0]
    fields = {name: getattr(log[0], name) for name in Frame.__struct_fields__}
    log[0] = Frame(**fields | {"body": log[0].body.replace(b"d-1", b"d-2")})


def miscount(rig: Rig) -> None:
    rig.hub.counts[min(rig.hub.counts)] += 1


def count_elsewhere(rig: Rig) -> None:
    rig.hub.counts[min(rig.hub.counts)] -= 1
    rig.hub.counts[max(rig.hub.counts)] += 1


def never_archived(rig: Rig) -> None:
    rig.put(3)
    rig.hub.trim(0, before="999")


AUDITED: list[tuple[str, Callable[[Rig], object], str]] = [
    ("the log lacks a frame", shorten_log, "accepted 3, in the log 0"),
    ("the log has an event that was not accepted", lambda rig: rig.hub.counts.popitem(), "accepted"),
    ("more was accepted than is in the log", miscount, "74 events are accepted"),
    ("an event was accepted in another hour", count_elsewhere, "accepted 62, in the log 63"),
    ("a record is missing", lambda rig: rig.store.delete(record_name(0, 63)), "in the log 3, archived 0"),
    ("the last record is wrong", lambda rig: rig.rewrite(record_name(0, 71), next=99, events=28), "beyond the end"),
    ("events were trimmed that nobody archived", never_archived, "events between are in neither"),
    ("the store is another hub's", lambda rig: rig.rewrite("_hub.json", hub="1" * 32), "belongs to hub"),
]
DEEP: list[tuple[str, Callable[[Rig], object], str]] = [
    ("a frame is damaged", damage_frame, "does not hold what its header says"),
    ("a file is damaged", lambda rig: flip(rig, FILE, -6), FILE),
    ("a record's crc is wrong", lambda rig: rig.rewrite(record_name(0, 63), crc32=4), "not what the log holds"),
]


@pytest.mark.parametrize(("damage", "named"), [each[1:] for each in AUDITED], ids=[each[0] for each in AUDITED])
def test_audit_finds(rig: Rig, damage: Callable[[Rig], object], named: str) -> None:
    fill(rig)
    damage(rig)
    report = rig.audited(deep=False)
    assert not report.ok
    assert any(named in problem for problem in report.problems), report.problems


@pytest.mark.parametrize(("damage", "named"), [each[1:] for each in DEEP], ids=[each[0] for each in DEEP])
def test_a_deep_audit_finds(rig: Rig, damage: Callable[[Rig], object], named: str) -> None:
    fill(rig)
    damage(rig)
    report = rig.audited(deep=True)
    assert any(named in problem for problem in report.problems), report.problems


def test_a_store_that_nobody_claimed_has_everything_pending(rig: Rig) -> None:
    rig.store = type(rig.store)()
    rig.put(3)
    report = rig.audited(deep=True)
    assert report.problems == []
    assert (report.totals.accepted, report.totals.pending, report.totals.archived) == (3, 3, 0)


def begin_late(rig: Rig) -> None:
    """Events were accepted and are gone, in one hour that is not archived at all and in the first that is."""
    rig.put(5)
    rig.close_hour()
    rig.put(2)
    rig.put(1)
    rig.hub.trim(0, before="7")
    rig.begin()


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("moment", range(1, 40))
def test_events_that_come_in_meanwhile_do_not_matter(rig: Rig, moment: int, late: bool) -> None:
    """At any of its steps, the audited system takes in events, closes hours, archives and trims."""
    if late:
        begin_late(rig)
    fill(rig)
    rig.put(4)
    steps = 0

    def live(target: Any, name: str) -> Callable[..., Any]:
        act = getattr(target, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal steps
            steps += 1
            if steps == moment:
                rig.put(2)
                rig.close_hour()
                rig.put(1)
                rig.run()
                rig.hub.trim(0, before="66")
            return act(*args, **kwargs)

        return call

    class Live:
        def __init__(self, target: Any) -> None:
            self._target = target

        def __getattr__(self, name: str) -> Any:
            found = getattr(self._target, name)
            return live(self._target, name) if callable(found) else found

    report = audit(Live(rig.hub), Live(rig.store), deep=True)
    assert report.problems == []
    assert steps > 30


@pytest.mark.parametrize("size", [1, 4096, 262_144, 262_145, 1 << 20, (5 << 20) + 3])
@pytest.mark.parametrize("at_once", [7919, 65_536, 1 << 20])
def test_files_are_measured_in_parts(size: int, at_once: int) -> None:
    plain = b"x" * (size - 1) + b"\n"
    file = member(plain) + member(b"{}\n") + member(plain)
    found = measure(file[at : at + at_once] for at in range(0, len(file), at_once))
    assert (found.lines, found.raw_bytes) == (3, 2 * size + 3)


def test_the_hour_in_which_an_archive_began_is_not_compared_and_the_others_are(rig: Rig) -> None:
    begin_late(rig)
    rig.put(1)
    rig.close_hour()
    rig.put(3)
    rig.close_hour()
    rig.put(2)
    assert rig.audited().problems == [], "no file yet"
    rig.run()
    assert rig.audited().problems == []
    assert [(row.hour[-2:], row.accepted, row.logged) for row in rig.audited().rows] == [
        *(("10", 4, 2), ("20", 3, 3), ("30", 2, 2)),
    ]
    hours = sorted(rig.hub.counts)
    rig.hub.counts[hours[2]] -= 1
    assert "accepted 2, in the log 3" in " ".join(rig.audited().problems)
    rig.hub.counts[hours[3]] += 1
    assert len(rig.audited().problems) == 2, "two that make up for each other"
    rig.hub.counts[hours[3]] += 1
    assert "15 events are accepted, but the log ends at 14" in " ".join(rig.audited().problems)


def test_a_hub_without_an_archiver_misses_no_ledger_behind_its_retention(rig: Rig) -> None:
    rig.put(2)
    rig.put(2)
    rig.hub.trim(0, before="2")
    assert audit(rig.hub, rig.store, archived=False).ok
    assert audit(rig.hub, rig.store).ok, "nothing was ever archived, so retention had not to wait"
    rig.write_lease(0)
    assert audit(rig.hub, rig.store, archived=False).ok
    assert not audit(rig.hub, rig.store).ok, "somebody has begun to, and what he had not read is gone"


def test_the_records_of_a_ledger_are_asked_for_several_at_once(rig: Rig) -> None:
    """A cloud answers after some 20 ms, and a partition has thousands of files in a year."""
    for _ in range(8):
        rig.put(1)
        rig.close_hour()
    rig.run()
    names = {record_name(0, record.first) for record in rig.records()}
    together = threading.Barrier(len(names), timeout=20)

    class Far(FaultyBlobs):
        def get(self, name: str) -> Blob:
            if name in names:
                together.wait()
            return super().get(name)

    assert len(names) == 8
    report = verify(Far(rig.store, lambda _operation, _name: None))
    assert (report.problems, report.totals.files) == ([], 8)


class Dies(Exception):
    """An archiver behind a record."""


def dies(operation: str, name: str) -> None:
    if operation == "put" and name.endswith(".gz"):
        raise Dies


@pytest.fixture
def passed_over(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> Rig:
    """A file of 3 events, one of 6 that was decided and never written, since the frame at 5 is damaged, and a gap of 2. Then 5 events."""
    rig.put(3)
    rig.close_hour()
    rig.run()
    rig.put(2)
    rig.put(4)
    rig.close_hour()
    with pytest.raises(Dies):
        rig.run(store=FaultyBlobs(rig.store, dies))
    rig.put(2)
    rig.put(5)
    whole = rig.hub.read

    def read(partition: int, offset: str, *, bytes_max: int) -> Slice:
        if 5 <= int(offset) < 9:
            raise FrameDamaged("damaged", where="0/5")
        found = whole(partition, offset, bytes_max=bytes_max)
        before = [frame for frame in found.frames if frame.next <= 5]
        return msgspec.structs.replace(found, frames=before, next_offset="5") if int(offset) < 5 else found

    monkeypatch.setattr(rig.hub, "read", read)
    order = Order(0, "11", "a bad disk", "ann@ops", True)
    skip(rig.store, rig.hub, order, clock=FakeClock(jumps=True), watch_s=0.1)
    rig.checkpoints[0] = "11"
    rig.close_hour()
    rig.run()
    HourKeeper(rig.hub, rig.store).publish()
    return rig


@pytest.mark.parametrize("deep", [False, True])
def test_what_somebody_passed_over_is_lost_and_named(passed_over: Rig, deep: bool) -> None:
    rig = passed_over
    report = rig.audited(deep=deep)
    assert report.problems == []
    totals = report.totals
    assert (totals.accepted, totals.logged, totals.archived, totals.lost, totals.pending) == (16, 16, 8, 8, 0)
    assert [(row.archived, row.lost) for row in report.rows] == [(3, 0), (0, 6), (5, 2)]
    [(file, gap)] = report.lost.items()
    assert (file, gap.first, gap.next, gap.reason) == ("0/2026-11-22T14-00-10.json.gz", 3, 9, "skipped: a bad disk")
    assert [(gap.first, gap.next, gap.host) for gap in report.gaps] == [(9, 11, "ann@ops")]
    listed = msgspec.json.decode(rig.store.get("_hours/2026-11-22T14-00-10.json").body, type=Manifest)
    assert ([one.file for one in listed.lost], listed.files, listed.events) == ([file], (), 0)
    assert b"lost" not in rig.store.get("_hours/2026-11-22T14-00-20.json").body


def test_damage_is_a_problem_where_nobody_passed_over_it(passed_over: Rig) -> None:
    """The negative control: without the order beside the record."""
    passed_over.store.delete(lost_name(0, 3))
    report = passed_over.audited()
    assert "partition 0: damaged" in report.problems
    assert f"{FILE}: missing" in report.problems
    assert "_hours/2026-11-22T14-00-10.json: not what the ledger says" in report.problems
