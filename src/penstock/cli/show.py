"""`penstock status` and `leases`: what is, for people and programs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click
import msgspec

from penstock.cli.options import api_url, as_json, console, fetch, settings, url_beats_data

if TYPE_CHECKING:
    from penstock.server.status import Status
    from penstock.settings import Values


class LeaseRow(msgspec.Struct):
    """A lease as it was read. `age_s` since it was last written, `due_s` until another host may take it; None: unknown."""

    partition: int
    owner: str | None
    epoch: int | None
    offset: str | None
    sequence_number: int | None
    age_s: float | None
    due_s: float | None
    state: str


@click.command()
@as_json
@settings("status")
def status(values: Values, as_json: bool) -> None:
    """Partitions, lags, storage and processes. Exit 1 if something is wrong."""
    report = _status(values)
    if as_json:
        click.echo(msgspec.json.encode(report))
    else:
        _print_status(report)
    if not report.ok:
        raise click.exceptions.Exit(1)


def _status(values: Values) -> Status:
    from penstock.server.status import Status, build_status

    if url_beats_data(values):
        return msgspec.json.decode(fetch(f"{api_url(values)}/v1/status"), type=Status)
    from penstock.cli import wiring
    from penstock.clock import SystemClock

    where = wiring.layout(values)
    with wiring.reading_hub(where, values) as hub:
        return build_status(hub, wiring.open_store(where), run_folder=where.run, clock=SystemClock())


def _print_status(report: Status) -> None:
    from rich.table import Table

    out = console()
    for problem in report.problems:
        out.print(f"PROBLEM: {problem}", style="bold red", markup=False)
    out.print(
        f"hub {report.hub}: {report.totals.accepted:,} events accepted, {report.totals.archived:,} archived, "
        f"{report.totals.lag_events:,} to go; storage {report.storage.state}, "
        f"{report.storage.bytes_used / 2**20:,.1f} MiB of {report.storage.bytes_max / 2**30:,.1f} GiB",
        highlight=False,
    )
    counters = ", ".join(f"{name} {count:,}" for name, count in report.counters.items())
    out.print(f"counters: {counters}", highlight=False)
    parts = Table("part", "pid", "since", "restarts", title="parts" if report.parts else "no part runs")
    for part in report.parts:
        parts.add_row(part.name, str(part.pid), part.since, str(part.restarts))
    out.print(parts)
    table = Table("partition", "first", "next", "MiB", "owner", "epoch", "checkpoint", "lag events", "lag s")
    for one in report.partitions:
        table.add_row(
            str(one.partition),
            f"{one.first:,}",
            f"{one.next:,}",
            f"{one.bytes / 2**20:,.1f}",
            one.owner or "",
            _text(one.epoch),
            _text(one.checkpoint),
            f"{one.lag_events:,}",
            f"{one.lag_s:,.0f}",
        )
    out.print(table)


def _text(value: int | None) -> str:
    return "" if value is None else f"{value:,}"


@click.command()
@click.option("--group", default="$archive", show_default=True, help="Consumer group; $archive is the archiver's.")
@as_json
@settings("leases")
def leases(values: Values, group: str, as_json: bool) -> None:
    """Who reads which partition, how far it is, and when another may take it."""
    rows = _rows_of_status(_status(values)) if url_beats_data(values) else _rows_of_store(values, group)
    if as_json:
        click.echo(msgspec.json.encode(rows))
        return
    from rich.table import Table

    table = Table("partition", "owner", "epoch", "checkpoint", "age s", "free in s", "why")
    for row in rows:
        age = "" if row.age_s is None else f"{row.age_s:.1f}"
        due = "" if row.due_s is None else f"{row.due_s:.1f}"
        table.add_row(
            str(row.partition), row.owner or "", _text(row.epoch), _text(row.sequence_number), age, due, row.state
        )
    console().print(table)


def _rows_of_status(report: Status) -> list[LeaseRow]:
    return [
        LeaseRow(one.partition, one.owner, one.epoch, one.offset, one.checkpoint, None, None, _state(one.owner, None))
        for one in report.partitions
    ]


def _rows_of_store(values: Values, group: str) -> list[LeaseRow]:
    from penstock.cli import wiring
    from penstock.clock import SystemClock
    from penstock.processor.lease import lease_name, read_leases

    where, now_ms = wiring.layout(values), SystemClock().now_ms()
    with wiring.reading_hub(where, values) as hub:
        found = read_leases(wiring.open_store(where), group, range(hub.partitions()))
    rows = []
    for partition, lease in enumerate(found):
        if lease is None:
            rows.append(LeaseRow(partition, None, None, None, None, None, None, _state(None, None)))
            continue
        # The file's time is of this machine, as is the clock. Hosts decide by what they saw themselves, not by this.
        path = where.store / lease_name(group, partition)
        age_s = max(0.0, now_ms / 1000 - path.stat().st_mtime) if path.exists() else 0.0
        due_s = max(0.0, values.seconds("lease") - age_s) if lease.owner else 0.0
        rows.append(
            LeaseRow(
                partition,
                lease.owner,
                lease.epoch,
                lease.offset,
                lease.sequence_number,
                round(age_s, 3),
                round(due_s, 3),
                _state(lease.owner, due_s),
            )
        )
    return rows


def _state(owner: str | None, due_s: float | None) -> str:
    if owner is None:
        return "nobody has read it yet"
    if not owner:
        return "given back: the next host takes it"
    if due_s == 0.0:
        return "not renewed: the next host that has seen that long enough takes it"
    return "held"
