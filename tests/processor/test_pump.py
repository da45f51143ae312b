from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator

import pytest

from penstock.errors import (
    ArchiveError,
    FrameDamaged,
    HubBroken,
    HubUnavailable,
    OffsetTrimmed,
    PenstockError,
    ReaderFenced,
    StoreUnavailable,
    WrongHub,
)
from penstock.events import Bounds, FrameKind, Slice
from penstock.processor import CloseReason
from penstock.processor.lease import Start, Writer, claim, decode_lease, lease_name, take_over
from penstock.processor.pump import TRIES, Pump
from penstock.testing import FakeClock, Fault, FaultyBlobs, MemoryBlobs, MemoryHub, MemoryLog
from penstock.wire.frame import events as events_of
from tests.processor.conftest import until

LEASE_S = 30.0


class Recorder:
    """A processor that notes what it sees; `fail` is called with every slice first."""

    def __init__(self, stage: Stage) -> None:
        self._stage = stage
        stage.made += 1

    def process(self, events: Slice) -> str | None:
        self._stage.slices.append(events)
        self._stage.fail(events)
        self._stage.seen += [event.sequence_number for event in events_of(events)]
        return events.next_offset

    def close(self, reason: CloseReason) -> None:
        self._stage.closed.append(reason)


class Stage:
    """A pump on a partition of a hub in memory."""

    def __init__(self) -> None:
        self.clock = FakeClock()
        self.hub = MemoryHub(1, clock=self.clock)
        self.store = MemoryBlobs()
        self.log = MemoryLog()
        self.fault: Fault | None = None
        self.faulty = FaultyBlobs(self.store, lambda _operation, _name: self.fault)
        self.made = 0
        self.slices: list[Slice] = []
        self.seen: list[int] = []
        self.closed: list[CloseReason] = []
        self.fatal: list[Exception] = []
        self.fail: Callable[[Slice], object] = lambda _events: None
        self.holding = claim(self.faulty, self.clock, "g", 0, Writer("a", "i"), start=Start("0", 0))
        self.pump = Pump(
            self.hub,
            self.holding,
            lambda _partition: Recorder(self),
            clock=self.clock,
            log=self.log,
            lease_s=LEASE_S,
            fatal=self.fatal.append,
        )

    def put(self, count: int = 1) -> None:
        self.hub.put(0, [b'{"deviceId":"d"}'] * count)

    def checkpoint(self) -> int:
        return decode_lease(self.store.get(lease_name("g", 0)).body, 0).sequence_number

    def steal(self) -> None:
        blob = self.store.get(lease_name("g", 0))
        take_over(self.store, self.clock, "g", decode_lease(blob.body, 0), blob.etag, Writer("b", "j"))

    def tick(self) -> None:
        """Lets pauses end; the host would renew meanwhile."""
        self.clock.advance(1)
        if self.fault is None and self.holding.held:
            self.holding.renew()


@pytest.fixture
def stage() -> Iterator[Stage]:
    stage = Stage()
    yield stage
    stage.pump.stop(CloseReason.SHUTDOWN)
    if stage.pump._thread.ident is not None:
        until(stage.pump.ended.is_set, "the pump's end")


def test_feeds_and_checkpoints(stage: Stage) -> None:
    stage.put(3)
    stage.pump.start()
    until(lambda: stage.checkpoint() == 3)
    stage.put(2)
    until(lambda: stage.checkpoint() == 5, each=stage.tick)
    stage.pump.stop(CloseReason.SHUTDOWN)
    until(stage.pump.ended.is_set)
    assert stage.seen == [0, 1, 2, 3, 4]
    assert stage.closed == [CloseReason.SHUTDOWN]
    assert stage.made == 1


def test_a_processor_is_not_called_when_there_is_nothing_new(stage: Stage) -> None:
    stage.put(1)
    stage.pump.start()
    until(lambda: stage.checkpoint() == 1)
    stage.clock.advance(3600)
    stage.holding.renew()
    stage.hub.maintain()
    until(lambda: len(stage.slices) == 2, each=stage.tick)
    for _ in range(20):
        stage.tick()
    stage.put(1)
    until(lambda: stage.checkpoint() == 2, each=stage.tick)
    kinds = [[frame.kind for frame in events.frames] for events in stage.slices]
    marker = FrameKind.TIME_MARKER
    assert kinds == [[FrameKind.PLAIN], [marker], [marker, FrameKind.PLAIN]]
    assert stage.seen == [0, 1]


def test_a_failure_starts_a_new_processor_at_the_checkpoint(stage: Stage) -> None:
    failures = iter([ValueError("x"), ValueError("y")])

    def fail(_events: Slice) -> None:
        for error in failures:
            raise error

    stage.fail = fail
    stage.put(2)
    stage.pump.start()
    until(lambda: stage.checkpoint() == 2, each=stage.tick)
    assert stage.seen == [0, 1]
    assert stage.made == 3
    assert stage.closed == [CloseReason.FAILED] * 2
    assert [fields["tries"] for _, said, fields in stage.log.lines if said == "processor failed"] == [1, 2]
    assert stage.log.count("processor failed", partition=0) == 2


def test_a_hub_that_does_not_answer_costs_the_processor_nothing(stage: Stage) -> None:
    read, asked = stage.hub.read, itertools.count()

    def sometimes(partition: int, offset: str, *, bytes_max: int) -> Slice:
        if next(asked) in range(1, 6):
            raise HubUnavailable("nobody answers")
        return read(partition, offset, bytes_max=bytes_max)

    stage.hub.read = sometimes  # type: ignore[method-assign]
    stage.put()
    stage.pump.start()
    until(lambda: stage.checkpoint() == 1, each=stage.tick)
    stage.put()
    until(lambda: stage.checkpoint() == 2, each=stage.tick)
    assert (stage.made, stage.closed) == (1, []), "the processor that there was goes on"
    assert stage.log.count("hub does not answer", partition=0) == 1


def test_an_outage_of_the_hub_is_not_taken_for_a_processor_that_hangs(stage: Stage) -> None:
    def away(*_: object, **__: object) -> Slice:
        raise HubUnavailable("nobody answers")

    stage.put()
    stage.hub.read = away  # type: ignore[method-assign]
    stage.pump.start()
    begun = stage.clock.monotonic()
    until(lambda: stage.clock.monotonic() > begun + 20 * LEASE_S and stage.pump.stalled_s() < LEASE_S, each=stage.tick)


def test_a_hub_hears_of_a_parked_partition(stage: Stage) -> None:
    """A hub that is read over HTTP forgets who is silent, and with it what is kept for him."""
    asked: list[int] = []
    bounds = stage.hub.bounds

    def counted(partition: int) -> Bounds:
        asked.append(partition)
        return bounds(partition)

    stage.fail = lambda _events: {}["temperature"]
    stage.put()
    stage.pump.start()
    until(lambda: stage.pump.parked is not None, each=stage.tick)
    stage.hub.bounds = counted  # type: ignore[method-assign]
    until(lambda: len(asked) > 5, each=stage.tick)
    assert stage.pump.parked is not None


def test_what_was_trimmed_behind_the_new_owner_is_no_alarm(stage: Stage) -> None:
    """This host was paused between the look at its clock and the read."""
    stage.put(2)

    def trimmed(*_: object, **__: object) -> Slice:
        raise OffsetTrimmed("the new owner is past it", first="2")

    stage.hub.read = trimmed  # type: ignore[method-assign]
    stage.steal()
    stage.pump.start()
    until(stage.pump.ended.is_set, each=stage.tick)
    assert (stage.pump.parked, stage.log.count("partition parked")) == (None, 0)


def test_a_reader_that_is_fenced_has_lost_its_lease(stage: Stage) -> None:
    """A hub that is read over HTTP may know it sooner than the store says it. It is no fault of the processor, and parks nothing."""
    stage.put(2)
    stage.pump.start()
    until(lambda: stage.checkpoint() == 2)
    read = stage.hub.read

    def fenced(*_: object, **__: object) -> Slice:
        raise ReaderFenced("Epoch 2 reads.", last_epoch=2)

    stage.hub.read = fenced  # type: ignore[method-assign]
    until(stage.pump.ended.is_set, each=stage.tick)
    stage.hub.read = read  # type: ignore[method-assign]
    assert (stage.closed, stage.pump.parked, stage.fatal) == ([CloseReason.LEASE_LOST], None, [])
    assert stage.log.count("reader fenced", partition=0) == 1
    assert (stage.checkpoint(), stage.seen) == (2, [0, 1])


def test_a_processor_that_always_fails_is_parked(stage: Stage) -> None:
    def fail(_events: Slice) -> None:
        raise KeyError("temperature")

    stage.fail = fail
    stage.put(2)
    stage.pump.start()
    until(lambda: stage.pump.parked, each=stage.tick)
    assert stage.log.count("processor failed") == TRIES
    assert stage.pump.parked == "KeyError: 'temperature'"
    assert stage.holding.held
    assert stage.checkpoint() == 0
    assert stage.pump.offset == "0"
    assert stage.pump.stalled_s() == 0


def test_failing_later_than_the_checkpoint_is_counted_all_the_same(stage: Stage) -> None:
    """What was read between checkpoint and failure succeeds again in each try; that is no progress."""

    class Late(Recorder):
        def process(self, events: Slice) -> str | None:
            super().process(events)
            return None

    def fail(events: Slice) -> None:
        if int(events.offset) >= 1:
            raise ValueError("the second")

    stage.fail = fail
    stage.pump._factory = lambda _partition: Late(stage)
    stage.put(1)
    stage.pump.start()
    until(lambda: stage.pump.offset == "1")
    # A slice ends where the log ended when it was first read; so make the hub give one frame at a time.
    read = stage.hub.read
    stage.hub.read = lambda partition, offset, *, bytes_max: read(partition, offset, bytes_max=1)  # type: ignore[method-assign]
    stage.put(1)
    until(lambda: stage.pump.parked, each=stage.tick)
    assert stage.log.count("processor failed") == TRIES


@pytest.mark.parametrize("error", [StoreUnavailable("down"), OSError("disk full")])
def test_what_time_can_heal_is_tried_for_ever(stage: Stage, error: Exception) -> None:
    tries = 0

    def fail(_events: Slice) -> None:
        nonlocal tries
        tries += 1
        if tries <= 2 * TRIES:
            raise error

    stage.fail = fail
    stage.put(2)
    stage.pump.start()
    until(lambda: stage.checkpoint() == 2, each=stage.tick)
    assert stage.pump.parked is None
    assert stage.log.count("processor waits") == 1
    assert stage.log.count("processor goes on", after_failures=2 * TRIES) == 1


@pytest.mark.parametrize("error", [ArchiveError("chain"), FrameDamaged("crc"), OffsetTrimmed("gone")])
def test_what_the_log_says_is_wrong_parks_at_once(stage: Stage, error: PenstockError) -> None:
    def fail(_events: Slice) -> None:
        raise error

    stage.fail = fail
    stage.put(1)
    stage.pump.start()
    until(lambda: stage.pump.parked)
    assert (stage.pump.parked or "").startswith(error.code)
    assert stage.log.count("partition parked", alarm=True, partition=0) == 1
    assert stage.made == 1


def test_a_checkpoint_beyond_the_log_parks(stage: Stage) -> None:
    stage.holding.checkpoint("9", 9)
    stage.pump._offset = "9"
    stage.pump.start()
    until(lambda: stage.pump.parked)
    assert (stage.pump.parked or "").startswith("offset_beyond_end")


@pytest.mark.parametrize("error", [HubBroken("sync failed"), WrongHub("hub 2 and not 1")])
def test_a_hub_that_is_broken_or_another_is_fatal(stage: Stage, error: PenstockError) -> None:
    def fail(_events: Slice) -> None:
        raise error

    stage.fail = fail
    stage.put(1)
    stage.pump.start()
    until(stage.pump.ended.is_set)
    assert stage.fatal == [error]
    assert stage.pump.parked is None
    assert stage.closed == [CloseReason.FAILED]


def test_a_checkpoint_for_what_was_not_given_is_refused(stage: Stage) -> None:
    class Boasting(Recorder):
        def process(self, events: Slice) -> str | None:
            return str(int(events.next_offset) + 1)

    stage.pump._factory = lambda _partition: Boasting(stage)
    stage.put(1)
    stage.pump.start()
    until(lambda: stage.pump.parked, each=stage.tick)
    assert stage.checkpoint() == 0


def test_a_lost_lease_ends_the_pump_and_the_checkpoint_stays(stage: Stage) -> None:
    inside, go_on = threading.Event(), threading.Event()

    def fail(_events: Slice) -> None:
        inside.set()
        assert go_on.wait(10)

    stage.fail = fail
    stage.put(2)
    stage.pump.start()
    assert inside.wait(10)
    stage.clock.advance(2 * LEASE_S)
    stage.steal()
    go_on.set()
    until(stage.pump.ended.is_set)
    assert stage.checkpoint() == 0
    assert stage.closed == [CloseReason.LEASE_LOST]


def test_reading_pauses_while_the_lease_is_in_doubt(stage: Stage) -> None:
    stage.fault = Fault.NOTHING_DONE
    stage.clock.advance(LEASE_S * 0.9)
    assert stage.holding.in_doubt(LEASE_S)
    stage.put(1)
    stage.pump.start()
    for _ in range(20):
        stage.clock.advance(0.2)
    assert stage.slices == []
    stage.fault = None
    stage.holding.renew()
    until(lambda: stage.checkpoint() == 1, each=stage.tick)


def test_a_checkpoint_that_the_store_did_not_take_is_written_later(stage: Stage) -> None:
    stage.fail = lambda _events: setattr(stage, "fault", Fault.NOTHING_DONE)
    stage.put(1)
    stage.pump.start()
    until(lambda: stage.log.count("checkpoint waits for the store"))
    stage.clock.advance(0.2)
    assert stage.checkpoint() == 0
    stage.fault = None
    until(lambda: stage.checkpoint() == 1, each=stage.tick)
    assert stage.seen == [0]


def test_no_progress_is_seen_and_idleness_is_not_taken_for_it(stage: Stage) -> None:
    inside, go_on = threading.Event(), threading.Event()

    def fail(_events: Slice) -> None:
        inside.set()
        assert go_on.wait(10)

    stage.fail = fail
    stage.pump.start()
    for _ in range(5):
        stage.clock.advance(1)
        stage.holding.renew()
        until(lambda: stage.pump.stalled_s() == 0)
    stage.put(1)
    until(inside.is_set, each=stage.tick)
    stage.clock.advance(100)
    assert stage.pump.stalled_s() >= 100
    stage.holding.renew()
    go_on.set()
    until(lambda: stage.pump.stalled_s() == 0)


def test_a_failing_close_is_logged(stage: Stage) -> None:
    class Clinging(Recorder):
        def close(self, reason: CloseReason) -> None:
            raise RuntimeError("no")

    stage.pump._factory = lambda _partition: Clinging(stage)
    stage.put(1)
    stage.pump.start()
    until(lambda: stage.checkpoint() == 1)
    stage.pump.stop(CloseReason.SHUTDOWN)
    until(stage.pump.ended.is_set)
    assert stage.log.count("processor failed to close") == 1
