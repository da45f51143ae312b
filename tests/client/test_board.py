"""What the log and `stats()` say of several lanes."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

import pytest

from penstock.client.sending import Board
from penstock.testing import FakeClock


def elsewhere(act: Callable[[], object]) -> None:
    thread = threading.Thread(target=act)
    thread.start()
    thread.join()


def test_a_lane_in_trouble_is_said_once_while_another_sends(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    clock = FakeClock()
    board = Board(None, clock, lambda: 7)

    def stuck() -> None:
        for _ in range(5):
            board.trouble("401", state="paused")
            elsewhere(lambda: board.settled(1, False, ()))
            elsewhere(lambda: board.trouble("refused"))
            clock.advance(10)
            stats = board.stats(20, 7, 700, 0)
            assert (stats.state, stats.why, board.why) == ("paused", "401", "401")
        board.settled(1, False, ())

    stuck()
    lines = [record.getMessage() for record in caplog.records]
    assert lines == ["The events wait in the spool: state=paused why=401"]
    assert board.stats(20, 7, 700, 0).state == "waiting", "the other lane has not come back"
    assert board.stats(20, 0, 0, 0).state == "idle"


def test_it_is_said_how_long_it_took_and_what_waits(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    clock = FakeClock()
    board = Board(None, clock, lambda: 7)
    for act in (
        lambda: board.trouble("refused"),
        lambda: clock.advance(90),
        lambda: board.trouble("503"),
        lambda: board.settled(5, False, ()),
        lambda: board.settled(5, False, ()),
    ):
        act()
    assert [(record.levelname, record.getMessage()) for record in caplog.records] == [
        ("WARNING", "The events wait in the spool: state=waiting why=refused"),
        ("INFO", "The events are sent again: after_s=90.0 waiting=7"),
    ]
    assert board.stats(20, 7, 700, 0).state == "sending"
