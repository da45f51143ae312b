"""The supervisor over parts that die, hang, hold the lock, or find the hub broken: real processes, waited for by condition."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest

from penstock.server.parts import PartState

# What a part does stands in the first argument; each start writes one line `name pid` to a file.
PROGRAM = """
import os, signal, struct, sys, threading
from pathlib import Path
import msgspec
from penstock.cli.supervisor import EXIT_HUB_BROKEN, Part, Supervisor, shared_slots
from penstock.clock import SystemClock
from penstock.errors import HubBroken
from penstock.files import Files
from penstock.telemetry.log import open_log

kind, folder = sys.argv[1], Path(sys.argv[2])
clock = SystemClock()
slots = shared_slots(2)


def note(text):
    fd = os.open(folder / "notes", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(fd, (text + "\\n").encode())
    os.close(fd)


def part(name, slot=None):
    def run():
        note(f"start {name} {os.getpid()}")
        stop = threading.Event()
        signal.signal(signal.SIGTERM, lambda *_: stop.set())
        first = not (folder / "again").exists()
        if name == "odd" and kind == "crash":
            raise ValueError("boom")
        if name == "odd" and kind == "broken" and first:
            (folder / "again").touch()
            raise HubBroken("the disk is gone")
        if name == "odd" and kind == "lock" and first:
            (folder / "again").touch()
            struct.pack_into("<q", slot, 0, int((clock.monotonic() - 6) * 1000))
        if name == "odd" and kind == "hang":
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        while not stop.wait(0.05):
            pass
        note(f"end {name} {os.getpid()}")
        return 0
    return run


Supervisor(
    [Part("odd", part("odd", slots[0]), 0, slots[0]), Part("last", part("last"), 1)],
    clock=clock,
    log=open_log("up", clock=clock, level="info", stream=sys.stderr),
    stop_timeout_s=1.0,
    record=lambda running: Files().replace(folder / "parts", msgspec.json.encode(running)),
    ready=lambda: True,
    announce=lambda: note("announced"),
).run()
note("stopped")
"""

Start = Callable[[str], subprocess.Popen[bytes]]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    started: list[subprocess.Popen[bytes]] = []

    def run(kind: str) -> subprocess.Popen[bytes]:
        with (tmp_path / "log").open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, "-c", PROGRAM, kind, str(tmp_path)], stderr=log, start_new_session=True
            )
        started.append(process)
        return process

    yield run
    for process in started:
        if process.poll() is None:
            process.kill()
            process.wait()


def notes(folder: Path, prefix: str) -> list[str]:
    path = folder / "notes"
    return [line for line in path.read_text().splitlines() if line.startswith(prefix)] if path.exists() else []


def restarts(folder: Path) -> dict[str, int]:
    path = folder / "parts"
    if not path.exists():
        return {}
    return {part.name: part.restarts for part in msgspec.json.decode(path.read_bytes(), type=list[PartState])}


def until(condition: Callable[[], object], within_s: float = 15.0) -> None:
    end = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < end, "in vain"
        time.sleep(0.02)


def lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def stop(process: subprocess.Popen[bytes]) -> int:
    process.send_signal(signal.SIGTERM)
    return process.wait(10)


def test_stages_end_one_after_the_other_and_the_exit_is_0(tmp_path: Path, start: Start) -> None:
    process = start("calm")
    until(lambda: len(notes(tmp_path, "start")) == 2 and notes(tmp_path, "announced"))
    assert stop(process) == 0
    assert [line.split()[1] for line in notes(tmp_path, "end")] == ["odd", "last"]
    assert notes(tmp_path, "stopped")


def test_a_ctrl_c_of_the_terminal_reaches_all_and_only_the_supervisor_acts(tmp_path: Path, start: Start) -> None:
    process = start("calm")
    until(lambda: len(notes(tmp_path, "start")) == 2)
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(10) == 0
    assert [line.split()[1] for line in notes(tmp_path, "end")] == ["odd", "last"]


def test_a_part_that_dies_is_started_again_with_a_growing_pause(tmp_path: Path, start: Start) -> None:
    process = start("crash")
    until(lambda: len(notes(tmp_path, "start odd")) >= 4)
    assert stop(process) == 0
    log = (tmp_path / "log").read_text()
    assert [f'"again_in_s":{pause}' in log for pause in (0.1, 0.2, 0.4)] == [True] * 3
    assert "ValueError: boom" in log
    assert len(notes(tmp_path, "start last")) == 1


def test_a_part_that_is_killed_is_started_again_and_recorded(tmp_path: Path, start: Start) -> None:
    process = start("calm")
    until(lambda: len(notes(tmp_path, "start")) == 2)
    killed = int(notes(tmp_path, "start odd")[0].split()[2])
    os.kill(killed, signal.SIGKILL)
    until(lambda: len(notes(tmp_path, "start odd")) == 2)

    until(lambda: restarts(tmp_path) == {"odd": 1, "last": 0})
    assert stop(process) == 0


def test_a_broken_hub_starts_every_part_again(tmp_path: Path, start: Start) -> None:
    process = start("broken")
    until(lambda: restarts(tmp_path) == {"odd": 1, "last": 1})
    assert stop(process) == 0


def test_a_part_that_holds_the_write_lock_too_long_is_killed(tmp_path: Path, start: Start) -> None:
    process = start("lock")
    until(lambda: len(notes(tmp_path, "start odd")) == 2)
    assert stop(process) == 0
    assert "write lock too long" in (tmp_path / "log").read_text()
    assert len(notes(tmp_path, "start last")) == 1


def test_what_does_not_end_is_killed_in_time(tmp_path: Path, start: Start) -> None:
    process = start("hang")
    until(lambda: len(notes(tmp_path, "start")) == 2)
    assert stop(process) == 0
    assert [line.split()[1] for line in notes(tmp_path, "end")] == ["last"]
    assert not lives(int(notes(tmp_path, "start odd")[0].split()[2]))


def test_all_parts_die_with_the_supervisor(tmp_path: Path, start: Start) -> None:
    process = start("calm")
    until(lambda: len(notes(tmp_path, "start")) == 2)
    process.kill()
    process.wait()
    pids = [int(line.split()[2]) for line in notes(tmp_path, "start")]
    until(lambda: not any(lives(pid) for pid in pids))
