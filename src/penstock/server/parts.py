"""DATA/run: which processes run on a data folder, and where they listen. Written by their supervisor, read by all."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec

from penstock.files import Files


class PartState(msgspec.Struct, frozen=True):
    """A process. `since` is RFC 3339, when it was started; `restarts` how often its predecessors died."""

    name: str
    pid: int
    since: str
    restarts: int = 0


class Retention(msgspec.Struct, frozen=True):
    """What API workers delete: events older than `after_s`, and where `waits` only what the archiver has done."""

    after_s: float
    waits: bool


class Run(msgspec.Struct, frozen=True):
    """What one supervisor (or one `penstock host`) runs. Addresses are `host:port`, empty when it has none.

    `certificate` is the file that `listen` shows, by its whole path; empty without TLS. `retention` is that of its API workers; None when
    it has none.
    """

    pid: int
    listen: str
    admin: str
    parts: Sequence[PartState]
    retention: Retention | None = None
    certificate: str = ""


def write_run(folder: Path, files: Files, run: Run) -> None:
    """`folder` must be there."""
    files.replace(_path(folder, run.pid), msgspec.json.encode(run))


def remove_run(folder: Path, files: Files, pid: int) -> None:
    files.remove(_path(folder, pid))


def remove_dead(folder: Path, files: Files) -> None:
    """Forget runs whose process was killed, before another process gets its number."""
    for path in folder.glob("parts-[0-9]*.json"):
        number = path.stem.removeprefix("parts-")
        if not (number.isdigit() and lives(int(number))):
            files.remove(path)


def _path(folder: Path, pid: int) -> Path:
    return folder / f"parts-{pid}.json"


def read_runs(folder: Path) -> list[Run]:
    """The runs whose process lives, and of their parts those that live. A file that cannot be read is none."""
    runs = []
    for path in sorted(folder.glob("parts-[0-9]*.json")):
        try:
            run = msgspec.json.decode(path.read_bytes(), type=Run)
        except (OSError, msgspec.DecodeError):
            continue
        if lives(run.pid):
            runs.append(msgspec.structs.replace(run, parts=[part for part in run.parts if lives(part.pid)]))
    return runs


def lives(pid: int) -> bool:
    """Whether a process of this number runs; a zombie does not."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes()
    except OSError:
        return False
    return stat.rpartition(b")")[2].split()[0] not in (b"Z", b"X")
