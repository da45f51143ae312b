"""Write transactions of the embedded hub: one at a time, watched, and none after one that failed on the way to the disk."""

from __future__ import annotations

import contextlib
import errno
import os
import struct
import threading
from collections.abc import Iterator
from pathlib import Path

import lmdb

from penstock.clock import Clock
from penstock.errors import HubBroken, HubUnavailable, StorageFull

DISK_ENDS_BYTES = 1 << 20


class Writer:
    """Of one process. `held`, 8 bytes shared with the supervisor, holds the monotonic millisecond since which it has the lock, else 0."""

    def __init__(self, env: lmdb.Environment, folder: Path, clock: Clock, held: memoryview | None) -> None:
        self._env = env
        self._folder = folder
        self._clock = clock
        self._held = held
        self._broken = False
        self._one = threading.Lock()

    @contextlib.contextmanager
    def transaction(self) -> Iterator[lmdb.Transaction]:
        """Committed and durable at the end; nothing of it if anything raises. Foreign errors become ours here."""
        if self._broken:
            raise HubBroken("A write to the hub failed before; its processes are being started again.")
        # Among the threads of this process, so that `held` is set and cleared by one at a time.
        with self._one:
            try:
                with self._env.begin(write=True) as txn:
                    self._note_held(int(self._clock.monotonic() * 1000))
                    yield txn
            except lmdb.Error as error:
                raise self._translate(error) from error
            finally:
                self._note_held(0)

    def _note_held(self, since_ms: int) -> None:
        if self._held is not None:
            struct.pack_into("<q", self._held, 0, since_ms)

    def _translate(self, error: lmdb.Error) -> Exception:
        # A full map or disk aborts the transaction and harms nothing. After any other failed write or sync nobody knows what the disk
        # holds of the pages in memory: only a fresh start reads it from the disk.
        if isinstance(error, lmdb.MapFullError | lmdb.DiskError) or self._is_disk_end(error):
            return StorageFull(f"The hub's disk is full ({error}). Nothing of this batch was stored: send it again.")
        if isinstance(error, lmdb.ReadonlyError):
            return HubUnavailable("The hub is open for reading only in this process.")
        self._broken = True
        return HubBroken(
            f"A write to the hub in {self._folder} failed: {error}. What was not answered must be sent again."
        )

    def _is_disk_end(self, error: lmdb.Error) -> bool:
        """Whether this was the write that filled the disk: a short one, which LMDB calls EIO. It harms as little as ENOSPC."""
        disk = os.statvfs(self._folder)
        return os.strerror(errno.EIO) in str(error) and disk.f_bavail * disk.f_frsize < DISK_ENDS_BYTES
