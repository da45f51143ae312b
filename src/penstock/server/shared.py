"""Memory that the processes of an installation share through a file, and the lock over it. Not durable."""

from __future__ import annotations

import mmap
import os
import threading
from pathlib import Path

from penstock.files import Files

_PAUSES_S = (0.0001,) * 50 + (0.001,) * 45
WAIT_S = sum(_PAUSES_S)


class Shared:
    """To be opened after a fork: the lock belongs to the open file. Raises OSError."""

    def __init__(self, files: Files, path: Path, size: int) -> None:
        self._files = files
        self._threads = threading.Lock()
        self._never = threading.Event()
        self._fd = files.share(path, size)
        try:
            self.memory = memoryview(mmap.mmap(self._fd, size))
        except BaseException:
            os.close(self._fd)
            raise

    def acquire(self) -> bool:
        """Exclusive among threads and processes until `release`, or until the process ends however it ends.

        False when another keeps it for `WAIT_S`: one that was stopped inside must not stop all others.
        """
        if not self._threads.acquire(timeout=WAIT_S):
            return False
        try:
            got = self._files.try_lock(self._fd) or any(self._later(pause_s) for pause_s in _PAUSES_S)
        except BaseException:
            self._threads.release()
            raise
        if not got:
            self._threads.release()
        return got

    def release(self) -> None:
        self._files.unlock(self._fd)
        self._threads.release()

    def close(self) -> None:
        """The memory stays for those who look at it."""
        os.close(self._fd)

    def _later(self, pause_s: float) -> bool:
        self._never.wait(pause_s)
        return self._files.try_lock(self._fd)
