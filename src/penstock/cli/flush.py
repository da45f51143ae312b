"""`penstock flush`: the open hour files are closed and in the store when it returns."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import click
import msgspec

from penstock.cli.options import as_json, settings, url_beats_data
from penstock.cli.reach import admin, fetch
from penstock.errors import PenstockError

if TYPE_CHECKING:
    from penstock.access import Access
    from penstock.blobs import BlobStore
    from penstock.settings import Values


class Flushed(msgspec.Struct):
    """Events below the offsets `next` of each partition are in the store, if `ok`; `behind` are partitions where they are not."""

    ok: bool
    next: list[int]
    behind: list[int]
    waited_s: float


class Progress(NamedTuple):
    """Of a partition's archive: the offset that it has reached, None if nobody knows it, and whose lease it is."""

    offset: int | None
    owner: str | None


class Way(NamedTuple):
    """How an installation is reached. `cut` marks the logs: the offsets behind their last events; `counted`: whether these count events."""

    cut: Callable[[], Sequence[str]]
    progress: Callable[[], Sequence[Progress]]
    counted: Callable[[], bool]


class _Cut(msgspec.Struct):
    next: list[str]


@click.command()
@as_json
@settings("flush")
def flush(values: Values, as_json: bool) -> None:
    """Close the open hour files now and wait until they are in the store. Exit 1 if that takes too long."""
    from penstock.clock import SystemClock

    clock, never = SystemClock(), threading.Event()
    with _way(values) as way:
        goals = [int(offset) for offset in way.cut()]
        began = clock.monotonic()
        while True:
            done = way.progress()
            behind = [
                partition for partition, goal in enumerate(goals) if goal and (done[partition].offset or 0) < goal
            ]
            if not behind or clock.monotonic() - began >= values.seconds("flush-timeout"):
                break
            clock.wait(never, 0.1)
        result = Flushed(not behind, goals, behind, round(clock.monotonic() - began, 3))
        if as_json:
            click.echo(msgspec.json.encode(result))
        if behind:
            raise PenstockError(_reason(done, behind, result.waited_s))
        if not as_json:
            events = f", {sum(goals):,} events," if way.counted() else ""
            click.echo(f"Everything until now{events} is in hour files ({result.waited_s:.1f} s).")


@contextlib.contextmanager
def _way(values: Values) -> Iterator[Way]:
    """Through the topic where `--hub` says so, the admin port where `--url` does, else that of the data folder, and its store."""
    from penstock.cli import topic, wiring
    from penstock.clock import SystemClock

    if topic.asks(values, "data", "url"):
        where = topic.asked(wiring.layout(values), values, "data", "url")
        store = wiring.open_store(where)
        with topic.opened(where, store, SystemClock()) as hub:
            yield Way(hub.cut, lambda: _in_store(store, hub.partitions()), lambda: False)
        return
    api = admin(values)

    def cut() -> Sequence[str]:
        return msgspec.json.decode(fetch(api, "/v1/cut", method="POST"), type=_Cut).next

    if url_beats_data(values):
        yield Way(cut, lambda: _by_url(api), lambda: False)
        return
    store = wiring.open_store(wiring.layout(values))
    partitions = len(_by_url(api))
    yield Way(cut, lambda: _in_store(store, partitions), lambda: _counted(store))


def _in_store(store: BlobStore, partitions: int) -> Sequence[Progress]:
    from penstock.archive.hours import archive_lease

    leases = [archive_lease(store, partition) for partition in range(partitions)]
    return [Progress(int(lease.offset), lease.owner) if lease else Progress(None, None) for lease in leases]


def _by_url(api: Access) -> Sequence[Progress]:
    from penstock.server.status import Status

    report = msgspec.json.decode(fetch(api, "/v1/status"), type=Status)
    return [Progress(int(one.offset) if one.offset else one.checkpoint, one.owner) for one in report.partitions]


def _counted(store: BlobStore) -> bool:
    """Whether offsets are numbers of events in hour files: not where the brokers give them, nor where an archive began late."""
    from penstock.archive.ledger import Gap, Ledger, owner

    known = owner(store)
    if known is None or known.place_bits:
        return False
    return not any(isinstance(Ledger(store, known.hub, one).read(0), Gap) for one in range(known.partitions))


def _reason(done: Sequence[Progress], behind: Sequence[int], waited_s: float) -> str:
    owners = sorted({done[partition].owner or "nobody" for partition in behind})
    why = "no archiver runs" if owners == ["nobody"] else f"their leases are held by {', '.join(owners)}"
    return f"After {waited_s:.0f} s the events of partitions {list(behind)} are not in the store: {why}."
