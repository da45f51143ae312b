"""The frame's format: round trip, every flipped bit, every length, other versions, and frames that were written long ago."""

from __future__ import annotations

import gzip
import json
import struct
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.errors import FrameDamaged
from penstock.events import DEVICE_FIELD, Frame, FrameKind, Slice, Source
from penstock.wire import frame as frame_module
from penstock.wire.frame import (
    FRAME_BYTES_MAX,
    content,
    crc32,
    decode,
    encode,
    events,
    fields_of,
    member,
    member_crc,
    pack_sources,
    sources_of,
    split,
)

GOLDEN = Path(__file__).parent.parent / "data" / "frames"

sources = st.builds(
    Source,
    producer=st.text(max_size=60).filter(lambda text: len(text.encode("utf-8", "replace")) < 256),
    epoch=st.integers(0, 2**32 - 1),
    sequence=st.integers(0, 2**63 - 1),
    count=st.integers(1, 5),
    sha256=st.sampled_from([b"", bytes(32), bytes(range(32))]),
    properties=st.sampled_from([b"", b'{"site":"A"}', b'{"p":"' + b"x" * 60_000 + b'"}']),
    device_field=st.sampled_from([DEVICE_FIELD, "address", "a" * 64]),
)


def packed(*given: Source) -> tuple[int, bytes]:
    return len(given), pack_sources(given)


def frame_of(
    given_sources: list[Source], *, zipped: bool, partition: int = 3, first: int = 7, at_ms: int = 1_795_356_000_123
) -> Frame:
    lines = [
        json.dumps({source.device_field: f"d-{n}", "x": "y" * (n * 40)}).encode()
        for source in given_sources
        for n in range(source.count)
    ]
    ndjson = b"".join(line + b"\n" for line in lines)
    body = member(ndjson) if zipped else ndjson
    kind = FrameKind.GZIP if zipped else FrameKind.PLAIN
    return Frame(kind, partition, first, len(lines), at_ms, len(ndjson), crc32(ndjson), body, *packed(*given_sources))


@settings(max_examples=300, deadline=None)
@given(
    st.lists(sources, min_size=1, max_size=4),
    st.booleans(),
    st.integers(0, 65_535),
    st.integers(0, 2**63),
    st.integers(-(2**62), 2**62),
)
def test_round_trip(given_sources: list[Source], zipped: bool, partition: int, first: int, at_ms: int) -> None:
    frame = frame_of(given_sources, zipped=zipped, partition=partition, first=first, at_ms=at_ms)
    encoded = encode(frame)
    assert decode(encoded) == frame
    ndjson = content(frame)
    assert (len(ndjson), zlib.crc32(ndjson)) == (frame.raw_bytes, frame.content_crc)


@pytest.mark.parametrize("kind", [FrameKind.TIME_MARKER, FrameKind.CUT_MARKER])
def test_a_marker(kind: FrameKind) -> None:
    marker = Frame(kind, 1, 20, 0, 5, 0, 0, b"")
    assert decode(encode(marker)) == marker
    assert len(encode(marker)) == 52
    assert marker.is_marker
    assert content(marker) == b""
    assert list(events(Slice(1, "20", [marker], "20", "20"))) == []


SOURCE = Source("p-1", 1, 2, 2, bytes(range(32)), b'{"site":"A"}', "address")
FRAMES = {
    "plain": frame_of([Source("p-1", 1, 2, 2), SOURCE], zipped=False),
    "gzip": frame_of([SOURCE], zipped=True),
    "marker": Frame(FrameKind.CUT_MARKER, 1, 20, 0, 5, 0, 0, b""),
}


@pytest.mark.parametrize("name", FRAMES)
def test_every_flipped_bit_is_found(name: str) -> None:
    whole = encode(FRAMES[name])
    for at in range(len(whole)):
        for bit in range(8):
            broken = bytearray(whole)
            broken[at] ^= 1 << bit
            with pytest.raises(FrameDamaged):
                decode(bytes(broken))


@pytest.mark.parametrize("name", FRAMES)
def test_every_other_length_is_found(name: str) -> None:
    whole = encode(FRAMES[name])
    for length in range(len(whole)):
        with pytest.raises(FrameDamaged):
            decode(whole[:length])
    for extra in (b"\0", b"x", whole):
        with pytest.raises(FrameDamaged):
            decode(whole + extra)


def test_without_its_checksums_flipped_bits_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative control of the two tests above."""
    whole = encode(FRAMES["plain"])
    monkeypatch.setattr(frame_module, "crc32", lambda data, start=0: 0)
    unchecked = bytearray(encode(FRAMES["plain"]))
    assert len(unchecked) == len(whole)
    unchecked[-5] ^= 1
    assert decode(bytes(unchecked)) != FRAMES["plain"]


def resealed(whole: bytes, change: Callable[[bytearray], None]) -> bytes:
    """The frame with its header changed, and the header's CRC made right again."""
    changed = bytearray(whole)
    change(changed)
    header_bytes = struct.unpack_from("<I", whole, 4)[0]
    struct.pack_into("<I", changed, 8, zlib.crc32(bytes(changed[:8] + changed[12:header_bytes])))
    return bytes(changed)


def test_a_newer_version_is_refused_and_named() -> None:
    def newer(data: bytearray) -> None:
        data[2] = 2

    with pytest.raises(FrameDamaged, match="version 2, this program knows 1"):
        decode(resealed(encode(FRAMES["plain"]), newer), where="3/7")


@pytest.mark.parametrize("kind", range(4, 256, 50))
def test_an_unknown_kind_is_refused(kind: int) -> None:
    def other(data: bytearray) -> None:
        data[3] = kind

    with pytest.raises(FrameDamaged, match="kind"):
        decode(resealed(encode(FRAMES["plain"]), other))


@pytest.mark.parametrize("sources_said", [0, 1, 3, 65_535])
def test_another_number_of_sources_is_refused(sources_said: int) -> None:
    def other(data: bytearray) -> None:
        struct.pack_into("<H", data, 14, sources_said)

    with pytest.raises(FrameDamaged):
        sources_of(decode(resealed(encode(FRAMES["plain"]), other)))


def test_every_byte_of_the_sources_changed_and_resealed_is_no_other_error() -> None:
    """A header that is wrong although its CRC is right (a bug wrote it) is damage, or another frame; never a crash."""
    whole = encode(FRAMES["plain"])
    for at in range(52, struct.unpack_from("<I", whole, 4)[0]):
        for value in (0, 1, 127, 255):

            def other(data: bytearray, at: int = at, value: int = value) -> None:
                data[at] = value

            try:
                sources_of(decode(resealed(whole, other)))
            except FrameDamaged:
                continue


def test_the_place_is_named() -> None:
    with pytest.raises(FrameDamaged, match="at 3/7 is damaged") as found:
        decode(b"PF", where="3/7")
    assert found.value.fields == {"where": "3/7"}


def test_a_member_that_is_not_what_the_header_says() -> None:
    frame = FRAMES["gzip"]
    for body in (gzip.compress(b"x\n"), b"", frame.body[:-1], frame.body[:-4] + bytes(4), b"not gzip at all"):
        wrong = Frame(FrameKind.GZIP, 3, 7, 2, 0, frame.raw_bytes, frame.content_crc, body, *packed(SOURCE))
        with pytest.raises(FrameDamaged):
            content(wrong)


def test_fewer_or_more_lines_than_the_header_says() -> None:
    for ndjson in (b"", b'{"deviceId":"a"}\n', b'{"deviceId":"a"}\n' * 3, b'{"deviceId":"a"}\n{"deviceId":"a"}'):
        wrong = Frame(FrameKind.PLAIN, 3, 0, 2, 0, len(ndjson), 0, ndjson, *packed(Source("p", 0, 1, 2)))
        with pytest.raises(FrameDamaged):
            list(events(Slice(3, "0", [wrong], "2", "2")))


@given(st.lists(st.lists(sources, min_size=1, max_size=3), min_size=1, max_size=4), st.integers(0, 60))
def test_events_from_every_offset(groups: list[list[Source]], start: int) -> None:
    frames, first, expected = [], 0, []
    for number, group in enumerate(groups):
        frame = frame_of(group, zipped=number % 2 == 1, first=first)
        frames += [Frame(FrameKind.TIME_MARKER, 3, first, 0, 0, 0, 0, b""), frame]
        lines = iter(content(frame).split(b"\n"))
        for source in group:
            for n in range(source.count):
                expected.append((first, f"d-{n}", next(lines), source.properties))
                first += 1
    found = list(events(Slice(3, str(start), frames, str(first), str(first))))
    assert [(e.sequence_number, e.device, e.body, e.properties) for e in found] == [
        x for x in expected if x[0] >= start
    ]
    assert all(event.offset == str(event.sequence_number) for event in found)


def test_members_are_gzip_and_know_their_crc() -> None:
    for data in (b"", b"x\n", bytes(70_000), b'{"a":1}\n' * 40_000):
        zipped = member(data)
        assert gzip.decompress(zipped) == data
        assert member(data) == zipped
        assert member_crc(zipped) == zlib.crc32(data)
    assert FRAME_BYTES_MAX == 262_144


def test_events_that_are_nested_deeper_than_the_readers_stack_allows() -> None:
    """The intake's decoder had more stack left than a reader's may have: what was accepted must be readable."""
    deep = b'{"x":' + b"[" * 700 + b"]" * 700 + b',"y":{"deviceId":"no"},"deviceId"\t: "d-1","z":"deviceId"}'
    assert [name for name, _ in fields_of(deep)] == ["x", "y", "deviceId", "z"]
    frame = Frame(
        FrameKind.PLAIN, 0, 0, 1, 0, len(deep) + 1, crc32(deep + b"\n"), deep + b"\n", *packed(Source("p", 0, 1, 1))
    )

    def below(depth: int) -> str:
        return below(depth - 1) if depth else next(events(Slice(0, "0", [frame], "1", "1"))).device

    used = len(__import__("inspect").stack())
    assert below(sys.getrecursionlimit() - used - 300) == "d-1"


@pytest.mark.parametrize("path", sorted(GOLDEN.glob("*.hex")), ids=lambda path: path.stem)
def test_frames_of_the_past_are_read(path: Path) -> None:
    encoded = bytes.fromhex(path.read_text())
    expected = json.loads(path.with_suffix(".json").read_text())
    frame = decode(encoded)
    assert encode(frame) == encoded
    found = {
        "kind": frame.kind.name,
        "partition": frame.partition,
        "first": frame.first,
        "count": frame.count,
        "enqueued_at_ms": frame.enqueued_at_ms,
        "ndjson": content(frame).decode(),
        "sources": [
            [s.producer, s.epoch, s.sequence, s.count, s.sha256.hex(), s.properties.decode(), s.device_field]
            for s in sources_of(frame)
        ],
    }
    assert found == expected


def test_there_are_frames_of_the_past_of_every_kind() -> None:
    kinds = {json.loads(path.read_text())["kind"] for path in GOLDEN.glob("*.json")}
    assert kinds == {kind.name for kind in FrameKind}


@given(st.lists(st.builds(frame_of, st.lists(sources, min_size=1, max_size=2), zipped=st.booleans()), max_size=4))
@settings(deadline=None, max_examples=30)
def test_frames_that_lie_one_behind_the_other_are_told_apart(frames: list[Frame]) -> None:
    assert [decode(part) for part in split(b"".join(map(encode, frames)))] == frames


@pytest.mark.parametrize("rest", [b"P", b"PF" + bytes(50), bytes(200)])
def test_what_lies_behind_frames_and_is_none_is_refused(rest: bytes) -> None:
    whole = encode(frame_of([Source("p", 1, 1, 2)], zipped=False))
    first, *others = split(whole + rest)
    assert first == whole
    assert b"".join(others) == rest
    with pytest.raises(FrameDamaged):
        decode(others[0])
