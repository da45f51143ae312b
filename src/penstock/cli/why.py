"""`penstock why PARTITION HOUR`: why an hour file closed, or what keeps it open."""

from __future__ import annotations

import contextlib
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import click
import msgspec

from penstock.cli.leases import file_ms
from penstock.cli.options import as_json, console, settings
from penstock.errors import ArchiveError, SettingsError

if TYPE_CHECKING:
    from penstock.archive.why import Explanation, HourFile
    from penstock.settings import Values

_END_MS = int(datetime(9999, 1, 1, tzinfo=UTC).timestamp()) * 1000


@click.command()
@click.argument("partition", type=click.IntRange(min=0))
@click.argument("hour")
@as_json
@settings("why")
def why(values: Values, partition: int, hour: str, as_json: bool) -> None:
    """Why the files of an hour closed, or what keeps them open. HOUR as in the files' names, or any time in it (RFC 3339)."""
    from penstock.archive.hours import ARCHIVE_GROUP
    from penstock.archive.why import Inquiry
    from penstock.cli import topic, wiring
    from penstock.clock import SystemClock
    from penstock.processor.lease import lease_name

    at_ms, now_ms = _time(hour), SystemClock().now_ms()
    where = topic.asked(wiring.layout(values), values, "data")
    store = wiring.open_store(where)
    known = wiring.owner_of(where, store)
    if partition >= known.partitions:
        raise SettingsError(f"There is no partition {partition}; this hub has 0 to {known.partitions - 1}.")
    written_ms = file_ms(where, lease_name(ARCHIVE_GROUP, partition))
    with topic.opened(where, store, SystemClock()) if where.topic else wiring.hub_of(known, where, values) as hub:
        inquiry = Inquiry(
            store,
            known,
            hub,
            now_ms=now_ms,
            lease_s=values.seconds("lease"),
            lease_age_s={} if written_ms is None else {partition: (now_ms - written_ms) / 1000},
        )
        found = inquiry.explain(partition, at_ms)
    if as_json:
        click.echo(msgspec.json.encode(found))
    else:
        _print(found)


def _time(text: str) -> int:
    """A moment in the hour. Raises SettingsError."""
    from penstock.archive.cut import hour_start_ms

    with contextlib.suppress(ArchiveError):
        return _bounded(hour_start_ms(text), text)
    try:
        at = datetime.fromisoformat(text)
        return _bounded(int(at.replace(tzinfo=at.tzinfo or UTC).timestamp() * 1000), text)
    except (ValueError, OverflowError) as error:
        raise SettingsError(
            f"{text!r} is neither the name of an hour, such as 2026-11-22T14 or 2026-11-22T14-05-00, nor a time, "
            "such as 2026-11-22T14:03:21Z."
        ) from error


def _bounded(at_ms: int, text: str) -> int:
    if not 0 <= at_ms < _END_MS:
        raise SettingsError(f"{text}: no hub has events of that time.")
    return at_ms


def _print(found: Explanation) -> None:
    out = console()

    def say(text: str, style: str = "") -> None:
        out.print(text, style=style, markup=False, highlight=False, soft_wrap=True)

    say(f"partition {found.partition}, hour {found.hour}: {_head(found)}", "bold")
    for sentence in found.why:
        say(f"  {sentence}")
    for file in found.files:
        say(f"  {_file(file)}")
    published = "published" if found.manifest.published else "not published"
    say(f"  {found.manifest.name} is {published}. {found.manifest.why}")
    reasons: dict[str, list[str]] = {}
    for one in found.manifest.missing:
        reasons.setdefault(one.why, []).append(str(one.partition))
    for reason, partitions in reasons.items():
        say(f"    {'partition' if len(partitions) == 1 else 'partitions'} {', '.join(partitions)}: {reason}")


_HEADS = {
    "closed": "closed, all its events are in files",
    "open": "open, it goes on",
    "waiting": "over, and waits for its files",
    "empty": "empty",
    "future": "has not begun",
    "unknown": "not known",
}


def _head(found: Explanation) -> str:
    if found.state == "closed" and not all(file.in_store for file in found.files):
        return "closed, and a file is missing"
    return _HEADS[found.state]


def _file(file: HourFile) -> str:
    there = "" if file.in_store else ", not in the store"
    return (
        f"{file.file}: events {file.first:,} to {file.next - 1:,} ({file.events:,}, {file.raw_bytes:,} bytes){there}. "
        f"Closed by {file.closed_by}: {file.why}. Decided by {file.host} in epoch {file.epoch}, {file.at}."
    )
