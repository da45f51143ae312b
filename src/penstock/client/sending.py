"""One lane's way to the hub: posts its oldest batch until the answer settles it, and acts on every other answer as answers.py says."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping, Sequence

import msgspec

from penstock.client.answers import (
    Again,
    NewProducer,
    Paused,
    Reaction,
    Rejection,
    Settled,
    Split,
    reaction,
)
from penstock.client.lane import Lane, Numbered
from penstock.client.records import Batch, Dead
from penstock.client.transport import Transport
from penstock.clock import Clock
from penstock.errors import HubUnavailable

BACKOFF_S = (0.2, 60.0)
PAUSE_S = (5.0, 300.0)
_IDLE_S, _ACT_S = 1.0, 2.0
_ELSEWHERE = "another copy of this spool has used this number: for this event too if it is older than the copy; else send it again"
_log = logging.getLogger("penstock.client")
_log.addHandler(logging.NullHandler())  # a program that sets up no logging sees nothing on its stderr


def headers_of(device_field: str) -> dict[str, str]:
    """What every batch is posted with, beside its number."""
    return {
        "Content-Type": "application/x-ndjson",
        "Content-Encoding": "gzip",
        "Penstock-Device-Field": device_field,
    }


class Rejected(msgspec.Struct, frozen=True):
    """An event that the API will never take, as it was sent, and why; `place` is `file:line` if it was read from a file."""

    event: bytes
    code: str
    detail: str
    place: str = ""


class Stats(msgspec.Struct, frozen=True):
    """Counts since the client began; `waiting_*` is in the spool now. `why`: what was answered last, if it was no good answer.

    `state`: `idle`, nothing is in the spool; `sending`; `waiting`, it is tried again soon; `paused`, rarely, as people have to act.
    """

    taken: int
    accepted: int
    duplicates: int
    rejected: int
    settled_elsewhere: int
    waiting_events: int
    waiting_bytes: int
    quarantined: int
    state: str
    why: str


class Board:
    """What all threads of a client know together; the log is told each change of it, and not each try. Thread-safe.

    `waiting` says how many events are in the spool.
    """

    def __init__(
        self, on_rejected: Callable[[Rejected], None] | None, clock: Clock, waiting: Callable[[], int] = lambda: 0
    ) -> None:
        self.changed = threading.Event()
        self.settled_at = clock.monotonic()
        self._on_rejected = on_rejected
        self._clock = clock
        self._waiting = waiting
        self._lock = threading.RLock()  # a signal handler may send while its thread asks for `stats`
        self._troubles: dict[int, tuple[str, str]] = {}  # by thread, the latest last: each lane knows only its own
        self._since = 0.0
        self._accepted = self._duplicates = self._rejected = self._elsewhere = 0

    def anew(self) -> Board:
        """With counts from 0 and locks that nobody has."""
        return Board(self._on_rejected, self._clock, self._waiting)

    @property
    def why(self) -> str:
        """What holds up the events; empty if nothing does."""
        with self._lock:
            return self._worst()[1]

    def settled(self, accepted: int, duplicate: bool, rejected: Sequence[Rejected]) -> None:
        with self._lock:
            self._accepted += accepted
            self._duplicates += accepted if duplicate else 0
            self._rejected += len(rejected)
            self.settled_at = self._clock.monotonic()
        self.well()
        self.changed.set()
        if self._on_rejected is not None:
            for one in rejected:
                try:
                    self._on_rejected(one)
                except Exception:
                    # The event is in the dead letters. A lane that ended here would hold up all that comes behind.
                    _log.exception("on_rejected raised: code=%s", one.code)

    def begin(self) -> None:
        """From now on something waits for the hub."""
        self.settled_at = self._clock.monotonic()

    def elsewhere(self, events: int) -> None:
        with self._lock:
            self._elsewhere += events
            self.settled_at = self._clock.monotonic()
        self.well()
        self.changed.set()

    def trouble(self, why: str, *, state: str = "waiting") -> None:
        """The calling thread gets no further, until it says that it is well."""
        with self._lock:
            before, _ = self._worst()
            if not self._troubles:
                self._since = self._clock.monotonic()
            self._troubles.pop(threading.get_ident(), None)
            self._troubles[threading.get_ident()] = state, why
            after, why = self._worst()
        if after != before:
            _log.warning("The events wait in the spool: state=%s why=%s", after, why)
        self.changed.set()

    def well(self) -> None:
        """The calling thread gets on."""
        with self._lock:
            if self._troubles.pop(threading.get_ident(), None) is None or self._troubles:
                return
            after_s = self._clock.monotonic() - self._since
        _log.info("The events are sent again: after_s=%.1f waiting=%d", after_s, self._waiting())

    def stats(self, taken: int, events: int, size: int, quarantined: int) -> Stats:
        with self._lock:
            state, why = self._worst()
            return Stats(
                taken,
                self._accepted,
                self._duplicates,
                self._rejected,
                self._elsewhere,
                events,
                size,
                quarantined,
                state if events else "idle",
                why,
            )

    def _worst(self) -> tuple[str, str]:
        """The state and its reason: paused if one lane is, though others may still be sending."""
        worst = "sending", ""
        for trouble in self._troubles.values():
            if trouble[0] == "paused" or worst[0] != "paused":
                worst = trouble
        return worst


class Sender:
    """`run` is a lane's thread; `step` is one try, and for tests."""

    def __init__(
        self,
        lane: Lane,
        transport: Transport,
        board: Board,
        clock: Clock,
        jitter: Callable[[], float],
        headers: Mapping[str, str],
    ) -> None:
        self.wake = threading.Event()
        self._stop = threading.Event()
        self._lane = lane
        self._transport = transport
        self._board = board
        self._clock = clock
        self._jitter = jitter
        self._headers = headers
        self._failed = 0
        self._acting = threading.RLock()
        self._abandoned = False

    def stop(self) -> None:
        """End after the answer that is under way."""
        self._stop.set()
        self.wake.set()

    def abandon(self) -> None:
        """The answer that is under way came too late: whoever uses the lane next posts the batch again, under its number.

        When it returns, this sender touches the lane no more. It waits only for the disk, and not for ever: `on_rejected` may be waiting
        for the thread that closes.
        """
        self._abandoned = True
        if self._acting.acquire(timeout=_ACT_S):
            self._acting.release()

    def run(self) -> None:
        try:
            while not self._stop.is_set():
                try:
                    wait_s = self.step()
                except Exception as error:
                    # A thread that ended here would leave its lane standing, and nobody would say so.
                    _log.exception("A lane failed, and tries again")
                    self._board.trouble(f"{type(error).__name__}: {error}", state="paused")
                    wait_s = PAUSE_S[0] + self._backoff(PAUSE_S)
                if wait_s is None:
                    self._clock.wait(self.wake, _IDLE_S)
                    self.wake.clear()
                elif wait_s:
                    self._clock.wait(self._stop, wait_s)
        finally:
            self.close()

    def close(self) -> None:
        """Let go of the connection. Another step opens a new one."""
        self._transport.close()

    def step(self) -> float | None:
        """Post the oldest batch once. Seconds to wait before the next try; None if there is nothing to send."""
        try:
            batch = self._lane.head()
            if batch is None:
                return None
            numbered = self._lane.number(batch)
            answered = self._post(batch, numbered)
            with self._acting:
                return None if self._abandoned else self._act(batch, numbered, answered)
        except OSError as error:
            self._board.trouble(f"The spool cannot be written: {error}")
            return self._backoff(BACKOFF_S)

    def _post(self, batch: Batch, numbered: Numbered) -> Reaction:
        number = (
            f"{numbered.producer};epoch={numbered.epoch};sequence={numbered.sequence};after={numbered.after};"
            f"sha256={batch.header.sha256}"
        )
        headers = {**self._headers, "Penstock-Device-Field": batch.header.device_field, "Penstock-Producer": number}
        try:
            answer = self._transport.post(batch.body, headers)
        except HubUnavailable as error:
            return Again(error.detail)
        echo = f"{numbered.producer}:{numbered.epoch}:{numbered.sequence}"
        return reaction(answer, batch=echo, events=batch.header.events, now_ms=self._clock.now_ms())

    def _act(self, batch: Batch, numbered: Numbered, answered: Reaction) -> float:
        if isinstance(answered, Settled):
            self._settle(batch, numbered, answered)
            return 0.0
        if isinstance(answered, Again):
            self._board.trouble(answered.why)
            return (answered.retry_after_s or 0.0) + self._backoff(BACKOFF_S)
        if isinstance(answered, Split) and batch.header.events > 1:
            self._lane.split(batch)
            return 0.0
        if isinstance(answered, Paused) or (isinstance(answered, Split) and not answered.code):
            why = answered.why if isinstance(answered, Paused) else answered.detail
            self._board.trouble(why, state="paused")
            return PAUSE_S[0] + self._backoff(PAUSE_S)
        if isinstance(answered, NewProducer):
            return self._renumber(batch, numbered, answered)
        every = tuple(Rejection(index, answered.code, answered.detail) for index in range(batch.header.events))
        self._settle(batch, numbered, Settled(0, False, every, stored=False))
        return 0.0

    def _settle(self, batch: Batch, numbered: Numbered, settled: Settled) -> None:
        """What was rejected is kept first: behind `done` nothing is left of the batch."""
        rejected: list[Rejected] = []
        if settled.rejected:
            lines = batch.lines()
            rejected = [
                Rejected(lines[one.index], one.code, one.detail, batch.place(one.index)) for one in settled.rejected
            ]
            self._lane.bury(numbered, [Dead.of(one.event, one.code, one.detail, one.place) for one in rejected])
        self._lane.done(batch, stored=settled.stored)
        self._failed = 0
        self._board.settled(settled.accepted, settled.duplicate, rejected)

    def _renumber(self, batch: Batch, numbered: Numbered, answered: NewProducer) -> float:
        if answered.code == "number_too_old" and not numbered.anew:
            # The hub has later numbers of this producer: a copy of this spool went on. If the batch was in the spool when that was copied,
            # the copy has settled it; if it was taken after that, by a process that ended before it was sent, nobody has. It
            # cannot be told here, so it is neither sent again nor deleted.
            self._lane.bury(
                numbered,
                [
                    Dead.of(line, answered.code, _ELSEWHERE, batch.place(index))
                    for index, line in enumerate(batch.lines())
                ],
            )
            self._lane.done(batch, stored=True)
            self._board.elsewhere(batch.header.events)
            return 0.0
        self._lane.renumber(batch)
        return self._backoff(BACKOFF_S)

    def _backoff(self, bounds: tuple[float, float]) -> float:
        """Full jitter: clients that failed together do not come back together."""
        first, most = bounds
        wait_s = self._jitter() * min(most, first * 2 ** min(self._failed, 30))
        self._failed += 1
        return float(wait_s)
