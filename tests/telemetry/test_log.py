"""A log line is one write: JSON for programs, a sentence with fields for people."""

from __future__ import annotations

import io
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import pytest

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


@pytest.mark.parametrize(("level", "lines"), [("debug", 5), ("info", 4), ("warning", 3), ("error", 2)])
def test_lines_below_the_level_are_not_written(level: str, lines: int) -> None:
    stream = Stream(terminal=False)
    log = open_log("up", clock=FakeClock(), level=level, stream=stream)
    for say in (log.debug, log.info, log.warning, log.error, log.exception):
        say("Said.")
    assert stream.writes == lines


def test_an_exception_that_is_handed_over_is_told_and_none_is_nothing() -> None:
    stream = Stream(terminal=False)
    log = open_log("up", clock=FakeClock(), level="info", stream=stream)
    log.warning("Failed.", exc_info=ValueError("boom"))
    log.warning("Waits.", exc_info=None)
    failed, waits = (msgspec.json.decode(line) for line in stream.getvalue().splitlines())
    assert failed["exception"] == "ValueError: boom" and "exc_info" not in failed
    assert "exception" not in waits and "exc_info" not in waits


def test_lines_of_many_threads_do_not_mix(tmp_path: Path) -> None:
    with (tmp_path / "log").open("w") as stream:
        log = open_log("up", clock=FakeClock(), level="info", stream=stream)
        with ThreadPoolExecutor(8) as pool:
            for _ in pool.map(lambda n: log.info("Said.", n=n, long="x" * 5000), range(400)):
                pass
    lines = (tmp_path / "log").read_text().splitlines()
    assert sorted(msgspec.json.decode(line)["n"] for line in lines) == list(range(400))
