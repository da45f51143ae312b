"""What must hold: at every write that reaches the store, and at the end for archive and log."""

from __future__ import annotations

import gzip
from collections.abc import Sequence

from penstock.archive.check import AuditedHub, audit
from penstock.archive.cut import hour_name, period_start_ms
from penstock.archive.ledger import Ledger, Record, decode
from penstock.processor.lease import Lease, decode_lease
from penstock.testing import MemoryBlobs

Line = tuple[str, bytes]
"""The hour that an event belongs to, and the event."""


class Violation(BaseException):
    """What must never happen has happened. Not an Exception: no loop top of the program may take it for a fault."""


class WatchedBlobs(MemoryBlobs):
    """The store itself, which looks at every write that reaches it, and raises Violation for one that must not be.

    One content for each file; a lease begins where a record ends, its checkpoint moves to where a file ends that is there, is
    moved by the instance that holds it, and never goes back; one owner for each epoch of a lease, which grows when the owner changes.
    """

    def __init__(self) -> None:
        super().__init__()
        self._contents: dict[str, bytes] = {}
        self._ends: dict[tuple[int, int], str] = {}
        self._owners: dict[tuple[str, int], str] = {}
        self.epochs_come_again = False

    def there(self, name: str) -> bytes | None:
        """The body of a blob, if there is one."""
        blob = self._blobs.get(name)
        return None if blob is None else blob.body

    def _write(self, name: str, body: bytes) -> str:
        if name.startswith("_leases/"):
            self._check_lease(name, body)
        elif name.startswith("_ledger/"):
            record = decode(body)
            self._ends[record.partition, record.next] = record.file if isinstance(record, Record) else ""
        elif not name.startswith("_") and self._contents.setdefault(name, body) != body:
            lines = [len(gzip.decompress(content).splitlines()) for content in (self._contents[name], body)]
            raise Violation(f"{name} was written with two contents, of {lines[0]} and {lines[1]} events")
        return super()._write(name, body)

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
        if new.owner and self._owners.setdefault((name, new.epoch), new.owner) != new.owner:
            raise Violation(f"epoch {new.epoch} of {name} has two owners: {self._owners[name, new.epoch]}, {new.owner}")

    def _check_change(self, old: Lease, new: Lease) -> None:
        if new.epoch != old.epoch and new.epoch != old.epoch + 1:
            raise Violation(f"the epoch went from {old.epoch} to {new.epoch}: {old} to {new}")
        if (new.offset, new.sequence_number) == (old.offset, old.sequence_number):
            return
        if (new.owner, new.epoch, new.instance) != (old.owner, old.epoch, old.instance):
            raise Violation(f"a checkpoint was moved by one that does not hold the lease: {old} to {new}")
        if new.sequence_number < old.sequence_number or new.offset != str(new.sequence_number):
            raise Violation(f"a checkpoint went back: {old} to {new}")
        if self._ends.get((new.partition, new.sequence_number)) not in self._blobs:
            raise Violation(f"a checkpoint stands where no file ends that is in the store: {old} to {new}")


def hour_of(at_ms: int, period_s: int) -> str:
    """The hour of what was enqueued then."""
    return hour_name(period_start_ms(at_ms, period_s), period_s)


def judge(hub: AuditedHub, blobs: MemoryBlobs, logged: Sequence[Sequence[Line]]) -> None:
    """Raises Violation unless the archive is the log: each event once, in order, in the file of its own hour.

    `logged`: what was ever put into each partition.
    """
    for partition, lines in enumerate(logged):
        archived = [
            (record.hour, line)
            for record in Ledger(blobs, hub.id, partition).chain(0)
            if isinstance(record, Record)
            for line in gzip.decompress(blobs.get(record.file).body).splitlines()
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
