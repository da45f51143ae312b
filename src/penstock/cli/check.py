"""`penstock audit` and `verify`: is everything where it should be?"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import click
import msgspec

from penstock.cli.options import as_json, console, settings

if TYPE_CHECKING:
    from penstock.archive.report import Report
    from penstock.cli.wiring import Layout
    from penstock.settings import Values

ROWS_SHOWN: Final = 1000
"""A table of the hours of a year is for nobody, and takes minutes to be drawn."""


@click.command()
@click.option("--deep", is_flag=True, help="Read the hour files too, as `verify` does.")
@as_json
@settings("audit")
def audit(values: Values, deep: bool, as_json: bool) -> None:
    """Compare accepted, logged and archived events for each hour and partition. Exit 1 if they differ."""
    from penstock.archive import check
    from penstock.cli import topic, wiring

    where = topic.asked(wiring.layout(values), values, "data")
    if where.topic:
        _print(_of_topic(where, deep), as_json, "in the log = archived + copies + dead letters{lost} + pending")
        return
    with wiring.reading_hub(where, values) as hub:
        archived = values.text("archive") == "on" and not _unread_is_deleted(where)
        report = check.audit(hub, wiring.open_store(where), deep=deep, archived=archived)
    _print(report, as_json, "accepted = logged = archived{lost} + pending")


def _of_topic(where: Layout, deep: bool) -> Report:
    from penstock.archive import judged
    from penstock.cli import topic, wiring
    from penstock.clock import SystemClock

    store = wiring.open_store(where)
    with topic.opened(where, store, SystemClock()) as hub:
        return judged.audit(hub, store, deep=deep)


def _unread_is_deleted(where: Layout) -> bool:
    """Whether what runs on the data folder has `--archive none`."""
    from penstock.server.parts import read_runs
    from penstock.server.status import in_force

    retention = in_force(read_runs(where.run))
    return retention is not None and not retention.waits


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

        judged = any(row.copies is not None for row in report.rows)
        without = {*(("accepted",) if judged else ("copies", "dead")), *(() if report.totals.lost else ("lost",))}
        names = [name for name in report.totals.__struct_fields__ if name not in without]
        out = console()
        table = Table("hour", "partition", *(name.replace("_", " ") for name in names))
        for row in report.rows[-ROWS_SHOWN:]:
            table.add_row(row.hour, str(row.partition), *(_cell(getattr(row, name)) for name in names))
        if len(report.rows) > ROWS_SHOWN:
            table.caption = f"and {len(report.rows) - ROWS_SHOWN:,} rows of earlier hours: --json has them all"
        table.add_section()
        table.add_row("all", "", *(_cell(getattr(report.totals, name)) for name in names), style="bold")
        out.print(table)
        for gap in report.gaps:
            span = f"events {gap.first:,} to {gap.next - 1:,}"
            said = f"{gap.reason} ({gap.host}, {gap.at})" if gap.host else gap.reason
            out.print(f"partition {gap.partition}: {span} are in no file: {said}", markup=False)
        for file, gap in report.lost.items():
            out.print(f"{file} was decided, and is lost: {gap.reason} ({gap.host}, {gap.at})", markup=False)
        for note in report.notes:
            out.print(note, markup=False)
        for problem in report.problems:
            out.print(f"PROBLEM: {problem}", style="bold red", markup=False)
        if report.ok:
            out.print(f"ok: {good.format(lost=' + lost' if report.totals.lost else '')}", style="green")
    if not report.ok:
        raise click.exceptions.Exit(1)


def _cell(count: int | None) -> str:
    return "" if count is None else f"{count:,}"
