"""Looking at one partition's records through a cursor, and giving back the memory that looking took."""

from __future__ import annotations

import contextlib
import ctypes
import os
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import lmdb

from penstock.errors import FrameDamaged, HubBroken, HubError, OffsetTrimmed
from penstock.events import Frame
from penstock.hub.layout import EVENTS, KEY, MARKER
from penstock.wire import frame

if TYPE_CHECKING:
    from typing_extensions import Buffer

_TIME = struct.Struct("<q")
_TIME_AT = 24
_COUNT = struct.Struct("<I")
_COUNT_AT = 32
_MADV_DONTNEED = 4


@contextlib.contextmanager
def reading(env: lmdb.Environment, *, views: bool = False) -> Iterator[lmdb.Transaction]:
    """A read transaction, in which foreign errors become ours. With `views`, what it gives is the map itself, and ends with it."""
    try:
        with env.begin(buffers=views) as txn:
            yield txn
    except lmdb.MapResizedError as error:
        raise HubBroken(
            "The hub has grown beyond the limit that this process opened it with: start it again."
        ) from error
    except lmdb.Error as error:
        raise HubError(f"The hub cannot be read: {error}.") from error


def enqueued_at_ms(cursor: lmdb.Cursor) -> int:
    """The time in the header of the frame under the cursor."""
    at: int = _TIME.unpack_from(cursor.value(), _TIME_AT)[0]
    return at


def extent(cursor: lmdb.Cursor) -> tuple[int, int, int]:
    """First and next sequence number and kind (MARKER, EVENTS) of the record under the cursor."""
    number, kind = KEY.unpack(cursor.key())
    return number, number + (_COUNT.unpack_from(cursor.value(), _COUNT_AT)[0] if kind == EVENTS else 0), kind


def is_open(cursor: lmdb.Cursor) -> bool:
    """Whether a file may be open in this partition: its last record is events."""
    return bool(cursor.last() and KEY.unpack(cursor.key())[1] == EVENTS)


def records(
    cursor: lmdb.Cursor, start: int, end: int, partition: int, bytes_max: int
) -> Iterator[tuple[Buffer, bytes | memoryview]]:
    """Keys and frames from the one that holds `start` on, at least one if there is any. Raises OffsetTrimmed."""
    found = cursor.set_range(KEY.pack(start, MARKER))
    if start < end and (not found or extent(cursor)[0] > start):
        # `start` lies inside the frame before, if that is still there.
        found = cursor.prev() if found else cursor.last()
        if not found:
            first = extent(cursor)[0] if cursor.first() else end
            raise OffsetTrimmed(
                f"Offset {start} of partition {partition} was trimmed; the log begins at {first}.", first=str(first)
            )
    size = 0
    while found:
        key, value = cursor.item()
        if size and size + len(value) > bytes_max:
            return
        yield key, value
        # A marker alone does not end a read: the offset behind it is the same, and the reader would not get on.
        size += len(value) if KEY.unpack(key)[1] == EVENTS else 0
        found = cursor.next()


def decode_all(found: Iterable[tuple[Buffer, bytes | memoryview]], partition: int, start: int) -> list[Frame]:
    """The frames of `records`, each the continuation of the one before: never less than there was.

    Ends before a damaged one, and raises FrameDamaged when that is the first that is new to a reader at `start`.
    """
    frames: list[Frame] = []
    reached = start
    for key, value in found:
        number = KEY.unpack(key)[0]
        try:
            read = frame.decode(value, where=f"{partition}/{number}")
            goes_on = number == reached if frames else number == start or number < start < read.next
            if not goes_on or (read.partition, read.first) != (partition, number):
                raise FrameDamaged(
                    f"The log of partition {partition} does not go on at {reached}: the next frame is {read.partition}/{read.first}.",
                    where=f"{partition}/{reached}",
                )
        except FrameDamaged:
            if reached == start:
                raise
            break
        frames.append(read)
        reached = max(start, read.next)
    return frames


def locate(cursor: lmdb.Cursor, end: int, at_ms: int) -> int:
    """Where the first record at or after a time begins; `end` if there is none. Times never decrease, so one look halves it."""
    low, high = 0, end
    while low < high:
        middle = (low + high) // 2
        if not cursor.set_range(KEY.pack(middle, MARKER)):
            high = middle
            continue
        number = extent(cursor)[0]
        # Of a marker and events at one number, the events are the later: they say whether anything there is late enough.
        if not cursor.set_key(KEY.pack(number, EVENTS)):
            cursor.set_key(KEY.pack(number, MARKER))
        if enqueued_at_ms(cursor) >= at_ms:
            high = middle
        else:
            low = number + 1
    return min(end, extent(cursor)[0]) if low < end and cursor.set_range(KEY.pack(low, MARKER)) else end


class Resident:
    """Keeps what of a mapped file is in this process's memory small, so that it does not grow with the log.

    Pages that were touched stay mapped, each with its neighbours. Unmapping loses nothing: a later touch maps them again, from the
    system's cache. Nothing happens where /proc is missing; resident memory is then higher, and no less correct. Thread-safe.
    """

    def __init__(self, data_file: Path, *, bytes_max: int) -> None:
        self._ranges = list(_mapped(data_file.resolve()))
        self._madvise = ctypes.CDLL(None).madvise
        self._statm = os.open("/proc/self/statm", os.O_RDONLY | os.O_CLOEXEC) if self._ranges else -1
        self._pages_max = self._pages() + bytes_max // os.sysconf("SC_PAGE_SIZE")

    def bound(self) -> None:
        """Call after each transaction. It measures, for how much a touch maps only the system knows."""
        if self._pages() > self._pages_max:
            for start, length in self._ranges:
                self._madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), _MADV_DONTNEED)

    def close(self) -> None:
        if self._statm >= 0:
            os.close(self._statm)
            self._statm = -1

    def _pages(self) -> int:
        """Resident pages of files, of all that are mapped (proc_pid_statm(5): `shared`)."""
        return int(os.pread(self._statm, 256, 0).split()[2]) if self._statm >= 0 else 0


def _mapped(file: Path) -> Iterator[tuple[int, int]]:
    """Where a file is mapped in this process: address and length."""
    maps = Path("/proc/self/maps")
    for line in maps.read_text().splitlines() if maps.exists() else ():
        if line.endswith(str(file)):
            begin, _, end = line.split(" ", 1)[0].partition("-")
            yield int(begin, 16), int(end, 16) - int(begin, 16)
