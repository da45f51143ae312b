"""Files of a machine whose power is cut: at the n-th system call everything that was not synced is gone."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from penstock.files import Files


class PowerCut(BaseException):
    """Nothing catches it, as nothing catches a power cut."""


class PowerFiles(Files):
    """The cut comes before the n-th call takes effect (from 1; 0: never). `lose` then undoes what no sync has made durable.

    A kill is the same without `lose`: what was handed to the system stays.
    """

    def __init__(self, cut_at: int = 0) -> None:
        self.calls = 0
        self._cut_at = cut_at
        self._synced: dict[Path, int] = {}
        self._undo: dict[Path, list[tuple[str, Callable[[], object]]]] = {}

    def lose(self, *, renames: bool = True) -> None:
        """Without `renames` those are on the disk by chance, though no sync was waited for: the disk keeps its own order."""
        for path, size in self._synced.items():
            if path.exists():
                os.truncate(path, size)
        for undone in self._undo.values():
            for what, undo in reversed(undone):
                if renames or what != "rename":
                    undo()

    def _call(self) -> None:
        self.calls += 1
        if self.calls == self._cut_at:
            raise PowerCut

    def _open_new(self, path: Path, mode: int = 0o666) -> int:
        self._call()
        fd = super()._open_new(path, mode)
        self._synced[path] = 0
        self._later("open", path.parent, lambda: path.unlink(missing_ok=True))
        return fd

    def _write(self, fd: int, body: memoryview) -> int:
        self._call()
        return super()._write(fd, body)

    def _fsync(self, fd: int) -> None:
        self._call()
        super()._fsync(fd)
        path = Path(f"/proc/self/fd/{fd}").readlink()
        if path.is_dir():
            self._undo.pop(path, None)
        else:
            self._synced[path] = os.fstat(fd).st_size

    def _rename(self, source: Path, target: Path) -> None:
        self._call()
        before = target.read_bytes() if target.exists() else None
        super()._rename(source, target)
        self._synced[target] = self._synced.pop(source, target.stat().st_size)
        self._later("rename", target.parent, lambda: self._back(source, target, before))

    def _unlink(self, path: Path) -> None:
        self._call()
        before = path.read_bytes()
        super()._unlink(path)
        size = self._synced.pop(path, len(before))
        self._later("unlink", path.parent, lambda: self._put_back(path, before[:size]))

    def _later(self, what: str, folder: Path, undo: Callable[[], object]) -> None:
        self._undo.setdefault(folder, []).append((what, undo))

    def _back(self, source: Path, target: Path, before: bytes | None) -> None:
        super()._rename(target, source)
        if before is not None:
            self._put_back(target, before)

    def _put_back(self, path: Path, body: bytes) -> None:
        path.write_bytes(body)
        self._synced.pop(path, None)
