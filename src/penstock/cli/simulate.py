"""`penstock simulate`: a fleet of devices that send for real, and whether the hub has what it says it has."""

from __future__ import annotations

import contextlib
import itertools
import random
import secrets
import signal
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import click
import msgspec

from penstock.cli.options import as_json, console, settings
from penstock.cli.reach import api
from penstock.cli.recount import Hub, Recount, ends, recount

if TYPE_CHECKING:
    from penstock.access import Access
    from penstock.client.fleet import Fleet
    from penstock.client.gateway import Gateway, Tally
    from penstock.settings import Values

_LATE_S = 1.0
_PROBLEMS_MAX = 20


class Simulated(msgspec.Struct):
    """`ok`: everything was answered as it should be, and the hub has it. `copies` of `duplicates` were posted again on purpose.

    Duplicates are recognised when they are answered; on a Kafka topic by the recount, as by all who read it. `unanswered` events may be
    in the hub or not. `found` is how many of this run the hub has; `audited`, whether its data folder is on this machine, or its topic
    was named with --hub, and was audited. `kept_up`: the last answer came within a second of the planned end.
    """

    ok: bool
    problems: list[str]
    devices: int
    clocks: dict[str, int]
    seed: int
    seconds: float
    rate: float
    kept_up: bool
    sent: int
    accepted: int
    rejected: int
    unanswered: int
    duplicates: int
    copies: int
    retries: int
    faults: dict[str, int]
    bursts: int
    storms: int
    p50_ms: float
    p99_ms: float
    found: int
    audited: bool


@click.command()
@as_json
@settings("simulate")
def simulate(values: Values, as_json: bool) -> None:
    """Send the events of simulated devices, and check that the hub has each of them once, in order. Ctrl-C ends it early.

    Exit 1 if it does not, if an answer was wrong, or if something was not answered.
    """
    from penstock.cli import topic, wiring
    from penstock.client.fleet import Fleet
    from penstock.client.simulate import Schedule
    from penstock.clock import SystemClock

    where = topic.asked(wiring.layout(values), values)
    to, clock, name = api(values), SystemClock(), secrets.token_hex(4)
    before = ends(to)
    count = min(values.count("gateways"), values.count("devices"))
    seconds, stop = values.seconds("seconds"), threading.Event()
    fleet = Fleet(
        name,
        devices=values.count("devices"),
        gateways=count,
        rate=values.count("rate"),
        seconds=seconds,
        seed=values.count("seed"),
        began_ms=clock.now_ms(),
    )
    gateways = [_gateway(to, f"sim-{name}-{number}", before, values, stop) for number in range(count)]
    tallies = [gateway.tally for gateway in gateways]
    with _ctrl_c() as ended, _progress(tallies, seconds) as moved:
        schedule = Schedule(
            fleet, gateways, patience_s=values.seconds("answer-timeout"), clock=clock, ended=ended, stop=stop
        )
        took_s = schedule.run(seconds, moved)
        early = ended.is_set()
    counted = recount(to, before, b'{"deviceId":"sim-%b-' % name.encode(), tallies, where, values)
    report = _report(fleet, tallies, counted, took_s, seconds, values.count("seed"))
    _print(report, early, as_json)
    if not report.ok:
        raise click.exceptions.Exit(1)


def _gateway(to: Access, producer: str, hub: Hub, values: Values, stop: threading.Event) -> Gateway:
    from penstock.client.gateway import Gateway
    from penstock.client.misconduct import HttpMisconduct
    from penstock.client.transport import HttpTransport
    from penstock.clock import SystemClock

    clock, timeout_s = SystemClock(), values.seconds("answer-timeout")
    return Gateway(
        producer,
        HttpTransport(to, timeout_s=timeout_s),
        misconduct=HttpMisconduct(to, timeout_s=timeout_s, clock=clock) if values.flag("faults") else None,
        knows_numbers=hub.knows_numbers,
        chance=random.Random(f"{values.count('seed')} {producer.rpartition('-')[2]}"),
        clock=clock,
        stop=stop,
    )


@contextlib.contextmanager
def _ctrl_c() -> Iterator[threading.Event]:
    """Set by the first Ctrl-C or SIGTERM; the second ends the command."""
    ended = threading.Event()

    def end(_number: int, _frame: object) -> None:
        if ended.is_set():
            raise KeyboardInterrupt
        ended.set()

    before = {number: signal.signal(number, end) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield ended
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _progress(tallies: Sequence[Tally], seconds: float) -> Iterator[Callable[[float], None]]:
    if not sys.stderr.isatty():
        yield lambda _at_s: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("simulating", total=seconds)

        def moved(at_s: float) -> None:
            sent, accepted = (sum(getattr(tally, name) for tally in tallies) for name in ("sent", "accepted"))
            progress.update(task, completed=at_s, description=f"{sent:,} sent, {accepted:,} accepted")

        yield moved


def _report(
    fleet: Fleet, tallies: Sequence[Tally], counted: Recount, took_s: float, planned_s: float, seed: int
) -> Simulated:
    problems = [problem for tally in tallies for problem in tally.problems]
    sent, accepted, rejected = (
        sum(getattr(tally, name) for tally in tallies) for name in ("sent", "accepted", "rejected")
    )
    unanswered = sent - accepted - rejected
    if unanswered:
        why = next((tally.why for tally in tallies if tally.why), "none")
        problems.append(f"{unanswered:,} events were not answered. What came instead: {why}")
    problems += counted.problems
    times_s = sorted(itertools.chain.from_iterable(tally.took_s for tally in tallies))
    return Simulated(
        ok=not problems,
        problems=problems,
        devices=len(fleet.devices),
        clocks=dict(fleet.clocks),
        seed=seed,
        seconds=round(took_s, 3),
        rate=round(sent / max(took_s, 1e-3), 1),
        kept_up=took_s <= planned_s + _LATE_S,
        sent=sent,
        accepted=accepted,
        rejected=rejected,
        unanswered=unanswered,
        duplicates=sum(tally.duplicates for tally in tallies) + counted.copies,
        copies=sum(tally.copies for tally in tallies),
        retries=sum(tally.retries for tally in tallies),
        faults=dict(sum((tally.faults for tally in tallies), Counter())),
        bursts=fleet.bursts,
        storms=fleet.storms,
        p50_ms=_at(times_s, 0.50),
        p99_ms=_at(times_s, 0.99),
        found=counted.found,
        audited=counted.audited,
    )


def _at(times_s: Sequence[float], share: float) -> float:
    return round(times_s[int(share * (len(times_s) - 1))] * 1000, 2) if times_s else 0.0


def _print(report: Simulated, early: bool, as_json: bool) -> None:
    if as_json:
        click.echo(msgspec.json.encode(report))
        return
    from penstock.client.fleet import YEARS

    out = console()
    wrong = sum(report.clocks.get(kind, 0) for kind in YEARS)
    faults = ", ".join(f"{kind} {count:,}" for kind, count in sorted(report.faults.items()))
    late = "" if report.kept_up else ", less than was asked for: this machine or the hub could not keep up"
    devices = "device" if report.devices == 1 else "devices"
    lines = [
        f"{report.devices:,} {devices}, the clocks of {wrong:,} wrong by years; {report.bursts:,} bursts, "
        f"{report.storms} reconnect storms; seed {report.seed}{'; ended early' if early else ''}",
        f"{report.sent:,} events sent in {report.seconds:.1f} s ({report.rate:,.0f}/s{late})",
        f"{report.accepted:,} accepted, {report.rejected:,} rejected, {report.unanswered:,} unanswered, "
        f"{report.duplicates:,} duplicates recognised ({report.copies:,} sent again on purpose)",
        f"answers: p50 {report.p50_ms:.1f} ms, p99 {report.p99_ms:.1f} ms; {report.retries:,} retries",
        *([f"faults: {faults}"] if faults else []),
    ]
    for line in lines:
        out.print(line, highlight=False, markup=False)
    for problem in report.problems[:_PROBLEMS_MAX]:
        out.print(f"PROBLEM: {problem}", style="bold red", markup=False)
    if len(report.problems) > _PROBLEMS_MAX:
        out.print(f"and {len(report.problems) - _PROBLEMS_MAX} more", style="bold red")
    if report.ok:
        audited = ", and its audit agrees" if report.audited else ""
        out.print(f"ok: the hub has each accepted event once, in order{audited}", style="green")
