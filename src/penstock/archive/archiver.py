"""The archiver: the processor that turns a partition's log into hour files, each event in exactly one (guarantees.md, L1 to L8).

For each file, in this order, and after a crash at any step again from the last checkpoint:

1. read the ledger's record at the file's first event. If it exists, the file's end is decided: *adopt*, that is collect
   exactly `[first, next)`. Otherwise collect until the log says that the file ends (cut.py);
2. create the record. If another was faster and decided otherwise, stop and begin again at the checkpoint, where step 1 adopts
   what stands. What was collected is thrown away, never trimmed: the file is built from the record and the log only;
3. put the file, and see that it is there. Its name and bytes follow from the record and the log, so putting it twice, late,
   or from two hosts at once changes nothing;
4. return the checkpoint. The pump writes it to the lease, and only if the lease is still its own. Its sequence number is where the
   ledger goes on; its offset, where the hub's markers have some, may be further.

The next record comes after step 3 (L4). A crash after step 2 or 3 leaves a record at or behind the checkpoint, which the next
archiver adopts. There is no step that asks whether this host holds the lease: the ledger decides without.

Hour and part of a file follow from its first frame and the file before it (`place`). That one is known from before, and on start
found in the ledger alone: its record is the one whose `next` is the file's `first`, or lies before the gap that ends there. So
every host gives the file the same name. If no record ends at the checkpoint, which is not 0, then it does not stand where the
ledger ends anything, and somebody has removed or replaced data: the partition stops (faults.md, 38).

Where the hub keeps no producers (a Kafka topic), what the log has twice is left out on the way (filter.py). What a file holds is then a
function of the record and the whole log before it, and of each frame that what is new of it.
"""

from __future__ import annotations

import contextlib
import io
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

import msgspec

from penstock.archive.begin import passed_ms
from penstock.archive.cut import (
    ClosedBy,
    OpenFile,
    ends,
    extend,
    file_name,
    finish,
    hour_name,
    hour_start_ms,
    opened,
    place,
)
from penstock.archive.filter import Filter
from penstock.archive.ledger import Gap, Ledger, Record
from penstock.blobs import BlobStore
from penstock.clock import Clock, timestamp
from penstock.errors import ArchiveError, BlobNotFound, StoreUnavailable
from penstock.events import Frame, Slice
from penstock.files import Files
from penstock.hub import Hub
from penstock.processor import Checkpoint, CloseReason, ProcessorFactory
from penstock.processor.pump import Log


def archivers(
    hub: Hub,
    store: BlobStore,
    *,
    host: str,
    epoch: Callable[[int], int],
    clock: Clock,
    files: Files,
    folder: Path,
    file_bytes_max: int,
    log: Log,
    checkpoint: Callable[[int], int] | None = None,
) -> ProcessorFactory:
    """A factory of archivers for a processor host. `epoch` tells the lease's epoch of a partition, for the record.

    `checkpoint` tells its sequence number, which in a hub with `place_bits` does not follow from the offset.
    """

    def make(partition: int) -> Archiver:
        return Archiver(
            hub,
            store,
            partition,
            host=host,
            epoch=lambda: epoch(partition),
            clock=clock,
            files=files,
            folder=folder,
            file_bytes_max=file_bytes_max,
            log=log,
            checkpoint=None if checkpoint is None else lambda: checkpoint(partition),
        )

    return make


class Archiver:
    """A `Processor`. Raises ArchiveError and FrameDamaged when the partition must stop, StoreUnavailable to begin again."""

    def __init__(
        self,
        hub: Hub,
        store: BlobStore,
        partition: int,
        *,
        host: str,
        epoch: Callable[[], int],
        clock: Clock,
        files: Files,
        folder: Path,
        file_bytes_max: int,
        log: Log,
        checkpoint: Callable[[], int] | None = None,
    ) -> None:
        self._hub = hub
        self._checkpoint = checkpoint
        self._store = store
        self._partition = partition
        self._host = host
        self._epoch = epoch
        self._clock = clock
        self._files = files
        self._folder = folder
        self._file_bytes_max = file_bytes_max
        self._log = log
        self._ledger = Ledger(store, hub.id, partition)
        self._filter = Filter(hub, store, partition, log) if hub.place_bits else None
        self._next: int | None = None
        self._floor_ms = 0
        self._last: Record | None = None
        self._decided: Record | None = None
        self._file: OpenFile | None = None
        self._work: BinaryIO | None = None

    def process(self, events: Slice) -> str | Checkpoint | None:
        checkpoint: str | Checkpoint | None = None
        for frame in events.frames:
            if self._next is None:
                self._begin(frame.first if self._checkpoint is None else self._checkpoint(), events.offset)
            elif frame.first < self._next or (frame.first > self._next and not self._hub.place_bits):
                raise ArchiveError(
                    f"the log of partition {self._partition} goes on at {frame.first} instead of {self._next}",
                    partition=self._partition,
                )
            frame = self._clamped(frame)
            closed_by = self._ends(frame)
            if closed_by is not None:
                checkpoint = self._close(closed_by)
            new = frame if self._filter is None or frame.is_marker else self._filter.passed(frame)
            if new is not None and not new.is_marker:
                self._take(new)
                if self._decided is not None and self._decided.next == self._next:
                    checkpoint = self._close(self._decided.closed_by)
        if self._hub.place_bits and self._next is not None and self._file is None:
            # No file is open, so whatever was read is done: also markers and what was left out, which the ledger knows nothing of.
            return Checkpoint(events.next_offset, self._next)
        return checkpoint

    def close(self, reason: CloseReason) -> None:
        self._drop()

    def _clamped(self, frame: Frame) -> Frame:
        """Times never decrease in a partition, but where brokers give them a reader must see to that (hub/kafka.py)."""
        if frame.enqueued_at_ms >= self._floor_ms:
            self._floor_ms = frame.enqueued_at_ms
            return frame
        return msgspec.structs.replace(frame, enqueued_at_ms=self._floor_ms)

    def _begin(self, first: int, offset: str) -> None:
        """Where the checkpoint stands: files end where frames end, so in a dense log the first one that is read says it."""
        before = self._ledger.before(first)
        if before is None and first != 0:
            raise ArchiveError(
                f"the checkpoint of partition {self._partition} is {first}, but nothing in the ledger ends there",
                partition=self._partition,
            )
        while isinstance(before, Gap):
            before = self._ledger.before(before.first)
        if before is not None:
            self._confirm_last(before)
        if self._filter is not None:
            self._filter.begin(first)
        self._last = before
        self._next = first
        # No frame or marker before a file's end is of a later period than the file, or it would have ended earlier.
        self._floor_ms = hour_start_ms(before.hour) if before is not None else 0
        if self._hub.place_bits and int(offset) << self._hub.place_bits > first:
            self._floor_ms = passed_ms(self._hub, self._partition, int(offset), self._floor_ms)

    def _confirm_last(self, last: Record) -> None:
        try:
            self._store.size(last.file)
        except BlobNotFound as error:
            if self._ledger.lost(last.first) is not None:
                return
            raise ArchiveError(
                f"{last.file} is behind the checkpoint of partition {self._partition} and not in the store",
                partition=self._partition,
                file=last.file,
            ) from error

    def _ends(self, frame: Frame) -> ClosedBy | None:
        if self._file is None or self._decided is not None:
            return None
        return ends(self._file, frame, period_s=self._hub.period_s, file_bytes_max=self._file_bytes_max)

    def _take(self, frame: Frame) -> None:
        file = self._file or self._open(frame)
        if self._decided is not None and frame.next > self._decided.next:
            raise ArchiveError(
                f"{self._decided.file} ends at {self._decided.next}, inside of the frame {frame.first} to {frame.next}",
                partition=self._partition,
                file=self._decided.file,
            )
        self._file, members = extend(file, frame)
        self._write(members)
        self._next = frame.next

    def _open(self, frame: Frame) -> OpenFile:
        """Step 1. Before the first byte is collected it is known whether this file is decided."""
        previous = None if self._last is None else (hour_start_ms(self._last.hour), self._last.part)
        hour_ms, part = place(frame.enqueued_at_ms, self._hub.period_s, previous)
        assert self._next is not None, "_begin sets it"
        decided = self._ledger.read(self._next)
        if isinstance(decided, Gap):
            raise self._passed_over(decided)
        self._decided = decided
        if self._decided is not None and self._decided.next > self._hub.bounds(self._partition).next:
            raise ArchiveError(
                f"{self._decided.file} ends at {self._decided.next}, beyond the end of the log",
                partition=self._partition,
                file=self._decided.file,
            )
        with _translated(self._folder):
            self._work = self._files.work_file(self._folder)
        return opened(self._next, hour_ms, part)

    def _write(self, members: list[bytes]) -> None:
        assert self._work is not None, "a file is opened before it is written"
        try:
            self._work.writelines(members)
        except OSError as error:
            raise _no_work_file(self._folder, error) from error

    def _close(self, closed_by: ClosedBy) -> str:
        """Steps 2 to 4 for the open file; its checkpoint."""
        assert self._file is not None and self._work is not None, "only an open file is closed"
        mine = self._record(self._file, closed_by)
        record = self._decided or self._ledger.create(mine)
        if isinstance(record, Gap):
            raise self._passed_over(record)
        if self._decided is None and record.next != mine.next:
            # Another host read a log with other limits, and was faster. Its record stands.
            raise StoreUnavailable(
                f"{record.file} was decided by {record.host} to end at {record.next}, not at {mine.next}: begin again",
                partition=self._partition,
            )
        if _content(record) != _content(mine):
            raise ArchiveError(
                f"the ledger's record of {record.file} is not what the log holds from {mine.first} to {mine.next}",
                partition=self._partition,
                file=record.file,
            )
        self._write(finish(self._file))
        self._put(record, self._work)
        if self._filter is not None:
            self._filter.save(record.next, self._file.hour_ms)
        self._log.info(
            "hour file is in the store",
            partition=self._partition,
            file=record.file,
            first=record.first,
            next=record.next,
            closed_by=record.closed_by,
            adopted=record is not mine,
        )
        self._drop()
        self._last = record
        return record.offset_next

    def _passed_over(self, gap: Gap) -> StoreUnavailable:
        """Of events that this host has read, another found that they were gone. Its record stands, and the lease is not here."""
        return StoreUnavailable(
            f"events {gap.first} to {gap.next} of partition {self._partition} are in no file ({gap.reason}): begin again",
            partition=self._partition,
        )

    def _record(self, file: OpenFile, closed_by: ClosedBy) -> Record:
        hour = hour_name(file.hour_ms, self._hub.period_s)
        return Record(
            hub=self._hub.id,
            partition=self._partition,
            file=file_name(self._partition, hour, file.part),
            hour=hour,
            part=file.part,
            first=file.first,
            next=file.next,
            offset_next=str(file.next >> self._hub.place_bits),  # a file ends where a record does
            events=file.events,
            raw_bytes=file.raw_bytes,
            crc32=file.crc32,
            closed_by=closed_by,
            host=self._host,
            epoch=self._epoch(),
            id=uuid.uuid4().hex,
            at=timestamp(self._clock.now_ms()),
        )

    def _put(self, record: Record, work: BinaryIO) -> None:
        """Step 3. The record is created; until the file is seen in the store nothing may follow it (L4)."""
        with _translated(self._folder):
            size = work.seek(0, io.SEEK_END)
            work.seek(0)
        self._store.put(record.file, work)
        try:
            stored = self._store.size(record.file)
        except BlobNotFound:
            stored = 0
        if stored != size:
            raise StoreUnavailable(f"{record.file} has {stored} bytes in the store instead of {size}", file=record.file)

    def _drop(self) -> None:
        if self._work is not None:
            with contextlib.suppress(OSError):  # bytes that a full disk did not take; the file is rebuilt from the log
                self._work.close()
        self._work = self._file = self._decided = None


def _content(record: Record) -> tuple[object, ...]:
    """What two hosts must agree on when they agree where the file ends."""
    return record.file, record.first, record.next, record.offset_next, record.events, record.raw_bytes, record.crc32


@contextlib.contextmanager
def _translated(folder: Path) -> Iterator[None]:
    """The work file is as replaceable as the store's answer is: begin again when there is room."""
    try:
        yield
    except OSError as error:
        raise _no_work_file(folder, error) from error


def _no_work_file(folder: Path, error: OSError) -> StoreUnavailable:
    return StoreUnavailable(f"no work file can be written in {folder}: {error}")
