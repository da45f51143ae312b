"""An archive of a log that has batches twice: each event once, whatever the archiver lived through."""

from __future__ import annotations

import gzip
import itertools
import random
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import msgspec
import pytest

from penstock.archive.archiver import Archiver
from penstock.archive.begin import start
from penstock.archive.check import verify
from penstock.archive.cut import hour_start_ms
from penstock.archive.filter import Dead, Filter, Producers, State, dead_name, state_name
from penstock.archive.ledger import Ledger, Record, claim
from penstock.blobs import BlobStore
from penstock.errors import ArchiveError, OffsetTrimmed, StoreUnavailable
from penstock.events import Batch, Bounds, Frame, FrameKind, Group, Slice
from penstock.files import Files
from penstock.hub.duplicates import Share, pack_owners, pack_shares
from penstock.hub.producers import KEPT_BATCHES
from penstock.processor import Checkpoint, CloseReason
from penstock.testing import FakeClock, FaultyBlobs, MemoryBlobs, MemoryLog
from penstock.wire.draft import drafts
from penstock.wire.frame import content, decode, pack

BITS = 20
PERIOD_S = 10
START_MS = 1_795_356_000_000
SEEDS = 300


class Topic:
    """A hub as a Kafka topic is one: markers take offsets, some offsets nothing, and copies are stored again."""

    id, period_s, place_bits = "7" * 32, PERIOD_S, BITS

    def __init__(self) -> None:
        self.frames: list[Frame] = []
        self.end = 0
        self.first = 0
        self.at_ms = START_MS

    def partitions(self) -> int:
        return 1

    def put(self, *sources: tuple[str, int, int, Sequence[int], int], sha: bytes = b"", owner: str = "") -> None:
        """One frame. A source: producer, epoch, sequence, its events' places in the batch, and how many that has; epoch 0 has no number."""
        batches = []
        for producer, epoch, sequence, places, _ in sources:
            lines = b"".join(
                b'{"deviceId":"%s","e":%d,"s":%d,"i":%d}\n' % (producer.encode(), epoch, sequence, i) for i in places
            )
            sha256 = sha or b"%d-%d" % (epoch, sequence) if epoch else b""
            batches.append(Batch(producer, epoch, sequence, 0, (Group(0, len(places), lines),), bool(epoch), sha256))
        [draft] = drafts(batches, frame_bytes_max=1 << 20)
        shares = [Share(places[0], whole, owner) for _, _, _, places, whole in sources]
        packed = {"shares": pack_shares(shares), "owners": pack_owners(shares)}
        self._add(msgspec.structs.replace(decode(draft.placed(0, 0)), **packed))

    def mark(self, kind: FrameKind = FrameKind.TIME_MARKER) -> None:
        self._add(decode(pack(kind, 0, 0, 0, 0, 0, 0, 0, b"", 0, b"")))

    def _add(self, frame: Frame) -> None:
        at = {"first": self.end << BITS, "enqueued_at_ms": self.at_ms, "place_bits": BITS}
        self.frames.append(msgspec.structs.replace(frame, **at))
        self.end += 1

    def read(self, partition: int, offset: str, *, bytes_max: int) -> Slice:
        if int(offset) < self.first:
            raise OffsetTrimmed("gone", first=str(self.first))
        there = [frame for frame in self.frames if frame.first >= int(offset) << BITS]
        size, found = 0, []
        for frame in there:
            size += len(frame.body)
            if found and size > bytes_max:
                break
            found.append(frame)
        following = found[-1].next >> BITS if found and len(found) < len(there) else self.end
        return Slice(partition, offset, found, str(following), str(self.end))

    def bounds(self, partition: int) -> Bounds:
        return Bounds(
            self.first << BITS, self.end << BITS, 0, START_MS, max((f.enqueued_at_ms for f in self.frames), default=0)
        )

    def locate(self, partition: int, at_ms: int) -> str:
        there = (frame.first >> BITS for frame in self.frames if frame.enqueued_at_ms >= at_ms)
        return str(max(self.first, next(there, self.end)))


class Rig:
    def __init__(self, folder: Path) -> None:
        self.topic = Topic()
        self.clock = FakeClock(START_MS)
        self.store = MemoryBlobs()
        self.log = MemoryLog()
        self.folder = folder
        self.checkpoint = Checkpoint("0", 0)
        claim(self.store, self.topic, self.clock)

    def run(self, *, store: BlobStore | None = None, reads: int = 1_000_000, bytes_max: int = 200) -> None:
        """A new archiver from the checkpoint on, for so many reads or to the end of the log."""
        archiver = Archiver(
            self.topic, store or self.store, 0, host="a", epoch=lambda: 1, clock=self.clock, files=Files(),
            folder=self.folder, file_bytes_max=1 << 20, log=self.log, checkpoint=lambda: self.checkpoint.sequence_number,
        )  # fmt: skip
        offset = self.checkpoint.offset
        try:
            for _ in range(reads):
                read = self.topic.read(0, offset, bytes_max=bytes_max)
                given = archiver.process(read) or self.checkpoint
                self.checkpoint = Checkpoint(given, int(given) << BITS) if isinstance(given, str) else given
                if read.next_offset == read.end_offset:
                    return
                offset = read.next_offset
        except StoreUnavailable:
            return
        finally:
            archiver.close(CloseReason.SHUTDOWN)

    def close_period(self) -> None:
        self.topic.at_ms += PERIOD_S * 1000
        self.topic.mark()

    def records(self) -> list[Record]:
        return [link for link in Ledger(self.store, self.topic.id, 0).chain(0) if isinstance(link, Record)]

    def archived(self) -> list[bytes]:
        files = [gzip.decompress(self.store.get(record.file).body) for record in self.records()]
        return [line for file in files for line in file.splitlines()]

    def logged(self) -> list[bytes]:
        return [line for frame in self.topic.frames if not frame.is_marker for line in content(frame).splitlines()]

    def hours(self) -> dict[bytes, int]:
        """Start of the hour of each event's file."""
        every = [(record.hour, gzip.decompress(self.store.get(record.file).body)) for record in self.records()]
        return {line: hour_start_ms(hour) for hour, file in every for line in file.splitlines()}

    def hours_logged(self) -> dict[bytes, int]:
        """What it must be: that of the latest time in the log up to there, in an event or a marker, however clocks step."""
        latest_ms, found = 0, {}
        for frame in self.topic.frames:
            latest_ms = max(latest_ms, frame.enqueued_at_ms)
            for line in content(frame).splitlines():
                found.setdefault(line, latest_ms - latest_ms % (PERIOD_S * 1000))
        return found

    def dead(self) -> list[Dead]:
        names = [blob.name for blob in self.store.list("_dead/")]
        return [msgspec.json.decode(self.store.get(name).body, type=Dead) for name in names]

    def state(self, at: int) -> State:
        return msgspec.msgpack.decode(self.store.get(state_name(0, at)).body, type=State)

    def scanned(self, at: int) -> dict[str, object]:
        """What a scan of the whole log makes of the producers, with a store that has nothing."""
        whole = Producers(self.topic, MemoryBlobs(), 0, self.log)
        whole.begin(at)
        return dict(whole.known)


@pytest.fixture
def rig(tmp_path: Path) -> Rig:
    return Rig(tmp_path)


def line(producer: str, sequence: int, index: int, epoch: int = 1) -> bytes:
    return b'{"deviceId":"%s","e":%d,"s":%d,"i":%d}' % (producer.encode(), epoch, sequence, index)


def test_a_copy_and_the_rest_of_a_batch(rig: Rig) -> None:
    rig.topic.put(("p", 1, 1, range(3), 3))
    rig.topic.put(("p", 1, 2, range(2), 5))  # the writer died here
    rig.topic.put(("q", 1, 1, range(2), 2), ("p", 1, 2, range(4), 5), ("q", 1, 1, range(2), 2))
    rig.topic.put(("p", 1, 1, range(3), 3))
    rig.topic.put(("p", 1, 2, range(4, 5), 5))
    rig.close_period()
    rig.run()
    expected = [
        ("p", 1, 0),
        ("p", 1, 1),
        ("p", 1, 2),
        ("p", 2, 0),
        ("p", 2, 1),
        ("q", 1, 0),
        ("q", 1, 1),
        ("p", 2, 2),
        ("p", 2, 3),
        ("p", 2, 4),
    ]
    assert rig.archived() == [line(*one) for one in expected]
    [record] = rig.records()
    assert (record.first, record.next, record.offset_next, record.events) == (0, 5 << BITS, "5", 10)
    assert rig.checkpoint == ("6", 5 << BITS)  # the marker is passed, and the ledger goes on where the file ended
    assert (rig.dead(), verify(rig.store).problems) == ([], [])


def test_a_copy_in_a_later_hour_opens_no_file(rig: Rig) -> None:
    rig.topic.put(("p", 1, 1, range(3), 3))
    rig.close_period()
    rig.topic.put(("p", 1, 1, range(3), 3))
    rig.close_period()
    rig.run()
    assert len(rig.records()) == 1
    rig.topic.put(("p", 1, 2, range(1), 1))
    rig.close_period()
    rig.run()
    assert [(record.first, record.next) for record in rig.records()] == [(0, 1 << BITS), (1 << BITS, 5 << BITS)]
    assert len(rig.archived()) == 4
    assert verify(rig.store).problems == []


def test_a_large_frame_of_which_a_part_is_new(rig: Rig) -> None:
    rig.topic.put(("p", 1, 1, range(100), 500))
    rig.topic.put(("p", 1, 1, range(500), 500))
    rig.close_period()
    rig.run()
    assert rig.archived() == [line("p", 1, index) for index in range(500)]
    assert verify(rig.store).problems == []


def test_what_may_have_been_stored_before_is_a_dead_letter_and_counted_once(rig: Rig) -> None:
    rig.topic.put(("p", 2, 7, range(2), 2))
    rig.topic.put(("q", 1, 1, range(1), 1), ("p", 2, 7, range(3), 3), sha=b"other")
    rig.topic.put(("p", 2, 1, range(2), 2))
    rig.topic.put(("p", 1, 9, range(2), 2))
    for _ in range(3):
        rig.run()
    rig.close_period()
    rig.run()
    assert rig.archived() == [line("p", 7, 0, 2), line("p", 7, 1, 2), line("q", 1, 0)]
    assert [(dead.sequence_number, dead.reason, len(dead.events)) for dead in rig.dead()] == [
        ((1 << BITS) + 1, "number_reused", 3),
        (2 << BITS, "number_too_old", 2),
        (3 << BITS, "producer_fenced", 2),
    ]
    [first, *_] = rig.dead()
    assert (first.producer, first.epoch, first.sequence, first.sha256) == ("p", 2, 7, b"other".hex())
    assert [bytes(event) for event in first.events] == [line("p", 7, index, 2) for index in range(3)]
    assert rig.store.get(dead_name(0, (1 << BITS) + 1)).body.startswith(b'{"hub":"777')


def _learnt_id(rig: Rig) -> None:
    """Whoever learns a producer's id sends with a key of another name, under a higher epoch and under the next number."""
    for owner, epoch, sequence, sha in (
        ("press", 1, 1, b"a"), ("thief", 9, 9, b"b"), ("press", 1, 2, b"c"), ("thief", 1, 2, b"c"), ("", 1, 2, b"c"), ("press", 1, 2, b"c"),
    ):  # fmt: skip
        rig.topic.put(("p", epoch, sequence, range(2), 2), sha=sha, owner=owner)
    rig.close_period()
    rig.run()


def test_a_producer_belongs_to_the_name_of_its_key(rig: Rig) -> None:
    """He fences nobody but himself, and what he sends is no copy of another's."""
    _learnt_id(rig)
    taken = (
        [("p", 1, i, 1) for i in range(2)],
        [("p", 9, i, 9) for i in range(2)],
        [("p", 2, i, 1) for i in range(2)] * 2,
    )
    assert rig.archived() == [line(*one) for batch in taken for one in batch]
    assert [(dead.owner, dead.reason, dead.epoch) for dead in rig.dead()] == [("thief", "producer_fenced", 1)]
    assert rig.state(5 << BITS).producers.keys() == {"p press", "p thief", "p"}


def test_without_owners_it_is_fenced(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative control."""
    monkeypatch.setattr("penstock.archive.filter.identity", lambda source, _share: source.producer)
    _learnt_id(rig)
    assert ("press", "producer_fenced") in [(dead.owner, dead.reason) for dead in rig.dead()]


def test_without_the_filter_copies_are_archived(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative control."""
    monkeypatch.setattr(Filter, "passed", lambda self, frame: frame)
    rig.topic.put(("p", 1, 1, range(3), 3))
    rig.topic.put(("p", 1, 1, range(3), 3))
    rig.close_period()
    rig.run()
    assert len(rig.archived()) == 6


def test_states_are_kept_where_the_last_file_begins_and_ends_and_where_the_log_reaches(rig: Rig) -> None:
    for sequence in range(1, 7):
        rig.topic.put(("p", 1, sequence, range(1), 1))
        rig.close_period()
        if sequence % 2:
            rig.run()
    rig.run()
    ends = [record.next for record in rig.records()]
    assert [blob.name for blob in rig.store.list("_producers/")] == [state_name(0, end) for end in ends]
    assert rig.state(ends[-1]).producers == rig.scanned(ends[-1])
    rig.topic.first = rig.topic.end
    rig.topic.put(("p", 1, 7, range(1), 1))
    rig.close_period()
    rig.run()
    assert [blob.name for blob in rig.store.list("_producers/")] == [
        state_name(0, end) for end in (ends[-1], rig.records()[-1].next)
    ]


def test_a_state_that_is_gone_is_made_again_from_the_log(rig: Rig) -> None:
    for sequence in (1, 2):
        rig.topic.put(("p", 1, sequence, range(3), 3), ("q", 1, sequence, range(1), 1))
        rig.close_period()
    rig.run()
    for blob in list(rig.store.list("_producers/")):
        rig.store.delete(blob.name)
    rig.topic.put(("p", 1, 2, range(3), 3))
    rig.topic.put(("q", 1, 3, range(1), 1))
    rig.close_period()
    rig.run()
    assert len(rig.archived()) == len(set(rig.archived())) == 9
    assert rig.log.count("producers are read again from the log") == 1


def test_of_what_the_brokers_deleted_nothing_is_known(rig: Rig) -> None:
    rig.topic.put(("p", 1, 1, range(3), 3))
    rig.close_period()
    rig.run()
    rig.store.delete(state_name(0, 1 << BITS))
    rig.topic.first = 1
    rig.topic.put(("p", 1, 1, range(3), 3))
    rig.close_period()
    rig.run()
    assert len(rig.archived()) == 6


def test_an_archive_that_begins_late_has_a_gap(rig: Rig) -> None:
    rig.topic.put(("p", 1, 1, range(3), 3))
    rig.topic.put(("p", 1, 2, range(3), 3))
    rig.topic.first = 1
    begin = start(rig.store, rig.topic, 0, host="a", clock=rig.clock)
    assert (begin.offset, begin.sequence_number) == ("1", 1 << BITS)
    rig.checkpoint = Checkpoint(begin.offset, begin.sequence_number)
    rig.topic.put(("p", 1, 2, range(3), 3))
    rig.close_period()
    rig.run()
    assert rig.archived() == [line("p", 2, index) for index in range(3)]


@pytest.mark.parametrize("body", [b"", b"\x00", msgspec.msgpack.encode(State(1, "8" * 32, 0, 1 << BITS, {}))])
def test_a_state_that_is_not_right_stops_the_partition(rig: Rig, body: bytes) -> None:
    rig.topic.put(("p", 1, 1, range(3), 3))
    rig.close_period()
    rig.run()
    rig.store.delete(state_name(0, 1 << BITS))
    rig.store.create(state_name(0, 1 << BITS), body, id="x")
    rig.close_period()
    with pytest.raises(ArchiveError):
        rig.run()


def test_a_clock_that_steps_back_moves_no_event_into_an_hour_that_is_over(rig: Rig) -> None:
    rig.topic.put(("p", 1, 1, range(1), 1))
    rig.close_period()
    rig.topic.at_ms -= 5000
    rig.topic.put(("p", 1, 2, range(1), 1))
    rig.topic.at_ms += PERIOD_S * 1000
    rig.topic.put(("p", 1, 3, range(1), 1))
    rig.close_period()
    for _ in range(6):
        rig.run(reads=2, bytes_max=1)
    rig.run()
    assert [record.hour[-2:] for record in rig.records()] == ["00", "10"]
    assert [record.events for record in rig.records()] == [1, 2]


def test_markers_may_be_deleted_behind_the_checkpoint(rig: Rig) -> None:
    """An idle partition's events and markers are, in the end; its archive goes on."""
    rig.topic.put(("p", 1, 1, range(3), 3))
    for _ in range(4):
        rig.close_period()
    rig.run()
    assert rig.checkpoint == ("5", 1 << BITS)
    rig.topic.first = 5
    rig.topic.at_ms -= PERIOD_S * 1500  # by a broker whose clock is behind
    rig.topic.put(("p", 1, 2, range(1), 1))
    rig.topic.at_ms += PERIOD_S * 1500
    rig.close_period()
    rig.run()
    assert [(record.first, record.next, record.events) for record in rig.records()] == [
        (0, 1 << BITS, 3),
        (1 << BITS, 6 << BITS, 1),
    ]
    assert verify(rig.store).problems == []


@pytest.mark.parametrize("restarted", [True, False])
def test_what_markers_have_said_holds_for_who_begins_behind_them(rig: Rig, restarted: bool) -> None:
    rig.topic.put(("p", 1, 1, range(1), 1))
    for _ in range(3):
        rig.close_period()
    if restarted:
        rig.run()
        assert rig.checkpoint == ("4", 1 << BITS)
    rig.topic.at_ms -= PERIOD_S * 1500
    rig.topic.put(("p", 1, 2, range(1), 1))
    rig.topic.at_ms += PERIOD_S * 1500
    rig.close_period()
    rig.run()
    assert [record.hour[-2:] for record in rig.records()] == ["00", "30"]


class Lane:
    """A producer, its batches in order, and whatever of them is still under way."""

    def __init__(self, name: str, source: random.Random) -> None:
        self.name = name
        self.sequence = 0
        self.forgotten = False
        self.late: list[tuple[Sequence[int], int, int]] = []
        self._source = source

    def send(self, topic: Topic) -> None:
        """One batch until it is answered: attempts that break off, each cut differently, and frames that land later."""
        self.sequence += 1
        whole = self._source.randint(1, 6)
        for attempt in range(self._source.randint(1, 3), 0, -1):
            cuts = sorted({0, whole, *(self._source.randint(0, whole) for _ in range(2))})
            pieces = [range(a, b) for a, b in itertools.pairwise(cuts)]
            landed = len(pieces) if attempt == 1 else self._source.randint(0, len(pieces))
            for piece in pieces[:landed]:
                other = [(f"w{self._source.random()}", 0, 1, range(1), 1)] * (self._source.random() < 0.3)
                topic.put((self.name, 1, self.sequence, piece, whole), *other)
            if landed < len(pieces) and self._source.random() < 0.5:
                self.late.append((pieces[landed], self.sequence, whole))
            self.land(topic)

    def land(self, topic: Topic) -> None:
        while self.late and self._source.random() < 0.3:
            piece, sequence, whole = self.late.pop(self._source.randrange(len(self.late)))
            self.forgotten |= self.sequence - sequence >= KEPT_BATCHES
            topic.put((self.name, 1, sequence, piece, whole))


@pytest.mark.parametrize("first", range(0, SEEDS, 50))
def test_any_log_any_deaths_any_store(tmp_path: Path, first: int) -> None:
    for seed in range(first, first + 50):
        source = random.Random(seed)
        rig = Rig(tmp_path)
        lanes = [Lane(name, source) for name in "abc"]
        faulty = FaultyBlobs.random(rig.store, seed=seed, rate=0.05)
        for _ in range(source.randint(5, 25)):
            source.choice(lanes).send(rig.topic)
            rig.topic.at_ms += source.choice([0, 100, 2000, 6000, 11_000, -3000])
            if source.random() < 0.2:
                rig.topic.mark(source.choice([FrameKind.TIME_MARKER, FrameKind.CUT_MARKER]))
            rig.topic.end += source.random() < 0.1
            if source.random() < 0.4:
                rig.run(store=faulty, reads=source.randint(1, 9), bytes_max=source.choice([1, 300, 5000]))
        rig.topic.at_ms += 100_000
        rig.topic.mark()
        faulty.land()
        rig.run()
        expected = Counter(dict.fromkeys(rig.logged(), 1))
        assert Counter(rig.archived()) == expected, f"seed {seed}"
        assert rig.hours() == rig.hours_logged(), f"seed {seed}"
        for lane in lanes:
            mine = [(e["s"], e["i"]) for e in map(msgspec.json.decode, rig.archived()) if e["deviceId"] == lane.name]
            assert mine == sorted(mine), f"seed {seed}"
        dead = [bytes(event) for letter in rig.dead() for event in letter.events]
        assert set(dead) <= set(rig.archived()), f"seed {seed}"
        assert not dead or any(lane.forgotten for lane in lanes), f"seed {seed}"
        assert verify(rig.store).problems == [], f"seed {seed}"
        end = rig.records()[-1].next
        assert rig.state(end).producers == rig.scanned(end), f"seed {seed}"
