"""Feeds the lines of files through the lanes of a spool to the hub: `penstock send`.

Each lane has two threads: one seals the lines that it is handed as a batch of the spool, the other posts. The first is never more than
one batch ahead, so little lies in the spool. A batch says which lines of which file it holds, and the lane's durable state says up to
which line they are sealed. So whoever dies in between, the next `Feed` of this spool sends what was sealed under its old number,
skips as many lines of the file as each lane has taken, and goes on behind them.

A file is known by its path, size and time of change, and by the device field, which decides about the lane of a line. One that
was begun and is another now is refused: it cannot be said which of its lines are taken.
"""

from __future__ import annotations

import contextlib
import queue
import random
import secrets
import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Protocol

import msgspec

from penstock.client.lane import COMPLETE, Lane
from penstock.client.records import RAW_BYTES_MAX, Zip, file_of, gzipped, source_of
from penstock.client.sending import Board, Rejected, Sender, Stats, headers_of
from penstock.client.spool import LaneOf, Spool
from penstock.client.transport import Transport
from penstock.clock import Clock
from penstock.errors import FileChanged, GaveUp, SettingsError
from penstock.files import Files

STDIN = "-"
_WAITING_MAX, _AHEAD = 1, 1
_LOOK_S = 0.2
_READ_BYTES = 256 << 10


class _Part(msgspec.Struct, frozen=True, gc=False):
    source: str
    lines: Sequence[bytes]
    numbers: Sequence[int]


class _Belt:
    """A lane's way from lines to answers, in two threads: one seals the parts that it is handed, the other posts. `open`: more may come."""

    def __init__(self, lane: Lane, sender: Sender, is_open: bool) -> None:
        self.lane = lane
        self.sender = sender
        self.open = is_open
        self.parts: queue.Queue[_Part | None] = queue.Queue(_WAITING_MAX)
        self.room = threading.Event()


class Readable(Protocol):
    def read1(self, size: int = -1, /) -> bytes: ...


class Feed:
    """`begin`, `add`, `end` and `finish` are for one thread. What a lane failed with is raised by all of them."""

    def __init__(
        self,
        folder: Path,
        connect: Callable[[], Transport],
        *,
        lanes: int,
        device_field: str,
        batch_events: int,
        timeout_s: float,
        on_rejected: Callable[[Rejected], None],
        clock: Clock,
        files: Files,
        reading: Collection[str] = (),
        zipped: Zip = gzipped,
    ) -> None:
        """`reading`: the files that will be given, as `Path.resolve` names them."""
        transports = [connect()]  # raises SettingsError for an address that cannot be one, before anything is touched
        self._spool = spool = Spool(
            folder,
            files,
            lanes=lanes,
            device_field=device_field,
            now_ms=clock.now_ms,
            new_producer=lambda: f"send-{secrets.token_hex(8)}",
            reading=reading,
        )
        self._board = Board(on_rejected, clock, lambda: spool.events)
        self._zipped = zipped
        self._device_field = device_field
        self._batch_events = batch_events
        self._timeout_s = timeout_s
        self._clock = clock
        self._stop = threading.Event()
        self._failure: BaseException | None = None
        self._lane_of = LaneOf(device_field, len(spool.lanes))
        self._lines: list[list[bytes]] = [[] for _ in spool.lanes]
        self._numbers: list[list[int]] = [[] for _ in spool.lanes]
        self._sources: list[str] = []
        self._source = ""
        self._skip = [0] * len(spool.lanes)
        self._skipped = 0
        self._forget_ended()
        headers = headers_of(device_field)
        self._belts: list[_Belt] = []
        self._threads: list[threading.Thread] = []
        for number, lane in enumerate((*spool.lanes, *spool.left)):
            while lane.seal():
                continue
            transport = transports.pop() if transports else connect()
            sender = Sender(lane, transport, self._board, clock, random.random, headers)
            belt = _Belt(lane, sender, number < len(spool.lanes))
            self._belts.append(belt)
            self._add_thread(self._send, belt, f"send-{number}")
            if belt.open:
                self._add_thread(self._seal, belt, f"seal-{number}")
        for thread in self._threads:
            thread.start()

    def _add_thread(self, run: Callable[[_Belt], None], belt: _Belt, name: str) -> None:
        self._threads.append(threading.Thread(target=self._watched, args=(run, belt), name=name, daemon=True))

    @property
    def lanes(self) -> int:
        """How many there are: not those asked for, where the spool is being used with others."""
        return len(self._spool.lanes)

    @property
    def skipped(self) -> int:
        """Lines that an earlier process has taken."""
        return self._skipped

    def _forget_ended(self) -> None:
        lanes = self._spool.lanes
        for lane in reversed(lanes):
            # What came through a pipe comes from the beginning, if it comes again.
            complete = lanes[0].taken
            lane.forget([one for one in lane.taken if file_of(one) == STDIN or complete.get(one) == COMPLETE])

    def source(self, file: str) -> str:
        """The name under which the lanes know a file, or `STDIN`. Raises FileChanged, SettingsError, OSError."""
        if file == STDIN:
            return source_of(file, secrets.token_hex(8))
        path = Path(file).resolve()
        about = path.stat()
        if (other_set := self._spool.begun_elsewhere(str(path))) is not None:
            raise SettingsError(
                f"{file} was begun in another set of the spool, {other_set}, which knows the lines that were taken. Nothing of it was "
                f"taken now. If a process uses that set (its pid is in {other_set / 'lock'}), let it end first; else give this file alone."
            )
        try:
            str(path).encode()
        except UnicodeEncodeError:
            raise SettingsError(
                f"The name of {file!r} is no UTF-8, and the spool cannot write it down. Nothing was sent."
            ) from None
        source = source_of(str(path), f"{about.st_size}:{about.st_mtime_ns}:{self._device_field}")
        for lane in self._spool.lanes:
            for other, line in lane.taken.items():
                if file_of(other) == str(path) and other != source:
                    raise FileChanged(
                        f"{file} was being sent from the spool in {self._spool.folder}, up to about line {line}, and is another since: its "
                        "content, its time of change or --device-field. Nothing of it was taken now. Make it what it was to go on behind "
                        "that line, or send it by another name or with another --spool to send all of it."
                    )
        return source

    def begin(self, source: str) -> None:
        """What is added from now on are lines of this source."""
        self._source = source
        self._skip = [lane.taken.get(self._source, 0) for lane in self._spool.lanes]
        self._sources.append(self._source)

    def add(self, lines: Sequence[bytes], first: int) -> None:
        """Take lines without their line feeds; `first` is the first one's number, from 1. Waits while a lane is full."""
        numbers: Sequence[int] = range(first, first + len(lines))
        lines = [line.strip(b" \t\r") for line in lines]
        if not all(lines):
            numbers = [number for number, line in zip(numbers, lines, strict=True) if line]
            lines = [line for line in lines if line]
        lanes = self._lane_of.each(lines)
        for lane, line, number in zip(lanes, lines, numbers, strict=True):
            if number > self._skip[lane]:
                self._lines[lane].append(line)
                self._numbers[lane].append(number)
            else:
                self._skipped += 1
        for lane in range(self.lanes):
            self._hand_full(lane)

    def reject(self, number: int, code: str, detail: str) -> None:
        """Count a line that cannot even be sent."""
        if number > self._skip[0]:
            self._board.settled(0, False, [Rejected(b"", code, detail, f"{file_of(self._source)}:{number}")])

    def end(self) -> None:
        """The file ends."""
        for lane in range(self.lanes):
            self._hand(lane, len(self._lines[lane]))

    def finish(self) -> None:
        """Returns when the hub has answered for all."""
        for belt in self._belts[: self.lanes]:
            self._put(belt.parts, None)
        while any(thread.is_alive() for thread in self._threads):
            self._check()
            self._wait()
        self._check()

    def forget(self) -> None:
        """After `finish`, and after somebody was told: who gives a file again wants to have it sent again.

        All lanes must forget all sources or none, so first one of them says that they are complete.
        """
        first, *others = self._spool.lanes
        first.complete(self._sources)
        for lane in (*others, first):
            lane.forget(self._sources)

    def stats(self) -> Stats:
        """Counts since the beginning."""
        spool = self._spool
        return self._board.stats(0, spool.events, spool.bytes, spool.quarantined)

    def close(self, within_s: float) -> None:
        """Send nothing more; an answer that is under way gets so long. What is in the spool stays there."""
        self._stop.set()
        for belt in self._belts:
            belt.sender.wake.set()
            belt.room.set()
            with contextlib.suppress(queue.Full):
                belt.parts.put_nowait(None)
        until = self._clock.monotonic() + within_s
        for thread in self._threads:
            thread.join(max(0.0, until - self._clock.monotonic()))
        for belt in self._belts:
            belt.sender.abandon()
        self._spool.close()

    def _hand_full(self, lane: int) -> None:
        """Whole batches of a lane: of so many events, or of as many bytes as there may be in one."""
        lines = self._lines[lane]
        while lines:
            count = min(len(lines), self._batch_events)
            size = sum(map(len, lines[:count])) + count
            while size > RAW_BYTES_MAX and count > 1:
                count -= 1
                size -= len(lines[count]) + 1
            if count < self._batch_events and count == len(lines):
                return
            self._hand(lane, count)

    def _hand(self, lane: int, count: int) -> None:
        lines, numbers = self._lines[lane], self._numbers[lane]
        if count:
            self._put(self._belts[lane].parts, _Part(self._source, lines[:count], numbers[:count]))
            del lines[:count], numbers[:count]

    def _put(self, waiting: queue.Queue[_Part | None], part: _Part | None) -> None:
        while True:
            self._check()
            try:
                return waiting.put(part, timeout=_LOOK_S)
            except queue.Full:
                continue

    def _wait(self) -> None:
        self._clock.wait(self._board.changed, _LOOK_S)
        self._board.changed.clear()

    def _check(self) -> None:
        if self._failure is not None:
            raise self._failure
        silent_s = self._clock.monotonic() - self._board.settled_at
        if silent_s > self._timeout_s and self._board.why:
            raise GaveUp(f"Nothing was taken for {silent_s:.0f} s. The last answer: {self._board.why}")

    def _watched(self, run: Callable[[_Belt], None], belt: _Belt) -> None:
        """A thread."""
        try:
            run(belt)
        except BaseException as error:
            self._failure = self._failure or error
        finally:
            self._board.changed.set()

    def _over(self) -> bool:
        return self._stop.is_set() or self._failure is not None

    def _seal(self, belt: _Belt) -> None:
        try:
            while (part := belt.parts.get()) is not None:
                while belt.lane.sealed > _AHEAD and not self._over():
                    self._clock.wait(belt.room, _LOOK_S)
                    belt.room.clear()
                if self._over():
                    return
                if not self._spool.events:
                    # The time in which there was nothing to send is no time in which nothing was taken.
                    self._board.begin()
                belt.lane.put(part.lines, part.source, part.numbers, self._zipped)
                belt.sender.wake.set()
        finally:
            belt.open = False
            belt.sender.wake.set()

    def _send(self, belt: _Belt) -> None:
        sender = belt.sender
        try:
            while not self._stop.is_set():
                more = belt.open
                wait_s = sender.step()
                belt.room.set()
                if wait_s is None and not more:
                    return
                if wait_s is None:
                    self._clock.wait(sender.wake, _LOOK_S)
                    sender.wake.clear()
                elif wait_s:
                    self._clock.wait(self._stop, wait_s)
        finally:
            sender.close()


def lines_of(stream: Readable) -> Iterator[tuple[int, Sequence[bytes] | None]]:
    """The lines of a stream, many at a time, and the number of the first. One of more than RAW_BYTES_MAX is None."""
    number, rest, too_long = 1, b"", False
    while chunk := stream.read1(_READ_BYTES):
        lines = chunk.split(b"\n")
        if too_long and len(lines) == 1:
            continue
        if too_long:
            number, too_long = number + 1, False
            del lines[0]
        else:
            lines[0] = rest + lines[0]
        rest = lines.pop()
        if lines:
            yield number, lines
        number += len(lines)
        if len(rest) > RAW_BYTES_MAX:
            yield number, None
            rest, too_long = b"", True
    if rest:
        yield number, [rest]
