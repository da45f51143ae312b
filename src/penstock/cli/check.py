"""`penstock audit`, `verify` and `flush`: is everything where it should be?"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import click
import msgspec

from penstock.cli.options import as_json, console, settings, url_beats_data
from penstock.cli.reach import admin, fetch
from penstock.errors import PenstockError

if TYPE_CHECKING:
    from penstock.access import Access
    from penstock.archive.report import Report
    from penstock.clock import Clock
    from penstock.settings import Values


class Flushed(msgspec.Struct):
    """Events below the offsets `next` of each partition are in the store, if `ok`; `behind` are partitions where they are not."""

    ok: bool
    next: list[int]
    behind: list[int]
    waited_s: float


class _Cut(msgspec.Struct):
    next: list[str]
    place_bits: int = 0


@click.command()
@click.option("--deep", is_flag=True, help="Read the hour files too, as `verify` does.")
@as_json
@settings("audit")
def audit(values: Values, deep: bool, as_json: bool) -> None:
    """Compare accepted, logged and archived events for each hour and partition. Exit 1 if they differ."""
    from penstock.archive import check
    from penstock.cli import wiring

    where = wiring.layout(values)
    with wiring.reading_hub(where, values) as hub:
        archived = values.text("archive") == "on"
        report = check.audit(hub, wiring.open_store(where), deep=deep, archived=archived)
    _print(report, as_json, "accepted = logged = archived + pending")


@click.command()
@as_json
@settings("verify")
def verify(values: Values, as_json: bool) -> None:
    """Read ledger and hour files: adjacent, complete, counts and checksums right. Exit 1 otherwise."""
    from penstock.archive import check
    from penstock.cli import wiring

    report = check.verify(wiring.open_store(wiring.layout(values)))
    _print(report, as_json, "the ledger is one chain, and the files are what it says")


def _print(report: Report, as_json: bool, good: str) -> None:
    if as_json:
        click.echo(msgspec.json.encode(report))
    else:
        from rich.table import Table

        names = report.totals.__struct_fields__
        out = console()
        table = Table("hour", "partition", *(name.replace("_", " ") for name in names))
        for row in report.rows:
            table.add_row(row.hour, str(row.partition), *(_cell(getattr(row, name)) for name in names))
        table.add_section()
        table.add_row("all", "", *(_cell(getattr(report.totals, name)) for name in names), style="bold")
        out.print(table)
        for gap in report.gaps:
            span = f"events {gap.first:,} to {gap.next - 1:,}"
            said = f"{gap.reason} ({gap.host}, {gap.at})" if gap.host else gap.reason
            out.print(f"partition {gap.partition}: {span} are in no file: {said}", markup=False)
        for problem in report.problems:
            out.print(f"PROBLEM: {problem}", style="bold red", markup=False)
        if report.ok:
            out.print(f"ok: {good}", style="green")
    if not report.ok:
        raise click.exceptions.Exit(1)


def _cell(count: int | None) -> str:
    return "" if count is None else f"{count:,}"


@click.command()
@as_json
@settings("flush")
def flush(values: Values, as_json: bool) -> None:
    """Close the open hour files now and wait until they are in the store. Exit 1 if that takes too long."""
    from penstock.clock import SystemClock

    clock = SystemClock()
    api = admin(values)
    cut = msgspec.json.decode(fetch(api, "/v1/cut", method="POST"), type=_Cut)
    goals = [int(offset) for offset in cut.next]
    began = clock.monotonic()
    behind = _await(values, api, goals, clock, began)
    result = Flushed(not behind, goals, behind, round(clock.monotonic() - began, 3))
    if as_json:
        click.echo(msgspec.json.encode(result))
    if behind:
        raise PenstockError(_reason(api, behind, result.waited_s))
    if not as_json:
        events = "" if cut.place_bits else f", {sum(goals):,} events,"
        click.echo(f"Everything until now{events} is in hour files ({result.waited_s:.1f} s).")


def _await(values: Values, api: Access, goals: list[int], clock: Clock, began: float) -> list[int]:
    """The partitions whose checkpoint did not reach its goal in time, as offsets: on Kafka sequence numbers do not pass markers."""
    never = threading.Event()
    while True:
        done = _checkpoints(values, api, len(goals))
        behind = [partition for partition, goal in enumerate(goals) if goal and (done[partition] or 0) < goal]
        if not behind or clock.monotonic() - began >= values.seconds("flush-timeout"):
            return behind
        clock.wait(never, 0.1)


def _checkpoints(values: Values, api: Access, partitions: int) -> list[int | None]:
    if url_beats_data(values):
        from penstock.server.status import Status

        report = msgspec.json.decode(fetch(api, "/v1/status"), type=Status)
        return [int(one.offset) if one.offset else one.checkpoint for one in report.partitions]
    from penstock.archive.hours import archive_lease
    from penstock.cli import wiring

    store = wiring.open_store(wiring.layout(values))
    leases = [archive_lease(store, partition) for partition in range(partitions)]
    return [int(lease.offset) if lease else None for lease in leases]


def _reason(api: Access, behind: list[int], waited_s: float) -> str:
    from penstock.server.status import Status

    report = msgspec.json.decode(fetch(api, "/v1/status"), type=Status)
    owners = sorted({report.partitions[partition].owner or "nobody" for partition in behind})
    why = "no archiver runs" if owners == ["nobody"] else f"their leases are held by {', '.join(owners)}"
    return f"After {waited_s:.0f} s the events of partitions {behind} are not in the store: {why}."
