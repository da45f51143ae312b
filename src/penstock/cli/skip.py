"""`penstock leases skip`: the only way on for a partition whose next events are gone (processor/skip.py)."""

from __future__ import annotations

import getpass
import os
import socket

import click
import msgspec

from penstock.cli.options import as_json, settings
from penstock.settings import Values

_REASON_CHARS_MAX = 1000


@click.command()
@click.option("--group", default="$archive", show_default=True, help="Consumer group; $archive is the archiver's.")
@click.option("--partition", type=click.IntRange(min=0), required=True, help="The partition that stands still.")
@click.option("--to", required=True, help="The offset to go on from; `earliest`: the first one that can be read.")
@click.option("--reason", required=True, help="Why. It is kept for ever, with your name and the time.")
@click.option(
    "--force", is_flag=True, help="Leave out what is in the log too, such as a damaged frame and what is before it."
)
@as_json
@settings("leases-skip")
def skip(values: Values, group: str, partition: int, to: str, reason: str, force: bool, as_json: bool) -> None:
    """Go on behind events that the log does not have any more, and leave a record that says so."""
    from penstock.archive import skip as of_archive
    from penstock.archive.hours import ARCHIVE_GROUP
    from penstock.archive.ledger import owner
    from penstock.cli import topic, wiring
    from penstock.cli.archiving import host_hub
    from penstock.clock import SystemClock
    from penstock.errors import SettingsError
    from penstock.processor.skip import EARLIEST, Order
    from penstock.processor.skip import skip as of_group

    if to != EARLIEST and not (to.isascii() and to.isdigit() and len(to) < 20):
        raise SettingsError(f"--to {to!r} is neither an offset nor `{EARLIEST}`.")
    reason = " ".join(reason.split())
    if not 0 < len(reason) <= _REASON_CHARS_MAX:
        raise SettingsError(
            f"--reason has 1 to {_REASON_CHARS_MAX} characters: whoever misses these events will read it."
        )
    where, clock, watch_s = topic.placed(wiring.layout(values), values), SystemClock(), values.seconds("watch")
    order = Order(partition, to, reason, _who(), force)
    with host_hub(where, values, values.text("hub")) as hub:
        if partition >= hub.partitions():
            raise SettingsError(f"There is no partition {partition}; this hub has 0 to {hub.partitions() - 1}.")
        store = wiring.open_store(where)
        known = owner(store)
        if group == ARCHIVE_GROUP and (known is None or known.hub != hub.id):
            raise SettingsError(f"The store {where.store_name} is not the archive of this hub. Nothing was skipped.")
        if group == ARCHIVE_GROUP:
            done = of_archive.skip(store, hub, order, clock=clock, watch_s=watch_s)
        else:
            done = of_group(store, hub, group, order, clock=clock, watch_s=watch_s)
    if as_json:
        click.echo(msgspec.json.encode(done))
        return
    click.echo(
        f"Partition {partition} of {group} goes on at offset {done.offset_next}. What was before it, from {done.offset} on, "
        f"is left out: {', '.join(done.records) or 'a record that was there already'} says so."
    )


def _who() -> str:
    try:
        name = getpass.getuser()
    except (OSError, KeyError):  # a container's user may have no name
        name = f"uid-{os.getuid()}"
    return f"{name}@{socket.gethostname()}"
