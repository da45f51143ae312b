"""What processors of users are given of a log that has batches twice: each event once, under its own number."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from penstock.archive import filter as filter_module
from penstock.archive.fresh import Counts, Fresh
from penstock.events import Event
from penstock.testing import FaultyBlobs, MemoryBlobs, MemoryLog
from penstock.wire.frame import events
from tests.archive.test_filter import BITS, Lane, Rig, line

READ = 200


@pytest.fixture
def rig(tmp_path: Path) -> Rig:
    return Rig(tmp_path)


class Reader:
    """A group's processors on the rig's topic. `offset` is its checkpoint: each `read` is a new life that begins there."""

    def __init__(self, rig: Rig) -> None:
        self.rig = rig
        self.offset = "0"
        self.counts = Counts()
        self.seen: list[Event] = []

    def read(self, slices: int = 1_000_000, *, bytes_max: int = READ) -> None:
        fresh = Fresh(self.rig.topic, self.rig.store, 0, self.counts, self.rig.log)
        for _ in range(slices):
            read = self.rig.topic.read(0, self.offset, bytes_max=bytes_max)
            if read.next_offset == self.offset:
                return
            self.seen += events(fresh.passed(read))
            self.offset = read.next_offset

    def lines(self) -> list[bytes]:
        return [event.body for event in self.seen]

    def expected(self) -> list[Event]:
        """Each event where the log has it first."""
        first: dict[bytes, Event] = {}
        for event in events(self.rig.topic.read(0, str(self.rig.topic.first), bytes_max=1 << 30)):
            first.setdefault(event.body, event)
        return list(first.values())


def test_copies_are_left_out_and_what_is_left_keeps_its_number(rig: Rig) -> None:
    rig.topic.put(("p", 1, 1, range(3), 5), ("q", 1, 1, range(2), 2))
    rig.topic.put(("q", 1, 1, range(2), 2), ("p", 1, 1, range(5), 5), ("r", 1, 1, range(2), 2))
    rig.topic.mark()
    reader = Reader(rig)
    reader.read()
    assert reader.seen == reader.expected()
    assert [event.sequence_number for event in reader.seen] == [*range(5), *((1 << BITS) + n for n in (5, 6, 7, 8))]
    assert (reader.counts.copies, reader.counts.dead) == (5, 0)


def test_rows_of_new_events_between_copies(rig: Rig) -> None:
    rig.topic.put(("p", 1, 1, range(2), 2), ("q", 1, 1, range(2), 2))
    rig.topic.put(("p", 1, 2, range(2), 2), ("q", 1, 1, range(2), 2), ("p", 1, 3, range(2000), 2000))
    reader = Reader(rig)
    reader.read()
    assert reader.seen == reader.expected()
    assert len(reader.seen) == 4 + 2 + 2000


def test_dead_letters_are_not_given(rig: Rig) -> None:
    rig.topic.put(("p", 1, 1, range(2), 2))
    rig.topic.put(("p", 1, 1, range(2), 2), sha=b"other")
    reader = Reader(rig)
    reader.read()
    assert reader.lines() == [line("p", 1, 0), line("p", 1, 1)]
    assert (reader.counts.copies, reader.counts.dead) == (0, 2)
    assert rig.log.count("events are dead letters") == 1


@pytest.mark.parametrize("archived", [True, False])
def test_over_the_end_of_a_life(rig: Rig, archived: bool) -> None:
    """With the archive's state before the checkpoint, or none: then the hour before it is read again."""
    reader = Reader(rig)
    for sequence in range(1, 4):
        rig.topic.put(("p", 1, sequence, range(3), 3))
        rig.close_period()
        if archived:
            rig.run()
        reader.read()
        rig.topic.put(("p", 1, sequence, range(3), 3))
        reader.read()
    assert reader.seen == reader.expected()


def test_one_that_is_far_behind_the_archive_knows_the_last_hour(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    rig.topic.put(("p", 1, 1, range(3), 3))
    reader = Reader(rig)
    reader.read()
    for sequence in range(2, 8):
        rig.close_period()
        rig.topic.put(("p", 1, 1, range(3), 3))
        rig.topic.put(("q", 1, sequence, range(3), 3))
    rig.close_period()
    rig.run()
    for blob in list(rig.store.list("_producers/"))[:-2]:  # of a long log only few of the older ones are kept
        rig.store.delete(blob.name)
    assert reader.offset == "1"
    reader.read()
    assert reader.seen == reader.expected()
    behind = Reader(rig)
    behind.offset = "2"
    monkeypatch.setattr(filter_module, "LOOK_BACK_MS", 0)
    behind.read()
    assert behind.lines()[:3] == [line("p", 1, index) for index in range(3)]  # at least once


def test_a_state_that_is_not_right_is_passed_by(rig: Rig) -> None:
    rig.topic.put(("p", 1, 1, range(3), 3))
    rig.close_period()
    rig.run()
    for blob in list(rig.store.list("_producers/")):
        rig.store.delete(blob.name)
        rig.store.create(blob.name, b"no", id="x")
    rig.topic.put(("p", 1, 1, range(3), 3))
    reader = Reader(rig)
    reader.offset = "1"
    reader.read()
    assert reader.seen == []


@pytest.mark.parametrize("seed", range(30))
def test_any_log_and_any_lives(tmp_path: Path, seed: int) -> None:
    source = random.Random(seed)
    rig, reader = Rig(tmp_path), None
    reader = Reader(rig)
    lanes = [Lane(name, source) for name in ("a", "b")]
    for _ in range(60):
        source.choice(lanes).send(rig.topic)
        if source.random() < 0.2:
            rig.close_period()
        if source.random() < 0.3:
            rig.run(store=FaultyBlobs.random(rig.store, seed=source.randrange(1 << 30), rate=0.05))
        if source.random() < 0.3:
            reader.read(source.randrange(1, 5))
    for lane in lanes:
        lane.land(rig.topic)
    reader.read()
    assert len(reader.lines()) == len(set(reader.lines()))
    alone = Reader(Rig(tmp_path))
    alone.rig.topic, alone.rig.store, alone.rig.log = rig.topic, MemoryBlobs(), MemoryLog()
    alone.read()
    assert reader.seen == alone.seen
