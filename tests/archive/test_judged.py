"""The audit of a log that has batches twice, on a real broker: what is right is not accused, and all damage is named."""

from __future__ import annotations

import gzip
import hashlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest
from confluent_kafka import TopicPartition

from penstock.archive.archiver import Archiver
from penstock.archive.filter import STATES_KEPT, Dead, Filter, dead_name, state_name, surplus
from penstock.archive.judged import audit
from penstock.archive.ledger import Ledger, Record, claim
from penstock.archive.report import Report
from penstock.events import Batch, Group
from penstock.files import Files
from penstock.hub.duplicates import Share, pack_shares
from penstock.hub.kafka import PLACE_BITS, KafkaHub
from penstock.hub.kafka_writing import Outgoing, Writer
from penstock.processor import Checkpoint, CloseReason
from penstock.processor.lease import Lease, encode_lease, lease_name
from penstock.testing import FakeClock, MemoryBlobs, MemoryLog
from penstock.wire.draft import drafts
from penstock.wire.frame import member
from tests.archive import test_filter
from tests.kafka_broker import Brokers, made_topic

Source = tuple[str, int, Sequence[int], int]
"""A producer, a sequence, the places of its events in their batch, and how many that has."""


class Rig:
    """A topic with one partition, and an archiver that is run by hand."""

    def __init__(self, kafka: Brokers, hub: KafkaHub, folder: Path) -> None:
        self.hub = hub
        self.store = MemoryBlobs()
        self.log = MemoryLog()
        self.checkpoint = Checkpoint("0", 0)
        self._folder = folder
        self._kafka = kafka
        self._writer = Writer(kafka.client, hub._topic)
        self._sent = 0
        claim(self.store, hub, FakeClock())

    def put(self, *sources: Source, other: bytes = b"") -> None:
        """One frame, as it may come from an API: each time with another stamp. `other` bytes under the same number."""
        self._sent += 1
        batches = []
        for producer, sequence, places, _ in sources:
            lines = b"".join(
                b'{"deviceId":"d-1","p":"%s","s":%d,"i":%d,"receivedAt":"%03d"}\n'
                % (producer.encode(), sequence, i, self._sent)
                for i in places
            )
            sha256 = hashlib.sha256(b"%d" % sequence + other).digest()
            batches.append(Batch(producer, 1, sequence, 0, (Group(0, len(places), lines),), True, sha256))
        [draft] = drafts(batches, frame_bytes_max=1 << 20)
        shares = pack_shares(Share(places[0], whole) for _, _, places, whole in sources)
        self._writer.write({0: [Outgoing(draft.placed(0, 0), shares)]})

    def archive(self) -> None:
        """Close the open file, and archive up to the end of the log."""
        self.hub.cut()
        archiver = Archiver(
            self.hub, self.store, 0, host="a", epoch=lambda: 1, clock=FakeClock(), files=Files(), folder=self._folder,
            file_bytes_max=1 << 20, log=self.log, checkpoint=lambda: self.checkpoint.sequence_number,
        )  # fmt: skip
        offset = self.checkpoint.offset
        while True:
            read = self.hub.read(0, offset, bytes_max=200)
            given = archiver.process(read) or self.checkpoint
            self.checkpoint = (
                Checkpoint(given, int(given) << PLACE_BITS) if isinstance(given, str) else Checkpoint(*given)
            )
            offset = read.next_offset
            if offset == read.end_offset:
                break
        archiver.close(CloseReason.SHUTDOWN)
        write_lease(self.store, self.checkpoint)

    def trim(self, offset: int) -> None:
        """As the brokers' retention does."""
        place = TopicPartition(self.hub._topic, 0, offset)
        self._kafka.client.answers(lambda: self._kafka.client.admin.delete_records([place]))

    def records(self) -> list[Record]:
        return [link for link in Ledger(self.store, self.hub.id, 0).chain(0) if isinstance(link, Record)]

    def rewrite(self, name: str, **changes: object) -> None:
        self.replace(name, msgspec.json.encode(msgspec.json.decode(self.store.get(name).body) | changes))

    def replace(self, name: str, body: bytes) -> None:
        self.store.delete(name)
        self.store.create(name, body, id="damaged")

    def change(self, change: Callable[[list[bytes]], list[bytes]]) -> str:
        """Other lines in the first file; its name."""
        name = self.records()[0].file
        lines = gzip.decompress(self.store.get(name).body).splitlines(keepends=True)
        self.replace(name, member(b"".join(change(lines))))
        return name

    def audited(self, *, deep: bool = True) -> Report:
        return audit(self.hub, self.store, deep=deep)

    def totals(self) -> dict[str, int]:
        names = ("logged", "archived", "copies", "dead", "pending")
        return {name: getattr(self.audited().totals, name) for name in names}


def write_lease(store: MemoryBlobs, checkpoint: Checkpoint) -> None:
    store.delete(lease_name("$archive", 0))
    lease = Lease(0, "a", "a-1", 1, checkpoint.offset, checkpoint.sequence_number)
    store.create(lease_name("$archive", 0), encode_lease(lease), id="a")


@pytest.fixture
def rig(kafka: Brokers, tmp_path: Path) -> Iterator[Rig]:
    with KafkaHub(kafka.client, made_topic(kafka, 1)[1], period_s=3600, clock=FakeClock()) as hub:
        yield Rig(kafka, hub, tmp_path)


def fill(rig: Rig) -> None:
    """Three files: 5, 3 and 1 events. A copy, the rest of a batch, and a dead letter of 2 events at offset 3, from place 1 on."""
    rig.put(("p", 1, range(3), 3))
    rig.put(("p", 2, range(2), 5))
    rig.archive()
    rig.put(("p", 1, range(3), 3))
    rig.put(("q", 1, range(1), 1), ("p", 1, range(2), 2), other=b"x")
    rig.put(("p", 2, range(5), 5))
    rig.archive()
    rig.put(("p", 3, range(1), 1))
    rig.archive()


DEAD = dead_name(0, (4 << PLACE_BITS) + 1)


def test_everything_right(rig: Rig) -> None:
    assert rig.audited().problems == [], "an empty log"
    fill(rig)
    report = rig.audited()
    assert (report.ok, report.problems, report.notes) == (True, [], [])
    assert rig.totals() == {"logged": 17, "archived": 10, "copies": 5, "dead": 2, "pending": 0}
    assert report.totals.accepted == 0 and report.rows[0].accepted is None
    assert [record.events for record in rig.records()] == [5, 4, 1]
    rig.put(("p", 3, range(1), 1))
    rig.put(("p", 4, range(2), 2))
    rig.put(("p", 4, range(2), 2), other=b"x")
    assert rig.audited().ok
    assert rig.totals() == {"logged": 22, "archived": 10, "copies": 6, "dead": 2, "pending": 4}


def test_a_store_that_nobody_archives_to(rig: Rig) -> None:
    rig.put(("p", 1, range(3), 3))
    rig.put(("p", 1, range(3), 3))
    assert rig.audited().ok
    assert rig.totals() == {"logged": 6, "archived": 0, "copies": 3, "dead": 0, "pending": 3}
    rig.trim(1)
    assert (rig.audited().ok, rig.audited().totals.logged) == (True, 3)


CHANGES: list[tuple[str, Callable[[Rig], object], str]] = [
    ("an event was removed", lambda rig: rig.change(lambda lines: lines[:1] + lines[2:]), "events that are missing: 1"),
    ("an event was doubled", lambda rig: rig.change(lambda lines: [*lines, lines[1]]), "lines that are there twice: 6"),
    ("one was changed", lambda rig: rig.change(lambda lines: [lines[0].replace(b"d-1", b"d-2"), *lines[1:]]), "events that are missing: 0"),
    ("the changed one", lambda rig: rig.change(lambda lines: [lines[0].replace(b"d-1", b"d-2"), *lines[1:]]), "not in the log: 1"),
    ("two were exchanged", lambda rig: rig.change(lambda lines: [lines[1], lines[0], *lines[2:]]), "crc32"),
    ("many were removed", lambda rig: rig.change(lambda lines: [b"{}\n" for _ in lines[:1]]), "missing: 0, 1, 2, 1048576, 1048577"),
]  # fmt: skip


@pytest.mark.parametrize(("damage", "named"), [each[1:] for each in CHANGES], ids=[each[0] for each in CHANGES])
def test_a_deep_audit_names_the_events_of_a_file_that_was_changed(
    rig: Rig, damage: Callable[[Rig], object], named: str
) -> None:
    fill(rig)
    damage(rig)
    assert rig.audited(deep=False).ok, "that looks at the ledger"
    assert any(named in problem for problem in rig.audited().problems), rig.audited().problems


def test_the_events_of_several_files_are_named(rig: Rig) -> None:
    fill(rig)
    for record in rig.records()[:2]:
        lines = gzip.decompress(rig.store.get(record.file).body).splitlines(keepends=True)
        rig.replace(record.file, member(b"".join([*lines[1:], b"{}\n"])))
    first, second, _ = rig.records()
    said = rig.audited().problems
    for file, missing in ((first.file, 0), (second.file, 4 << PLACE_BITS)):
        [named] = [problem for problem in said if problem.startswith(f"{file}: events that")]
        assert named == f"{file}: events that are missing: {missing}"
        assert any(problem.startswith(f"{file}: lines that are not in the log: ") for problem in said)


def first_record(rig: Rig) -> str:
    return f"_ledger/0/{rig.records()[0].first:020}.json"


FAULTS: list[tuple[str, Callable[[Rig], object], str]] = [
    ("a record counts one more", lambda rig: rig.rewrite(first_record(rig), events=6), "6 events, and of the log 5 belong to it"),
    ("a record is missing", lambda rig: rig.store.delete(f"_ledger/0/{rig.records()[1].first:020}.json"), "no record for"),
    ("the last record is missing", lambda rig: rig.store.delete(f"_ledger/0/{rig.records()[2].first:020}.json"),
     "1 events lie before the checkpoint and are in no file"),
    ("a record of later", lambda rig: rig.rewrite(f"_ledger/0/{rig.records()[2].first:020}.json", next=99 << 20), "beyond the end"),
    ("a letter is missing", lambda rig: rig.store.delete(DEAD), f"2 events from {(4 << 20) + 1} on are dead letters (number_reused)"),
    ("a letter lacks an event", lambda rig: rig.rewrite(DEAD, events=[{}]), f"{DEAD}: not what the log holds"),
    ("a letter is of another", lambda rig: rig.rewrite(DEAD, producer="q"), f"{DEAD}: not what the log holds"),
    ("a letter is unreadable", lambda rig: rig.replace(DEAD, b"{"), "cannot be read"),
    ("a letter is too many", lambda rig: rig.store.create(dead_name(0, 0), b"{}", id="x"), "are no dead letters by the log"),
    ("the store is another hub's", lambda rig: rig.rewrite("_hub.json", hub="1" * 32), "belongs to hub"),
]  # fmt: skip


@pytest.mark.parametrize(("damage", "named"), [each[1:] for each in FAULTS], ids=[each[0] for each in FAULTS])
def test_every_audit_finds(rig: Rig, damage: Callable[[Rig], object], named: str) -> None:
    fill(rig)
    damage(rig)
    assert any(named in problem for problem in rig.audited(deep=False).problems), rig.audited(deep=False).problems


def test_without_the_filter_the_copies_are_found(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative control: an archive that has events twice, whose files and ledger agree."""
    monkeypatch.setattr(Filter, "passed", lambda self, frame: frame)
    fill(rig)
    problems = rig.audited(deep=False).problems
    name = rig.records()[1].file
    assert f"{name}: 11 events, and of the log 4 belong to it" in problems
    assert any("are dead letters (number_reused)" in problem for problem in problems)
    deep = rig.audited().problems
    assert f"{name}: lines that are copies: 1, 2, 3, 7, 8" in deep
    assert f"{name}: lines that are dead letters: 5, 6" in deep


def test_a_damaged_record_of_the_log(rig: Rig) -> None:
    fill(rig)
    rig._writer.write({0: [Outgoing(b"hello")]})
    assert any("is damaged" in problem for problem in rig.audited().problems)


def test_what_the_brokers_deleted_is_not_compared_and_the_rest_is(rig: Rig) -> None:
    fill(rig)
    rig.trim(1)
    report = rig.audited()
    [first, second, third] = rig.records()
    at = first.next >> PLACE_BITS
    assert report.problems == []
    assert report.notes == [
        f"partition 0: the log begins at offset 1, and of what is known of producers at {at}. 1 files before that, up to {first.file}, "
        "are not compared with it."
    ]
    rig.trim(5)
    assert (rig.audited().problems, f"up to {second.file}" in rig.audited().notes[0]) == ([], True)
    rig.rewrite(f"_ledger/0/{third.first:020}.json", events=2)
    assert not rig.audited(deep=False).ok
    rig.rewrite(f"_ledger/0/{third.first:020}.json", events=1)
    for blob in list(rig.store.list("_producers/")):
        rig.store.delete(blob.name)
    rig.trim(int(rig.checkpoint.offset) - 1)
    assert rig.audited().problems == []
    assert "nothing is compared" in rig.audited().notes[0]


def test_behind_the_checkpoint_the_last_state_holds(rig: Rig) -> None:
    """An idle partition, of which everything is deleted; then copies and new events come."""
    fill(rig)
    end = int(rig.checkpoint.offset)
    rig.trim(end)
    assert (rig.audited().problems, len(rig.audited().notes)) == ([], 1)
    rig.put(("p", 3, range(1), 1))
    rig.put(("p", 4, range(1), 1))
    assert (rig.audited().totals.copies, rig.audited().totals.pending) == (1, 1)
    rig.archive()
    assert rig.audited().problems == []
    rig.put(("p", 5, range(1), 1))
    rig.put(("p", 6, range(1), 1))
    rig.trim(int(rig.checkpoint.offset) + 1)
    assert "events between are in neither" in " ".join(rig.audited().problems)


def test_while_it_runs_the_system_goes_on(rig: Rig) -> None:
    """At any of its steps events come in, are archived, and the brokers delete."""
    fill(rig)
    steps = at = 0

    class Live:
        def __init__(self, target: Any) -> None:
            self._target = target

        def __getattr__(self, name: str) -> Any:
            found = getattr(self._target, name)
            return self._live(found) if callable(found) else found

        def _live(self, act: Callable[..., Any]) -> Callable[..., Any]:
            def call(*args: Any, **named: Any) -> Any:
                nonlocal steps
                steps += 1
                if steps == at:
                    rig.put(("p", 3 + at, range(2), 2))
                    rig.put(("p", 3 + at, range(2), 2))
                    rig.put(("p", 3 + at, range(2), 2), other=b"x")
                    rig.archive()
                    rig.put(("p", 4 + at, range(2), 2))
                    rig.trim(rig.records()[-4].next >> PLACE_BITS)
                return act(*args, **named)

            return call

    for at in range(1, 24):
        steps = 0
        assert audit(Live(rig.hub), Live(rig.store), deep=True).problems == []
        assert steps >= at


def test_states_are_kept_as_far_as_the_log_reaches_and_spread_over_it() -> None:
    kept: list[int] = []
    for at in range(1, 200):
        kept.append(at)
        for old in surplus(kept, max(0, at - 100)):
            kept.remove(old)
        assert kept[-2:] == [at - 1, at] or at == 1
        assert len(kept) <= STATES_KEPT + 2
        assert at <= 100 or kept[0] >= at - 100
    assert kept[0] <= 140
    assert max(b - a for a, b in itertools.pairwise(kept)) <= 40


class TestOfThePast:
    """Without a broker: many hours, of which some were deleted."""

    @pytest.fixture
    def rig(self, tmp_path: Path) -> test_filter.Rig:
        rig = test_filter.Rig(tmp_path)
        for sequence in range(1, 40):
            rig.topic.put(("p", 1, sequence, range(2), 2))
            rig.topic.put(("p", 1, sequence, range(2), 2))
            rig.close_period()
            rig.run()
        write_lease(rig.store, rig.checkpoint)
        return rig

    @pytest.mark.parametrize("first", [0, 1, 2, 30, 70, 116, 117])
    def test_it_is_compared_from_the_first_state_on(self, rig: test_filter.Rig, first: int) -> None:
        rig.topic.first = first
        report = audit(rig.topic, rig.store, deep=True)
        assert (report.problems, len(report.notes)) == ([], bool(first))
        totals = report.totals
        assert totals.logged == totals.archived + totals.copies == 78 + totals.copies
        assert first > 70 or totals.copies > 20

    def test_each_hour_is_compared_for_itself(self, rig: test_filter.Rig) -> None:
        record = rig.records()[3]
        changed = msgspec.structs.replace(record, hour="2026-11-22T13-59-50")
        name = f"_ledger/0/{record.first:020}.json"
        rig.store.delete(name)
        body = msgspec.json.encode(msgspec.structs.replace(changed, file=f"0/{changed.hour}.json.gz"))
        rig.store.create(name, body, id="x")
        assert any("events of it are of 2026-11-22T14-00-30" in p for p in audit(rig.topic, rig.store).problems)

    def test_a_state_that_is_damaged_is_named(self, rig: test_filter.Rig) -> None:
        rig.topic.first = 1
        name = next(iter(rig.store.list("_producers/"))).name
        rig.store.delete(name)
        rig.store.create(name, b"x", id="x")
        assert any(name in problem for problem in audit(rig.topic, rig.store).problems)
        assert name != state_name(0, rig.records()[-1].next)


def test_letters_are_as_before() -> None:
    """The device's field is in a letter only where it has another name."""
    dead = Dead("h", 0, 1, "number_reused", "p", 1, 1, "", [])
    assert b"device_field" not in msgspec.json.encode(dead)
