"""`penstock leases`: who reads which partition, how far it is, why it is there, and which move is due.

The command looks at the leases for a short while (`--watch`), as a host does: a lease that does not change is not renewed. In a
folder the file's time tells how long that has been so already; elsewhere the age is what was seen, and so the least it can be.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import click
import msgspec
from click.core import ParameterSource

from penstock.cli.options import as_json, console, settings, url_beats_data
from penstock.cli.show import read_status
from penstock.cli.skip import skip
from penstock.errors import SettingsError

if TYPE_CHECKING:
    from penstock.blobs import BlobStore
    from penstock.cli.wiring import Layout
    from penstock.clock import Clock
    from penstock.hub import Hub
    from penstock.processor.lease import Lease
    from penstock.processor.moves import Due, Moved, Observed
    from penstock.settings import Values

_POLL_S = 0.2
_GROUP = "$archive"


class End(NamedTuple):
    """First and next sequence number of a partition, and its first offset. In a topic sequence numbers do not count: with `bits`, those of
    the place in a record, records are counted from the lease's offset; or `lag_records` is known.
    """

    first: int
    next: int
    first_offset: int
    bits: int = 0
    lag_records: int | None = None


Ends = Sequence[End]


class LeaseRow(msgspec.Struct):
    """A partition. None: unknown, or not there; `problem` says that its lease cannot be read, or that what comes next is gone.

    `age_s`: how long it has not been written, at least; `lag_events`: from its checkpoint to the end of the log. In a Kafka topic records
    are counted, frames and markers: `lag_records`, and `lag_events` is None.
    """

    partition: int
    owner: str | None
    epoch: int | None
    offset: str | None
    sequence_number: int | None
    age_s: float | None
    lag_events: int | None
    moved: Moved | None
    next: Due | None
    problem: str | None = None
    lag_records: int | None = None


class Sight(NamedTuple):
    """Where the leases of a group are seen. `look` reads them all, and puts into `problems` why one cannot be read.

    `ends`: None where the hub cannot be reached; `hosts`: known to run.
    """

    look: Callable[[], Sequence[Lease | None]]
    moved: Callable[[Lease], Moved | None]
    written_ms: Callable[[int], float | None]
    ends: Callable[[], Ends | None]
    hosts: frozenset[str]
    problems: dict[int, str]


@click.group(invoke_without_command=True)
@click.option("--group", default=_GROUP, show_default=True, help="Consumer group; $archive is the archiver's.")
@as_json
@settings("leases")
@click.pass_context
def leases(context: click.Context, values: Values, group: str, as_json: bool) -> None:
    """Who reads which partition, how far it is, why it is there, and when the next move is due."""
    from penstock.clock import SystemClock

    if context.invoked_subcommand is not None:
        given = [name for name in context.params if context.get_parameter_source(name) is ParameterSource.COMMANDLINE]
        if given:
            raise click.UsageError(f"The options of `{context.invoked_subcommand}` stand behind it.")
        return

    clock, lease_s = SystemClock(), values.seconds("lease")
    with _sight(values, group) as sight:
        rows = _rows(sight, observe(sight, clock, values.seconds("watch")), lease_s, group)
    if as_json:
        click.echo(msgspec.json.encode(rows))
    else:
        _print(rows, group)


@contextlib.contextmanager
def _sight(values: Values, group: str) -> Iterator[Sight]:
    """The leases in the store, and the log's ends from the hub or the API; or everything from the API if that is all there is."""
    from penstock.cli import topic, wiring
    from penstock.clock import SystemClock

    in_topic = topic.asks(values, "data", "url")
    by_url = url_beats_data(values) and not in_topic
    if by_url and values.source("store") == "default":
        if group != _GROUP:
            raise SettingsError(f"The API tells of the group {_GROUP} only: name the store of {group} with --store.")
        yield _api_sight(values)
        return
    where = topic.asked(wiring.layout(values), values, "data", "url")
    store = wiring.open_store(where)
    known = wiring.owner_of(where, store)
    sight = _store_sight(store, group, known.partitions, where)
    if by_url:
        yield sight._replace(ends=lambda: _ends_by_url(values))
        return
    if in_topic:
        with topic.opened(where, store, SystemClock()) as log:
            yield sight._replace(ends=lambda: _ends(log))
        return
    with wiring.hub_of(known, where, values) as hub:
        yield sight if hub is None else sight._replace(ends=lambda: _ends(hub))


def _ends(hub: Hub) -> Ends:
    every = map(hub.bounds, range(hub.partitions()))
    return [End(one.first, one.next, one.first >> hub.place_bits, hub.place_bits) for one in every]


def _ends_by_url(values: Values) -> Ends:
    every = read_status(values).partitions
    return [End(one.first, one.next, int(one.first_offset or one.first), lag_records=one.lag_records) for one in every]


def _api_sight(values: Values) -> Sight:
    from penstock.processor.lease import Lease
    from penstock.processor.moves import moved

    def look() -> list[Lease | None]:
        return [
            Lease(one.partition, one.owner or "", one.token, one.epoch, one.offset or "", one.checkpoint or 0)
            if one.token is not None and one.epoch is not None
            else None
            for one in read_status(values).partitions
        ]

    return Sight(
        look,
        moved=lambda lease: moved(lease, None),
        written_ms=lambda _partition: None,
        ends=lambda: _ends_by_url(values),
        hosts=frozenset(),
        problems={},
    )


def _store_sight(store: BlobStore, group: str, partitions: int, where: Layout) -> Sight:
    from penstock.processor.lease import lease_name, read_leases
    from penstock.processor.moves import moved, read_move

    problems: dict[int, str] = {}

    def look() -> list[Lease | None]:
        problems.clear()
        return read_leases(
            store,
            group,
            range(partitions),
            unreadable=lambda partition, error: problems.update({partition: error.detail}),
        )

    return Sight(
        look,
        moved=lambda lease: moved(lease, read_move(store, group, lease)),
        written_ms=lambda partition: file_ms(where, lease_name(group, partition)),
        ends=lambda: None,
        hosts=_hosts(where.run) if group == _GROUP else frozenset(),
        problems=problems,
    )


def file_ms(where: Layout, name: str) -> float | None:
    """When a blob was written, if the store is a folder: its time is of this machine, as is the clock.

    Hosts decide by what they saw themselves, not by this.
    """
    path = where.store / name
    return path.stat().st_mtime * 1000 if not where.cloud and path.exists() else None


def _hosts(folder: Path) -> frozenset[str]:
    """The archiver hosts that run on this machine: those without a partition stand in no lease."""
    from penstock.cli.wiring import UP_HOST
    from penstock.server.parts import read_runs

    parts = {part.name for run in read_runs(folder) for part in run.parts}
    return frozenset(UP_HOST if name == "archiver" else name for name in parts if not name.startswith("api-"))


def observe(sight: Sight, clock: Clock, watch_s: float) -> list[Observed]:
    """Look at the leases for `watch_s`, once at least."""
    from penstock.processor.moves import Observed

    never, began = threading.Event(), clock.monotonic()
    seen: dict[int, tuple[str | None, float]] = {}
    while True:
        now = clock.monotonic()
        found = sight.look()
        for partition, lease in enumerate(found):
            token = lease.token if lease else None
            if partition not in seen or seen[partition][0] != token:
                seen[partition] = token, now
        if now - began >= watch_s:
            break
        clock.wait(never, min(_POLL_S, watch_s))
    now_s = clock.now_ms() / 1000
    return [
        Observed(
            partition,
            lease,
            max(now - seen[partition][1], 0.0 if (at := sight.written_ms(partition)) is None else now_s - at / 1000),
            readable=partition not in sight.problems,
        )
        for partition, lease in enumerate(found)
    ]


def _rows(sight: Sight, seen: Sequence[Observed], lease_s: float, group: str) -> list[LeaseRow]:
    from penstock.processor.moves import forecast

    ends = sight.ends()
    return [
        _row(one, due and msgspec.structs.replace(due, due_s=round(due.due_s, 3)), sight, ends, group)
        for one, due in zip(seen, forecast(seen, sight.hosts, lease_s=lease_s), strict=True)
    ]


def _row(one: Observed, due: Due | None, sight: Sight, ends: Ends | None, group: str) -> LeaseRow:
    from penstock.processor.skip import gone

    lease = one.lease
    problem, end = sight.problems.get(one.partition), None if ends is None else ends[one.partition]
    if lease is not None and end is not None and int(lease.offset) < end.first_offset:
        problem = gone(group, one.partition, at=int(lease.offset), first=end.first_offset)
    lag_events, lag_records = _lags(lease, end)
    return LeaseRow(
        partition=one.partition,
        owner=lease.owner if lease else None,
        epoch=lease.epoch if lease else None,
        offset=lease.offset if lease else None,
        sequence_number=lease.sequence_number if lease else None,
        age_s=round(one.age_s, 3) if lease else None,
        lag_events=lag_events,
        moved=sight.moved(lease) if lease else None,
        next=due,
        problem=problem,
        lag_records=lag_records,
    )


def _lags(lease: Lease | None, end: End | None) -> tuple[int | None, int | None]:
    """In events, or in records."""
    if end is None:
        return None, None
    if end.lag_records is not None:
        return None, end.lag_records
    if not end.bits:
        return max(0, end.next - max(end.first, lease.sequence_number if lease else 0)), None
    done = max(end.first_offset, int(lease.offset) if lease else 0)
    return None, max(0, (end.next >> end.bits) - done)


def _print(rows: Sequence[LeaseRow], group: str) -> None:
    from rich.table import Table
    from rich.text import Text

    balanced = all(row.next is None and row.problem is None for row in rows)
    names = ("partition", "owner", "epoch", "age s", "checkpoint", "lag", "moved last", "next move")
    table = Table(*names, title=f"leases of {group}")
    for row in rows:
        table.add_row(
            str(row.partition),
            Text(row.owner or ""),
            _text(row.epoch),
            "" if row.age_s is None else f"{row.age_s:.1f}",
            _text(row.sequence_number),
            _text(row.lag_events if row.lag_records is None else row.lag_records),
            Text(row.problem or _why(row)),
            Text("none: balanced" if balanced else _next(row)),
        )
    console().print(table)


def _text(value: int | None) -> str:
    return "" if value is None else f"{value:,}"


def _why(row: LeaseRow) -> str:
    """Why the partition is where it is, as a sentence."""
    moved = row.moved
    if row.owner is None:
        return "never: nobody has claimed it yet"
    if moved is None:
        return "not noted"
    before = moved.from_owner or "its host"
    said = {
        "first": f"{moved.to} was the first to claim it",
        "given_back": f"{moved.to} took it, {before} had given it back" if moved.to else f"{before} gave it back",
        "expired": f"{moved.to} took it, {before} did not renew it",
        "balance": f"{moved.to} took it from {before} to even out",
        "own": f"{moved.to} took its own again",
    }[moved.why]
    return f"{said}, {moved.at}" if moved.at else said


def _next(row: LeaseRow) -> str:
    """The next move, as a sentence."""
    due = row.next
    if due is None:
        return "none"
    if due.due_s:
        return f"free in {due.due_s:.1f} s, if {due.from_owner} does not renew it until then"
    taker = f"{due.to} takes it in its next round" if due.to else "the next host takes it"
    return {"expired": f"not renewed: {taker}", "balance": f"{taker}, to even out"}.get(due.why, taker)


leases.add_command(skip)
