"""The frame: what one commit adds to a partition (docs/formats.md, Frame).

A header that says whose events these are, with a CRC of its own, and the events as NDJSON: one gzip member, or plain when short.
Both the stored bytes and the NDJSON have a CRC-32, so a copy can be checked without unzipping and a file's CRC can be combined.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from typing import Any

import msgspec
from isal import isal_zlib

from penstock.errors import FrameDamaged
from penstock.events import DEVICE_FIELD, Event, Frame, FrameKind, Slice, Source

VERSION = 1
PLAIN_BYTES_MAX = 4096
FRAME_BYTES_MAX = 256 * 1024

_MAGIC = b"PF"
_HEAD = struct.Struct("<2sBBI")
_REST = struct.Struct("<HHQqIIIII")
_CRC = struct.Struct("<I")
_NAMED = struct.Struct("<IB")
_ORIGIN = struct.Struct("<IQB")
_LENGTH = struct.Struct("<H")
_KINDS = tuple(FrameKind)
_TRAILER = struct.Struct("<II")
_TOKEN = re.compile(rb'"(?:[^"\\]++|\\.)*+"|[{}\[\]]', re.DOTALL)
_COLON = re.compile(rb"[ \t\r]*+:[ \t\r]*+")
HEADER_BYTES = _HEAD.size + _CRC.size + _REST.size
_LENGTHS_AT = (4, 40)


def member(ndjson: bytes) -> bytes:
    """One gzip member (RFC 1952) of these bytes; the same bytes in give the same bytes out."""
    compressed: bytes = isal_zlib.compress(ndjson, 1, 31)
    return compressed


def member_crc(zipped: bytes) -> int:
    """CRC-32 of what a gzip member holds, from its trailer."""
    crc: int = _TRAILER.unpack_from(zipped, len(zipped) - _TRAILER.size)[0]
    return crc


def crc32(data: bytes | memoryview, start: int = 0) -> int:
    """CRC-32 of gzip and zlib."""
    crc: int = isal_zlib.crc32(data, start)
    return crc


def pack_origin(producer: str, epoch: int, sequence: int, sha256: bytes, properties: bytes, device_field: str) -> bytes:
    """A source as it lies in a header, behind its count: the same for all frames that a batch is in."""
    name = producer.encode()
    field = b"" if device_field == DEVICE_FIELD else device_field.encode()
    return b"%c%b%b%b%b%b%c%b" % (
        len(name),
        name,
        _ORIGIN.pack(epoch, sequence, len(sha256)),
        sha256,
        len(properties).to_bytes(2, "little"),
        properties,
        len(field),
        field,
    )


def pack_count(count: int) -> bytes:
    """The count that a source begins with."""
    return _CRC.pack(count)


def pack_sources(sources: Iterable[Source]) -> bytes:
    """Sources as they lie in a header, one after the other."""
    return b"".join(
        pack_count(of.count)
        + pack_origin(of.producer, of.epoch, of.sequence, of.sha256, of.properties, of.device_field)
        for of in sources
    )


def pack(
    kind: int,
    partition: int,
    first: int,
    count: int,
    enqueued_at_ms: int,
    raw_bytes: int,
    content_crc: int,
    body_crc: int,
    sources: bytes,
    source_count: int,
    body: bytes,
) -> bytes:
    """A whole frame from parts that are ready: called inside the hub's write transaction, so it does no more than it must."""
    rest = (
        _REST.pack(partition, source_count, first, enqueued_at_ms, count, raw_bytes, len(body), content_crc, body_crc)
        + sources
    )
    head = _HEAD.pack(_MAGIC, VERSION, kind, _HEAD.size + _CRC.size + len(rest))
    return b"".join((head, _CRC.pack(crc32(rest, crc32(head))), rest, body))


def encode(frame: Frame) -> bytes:
    """The bytes of a frame."""
    return pack(
        frame.kind,
        frame.partition,
        frame.first,
        frame.count,
        frame.enqueued_at_ms,
        frame.raw_bytes,
        frame.content_crc,
        crc32(frame.body),
        frame.sources,
        frame.source_count,
        frame.body,
    )


def decode(data: bytes | memoryview, *, where: str = "") -> Frame:
    """The frame that these bytes are, copied out of them. Raises FrameDamaged unless every length and checksum is right."""
    if len(data) < HEADER_BYTES:
        raise _damaged(where, f"{len(data)} bytes, a header has {HEADER_BYTES}")
    magic, version, kind, header_bytes = _HEAD.unpack_from(data)
    if magic != _MAGIC:
        raise _damaged(where, "it does not begin with PF")
    if version != VERSION:
        raise _damaged(where, f"its format is version {version}, this program knows {VERSION}")
    if not HEADER_BYTES <= header_bytes <= len(data):
        raise _damaged(where, "its header does not fit")
    rest = bytes(data[_HEAD.size + _CRC.size : header_bytes])
    if crc32(rest, crc32(data[: _HEAD.size])) != _CRC.unpack_from(data, _HEAD.size)[0]:
        raise _damaged(where, "the CRC of its header is wrong")
    partition, source_count, first, at_ms, count, raw_bytes, body_bytes, content_crc, body_crc = _REST.unpack_from(rest)
    body = bytes(data[header_bytes:])
    if len(body) != body_bytes or crc32(body) != body_crc:
        raise _damaged(where, "the CRC or length of its body is wrong")
    if kind >= len(_KINDS):
        raise _damaged(where, f"it is of the unknown kind {kind}")
    return Frame(
        _KINDS[kind], partition, first, count, at_ms, raw_bytes, content_crc, body, source_count, rest[_REST.size :]
    )


def split(data: bytes) -> Iterator[bytes]:
    """The frames that lie one behind the other in `data`, each to be decoded; a rest that is none is for `decode` to refuse."""
    at = 0
    while at < len(data):
        # Header bytes and body bytes stand in the header: together they say where the next frame begins.
        size = sum(int.from_bytes(data[at + place : at + place + 4], "little") for place in _LENGTHS_AT)
        end = at + max(size, HEADER_BYTES)
        yield data[at:end]
        at = end


def _damaged(where: str, what: str) -> FrameDamaged:
    return FrameDamaged(
        f"A frame{' at ' + where if where else ''} is damaged: {what}. "
        "Nothing behind it is read; restore the hub from a backup or archive up to it.",
        where=where,
    )


def sources_of(frame: Frame) -> tuple[Source, ...]:
    """Whose events these are, in order. Raises FrameDamaged. Not part of `decode`: an archiver copies frames by the thousand unasked."""
    where = f"{frame.partition}/{frame.first}"
    try:
        sources = tuple(_sources(frame.sources, frame.source_count))
    except (struct.error, UnicodeDecodeError, IndexError) as error:
        raise _damaged(where, "its sources do not fit") from error
    if sum([source.count for source in sources]) != frame.count:
        raise _damaged(where, "its sources do not add up")
    return sources


def _sources(rest: bytes, number: int) -> Iterator[Source]:
    """Raises struct.error, IndexError or UnicodeDecodeError where they do not fit."""
    at = 0
    for _ in range(number):
        count, length = _NAMED.unpack_from(rest, at)
        begin = at + _NAMED.size
        end = begin + length
        epoch, sequence, length = _ORIGIN.unpack_from(rest, end)
        sha_begin = end + _ORIGIN.size
        sha_end = sha_begin + length
        properties_begin = sha_end + _LENGTH.size
        properties_end = properties_begin + _LENGTH.unpack_from(rest, sha_end)[0]
        field_begin = properties_end + 1
        at = field_begin + rest[properties_end]
        if at > len(rest):
            raise IndexError
        yield Source(
            rest[begin:end].decode(),
            epoch,
            sequence,
            count,
            rest[sha_begin:sha_end],
            rest[properties_begin:properties_end],
            rest[field_begin:at].decode() or DEVICE_FIELD,
        )


def content(frame: Frame) -> bytes:
    """The NDJSON of a frame: lines that end in a line feed. Raises FrameDamaged."""
    if frame.kind is not FrameKind.GZIP:
        return frame.body
    try:
        unzipped: bytes = isal_zlib.decompress(frame.body, 31, frame.raw_bytes)
    except isal_zlib.IsalError as error:
        raise FrameDamaged(f"The frame at {frame.partition}/{frame.first} cannot be unzipped: {error}.") from error
    if len(unzipped) != frame.raw_bytes:
        raise FrameDamaged(
            f"The frame at {frame.partition}/{frame.first} holds {len(unzipped)} bytes, its header says {frame.raw_bytes}."
        )
    return unzipped


@lru_cache(maxsize=64)
def device_decoder(field: str) -> msgspec.json.Decoder[Any]:
    """A decoder of events to one attribute `device`, taken from `field`; it checks that the rest is JSON."""
    struct_type = msgspec.defstruct("Device", [("device", str)], rename={"device": field}, gc=False)
    return msgspec.json.Decoder(struct_type)


def fields_of(line: bytes) -> Iterator[tuple[str, int]]:
    """The outermost fields of a line that is known to be a JSON object, doubled ones too: names, and where the values begin."""
    depth = 0
    for token in _TOKEN.finditer(line):
        text = token[0]
        if text in b"{[":
            depth += 1
        elif text in b"}]":
            depth -= 1
        elif depth == 1 and (colon := _COLON.match(line, token.end())):
            yield msgspec.json.decode(text, type=str), colon.end()


def _devices(lines: Sequence[bytes], field: str) -> list[str]:
    """The device of each line."""
    decode = device_decoder(field).decode
    try:
        return [decode(line).device for line in lines]
    except RecursionError:
        # How deep a decoder gets depends on the caller's stack, and the intake's was shorter.
        return [_device(line, field) for line in lines]


def _device(line: bytes, field: str) -> str:
    begin = next(at for name, at in fields_of(line) if name == field)
    value = _TOKEN.match(line, begin)
    device: str = msgspec.json.decode(value[0] if value else b"", type=str)
    return device


def events(read: Slice) -> Iterator[Event]:
    """The events of a slice, from its offset on. Raises FrameDamaged."""
    for frame in read.frames:
        bits = frame.place_bits
        start = int(read.offset) << bits
        if frame.next <= start:
            continue
        lines = content(frame).split(b"\n")
        if len(lines) != frame.count + 1:
            raise FrameDamaged(
                f"The frame at {frame.partition}/{frame.first} has {len(lines) - 1} lines, its header says {frame.count}."
            )
        begin, at_ms = 0, frame.enqueued_at_ms
        for source in sources_of(frame):
            end = begin + source.count
            wanted = lines[max(begin, start - frame.first) : end]
            # All devices of a source in one go, and the fields by place: this is most of what an event costs its reader.
            number = frame.first + end - len(wanted)
            properties = source.properties
            for line, device in zip(wanted, _devices(wanted, source.device_field), strict=True):
                yield Event(device, line, number, str(number >> bits), at_ms, properties)
                number += 1
            begin = end
