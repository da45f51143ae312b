"""What grows and what must not: cost against partitions, devices, and length of the log; memory over a long run."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import msgspec
from rich.console import Console
from rich.table import Table

from bench.codec import floor_ns
from bench.load import Plan, Result
from bench.report import Machine, Target, machine, target, targets_table
from bench.run import Loader, Options, Window, Work, measure, plan_of, settle
from bench.system import Memory, System, megabytes

RATIO_MOST = 1.3
RANGES = ("partitions", "devices", "log")
PARTITIONS = (1, 64)
DEVICES = (10, 100_000)
LOG_BYTES_LEAST = 100_000_000
_FILL_S = 3600.0
_SOAK_SAMPLE_S = 1.0
_ENDS = 10

Say = Callable[[str], None]
Bodies = Callable[[int], tuple[Path, Sequence[bytes]]]
"""From a number of devices: the file of request bodies, and the bodies."""


class Point(msgspec.Struct, frozen=True):
    """One measurement; memory is the most in the window, MB, of the largest worker and of the archiver."""

    at: int
    events_per_s: float
    server_cpu_us_per_event: float
    floor_ns: float
    worker_mb: float
    worker_anonymous_mb: float
    archiver_mb: float
    archiver_anonymous_mb: float


class Range(msgspec.Struct, frozen=True):
    """Points from one end of a range and the other, in the order in which they were measured. Ratios are of the means."""

    name: str
    points: list[Point]
    cpu_ratio: float
    worker_anonymous_ratio: float
    archiver_anonymous_ratio: float
    problems: list[str]


class Growth(msgspec.Struct, frozen=True):
    ok: bool
    machine: Machine
    options: Options
    ranges: list[Range]
    targets: list[Target]


class Drift(msgspec.Struct, frozen=True):
    """MB: median of the first and of the last samples; `slope` is of the least-squares line of the second half, MB a minute."""

    name: str
    start_mb: float
    end_mb: float
    slope_mb_per_min: float
    anonymous_start_mb: float
    anonymous_end_mb: float
    anonymous_slope_mb_per_min: float


class Soak(msgspec.Struct, frozen=True):
    ok: bool
    machine: Machine
    options: Options
    seconds: float
    events_per_s: float
    accepted: int
    parts: list[Drift]
    problems: list[str]


class Bench:
    """What every measurement here needs."""

    def __init__(self, folder: Path, options: Options, bodies: Bodies, say: Say) -> None:
        self.folder = folder
        self.options = options
        self.bodies = bodies
        self.say = say
        self._systems = 0

    def growth(self, names: Sequence[str], log_bytes: int) -> Growth:
        """`names` are of `RANGES`; `log_bytes` is the far end of that of the log."""
        options = self.options
        ranges, targets = [], []
        for name in names:
            if name == "partitions":
                one = self._ends(name, PARTITIONS, lambda at: self._fresh(at, at, options.devices))
            elif name == "devices":
                one = self._ends(name, DEVICES, lambda at: self._fresh(at, options.partitions, at))
            else:
                one = self._log(log_bytes)
            ranges.append(one)
            targets.append(target(f"{one.name}: CPU per event, ratio", one.cpu_ratio, RATIO_MOST, "×"))
            if name == "log":
                who = f"{one.name}: anonymous memory, ratio,"
                targets.append(target(f"{who} worker", one.worker_anonymous_ratio, RATIO_MOST, "×"))
                targets.append(target(f"{who} archiver", one.archiver_anonymous_ratio, RATIO_MOST, "×"))
        return Growth(not any(one.problems for one in ranges), machine(), options, ranges, targets)

    def soak(self, seconds: float) -> Soak:
        """Short periods and a short log, so that closing files and trimming are part of it, and it needs disk for its archive only."""
        path, _ = self.bodies(self.options.devices)
        with self._system(self.options.partitions, ("--period", "10s", "--retention", "1m")) as system:
            names = system.parts()
            self.say(f"{seconds:g} s of load")
            plan = plan_of(self._work(path), system, warm_up_s=self.options.warm_up_s, seconds=seconds, producer="soak")
            window = measure(system, plan, sample_s=_SOAK_SAMPLE_S)
            counts = settle(system, [window.result], numbered=True)
        result = window.result
        return Soak(
            not counts.problems,
            machine(),
            self.options,
            round(result.seconds, 3),
            round(result.accepted_in_window / result.seconds, 1),
            result.accepted,
            [drift(names[pid], samples) for pid, samples in window.samples.items() if samples],
            counts.problems + counts.remarks,
        )

    def _fresh(self, at: int, partitions: int, devices: int) -> tuple[Point, list[str]]:
        path, bodies = self.bodies(devices)
        floor = floor_ns(bodies, events=self.options.events_per_batch, seconds=self.options.floor_s)
        with self._system(partitions) as system:
            window = measure(system, self._plan(system, path, "load"))
            point = point_of(at, window, system.parts(), floor)
            return point, settle(system, [window.result], numbered=True).problems

    def _ends(self, name: str, ends: tuple[int, int], measured: Callable[[int], tuple[Point, list[str]]]) -> Range:
        """Each end twice, in the order A B B A, so that a machine that slows down meanwhile does not look like growth."""
        points, problems = [], []
        for at in (*ends, *reversed(ends)):
            self.say(f"{name}: {at:,}")
            point, wrong = measured(at)
            points.append(point)
            problems += wrong
        return range_of(name, points, problems)

    def _log(self, log_bytes: int) -> Range:
        path, bodies = self.bodies(self.options.devices)
        points, results = [], []
        with self._system(self.options.partitions) as system:
            for at in (LOG_BYTES_LEAST, log_bytes):
                self.say(f"bytes in the log: {at:,}")
                results.append(self._fill(system, path, at))
                floor = floor_ns(bodies, events=self.options.events_per_batch, seconds=self.options.floor_s)
                window = measure(system, self._plan(system, path, f"load-{at}"))
                results.append(window.result)
                points.append(point_of(at, window, system.parts(), floor))
            problems = settle(system, results, numbered=True).problems
        return range_of("bytes in the log", points, problems)

    def _fill(self, system: System, path: Path, goal_bytes: int) -> Result:
        plan = plan_of(self._work(path), system, warm_up_s=0, seconds=_FILL_S, producer=f"fill-{goal_bytes}")
        with Loader(plan) as loader:
            end = time.monotonic() + _FILL_S
            while system.status().storage.bytes_used < goal_bytes and time.monotonic() < end:
                time.sleep(0.2)
            loader.stop()
            return loader.result()

    def _plan(self, system: System, path: Path, producer: str) -> Plan:
        options = self.options
        work = self._work(path)
        return plan_of(work, system, warm_up_s=options.warm_up_s, seconds=options.seconds, producer=producer)

    def _work(self, path: Path) -> Work:
        options = self.options
        return Work("batches", path, options.events_per_batch, options.connections, zipped=True, numbered=True)

    def _system(self, partitions: int, more: Sequence[str] = ()) -> System:
        self._systems += 1
        return System(self.folder / f"growth-{self._systems}", self.options.up(partitions=partitions, more=more))


def point_of(at: int, window: Window, names: Mapping[int, str], floor: float) -> Point:
    def most(kind: str, field: str) -> float:
        kept = [window.samples.get(pid, []) for pid, name in names.items() if name.startswith(kind)]
        return megabytes(max((getattr(sample, field) for samples in kept for sample in samples), default=0))

    return Point(
        at,
        round(window.result.accepted_in_window / window.result.seconds, 1),
        window.cpu_us_per_event(),
        round(floor, 1),
        most("api", "resident"),
        most("api", "anonymous"),
        most("archiver", "resident"),
        most("archiver", "anonymous"),
    )


def range_of(name: str, points: Sequence[Point], problems: Sequence[str]) -> Range:
    low, high = min(point.at for point in points), max(point.at for point in points)

    def ratio(field: str) -> float:
        ends = [statistics.fmean(getattr(one, field) for one in points if one.at == end) for end in (low, high)]
        return round(ends[1] / ends[0], 3) if ends[0] else 0.0

    return Range(
        name,
        list(points),
        ratio("server_cpu_us_per_event"),
        ratio("worker_anonymous_mb"),
        ratio("archiver_anonymous_mb"),
        list(problems),
    )


def drift(name: str, samples: Sequence[Memory]) -> Drift:
    """Of samples that were taken each second."""
    return Drift(
        name,
        *_drift([sample.resident for sample in samples]),
        *_drift([sample.anonymous for sample in samples]),
    )


def _drift(sizes: Sequence[int]) -> tuple[float, float, float]:
    ends = max(1, min(_ENDS, len(sizes) // 3))
    start, end = statistics.median(sizes[:ends]), statistics.median(sizes[-ends:])
    late = sizes[len(sizes) // 2 :]
    slope = statistics.linear_regression(range(len(late)), late).slope if len(late) > 1 else 0.0
    return megabytes(start), megabytes(end), round(slope * 60 / _SOAK_SAMPLE_S / 1e6, 3)


def show_growth(growth: Growth, out: Console) -> None:
    table = Table(
        "range", "at", "events/s", "server CPU, µs", "floor, ns", "worker, MB (anon.)", "archiver, MB (anon.)"
    )
    for one in growth.ranges:
        table.add_section()
        for point in one.points:
            table.add_row(
                one.name,
                f"{point.at:,}",
                f"{point.events_per_s:,.0f}",
                f"{point.server_cpu_us_per_event:.3f}",
                f"{point.floor_ns:,.0f}",
                f"{point.worker_mb:.0f} ({point.worker_anonymous_mb:.0f})",
                f"{point.archiver_mb:.0f} ({point.archiver_anonymous_mb:.0f})",
            )
        ratios = (one.cpu_ratio, one.worker_anonymous_ratio, one.archiver_anonymous_ratio)
        cpu, worker, archiver = (f"× {ratio:.2f}" for ratio in ratios)
        table.add_row("", "ratio", "", cpu, "", f"({worker})", f"({archiver})", style="bold")
    out.print(table)
    out.print(targets_table(growth.targets))
    for one in growth.ranges:
        for problem in one.problems:
            out.print(f"PROBLEM: {one.name}: {problem}", style="bold red", markup=False)


def show_soak(soak: Soak, out: Console) -> None:
    title = f"{soak.seconds:,.0f} s at {soak.events_per_s:,.0f} events/s, {soak.accepted:,} events"
    table = Table("process", "start, MB", "end", "MB a minute", "anonymous, start", "end", "MB a minute", title=title)
    for part in soak.parts:
        figures = msgspec.structs.astuple(part)[1:]
        table.add_row(
            part.name, *(f"{figure:+.2f}" if at % 3 == 2 else f"{figure:.0f}" for at, figure in enumerate(figures))
        )
    out.print(table)
    for problem in soak.problems:
        out.print(f"PROBLEM: {problem}", style="bold red", markup=False)
