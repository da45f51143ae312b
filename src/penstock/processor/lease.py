"""A lease: who reads a partition for a group, and how far that group is done. One blob, changed only by compare-and-set.

Two rules make a host that was paused, cut off or declared dead harmless:

- every write of a holder is a compare-and-set on the etag of *its own last write*. When that fails another has written, and
  the holder has lost the lease for good: it never reads the blob again to get a fresh etag;
- every write has a new `Token`, so no two writes have equal bytes, and an etag that was seen never comes back.

A lease has no time in it. An observer calls it expired when the etag has not changed for the lease time on the observer's
own monotonic clock, so a lease is good for at least the lease time after the holder *began* its last successful write.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple, Protocol

import msgspec

from penstock.blobs import BlobStore, Exists
from penstock.clock import Clock
from penstock.errors import BlobNotFound, LostRace, StoreError, StoreUnavailable

_KEYS = {
    "partition": "PartitionId",
    "owner": "Owner",
    "token": "Token",
    "epoch": "Epoch",
    "offset": "Offset",
    "sequence_number": "SequenceNumber",
}
_BYTES = 384
_EPOCHS = 64


class Lease(msgspec.Struct, frozen=True, rename=_KEYS, forbid_unknown_fields=True):
    """The record. `offset` and `sequence_number` are the next to be read; an empty `owner` has given the lease back."""

    partition: int
    owner: str
    token: str
    epoch: int
    offset: str
    sequence_number: int

    @property
    def instance(self) -> str:
        """The instance of the host that wrote it: hosts of one name are told apart by it."""
        return self.token.rpartition("-")[0]


def leases_prefix(group: str) -> str:
    """What the names of a group's leases begin with."""
    return f"_leases/{group}/"


def lease_name(group: str, partition: int) -> str:
    """The name of the lease's blob."""
    return f"{leases_prefix(group)}{partition}.json"


def encode_lease(lease: Lease) -> bytes:
    """The bytes of the blob, with spaces behind the record so that its length tells its epoch and whether it was given back.

    A listing shows lengths: so everyone sees there that a lease has another owner, and need not read those that were only renewed.
    """
    length = _BYTES + lease.epoch % _EPOCHS + (0 if lease.owner else _EPOCHS)
    return msgspec.json.format(msgspec.json.encode(lease), indent=0).ljust(length)


def _id(lease: Lease) -> str:
    """By what a store tells this write from others: with its quotes, since `i-1` also occurs in `i-11`."""
    return f'"{lease.token}"'


def decode_lease(body: bytes, partition: int) -> Lease:
    """The record in a blob. Raises StoreError when it is unreadable, which does not make it free."""
    try:
        lease = msgspec.json.decode(body, type=Lease)
    except (msgspec.DecodeError, ValueError, RecursionError) as error:
        raise StoreError(f"lease unreadable: partition {partition}: {error}", partition=partition) from error
    if lease.partition != partition or lease.epoch < 1 or lease.sequence_number < 0 or not lease.offset.isdecimal():
        raise StoreError(f"lease unreadable: partition {partition}: its values make no sense", partition=partition)
    return lease


def read_leases(
    store: BlobStore,
    group: str,
    partitions: Iterable[int],
    *,
    unreadable: Callable[[int, StoreError], None] | None = None,
) -> list[Lease | None]:
    """The leases of a group in these partitions; None where there is none.

    An unreadable one is reported to `unreadable` and is None too; without `unreadable` it raises its StoreError.
    """
    leases: list[Lease | None] = []
    for partition in partitions:
        lease = None
        try:
            lease = decode_lease(store.get(lease_name(group, partition)).body, partition)
        except BlobNotFound:
            pass
        except StoreError as error:
            if unreadable is None or error.retryable:
                raise
            unreadable(partition, error)
        leases.append(lease)
    return leases


class Start(NamedTuple):
    """Where a lease begins that is not there. `epoch` is more than 1 where there was one before that somebody deleted."""

    offset: str
    sequence_number: int
    epoch: int = 1


class Writer:
    """Who writes leases: one instance of a host. Its tokens are never used twice."""

    def __init__(self, owner: str, instance: str) -> None:
        self.owner = owner
        self.instance = instance
        self._counter = itertools.count(1)

    def token(self) -> str:
        return f"{self.instance}-{next(self._counter)}"


class Holding:
    """A lease that this host holds, until it is lost or released. Thread-safe: the host renews, the pump checkpoints.

    StoreUnavailable leaves it held and not renewed: `in_doubt` tells when reading must pause.
    """

    def __init__(
        self, store: BlobStore, clock: Clock, name: str, writer: Writer, lease: Lease, etag: str, *, since: float
    ) -> None:
        self._store = store
        self._clock = clock
        self._name = name
        self._writer = writer
        self._lease = lease
        self._etag = etag
        self._renewed_at = since
        self._lock = threading.Lock()
        self._lost = False
        self._released = False

    @property
    def group(self) -> str:
        return self._name.removeprefix(leases_prefix("")[:-1]).rpartition("/")[0]

    @property
    def lease(self) -> Lease:
        """As this host wrote it last."""
        return self._lease

    @property
    def lost(self) -> bool:
        """Another has it, or somebody deleted it. Never held again."""
        return self._lost

    @property
    def held(self) -> bool:
        return not (self._lost or self._released)

    def in_doubt(self, lease_s: float) -> bool:
        """The lease time since the last successful write is nearly over: another may soon take it, or has."""
        return self.age_s() > lease_s * 0.8

    def age_s(self) -> float:
        """Seconds since the last successful write began."""
        return self._clock.monotonic() - self._renewed_at

    def renew(self) -> None:
        """Show that this host lives. Raises LostRace, StoreUnavailable."""
        self._write(lambda lease: lease)

    def checkpoint(self, offset: str, sequence_number: int) -> None:
        """Everything below is done for good. Never goes back. Raises LostRace, StoreUnavailable."""

        def forward(lease: Lease) -> Lease | None:
            # The offset may go on alone, over markers.
            if sequence_number < lease.sequence_number or int(offset) <= int(lease.offset):
                return None
            return msgspec.structs.replace(lease, offset=offset, sequence_number=sequence_number)

        self._write(forward)

    def release(self) -> None:
        """Give it back, so that others need not wait for its expiry. Raises LostRace, StoreUnavailable.

        Whatever happens, this host holds it no longer.
        """
        try:
            self._write(lambda lease: msgspec.structs.replace(lease, owner=""))
        finally:
            self._released = True

    def _write(self, change: Callable[[Lease], Lease | None]) -> None:
        with self._lock:
            if not self.held:
                raise LostRace(f"{self._name} is not held any more", blob=self._name)
            changed = change(self._lease)
            if changed is None:
                return
            lease = msgspec.structs.replace(changed, token=self._writer.token())
            # Taken before the write: others may see it land at once, and count from there.
            began_at = self._clock.monotonic()
            try:
                etag = self._store.replace(self._name, encode_lease(lease), etag=self._etag, id=_id(lease))
            except (LostRace, BlobNotFound) as error:
                self._lost = True
                raise LostRace(f"{self._name} was taken from {self._writer.owner}", blob=self._name) from error
            self._lease, self._etag, self._renewed_at = lease, etag, began_at


class Each(Protocol):
    """Does something with each of some holdings, in any order or all at once, and gives the results in theirs."""

    def __call__(
        self, act: Callable[[Holding], StoreError | None], over: Sequence[Holding], /
    ) -> Iterable[StoreError | None]: ...


def one_by_one(act: Callable[[Holding], StoreError | None], over: Sequence[Holding]) -> list[StoreError | None]:
    return [act(holding) for holding in over]


def renewed(holding: Holding) -> StoreError | None:
    """Renew; what went wrong, if anything did. A store that is slow with one lease must not keep the others waiting."""
    try:
        holding.renew()
    except (LostRace, StoreUnavailable) as error:
        return error
    return None


def released(holding: Holding) -> StoreError | None:
    """Give it back; what went wrong, if anything did."""
    try:
        holding.release()
    except (LostRace, StoreUnavailable) as error:
        return error
    return None


def claim(store: BlobStore, clock: Clock, group: str, partition: int, writer: Writer, *, start: Start) -> Holding:
    """Take a partition that has no lease; create-only. Raises LostRace, StoreUnavailable."""
    name, since = lease_name(group, partition), clock.monotonic()
    lease = Lease(partition, writer.owner, writer.token(), start.epoch, start.offset, start.sequence_number)
    made = store.create(name, encode_lease(lease), id=_id(lease))
    if isinstance(made, Exists):
        raise LostRace(f"{name} was taken by another", blob=name)
    return Holding(store, clock, name, writer, lease, made.etag, since=since)


def take_over(
    store: BlobStore, clock: Clock, group: str, seen: Lease, etag: str, writer: Writer, *, epoch_least: int = 1
) -> Holding:
    """Take a lease as it was seen, from wherever it stands. The epoch grows unless the owner's name stays.

    Raises LostRace (also when it was deleted since), StoreUnavailable.
    """
    name, since = lease_name(group, seen.partition), clock.monotonic()
    epoch = max(seen.epoch if seen.owner == writer.owner else seen.epoch + 1, epoch_least)
    lease = msgspec.structs.replace(seen, owner=writer.owner, token=writer.token(), epoch=epoch)
    try:
        etag = store.replace(name, encode_lease(lease), etag=etag, id=_id(lease))
    except BlobNotFound as error:
        raise LostRace(f"{name} was deleted", blob=name) from error
    return Holding(store, clock, name, writer, lease, etag, since=since)
