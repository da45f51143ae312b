"""A log line is one write: JSON for programs, a sentence with fields for people."""

from __future__ import annotations

import io

import msgspec

from penstock.telemetry.log import open_log
from penstock.testing import FakeClock


class Stream(io.StringIO):
    def __init__(self, terminal: bool) -> None:
        super().__init__()
        self.terminal = terminal
        self.writes = 0

    def write(self, text: str) -> int:
        self.writes += 1
        return super().write(text)

    def isatty(self) -> bool:
        return self.terminal


def test_json_for_programs() -> None:
    stream = Stream(terminal=False)
    log = open_log("api-0", clock=FakeClock(), level="info", stream=stream).bind(partition=3)
    log.debug("Not this.")
    log.warning("Something {} happened.", count=2)
    assert stream.writes == 1
    assert msgspec.json.decode(stream.getvalue()) == {
        "ts": "2026-11-22T14:00:00.000Z",
        "level": "warning",
        "part": "api-0",
        "partition": 3,
        "count": 2,
        "event": "Something {} happened.",
    }


def test_sentences_for_people_with_the_trace_behind() -> None:
    stream = Stream(terminal=True)
    log = open_log("up", clock=FakeClock(), level="info", stream=stream)
    try:
        raise ValueError("boom")
    except ValueError:
        log.exception("Failed.", name="x")
    first, *rest = stream.getvalue().splitlines()
    assert first == "2026-11-22T14:00:00.000Z error up Failed. name=x"
    assert rest[-1] == "ValueError: boom"
    assert stream.writes == 1
