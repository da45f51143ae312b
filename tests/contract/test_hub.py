"""One suite for every Hub: what `penstock.hub.Hub` and docs/guarantees.md say, checked on each implementation.

What a hub leaves to others is said in its `Kind`, and the tests of that run on the others only.
"""

from __future__ import annotations

import hashlib
import itertools
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.errors import NumberReused, NumberTooOld, OffsetBeyondEnd, OffsetTrimmed, ProducerFenced
from penstock.events import Appended, Batch, Frame, FrameKind, Group
from penstock.hub.duplicates import Share, shares_of
from penstock.hub.embedded import EmbeddedHub, create
from penstock.hub.kafka import KafkaHub
from penstock.hub.remote import RemoteHub
from penstock.testing import FakeClock, MemoryHub
from penstock.wire.frame import content, events, sources_of
from tests.hub.served import served
from tests.kafka_broker import Brokers, made_topic

AnyHub = EmbeddedHub | MemoryHub
PERIOD_S = 60
START_MS = 1_795_356_000_000  # a whole hour


class Kind(NamedTuple):
    """How a hub is made, and what it does. The tests of what it does not do name that with `hubs_that`."""

    make: Callable[..., AbstractContextManager[AnyHub]]
    judges: bool = True
    """It knows the producers: a copy is answered as one, and not stored."""
    is_dense: bool = True
    """Sequence numbers count events, and markers take none."""
    is_timed: bool = True
    """Its times are those of the clock that it is given."""
    trims: bool = True
    """What is old is deleted by its owner."""


@contextmanager
def embedded(clock: FakeClock, partitions: int) -> Iterator[AnyHub]:
    with tempfile.TemporaryDirectory() as name:
        create(Path(name), partitions=partitions, period_s=PERIOD_S, bytes_max=64 << 20, clock=clock)
        with EmbeddedHub(Path(name), bytes_max=64 << 20, clock=clock) as hub:
            yield hub


@contextmanager
def memory(clock: FakeClock, partitions: int) -> Iterator[AnyHub]:
    yield MemoryHub(partitions, clock=clock, period_s=PERIOD_S)


class FarHub:
    """Written to in its own process, and read over HTTP."""

    def __init__(self, near: AnyHub, far: RemoteHub) -> None:
        self._near = near
        self._far = far

    def __getattr__(self, name: str) -> Any:
        reads = name in ("id", "period_s", "partitions", "read", "bounds", "locate")
        return getattr(self._far if reads else self._near, name)


@contextmanager
def remote(clock: FakeClock, partitions: int) -> Iterator[AnyHub]:
    with embedded(clock, partitions) as near, served(near) as url, RemoteHub(url, patience_s=0.0) as far:
        yield FarHub(near, far)  # type: ignore[misc]


@contextmanager
def in_kafka(clock: FakeClock, partitions: int, brokers: Brokers) -> Iterator[AnyHub]:
    client, topic = made_topic(brokers, partitions)
    with KafkaHub(client, topic, period_s=PERIOD_S, clock=clock) as hub:
        yield hub  # type: ignore[misc]


HUBS = {
    "embedded": Kind(embedded),
    "memory": Kind(memory),
    "remote": Kind(remote),
    "kafka": Kind(in_kafka, judges=False, is_dense=False, is_timed=False, trims=False),
}


def hubs_that(what: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("hub", [name for name, kind in HUBS.items() if getattr(kind, what)], indirect=True)


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock(START_MS)


@pytest.fixture(params=HUBS)
def hub(request: pytest.FixtureRequest, clock: FakeClock) -> Iterator[AnyHub]:
    brokers = [request.getfixturevalue("kafka")] if request.param == "kafka" else []
    with HUBS[request.param].make(clock, 3, *brokers) as made:
        yield made


@pytest.fixture
def kind(request: pytest.FixtureRequest) -> Kind:
    return HUBS[request.node.callspec.params["hub"]]


def group(partition: int, lines: list[bytes]) -> Group:
    return Group(partition, len(lines), b"".join(line + b"\n" for line in lines))


def batch(
    sequence: int,
    of: dict[int, list[bytes]],
    *,
    producer: str = "p",
    epoch: int = 1,
    sha: bytes | None = None,
    after: int | None = None,
) -> Batch:
    sha256 = hashlib.sha256(sha if sha is not None else repr((sequence, of)).encode()).digest()
    groups = tuple(group(partition, lines) for partition, lines in of.items())
    return Batch(producer, epoch, sequence, sum(g.count for g in groups), groups, True, sha256, after=after)


def lines_of(prefix: str, count: int, size: int = 10) -> list[bytes]:
    return [b'{"deviceId":"d-1","n":"%s-%d","x":"%s"}' % (prefix.encode(), n, b"x" * size) for n in range(count)]


def read_all(hub: AnyHub, partition: int, start: int | None = None, bytes_max: int = 1 << 20) -> list[Frame]:
    """Every frame from `start` on, by as many reads as it takes; each read must bring the reader further.

    A marker at the end comes with the last events, or with a read at the end, or with both.
    """
    offset = str(hub.bounds(partition).first >> hub.place_bits if start is None else start)
    frames: list[Frame] = []
    while True:
        found = hub.read(partition, offset, bytes_max=bytes_max)
        assert (found.partition, found.offset) == (partition, offset)
        frames += found.frames[1:] if list(found.frames[:1]) == frames[-1:] else found.frames
        if offset == found.end_offset:
            return frames
        assert int(found.next_offset) > int(offset)
        offset = found.next_offset


def stored(hub: AnyHub, partition: int) -> list[bytes]:
    return [line for frame in read_all(hub, partition) for line in content(frame).split(b"\n") if line]


def test_an_empty_hub(hub: AnyHub) -> None:
    assert (hub.partitions(), hub.period_s, len(hub.id)) == (3, PERIOD_S, 32)
    assert hub.append([]) == []
    assert hub.cut() == ["0", "0", "0"]
    for partition in range(3):
        found = hub.read(partition, "0", bytes_max=1000)
        assert (list(found.frames), found.next_offset, found.end_offset) == ([], "0", "0")
        bounds = hub.bounds(partition)
        assert (bounds.first, bounds.next) == (0, 0)
        assert hub.locate(partition, 0) == "0"
        with pytest.raises(OffsetBeyondEnd) as beyond:
            hub.read(partition, "1", bytes_max=1000)
        assert beyond.value.fields == {"end": "0"}


def test_events_come_back_in_order_with_their_sources(hub: AnyHub, clock: FakeClock) -> None:
    first = batch(1, {0: lines_of("a", 3), 2: lines_of("b", 2)})
    large = batch(1, {0: lines_of("c", 90, 100)}, producer="q")
    assert hub.append([first, large]) == [Appended(5, False), Appended(90, False)]
    hub.append([batch(2, {0: lines_of("d", 1)})])
    assert stored(hub, 0) == lines_of("a", 3) + lines_of("c", 90, 100) + lines_of("d", 1)
    assert stored(hub, 1) == []
    assert stored(hub, 2) == lines_of("b", 2)
    frames = read_all(hub, 0)
    assert [source.producer for frame in frames for source in sources_of(frame)] == ["p", "q", "p"]
    assert [source.sha256 for frame in frames for source in sources_of(frame)][:2] == [first.sha256, large.sha256]


def test_an_event_is_found_again_by_its_offset(hub: AnyHub) -> None:
    hub.append([batch(1, {0: lines_of("a", 3)}), batch(1, {0: lines_of("b", 90, 100)}, producer="q")])
    hub.append([batch(2, {0: lines_of("c", 2)})])
    every = list(events(hub.read(0, "0", bytes_max=1 << 20)))
    numbers = [event.sequence_number for event in every]
    assert numbers == sorted(set(numbers))
    for event in every:
        found = next(events(hub.read(0, event.offset, bytes_max=1)))
        assert found.sequence_number == int(event.offset) << hub.place_bits <= event.sequence_number
    assert every[-1].sequence_number < hub.bounds(0).next


@hubs_that("is_dense")
def test_times_and_numbers_of_events(hub: AnyHub, clock: FakeClock) -> None:
    hub.append([batch(1, {0: lines_of("a", 93)})])
    clock.advance(1)
    hub.append([batch(2, {0: lines_of("d", 1)})])
    frames = read_all(hub, 0)
    assert frames[0].enqueued_at_ms == START_MS
    assert frames[-1].enqueued_at_ms == START_MS + 1000
    found = hub.read(0, "92", bytes_max=1 << 20)
    assert [event.sequence_number for event in events(found)] == [92, 93]


@hubs_that("is_dense")
def test_numbers_are_dense_and_times_never_decrease(hub: AnyHub, clock: FakeClock) -> None:
    times: list[int] = []
    for sequence in range(1, 12):
        clock.step(-7 if sequence % 3 else 5)
        times.append(max(clock.now_ms(), *times, START_MS - 7000))
        hub.append([batch(sequence, {0: lines_of(str(sequence), 2), 1: lines_of(str(sequence), 100, 50)})])
    for partition, each in ((0, 2), (1, 100)):
        frames = read_all(hub, partition)
        assert [frame.first for frame in frames] == [n * each for n in range(11)]
        assert [frame.enqueued_at_ms for frame in frames] == times
        assert (hub.bounds(partition).first, hub.bounds(partition).next) == (0, 11 * each)
        assert hub.bounds(partition).enqueued_last_ms >= times[-1]


ROWS: list[tuple[str, list[Batch], list[object]]] = [
    ("higher number", [batch(2, {0: [b"{}"]}, sha=b"b")], [Appended(1, False)]),
    ("much higher number", [batch(900, {0: [b"{}"]})], [Appended(1, False)]),
    ("known number, same bytes", [batch(1, {0: [b"{}"]}, sha=b"a")], [Appended(7, True)]),
    ("known number, other bytes", [batch(1, {0: [b"{}"]}, sha=b"other")], [NumberReused]),
    ("lower number, never seen", [batch(5, {0: [b"{}"]}), batch(3, {0: [b"{}"]})], [Appended(1, False), NumberTooOld]),
    ("lower epoch", [batch(9, {0: [b"{}"]}, epoch=0)], [ProducerFenced]),
    ("lower epoch after a new one", [batch(1, {0: [b"{}"]}, epoch=2), batch(2, {0: [b"{}"]})], [Appended(1, False), ProducerFenced]),
    ("known under the old epoch", [batch(1, {0: [b"{}"]}, epoch=2), batch(1, {0: []}, sha=b"a")], [Appended(1, False), Appended(7, True)]),
    ("known under the old epoch, others", [batch(1, {0: [b"{}"]}, epoch=2), batch(1, {0: [b"{}"]})], [Appended(1, False), NumberReused]),
    ("higher epoch, from the start", [batch(1, {0: [b"{}"]}, epoch=2), batch(2, {0: [b"{}"]}, epoch=2)], [Appended(1, False)] * 2),
    ("unknown producer with a high number", [batch(77, {0: [b"{}"]}, producer="new")], [Appended(1, False)]),
    ("two copies", [batch(2, {0: [b"{}"]}), batch(2, {0: [b"{}"]})], [Appended(1, False), Appended(1, True)]),
    ("two under one number", [batch(2, {0: [b"{}"]}, sha=b"x"), batch(2, {0: [b"{}"]}, sha=b"y")], [Appended(1, False), NumberReused]),
    ("another producer's copy", [batch(1, {0: [b"{}"]}, producer="q", sha=b"a")], [Appended(1, False)]),
]  # fmt: skip


@hubs_that("judges")
@pytest.mark.parametrize("together", [True, False], ids=["one append", "one append each"])
@pytest.mark.parametrize(("batches", "expected"), [row[1:] for row in ROWS], ids=[row[0] for row in ROWS])
def test_the_producers_table(hub: AnyHub, batches: list[Batch], expected: list[object], together: bool) -> None:
    assert hub.append([batch(1, {0: lines_of("first", 7)}, sha=b"a")]) == [Appended(7, False)]
    if together:
        answers = list(hub.append(batches))
    else:
        answers = [answer for one in batches for answer in hub.append([one])]
    for answer, wanted in zip(answers, expected, strict=True):
        if isinstance(wanted, Appended):
            assert answer == wanted
        else:
            assert type(answer) is wanted
            assert answer.fields.keys() == {"last_epoch", "last_sequence"}  # type: ignore[union-attr]
    count = sum(isinstance(answer, Appended) and not answer.duplicate for answer in answers)
    assert hub.bounds(0).next == 7 + count


@hubs_that("judges")
def test_the_last_five_are_known_and_no_more(hub: AnyHub) -> None:
    sent = [batch(n, {n % 3: lines_of(str(n), n)}) for n in range(1, 9)]
    hub.append(sent)
    for one in sent[-5:]:
        assert hub.append([one]) == [Appended(one.accepted, True)]
    for one in sent[:-5]:
        [answer] = hub.append([one])
        assert isinstance(answer, NumberTooOld)
        assert answer.fields == {"last_epoch": 1, "last_sequence": 8}
    assert sum(hub.bounds(partition).next for partition in range(3)) == sum(range(1, 9))


def test_batches_without_a_number_are_always_stored(hub: AnyHub) -> None:
    one = Batch("w-1", 0, 1, 1, (group(0, [b"{}"]),))
    assert hub.append([one, one]) == [Appended(1, False)] * 2
    assert hub.append([one]) == [Appended(1, False)]
    assert len(stored(hub, 0)) == 3


def test_a_copy_is_in_the_log_once_or_each_is_marked_as_what_it_is(hub: AnyHub, kind: Kind) -> None:
    """Where the hub keeps no producers, the copy carries all that its readers need to know it by."""
    one = batch(1, {0: lines_of("a", 3)})
    answers = [*hub.append([one]), *hub.append([one])]
    frames = read_all(hub, 0)
    if kind.judges:
        assert answers == [Appended(3, False), Appended(3, True)]
        assert len(frames) == 1
    else:
        assert answers == [Appended(3, False)] * 2
        first, copy = (list(shares_of(frame)) for frame in frames)
        assert first == copy == [(sources_of(frames[0])[0], Share(0, 3))]


def test_cut_markers_stand_only_behind_events(hub: AnyHub, kind: Kind) -> None:
    hub.append([batch(1, {0: [b"{}"]})])
    assert hub.cut() == ["1", "0", "0"]
    assert hub.cut() == ["1", "0", "0"]
    assert [frame.kind for frame in read_all(hub, 0)] == [FrameKind.PLAIN, FrameKind.CUT_MARKER]
    assert read_all(hub, 1) == []
    hub.append([batch(2, {0: [b"{}"], 1: [b"{}"]})])
    following = "2" if kind.is_dense else "3"
    assert hub.cut() == [following, "1", "0"]
    kinds = [FrameKind.PLAIN, FrameKind.CUT_MARKER]
    assert [frame.kind for frame in read_all(hub, 0)] == kinds * 2
    assert [frame.kind for frame in read_all(hub, 1)] == kinds


@hubs_that("is_timed")
def test_markers_stand_only_behind_events(hub: AnyHub, clock: FakeClock) -> None:
    hub.append([batch(1, {0: [b"{}"]})])
    hub.cut()
    hub.append([batch(2, {0: [b"{}"], 1: [b"{}"]})])
    hub.maintain()
    assert [frame.kind for frame in read_all(hub, 1)] == [FrameKind.PLAIN]
    clock.advance(PERIOD_S)
    hub.maintain()
    hub.maintain()
    kinds = [FrameKind.PLAIN, FrameKind.CUT_MARKER, FrameKind.PLAIN, FrameKind.TIME_MARKER]
    assert [frame.kind for frame in read_all(hub, 0)] == kinds
    assert [frame.kind for frame in read_all(hub, 1)] == [FrameKind.PLAIN, FrameKind.TIME_MARKER]
    assert read_all(hub, 2) == []
    assert read_all(hub, 0)[-1].enqueued_at_ms == START_MS + PERIOD_S * 1000
    clock.advance(PERIOD_S)
    hub.maintain()
    assert [frame.kind for frame in read_all(hub, 0)] == kinds


@hubs_that("is_timed")
def test_an_idle_partition_gets_its_time_marker_although_others_are_busy(hub: AnyHub, clock: FakeClock) -> None:
    """What a busy partition writes first in a period must not hide that another's file has to be closed."""
    hub.append([batch(1, {0: [b"{}"], 1: [b"{}"]})])
    clock.advance(PERIOD_S)
    hub.append([batch(2, {0: [b"{}"]})])
    hub.maintain()
    assert [frame.kind for frame in read_all(hub, 1)] == [FrameKind.PLAIN, FrameKind.TIME_MARKER]
    assert [frame.kind for frame in read_all(hub, 0)] == [FrameKind.PLAIN, FrameKind.PLAIN]


@hubs_that("is_timed")
def test_nothing_is_enqueued_before_what_bounds_said(hub: AnyHub, clock: FakeClock) -> None:
    clock.advance(PERIOD_S)
    hub.maintain()
    said = hub.bounds(2).enqueued_last_ms
    assert said == START_MS + PERIOD_S * 1000
    clock.step(-100)
    hub.append([batch(1, {2: [b"{}"]})])
    assert read_all(hub, 2)[0].enqueued_at_ms == said


def test_a_read_is_bounded_and_never_stuck(hub: AnyHub) -> None:
    for sequence in range(1, 8):
        hub.append([batch(sequence, {0: lines_of(str(sequence), 2, 200)})])
        if sequence % 2:
            hub.cut()
    for bytes_max in (1, 100, 700, 2000, 1 << 20):
        assert read_all(hub, 0, bytes_max=bytes_max) == read_all(hub, 0)
    assert sum(not frame.is_marker for frame in hub.read(0, "0", bytes_max=1).frames) == 1
    assert sum(len(frame.body) for frame in hub.read(0, "0", bytes_max=2000).frames) <= 2000


@hubs_that("trims")
def test_trim_drops_whole_frames_and_never_passes_before(hub: AnyHub) -> None:
    hub.trim(0, before="0")
    for sequence in range(1, 6):
        hub.append([batch(sequence, {0: lines_of(str(sequence), 10)})])
    hub.cut()
    for before, first in (("0", 0), ("9", 0), ("10", 10), ("19", 10), ("35", 30)):
        hub.trim(0, before=before)
        assert (hub.bounds(0).first, hub.bounds(0).next) == (first, 50)
        assert [frame.first for frame in read_all(hub, 0)] == [*range(first, 50, 10), 50]
    for offset in ("0", "29"):
        with pytest.raises(OffsetTrimmed) as trimmed:
            hub.read(0, offset, bytes_max=1000)
        assert trimmed.value.fields == {"first": "30"}
    hub.trim(0, before="1000")
    assert (hub.bounds(0).first, hub.bounds(0).next) == (50, 50)
    assert [frame.kind for frame in hub.read(0, "50", bytes_max=1000).frames] == [FrameKind.CUT_MARKER]
    with pytest.raises(OffsetTrimmed):
        hub.read(0, "49", bytes_max=1000)
    hub.append([batch(6, {0: [b"{}"]})])
    assert (hub.bounds(0).first, hub.bounds(0).next) == (50, 51)
    assert stored(hub, 0) == [b"{}"]


class Known(NamedTuple):
    """An event or marker as the model of the test below expects it."""

    kind: FrameKind
    number: int
    at_ms: int
    line: bytes = b""


class Model:
    """What a hub must hold, one event at a time."""

    def __init__(self) -> None:
        self.log: list[list[Known]] = [[], []]
        self.trimmed = [0, 0]
        self.floor_ms = 0

    def now(self, clock: FakeClock) -> int:
        self.floor_ms = max(self.floor_ms, clock.now_ms())
        return self.floor_ms

    def end(self, partition: int) -> int:
        return sum(known.kind is FrameKind.PLAIN for known in self.log[partition])

    def append(self, partition: int, lines: list[bytes], at_ms: int) -> None:
        for line in lines:
            self.log[partition].append(Known(FrameKind.PLAIN, self.end(partition), at_ms, line))

    def mark(self, kind: FrameKind, at_ms: int) -> None:
        for partition, log in enumerate(self.log):
            if log and log[-1].kind is FrameKind.PLAIN:
                ended = log[-1].at_ms // (PERIOD_S * 1000) < at_ms // (PERIOD_S * 1000)
                if kind is FrameKind.CUT_MARKER or ended:
                    log.append(Known(kind, self.end(partition), at_ms))


operations = st.one_of(
    st.tuples(
        st.just("append"),
        st.lists(
            st.tuples(st.integers(0, 1), st.integers(1, 4), st.sampled_from([5, 5, 5, 300, 2000])),
            min_size=1,
            max_size=4,
        ),
    ),
    st.tuples(st.sampled_from(["advance", "advance", "step"]), st.sampled_from([1, 20, 59, 61])),
    st.tuples(st.sampled_from(["cut", "maintain"]), st.just(0)),
    st.tuples(st.just("trim"), st.tuples(st.integers(0, 1), st.integers(0, 30))),
)


@pytest.mark.parametrize("kind", ["embedded", "memory"])
@settings(max_examples=120, deadline=None)
@given(ops=st.lists(operations, max_size=14))
def test_against_a_model(kind: str, ops: list[tuple[str, Any]]) -> None:
    clock, model, sequence = FakeClock(START_MS), Model(), itertools.count(1)
    with HUBS[kind].make(clock, 2) as hub:
        for name, what in ops:
            act(hub, clock, model, sequence, name, what)
        for partition in range(2):
            check_reads(hub, partition, model.log[partition])
            check_times(hub, partition)


def act(hub: AnyHub, clock: FakeClock, model: Model, sequence: Iterator[int], name: str, what: Any) -> None:
    if name == "append":
        at_ms, batches = model.now(clock), []
        for partition, count, size in what:
            number = next(sequence)
            lines = lines_of(str(number), count, size)
            batches.append(batch(number, {partition: lines}))
            model.append(partition, lines, at_ms)
        assert all(
            answer == Appended(one.accepted, False) for one, answer in zip(batches, hub.append(batches), strict=True)
        )
    elif name == "trim":
        partition, before = what
        hub.trim(partition, before=str(before))
        model.trimmed[partition] = max(model.trimmed[partition], before)
        assert hub.bounds(partition).first <= model.trimmed[partition]
    elif name == "cut":
        model.mark(FrameKind.CUT_MARKER, model.now(clock))
        assert hub.cut() == [str(model.end(partition)) for partition in range(2)]
    elif name == "maintain":
        before_ms = model.floor_ms
        model.mark(FrameKind.TIME_MARKER, model.now(clock))
        hub.maintain()
        # A hub that had nothing to write need not remember that it saw the clock.
        after_ms = hub.bounds(0).enqueued_last_ms
        assert before_ms <= after_ms <= model.floor_ms
        model.floor_ms = after_ms
    elif name == "advance":
        clock.advance(what)
    else:
        clock.step(-what)


def known(frames: list[Frame]) -> list[Known]:
    found: list[Known] = []
    for frame in frames:
        if frame.is_marker:
            found.append(Known(frame.kind, frame.first, frame.enqueued_at_ms))
        else:
            lines = content(frame).split(b"\n")[:-1]
            found += [
                Known(FrameKind.PLAIN, frame.first + n, frame.enqueued_at_ms, line) for n, line in enumerate(lines)
            ]
    return found


def check_reads(hub: AnyHub, partition: int, expected: list[Known]) -> None:
    """From every offset, whole or in the smallest steps: exactly what is expected from there on."""
    bounds = hub.bounds(partition)
    end = sum(one.kind is FrameKind.PLAIN for one in expected)
    assert bounds.next == end
    for start in range(end + 1):
        if start < bounds.first:
            with pytest.raises(OffsetTrimmed):
                hub.read(partition, str(start), bytes_max=1)
            continue
        for bytes_max in (1, 600, 1 << 20)[:: 2 if start % 3 else 1]:
            found = known(read_all(hub, partition, start, bytes_max))
            # A marker at the first offset may have been trimmed together with what stood before it.
            exact = [one for one in found if one.number >= start]
            wanted = [one for one in expected if one.number >= start]
            trimmed = start == bounds.first and exact == [one for one in wanted if one.line or one.number > start]
            assert exact == wanted or trimmed
    with pytest.raises(OffsetBeyondEnd):
        hub.read(partition, str(end + 1), bytes_max=1)


def check_times(hub: AnyHub, partition: int) -> None:
    """`locate` against a look at every frame."""
    frames, bounds = read_all(hub, partition), hub.bounds(partition)
    times = [frame.enqueued_at_ms for frame in frames]
    assert times == sorted(times)
    assert not times or (bounds.enqueued_first_ms, bounds.enqueued_last_ms >= times[-1]) == (times[0], True)
    for at_ms in sorted({time + by for time in [*times, START_MS] for by in (-1, 0, 1)}):
        wanted = next((frame.first for frame in frames if frame.enqueued_at_ms >= at_ms), bounds.next)
        assert hub.locate(partition, at_ms) == str(wanted), at_ms
