"""What stands in the files of a spool, as bytes and values (docs/formats.md, The spool)."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from penstock.errors import SpoolDamaged

_FORMAT = "penstock-batch/1"
_CRC_CHARS = 8
RAW_BYTES_MAX = 8 << 20
"""NDJSON in one batch; the API takes 16 MiB."""

Event = Mapping[str, Any] | msgspec.Struct | bytes | str
"""What a program hands in; as text it is one JSON object."""


def line_of(event: Event) -> bytes:
    """An event as one line of JSON. Raises ValueError for a text that is no line, TypeError for what cannot be JSON."""
    if isinstance(event, str):
        event = event.encode()
    if isinstance(event, bytes):
        line = event.strip(b" \t\r\n")
        if not line or b"\n" in line:
            raise ValueError("an event given as text is one JSON object in one line; this has none or several")
        return line
    return msgspec.json.encode(event)


class State(msgspec.Struct, frozen=True):
    """`state.json`. `batch`, the stem of the batch that has the number `sequence`; `after`, the last number that was stored.

    `taken`: of each source that is being read into the spool, the last line that is in a batch up to this one.
    """

    producer: str
    epoch: int = 1
    sequence: int = 0
    after: int = 0
    batch: str = ""
    taken: dict[str, int] = {}


class Header(msgspec.Struct, frozen=True, omit_defaults=True):
    """The first line of a batch file. `bytes` and `sha256` are of the gzip bytes behind it; `raw_bytes` of the NDJSON.

    Where the events are lines of a source (feed.py), `source` names it and `numbers` are theirs, from 1.
    """

    format: str
    events: int
    raw_bytes: int
    bytes: int
    sha256: str
    sealed_at_ms: int
    device_field: str
    taken: dict[str, int] = {}
    source: str = ""
    numbers: tuple[int, ...] = ()


class Batch(msgspec.Struct, frozen=True):
    """A sealed batch as it is posted. `size` is the whole file's."""

    stem: str
    path: Path
    size: int
    header: Header
    body: bytes

    def lines(self) -> list[bytes]:
        """The events, without line feeds."""
        return zlib.decompress(self.body, 31).split(b"\n")[:-1]

    def place(self, index: int) -> str:
        """`file:line` of an event, if it was read from a file."""
        header = self.header
        return f"{file_of(header.source)}:{header.numbers[index]}" if header.source else ""


class Dead(msgspec.Struct, frozen=True, omit_defaults=True):
    """A line of a file in `dead/`: an event that the API will never take, as text, or in base64 where it is no UTF-8.

    `place` is `file:line`, if the event was read from a file.
    """

    code: str
    detail: str
    event: str = ""
    event_base64: bytes = b""
    place: str = ""

    @classmethod
    def of(cls, event: bytes, code: str, detail: str, place: str = "") -> Dead:
        try:
            return cls(code, detail, event.decode(), place=place)
        except UnicodeDecodeError:
            return cls(code, detail, event_base64=event, place=place)


def source_of(file: str, version: str) -> str:
    """The name of a source: a file as it is now. Another `version` is another content, or another way to read it."""
    return f"{file}#{version}"


def file_of(source: str) -> str:
    """The file of a source."""
    return source.rpartition("#")[0]


def open_lines(lines: Sequence[bytes]) -> bytes:
    """Events as they lie in an open file."""
    return b"".join([b"%08x %b\n" % (zlib.crc32(line), line) for line in lines])


def read_open(text: bytes) -> tuple[list[bytes], list[bytes]]:
    """The events of an open file, and what of it is damaged. A last line without its line feed was never taken whole: it is neither."""
    lines: list[bytes] = []
    damaged: list[bytes] = []
    for line in text.split(b"\n")[:-1]:
        event = line[_CRC_CHARS + 1 :]
        if line[: _CRC_CHARS + 1] == b"%08x " % zlib.crc32(event) and event:
            lines.append(event)
        else:
            damaged.append(line)
    return lines, damaged


def read_batch(stem: str, path: Path, text: bytes) -> Batch:
    """A batch file. Raises SpoolDamaged unless its body is the one whose sha256 stands in its header."""
    header = read_header(text)
    body = text[text.index(b"\n") + 1 :]
    if len(body) != header.bytes or hashlib.sha256(body).hexdigest() != header.sha256:
        raise SpoolDamaged(f"{path} is damaged: its body is not the one that was sealed.")
    return Batch(stem, path, len(text), header, body)


def read_header(text: bytes) -> Header:
    """The first line of a batch file. Raises SpoolDamaged."""
    try:
        header = msgspec.json.decode(text[: text.index(b"\n")], type=Header)
        if header.format != _FORMAT:
            raise ValueError(f"unknown format {header.format}")
    except (ValueError, msgspec.MsgspecError, RecursionError) as error:
        raise SpoolDamaged(f"The header of a batch file is damaged: {error}.") from error
    return header


def gzipped(raw: bytes) -> bytes:
    """One gzip member."""
    return zlib.compress(raw, 1, 31)


Zip = Callable[[bytes], bytes]
"""To one gzip member. Where more than the standard library is installed, there are faster ones than `gzipped`."""


class Contents(msgspec.Struct, frozen=True):
    """What goes into a batch file; `source` and `numbers` where the lines are of a source."""

    lines: Sequence[bytes]
    taken: Mapping[str, int] = {}
    source: str = ""
    numbers: Sequence[int] = ()
    zipped: Zip = gzipped

    def halves(self) -> tuple[Contents, Contents]:
        middle = len(self.lines) // 2
        return (
            Contents(self.lines[:middle], self.taken, self.source, self.numbers[:middle]),
            Contents(self.lines[middle:], self.taken, self.source, self.numbers[middle:]),
        )


def batch_text(given: Contents, *, sealed_at_ms: int, device_field: str) -> bytes:
    """A batch file."""
    raw = b"\n".join(given.lines) + b"\n"
    body = given.zipped(raw)
    header = Header(
        format=_FORMAT,
        events=len(given.lines),
        raw_bytes=len(raw),
        bytes=len(body),
        sha256=hashlib.sha256(body).hexdigest(),
        sealed_at_ms=sealed_at_ms,
        device_field=device_field,
        taken=dict(given.taken),
        source=given.source,
        numbers=tuple(given.numbers),
    )
    return msgspec.json.encode(header) + b"\n" + body
