"""Negative controls: one safety step of guarantees.md taken away. Whatever is checked without them must fail with them."""

from __future__ import annotations

import contextlib
import enum
from collections.abc import Iterator
from typing import BinaryIO
from unittest.mock import patch

import msgspec

from penstock.archive import begin, skip
from penstock.archive.archiver import Archiver
from penstock.archive.cut import ClosedBy, ends
from penstock.archive.ledger import Gap, Ledger, Link, Record
from penstock.blobs import BlobStore
from penstock.clock import Clock
from penstock.errors import BlobNotFound, StoreUnavailable
from penstock.events import Frame
from penstock.hub import Hub
from penstock.processor.lease import Holding, Start


class Broken(enum.Enum):
    """The step that is missing. The first three are the store's client's, the eighth is the clock's that a host is given."""

    EXISTS_IS_MINE = "AlreadyExists is taken for one's own write (L3)"
    UNKNOWN_IS_DONE = "an unknown result of a create is trusted (L3)"
    OVERWRITES = "a ledger record is overwritten (L2)"
    CUT_BY_CLOCK = "a file ends by the host's clock (L7)"
    FRESH_ETAG = "the lease is read again before the checkpoint (L5)"
    NO_GAP = "an archive that begins late begins where the log does, and no record says so (L1)"
    UNCONFIRMED = "the next record is begun before the file is confirmed (L4)"
    WALL_CLOCK = "leases expire by the wall clock"
    UNSAID = "an order to skip moves the lease, and no record says what is left out (L1)"
    UNHEARD = "an order to skip does not hear that what comes there was decided otherwise (L2)"


@contextlib.contextmanager
def breaking(broken: Broken | None) -> Iterator[None]:
    """The program without this step, as far as the step is in the program."""
    with contextlib.ExitStack() as undo:
        if broken is Broken.CUT_BY_CLOCK:
            undo.enter_context(patch.object(Archiver, "_ends", _ends_by_clock))
        if broken is Broken.FRESH_ETAG:
            undo.enter_context(patch.object(Holding, "checkpoint", _checkpoint_by_fresh_etag(Holding.checkpoint)))
        if broken is Broken.NO_GAP:
            undo.enter_context(patch.object(begin, "start", _start_by_listing))
            undo.enter_context(patch.object(Archiver, "_begin", _begin_with_the_log))
        if broken is Broken.UNCONFIRMED:
            undo.enter_context(patch.object(Archiver, "_put", _put_unconfirmed))
        if broken in (Broken.UNSAID, Broken.UNHEARD):
            undo.enter_context(patch.object(skip, "Ledger", _Unsaid if broken is Broken.UNSAID else _Unheard))
        yield


def _ends_by_clock(self: Archiver, frame: Frame) -> ClosedBy | None:
    if self._file is None or self._decided is not None:
        return None
    now = msgspec.structs.replace(frame, enqueued_at_ms=self._clock.now_ms())
    return ends(self._file, now, period_s=self._hub.period_s, file_bytes_max=self._file_bytes_max)


def _start_by_listing(store: BlobStore, hub: Hub, partition: int, *, host: str, clock: Clock) -> Start:
    ledger = Ledger(store, hub.id, partition)
    listed = ledger.listed()
    last = ledger.tail(listed[-1] if listed else 0)
    first = hub.bounds(partition).first
    return Start(last.offset_next, last.next, last.epoch + 1) if last else Start(str(first), first)


def _begin_with_the_log(self: Archiver, first: int) -> None:
    before = self._ledger.before(first)
    self._last = before if isinstance(before, Record) else None
    self._next = first


def _checkpoint_by_fresh_etag(checkpoint):  # type: ignore[no-untyped-def]
    def careless(self: Holding, offset: str, sequence_number: int) -> None:
        with contextlib.suppress(BlobNotFound):
            self._etag = self._store.get(self._name).etag
        checkpoint(self, offset, sequence_number)

    return careless


def _put_unconfirmed(self: Archiver, record: Record, work: BinaryIO) -> None:
    work.seek(0)
    with contextlib.suppress(StoreUnavailable):
        self._store.put(record.file, work)


class _Unsaid(Ledger):
    def create(self, record: Link) -> Link:
        return record

    def lose(self, gap: Gap) -> None: ...


class _Unheard(Ledger):
    def create(self, record: Link) -> Link:
        super().create(record)
        return record
