"""What a user's processor can read: `penstock.EventProcessorHost` in a process of its own, from the data folder and over HTTP.

`python -m bench.processor JOB` is such a process; it prints one JSON object. Each figure is of a group that has read nothing yet.
"""

from __future__ import annotations

import http.client
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

import bench
from bench.system import BenchError, System
from penstock import EventProcessorHost, Events
from penstock.clock import SystemClock
from penstock.telemetry.log import open_log
from penstock.wire.frame import content

AS = ("frames", "events")
_WITHIN_S = 300.0


class Job(msgspec.Struct, frozen=True):
    """`hub` is a data folder or an address; `shape` is one of AS; `events` are in the hub."""

    hub: str
    store: str
    shape: str
    events: int


class Read(msgspec.Struct, frozen=True):
    """From the first `process` to the last, in a process that stays on one core: wall time and CPU, and how many events came."""

    events: int
    seconds: float
    cpu_s: float


class Figure(msgspec.Struct, frozen=True):
    """`where` is `folder` or `http`. `events_per_core_s` is by the processor's own CPU; over HTTP the API's workers use the cores too."""

    where: str
    shape: str
    events_per_core_s: float
    events_per_s: float


class ProcessorRun(msgspec.Struct, frozen=True):
    """`problems` are wrong counts."""

    figures: list[Figure]
    problems: list[str]


def processor_run(folder: Path, up: Sequence[str], bodies: Path, *, per_body: int, events: int) -> ProcessorRun:
    """All figures, one after the other, on one fresh system that nothing else uses meanwhile."""
    figures, problems = [], []
    with System(folder, up) as system:
        stored = _fill(system, bodies, per_body, events)
        if code := system.command("flush", "--timeout", "600s"):
            problems.append(f"penstock flush ended with exit code {code}")
        for where, hub in (("folder", str(folder / "data")), ("http", f"http://127.0.0.1:{system.port}")):
            for shape in AS:
                read = _run(Job(hub, str(folder / f"leases-{where}-{shape}"), shape, stored))
                if read.events != stored:
                    problems.append(f"{stored} events are stored, {read.events} came as {shape} from {where}")
                per_core, per_s = read.events / read.cpu_s, read.events / read.seconds
                figures.append(Figure(where, shape, round(per_core, 1), round(per_s, 1)))
    return ProcessorRun(figures, problems)


def _fill(system: System, bodies: Path, per_body: int, events: int) -> int:
    """At least `events`, posted one body after the other."""
    made = msgspec.msgpack.decode(bodies.read_bytes(), type=list[bytes])
    headers = {"Content-Type": "application/x-ndjson", "Content-Encoding": "gzip"}
    connection = http.client.HTTPConnection("127.0.0.1", system.port, timeout=30)
    count = -(-events // per_body)
    for n in range(count):
        connection.request("POST", "/v1/events", made[n % len(made)], headers)
        with connection.getresponse() as answer:
            body = answer.read()
        if answer.status != 200:
            raise BenchError(f"A batch was answered {answer.status}: {body[:200].decode(errors='replace')}.")
    connection.close()
    return count * per_body


def _run(job: Job) -> Read:
    root = str(Path(bench.__file__).parent.parent)
    path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    words = [sys.executable, "-m", "bench.processor", msgspec.json.encode(job).decode()]
    done = subprocess.run(words, env=os.environ | {"PYTHONPATH": path}, stdout=subprocess.PIPE, timeout=_WITHIN_S)
    if done.returncode:
        raise BenchError(f"The processor's task ended with exit code {done.returncode}.")
    return msgspec.json.decode(done.stdout, type=Read)


class Counting:
    """Counts what all partitions read, and how long that takes."""

    def __init__(self, take: Callable[[Events], int], expected: int) -> None:
        self.done = threading.Event()
        self._take = take
        self._expected = expected
        self._counts: dict[int, int] = {}
        self._began: tuple[float, float] | None = None
        self._ended = (0.0, 0.0)

    def process(self, events: Events) -> str | None:
        self._began = self._began or _now()
        taken = self._take(events)
        self._counts[events.partition] = self._counts.get(events.partition, 0) + taken
        if sum(self._counts.copy().values()) >= self._expected and not self.done.is_set():
            self._ended = _now()
            self.done.set()
        return events.next_offset

    def read(self) -> Read:
        began = self._began or _now()
        (wall, cpu), (wall_end, cpu_end) = began, self._ended
        return Read(sum(self._counts.values()), round(wall_end - wall, 3), round(cpu_end - cpu, 3))


def _now() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()


def take_frames(events: Events) -> int:
    """What a processor does at least that looks at lines: each frame unzipped and split."""
    return sum(len(content(frame).split(b"\n")) - 1 for frame in events.frames if not frame.is_marker)


def take_events(events: Events) -> int:
    """What a processor does at least that looks at events: each with its device, number and time."""
    count = 0
    for event in events:
        count += event.sequence_number >= 0
    return count


def read_all(job: Job) -> Read:
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    counting = Counting(take_frames if job.shape == "frames" else take_events, job.events)
    quiet = open_log("bench", clock=SystemClock(), level="warning", stream=sys.stderr)
    with EventProcessorHost(job.hub, store=job.store, group=job.shape, name="bench", log=quiet) as host:
        host.start(counting.process)
        if not counting.done.wait(_WITHIN_S / 2):
            raise BenchError(f"Not all events came: {counting.read()}; {host.state()}")
        return counting.read()


if __name__ == "__main__":
    found = read_all(msgspec.json.decode(sys.argv[1], type=Job))
    sys.stdout.buffer.write(msgspec.json.encode(found))
