"""One measurement: the system, the load on it, what it used meanwhile, and whether the counts are right."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Generic, Protocol, Self, TypeVar

import msgspec

import bench
from bench.load import ANSWERS_WITHIN_S, Latency, Mark, Plan, Result
from bench.system import BenchError, Memory, Sampler, System, cpu_s, megabytes, memory

SAMPLE_S = 0.5


class Options(msgspec.Struct, frozen=True):
    """What the command line says."""

    seconds: float
    warm_up_s: float
    floor_s: float
    workers: int
    partitions: int
    period: str
    connections: int
    single_connections: int
    events_per_batch: int
    devices: int
    bodies: int
    seed: int
    client_events: int
    spool_bytes: int
    processor_events: int

    def up(self, *, partitions: int = 0, more: Sequence[str] = ()) -> list[str]:
        count = str(partitions or self.partitions)
        return ["--workers", str(self.workers), "--partitions", count, "--period", self.period, *more]


class Work(msgspec.Struct, frozen=True):
    """What is sent. `bodies` is a file as bench.load reads it."""

    name: str
    bodies: Path
    events: int
    connections: int
    zipped: bool
    numbered: bool


class PartUse(msgspec.Struct, frozen=True):
    """CPU in the measured window and until everything was archived, µs for each event of either; memory, MB of 10^6 bytes."""

    name: str
    cpu_us_per_event: float
    cpu_us_per_event_to_the_end: float
    memory_peak_mb: float
    memory_anonymous_peak_mb: float


class Run(msgspec.Struct, frozen=True):
    """`problems` are wrong counts, `remarks` what makes the figures doubtful."""

    name: str
    connections: int
    seconds: float
    answers_per_s: float
    events_per_s: float
    server_cpu_us_per_event: float
    archive_cpu_us_per_event: float
    load_cpu_us_per_event: float
    load_cores: float
    latency_ms: Latency
    busy_answers: int
    sent: int
    accepted: int
    stored: int
    archived: int
    audit_exit: int
    parts: list[PartUse]
    problems: list[str]
    remarks: list[str]


class Window(msgspec.Struct, frozen=True):
    """What a load did, and what each process used while it was measured."""

    result: Result
    cpu_s: dict[int, float]
    samples: dict[int, list[Memory]]

    def cpu_us_per_event(self) -> float:
        return per_event_us(sum(self.cpu_s.values()), self.result.accepted_in_window)


R = TypeVar("R", bound=msgspec.Struct)


class Generator(Generic[R]):
    """The process of a load generator, a module of bench; entered, it runs, and left, it has ended."""

    def __init__(self, module: str, plan: msgspec.Struct, result: type[R]) -> None:
        self._result = result
        root = str(Path(bench.__file__).parent.parent)
        path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
        self._process = subprocess.Popen(
            [sys.executable, "-m", module, msgspec.json.encode(plan).decode()],
            env=os.environ | {"PYTHONPATH": path},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        self._process.kill()
        self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()

    def stop(self) -> None:
        """Have it end before its time."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()

    def await_mark(self, state: str) -> None:
        while True:
            line = self._line()
            if isinstance(line, Mark) and line.state == state:
                return

    def result(self) -> R:
        while True:
            line = self._line()
            if not isinstance(line, Mark):
                self._process.wait(ANSWERS_WITHIN_S)
                return line

    def _line(self) -> Mark | R:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise BenchError(f"The load generator ended with exit code {self._process.wait()}.")
        told: Mark | R = msgspec.json.decode(line, type=Mark | self._result)
        return told


class Loader(Generator[Result]):
    """The load of bench.load."""

    def __init__(self, plan: Plan) -> None:
        super().__init__("bench.load", plan, Result)


def plan_of(work: Work, system: System, *, warm_up_s: float, seconds: float, producer: str) -> Plan:
    return Plan(
        system.port,
        str(work.bodies),
        work.events,
        work.connections,
        warm_up_s,
        seconds,
        work.zipped,
        work.numbered,
        producer,
    )


def measure(system: System, plan: Plan, *, sample_s: float = SAMPLE_S) -> Window:
    pids = list(system.parts())
    with Loader(plan) as loader:
        loader.await_mark("began")
        before = cpu_s(pids)
        with Sampler(pids, sample_s) as sampler:
            loader.await_mark("ended")
            after = cpu_s(pids)
        used = {pid: after[pid] - before[pid] for pid in pids if pid in after}
        return Window(loader.result(), used, sampler.samples)


def run(system: System, options: Options, work: Work, settled: Settle | None = None) -> Run:
    """A fresh system, one load, and its end. `settled`: what compares the counts, if not `settle`."""
    with system:
        names = system.parts()
        before = cpu_s(names)
        plan = plan_of(work, system, warm_up_s=options.warm_up_s, seconds=options.seconds, producer="load")
        window = measure(system, plan)
        counts = (settled or settle)(system, [window.result], numbered=work.numbered)
        after = cpu_s(names)
        peaks = _peaks(names, window)
    if system.exit_code != 0:
        counts.remarks.append(f"penstock {system.kind} ended with exit code {system.exit_code}")
    result = window.result
    to_the_end = {pid: after.get(pid, 0.0) - before[pid] for pid in names}
    parts = [
        PartUse(
            name,
            per_event_us(window.cpu_s.get(pid, 0.0), result.accepted_in_window),
            per_event_us(to_the_end[pid], result.accepted),
            *peaks.get(pid, (0.0, 0.0)),
        )
        for pid, name in names.items()
    ]
    return Run(
        work.name,
        work.connections,
        round(result.seconds, 3),
        round(result.answers / result.seconds, 1),
        round(result.accepted_in_window / result.seconds, 1),
        window.cpu_us_per_event(),
        sum(part.cpu_us_per_event_to_the_end for part in parts if part.name == "archiver"),
        per_event_us(result.cpu_s, result.accepted_in_window),
        round(result.cpu_s / result.seconds, 3),
        result.latency_ms,
        result.busy,
        result.sent,
        result.accepted,
        counts.stored,
        counts.archived,
        counts.audit_exit,
        parts,
        counts.problems,
        counts.remarks,
    )


class Counts(msgspec.Struct):
    stored: int
    archived: int
    audit_exit: int
    problems: list[str]
    remarks: list[str]


class Settle(Protocol):
    def __call__(self, system: System, results: Sequence[Result], /, *, numbered: bool) -> Counts: ...


def settle(system: System, results: Sequence[Result], *, numbered: bool) -> Counts:
    """Archive everything, and compare what was sent to this system with what it holds."""
    flush_exit = system.command("flush", "--timeout", "600s")
    audit_exit = system.command("audit")
    status = system.status()
    stored = status.totals.accepted
    problems = wrong_counts(results, stored, audit_exit, numbered=numbered)
    remarks = [f"{part.name} was started {part.restarts + 1} times" for part in status.parts if part.restarts]
    if flush_exit:
        remarks.append(f"penstock flush ended with exit code {flush_exit}")
    return Counts(stored, status.totals.archived, audit_exit, problems, remarks)


def wrong_counts(results: Sequence[Result], stored: int, audit_exit: int, *, numbered: bool) -> list[str]:
    """What fails the benchmark. A batch without a number that was sent again after a 503 may be stored twice."""
    sent, accepted = sum(r.sent for r in results), sum(r.accepted for r in results)
    problems = [failure for result in results for failure in result.failures]
    if accepted != sent:
        problems.append(f"{sent} events were sent, {accepted} accepted")
    if stored < accepted or (stored > accepted and (numbered or not any(r.busy for r in results))):
        problems.append(f"{accepted} events were accepted, {stored} are stored")
    if audit_exit:
        problems.append(f"penstock audit ended with exit code {audit_exit}")
    return problems


def per_event_us(seconds: float, events: int) -> float:
    return round(1e6 * seconds / events, 4) if events else 0.0


def _peaks(pids: Iterable[int], window: Window) -> dict[int, tuple[float, float]]:
    """MB: the most resident of its life, the most anonymous of those sampled in the window."""
    peaks = {}
    for pid in pids:
        samples = window.samples.get(pid, [])
        with contextlib.suppress(OSError, KeyError):
            samples = [*samples, memory(pid)]
        if samples:
            peaks[pid] = (megabytes(samples[-1].peak), megabytes(max(sample.anonymous for sample in samples)))
    return peaks
