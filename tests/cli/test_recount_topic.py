"""Each event once of a log in which batches may be twice, told by what they hold: attempts that were cut off, and cut otherwise."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import pytest

from penstock.cli.recount_topic import Once
from penstock.events import FrameKind, Source
from penstock.wire.frame import crc32, pack, pack_sources

BEGINS = b'{"deviceId":"sim-run-'
STAMPS = (b',"at":1}', b',"at":2}')  # an attempt's own
A = [BEGINS + b'1","n":%d' % n for n in range(6)]
B = [BEGINS + b'2","n":%d' % n for n in range(3)]
OTHERS = [b'{"deviceId":"d-1","n":%d' % n for n in range(2)]


def of(
    sequence: int, lines: Sequence[bytes], *, producer: str = "p", bytes_of: str = ""
) -> tuple[Source, Sequence[bytes]]:
    sha256 = hashlib.sha256((bytes_of or str(sequence)).encode()).digest()
    return Source(producer, 1, sequence, len(lines), sha256), lines


def record(*sources: tuple[Source, Sequence[bytes]], attempt: int = 0) -> bytes:
    ndjson = b"".join(line + STAMPS[attempt] + b"\n" for _, lines in sources for line in lines)
    crc = crc32(ndjson)
    packed = pack_sources(source for source, _ in sources)
    count = sum(len(lines) for _, lines in sources)
    return pack(FrameKind.PLAIN, 0, 0, count, 0, len(ndjson), crc, crc, packed, len(sources), ndjson)


MARKER = pack(FrameKind.TIME_MARKER, 0, 0, 0, 0, 0, 0, 0, b"", 0, b"")


@pytest.mark.parametrize(
    ("records", "new", "copies"),
    [
        ([record(of(1, A)), MARKER, record(of(2, B))], [*A, *B], 0),
        ([record(of(1, A)), record(of(1, A), attempt=1)], A, 6),
        ([record(of(1, A[:2])), record(of(1, A), attempt=1)], A, 2),
        ([record(of(1, A[:3])), record(of(1, A[:4]), attempt=1), record(of(1, A[4:]), attempt=1)], A, 3),
        ([record(of(1, A)), record(of(2, B)), record(of(1, A[:2]), attempt=1), record(of(1, A[2:]), attempt=1)], [*A, *B], 6),
        ([record(of(7, OTHERS, producer="q"), of(1, A[:1])), record(of(1, A), attempt=1)], A, 1),
        ([record(of(1, A)), record(of(1, [*A, A[0]], bytes_of="others"))], A, 0),
        ([record(of(2, B)), record(of(1, A))], B, 0),
        ([record(of(1, A)), record(of(1, A, producer="thief"))], [*A, *A], 0),
        ([record(of(1, [A[1], A[0]]))], [A[1], A[0]], 0),
    ],
    ids=["batches", "a copy", "cut off", "cut otherwise", "a late copy", "others between", "other bytes", "too old", "another's", "order"],
)  # fmt: skip
def test_what_is_new(records: list[bytes], new: list[bytes], copies: int) -> None:
    """In whatever pieces it is read."""
    for pieces in (records, [b"".join(records)]):
        once = Once(BEGINS, len(STAMPS[0]))
        assert [event for piece in pieces for event in once.passed(piece)] == new
        assert once.copies == copies
