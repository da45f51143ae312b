"""Sends lines in lanes. A device is always in the same lane, and a lane has one batch in flight, so its order is kept.

Each lane is a producer of its own: a batch keeps its bytes and its number through all retries, so the hub stores it once
(guarantees.md, Producers). Nothing is kept on disk: what was not answered when the process dies was perhaps not stored.

Memory is bounded: a lane holds the batch it sends, `_SEALED_MAX` that wait, and one that is being filled.
"""

from __future__ import annotations

import hashlib
import queue
import threading
import zlib
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec

from penstock.client.transport import Answer, Transport
from penstock.clock import Clock
from penstock.errors import BatchRefused, HubUnavailable, PenstockError

_SEALED_MAX = 2
_ZIPPED_BYTES_MAX = 900 * 1024
RAW_BYTES_MAX = 8 * 1024 * 1024
_BACKOFF_FIRST_S = 0.2
_BACKOFF_MOST_S = 10.0
_NEW_PRODUCER = ("number_reused", "number_too_old", "producer_fenced")


def _codes(error: type[BatchRefused]) -> set[str]:
    return {error.code}.union(*(_codes(below) for below in error.__subclasses__()))


# Only what Penstock itself says for good ends a batch; a proxy's 404 does not.
_FINAL = frozenset(_codes(BatchRefused))


class Place(msgspec.Struct, frozen=True, gc=False):
    """Where a line came from: file and line number from 1."""

    file: str
    line: int


class Rejected(msgspec.Struct, frozen=True):
    """An event that the API will never take, and why."""

    place: Place
    code: str
    detail: str


class Summary(msgspec.Struct):
    """What became of the events that were added; `duplicates` are accepted ones that the hub had stored before."""

    accepted: int = 0
    rejected: int = 0
    duplicates: int = 0


class GaveUp(PenstockError):
    """No batch was answered for the whole timeout, or the API cannot be talked to."""

    code = "gave_up"
    title = "Gave up"


class _Part(msgspec.Struct, frozen=True):
    lines: Sequence[bytes]
    places: Sequence[Place]


class _Rejection(msgspec.Struct):
    index: int
    code: str = ""
    detail: str = ""


class _Reply(msgspec.Struct):
    """A 200, or a problem: only what is looked at."""

    batch: str = ""
    accepted: int = 0
    duplicate: bool = False
    rejected: list[_Rejection] = []
    code: str = ""
    detail: str = ""
    retryable: bool | None = None


class _Refused(msgspec.Struct, frozen=True):
    """A problem that repeating the same bytes cannot solve."""

    status: int
    code: str
    detail: str


class Progress:
    """Shared by the lanes: counts, the first failure, and when the API last answered."""

    def __init__(self, clock: Clock, timeout_s: float, on_rejected: Callable[[Rejected], None]) -> None:
        self.stop = threading.Event()
        self._lock = threading.Lock()
        self._clock = clock
        self._timeout_s = timeout_s
        self._last = clock.monotonic()
        self._on_rejected = on_rejected
        self._summary = Summary()
        self._failure: Exception | None = None

    def answered(self, accepted: int, duplicate: bool, rejected: Sequence[Rejected]) -> None:
        with self._lock:
            self._last = self._clock.monotonic()
            self._summary.accepted += accepted
            self._summary.duplicates += accepted if duplicate else 0
            self._summary.rejected += len(rejected)
            for one in rejected:
                self._on_rejected(one)

    def pause(self, seconds: float, why: str) -> None:
        """Wait before a retry. Raises GaveUp when nothing has been answered for too long."""
        with self._lock:
            silent_s = self._clock.monotonic() - self._last
        if silent_s + seconds > self._timeout_s:
            raise GaveUp(f"Nothing was taken for {silent_s:.0f} s. The last answer: {why}")
        self._clock.wait(self.stop, seconds)

    def fail(self, error: Exception) -> None:
        with self._lock:
            self._failure = self._failure or error
        self.stop.set()

    def check(self) -> None:
        with self._lock:
            if self._failure:
                raise self._failure

    def summary(self) -> Summary:
        with self._lock:
            return Summary(self._summary.accepted, self._summary.rejected, self._summary.duplicates)


class Lane:
    """One producer: seals, sends and repeats batches, one after the other."""

    def __init__(
        self,
        transport: Transport,
        progress: Progress,
        *,
        headers: Mapping[str, str],
        new_producer: Callable[[], str],
        jitter: Callable[[], float],
    ) -> None:
        self._transport = transport
        self._progress = progress
        self._headers = headers
        self._new_producer = new_producer
        self._jitter = jitter
        self._producer = new_producer()
        self._sequence = 1
        self._after = 0

    def send(self, part: _Part) -> None:
        """Returns when every event of the part is accepted or rejected. Raises GaveUp."""
        parts = deque([part])
        while parts and not self._progress.stop.is_set():
            part = parts.popleft()
            raw = b"\n".join(part.lines) + b"\n"
            body = zlib.compress(raw, 1, wbits=31)
            alone = len(part.lines) == 1
            if not alone and (len(body) > _ZIPPED_BYTES_MAX or len(raw) > RAW_BYTES_MAX):
                parts.extendleft(reversed(_halves(part)))
                continue
            refused = self._until_answered(part, body)
            if refused is None:
                continue
            if refused.status == 413 and not alone:
                parts.extendleft(reversed(_halves(part)))
                continue
            rejected = [Rejected(place, refused.code, refused.detail) for place in part.places]
            self._progress.answered(0, False, rejected)

    def _until_answered(self, part: _Part, body: bytes) -> _Refused | None:
        """Post the same bytes with the same number until the answer settles them."""
        sha256 = hashlib.sha256(body).hexdigest()
        backoff_s = _BACKOFF_FIRST_S
        while not self._progress.stop.is_set():
            batch = f"{self._producer}:1:{self._sequence}"
            number = f"{self._producer};epoch=1;sequence={self._sequence};after={self._after};sha256={sha256}"
            retry_after_s = 0.0
            try:
                answer = self._transport.post(body, {**self._headers, "Penstock-Producer": number})
            except HubUnavailable as error:
                why = error.detail
            else:
                reply = _reply(answer)
                if reply and self._settled(part, answer.status, batch, reply):
                    # A batch without a valid event was not stored: the hub's last number is still the one before.
                    self._after = self._sequence if answer.status == 200 else self._after
                    self._sequence += 1
                    return None
                if reply and reply.code in _NEW_PRODUCER:
                    self._producer, self._sequence, self._after = self._new_producer(), 1, 0
                elif reply and answer.status != 200 and reply.code in _FINAL and reply.retryable is False:
                    self._sequence += 1
                    return _Refused(answer.status, reply.code, reply.detail)
                retry_after_s = _seconds(answer.headers.get("retry-after", ""))
                why = _sentence(answer, reply)
            # Full jitter: lanes and clients that failed together do not come back together.
            self._progress.pause(retry_after_s + self._jitter() * backoff_s, why)
            backoff_s = min(2 * backoff_s, _BACKOFF_MOST_S)
        return None

    def _settled(self, part: _Part, status: int, batch: str, reply: _Reply) -> bool:
        """True when the answer accounts for every event that was sent under this number; then it is counted."""
        nothing_valid = status == 400 and reply.code == "no_valid_event"
        if not nothing_valid and (status != 200 or reply.batch != batch):
            return False
        accepted = 0 if nothing_valid else reply.accepted
        places = {rejection.index for rejection in reply.rejected}
        whole = accepted + len(reply.rejected) == len(part.lines) and len(places) == len(reply.rejected)
        if not whole or not all(0 <= index < len(part.lines) for index in places):
            return False
        rejected = [Rejected(part.places[one.index], one.code, one.detail) for one in reply.rejected]
        self._progress.answered(accepted, reply.duplicate, rejected)
        return True

    def close(self) -> None:
        self._transport.close()


class Sender:
    """Adds lines from one thread, sends them from one thread for each lane."""

    def __init__(
        self,
        transports: Sequence[Transport],
        *,
        device_field: str,
        batch_events: int,
        timeout_s: float,
        clock: Clock,
        on_rejected: Callable[[Rejected], None],
        new_producer: Callable[[], str],
        jitter: Callable[[], float],
    ) -> None:
        headers = {
            "Content-Type": "application/x-ndjson",
            "Content-Encoding": "gzip",
            "Penstock-Device-Field": device_field,
        }
        self._progress = Progress(clock, timeout_s, on_rejected)
        lanes = [
            Lane(transport, self._progress, headers=headers, new_producer=new_producer, jitter=jitter)
            for transport in transports
        ]
        self._queues: list[queue.Queue[_Part | None]] = [queue.Queue(_SEALED_MAX) for _ in lanes]
        self._threads = [
            threading.Thread(target=_run, args=(lane, waiting, self._progress), name=f"lane-{i}", daemon=True)
            for i, (lane, waiting) in enumerate(zip(lanes, self._queues, strict=True))
        ]
        self._lines: list[list[bytes]] = [[] for _ in lanes]
        self._places: list[list[Place]] = [[] for _ in lanes]
        self._bytes = [0] * len(lanes)
        self._batch_events = batch_events
        self._lane_of = _Lanes(device_field, len(lanes))
        for thread in self._threads:
            thread.start()

    def add(self, line: bytes, place: Place) -> None:
        """Take one event, without its line feed. Waits while its lane is full. Raises what a lane failed with."""
        lane = self._lane_of(line)
        if self._bytes[lane] + len(line) > RAW_BYTES_MAX:
            self._seal(lane)
        self._lines[lane].append(line)
        self._places[lane].append(place)
        self._bytes[lane] += len(line) + 1
        if len(self._lines[lane]) >= self._batch_events:
            self._seal(lane)

    def reject(self, place: Place, code: str, detail: str) -> None:
        """Count an event that cannot even be sent."""
        self._progress.answered(0, False, [Rejected(place, code, detail)])

    def finish(self) -> Summary:
        """Returns when all is answered. Raises what a lane failed with."""
        for lane, waiting in enumerate(self._queues):
            self._seal(lane)
            self._put(waiting, None)
        for thread in self._threads:
            thread.join()
        self._progress.check()
        return self.summary()

    def abandon(self) -> None:
        """Send nothing more. What was posted may be stored."""
        self._progress.stop.set()

    def summary(self) -> Summary:
        return self._progress.summary()

    def _seal(self, lane: int) -> None:
        if self._lines[lane]:
            self._put(self._queues[lane], _Part(self._lines[lane], self._places[lane]))
            self._lines[lane], self._places[lane], self._bytes[lane] = [], [], 0

    def _put(self, waiting: queue.Queue[_Part | None], part: _Part | None) -> None:
        while True:
            self._progress.check()
            try:
                return waiting.put(part, timeout=0.2)
            except queue.Full:
                continue


def _run(lane: Lane, waiting: queue.Queue[_Part | None], progress: Progress) -> None:
    try:
        while (part := waiting.get()) is not None:
            lane.send(part)
    except Exception as error:
        progress.fail(error)
    finally:
        lane.close()


class _Lanes:
    """Line → lane by its device. A line whose device cannot be read goes to lane 0: the API will say what is wrong."""

    def __init__(self, device_field: str, lanes: int) -> None:
        named: Any = msgspec.defstruct("Named", [("device", str, "")], rename={"device": device_field})
        self._decode = msgspec.json.Decoder(named).decode
        self._lanes = lanes

    def __call__(self, line: bytes) -> int:
        try:
            device: str = self._decode(line).device
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            return 0
        return zlib.crc32(device.encode("utf-8", "surrogatepass")) % self._lanes


def _halves(part: _Part) -> tuple[_Part, _Part]:
    middle = len(part.lines) // 2
    return (
        _Part(part.lines[:middle], part.places[:middle]),
        _Part(part.lines[middle:], part.places[middle:]),
    )


def _reply(answer: Answer) -> _Reply | None:
    """None for an answer that is not of this API."""
    try:
        return msgspec.json.decode(answer.body, type=_Reply)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None


def _seconds(text: str) -> float:
    return float(text) if text.isascii() and text.isdigit() else 0.0


def _sentence(answer: Answer, reply: _Reply | None) -> str:
    if reply and reply.code:
        return f"{answer.status} {reply.code}: {reply.detail}"
    return f"{answer.status}, and it is not one of Penstock's answers for this batch."
