"""The backlog on a turn-by-turn loop and a clock that work moves on."""

from __future__ import annotations

from collections.abc import Callable

import msgspec
import pytest

from penstock.server.backlog import SLICE_S, Backlog, refusal
from penstock.server.message import Request, Response


class Loop:
    """Callbacks in turns, as an event loop has them."""

    def __init__(self) -> None:
        self.soon: list[Callable[[], None]] = []

    def call_soon(self, callback: Callable[[], None]) -> None:
        self.soon.append(callback)

    def turn(self) -> bool:
        now, self.soon = self.soon, []
        for callback in now:
            callback()
        return bool(now)


class Rig:
    """Work takes `each_s`; `done` are the numbers of what was worked on."""

    def __init__(self, each_s: float) -> None:
        self.now = 100.0
        self.each_s = each_s
        self.done: list[int] = []
        self.room = True
        self.loop = Loop()
        self.backlog = Backlog(self.work, may_go_on=lambda: self.room, monotonic=lambda: self.now)
        self.backlog.start(self.loop)  # type: ignore[arg-type]

    def work(self, request: Request, device: str | None, reply: Callable[[Response], None]) -> None:
        self.now += self.each_s
        self.done.append(int(request.body))

    def put(self, *numbers: int) -> None:
        for number in numbers:
            self.backlog.put(Request(b"POST", b"/", b"", {}, b"%d" % number), None, lambda _: None)

    def finish(self) -> int:
        """Turns until there is nothing to do."""
        turns = 0
        while self.loop.turn():
            turns += 1
        return turns


def test_what_comes_when_nothing_waits_is_worked_on_at_once() -> None:
    rig = Rig(SLICE_S / 10)
    rig.put(1, 2, 3)
    assert (rig.done, len(rig.backlog), rig.backlog.wait_s()) == ([1, 2, 3], 0, 0.0)


def test_a_turn_works_for_a_slice_and_the_rest_waits_in_order() -> None:
    rig = Rig(SLICE_S * 0.6)
    rig.put(*range(10))
    assert rig.done == [0, 1]
    rig.loop.turn()
    assert rig.done == [0, 1, 2, 3]
    rig.put(10)
    assert rig.done == [0, 1, 2, 3], "nobody passes those who wait"
    assert rig.finish() == 4
    assert rig.done == list(range(11))
    rig.put(11)
    assert rig.done[-1] == 11


def test_the_wait_is_what_waits_times_what_each_took_lately() -> None:
    rig = Rig(0.010)
    rig.put(*range(401))
    for _ in range(100):
        rig.loop.turn()
    assert len(rig.backlog) == 300
    assert rig.backlog.wait_s() == pytest.approx(3.0)
    rig.each_s = 0.0021
    for _ in range(75):
        rig.loop.turn()
    assert len(rig.backlog) == 150
    assert rig.backlog.wait_s() < 1.4, "it is faster now"


def test_the_first_of_the_queue_tells_when_nothing_moves() -> None:
    rig = Rig(0.0001)
    rig.room = False
    rig.put(1, 2)
    rig.loop.turn()
    rig.now += 5.0
    assert (rig.done, rig.backlog.wait_s(), rig.backlog.bytes) == ([], 5.0, len(b"12"))


def test_without_room_it_waits_without_turning_until_it_is_told_to_go_on() -> None:
    rig = Rig(0.0001)
    rig.room = False
    rig.put(1, 2, 3)
    assert rig.finish() == 1, "no turn is spent on waiting"
    assert rig.done == []
    rig.room = True
    rig.backlog.go_on()
    rig.backlog.go_on()
    assert len(rig.loop.soon) == 1
    rig.finish()
    assert (rig.done, rig.backlog.bytes) == ([1, 2, 3], 0)
    rig.backlog.go_on()
    assert not rig.loop.soon


def test_a_pause_and_the_burst_behind_it_make_one_mean() -> None:
    """A commit that is long holds the backlog up, and then there is room for many: that is no reason to refuse."""
    rig = Rig(0.001)
    for _ in range(20):
        rig.room = False
        rig.put(*range(50))
        rig.loop.turn()
        rig.now += 0.050
        rig.room = True
        rig.backlog.go_on()
        rig.loop.turn()
        assert rig.backlog.wait_s() < 0.2
        rig.finish()


@pytest.mark.parametrize(
    ("wait_s", "told_s", "header"), [(0.0, 1.0, b"1"), (1.0, 1.0, b"1"), (1.01, 1.1, b"2"), (2.95, 3.0, b"3")]
)
def test_who_is_refused_is_told_the_wait_and_never_less(wait_s: float, told_s: float, header: bytes) -> None:
    answer = refusal(600, wait_s)
    assert (answer.status, answer.headers) == (503, ((b"Retry-After", header),))
    assert msgspec.json.decode(answer.body)["retry_after_s"] == told_s
    assert refusal(600, wait_s) is answer, "one for all who are refused alike"
    assert refusal(601, wait_s).body != answer.body
