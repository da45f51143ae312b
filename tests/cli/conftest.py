"""`penstock` as a process of its own, as users run it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from penstock.server.parts import Run, read_runs

OWN_SETTINGS = {name: value for name, value in os.environ.items() if not name.startswith("PENSTOCK_")}


class Shell:
    """Runs commands in a folder of their own, and ends what still runs."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.data = folder / "data"
        self._started: list[subprocess.Popen[bytes]] = []

    def run(self, *arguments: str, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
        return subprocess.run(
            [sys.executable, "-m", "penstock", *arguments],
            cwd=self.folder,
            env=OWN_SETTINGS,
            input=stdin,
            capture_output=True,
            timeout=60,
            check=False,
        )

    def json(self, *arguments: str) -> Any:
        """What a command with --json prints; it must exit 0."""
        done = self.run(*arguments, "--json")
        assert done.returncode == 0, done
        return msgspec.json.decode(done.stdout)

    def start(self, *arguments: str, program: tuple[str, ...] = ("-m", "penstock")) -> subprocess.Popen[bytes]:
        with (self.folder / "log").open("ab") as log, (self.folder / "out").open("ab") as out:
            process = subprocess.Popen(
                [sys.executable, *program, *arguments],
                cwd=self.folder,
                env=OWN_SETTINGS,
                stdout=out,
                stderr=log,
                start_new_session=True,
            )
        self._started.append(process)
        return process

    def up(self, *arguments: str, listen: str = "127.0.0.1:0", admin: str = "127.0.0.1:0") -> subprocess.Popen[bytes]:
        """`penstock up` with short times; returns when it has said that it takes events."""
        before = self.out().count("Ctrl-C")
        short = ["--period", "10s", "--lease", "3s", "--partitions", "4", "--workers", "2", "--hub-bytes-max", "1GiB"]
        process = self.start("up", "--listen", listen, "--admin", admin, *short, *arguments)
        self.until(lambda: self.out().count("Ctrl-C") > before or process.poll() is not None)
        assert process.poll() is None, self.log()
        return process

    def out(self) -> str:
        return (self.folder / "out").read_text() if (self.folder / "out").exists() else ""

    def log(self) -> str:
        return (self.folder / "log").read_text()

    @property
    def key(self) -> str:
        """The first key's text."""
        return (self.data / "key").read_text()

    def running(self) -> Run:
        (run,) = [run for run in read_runs(self.data / "run") if run.listen]
        return run

    def pid(self, part: str) -> int:
        return next((one.pid for one in self.running().parts if one.name == part), 0)

    def until(self, condition: Callable[[], object], within_s: float = 30.0) -> None:
        end = time.monotonic() + within_s
        while not condition():
            assert time.monotonic() < end, self.log()
            time.sleep(0.05)

    def stop(self, process: subprocess.Popen[bytes]) -> int:
        process.send_signal(signal.SIGTERM)
        return process.wait(15)

    def close(self) -> None:
        for process in self._started:
            if process.poll() is None:
                process.kill()
                process.wait()


@pytest.fixture
def shell(tmp_path: Path) -> Iterator[Shell]:
    shell = Shell(tmp_path)
    yield shell
    shell.close()
