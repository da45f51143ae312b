from __future__ import annotations

import gzip
import zlib
from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.archive import cut
from penstock.errors import ArchiveError, FrameDamaged
from penstock.events import Frame, FrameKind
from penstock.wire.frame import PLAIN_BYTES_MAX, member

AT_MS = int(datetime(2026, 11, 22, 14, 5, 7, tzinfo=UTC).timestamp()) * 1000 + 123


def frame(first: int, ndjson: bytes, at_ms: int = AT_MS, *, zipped: bool | None = None) -> Frame:
    zipped = len(ndjson) >= PLAIN_BYTES_MAX if zipped is None else zipped
    kind = FrameKind.GZIP if zipped else FrameKind.PLAIN
    body = member(ndjson) if zipped else ndjson
    return Frame(kind, 0, first, ndjson.count(b"\n"), at_ms, len(ndjson), zlib.crc32(ndjson), body)


def marker(first: int, kind: FrameKind, at_ms: int = AT_MS) -> Frame:
    return Frame(kind, 0, first, 0, at_ms, 0, 0, b"")


def collect(frames: list[Frame]) -> tuple[cut.OpenFile, list[bytes]]:
    file = cut.opened(frames[0].first, 0, 0)
    members: list[bytes] = []
    for each in frames:
        file, finished = cut.extend(file, each)
        members += finished
    return file, members + cut.finish(file)


@pytest.mark.parametrize(
    ("period_s", "name"),
    [
        (1, "2026-11-22T14-05-07"),
        (10, "2026-11-22T14-05-00"),
        (300, "2026-11-22T14-05-00"),
        (3600, "2026-11-22T14"),
        (7200, "2026-11-22T14"),
        (86400, "2026-11-22T00"),
    ],
)
def test_hours_are_named_by_their_start(period_s: int, name: str) -> None:
    start_ms = cut.period_start_ms(AT_MS, period_s)
    assert cut.hour_name(start_ms, period_s) == name
    assert cut.hour_start_ms(name) == start_ms


@given(at_ms=st.integers(0, 4_000_000_000_000), period_s=st.integers(1, 86400))
def test_a_period_holds_its_time_and_names_are_unique(at_ms: int, period_s: int) -> None:
    start_ms = cut.period_start_ms(at_ms, period_s)
    assert start_ms <= at_ms < start_ms + period_s * 1000
    assert cut.hour_start_ms(cut.hour_name(start_ms, period_s)) == start_ms


@pytest.mark.parametrize("name", ["", "2026-11-22", "2026-11-22T14:05", "2026-13-22T14", "2026-11-22T14-61-00", "x"])
def test_what_is_no_hour_is_refused(name: str) -> None:
    with pytest.raises(ArchiveError):
        cut.hour_start_ms(name)


def test_parts_sort_after_the_first_file() -> None:
    names = [cut.file_name(0, "2026-11-22T14", part) for part in range(3)]
    assert names == ["0/2026-11-22T14.json.gz", "0/2026-11-22T14_001.json.gz", "0/2026-11-22T14_002.json.gz"]
    assert sorted(names) == names


def test_the_hour_never_goes_back_and_parts_count_within_it() -> None:
    hour_ms = 3_600_000
    assert cut.place(hour_ms + 5, 3600, None) == (hour_ms, 0)
    assert cut.place(hour_ms + 5, 3600, (hour_ms, 0)) == (hour_ms, 1)
    assert cut.place(hour_ms + 5, 3600, (0, 7)) == (hour_ms, 0)
    assert cut.place(5, 3600, (hour_ms, 2)) == (hour_ms, 3)


@pytest.mark.parametrize(
    ("then", "closed_by"),
    [
        (frame(1, b"{}\n"), None),
        (frame(1, b"{}\n", AT_MS + 10_000), "time"),
        (marker(1, FrameKind.TIME_MARKER), None),
        (marker(1, FrameKind.TIME_MARKER, AT_MS + 10_000), "time"),
        (marker(1, FrameKind.CUT_MARKER), "cut"),
        (marker(1, FrameKind.CUT_MARKER, AT_MS + 10_000), "time"),
        (frame(1, b"x" * 98 + b"\n"), None),
        (frame(1, b"x" * 99 + b"\n"), "size"),
    ],
)
def test_where_a_file_ends(then: Frame, closed_by: str | None) -> None:
    file, _ = collect([frame(0, b"\n")])
    file = cut.OpenFile(0, 1, cut.period_start_ms(AT_MS, 10), 0, 1, file.raw_bytes, file.crc32)
    assert cut.ends(file, then, period_s=10, file_bytes_max=100) == closed_by


def test_plain_frames_are_joined_and_gzip_frames_are_copied() -> None:
    big = frame(2, b"y" * 5000 + b"\n")
    file, members = collect([frame(0, b"a\n"), frame(1, b"b\n"), big, frame(3, b"c\n")])
    assert members == [member(b"a\nb\n"), big.body, member(b"c\n")]
    assert (file.first, file.next, file.events, file.raw_bytes) == (0, 4, 4, 5007)
    assert file.crc32 == zlib.crc32(gzip.decompress(b"".join(members)))


def test_a_run_is_full_at_65536_bytes() -> None:
    half = b"x" * 4095 + b"\n"
    frames = [frame(at, half, zipped=False) for at in range(17)]
    _, members = collect(frames)
    assert [len(gzip.decompress(each)) for each in members] == [65536, 4096]


@given(lines=st.lists(st.integers(0, 9000), min_size=1, max_size=60))
def test_a_file_is_the_log_and_its_numbers_are_right(lines: list[int]) -> None:
    frames = [frame(at, b"x" * size + b"\n") for at, size in enumerate(lines)]
    file, members = collect(frames)
    whole = b"".join(b"x" * size + b"\n" for size in lines)
    assert gzip.decompress(b"".join(members)) == whole
    assert (file.raw_bytes, file.crc32, file.events) == (len(whole), zlib.crc32(whole), len(lines))
    assert all(gzip.decompress(each).endswith(b"\n") for each in members)


@pytest.mark.parametrize("zipped", [False, True])
def test_a_frame_that_is_not_what_its_header_says_stops(zipped: bool) -> None:
    good = frame(0, b'{"a":1}\n', zipped=zipped)
    changes: list[dict[str, object]] = [{"content_crc": 1}, {"raw_bytes": 7}, {"body": good.body[:-1]}, {"count": 0}]
    for change in changes:
        fields = {name: getattr(good, name) for name in Frame.__struct_fields__} | change
        with pytest.raises(FrameDamaged):
            cut.extend(cut.opened(0, 0, 0), Frame(**fields))
