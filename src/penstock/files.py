"""The only place that syncs, links, renames and locks files.

A visible name always has whole, synced content behind it: bytes are written to a work file (`.` and random letters, in the
same folder), synced, and only then linked or renamed to their name; at last the folder is synced, because the name itself
lies there. A failure before the link or rename leaves the name as it was; a failure after it (the sync of the folder)
leaves the new content under the name, whole but perhaps not durable, and raises: the outcome must be read back.

Work files of a killed process stay behind until `sweep` finds that nobody holds them any more.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import io
import os
import re
import secrets
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, cast

from penstock.growing import BLOCK_BYTES, GrowingFile

PART_BYTES = 1 << 20
_LOCK_TRIES, _LOCK_PAUSE_S = 100, 0.005
_WORK = re.compile(r"\.[0-9a-f]{16}")


class Held:
    """A lock that lasts until `release`, or until the process ends however it ends."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def release(self) -> None:
        """Let go; no error if it was."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


class Appending:
    """A file that grows. `write` is for one thread; `sync` and `close` may come from others."""

    def __init__(self, files: Files, path: Path, fd: int) -> None:
        self._files = files
        self._folder = path.parent
        self._fd = fd
        self._lock = threading.Lock()
        self._written = self._synced = 0
        self._named = False

    def write(self, body: bytes) -> None:
        """Survives the death of the process when it returns. What follows a write that failed does not stand behind its half."""
        end = os.lseek(self._fd, 0, os.SEEK_CUR)
        try:
            self._files._write_all(self._fd, body)
        except OSError:
            # A disk that cannot even shorten the file keeps the half until the next write goes over it.
            os.lseek(self._fd, end, os.SEEK_SET)
            with contextlib.suppress(OSError):
                os.ftruncate(self._fd, end)
            raise
        self._written += len(body)

    def sync(self) -> None:
        """All that was written before is durable when it returns, the file's name too."""
        with self._lock:
            if self._fd < 0 or (self._named and self._synced == self._written):
                return
            written, fd = self._written, os.dup(self._fd)
        try:
            self._files._fsync(fd)
        finally:
            os.close(fd)
        if not self._named:
            self._files.sync_folder(self._folder)
            self._named = True
        self._synced = written

    def abandon(self) -> None:
        """`close` in a child after a fork: a thread that is not there may have had the lock."""
        self._lock = threading.Lock()
        self.close()

    def close(self) -> None:
        """No error if it was."""
        with self._lock:
            if self._fd >= 0:
                os.close(self._fd)
                self._fd = -1


class Files:
    """Durable acts on files. Thread-safe. Every method raises OSError as the system gives it.

    The methods with an underscore are single system calls; tests make them fail one by one.
    """

    def make_folders(self, path: Path) -> None:
        """Make `path` and the folders above it that are missing. Their names are durable when it returns."""
        missing = [path]
        while not missing[-1].parent.exists():
            missing.append(missing[-1].parent)
        for folder in reversed(missing):
            with contextlib.suppress(FileExistsError):
                self._mkdir(folder)
            # Also when another process made it: that one may be killed before its sync.
            self.sync_folder(folder.parent)

    def create(self, path: Path, body: bytes) -> bool:
        """Create-only: False if there is a file of this name, which is then durable."""
        with self._written(path.parent, io.BytesIO(body)) as work:
            try:
                self._link(work, path)
                created = True
            except FileExistsError:
                created = False
            finally:
                self._forget(work)
        self.sync_folder(path.parent)
        return created

    def replace(self, path: Path, body: bytes, *, mode: int = 0o666) -> None:
        """The file has `body` when it returns; before that it has the old content or the new, never a mixture.

        `mode`, less the umask: of the file from its first moment on, for what is not for everybody's eyes.
        """
        self.put(path, io.BytesIO(body), mode=mode)

    def put(self, path: Path, source: BinaryIO, *, mode: int = 0o666) -> None:
        """`replace` from a stream, from where it stands to its end.

        A `work_file` of the same file system is not copied: it gets the name, and must not be written again.
        """
        with self._named(path.parent, source) or self._written(path.parent, source, mode) as work:
            try:
                self._rename(work, path)
            except BaseException:
                self._forget(work)
                raise
        self.sync_folder(path.parent)

    def replace_if(self, path: Path, body: bytes, *, lock: Path, still: Callable[[], bool]) -> bool:
        """`replace` if `still()` is true under the lock; False if not.

        What waits for the disk is done outside of the lock: a process that is stopped inside of it keeps all others out.
        """
        with self._written(path.parent, io.BytesIO(body)) as work:
            replaced = False
            try:
                with self.lock(lock):
                    if still():
                        self._rename(work, path)
                        replaced = True
            finally:
                if not replaced:
                    self._forget(work)
        if replaced:
            self.sync_folder(path.parent)
        return replaced

    def move(self, source: Path, target: Path) -> None:
        """The file is under the other name when it returns, in one act: at no time under both or neither. One file system only."""
        self._rename(source, target)
        self.sync_folder(target.parent)
        self.sync_folder(source.parent)

    def append(self, path: Path) -> Appending:
        """A new file that grows; its name is durable after the first `sync`. Raises FileExistsError."""
        return Appending(self, path, self._open_new(path))

    def read(self, path: Path) -> bytes:
        """The whole file."""
        return path.read_bytes()

    def remove(self, path: Path) -> None:
        """Durably absent afterwards; no error if it was."""
        self.discard(path)
        with contextlib.suppress(FileNotFoundError):
            self.sync_folder(path.parent)

    def discard(self, path: Path) -> None:
        """Absent for now; a power cut may bring it back. No error if it was."""
        with contextlib.suppress(FileNotFoundError):
            self._unlink(path)

    @contextlib.contextmanager
    def lock(self, path: Path) -> Iterator[None]:
        """Exclusive among threads and processes for as long as the block runs. Raises TimeoutError when another keeps it too long.

        The lock file stays: deleting it would let two in, each with a file of its own.
        """
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            self._await_lock(fd)
            yield
        finally:
            os.close(fd)

    def hold(self, path: Path) -> Held | None:
        """Take the lock for good, or None if another process has it; the file then names that one's pid.

        Children that were forked without exec hold it too; those that were exec'ed do not.
        """
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            self._flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.ftruncate(fd, 0)
            self._write_all(fd, f"{os.getpid()}\n".encode())
        except BlockingIOError:
            os.close(fd)
            return None
        except BaseException:
            os.close(fd)
            raise
        return Held(fd)

    def share(self, path: Path, size: int) -> int:
        """A descriptor of a file of at least `size` bytes, zeros where it is new, for processes to map. Its room on the disk is taken now:
        a write to memory that the disk has no room for would end the process."""
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            os.posix_fallocate(fd, 0, size)
        except BaseException:
            os.close(fd)
            raise
        return fd

    def try_lock(self, fd: int) -> bool:
        """The lock of an open file, which a fork shares; the kernel releases it with its holder. False if another has it."""
        try:
            self._flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def unlock(self, fd: int) -> None:
        self._flock(fd, fcntl.LOCK_UN)

    def free_bytes(self, folder: Path) -> int:
        """What may still be written to the disk of a folder."""
        found = os.statvfs(folder)
        return found.f_bavail * found.f_frsize

    def work_file(self, folder: Path) -> BinaryIO:
        """A file without a name in `folder`: gone when it is closed, or with the process, unless `put` gives it one."""
        try:
            fd = os.open(folder, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o666)
        except (AttributeError, OSError):  # not every system and file system can
            import tempfile

            return cast(BinaryIO, tempfile.TemporaryFile(buffering=BLOCK_BYTES, prefix=".", dir=folder))
        return cast(BinaryIO, GrowingFile(fd, self._write_at))

    def sweep(self, folder: Path) -> None:
        """Delete the work files in `folder` whose writers have died: a writer holds a lock on its file while it writes."""
        for path in folder.iterdir():
            if not _WORK.fullmatch(path.name):
                continue
            with contextlib.suppress(FileNotFoundError, BlockingIOError):
                fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
                try:
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    path.unlink()
                finally:
                    os.close(fd)

    def sync_folder(self, folder: Path) -> None:
        """The names in `folder` are durable when it returns."""
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            self._fsync(fd)
        finally:
            os.close(fd)

    @contextlib.contextmanager
    def _written(self, folder: Path, source: BinaryIO, mode: int = 0o666) -> Iterator[Path]:
        """A synced work file, locked until the block ends so that no `sweep` takes it for a dead one's."""
        work, fd = self._locked_work(folder, mode)
        try:
            try:
                while part := source.read(PART_BYTES):
                    self._write_all(fd, part)
                self._fsync(fd)
            except BaseException:
                self._forget(work)
                raise
            yield work
        finally:
            os.close(fd)

    def _named(self, folder: Path, source: BinaryIO) -> contextlib.AbstractContextManager[Path] | None:
        """The same as `_written` without copying, or None where that cannot be: `source` is no nameless file, or of another system."""
        try:
            fd, nothing_read = source.fileno(), source.tell() == 0
        except (OSError, ValueError, AttributeError):
            return None
        if os.fstat(fd).st_nlink or not nothing_read:
            return None
        source.flush()
        self._fsync(fd)
        fcntl.flock(fd, fcntl.LOCK_EX)
        work = folder / f".{secrets.token_hex(8)}"
        try:
            self._link_open(fd, work)
        except OSError:
            return None
        return contextlib.nullcontext(work)

    def _locked_work(self, folder: Path, mode: int) -> tuple[Path, int]:
        while True:
            work = folder / f".{secrets.token_hex(8)}"
            fd = self._open_new(work, mode)
            fcntl.flock(fd, fcntl.LOCK_EX)
            if os.fstat(fd).st_nlink:
                return work, fd
            os.close(fd)  # swept between being made and being locked

    def _await_lock(self, fd: int) -> None:
        pause = threading.Event()
        for _ in range(_LOCK_TRIES):
            with contextlib.suppress(BlockingIOError):
                self._flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            pause.wait(_LOCK_PAUSE_S)
        raise TimeoutError(errno.ETIMEDOUT, "another process keeps the lock")

    def _write_all(self, fd: int, body: bytes) -> None:
        left = memoryview(body)
        while left:
            left = left[self._write(fd, left) :]

    def _forget(self, work: Path) -> None:
        with contextlib.suppress(OSError):
            self._unlink(work)

    def _mkdir(self, folder: Path) -> None:
        folder.mkdir()

    def _open_new(self, path: Path, mode: int = 0o666) -> int:
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)

    def _write(self, fd: int, body: memoryview) -> int:
        return os.write(fd, body)

    def _write_at(self, fd: int, body: memoryview, at: int) -> int:
        return os.pwrite(fd, body, at)

    def _fsync(self, fd: int) -> None:
        os.fsync(fd)

    def _link(self, source: Path, target: Path) -> None:
        os.link(source, target)

    def _link_open(self, fd: int, target: Path) -> None:
        # Named through a folder's descriptor, since only then Python follows the link that the file of a descriptor is (linkat(2)).
        folder = os.open("/proc/self/fd", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.link(str(fd), target, src_dir_fd=folder, follow_symlinks=True)
        finally:
            os.close(folder)

    def _rename(self, source: Path, target: Path) -> None:
        source.replace(target)

    def _unlink(self, path: Path) -> None:
        path.unlink()

    def _flock(self, fd: int, operation: int) -> None:
        fcntl.flock(fd, operation)
