"""What a host sees of its group's leases: one listing a look, and a read only where a listing says too little.

A listing has a mark of each lease that changes with every write, and its length, which tells its epoch and whether it was given
back (`encode_lease`). So it shows who lives (the mark changed) and who lost it (the length changed), and a lease is read only

- when it is new, or hidden by the listing;
- when its length changed: it was taken or given back, and only the record says by whom;
- when its mark did not change for the lease time. It has expired if the read then finds the very write that the mark was of; so
  an old listing never makes a living host look dead, and times of different clocks are never compared.

What was only renewed is read before it is stolen (`confirm`): the etag is needed then, and others may be stealing too. And now and
then it is read whatever its length says, since a lease that somebody deleted may come back with an epoch that was there before.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Final

import msgspec

from penstock.blobs import BlobStore, Listed
from penstock.clock import Clock
from penstock.errors import BlobNotFound, StoreError
from penstock.processor.lease import Lease, decode_lease, lease_name, leases_prefix

LOOKS: Final = 20
"""Looks in a lease time: a lease that expires or is given back is seen within a twentieth of it."""
_READ_ANYWAY: Final = 128 * LOOKS
"""Looks, after which each lease is read once: about an hour with leases of 30 s."""


class Seen(msgspec.Struct):
    """A lease as it was read, and the last write that was noticed: its mark, length, and since when it was there (monotonic s).

    Times are taken after the answer that showed a write: the writer began it before, whatever the request took. `read_since` is when
    the write that was read was read first: that is enough where a store's listings have other marks than its reads.
    """

    lease: Lease
    etag: str
    read: str
    mark: str
    size: int
    since: float
    read_since: float


class Watch:
    """The leases of a group but for the observer's own. For one thread. `between` is called after each read; False ends the look."""

    def __init__(
        self,
        store: BlobStore,
        group: str,
        partitions: int,
        *,
        me: str,
        clock: Clock,
        lease_s: float,
        trouble: Callable[[int, StoreError | None], None],
        between: Callable[[], bool] = lambda: True,
    ) -> None:
        self._store = store
        self._group = group
        self._partitions = partitions
        self._me = me
        self._clock = clock
        self._lease_s = lease_s
        self._trouble = trouble
        self._between = between
        self._seen: dict[int, Seen] = {}
        self._expired: set[int] = set()
        self._unknown: set[int] = set()
        self._own: dict[int, tuple[str, str]] = {}
        self._looks = 0

    def look(self, own: Mapping[int, str]) -> Sequence[int]:
        """See what there is now; `own` has the observer's leases with the tokens of its last writes. Raises StoreError.

        Returns those of its own that another seems to have written.
        """
        asked_at = self._clock.monotonic()
        listed = self._listed()
        told_at = self._clock.monotonic()
        self._expired.clear()
        self._looks += 1
        unknown, self._unknown = self._unknown, set()
        for partition in range(self._partitions):
            if partition in own:
                self._seen.pop(partition, None)
            # One that could not be read is read again: its mark is noted as seen, but what it says is not.
            elif self._is_read(partition, listed.get(partition), asked_at, told_at) or partition in unknown:
                self._read(partition)
                if not self._between():
                    break
        # The mark is another, and the last write of our own is not.
        marks = {p: (token, listed[p].mark if p in listed else "") for p, token in own.items()}
        before = self._own
        touched = [
            p for p, (token, mark) in marks.items() if p in before and before[p][0] == token and before[p][1] != mark
        ]
        self._own = marks
        return touched

    def seen(self, partition: int) -> Seen | None:
        """The lease; None if there is none."""
        return self._seen.get(partition)

    def known(self, partition: int) -> bool:
        """Whether it could be read, as far as the last look needed to."""
        return partition not in self._unknown

    def expired(self, partition: int) -> bool:
        """Whether the last look proved that nobody wrote it for the lease time."""
        return partition in self._expired

    def confirm(self, owner: str) -> None:
        """Read what `owner` is thought to have and has written since it was read."""
        for partition, seen in sorted(self._seen.items()):
            if seen.lease.owner == owner and seen.read != seen.mark:
                self._read(partition)
                if not self._between():
                    return

    def has(self, owner: str, partition: int) -> bool:
        """Read it now; whether it is `owner`'s still."""
        self._read(partition)
        seen = self._seen.get(partition)
        return self.known(partition) and seen is not None and seen.lease.owner == owner

    def expires_in(self) -> float:
        """Seconds until the next of these leases expires, if nobody writes it; infinite if there is none."""
        expired_since = self._clock.monotonic() - self._lease_s
        ahead = (seen.since - expired_since for seen in self._seen.values() if seen.since > expired_since)
        return min(ahead, default=float("inf"))

    def _listed(self) -> Mapping[int, Listed]:
        prefix = leases_prefix(self._group)
        found: dict[int, Listed] = {}
        for blob in self._store.list(prefix):
            number = blob.name[len(prefix) :].removesuffix(".json")
            if number.isascii() and number.isdigit():
                found[int(number)] = blob
        return found

    def _is_read(self, partition: int, listed: Listed | None, asked_at: float, told_at: float) -> bool:
        seen = self._seen.get(partition)
        if seen is None or listed is None:
            return True
        if listed.mark != seen.mark:
            changed = listed.size != seen.size
            seen.mark, seen.size, seen.since = listed.mark, listed.size, told_at
            if changed:
                return True
        if seen.read != seen.mark and (partition + self._looks) % _READ_ANYWAY == 0:
            return True
        return asked_at - seen.since >= self._lease_s or seen.lease.owner in ("", self._me)

    def _read(self, partition: int) -> None:
        asked_at = self._clock.monotonic()
        try:
            blob = self._store.get(lease_name(self._group, partition))
            lease = decode_lease(blob.body, partition)
        except BlobNotFound:
            self._seen.pop(partition, None)
            self._trouble(partition, None)
            return
        except StoreError as error:
            self._unknown.add(partition)
            self._trouble(partition, error)
            return
        told_at = self._clock.monotonic()
        seen = self._seen.get(partition)
        since = seen.since if seen is not None and seen.mark == blob.mark else told_at
        read_since = seen.read_since if seen is not None and seen.etag == blob.etag else told_at
        self._seen[partition] = Seen(lease, blob.etag, blob.mark, blob.mark, len(blob.body), since, read_since)
        if asked_at - min(since, read_since) >= self._lease_s:
            self._expired.add(partition)
        self._trouble(partition, None)
