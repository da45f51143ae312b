"""What the client costs the device: `penstock.Client` and `penstock send`, each in a process of its own, against a real system.

`python -m bench.client TASK JOB` is such a process; it prints one JSON object. Their events are those of the load.
"""

from __future__ import annotations

import gzip
import hashlib
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import msgspec

import bench
from bench.system import BenchError, System, free_ports, megabytes, memory
from penstock import Client
from penstock.client.records import Header

_WITHIN_S = 600.0
_LINKS_MAX = 60_000
_FLUSH_S = 300.0


class Job(msgspec.Struct, frozen=True):
    """`bodies` is a file as bench.load reads it; `url` is where the API is, or where nothing is."""

    bodies: str
    spool: str
    url: str
    events: int
    seconds: float


class Done(msgspec.Struct, frozen=True):
    """Of one process: `seconds` of wall time until the task was done, CPU, and the most memory that was ever resident."""

    events: int
    seconds: float
    cpu_s: float
    memory_peak_mb: float


class ClientRun(msgspec.Struct, frozen=True):
    """The targets' figures. `problems` are wrong counts."""

    send_us: float
    through_events_per_s: float
    through_cpu_us_per_event: float
    file_events_per_s: float
    spool_bytes: int
    memory_peak_mb: float
    drained: int
    problems: list[str]


def client_run(folder: Path, up: Sequence[str], bodies: Path, *, events: int, spool_bytes: int) -> ClientRun:
    """All tasks, one after the other, on one fresh system."""
    with System(folder, up) as system:
        url = f"http://127.0.0.1:{system.port}"
        nowhere = f"http://127.0.0.1:{free_ports(1)[0]}"
        took = _run("take", Job(str(bodies), str(folder / "taken"), nowhere, events // 4, 0.0))
        through = _run("through", Job(str(bodies), str(folder / "through"), url, events, 0.0))
        file_rate = _send_file(folder, system, bodies, events)
        size = _fill(folder / "large", bodies, spool_bytes)
        drained = _run("drain", Job(str(bodies), str(folder / "large"), url, 0, 5.0))
        stored = system.status().totals.accepted
    expected = through.events + events + drained.events
    problems = [] if expected == stored else [f"{expected} events were accepted, {stored} are stored"]
    return ClientRun(
        round(1e6 * took.seconds / took.events, 2),
        round(through.events / through.seconds, 1),
        round(1e6 * through.cpu_s / through.events, 2),
        round(file_rate, 1),
        size,
        drained.memory_peak_mb,
        drained.events,
        problems,
    )


def _run(task: str, job: Job) -> Done:
    root = str(Path(bench.__file__).parent.parent)
    path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    words = [sys.executable, "-m", "bench.client", task, msgspec.json.encode(job).decode()]
    done = subprocess.run(words, env=os.environ | {"PYTHONPATH": path}, stdout=subprocess.PIPE, timeout=_WITHIN_S)
    if done.returncode:
        raise BenchError(f"The client's task {task!r} ended with exit code {done.returncode}.")
    return msgspec.json.decode(done.stdout, type=Done)


def _send_file(folder: Path, system: System, bodies: Path, events: int) -> float:
    """Events/s of `penstock send` with four lanes, from its start to its end."""
    file = folder / "events.ndjson"
    with file.open("wb") as out:
        for line in _lines(bodies, events):
            out.write(line + b"\n")
    began = time.perf_counter()
    words = ("send", str(file), "--url", f"http://127.0.0.1:{system.port}", "--lanes", "4")
    if code := system.command(*words, "--spool", str(folder / "sent")):
        raise BenchError(f"penstock send ended with exit code {code}.")
    return events / (time.perf_counter() - began)


def _fill(spool: Path, bodies: Path, size: int) -> int:
    """A spool of at least so many bytes: the same few batches under many names."""
    lane = spool / "0" / "0"
    lane.mkdir(parents=True)
    body = msgspec.msgpack.decode(bodies.read_bytes(), type=list[bytes])[0]
    raw = gzip.decompress(body)
    events = raw.count(b"\n")
    digest = hashlib.sha256(body).hexdigest()
    header = Header("penstock-batch/1", events, len(raw), len(body), digest, 0, "deviceId")
    text = msgspec.json.encode(header) + b"\n" + body
    count = -(-size // len(text))
    for n in range(1, count + 1):
        path = lane / f"{n:012}-{events}.batch"
        if n % _LINKS_MAX == 1:
            first = path
            path.write_bytes(text)
        else:
            path.hardlink_to(first)
    return count * len(text)


def _lines(bodies: Path, count: int) -> list[bytes]:
    lines: list[bytes] = []
    for body in msgspec.msgpack.decode(bodies.read_bytes(), type=list[bytes]):
        if len(lines) >= count:
            break
        lines += gzip.decompress(body).splitlines()
    return [lines[n % len(lines)] for n in range(count)]


class Watch:
    """Wall time and CPU of this process since it was made."""

    def __init__(self) -> None:
        self._began, self._cpu_s = time.perf_counter(), time.process_time()

    def done(self, events: int) -> Done:
        seconds, cpu_s = time.perf_counter() - self._began, time.process_time() - self._cpu_s
        return Done(events, round(seconds, 3), round(cpu_s, 3), megabytes(memory(os.getpid()).peak))


def take(job: Job) -> Done:
    """`send` without a hub: the time that the caller spends."""
    events = [msgspec.json.decode(line) for line in _lines(Path(job.bodies), job.events)]
    with Client(job.url, spool=job.spool) as client:
        watch = Watch()
        for event in events:
            client.send(event)
        return watch.done(len(events))


def through(job: Job) -> Done:
    """On one core, from the first `send` until the hub has answered for all."""
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    events = [msgspec.json.decode(line) for line in _lines(Path(job.bodies), job.events)]
    with Client(job.url, spool=job.spool) as client:
        watch = Watch()
        for event in events:
            client.send(event)
        client.flush(_FLUSH_S)
        return watch.done(client.stats().accepted)


def drain(job: Job) -> Done:
    """Open a large spool, and send from it for some seconds."""
    watch = Watch()
    client = Client(job.url, spool=job.spool)
    time.sleep(job.seconds)
    client.close()
    return watch.done(client.stats().accepted)


if __name__ == "__main__":
    tasks = {"take": take, "through": through, "drain": drain}
    found = tasks[sys.argv[1]](msgspec.json.decode(sys.argv[2], type=Job))
    sys.stdout.buffer.write(msgspec.json.encode(found))
