"""The fakes keep the promises of what they stand for; tests that use them stand on this."""

from __future__ import annotations

import threading

import pytest

from penstock.blobs import Created
from penstock.errors import (
    BlobNotFound,
    NumberReused,
    NumberTooOld,
    OffsetBeyondEnd,
    OffsetTrimmed,
    ProducerFenced,
    StoreUnavailable,
)
from penstock.events import Appended, Batch, FrameKind, Group
from penstock.testing import FakeClock, Fault, FaultyBlobs, MemoryBlobs, MemoryHub
from penstock.wire.frame import content

LINE = b'{"deviceId":"d"}'


def batch(sequence: int, *, epoch: int = 1, sha256: bytes = b"s" * 32) -> Batch:
    group = Group(0, 1, LINE + b"\n")
    return Batch("p", epoch, sequence, 1, (group,), retry_safe=True, sha256=sha256)


def test_the_clock_jumps_for_one_thread() -> None:
    clock = FakeClock(1000, jumps=True)
    event = threading.Event()
    assert not clock.wait(event, 5)
    assert (clock.now_ms(), clock.monotonic()) == (6000, 5)
    event.set()
    assert clock.wait(event, 5)
    assert clock.monotonic() == 5
    clock.step(-3)
    assert (clock.now_ms(), clock.monotonic()) == (3000, 5)


def test_the_clock_blocks_among_threads() -> None:
    clock, event = FakeClock(), threading.Event()
    answers: list[bool] = []
    waiting = threading.Thread(target=lambda: answers.append(clock.wait(event, 5)))
    waiting.start()
    clock.advance(4)
    assert answers == []
    while waiting.is_alive():
        clock.advance(1)
        waiting.join(0.01)
    assert answers == [False]


def test_reading_goes_by_whole_frames() -> None:
    hub = MemoryHub()
    assert hub.put(0, [LINE] * 3) == 0
    assert hub.put(0, [LINE] * 1000) == 3
    read = hub.read(0, "1", bytes_max=1)
    assert [(frame.first, frame.next, frame.kind) for frame in read.frames] == [(0, 3, FrameKind.PLAIN)]
    assert (read.next_offset, read.end_offset) == ("3", "1003")
    read = hub.read(0, "3", bytes_max=1)
    assert read.frames[0].kind is FrameKind.GZIP
    assert content(read.frames[0]) == (LINE + b"\n") * 1000
    assert hub.read(0, "1003", bytes_max=1).frames == []
    with pytest.raises(OffsetBeyondEnd):
        hub.read(0, "1004", bytes_max=1)
    hub.trim(0, before="4")
    assert hub.bounds(0).first == 3
    with pytest.raises(OffsetTrimmed):
        hub.read(0, "2", bytes_max=1)


def test_time_never_goes_back_and_markers_close_what_is_open() -> None:
    clock = FakeClock(3_600_000 * 10)
    hub = MemoryHub(2, clock=clock)
    hub.put(0, [LINE])
    clock.step(-60)
    hub.put(0, [LINE])
    first, second = hub.read(0, "0", bytes_max=1 << 20).frames
    assert second.enqueued_at_ms == first.enqueued_at_ms
    hub.maintain()
    assert hub.read(0, "2", bytes_max=1).frames == []
    clock.step(7200)
    hub.maintain()
    hub.maintain()
    assert hub.cut() == ["2", "0"]
    assert [frame.kind for frame in hub.read(0, "2", bytes_max=1).frames] == [FrameKind.TIME_MARKER]
    assert hub.locate(0, 3_600_000 * 11) == "2"
    hub.put(0, [LINE])
    assert hub.cut() == ["3", "0"]
    kinds = [frame.kind for frame in hub.read(0, "2", bytes_max=1 << 20).frames]
    assert kinds == [FrameKind.TIME_MARKER, FrameKind.PLAIN, FrameKind.CUT_MARKER]


def test_numbers_of_producers() -> None:
    hub = MemoryHub()
    first, again = hub.append([batch(1), batch(1)])
    assert (first, again) == (Appended(1, False), Appended(1, True))
    assert isinstance(hub.append([batch(1, sha256=b"t" * 32)])[0], NumberReused)
    hub.append([batch(sequence) for sequence in range(2, 7)])
    assert isinstance(hub.append([batch(1)])[0], NumberTooOld)
    assert hub.append([batch(1, epoch=2)]) == [Appended(1, False)]
    assert isinstance(hub.append([batch(7)])[0], ProducerFenced)
    assert hub.bounds(0).next == 7


@pytest.mark.parametrize("fault", [Fault.NOTHING_DONE, Fault.DONE, Fault.LATE])
def test_a_faulty_store(fault: Fault) -> None:
    faults = iter([fault])
    inner = MemoryBlobs()
    store = FaultyBlobs(inner, lambda _operation, _name: next(faults, None), late_by=2)
    with pytest.raises(StoreUnavailable):
        store.create("a", b"x", id="x")
    assert bool([blob.name for blob in inner.list("")]) == (fault is Fault.DONE)
    if fault is Fault.LATE:
        with pytest.raises(BlobNotFound):
            store.get("a")
        assert store.get("a").body == b"x"


def test_a_late_write_keeps_its_condition() -> None:
    faults = iter([Fault.LATE])
    store = FaultyBlobs(MemoryBlobs(), lambda _operation, _name: next(faults, None), late_by=100)
    with pytest.raises(StoreUnavailable):
        store.create("a", b"x", id="x")
    assert isinstance(store.create("a", b"y", id="y"), Created)
    store.land()
    assert store.get("a").body == b"y"


def test_a_stale_listing() -> None:
    faults = {3: Fault.STALE}
    count = 0

    def plan(_operation: str, _name: str) -> Fault | None:
        nonlocal count
        count += 1
        return faults.get(count)

    store = FaultyBlobs(MemoryBlobs(), plan)
    assert [blob.name for blob in store.list("")] == []
    store.create("a", b"x", id="x")
    assert [blob.name for blob in store.list("")] == []
    assert [blob.name for blob in store.list("")] == ["a"]
