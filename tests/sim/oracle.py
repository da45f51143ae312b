"""What must hold: at every write that reaches the store, and at the end for archive and log."""

from __future__ import annotations

import gzip
from collections.abc import Callable, Iterator, Sequence

from penstock.archive.check import AuditedHub, audit
from penstock.archive.cut import hour_name, period_start_ms
from penstock.archive.ledger import Gap, Ledger, Link, Record, decode, lost_name
from penstock.blobs import Blob, Created, Exists, Listed
from penstock.blobs.disk import check_name
from penstock.errors import BlobNotFound
from penstock.processor.lease import Lease, decode_lease
from penstock.testing import MemoryBlobs

Line = tuple[str, bytes]
"""The hour that an event belongs to, and the event."""


SKIPPED = "skipped: "
ORDER = "order-"
"""What the instances of those that order to skip begin with, and of nobody else."""


class Violation(BaseException):
    """What must never happen has happened. Not an Exception: no loop top of the program may take it for a fault."""


class WatchedBlobs(MemoryBlobs):
    """The store itself, which looks at every write that reaches it, and raises Violation for one that must not be.

    One content for each file; a lease begins where a record ends, its checkpoint moves to where a file ends that is there, is
    moved by the instance that holds it, and never goes back; one owner for each epoch of a lease, which grows when the owner changes.

    Only an order to skip moves a checkpoint otherwise: to where a record ends, over nothing but files that are there and what
    the ledger says is left out; and that is nothing but what lies between the checkpoint and where the order leads.
    """

    def __init__(self) -> None:
        super().__init__()
        self._contents: dict[str, bytes] = {}
        self._ends: dict[tuple[int, int], str] = {}
        self._links: dict[tuple[int, int], Link] = {}
        self._owners: dict[tuple[str, int], str] = {}
        self._done: dict[int, int] = {}
        self._orders: list[tuple[int, int, Callable[[], int]]] = []
        self.epochs_come_again = False
        self.hours: set[str] = set()

    def order(self, partition: int, to: Callable[[], int]) -> None:
        """Somebody orders to skip what lies between the checkpoint of this partition and `to`."""
        self._orders.append((partition, self._done.get(partition, 0), to))

    def link(self, partition: int, first: int) -> Link | None:
        """What the ledger says of the events from there on."""
        return self._links.get((partition, first))

    def ends_file(self, partition: int, next: int) -> bool:
        """Whether the ledger has a file that ends there."""
        return bool(self._ends.get((partition, next)))

    def left_out(self, partition: int) -> set[int]:
        """The events that the ledger says an order left out, if they are in no file that is there."""
        gaps = [link for (p, _), link in self._links.items() if p == partition and self._is_left_out(link)]
        return {number for link in gaps for number in range(link.first, link.next)}

    # In place of what MemoryBlobs does: nothing here runs at the same time, and names were checked by whoever wrote to them.

    def create(self, name: str, body: bytes, *, id: str) -> Created | Exists:
        there = self._blobs.get(name)
        return Exists(there) if there else Created(self._write(name, body))

    def get(self, name: str) -> Blob:
        blob = self._blobs.get(name)
        if blob is None:
            raise BlobNotFound(f"there is no blob {name}", blob=name)
        return blob

    def list(self, prefix: str) -> Iterator[Listed]:
        names = sorted([name for name in self._blobs if name.startswith(prefix)])
        return iter([Listed(name, len(blob.body), blob.etag) for name in names for blob in (self._blobs[name],)])

    def there(self, name: str) -> bytes | None:
        """The body of a blob, if there is one."""
        blob = self._blobs.get(name)
        return None if blob is None else blob.body

    def _write(self, name: str, body: bytes) -> str:
        if name.startswith("_leases/"):
            self._check_lease(name, body)
        elif name.startswith("_ledger/"):
            self._note(name, decode(body))
        elif not name.startswith("_") and self._contents.setdefault(name, body) != body:
            lines = [len(gzip.decompress(content).splitlines()) for content in (self._contents[name], body)]
            raise Violation(f"{name} was written with two contents, of {lines[0]} and {lines[1]} events")
        return super()._write(check_name(name) if name not in self._blobs else name, body)

    def _note(self, name: str, link: Link) -> None:
        """A record of the ledger."""
        lost = name == lost_name(link.partition, link.first)
        # A file that was decided is left out as a whole, if the first of it is.
        last = link.first if lost else link.next - 1
        if self._is_skipped(link) and not any(
            partition == link.partition and done <= link.first and last < to() for partition, done, to in self._orders
        ):
            raise Violation(f"{name} leaves out what nobody ordered to skip: {link}")
        if lost:
            return
        self._links[link.partition, link.first] = link
        self._ends[link.partition, link.next] = link.file if isinstance(link, Record) else ""
        if isinstance(link, Record):
            self.hours.add(link.hour)

    def _is_skipped(self, link: Link) -> bool:
        return isinstance(link, Gap) and link.reason.startswith(SKIPPED)

    def _is_left_out(self, link: Link) -> bool:
        if isinstance(link, Gap):
            return self._is_skipped(link)
        return link.file not in self._blobs and lost_name(link.partition, link.first) in self._blobs

    def _check_lease(self, name: str, body: bytes) -> None:
        partition = int(name.rpartition("/")[2].removesuffix(".json"))
        new = decode_lease(body, partition)
        there = self._blobs.get(name)
        if there is None:
            # A lease that was deleted begins a new life. Who claims it may not know how far its epochs were.
            self.epochs_come_again |= (name, new.epoch) in self._owners
            self._owners = {key: owner for key, owner in self._owners.items() if key[0] != name}
            if new.sequence_number > 0 and (partition, new.sequence_number) not in self._ends:
                raise Violation(f"a lease begins where no record ends: {new}")
        else:
            self._check_change(decode_lease(there.body, partition), new)
        self._done[partition] = max(self._done.get(partition, 0), new.sequence_number)
        if new.owner and self._owners.setdefault((name, new.epoch), new.owner) != new.owner:
            raise Violation(f"epoch {new.epoch} of {name} has two owners: {self._owners[name, new.epoch]}, {new.owner}")

    def _check_change(self, old: Lease, new: Lease) -> None:
        if new.epoch != old.epoch and new.epoch != old.epoch + 1:
            raise Violation(f"the epoch went from {old.epoch} to {new.epoch}: {old} to {new}")
        if (new.offset, new.sequence_number) == (old.offset, old.sequence_number):
            return
        if new.instance.startswith(ORDER):
            self._check_order(old, new)
            return
        if (new.owner, new.epoch, new.instance) != (old.owner, old.epoch, old.instance):
            raise Violation(f"a checkpoint was moved by one that does not hold the lease: {old} to {new}")
        if new.sequence_number < old.sequence_number or new.offset != str(new.sequence_number):
            raise Violation(f"a checkpoint went back: {old} to {new}")
        if self._ends.get((new.partition, new.sequence_number)) not in self._blobs:
            raise Violation(f"a checkpoint stands where no file ends that is in the store: {old} to {new}")

    def _check_order(self, old: Lease, new: Lease) -> None:
        if new.owner or new.epoch != old.epoch or new.offset != str(new.sequence_number):
            raise Violation(f"an order to skip did more to the lease than to free and to move it: {old} to {new}")
        at = old.sequence_number
        while at < new.sequence_number and (link := self.link(new.partition, at)) is not None:
            if not self._is_left_out(link) and not (isinstance(link, Record) and link.file in self._blobs):
                raise Violation(f"an order to skip passed over {link}, of which nobody says that it is left out")
            at = link.next
        if at != new.sequence_number:
            raise Violation(f"an order to skip moved the checkpoint to where no record ends: {old} to {new}")


def hour_of(at_ms: int, period_s: int) -> str:
    """The hour of what was enqueued then."""
    return hour_name(period_start_ms(at_ms, period_s), period_s)


def judge(hub: AuditedHub, blobs: WatchedBlobs, logged: Sequence[Sequence[Line]]) -> None:
    """Raises Violation unless the archive is the log: each event once, in order, in the file of its own hour.

    `logged`: what was ever put into each partition, without what was to be left out.
    """
    for partition, lines in enumerate(logged):
        archived = [
            (record.hour, line)
            for record in Ledger(blobs, hub.id, partition).chain(0)
            if isinstance(record, Record) and (file := blobs.there(record.file)) is not None
            for line in gzip.decompress(file).splitlines()
        ]
        if archived != lines:
            raise Violation(f"the archive of partition {partition} is not its log: {_compared(archived, lines)}")
    problems = audit(hub, blobs, deep=True).problems
    if problems:
        raise Violation(f"audit: {problems}")


def _compared(archived: Sequence[Line], logged: Sequence[Line]) -> str:
    same = next((i for i, (a, b) in enumerate(zip(archived, logged, strict=False)) if a != b), None)
    where = f"the first difference is at {same}" if same is not None else "one is the beginning of the other"
    return f"{len(archived)} events are archived and {len(logged)} logged; {where}"
