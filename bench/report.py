"""The figures, the targets they are held against, and how both are printed."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator, Sequence

import msgspec
from rich.console import Console
from rich.table import Table

from bench.client import ClientRun
from bench.processor import ProcessorRun
from bench.run import Options, PartUse, Run

THROUGHPUT_LEAST = 0.45
CPU_MOST = 3.2
SINGLE_CPU_US_MOST = 80.0
WORKER_MB_MOST = 300.0
ARCHIVER_MB_MOST = 150.0
SEND_US_MOST = 20.0
THROUGH_LEAST = 40_000.0
FILE_LEAST = 150_000.0
CLIENT_MB_MOST = 64.0
PROCESSOR_LEAST = {"frames": 300_000.0, "events": 150_000.0}


class Floor(msgspec.Struct, frozen=True):
    """CPU of unzip and zip of the same bodies on one core, measured before and after the load, and the mean of both."""

    before_ns: float
    after_ns: float
    ns_per_event: float
    events_per_s: float


class Target(msgspec.Struct, frozen=True):
    """`bound` is inclusive: the least value if `at_least`, else the most."""

    what: str
    value: float
    bound: float
    at_least: bool
    unit: str
    reached: bool


class Machine(msgspec.Struct, frozen=True):
    cores: int
    python: str
    system: str


class Report(msgspec.Struct, frozen=True):
    """`ok` is about the counts alone: no figure makes it false."""

    ok: bool
    machine: Machine
    options: Options
    floor: Floor
    runs: list[Run]
    client: ClientRun | None
    processor: ProcessorRun | None
    targets: list[Target]


def machine() -> Machine:
    return Machine(os.cpu_count() or 1, platform.python_version(), platform.platform())


def floor_of(before_ns: float, after_ns: float) -> Floor:
    mean_ns = (before_ns + after_ns) / 2
    return Floor(round(before_ns, 1), round(after_ns, 1), round(mean_ns, 1), round(1e9 / mean_ns, 1))


def make_report(
    options: Options, floor: Floor, runs: Sequence[Run], client: ClientRun | None, processor: ProcessorRun | None
) -> Report:
    targets = [*_targets(floor, runs)]
    targets += [*(_client_targets(client) if client else ()), *(_processor_targets(processor) if processor else ())]
    ok = not any(run.problems for run in (*runs, client, processor) if run)
    return Report(ok, machine(), options, floor, list(runs), client, processor, targets)


def target(what: str, value: float, bound: float, unit: str, *, at_least: bool = False) -> Target:
    reached = value >= bound if at_least else value <= bound
    return Target(what, round(value, 3), bound, at_least, unit, reached)


def _targets(floor: Floor, runs: Sequence[Run]) -> list[Target]:
    targets = []
    for run in runs:
        if run.name == "batches":
            per_core = run.events_per_s / floor.events_per_s
            cpu = 1000 * run.server_cpu_us_per_event / floor.ns_per_event
            targets.append(
                target("batches: events/s ÷ codec floor of one core", per_core, THROUGHPUT_LEAST, "×", at_least=True)
            )
            targets.append(target("batches: server CPU per event ÷ codec floor", cpu, CPU_MOST, "×"))
        else:
            targets.append(
                target(f"{run.name}: server CPU per event", run.server_cpu_us_per_event, SINGLE_CPU_US_MOST, "µs")
            )
    for kind, bound in (("api", WORKER_MB_MOST), ("archiver", ARCHIVER_MB_MOST)) if runs else ():
        parts = [part for run in runs for part in run.parts if part.name.startswith(kind)]
        who = "worker" if kind == "api" else kind
        targets.append(target(f"{who}: resident memory, peak", _most(parts, "memory_peak_mb"), bound, "MB"))
        targets.append(target(f"{who}: of it anonymous", _most(parts, "memory_anonymous_peak_mb"), bound, "MB"))
    return targets


def _client_targets(client: ClientRun) -> Iterator[Target]:
    yield target("client: `send`, without fsync", client.send_us, SEND_US_MOST, "µs")
    through = client.through_events_per_s
    yield target("client: through the spool, on one core", through, THROUGH_LEAST, "events/s", at_least=True)
    yield target("penstock send: 4 lanes", client.file_events_per_s, FILE_LEAST, "events/s", at_least=True)
    what = f"client: resident memory, peak, spool of {client.spool_bytes / 1e9:.2g} GB"
    yield target(what, client.memory_peak_mb, CLIENT_MB_MOST, "MB")


def _processor_targets(processor: ProcessorRun) -> Iterator[Target]:
    for one in processor.figures:
        where = "over HTTP" if one.where == "http" else "from the data folder"
        what = f"processor: {one.shape} {where}, on one core ({one.events_per_s:,.0f} by the clock)"
        yield target(what, one.events_per_core_s, PROCESSOR_LEAST[one.shape], "events/s", at_least=True)


def _most(parts: Sequence[PartUse], field: str) -> float:
    return max((getattr(part, field) for part in parts), default=0.0)


def show(report: Report, out: Console) -> None:
    floor = report.floor
    out.print(
        f"{report.machine.cores} cores, Python {report.machine.python}, {report.options.workers} workers. Codec floor: "
        f"{floor.ns_per_event:,.0f} ns an event ({floor.before_ns:,.0f} before, {floor.after_ns:,.0f} after), "
        f"{floor.events_per_s:,.0f} events/s a core.",
        highlight=False,
    )
    if report.runs:
        out.print(_figures(report))
        out.print(_parts(report.runs))
    out.print(targets_table(report.targets))
    show_problems(report.runs, out)
    for name, of in (("client", report.client), ("processor", report.processor)):
        for problem in of.problems if of else ():
            out.print(f"PROBLEM: {name}: {problem}", style="bold red", markup=False)


def show_problems(runs: Sequence[Run], out: Console) -> None:
    for run in runs:
        for remark in run.remarks:
            out.print(f"{run.name}: {remark}", style="yellow", markup=False)
        for problem in run.problems:
            out.print(f"PROBLEM: {run.name}: {problem}", style="bold red", markup=False)


def _figures(report: Report) -> Table:
    runs = report.runs
    table = Table("", *(run.name for run in runs))
    for column in table.columns[1:]:
        column.justify = "right"
    rows: tuple[tuple[str, str, str], ...] = (
        ("connections", "connections", ","),
        ("accepted events/s, durable", "events_per_s", ",.0f"),
        ("answers/s", "answers_per_s", ",.0f"),
        ("server CPU, µs an event", "server_cpu_us_per_event", ",.3f"),
        ("archive CPU until all is archived, µs an event", "archive_cpu_us_per_event", ",.3f"),
        ("load generator CPU, µs an event", "load_cpu_us_per_event", ",.3f"),
        ("load generator, cores", "load_cores", ".2f"),
        ("503 answers", "busy_answers", ","),
        ("events sent", "sent", ","),
        ("events accepted", "accepted", ","),
        ("events in the hub", "stored", ","),
        ("penstock audit, exit code", "audit_exit", ""),
    )
    for label, field, how in rows:
        table.add_row(label, *(format(getattr(run, field), how) for run in runs))
    for field in ("p50", "p99", "max"):
        table.add_row(f"answer {field}, ms", *(f"{getattr(run.latency_ms, field):,.1f}" for run in runs))
    return table


def _parts(runs: Sequence[Run]) -> Table:
    table = Table("run", "process", "CPU, µs an event", "until all is archived", "memory peak, MB", "of it anonymous")
    for column in table.columns[2:]:
        column.justify = "right"
    for run in runs:
        table.add_section()
        for part in run.parts:
            table.add_row(
                run.name,
                part.name,
                f"{part.cpu_us_per_event:.3f}",
                f"{part.cpu_us_per_event_to_the_end:.3f}",
                f"{part.memory_peak_mb:.0f}",
                f"{part.memory_anonymous_peak_mb:.0f}",
            )
    return table


def targets_table(targets: Sequence[Target]) -> Table:
    table = Table("must reach", "target", "measured", "")
    for one in targets:
        verdict = "[green]reached[/]" if one.reached else "[red]not reached[/]"
        sign = "≥" if one.at_least else "≤"
        table.add_row(one.what, f"{sign} {one.bound:,.12g} {one.unit}", f"{one.value:,.2f} {one.unit}", verdict)
    return table
