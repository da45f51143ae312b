"""`penstock status`: what is, for people and programs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import click
import msgspec

from penstock.cli.options import as_json, console, settings, url_beats_data
from penstock.cli.reach import api, fetch
from penstock.cli.units import in_force

if TYPE_CHECKING:
    from penstock.server.status import RetentionStatus, Status
    from penstock.settings import Values


@click.command()
@as_json
@settings("status")
def status(values: Values, as_json: bool) -> None:
    """Partitions, lags, storage and processes. Exit 1 if something is wrong."""
    report = read_status(values)
    if as_json:
        click.echo(msgspec.json.encode(report))
    else:
        _print_status(report)
    if not report.ok:
        raise click.exceptions.Exit(1)


def read_status(values: Values) -> Status:
    """From a topic where `--hub` says so, the API where `--url` does, else the data folder. Raises SettingsError, PenstockError."""
    from penstock.cli import topic
    from penstock.server.status import Status, build_status

    if topic.asks(values, "data", "url"):
        return _of_topic(values)
    if url_beats_data(values):
        return msgspec.json.decode(fetch(api(values), "/v1/status"), type=Status)
    from penstock.cli import wiring
    from penstock.clock import SystemClock
    from penstock.server.units import observe

    where = wiring.layout(values)
    with wiring.reading_hub(where, values) as hub:
        clock = SystemClock()
        throughput = observe(where.data, where.run, hub.partitions(), clock)
        return build_status(hub, wiring.open_store(where), run_folder=where.run, clock=clock, throughput=throughput)


def _of_topic(values: Values) -> Status:
    """What any machine can tell. Which parts run, and their throughput units, this one knows of itself."""
    from penstock.cli import topic, wiring
    from penstock.clock import SystemClock
    from penstock.server.topic import build_topic_status

    clock = SystemClock()
    where = topic.asked(wiring.layout(values), values, "data", "url")
    store = wiring.open_store(where)
    with topic.opened(where, store, clock) as hub:
        return build_topic_status(hub, store, run_folder=where.run, clock=clock)


def _print_status(report: Status) -> None:
    from rich.table import Table

    out = console()
    for problem in report.problems:
        out.print(f"PROBLEM: {problem}", style="bold red", markup=False)
    for warning in report.warnings:
        out.print(f"WARNING: {warning.code}: {warning.detail}", style="bold yellow", markup=False)
    out.print(_headline(report), highlight=False)
    for line in _sentences(report):
        out.print(line, highlight=False)
    parts = Table("part", "pid", "since", "restarts", title="parts" if report.parts else "no part runs")
    for part in report.parts:
        parts.add_row(part.name, str(part.pid), part.since, str(part.restarts))
    out.print(parts)
    table = Table("partition", "first", "next", "MiB", "owner", "epoch", "checkpoint", "lag", "lag s", "time left")
    for one in report.partitions:
        table.add_row(
            str(one.partition),
            f"{one.first:,}",
            f"{one.next:,}",
            f"{one.bytes / 2**20:,.1f}",
            one.owner or "",
            _text(one.epoch),
            _text(one.checkpoint),
            _text(one.lag_events if one.lag_records is None else one.lag_records),
            f"{one.lag_s:,.0f}",
            "" if one.retention_left_s is None else span(one.retention_left_s),
        )
    out.print(table)
    if report.groups:
        groups = Table(
            "group",
            "partition",
            "epoch",
            "checkpoint",
            "lag events",
            "heard of s ago",
            title="groups that read over HTTP",
        )
        for group in report.groups:
            row = [
                group.group,
                str(group.partition),
                str(group.epoch),
                f"{group.checkpoint:,}",
                f"{group.lag_events:,}",
            ]
            groups.add_row(*row, f"{group.age_s:,.0f}")
        out.print(groups)


def _sentences(report: Status) -> Iterator[str]:
    if report.retention:
        told = all(warning.code != "retention_unknown" for warning in report.warnings)
        yield _time_left(report.retention, bounded=report.storage is not None, told=told)
    if report.throughput:
        yield f"throughput units: {in_force(report.throughput)}"
    if report.counters:
        yield "counters: " + ", ".join(f"{name} {count:,}" for name, count in report.counters.items())


def _headline(report: Status) -> str:
    totals, storage = report.totals, report.storage
    if storage is None:
        return f"hub {report.hub}, a Kafka topic: lags are in records, and the brokers store them"
    return (
        f"hub {report.hub}: {_text(totals.accepted)} events accepted, {_text(totals.archived)} archived, "
        f"{_text(totals.lag_events)} to go; storage {storage.state}, "
        f"{storage.bytes_used / 2**20:,.1f} MiB of {storage.bytes_max / 2**30:,.1f} GiB"
    )


def _time_left(now: RetentionStatus, *, bounded: bool, told: bool) -> str:
    """When events that are not archived would be deleted, and when the hub is full, if its disk is ours."""
    if now.after_s is None and not bounded:
        return "retention: the brokers keep everything" if told else "retention: the brokers do not tell theirs"
    if now.after_s is None:
        return "retention: nothing is deleted, and nothing comes in, because no API worker runs"
    if now.left_s is None:
        kept = f"{span(now.after_s)}; everything is archived"
    elif now.unread == "kept":
        kept = (
            f"{span(now.after_s)}; the oldest event that is not archived is that old in {span(now.left_s)}, and is kept"
        )
    else:
        kept = f"{span(now.after_s)}; the oldest event that is not archived is deleted in {span(now.left_s)}"
    if not bounded:
        more = "" if now.partition_bytes is None else f"; and beyond {now.partition_bytes:,} bytes of a partition"
        return f"retention of the topic: {kept}{more}"
    if now.full_in_s is None:
        return f"retention: {kept}; at the rate of the last minute the hub does not get full"
    return f"retention: {kept}; at the rate of the last minute the hub is full in {span(now.full_in_s)}"


def span(seconds: float) -> str:
    """A duration for people, in its two largest units: `6 d 23 h`, `12 s`."""
    left = round(seconds)
    parts: list[str] = []
    for unit, size in (("d", 86_400), ("h", 3600), ("min", 60), ("s", 1)):
        if left >= size or (unit == "s" and not parts):
            parts.append(f"{left // size:,} {unit}")
            left %= size
    return " ".join(parts[:2])


def _text(value: int | None) -> str:
    return "" if value is None else f"{value:,}"
