"""Where an hour file ends, and which gzip members it is made of: pure functions of the log (guarantees.md, L4 and L7).

A file holds events of one partition and one period. It ends, exclusive, at the first of

- *time*: a frame or marker that was enqueued in a later period. Enqueued times never decrease in a partition, so nothing
  of the file's own period can come behind it. A consumer's clock decides nothing;
- *cut*: a cut marker (`penstock flush`);
- *size*: a frame with which the file would hold more than `file_bytes_max` uncompressed bytes. Frames never split, so a
  file of one frame may be larger.

A file is opened by its first frame of events, so it is never empty, and markers before it change nothing. That matters,
because a marker keeps its sequence number when it is read again: reading it twice must be the same as reading it once.

The bytes of a file: the body of a gzip frame as it is; consecutive plain frames joined while they stay within
`RUN_BYTES_MAX` bytes of NDJSON, each such run as one gzip member. A run ends at a gzip frame and at the end of the file;
markers do not end it, since whether a reader saw one may depend on when it read. How the log was sliced for reading
does not matter either: `OpenFile` carries the unfinished run from one slice to the next.
"""

from __future__ import annotations

import re
from datetime import UTC, datetime
from typing import Final, Literal

import msgspec

from penstock.errors import ArchiveError, FrameDamaged
from penstock.events import Frame, FrameKind
from penstock.wire.frame import crc32, member
from penstock.wire.members import crc32_combined

RUN_BYTES_MAX: Final = 65_536
"""Part of the format: another value would make other bytes of the same record."""

ClosedBy = Literal["time", "cut", "size"]

_HOUR: Final = re.compile(r"(\d{4}-\d\d-\d\dT\d\d)(?:-(\d\d)-(\d\d))?")
_TRAILER_BYTES: Final = 8


class OpenFile(msgspec.Struct, frozen=True, gc=False):
    """A file that is being collected: events `[first, next)` so far. `run` is the unfinished run of plain frames."""

    first: int
    next: int
    hour_ms: int
    part: int
    events: int
    raw_bytes: int
    crc32: int
    run: tuple[bytes, ...] = ()
    run_bytes: int = 0


def period_start_ms(at_ms: int, period_s: int) -> int:
    """Start of the period that holds `at_ms`; periods are counted from 1970 in UTC."""
    return at_ms - at_ms % (period_s * 1000)


def hour_name(start_ms: int, period_s: int) -> str:
    """`2026-11-22T14` for periods of whole hours, else `2026-11-22T14-05-00`: no colons, sorts by time."""
    start = datetime.fromtimestamp(start_ms // 1000, UTC)
    return f"{start:%Y-%m-%dT%H}" if period_s % 3600 == 0 else f"{start:%Y-%m-%dT%H-%M-%S}"


def hour_start_ms(hour: str) -> int:
    """The inverse of `hour_name`. Raises ArchiveError."""
    match = _HOUR.fullmatch(hour)
    if match is None:
        raise ArchiveError(f"{hour!r} is not the name of an hour", hour=hour)
    try:
        start = datetime.fromisoformat(match[1]).replace(
            minute=int(match[2] or 0), second=int(match[3] or 0), tzinfo=UTC
        )
    except ValueError as error:
        raise ArchiveError(f"{hour!r} is not the name of an hour", hour=hour) from error
    return int(start.timestamp()) * 1000


def file_name(partition: int, hour: str, part: int) -> str:
    """`0/2026-11-22T14.json.gz`, and for further parts `0/2026-11-22T14_001.json.gz`, which sorts after it."""
    return f"{partition}/{hour}{f'_{part:03d}' if part else ''}.json.gz"


def place(enqueued_at_ms: int, period_s: int, previous: tuple[int, int] | None) -> tuple[int, int]:
    """Start of the hour and part of a file whose first frame was enqueued then. `previous`: those of the file before.

    The hour never goes back: what comes late goes to the hour that is open, as its next part.
    """
    hour_ms = period_start_ms(enqueued_at_ms, period_s)
    if previous is None or hour_ms > previous[0]:
        return hour_ms, 0
    return previous[0], previous[1] + 1


def opened(first: int, hour_ms: int, part: int) -> OpenFile:
    """A file without its first frame, which `extend` brings."""
    return OpenFile(first, first, hour_ms, part, 0, 0, 0)


def ends(file: OpenFile, frame: Frame, *, period_s: int, file_bytes_max: int) -> ClosedBy | None:
    """Why the file ends before this frame or marker; None if it goes on. `file` holds at least one event."""
    if period_start_ms(frame.enqueued_at_ms, period_s) > file.hour_ms:
        return "time"
    if frame.kind is FrameKind.CUT_MARKER:
        return "cut"
    if file.raw_bytes + frame.raw_bytes > file_bytes_max:
        return "size"
    return None


def extend(file: OpenFile, frame: Frame) -> tuple[OpenFile, list[bytes]]:
    """The file with a frame of events more, and the gzip members that are now finished. Raises FrameDamaged."""
    members: list[bytes] = []
    run, run_bytes = file.run, file.run_bytes
    _check(frame)
    if frame.kind is FrameKind.GZIP:
        members = [*_finished(run), frame.body]
        run, run_bytes = (), 0
    else:
        if run_bytes + frame.raw_bytes > RUN_BYTES_MAX:
            members = _finished(run)
            run, run_bytes = (), 0
        run, run_bytes = (*run, frame.body), run_bytes + frame.raw_bytes
    longer = OpenFile(
        first=file.first,
        next=frame.next,
        hour_ms=file.hour_ms,
        part=file.part,
        events=file.events + frame.count,
        raw_bytes=file.raw_bytes + frame.raw_bytes,
        crc32=crc32_combined(file.crc32, frame.content_crc, frame.raw_bytes),
        run=run,
        run_bytes=run_bytes,
    )
    return longer, members


def finish(file: OpenFile) -> list[bytes]:
    """The last gzip member of a file that ends here, if a run is open."""
    return _finished(file.run)


def _finished(run: tuple[bytes, ...]) -> list[bytes]:
    return [member(b"".join(run))] if run else []


def _check(frame: Frame) -> None:
    """That the body is the content which the header names. A gzip body is copied, never unzipped: its trailer says it."""
    if frame.kind is FrameKind.GZIP:
        stated = frame.content_crc.to_bytes(4, "little") + (frame.raw_bytes & 0xFFFFFFFF).to_bytes(4, "little")
        good = frame.body[-_TRAILER_BYTES:] == stated
    else:
        good = len(frame.body) == frame.raw_bytes and crc32(frame.body) == frame.content_crc
    if not good or frame.count < 1:
        raise FrameDamaged(
            f"the frame at {frame.partition}/{frame.first} does not hold what its header says",
            partition=frame.partition,
            first=frame.first,
        )
