"""Groups that read over HTTP: how far each is in each partition, so that retention waits for them and older epochs are refused.

Entries lie in the hub's `meta` database (docs/formats.md, The embedded hub). A new epoch is durable before it gets its first
answer. Progress under a known epoch is noted in memory and written by `keep`, about once a second for all partitions together;
what is written then lags behind, and what reads it is only more careful. Each API worker has notes of its own: the newest wins.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Final

import lmdb
import msgspec

from penstock.clock import Clock
from penstock.errors import OffsetBeyondEnd, ReaderFenced
from penstock.hub.commit import Positions
from penstock.hub.layout import META_POSITIONS, META_READERS, Databases
from penstock.hub.reading import reading
from penstock.hub.writing import Writer

SEEN_MS: Final = 10_000
"""The time at which a group was heard of last is written when it is older than this, and may lag by as much."""


class Progress(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """An entry: everything below the sequence number `checkpoint` is done for good under `epoch` of the lease, or an earlier one."""

    epoch: int
    checkpoint: int
    seen_at_ms: int


class Reader(msgspec.Struct, frozen=True):
    """A group's entry in one partition."""

    group: str
    partition: int
    progress: Progress


_decode = msgspec.msgpack.Decoder(Progress).decode
_encode = msgspec.msgpack.Encoder().encode


class Groups:
    """Of one process's open hub. Thread-safe."""

    def __init__(self, env: lmdb.Environment, databases: Databases, writer: Writer, clock: Clock) -> None:
        self._env = env
        self._databases = databases
        self._writer = writer
        self._clock = clock
        self._noted: dict[bytes, Progress] = {}
        self._lock = threading.Lock()

    def heard(self, group: str, partition: int, epoch: int, checkpoint: int) -> None:
        """A host of `group` reads under `epoch` of its lease, with this checkpoint. To be called before it is given anything.

        Epoch 0 is a host that has no lease yet and asks where to begin: it is never refused, and a group that was not known holds
        everything from then on. Raises ReaderFenced when a newer epoch was here, OffsetBeyondEnd.
        """
        key, now = _key(group, partition), Progress(epoch, checkpoint, self._clock.now_ms())
        with reading(self._env) as txn:
            kept = self._get(txn, key)
            end = Positions(bytearray(txn.get(META_POSITIONS, db=self._databases.meta))).next(partition)
        if checkpoint > end:
            raise OffsetBeyondEnd(
                f"The checkpoint {checkpoint} of group {group} lies beyond the end of partition {partition}, {end}.",
                end=str(end),
            )
        if after(kept, now) is None:
            raise _fenced(group, partition, kept)
        if kept is None or epoch > kept.epoch:
            self._begin(group, partition, now)
            return
        with self._lock:
            self._noted[key] = after(self._noted.get(key), now) or now

    def _begin(self, group: str, partition: int, now: Progress) -> None:
        key = _key(group, partition)
        with self._writer.transaction() as txn:
            # Another worker may have been faster.
            kept = self._get(txn, key)
            following = after(kept, now)
            if following is None:
                raise _fenced(group, partition, kept)
            txn.put(key, _encode(following), db=self._databases.meta)

    def keep(self) -> None:
        """Write what was noted and is worth a commit. About once a second; what a failed commit loses is soon heard again."""
        with self._lock:
            noted, self._noted = self._noted, {}
        if not noted:
            return
        with reading(self._env) as txn:
            due = {key: now for key, now in noted.items() if _is_news(self._get(txn, key), now)}
        if not due:
            return
        with self._writer.transaction() as txn:
            for key, now in due.items():
                # A group that was forgotten since comes back with its next request, not with an old note, also where it has begun anew.
                kept = self._get(txn, key)
                following = after(kept, now) if kept and kept.epoch == now.epoch else None
                if following is not None:
                    txn.put(key, _encode(following), db=self._databases.meta)

    def all(self) -> list[Reader]:
        """What is written, in the order of partitions and names."""
        with reading(self._env) as txn:
            return list(self._entries(txn))

    def forget(self, group: str, *, not_since_ms: int | None = None) -> bool:
        """Drop a group; with `not_since_ms` only if it was not heard of since, in any partition. True if it is gone and was there."""
        with self._writer.transaction() as txn:
            found = [reader for reader in self._entries(txn) if reader.group == group]
            if not found or (not_since_ms is not None and seen_at_ms(found) >= not_since_ms):
                return False
            for reader in found:
                txn.delete(_key(group, reader.partition), db=self._databases.meta)
        return True

    def _entries(self, txn: lmdb.Transaction) -> Iterator[Reader]:
        cursor = txn.cursor(self._databases.meta)
        found = cursor.set_range(META_READERS)
        while found and cursor.key().startswith(META_READERS):
            partition, _, group = cursor.key()[len(META_READERS) :].decode().partition("/")
            yield Reader(group, int(partition), _decode(cursor.value()))
            found = cursor.next()

    def _get(self, txn: lmdb.Transaction, key: bytes) -> Progress | None:
        entry = txn.get(key, db=self._databases.meta)
        return _decode(entry) if entry is not None else None


def after(kept: Progress | None, now: Progress) -> Progress | None:
    """The entry after a group was heard of; None when it must be refused. A checkpoint never goes back."""
    if kept is None:
        return now
    if 0 < now.epoch < kept.epoch:
        return None
    return Progress(max(kept.epoch, now.epoch), max(kept.checkpoint, now.checkpoint), now.seen_at_ms)


def seen_at_ms(readers: list[Reader]) -> int:
    """When any of these was heard of last."""
    return max(reader.progress.seen_at_ms for reader in readers)


def _is_news(kept: Progress | None, now: Progress) -> bool:
    return kept is not None and (now.checkpoint > kept.checkpoint or abs(now.seen_at_ms - kept.seen_at_ms) >= SEEN_MS)


def _key(group: str, partition: int) -> bytes:
    return META_READERS + b"%05d/%b" % (partition, group.encode())


def _fenced(group: str, partition: int, kept: Progress | None) -> ReaderFenced:
    epoch = kept.epoch if kept else 0
    return ReaderFenced(
        f"Epoch {epoch} of group {group} reads partition {partition}: this host has lost the lease, or the group's leases were deleted and "
        "began anew. Nothing was read. If the lease is still its own, it takes it again behind that epoch, after two lease times.",
        last_epoch=epoch,
    )
