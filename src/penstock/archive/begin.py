"""Where a partition's archive begins, and where it goes on without a lease.

Every chain of the ledger begins at 0. Where the log did not when the archive was switched on (`--archive none` until then, and
retention at work), its first record is a gap up to the log's first event: who begins the archive creates it, create-only like
every record, and only then its lease. Of two that found the log trimmed to different places one decides; the other reads what
stands and goes on at its `next`. So where the archive began never depends on what a listing shows, or on what the log holds by
now: a record at 0 is on the chain, and where there is none, nothing was archived.
"""

from __future__ import annotations

import contextlib
import uuid
from concurrent.futures import ThreadPoolExecutor
from typing import Final

from penstock.archive.hours import archive_lease
from penstock.archive.ledger import Gap, Ledger, Record
from penstock.archive.lost import in_store
from penstock.blobs import BlobStore
from penstock.clock import Clock, timestamp
from penstock.errors import ArchiveError
from penstock.hub import Hub
from penstock.processor.lease import Start

BEGAN_LATE: Final = "events before this were gone before the archive began"
OLDER: Final = "the ledger began here, in a store of an earlier version"
AT_ONCE: Final = 32


def start(store: BlobStore, hub: Hub, partition: int, *, host: str, clock: Clock) -> Start:
    """Where a lease begins that does not exist: at the end of what the ledger has decided, in an epoch behind the last that it names.

    All files but the last are confirmed (L4). If the last one is missing, its writer died between record and file; then
    the lease begins at that file, and whoever holds it adopts the record and writes the file.
    """
    ledger = Ledger(store, hub.id, partition)
    log_first = hub.bounds(partition).first
    last = ledger.last()
    if last is None and log_first > 0:
        ledger.create(gap(hub, partition, 0, log_first, BEGAN_LATE, host=host, epoch=0, clock=clock))
        last = ledger.tail(0)
    # Who made the gap may have died before there was a lease, for which retention would have waited.
    while isinstance(last, Gap) and last.reason == BEGAN_LATE and last.next < log_first:
        ledger.create(gap(hub, partition, last.next, log_first, BEGAN_LATE, host=host, epoch=last.epoch, clock=clock))
        last = ledger.tail(last.next)
    if last is None:
        return Start("0", 0)
    if isinstance(last, Record) and not in_store(store, last.file) and ledger.lost(last.first) is None:
        return Start(str(last.first >> hub.place_bits), last.first, last.epoch + 1)
    return Start(last.offset_next, last.next, last.epoch + 1)


def passed_ms(hub: Hub, partition: int, offset: int, since_ms: int) -> int:
    """The start of the latest period, from `since_ms` on, of which something lies before an offset: nothing behind it is of an earlier one.

    For one who begins there, in a log of which the brokers' times may step back: the markers that he has not read have said it.
    """
    bounds, period_ms = hub.bounds(partition), hub.period_s * 1000
    low = max(since_ms, bounds.enqueued_first_ms // period_ms * period_ms)
    high = max(low, bounds.enqueued_last_ms // period_ms * period_ms)
    while low < high:
        middle = low + ((high - low) // period_ms + 1) // 2 * period_ms
        if int(hub.locate(partition, middle)) < offset:
            low = middle
        else:
            high = middle - period_ms
    return low


def join(store: BlobStore, hub: Hub, *, clock: Clock) -> None:
    """See that chains which an earlier version began behind 0 begin at 0. To be called when a host or API starts.

    Only there, and only once, a listing is believed; but no further than that a record which it shows is there. If it hid
    records before that one, `verify` names them: they are not on the chain, and no event is lost or archived again.
    """
    with ThreadPoolExecutor(AT_ONCE, "join") as pool:
        list(pool.map(lambda partition: _join(store, hub, partition, clock), range(hub.partitions())))


def _join(store: BlobStore, hub: Hub, partition: int, clock: Clock) -> None:
    ledger = Ledger(store, hub.id, partition)
    with contextlib.suppress(ArchiveError):  # a record that is not right stops its partition, when that is archived
        if ledger.read(0) is not None:
            return
        lease, there = archive_lease(store, partition), _first_there(ledger)
        until = there
        if lease is not None and there is None and hub.bounds(partition).first == lease.sequence_number:
            # Nothing was archived yet, and retention waits for the lease at the place where it began.
            until = None if any(store.list(f"{partition}/")) else lease.sequence_number
        if until and (lease is None or until <= lease.sequence_number):
            epoch = lease.epoch if lease else 0
            ledger.create(gap(hub, partition, 0, until, OLDER, host="", epoch=epoch, clock=clock))


def _first_there(ledger: Ledger) -> int | None:
    """The first record that a listing shows and a `get` confirms. Asked where there is none at 0, so only an earlier version made it."""
    return next((first for first in ledger.listed() if ledger.read(first) is not None), None)


def gap(
    hub: Hub, partition: int, first: int, following: int, reason: str, *, host: str, epoch: int, clock: Clock
) -> Gap:
    """One to be created: `[first, following)` are in no file."""
    return Gap(
        hub=hub.id,
        partition=partition,
        first=first,
        next=following,
        offset_next=str(following >> hub.place_bits),
        reason=reason,
        host=host,
        epoch=epoch,
        id=uuid.uuid4().hex,
        at=timestamp(clock.now_ms()),
    )
