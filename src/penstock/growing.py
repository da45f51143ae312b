"""A file that only grows until it is read, and goes to the disk past the system's cache.

An hour file is written once, from its begin to its end, and read by nobody before. In the cache it would cost a page for each 4 KiB, keep
what readers of the hub need out of it, and wait there for a long sync at its end. Linux writes whole blocks from aligned memory without
the cache (O_DIRECT, open(2)); what is left of a block at the end goes through it. So does everything where the file system cannot do that.
"""

from __future__ import annotations

import contextlib
import errno
import io
import mmap
import os
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from typing_extensions import Buffer

BLOCK_BYTES = 1 << 19
"""Each write is a call to the disk that a virtual machine leaves for, and lets other threads in: a quarter of this costs twice the CPU."""

WriteAt = Callable[[int, memoryview, int], int]
"""As os.pwrite: descriptor, bytes, where; how many were written."""


class GrowingFile(io.FileIO):
    """Owns `fd`, an empty file. Writes go to its end wherever it stands; `seek` and `flush` end the time of whole blocks."""

    def __init__(self, fd: int, write_at: WriteAt) -> None:
        self._direct = -1
        self._filled = self._size = 0
        self._block = mmap.mmap(-1, BLOCK_BYTES)  # whole pages, as O_DIRECT wants them
        self._write_at = write_at
        super().__init__(fd, "r+b")
        with contextlib.suppress(OSError, AttributeError):
            self._direct = os.open(f"/proc/self/fd/{fd}", os.O_WRONLY | os.O_DIRECT | os.O_CLOEXEC)

    def write(self, body: Buffer) -> int:
        """All of it, or OSError; then what the file holds is not known, and it is good for `close` only."""
        left = memoryview(body).cast("B")
        while left:
            part = left[: BLOCK_BYTES - self._filled]
            self._block[self._filled : self._filled + len(part)] = part
            self._filled += len(part)
            if self._filled == BLOCK_BYTES:
                self._write_block()
            left = left[len(part) :]
        return memoryview(body).nbytes

    def writelines(self, lines: Iterable[Buffer]) -> None:
        self.write(b"".join(lines))

    def flush(self) -> None:
        super().flush()
        if self._filled:
            self._leave_direct()
            self._write_block()

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        self.flush()
        return super().seek(offset, whence)

    def close(self) -> None:
        """What was not flushed is not written: nobody can see it any more."""
        self._filled = 0
        self._leave_direct()
        super().close()

    def _write_block(self) -> None:
        with memoryview(self._block) as block:
            done = 0
            while done < self._filled:
                fd = self._direct if self._direct >= 0 else self.fileno()
                try:
                    done += self._write_at(fd, block[done : self._filled], self._size + done)
                except OSError as error:
                    if error.errno != errno.EINVAL or self._direct < 0:
                        raise
                    self._leave_direct()  # blocks or memory that this file system wants are others
        self._size += done
        self._filled = 0

    def _leave_direct(self) -> None:
        if self._direct >= 0:
            os.close(self._direct)
            self._direct = -1
