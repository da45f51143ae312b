"""How the archive gets past events that the log does not have any more (processor/skip.py says when, and in which order).

Where the chain of the ledger ends, its next record is made: a gap `[place, to)` with the reason, who ordered it and when, create-only
like every record. So an archiver that still holds these events, and would write their file, and this order cannot both win (L2):
whoever is later reads what stands. The archiver throws away what it has, the order says that there is a file, and does nothing.

A host may have died between a record and its file (L4), and the file's events be gone since. Then the chain stands, and that file
will never be there: `{first:020}.lost.json` beside the record says so, before the gap behind it. If its archiver is not dead after all
and writes the file now, all the better: it is the one that the record describes.
"""

from __future__ import annotations

from penstock.archive.begin import gap
from penstock.archive.hours import ARCHIVE_GROUP
from penstock.archive.ledger import Gap, Ledger, Link, Record, lost_name, record_name
from penstock.archive.lost import in_store
from penstock.blobs import BlobStore
from penstock.clock import Clock
from penstock.errors import ArchiveError
from penstock.hub import Hub
from penstock.processor.lease import Lease
from penstock.processor.skip import Order, Skipped, destination, move, standing


def skip(store: BlobStore, hub: Hub, order: Order, *, clock: Clock, watch_s: float) -> Skipped:
    """Raises SettingsError where nothing was touched, ArchiveError where the ledger is not right, StoreError, HubError."""
    lease = standing(store, ARCHIVE_GROUP, order.partition, clock=clock, watch_s=watch_s)
    ledger = Ledger(store, hub.id, order.partition)
    behind = _behind(ledger, lease, order.partition)
    done = lease.sequence_number if lease else 0  # what is missing of the files before, somebody has removed
    missing = [
        link for link in behind if isinstance(link, Record) and link.first >= done and not in_store(store, link.file)
    ]
    start = missing[0].first if missing else behind[-1].next if behind else 0
    at = int(lease.offset) if lease else start >> hub.place_bits

    def earliest(first: int) -> int:
        return _end(_before(behind, first << hub.place_bits)) >> hub.place_bits

    wanted = destination(hub, order, at=at, earliest=earliest) << hub.place_bits
    # Files that were decided behind it are not this order's: who comes there completes them.
    passed = _before(behind, wanted)
    place = _end(passed)
    to = max(wanted, place)
    records = []

    def passed_over(first: int, following: int) -> Gap:
        epoch = lease.epoch if lease else behind[-1].epoch if behind else 0
        reason = f"skipped: {order.reason}"
        return gap(hub, order.partition, first, following, reason, host=order.by, epoch=epoch, clock=clock)

    for record in [record for record in missing if record in passed]:
        ledger.lose(passed_over(record.first, record.next))
        records.append(lost_name(order.partition, record.first))
    if place < to:
        made = passed_over(place, to)
        stands = ledger.create(made)
        if not isinstance(stands, Gap) or stands.next != to:
            raise ArchiveError(
                f"What comes at {place} of partition {order.partition} was decided by {stands.host} meanwhile: "
                f"{record_name(order.partition, place)} says what. The lease was not moved; look at the status again.",
                partition=order.partition,
            )
        records.append(record_name(order.partition, place))
    offset = str(to >> hub.place_bits)
    move(store, ARCHIVE_GROUP, order.partition, offset=offset, sequence_number=to)
    return Skipped(ARCHIVE_GROUP, order.partition, str(at), offset, order.reason, order.by, records)


def _before(behind: list[Link], place: int) -> list[Link]:
    """What begins before that place."""
    return [link for link in behind if link.first < place]


def _end(links: list[Link]) -> int:
    return links[-1].next if links else 0


def _behind(ledger: Ledger, lease: Lease | None, partition: int) -> list[Link]:
    """The chain from the checkpoint on, and if nothing is there yet, the record that ends there. Raises ArchiveError."""
    if lease is None:
        last = ledger.last()
        return [last] if last else []
    behind = list(ledger.chain(lease.sequence_number))
    before = None if behind else ledger.before(lease.sequence_number)
    if not behind and before is None and lease.sequence_number:
        raise ArchiveError(
            f"the checkpoint of partition {partition} is {lease.sequence_number}, but nothing in the ledger ends there",
            partition=partition,
        )
    return behind or ([before] if before else [])
