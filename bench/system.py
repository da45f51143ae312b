"""The real system as a process tree of its own: `penstock up`, what its processes use, and its end."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO

import msgspec

import penstock
from penstock.cli.supervisor import die_with_parent

_READY_WITHIN_S = 30.0
_STOP_WITHIN_S = 15.0
_COMMAND_WITHIN_S = 900.0
_TICKS = os.sysconf("SC_CLK_TCK")
_LISTENING = "0A"


class BenchError(Exception):
    """The system cannot be measured: it did not start, or ended."""


class Memory(msgspec.Struct, frozen=True):
    """Bytes: resident now, anonymous now (what is left without the pages of mapped files), and the most resident ever."""

    resident: int
    anonymous: int
    peak: int


class Part(msgspec.Struct):
    name: str
    pid: int
    restarts: int = 0


class _Totals(msgspec.Struct):
    accepted: int
    archived: int


class _Storage(msgspec.Struct):
    bytes_used: int


class _Running(msgspec.Struct):
    """What we read of `GET /v1/status`, whatever the hub is."""

    parts: list[Part]


class _Cut(msgspec.Struct):
    next: list[str]


class Status(_Running):
    """And of an embedded hub."""

    totals: _Totals
    storage: _Storage


class System:
    """`with System(folder, options) as system`: everything in `folder` is removed at the end. `kind`: `up` or `api`."""

    def __init__(self, folder: Path, options: Sequence[str], kind: str = "up") -> None:
        self.kind = kind
        self._folder = folder
        self._options = options
        self._process: subprocess.Popen[bytes] | None = None
        self._log: IO[bytes] | None = None
        self.port, self._admin = free_ports(2)
        self.exit_code: int | None = None

    def __enter__(self) -> System:
        self._folder.mkdir(parents=True)
        self._log = (self._folder / "log").open("wb")
        listen = ("--listen", f"127.0.0.1:{self.port}", "--admin", f"127.0.0.1:{self._admin}")
        self._process = subprocess.Popen(
            [*self.words(self.kind), *listen, "--anonymous", *self._options],
            cwd=self._folder,
            env=environment(),
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=self._log,
            start_new_session=True,
            preexec_fn=die_with_parent,
        )
        try:
            self._await_ready()
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    def parts(self) -> dict[int, str]:
        """Names of all processes of the tree; one that the system does not name is called after its number."""
        assert self._process is not None
        named = {part.pid: part.name for part in self._running()} | {self._process.pid: "supervisor"}
        return {pid: named.get(pid, f"process-{pid}") for pid in _tree(self._process.pid)}

    def status(self) -> Status:
        return msgspec.json.decode(self._status(), type=Status)

    def cut(self) -> list[int]:
        """End all open hour files here; the sequence numbers behind their last events."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self._admin}/v1/cut", data=b"", timeout=30) as answer:
            return [int(offset) for offset in msgspec.json.decode(answer.read(), type=_Cut).next]

    def command(self, *words: str) -> int:
        """Exit code of a command about this installation; what it says goes to our standard error if it is not 0."""
        done = subprocess.run(
            [*self.words(words[0]), *words[1:]],
            cwd=self._folder,
            env=environment(),
            capture_output=True,
            timeout=_COMMAND_WITHIN_S,
        )
        if done.returncode:
            sys.stderr.write((done.stdout[-4000:] + done.stderr[-4000:]).decode(errors="replace"))
        return done.returncode

    def words(self, command: str) -> list[str]:
        return [sys.executable, "-m", "penstock", command, "--data", str(self._folder / "data")]

    def _running(self) -> list[Part]:
        return msgspec.json.decode(self._status(), type=_Running).parts

    def _status(self) -> bytes:
        with urllib.request.urlopen(f"http://127.0.0.1:{self._admin}/v1/status", timeout=30) as answer:
            text: bytes = answer.read()
            return text

    def _await_ready(self) -> None:
        """Until every worker listens: connections that came earlier would all be with the first one."""
        assert self._process is not None
        end = time.monotonic() + _READY_WITHIN_S
        while time.monotonic() < end:
            if self._process.poll() is not None:
                break
            with contextlib.suppress(OSError):
                workers = sum(part.name.startswith("api") for part in self._running())
                if _listeners(self.port) >= workers > 0:
                    return
            time.sleep(0.1)
        tail = (self._folder / "log").read_text("utf-8", "replace")[-4000:]
        raise BenchError(f"penstock {self.kind} is not ready, exit code {self._process.poll()}:\n{tail}")

    def _end(self) -> None:
        assert self._process is not None and self._log is not None
        process = self._process
        try:
            process.send_signal(signal.SIGTERM)
            self.exit_code = process.wait(_STOP_WITHIN_S)
        except subprocess.TimeoutExpired:
            self.exit_code = None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            self._log.close()
            shutil.rmtree(self._folder, ignore_errors=True)


class Sampler:
    """Reads the memory of processes each `interval_s` in a thread of its own, while it is entered."""

    def __init__(self, pids: Iterable[int], interval_s: float) -> None:
        self.samples: dict[int, list[Memory]] = {pid: [] for pid in pids}
        self.interval_s = interval_s
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Sampler:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ending.set()
        self._thread.join()

    def _run(self) -> None:
        while True:
            for pid, samples in self.samples.items():
                with contextlib.suppress(OSError, KeyError):
                    samples.append(memory(pid))
            if self._ending.wait(self.interval_s):
                return


def memory(pid: int) -> Memory:
    text = Path(f"/proc/{pid}/status").read_text("ascii", "replace")
    sizes = {name: value for name, _, value in (line.partition(":") for line in text.splitlines())}
    # KeyError: the process has ended, and is not waited for yet.
    return Memory(*(int(sizes[name].removesuffix("kB")) * 1024 for name in ("VmRSS", "RssAnon", "VmHWM")))


def megabytes(size: float) -> float:
    return round(size / 1e6, 1)


def cpu_s(pids: Iterable[int]) -> dict[int, float]:
    """User and system time of each process until now; one that has ended is left out."""
    used = {}
    for pid in pids:
        with contextlib.suppress(OSError):
            user, system = _stat(pid)[11:13]
            used[pid] = (int(user) + int(system)) / _TICKS
    return used


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as closing:
        ports = []
        for _ in range(count):
            one = closing.enter_context(socket.socket())
            one.bind(("127.0.0.1", 0))
            ports.append(one.getsockname()[1])
        return ports


def environment() -> dict[str, str]:
    """Ours, without settings of Penstock, and with the Penstock that we have imported."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PENSTOCK_")}
    source = str(Path(penstock.__file__).parent.parent)
    return kept | {"PYTHONPATH": os.pathsep.join(filter(None, (source, kept.get("PYTHONPATH"))))}


def _stat(pid: int) -> list[str]:
    """The fields behind the process's name, which may hold anything."""
    return Path(f"/proc/{pid}/stat").read_text("ascii", "replace").rpartition(")")[2].split()


def _tree(root: int) -> Iterator[int]:
    yield root
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if int(_stat(int(path.name))[1]) == root:
                yield from _tree(int(path.name))


def _listeners(port: int) -> int:
    rows = [line.split() for line in Path("/proc/net/tcp").read_text("ascii").splitlines()[1:]]
    return sum(row[1].endswith(f":{port:04X}") and row[3] == _LISTENING for row in rows)
