"""`penstock units`: the throughput units at run time."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click
import msgspec

from penstock.cli.options import as_json, settings
from penstock.cli.reach import admin, fetch
from penstock.errors import SettingsError

if TYPE_CHECKING:
    from penstock.server.units import Throughput
    from penstock.settings import Values


@click.command()
@click.argument("number", metavar="[N|none]", required=False)
@as_json
@settings("units")
def units(values: Values, number: str | None, as_json: bool) -> None:
    """What may come in, and what does; with N, change it in what runs: 1,000 events or 1 MB a second for each unit."""
    from penstock.kinds import Kind, parse
    from penstock.server.units import Throughput

    try:
        wanted = None if number is None else parse(Kind.COUNT, number)
    except SettingsError:
        raise SettingsError(f"{number} is not a number of throughput units: a whole number, or `none`.") from None
    api, path = admin(values), "/v1/throughput-units"
    if number is None:
        answer = fetch(api, path)
    else:
        answer = fetch(api, path, method="PUT", body=msgspec.json.encode({"throughput_units": wanted}))
    if as_json:
        click.echo(answer)
    else:
        click.echo(in_force(msgspec.json.decode(answer, type=Throughput)))


def in_force(now: Throughput) -> str:
    """One or two sentences for people."""
    refused = ", ".join(f"{count:,} by {name}" for name, count in now.refused.items() if count)
    told = f"; batches refused: {refused}" if refused else ""
    if now.throughput_units is None:
        return f"none, no limit{told}"
    return (
        f"{now.throughput_units:,}, so {now.events_per_s:,} events/s and {now.bytes_per_s:,} bytes/s; in the last seconds "
        f"{now.used_events_per_s:,.0f} events/s and {now.used_bytes_per_s:,.0f} bytes/s came in, {now.waiting:,} clients wait{told}"
    )
