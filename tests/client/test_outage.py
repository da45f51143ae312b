"""Two hours without a hub, on a clock that lets the client's threads take their turns one after the other: always the same.

Figures are of fake time. A live event comes each 0.1 s, a batch has 100; so a batch is 10 s old when it is full.
"""

from __future__ import annotations

import json
import logging
import random
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from penstock.client import sending
from penstock.client.client import Client
from penstock.client.transport import Answer
from penstock.errors import SpoolFull
from penstock.files import Files
from penstock.testing import FakeClock
from tests.client.conftest import Fault, MemoryApi, lost_answer, never_arrived, problem, says
from tests.e2e.system import SEED

LIVE_S = 0.1
BATCH = 100
# What one post takes when the hub answers. A fifth of the time in which a batch fills up would be enough: 2 s.
POST_S = 1.5
HOUR_S = 3600.0
PHASE_S = 2 * HOUR_S / 3
RETRY_AFTER_S = 30


class World(FakeClock):
    """Whoever waits lets the others take their turns. Each of these says in how many seconds its next one is."""

    def __init__(self) -> None:
        super().__init__()
        self._turns: list[tuple[float, int, Callable[[], float]]] = []

    def add(self, turn: Callable[[], float]) -> None:
        self._turns.append((self.monotonic(), len(self._turns), turn))

    def wait(self, event: threading.Event, timeout_s: float) -> bool:
        until = self.monotonic() + timeout_s
        while self._turns and min(self._turns)[0] <= until:
            due, place, turn = min(self._turns)
            self.advance(due - self.monotonic())
            self._turns[place] = (due + turn(), place, turn)
        self.advance(until - self.monotonic())
        return event.is_set()


class QuickFiles(Files):
    """This is not about power cuts."""

    def _fsync(self, fd: int) -> None: ...


NO_ANSWER: Fault = never_arrived
BUSY = says(problem(503, "hub_unavailable", retryable=True, retry_after=str(RETRY_AFTER_S)))
PORTAL = says(Answer(200, {"content-type": "text/html"}, b"<html>Please log in</html>"))


class Hub(MemoryApi):
    """Each fault lasts for `PHASE_S`, then it answers. The first post is stored, and only its answer is lost."""

    def __init__(self, clock: FakeClock, phases: Sequence[Fault]) -> None:
        super().__init__()
        self.tries = [0] * (len(phases) + 1)
        self.events_of_posts: list[int] = []
        self._clock = clock
        self._phases = phases

    def post(self, body: bytes, headers: Mapping[str, str]) -> Answer:
        phase = min(len(self._phases), int(self._clock.monotonic() // PHASE_S))
        number = headers["Penstock-Producer"]
        self.seen.append(number)
        self.tries[phase] += 1
        if phase < len(self._phases):
            fault = self._phases[phase] if len(self.seen) > 1 else lost_answer
            return fault(self, body, number) or pytest.fail("a fault answers or raises")
        before = len(self.stored)
        answer = self.store(body, number)
        self.events_of_posts.append(len(self.stored) - before)
        return answer


class Device:
    """A client without threads of its own, and the events that it took."""

    def __init__(
        self,
        spool: Path,
        monkeypatch: pytest.MonkeyPatch,
        phases: Sequence[Fault] = (NO_ANSWER, BUSY, PORTAL),
        **options: Any,
    ) -> None:
        self.clock = World()
        self.hub = Hub(self.clock, phases)
        self.taken = self.refused = 0
        monkeypatch.setattr("random.random", random.Random(SEED).random)
        with monkeypatch.context() as patched:
            patched.setattr(threading.Thread, "start", lambda _thread: None)
            self.client = Client(
                spool=spool,
                connect=lambda: self.hub,
                clock=self.clock,
                files=QuickFiles(),
                batch_events=BATCH,
                linger_s=60,
                **options,
            )
        self.client._threads.clear()
        self.clock.add(self._seal)
        self.clock.add(self._post)

    def live(self, until_s: float) -> None:
        """A live event each `LIVE_S` of time. One that is refused is the next one again: what is taken has no gap."""
        while self.clock.monotonic() < until_s:
            try:
                self.client.send({"deviceId": "d", "n": self.taken, "noise": self.taken * 2654435761 % (1 << 32)})
                self.taken += 1
            except SpoolFull as full:
                self.refused += 1
                assert "This event was not taken" in str(full) and "may hold" in str(full)
            self.clock.wait(threading.Event(), LIVE_S)

    def waiting_batches(self) -> int:
        return self.client.stats().waiting_events // BATCH

    def delivered(self) -> list[int]:
        return [json.loads(line)["n"] for line in self.hub.stored]

    def _seal(self) -> float:
        self.client._seal_once()
        return 1.0

    def _post(self) -> float:
        [sender] = self.client._senders
        wait_s = sender.step()
        return 1.0 if wait_s is None else wait_s or POST_S


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [
        f"{record.levelname} {record.getMessage()}" for record in caplog.records if record.name == "penstock.client"
    ]


def drain(device: Device) -> tuple[int, int]:
    """Events that the hub got, and live events that came, from its first answer until what had waited was sent."""
    while not device.hub.events_of_posts:
        device.live(device.clock.monotonic() + 1)
    before = len(device.hub.stored), device.taken
    while device.waiting_batches():
        device.live(device.clock.monotonic() + 1)
    return len(device.hub.stored) - before[0], device.taken - before[1]


def test_after_two_hours_all_is_sent_five_times_faster_than_it_comes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    device = Device(tmp_path, monkeypatch)
    client, hub = device.client, device.hub
    assert client.stats().state == "idle"
    device.live(PHASE_S)
    assert (client.stats().state, client.stats().why) == ("waiting", "refused")
    device.live(2 * PHASE_S)
    assert (client.stats().state, client.stats().why) == ("waiting", "503 hub_unavailable: why")
    device.live(3 * PHASE_S)
    stats = client.stats()
    assert (stats.state, stats.accepted) == ("paused", 0)
    assert "not one of Penstock's answers" in stats.why
    assert stats.taken == stats.waiting_events == device.taken > 3 * PHASE_S / LIVE_S * 0.99

    # Full jitter waits half of the longest wait on average; Retry-After comes before it.
    longest = sending.BACKOFF_S[1], sending.BACKOFF_S[1] + 2 * RETRY_AFTER_S, sending.PAUSE_S[1]
    for tries, longest_s in zip(hub.tries, longest, strict=False):
        assert 1 < tries < 1.5 * PHASE_S / (longest_s / 2)
    assert hub.tries[1] <= PHASE_S / RETRY_AFTER_S + 1
    assert len(set(hub.seen)) == 1, "one batch is tried, under one number"

    delivered, live = drain(device)
    print(f"tries {hub.tries}, {delivered} delivered while {live} came")
    assert live > 0 and delivered >= 5 * live
    assert all(events == BATCH for events in hub.events_of_posts[1:])
    assert said(caplog)[:2] == [
        "WARNING The events wait in the spool: state=waiting why=the connection broke",
        f"WARNING The events wait in the spool: state=paused why={stats.why}",
    ]
    assert len(said(caplog)) == 3
    assert said(caplog)[2].startswith("INFO The events are sent again: after_s=7")
    client.flush(timeout_s=600)
    assert device.delivered() == list(range(device.taken))
    stats = client.stats()
    assert (stats.state, stats.why, stats.waiting_events, stats.waiting_bytes) == ("idle", "", 0, 0)
    assert (stats.accepted, stats.duplicates) == (device.taken, BATCH)
    client.close()


def test_control_without_backoff_it_tries_all_the_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sending, "BACKOFF_S", (0.2, 0.2))
    device = Device(tmp_path, monkeypatch)
    device.live(PHASE_S / 10)
    assert device.hub.tries[0] > 10 * 1.5 * PHASE_S / 30
    device.client.close()


@pytest.mark.parametrize("when_full", ["raise", "block"])
def test_a_spool_holds_its_limit_and_drops_nothing_that_it_took(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when_full: str
) -> None:
    bytes_max = 500_000
    device = Device(tmp_path, monkeypatch, spool_bytes_max=bytes_max, when_full=when_full)
    largest = 0

    def measure() -> float:
        nonlocal largest
        largest = max(largest, sum(path.stat().st_size for path in tmp_path.glob("*/*/*[0-9]*.*")))
        return 60.0

    device.clock.add(measure)
    device.live(3 * PHASE_S)
    if when_full == "raise":
        assert device.refused > 0
        assert device.hub.tries[3] == 0
    else:
        assert device.refused == 0
        assert device.hub.tries[3] > 0, "the send in the outage came back when the hub did"
    drain(device)
    refused = device.refused
    device.live(device.clock.monotonic() + 60)
    assert device.refused == refused, "with room it takes all again"
    device.client.flush(timeout_s=600)
    assert device.delivered() == list(range(device.taken))
    # The last batch may have few events, and be larger than these by its header.
    assert bytes_max // 2 < largest <= bytes_max + 1024
    device.client.close()


@pytest.mark.parametrize(
    "status, code", [(401, "unauthenticated"), (403, "forbidden"), (404, "a_proxys_own"), (302, "")]
)
def test_what_people_must_mend_keeps_all_and_is_tried_rarely(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, status: int, code: str
) -> None:
    """Case 95: a key that has expired deletes nothing."""
    device = Device(tmp_path, monkeypatch, [says(problem(status, code, retryable=False))])
    device.live(PHASE_S)
    stats = device.client.stats()
    assert (stats.state, stats.waiting_events, stats.rejected) == ("paused", device.taken, 0)
    assert str(status) in stats.why
    assert 1 < device.hub.tries[0] < 1.5 * PHASE_S / (sending.PAUSE_S[1] / 2)
    drain(device)
    device.client.flush(timeout_s=600)
    assert device.delivered() == list(range(device.taken))
    device.client.close()


def test_a_clock_that_is_wrong_and_jumps_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Case 93: to 1970, ahead by years, back. Order is that of the numbers, waiting is by the clock that never jumps."""
    chosen = random.Random(SEED)
    straight, device = (Device(tmp_path / name, monkeypatch, [NO_ANSWER, BUSY]) for name in ("straight", "jumps"))

    def jump() -> float:
        device.clock.step(chosen.choice((-device.clock.now_ms() / 1000, 1e9, -86400, 86400, 1, -1)))
        return 10.0

    device.clock.add(jump)
    for one in (straight, device):
        monkeypatch.setattr("random.random", random.Random(SEED).random)
        one.client._senders[0]._jitter = random.random
        one.live(2 * PHASE_S)
        drain(one)
        one.client.flush(timeout_s=600)
        assert one.delivered() == list(range(one.taken))
        one.client.close()
    assert device.hub.tries == straight.hub.tries
