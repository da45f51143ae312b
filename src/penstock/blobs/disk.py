"""The blob store on a folder of this machine.

`create` is a hard link, which fails when the name is taken. `replace` is read, compare and rename under a lock file of the
blob's own (a process that is paused while it has it holds up nobody else's blob), which `delete` takes too, so that no blob
comes back from the dead. The etag is the sha256 of the
content: that alone would take a blob that changed and changed back for unchanged, but every body that is replaced carries
an `id` that was never used before, so no two writes have the same content.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from penstock.blobs import Blob, Created, Exists, Listed
from penstock.errors import BlobNotFound, LostRace, StoreError, StoreUnavailable
from penstock.files import PART_BYTES, Files

# A leading dot is for work files and locks, and for `..`.
_PART = re.compile(r"[A-Za-z0-9_$-][A-Za-z0-9._$-]*")


def check_name(name: str) -> str:
    """The name, or StoreError if it is none: only `[A-Za-z0-9._$-]`, parts joined by `/`, none beginning with a dot."""
    if not all(_PART.fullmatch(part) for part in name.split("/")):
        raise StoreError(f"not a blob name: {name!r}", blob=name)
    return name


PROBED = "_probe"


class DiskBlobs:
    """A BlobStore on `folder`, which is made by the first write."""

    def __init__(self, folder: Path, files: Files) -> None:
        self._folder = folder
        self._files = files
        self._made: set[Path] = set()

    def create(self, name: str, body: bytes, *, id: str) -> Created | Exists:
        path = self._writable(name)
        unknown: OSError | None = None
        with _translated(name):
            try:
                if self._files.create(path, body):
                    return Created(_etag(body))
            except OSError as error:
                unknown = error
                self._made.clear()
        # "Exists" may be said of one's own link too: over NFS a repeated request finds what the first one made.
        try:
            there = self.get(name)
        except BlobNotFound:
            raise _unavailable(name, unknown) from unknown
        if id.encode() not in there.body:
            return Exists(there)
        self._sync(path)
        return Created(there.etag)

    def replace(self, name: str, body: bytes, *, etag: str, id: str) -> str:
        path = self._writable(name)
        with _translated(name):
            try:
                replaced = self._files.replace_if(
                    path, body, lock=_lock_of(path), still=lambda: self.get(name).etag == etag
                )
            except OSError as error:
                # Renamed or not? If it was, and another has replaced it since, that one decides: our etag is worth nothing either way.
                if id.encode() not in self.get(name).body:
                    raise _unavailable(name, error) from error
                self._sync(path)
                replaced = True
        if not replaced:
            raise LostRace(f"{name} was changed by another", blob=name)
        return _etag(body)

    def put(self, name: str, body: BinaryIO) -> None:
        path = self._writable(name)
        try:
            self._files.put(path, body)
        except OSError as error:
            self._made.clear()
            raise _unavailable(name, error) from error

    def get(self, name: str) -> Blob:
        with _translated(name), self._path(name).open("rb") as file:
            body, mark = file.read(), _mark(os.fstat(file.fileno()))
        return Blob(body, _etag(body), mark)

    def size(self, name: str) -> int:
        with _translated(name):
            return self._path(name).stat().st_size

    def stream(self, name: str) -> Iterator[bytes]:
        with _translated(name), self._path(name).open("rb") as file:
            while part := file.read(PART_BYTES):
                yield part

    def list(self, prefix: str) -> Iterator[Listed]:
        base = prefix[: prefix.rfind("/") + 1]
        folder = self._path(base[:-1]) if base else self._folder
        for name in self._walk(folder, base):
            if name.startswith(prefix):
                with contextlib.suppress(BlobNotFound), _translated(name):  # it may have gone since
                    found = self._path(name).stat()
                    yield Listed(name, found.st_size, _mark(found))

    def delete(self, name: str) -> None:
        path = self._path(name)
        with contextlib.suppress(BlobNotFound), _translated(name), self._files.lock(_lock_of(path)):
            self._files.remove(path)

    def _walk(self, folder: Path, base: str) -> Iterator[str]:
        """Names below `folder` in the order of the whole names, in which a folder sorts by its name and `/`."""
        try:
            with _translated(base), os.scandir(folder) as entries:
                names = sorted(f"{e.name}/" if e.is_dir() else e.name for e in entries if not e.name.startswith("."))
        except BlobNotFound:
            return
        for name in names:
            if name.endswith("/"):
                yield from self._walk(folder / name, base + name)
            else:
                yield base + name

    def _path(self, name: str) -> Path:
        return self._folder / check_name(name)

    def _writable(self, name: str) -> Path:
        """The path, with its folder made durable and swept once for each instance (again after a failed write: it may be gone)."""
        path = self._path(name)
        with _translated(name):
            for folder in reversed(path.parents):
                inside = folder == self._folder or self._folder in folder.parents
                if inside and folder not in self._made:
                    self._files.make_folders(folder)
                    self._files.sweep(folder)
                    self._made.add(folder)
        return path

    def _sync(self, path: Path) -> None:
        with _translated(path.name):
            self._files.sync_folder(path.parent)


def _lock_of(path: Path) -> Path:
    # The self-test takes new names each time, and lock files stay: one for all of them.
    name = "self-test" if path.parent.name == PROBED else path.name
    return path.with_name(f".{name}.lock")


def _etag(body: bytes) -> str:
    return hashlib.sha256(body).hexdigest()


def _mark(found: os.stat_result) -> str:
    """A write is a new file (create, rename), so it has another number or a later time."""
    return f"{found.st_ino}-{found.st_mtime_ns}"


def _unavailable(name: str, error: OSError | None) -> StoreUnavailable:
    return StoreUnavailable(f"{name}: {(error and error.strerror) or error or 'gone while it was written'}", blob=name)


@contextlib.contextmanager
def _translated(name: str) -> Iterator[None]:
    try:
        yield
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
        raise BlobNotFound(f"there is no blob {name}", blob=name) from error
    except OSError as error:
        raise _unavailable(name, error) from error
