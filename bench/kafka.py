"""`python -m bench --hub kafka`: one load on the embedded hub and then on a Kafka topic, and a backlog archived from the topic.

The topic has its broker on this machine, on the same cores as everything else. So figures are of CPU: what the API spends on an event
against what it spends on the embedded hub in the same run, and what a host spends to archive one.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

import msgspec
import pytest
from rich.console import Console
from rich.table import Table

from bench.growth import Say
from bench.hosts import Host
from bench.load import Result
from bench.report import Machine, Target, machine, show_problems, target, targets_table
from bench.run import Counts, Options, Run, Work, measure, per_event_us, plan_of, run, wrong_counts
from bench.system import BenchError, System, cpu_s
from penstock.archive import check
from penstock.blobs.disk import DiskBlobs
from penstock.files import Files
from tests.kafka_broker import FAST, Brokers, Node, brokers

API_LEAST: Final = 0.6
ARCHIVE_LEAST: Final = 400_000.0
_LEASE_S: Final = 30.0


class Backlog(msgspec.Struct, frozen=True):
    """What was taken in without a host, and then archived by one: by the clock, and for each second of its CPU."""

    events: int
    taken_in_per_s: float
    archived_per_s: float
    archived_per_core_s: float
    broker_cpu_us_per_event: float
    problems: list[str]


class KafkaReport(msgspec.Struct, frozen=True):
    """`ok` is about the counts alone: no figure makes it false."""

    ok: bool
    machine: Machine
    options: Options
    brokers: int
    embedded: Run
    topic: Run
    backlog: Backlog
    targets: list[Target]


class OnTopic(System):
    """`penstock api` on a topic that nobody has used, and if `hosted` a host beside it. The brokers are not its own, but its parts."""

    def __init__(self, folder: Path, options: Options, at: Brokers, *, hosted: bool) -> None:
        copies = min(3, len(at.nodes))
        self.store = folder / "data" / "store"
        self._places = ["--hub", at.fresh_url(), "--store", str(self.store)]
        self._brokers = at
        self._hosted = hosted
        self._host: Host | None = None
        safe = ["--replicas", str(copies), "--in-sync-replicas", str(max(1, copies - 1))]
        super().__init__(folder, [*safe, *options.up()], kind="api")

    def __enter__(self) -> OnTopic:
        super().__enter__()
        if self._hosted:
            self._host = Host(self, "host", _LEASE_S)
        return self

    def __exit__(self, *error: object) -> None:
        if self._host is not None:
            self._host.end(signal.SIGTERM)
        super().__exit__(*error)

    def words(self, command: str) -> list[str]:
        return [*super().words(command), *(self._places if command in ("api", "host") else ())]

    def parts(self) -> dict[int, str]:
        host = {self._host.process.pid: "archiver"} if self._host else {}
        return super().parts() | host | {node.pid: f"broker {node.number}" for node in self._brokers.nodes}

    def settle(self, _system: System, results: Sequence[Result], *, numbered: bool) -> Counts:
        """Archive everything, and compare what was sent with what is in the files, where each event is once."""
        flush_exit = self.command("flush", "--timeout", "600s")
        report = check.verify(DiskBlobs(self.store, Files()))
        archived = report.totals.archived
        problems = wrong_counts(results, archived, 0, numbered=numbered) + report.problems
        remarks = [f"penstock flush ended with exit code {flush_exit}"] if flush_exit else []
        return Counts(archived, archived, int(not report.ok), problems, remarks)


def kafka_report(folder: Path, options: Options, work: Work, *, nodes: int, backlog_s: float, say: Say) -> KafkaReport:
    """Raises BenchError where there is no Kafka for this machine."""
    try:
        say("the embedded hub")
        embedded = run(System(folder / "embedded", options.up()), options, work)
        with brokers(folder / "brokers", nodes, before=_fast) as at:
            say(f"a topic: a backlog of {backlog_s:g} s")  # first, because Java is slow when it begins
            left = backlog(folder / "backlog", options, work, at, backlog_s)
            say("a topic, and a host beside the load")
            system = OnTopic(folder / "topic", options, at, hosted=True)
            topic = run(system, options, work, system.settle)
    except pytest.skip.Exception as missing:
        raise BenchError(str(missing)) from missing
    ok = not (embedded.problems or topic.problems or left.problems)
    return KafkaReport(ok, machine(), options, nodes, embedded, topic, left, [*_targets(embedded, topic, left)])


def _fast(node: Node) -> None:
    node.jvm = FAST


def backlog(folder: Path, options: Options, work: Work, at: Brokers, seconds: float) -> Backlog:
    """Taken in for so long, and then archived by one host: from its start until all is in the store."""
    with OnTopic(folder, options, at, hosted=False) as system:
        result = measure(system, plan_of(work, system, warm_up_s=1, seconds=seconds, producer="backlog")).result
        nodes = [node.pid for node in at.nodes]
        brokers_s, began = sum(cpu_s(nodes).values()), time.monotonic()
        host = Host(system, "host", _LEASE_S)
        try:
            if system.command("flush", "--timeout", "120s"):
                raise BenchError("The backlog was not archived.")
            took_s = time.monotonic() - began
            host_s = cpu_s([host.process.pid])[host.process.pid]
            brokers_s = sum(cpu_s(nodes).values()) - brokers_s
        finally:
            host.end(signal.SIGTERM)
        counts = system.settle(system, [result], numbered=work.numbered)
    archived = counts.archived
    return Backlog(
        archived,
        round(result.accepted_in_window / result.seconds, 1),
        round(archived / took_s, 1),
        round(archived / host_s, 1),
        per_event_us(brokers_s, archived),
        counts.problems,
    )


def api_us(of: Run) -> float:
    """CPU of the API's workers for an event."""
    return sum(part.cpu_us_per_event for part in of.parts if part.name.startswith("api"))


def per_core_s(of: Run) -> float:
    """Events for each CPU second of the API; 0 where none was accepted in the window."""
    return 1e6 / api_us(of) if api_us(of) else 0.0


def brokers_us(of: Run) -> float:
    return sum(part.cpu_us_per_event for part in of.parts if part.name.startswith("broker"))


def _targets(embedded: Run, topic: Run, left: Backlog) -> Iterator[Target]:
    ratio = per_core_s(topic) / per_core_s(embedded) if per_core_s(embedded) else 0.0
    yield target("events for each CPU second of the API, Kafka ÷ embedded", ratio, API_LEAST, "×", at_least=True)
    per_core = left.archived_per_core_s
    yield target("archived for each CPU second of a host", per_core, ARCHIVE_LEAST, "events/s", at_least=True)


def show_kafka(report: KafkaReport, out: Console) -> None:
    runs = (report.embedded, report.topic)
    table = Table("", "embedded hub", f"Kafka, {report.brokers} broker{'s' if report.brokers > 1 else ''}")
    for column in table.columns[1:]:
        column.justify = "right"
    table.add_row("accepted events/s, durable", *(f"{one.events_per_s:,.0f}" for one in runs))
    table.add_row("events for each CPU second of the API", *(f"{per_core_s(one):,.0f}" for one in runs))
    table.add_row("API CPU, µs an event", *(f"{api_us(one):.3f}" for one in runs))
    table.add_row("brokers' CPU, µs an event", "", f"{brokers_us(report.topic):.3f}")
    archive = (f"{one.archive_cpu_us_per_event:.3f}" for one in runs)
    table.add_row("archive CPU until all is archived, µs an event", *archive)
    table.add_row("load generator CPU, µs an event", *(f"{one.load_cpu_us_per_event:.3f}" for one in runs))
    for field in ("p50", "p99", "max"):
        table.add_row(f"answer {field}, ms", *(f"{getattr(one.latency_ms, field):,.1f}" for one in runs))
    table.add_row("503 answers", *(f"{one.busy_answers:,}" for one in runs))
    table.add_row("events sent", *(f"{one.sent:,}" for one in runs))
    table.add_row("events in the archive", *(f"{one.archived:,}" for one in runs))
    out.print(table)
    left = report.backlog
    out.print(
        f"Backlog: {left.events:,} events came in at {left.taken_in_per_s:,.0f}/s; archived at {left.archived_per_s:,.0f}/s by the clock, "
        f"{left.archived_per_core_s:,.0f} a CPU second of the host; brokers {left.broker_cpu_us_per_event:.3f} µs an event.",
        highlight=False,
    )
    out.print(targets_table(report.targets))
    show_problems(runs, out)
    for problem in left.problems:
        out.print(f"PROBLEM: backlog: {problem}", style="bold red", markup=False)
