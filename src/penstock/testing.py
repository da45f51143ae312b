"""Fakes to test processors and everything else with: a clock that jumps, stores and files that fail, a hub in memory.

hub = MemoryHub(partitions=2)
hub.put(0, [b'{"deviceId":"d-1","temperature":21.4}'])
with EventProcessorHost(hub, store=MemoryBlobs(), group="alarms", log=MemoryLog()) as host:
    host.start(Alarm)
"""

from __future__ import annotations

import contextlib
import enum
import functools
import io
import os
import random
import threading
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from operator import attrgetter, itemgetter
from typing import Any, BinaryIO, TypeVar

from penstock.blobs import Blob, BlobStore, Created, Exists, Listed
from penstock.blobs.disk import check_name
from penstock.clock import Clock
from penstock.errors import (
    BlobNotFound,
    LostRace,
    OffsetBeyondEnd,
    OffsetTrimmed,
    StoreError,
    StoreUnavailable,
)
from penstock.events import Appended, Batch, Bounds, Frame, FrameKind, Group, Slice
from penstock.files import Files
from penstock.hub import Refused
from penstock.hub.producers import Producer, judge, remember
from penstock.wire.draft import drafts
from penstock.wire.frame import FRAME_BYTES_MAX
from penstock.wire.frame import decode as decode_frame

T = TypeVar("T")


class FakeClock:
    """Time stands still until it is told to move. `wait` of a single thread moves it (`jumps`); among several threads it
    blocks until the event is set or another thread's `advance` has brought the time."""

    def __init__(self, now_ms: int = 1_795_356_000_000, *, jumps: bool = False) -> None:
        self._now_ms = now_ms
        self._jumps = jumps
        self._elapsed_s = 0.0
        self._lock = threading.Lock()

    def now_ms(self) -> int:
        return self._now_ms + round(self._elapsed_s * 1000)

    def monotonic(self) -> float:
        return self._elapsed_s

    def advance(self, seconds: float) -> None:
        """Both clocks move on."""
        with self._lock:
            self._elapsed_s += seconds

    def step(self, seconds: float) -> None:
        """Only the wall clock is set, forward or back."""
        with self._lock:
            self._now_ms += round(seconds * 1000)

    def wait(self, event: threading.Event, timeout_s: float) -> bool:
        until = self._elapsed_s + timeout_s
        if self._jumps and not event.is_set():
            self.advance(timeout_s)
        while not event.is_set():
            if self._elapsed_s >= until:
                return False
            event.wait(0.002)
        return True


class MemoryLog:
    """Keeps log lines as `(level, sentence, fields)`."""

    def __init__(self) -> None:
        self.lines: list[tuple[str, str, dict[str, Any]]] = []

    def info(self, event: str, **fields: Any) -> None:
        self.lines.append(("info", event, fields))

    def warning(self, event: str, **fields: Any) -> None:
        self.lines.append(("warning", event, fields))

    def error(self, event: str, **fields: Any) -> None:
        self.lines.append(("error", event, fields))

    def count(self, event: str, **fields: Any) -> int:
        """How often a sentence was logged with these fields."""
        return sum(said == event and fields.items() <= given.items() for _, said, given in self.lines.copy())


class MemoryBlobs:
    """A BlobStore in a dictionary."""

    def __init__(self) -> None:
        self._blobs: dict[str, Blob] = {}
        self._writes = 0
        self._lock = threading.Lock()

    def create(self, name: str, body: bytes, *, id: str) -> Created | Exists:
        with self._lock:
            there = self._blobs.get(check_name(name))
            return Exists(there) if there else Created(self._write(name, body))

    def replace(self, name: str, body: bytes, *, etag: str, id: str) -> str:
        with self._lock:
            if self._there(name).etag != etag:
                raise LostRace(f"{name} was changed by another", blob=name)
            return self._write(name, body)

    def put(self, name: str, body: BinaryIO) -> None:
        whole = body.read()
        with self._lock:
            self._write(check_name(name), whole)

    def get(self, name: str) -> Blob:
        with self._lock:
            return self._there(name)

    def size(self, name: str) -> int:
        return len(self.get(name).body)

    def stream(self, name: str) -> Iterator[bytes]:
        body = self.get(name).body
        return (body[at : at + (1 << 20)] for at in range(0, len(body), 1 << 20))

    def list(self, prefix: str) -> Iterator[Listed]:
        with self._lock:
            found = sorted(((n, blob) for n, blob in self._blobs.items() if n.startswith(prefix)), key=itemgetter(0))
        return iter([Listed(name, len(blob.body), blob.etag) for name, blob in found])

    def delete(self, name: str) -> None:
        with self._lock:
            self._blobs.pop(check_name(name), None)

    def _there(self, name: str) -> Blob:
        try:
            return self._blobs[check_name(name)]
        except KeyError:
            raise BlobNotFound(f"there is no blob {name}", blob=name) from None

    def _write(self, name: str, body: bytes) -> str:
        self._writes += 1
        self._blobs[name] = Blob(body, str(self._writes), str(self._writes))
        return str(self._writes)


class Fault(enum.Enum):
    """What goes wrong with one operation of a store."""

    NOTHING_DONE = "StoreUnavailable, and nothing was done"
    DONE = "StoreUnavailable, although it was done"
    LATE = "StoreUnavailable, and it is done some operations later if its condition still holds then"
    STALE = "the last listing of this prefix"


class FaultyBlobs:
    """A BlobStore with faults: `plan(operation, name)` says which, None for none.

    Operations are `create`, `replace`, `put`, `delete` (writes) and `get`, `size`, `stream`, `list`.
    """

    def __init__(self, store: BlobStore, plan: Callable[[str, str], Fault | None], *, late_by: int = 3) -> None:
        self._store = store
        self._plan = plan
        self._late_by = late_by
        self._late: list[tuple[int, Callable[[], object]]] = []
        self._count = 0
        self._listings: dict[str, list[Listed]] = {}
        self._lock = threading.RLock()

    @classmethod
    def random(cls, store: BlobStore, *, seed: int, rate: float) -> FaultyBlobs:
        """Each operation fails with probability `rate`, in any way. The same seed gives the same faults."""
        source = random.Random(seed)
        return cls(store, lambda _operation, _name: source.choice(list(Fault)) if source.random() < rate else None)

    def land(self) -> None:
        """Do all late writes now."""
        with self._lock:
            late, self._late = self._late, []
            for _, write in late:
                with contextlib.suppress(StoreError):  # its condition may not hold any more
                    write()

    def create(self, name: str, body: bytes, *, id: str) -> Created | Exists:
        return self._write("create", name, lambda: self._store.create(name, body, id=id))

    def replace(self, name: str, body: bytes, *, etag: str, id: str) -> str:
        return self._write("replace", name, lambda: self._store.replace(name, body, etag=etag, id=id))

    def put(self, name: str, body: BinaryIO) -> None:
        whole = body.read()
        self._write("put", name, lambda: self._store.put(name, io.BytesIO(whole)))

    def get(self, name: str) -> Blob:
        self._read("get", name)
        return self._store.get(name)

    def size(self, name: str) -> int:
        self._read("size", name)
        return self._store.size(name)

    def stream(self, name: str) -> Iterator[bytes]:
        self._read("stream", name)
        return self._store.stream(name)

    def list(self, prefix: str) -> Iterator[Listed]:
        if self._read("list", prefix) is not Fault.STALE or prefix not in self._listings:
            self._listings[prefix] = list(self._store.list(prefix))
        return iter(self._listings[prefix])

    def delete(self, name: str) -> None:
        self._write("delete", name, lambda: self._store.delete(name))

    def _write(self, operation: str, name: str, write: Callable[[], T]) -> T:
        with self._lock:
            fault = self._next(operation, name)
            if fault in (None, Fault.STALE):
                return write()
            if fault is Fault.DONE:
                write()
            if fault is Fault.LATE:
                self._late.append((self._count + self._late_by, write))
            raise StoreUnavailable(f"{operation} {name}: made to fail", blob=name)

    def _read(self, operation: str, name: str) -> Fault | None:
        with self._lock:
            fault = self._next(operation, name)
            if fault not in (None, Fault.STALE):
                raise StoreUnavailable(f"{operation} {name}: made to fail", blob=name)
            return fault

    def _next(self, operation: str, name: str) -> Fault | None:
        self._count += 1
        due = [write for at, write in self._late if at <= self._count]
        self._late = [(at, write) for at, write in self._late if at > self._count]
        for write in due:
            with contextlib.suppress(StoreError):  # its condition may not hold any more
                write()
        return self._plan(operation, name)


class FaultyFiles(Files):
    """Files of which the n-th system call (from 1) raises OSError with a given errno, once; and short writes.

    `calls` names what was called: `open_new`, `write`, `write_at`, `fsync`, `link`, `link_open`, `rename`, `unlink`, `mkdir`, `flock`. A
    `write` that fails has written half of its bytes, as when a disk fills up.
    """

    def __init__(self, failing: dict[int, int] | None = None, *, write_bytes_max: int | None = None) -> None:
        self.calls: list[str] = []
        self._failing = failing or {}
        self._write_bytes_max = write_bytes_max
        for name in ("open_new", "write_at", "fsync", "link", "link_open", "rename", "unlink", "mkdir", "flock"):
            setattr(self, f"_{name}", functools.partial(self._call, name, getattr(self, f"_{name}")))

    def _write(self, fd: int, body: memoryview) -> int:
        part, half, write = body[: self._write_bytes_max], body[: len(body) // 2], super()._write
        return self._call("write", write, fd, part, otherwise=lambda: write(fd, half))

    def _call(self, name: str, call: Callable[..., T], *args: object, otherwise: Callable[[], object] = bool) -> T:
        self.calls.append(name)
        number = self._failing.get(len(self.calls))
        if number is not None:
            otherwise()
            raise OSError(number, os.strerror(number))
        return call(*args)


class MemoryHub:
    """A Hub in memory with the semantics of the embedded one: dense numbers, times that never decrease, markers, duplicates."""

    def __init__(self, partitions: int = 1, *, clock: Clock | None = None, period_s: int = 3600) -> None:
        self.id, self.place_bits = "0" * 32, 0
        self.period_s = period_s
        self._clock = clock or FakeClock()
        self._logs: list[list[Frame]] = [[] for _ in range(partitions)]
        self._ends = [0] * partitions
        self._floor_ms = 0
        self._producers: dict[str, Producer] = {}
        self._puts = 0
        self._lock = threading.Lock()

    def partitions(self) -> int:
        return len(self._logs)

    def put(self, partition: int, lines: Sequence[bytes]) -> int:
        """Append events as one frame, lines as they are; the sequence number of the first."""
        ndjson = b"".join(line + b"\n" for line in lines)
        group = Group(partition, len(lines), ndjson)
        with self._lock:
            first = self._ends[partition]
            self._puts += 1
            self._add(Batch("test", 1, self._puts, len(lines), (group,)), self._now_ms())
            return first

    def append(self, batches: Sequence[Batch]) -> Sequence[Appended | Refused]:
        with self._lock:
            at_ms = self._now_ms()
            return [self._judged(batch, at_ms) for batch in batches]

    def read(self, partition: int, offset: str, *, bytes_max: int) -> Slice:
        start = int(offset)
        with self._lock:
            log, end = self._logs[partition], self._ends[partition]
            if start > end:
                raise OffsetBeyondEnd(
                    f"offset {start} of partition {partition} lies beyond the end, {end}", end=str(end)
                )
            if start < (first := self._first(partition)):
                raise OffsetTrimmed(f"offset {start} of partition {partition} was trimmed", first=str(first))
            frames: list[Frame] = []
            size = 0
            at = bisect_left(log, start, key=attrgetter("first"))
            if at and log[at - 1].next > start:
                at -= 1
            for frame in log[at:]:
                size += len(frame.body)
                if size > bytes_max and any(not f.is_marker for f in frames):
                    break
                frames.append(frame)
            reached = max((frame.next for frame in frames), default=start)
            return Slice(partition, offset, frames, str(reached), str(end))

    def bounds(self, partition: int) -> Bounds:
        with self._lock:
            log = self._logs[partition]
            size = sum(len(frame.body) for frame in log)
            first_ms = log[0].enqueued_at_ms if log else self._floor_ms
            return Bounds(self._first(partition), self._ends[partition], size, first_ms, self._floor_ms)

    def locate(self, partition: int, at_ms: int) -> str:
        with self._lock:
            found = (frame.first for frame in self._logs[partition] if frame.enqueued_at_ms >= at_ms)
            return str(next(found, self._ends[partition]))

    def cut(self) -> Sequence[str]:
        with self._lock:
            at_ms = self._now_ms()
            for partition in range(len(self._logs)):
                self._mark(partition, FrameKind.CUT_MARKER, at_ms)
            return [str(end) for end in self._ends]

    def maintain(self, *, expire: bool = True) -> None:
        """Time markers for the partitions whose last events are of an earlier period."""
        with self._lock:
            at_ms = self._now_ms()
            for partition in range(len(self._logs)):
                self._mark(partition, FrameKind.TIME_MARKER, at_ms)

    def trim(self, partition: int, *, before: str) -> None:
        with self._lock:
            log, limit, end = self._logs[partition], int(before), self._ends[partition]
            while log and log[0].next <= limit and not (log[0].is_marker and log[0].first == end):
                del log[0]

    def _now_ms(self) -> int:
        self._floor_ms = max(self._floor_ms, self._clock.now_ms())
        return self._floor_ms

    def _judged(self, batch: Batch, at_ms: int) -> Appended | Refused:
        known = self._producers.get(batch.producer)
        if batch.retry_safe and (answer := judge(known, batch)) is not None:
            return answer
        ranges = self._add(batch, at_ms)
        if batch.retry_safe:
            self._producers[batch.producer] = remember(known, batch, at_ms, ranges)
        return Appended(batch.accepted, duplicate=False)

    def _add(self, batch: Batch, at_ms: int) -> list[tuple[int, int, int]]:
        ranges = []
        for draft in drafts([batch], frame_bytes_max=FRAME_BYTES_MAX):
            first = self._ends[draft.partition]
            frame = decode_frame(draft.placed(first, at_ms))
            self._logs[draft.partition].append(frame)
            self._ends[draft.partition] = frame.next
            ranges.append((draft.partition, first, frame.next))
        return ranges

    def _mark(self, partition: int, kind: FrameKind, at_ms: int) -> None:
        log, period_ms = self._logs[partition], self.period_s * 1000
        if log and not log[-1].is_marker:
            older = log[-1].enqueued_at_ms // period_ms < at_ms // period_ms
            if kind is FrameKind.CUT_MARKER or older:
                log.append(Frame(kind, partition, self._ends[partition], 0, at_ms, 0, 0, b""))

    def _first(self, partition: int) -> int:
        log = self._logs[partition]
        return log[0].first if log else self._ends[partition]
