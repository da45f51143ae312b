"""A real installation in a folder of its own: starts `penstock` processes, waits for conditions, ends what it started.

Everything that is known here of the inside is DATA/run (who runs, where it listens), which `penstock status` prints too.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

PROJECT = Path(__file__).parents[2]
ROUNDS = int(os.environ.get("PENSTOCK_ROUNDS", "0"))
SEED = int(os.environ.get("PENSTOCK_SEED", "7"))
DEADLINE_S = 30.0

Found = TypeVar("Found")

# Settings of the shell that runs the tests must not reach the installation.
_ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.startswith("PENSTOCK_")} | {
    "PYTHONPATH": str(PROJECT / "src")
}


def wait_for(what: str, condition: Callable[[], Found], deadline_s: float = DEADLINE_S) -> Found:
    """What `condition` returns as soon as that is true; fails with `what` after the deadline."""
    end = time.monotonic() + deadline_s
    tick = threading.Event()
    while True:
        found = condition()
        if found:
            return found
        assert time.monotonic() < end, f"not within {deadline_s:g} s: {what}"
        tick.wait(0.02)


def alive(group: int) -> list[int]:
    """The processes of a process group that live (zombies do not)."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, of = path.read_text().rpartition(")")[2].split()[:3]
        except (OSError, ValueError):
            continue
        if int(of) == group and state != "Z":
            found.append(int(path.parent.name))
    return found


def state(pid: int) -> str:
    """One letter of /proc: `T` is stopped; empty when it is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""


def states(pid: int) -> list[str]:
    """The states of a process's threads."""
    return [state(int(path.name)) for path in Path(f"/proc/{pid}/task").glob("[0-9]*")]


def rss_anon_kib(pid: int) -> int:
    """Memory of a process that is not file pages: the hub's map does not count."""
    status = Path(f"/proc/{pid}/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("RssAnon"))


class Process:
    """One command in a process group of its own, with its output in a file."""

    def __init__(self, arguments: Sequence[str], log: Path, environment: Mapping[str, str] | None = None) -> None:
        self.log = log
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                [sys.executable, *arguments],
                cwd=log.parent,
                env={**_ENVIRONMENT, **(environment or {})},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.pid = self._process.pid

    @property
    def ended(self) -> bool:
        return self._process.poll() is not None

    def signal(self, number: int) -> None:
        """To this process alone."""
        if not self.ended:
            os.kill(self.pid, number)

    def freeze(self) -> None:
        """Stop the whole group; returns when no thread of it runs or is in a system call any more."""
        os.killpg(self.pid, signal.SIGSTOP)
        wait_for("all threads stopped", lambda: all(set(states(pid)) <= {"T"} for pid in alive(self.pid)))

    def freeze_anywhere(self) -> None:
        """Stop the whole group, where threads may still be inside of a system call such as a sync: no more will be answered."""
        os.killpg(self.pid, signal.SIGSTOP)
        wait_for("all processes stopped", lambda: all(state(pid) in "TZD" for pid in alive(self.pid)))

    def thaw(self) -> None:
        os.killpg(self.pid, signal.SIGCONT)

    def stop(self, deadline_s: float = DEADLINE_S) -> int:
        """SIGTERM, and the exit code."""
        self.signal(signal.SIGTERM)
        return self.wait(deadline_s)

    def wait(self, deadline_s: float = DEADLINE_S) -> int:
        code = self._process.wait(deadline_s)
        wait_for("no process is left behind", lambda: not alive(self.pid))
        return code

    def kill(self) -> None:
        """kill -9 for the whole group; returns when nothing is left of it."""
        for pid in alive(self.pid):
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        self._process.wait(DEADLINE_S)
        wait_for("all killed", lambda: not alive(self.pid))

    def text(self) -> str:
        return self.log.read_text(errors="replace")


class System:
    """`penstock up`, or `api`, on `data`. Ports are new at each start; `url` and `admin` are those of the running one.

    `environment` is for all its commands, beside that of the tests. With `anonymous=False` it has keys, and `get` shows the first.
    """

    def __init__(
        self,
        folder: Path,
        *,
        data: Path | None = None,
        period: str = "10s",
        partitions: int = 16,
        workers: int = 2,
        options: Sequence[str] = (),
        program: Sequence[str] = ("-m", "penstock"),
        environment: Mapping[str, str] | None = None,
        anonymous: bool = True,
        command: str = "up",
    ) -> None:
        self.command = command
        self.folder = folder
        self.environment = environment or {}
        self.data = data or folder / "data"
        self.partitions = partitions
        self.program = tuple(program)
        self.options = [
            *("--period", period, "--partitions", str(partitions), "--workers", str(workers)),
            *(("--anonymous",) if anonymous else ()),
            *options,
        ]
        self.anonymous = anonymous
        self._processes: list[Process] = []
        self._up: Process | None = None
        self.url = self.admin = ""

    @property
    def store(self) -> Path:
        return self.data / "store"

    @property
    def key(self) -> str:
        """The first key's text, empty without keys."""
        return "" if self.anonymous else (self.data / "key").read_text().strip()

    @property
    def headers(self) -> dict[str, str]:
        """What opens it."""
        return {} if self.anonymous else {"Authorization": f"Bearer {self.key}"}

    @property
    def up(self) -> Process:
        assert self._up is not None, "the system was not started"
        return self._up

    def process(
        self,
        *arguments: str,
        program: Sequence[str] = ("-m", "penstock"),
        log: str = "log",
        environment: Mapping[str, str] | None = None,
    ) -> Process:
        """Any command of penstock that goes on running; ended in the end. `environment` is beside the system's."""
        started = Process([*program, *arguments], self.folder / log, {**self.environment, **(environment or {})})
        self._processes.append(started)
        return started

    def start(self, *, ready: bool = True, admin: bool = False) -> System:
        """`ready`: until it takes events; a hub that is full is never ready, but answers. `admin`: asked there, where no TLS is."""
        self._up = self.process(*self.up_arguments(), program=self.program)
        wait_for("the addresses are known", lambda: self._addresses(), DEADLINE_S)
        path = "/health/ready" if ready else "/health/live"
        wait_for(f"{path} is 200", lambda: self.up.ended or self.get(path, admin=admin)[0] == 200)
        assert not self.up.ended, self.up.text()
        return self

    def up_arguments(self, *more: str) -> list[str]:
        addresses = ("--listen", "127.0.0.1:0", "--admin", "127.0.0.1:0")
        return [self.command, "--data", str(self.data), *addresses, *self.options, *more]

    def stop(self) -> int:
        return self.up.stop()

    def kill(self) -> None:
        self.up.kill()

    def close(self) -> None:
        for process in self._processes:
            process.kill()

    def _addresses(self) -> bool:
        assert not self.up.ended, self.up.text()
        run = self.run_file()
        if run:
            self.url, self.admin = f"http://{run['listen']}", f"http://{run['admin']}"
        return bool(run)

    def run_file(self) -> dict[str, Any]:
        """What `up` says of itself; empty before it does."""
        try:
            found: dict[str, Any] = json.loads((self.data / "run" / f"parts-{self.up.pid}.json").read_bytes())
        except (OSError, ValueError):
            return {}
        return found

    def parts(self, prefix: str) -> dict[str, int]:
        """Name → pid of the running parts whose name begins so."""
        return {
            part["name"]: part["pid"]
            for part in self.run_file().get("parts", ())
            if part["name"].startswith(prefix) and state(part["pid"]) not in ("", "Z")
        }

    def get(self, path: str, *, admin: bool = False, method: str = "GET") -> tuple[int, bytes]:
        """Status and body; status 0 when nobody answers."""
        url = (self.admin if admin else self.url) + path
        request = urllib.request.Request(url, method=method, headers=self.headers)
        try:
            with urllib.request.urlopen(request, timeout=10) as answer:
                return answer.status, answer.read()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read()
        except OSError:
            return 0, b""

    def ends(self) -> list[int]:
        """The next sequence number of each partition: unchanged means that nothing was stored."""
        body = wait_for("GET /v1/partitions is 200", lambda: self._body("/v1/partitions"))
        return [one["next"] for one in json.loads(body)["partitions"]]

    def _body(self, path: str) -> bytes:
        status, body = self.get(path)
        return body if status == 200 else b""

    def run(self, *arguments: str, stdin: bytes = b"", deadline_s: float = 120) -> subprocess.CompletedProcess[bytes]:
        """A command of penstock, to its end."""
        return subprocess.run(
            [sys.executable, "-m", "penstock", *arguments],
            cwd=self.folder,
            env={**_ENVIRONMENT, **self.environment},
            input=stdin,
            capture_output=True,
            timeout=deadline_s,
            check=False,
        )

    def check(self, command: str, *arguments: str) -> subprocess.CompletedProcess[bytes]:
        """flush, audit, verify …: on this data, and it must exit 0."""
        done = self.run(command, "--data", str(self.data), *arguments)
        assert done.returncode == 0, (
            f"{command}: {done.stdout.decode()}{done.stderr.decode()}\n{self.up.text()[-4000:]}"
        )
        return done

    def settle(self) -> None:
        """Everything accepted goes to the store, and nothing is wrong with it: the end of every test."""
        self.check("flush")
        self.check("audit", "--deep")
        self.check("verify")
