"""What a POST's body is made of: bounded unzip, and the framings that become lines of one event each.

Nothing is re-serialised: an event keeps its bytes. Every way out is bounded before the memory is taken.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any

import msgspec
import zstandard
from isal import isal_zlib

from penstock.errors import (
    BatchTooLarge,
    EmptyBatch,
    MalformedBody,
    MalformedGzip,
    NoValidEvent,
    UnsupportedEncoding,
    UnsupportedType,
)

ENCODINGS = ("gzip", "zstd", "identity")
CLOUDEVENT = "application/cloudevents+json"
CLOUDEVENTS = ("application/cloudevents-batch+json", CLOUDEVENT)
TYPES = ("application/x-ndjson", "application/json", *CLOUDEVENTS)

_NDJSON = frozenset(("application/x-ndjson", "application/ndjson", "application/jsonl", ""))
_JSON = frozenset(("application/json", *CLOUDEVENTS))
_CLOUDEVENTS = "application/cloudevents"
_CLOUDEVENTS_DEVICES = ("deviceid", "subject", "source")
_RAW = msgspec.json.Decoder(msgspec.Raw)
_RAWS = msgspec.json.Decoder(list[msgspec.Raw])
_LINE_FEEDS = bytes.maketrans(b"\r\n", b"  ")
_CHARSET = re.compile(r';\s*charset\s*=\s*"?([^";]*)', re.IGNORECASE)
# Strings whole, and lists and objects that hold no other, so that only what makes up the depth is looked at one by one.
_STRING = rb'"(?:[^"\\]++|\\.)*+"'
_PLAIN = rb'(?:[^\[\]{}"]++|%b)*+' % _STRING
_STRUCTURE = re.compile(rb"%b|\[%b\]|\{%b\}|[\[\]{},]" % (_STRING, _PLAIN, _PLAIN), re.DOTALL)
_GZIP = b"\x1f\x8b"
_COMMAS_AT_ONCE = 1 << 19
_WINDOW_BYTES_MAX = 1 << 27
_ZSTD_BYTES_AT_ONCE = 512


def unzip(body: bytes, encoding: str, *, bytes_max: int) -> bytes:
    """The body as its Content-Encoding means it, at most `bytes_max` long.

    Raises UnsupportedEncoding, MalformedGzip (cut short, damaged, several members, bytes behind the end), BatchTooLarge.
    """
    if encoding == "gzip" or encoding == "x-gzip":
        return _gunzip(body, bytes_max)
    if encoding == "zstd":
        return _unzstd(body, bytes_max)
    if encoding in ("", "identity"):
        if len(body) > bytes_max:
            raise _too_large(bytes_max)
        return body
    raise UnsupportedEncoding(
        f"Content-Encoding {encoding!r} is not supported; send {', '.join(ENCODINGS)}.", supported=list(ENCODINGS)
    )


def unzipped_bytes(body: bytes, *, bytes_max: int) -> int:
    """How large a body says that it is unzipped, at most `bytes_max`; that if it does not say. It may lie: `unzip` finds out."""
    if body[:2] == _GZIP:
        size = int.from_bytes(body[-4:], "little")
    elif body[:4] == zstandard.FRAME_HEADER:
        try:
            size = zstandard.get_frame_parameters(body).content_size
        except zstandard.ZstdError:
            return len(body)
        if size == 0:  # not known, in some writers' frames
            return bytes_max
    else:
        size = len(body)
    return min(max(size, len(body)), bytes_max)


def _too_large(bytes_max: int) -> BatchTooLarge:
    return BatchTooLarge(
        f"The batch is larger than {bytes_max} bytes unzipped; nothing was stored. Split it and send the parts.",
        limit_bytes=bytes_max,
    )


def too_many(events_max: int) -> BatchTooLarge:
    """The refusal of a batch of more events than these."""
    return BatchTooLarge(
        f"The batch holds more than {events_max} events; nothing was stored. Split it and send the parts.",
        limit_events=events_max,
    )


def one_line(text: bytes) -> bytes:
    """JSON without the line feeds between its tokens."""
    return text.translate(_LINE_FEEDS)


def _gunzip(body: bytes, bytes_max: int) -> bytes:
    if (
        body[3:4] > b"\x1f"
    ):  # RFC 1952, 2.3.1.2: such a member may be laid out in a way that nobody knows yet; isal does not look
        raise MalformedGzip("The gzip body has flags that are reserved. Nothing was stored.")
    unzipper = isal_zlib.decompressobj(31)
    try:
        unzipped: bytes = unzipper.decompress(body, bytes_max + 1)
    except isal_zlib.IsalError as error:
        raise MalformedGzip(f"The gzip body is damaged: {error}. Nothing was stored.") from error
    if len(unzipped) > bytes_max:
        raise _too_large(bytes_max)
    if not unzipper.eof:
        raise MalformedGzip("The gzip body is cut short. Nothing was stored.")
    if unzipper.unused_data:
        raise MalformedGzip("Bytes follow the first gzip member; send exactly one. Nothing was stored.")
    return unzipped


def _unzstd(body: bytes, bytes_max: int) -> bytes:
    try:
        declared = zstandard.get_frame_parameters(body).content_size
        if declared not in (0, zstandard.CONTENTSIZE_UNKNOWN, zstandard.CONTENTSIZE_ERROR):
            if declared > bytes_max:
                raise _too_large(bytes_max)
            return zstandard.ZstdDecompressor(max_window_size=_WINDOW_BYTES_MAX).decompress(
                body, max_output_size=bytes_max, allow_extra_data=False
            )
        return _unzstd_of_unknown_size(body, bytes_max)
    except zstandard.ZstdError as error:
        raise MalformedGzip(f"The zstd body cannot be read: {error}. Nothing was stored.") from error


def _unzstd_of_unknown_size(body: bytes, bytes_max: int) -> bytes:
    """The one-shot call ignores what follows such a frame. The stream is fed little at a time, for it gives out all at once."""
    unzipper = zstandard.ZstdDecompressor(max_window_size=_WINDOW_BYTES_MAX).decompressobj()
    unzipped = bytearray()
    for at in range(0, len(body), _ZSTD_BYTES_AT_ONCE):
        unzipped += unzipper.decompress(body[at : at + _ZSTD_BYTES_AT_ONCE])
        if len(unzipped) > bytes_max:
            raise _too_large(bytes_max)
        if unzipper.eof and (unzipper.unused_data or at + _ZSTD_BYTES_AT_ONCE < len(body)):
            raise MalformedGzip("Bytes follow the first zstd frame; send exactly one. Nothing was stored.")
    if not unzipper.eof:
        raise MalformedGzip("The zstd body is cut short. Nothing was stored.")
    return bytes(unzipped)


def ndjson(body: bytes, content_type: str, *, events_max: int = 10_000) -> bytes:
    """The body as NDJSON: a JSON array or one object becomes lines, NDJSON stays what it is.

    A raw line feed between the tokens of an event becomes a space; inside a string JSON has none. Raises UnsupportedType,
    MalformedBody (an array that is not JSON or not UTF-8), EmptyBatch, NoValidEvent (one object that is not JSON), BatchTooLarge (an
    array of so many values that it must not be decoded to count them).
    """
    if _is_ndjson(content_type):
        return body
    text = body.strip(b" \t\r\n")
    if not text:
        raise EmptyBatch("The body is empty. Nothing was stored.")
    return _array(text, events_max) if text[:1] == b"[" else json_line(text)


def media_type_of(content_type: str) -> str:
    """In lower case, without parameters. Raises UnsupportedType for a charset that is not UTF-8."""
    found = _CHARSET.search(content_type)
    charset = found[1].strip().lower() if found else ""
    if charset not in ("", "utf-8", "utf8", "us-ascii"):
        raise UnsupportedType(f"The charset {charset!r} is not supported; send UTF-8.", supported=["utf-8"])
    return content_type.partition(";")[0].strip().lower()


@lru_cache(maxsize=64)
def _is_ndjson(content_type: str) -> bool:
    """Whether it is of NDJSON; else it is of JSON. Raises UnsupportedType for anything else."""
    media_type = media_type_of(content_type)
    if media_type not in _NDJSON and media_type not in _JSON:
        raise UnsupportedType(
            f"Content-Type {media_type!r} is not supported; send {' or '.join(TYPES)}.", supported=list(TYPES)
        )
    return media_type in _NDJSON


def device_field(lines: bytes, content_type: str, field: str) -> str:
    """The field that names the device in each of these lines: `field`, unless they are CloudEvents that have none of that name.

    Attributes of CloudEvents (1.0, JSON event format) have lower-case names, so `deviceId` is rarely one. The first of `field`, `deviceid`,
    `subject`, `source` that the first event has serves for the whole batch; null is as good as absent there.
    """
    if not content_type.lower().startswith(_CLOUDEVENTS):
        return field
    names, decoder = _cloudevents(field)
    try:
        first = decoder.decode(lines[: lines.find(b"\n")])
    except (msgspec.DecodeError, RecursionError):  # no object: `field` is as good as any
        return field
    return next((name for at, name in enumerate(names) if bytes(getattr(first, f"at_{at}")) != b"null"), field)


@lru_cache(maxsize=64)
def _cloudevents(field: str) -> tuple[tuple[str, ...], msgspec.json.Decoder[Any]]:
    """Names, and a decoder to an attribute `at_…` for each of them that takes no memory for what else an event has."""
    names = tuple(dict.fromkeys((field, *_CLOUDEVENTS_DEVICES)))
    fields = [(f"at_{at}", msgspec.Raw, msgspec.Raw(b"null")) for at in range(len(names))]
    rename = {f"at_{at}": name for at, name in enumerate(names)}
    return names, msgspec.json.Decoder(msgspec.defstruct("First", fields, rename=rename, gc=False))


def _array(text: bytes, events_max: int) -> bytes:
    try:
        text.isascii() or text.decode()
        if text.count(b",") > _COMMAS_AT_ONCE:
            _RAW.decode(text)  # a string without an end would be looked for from each of its quotes
            if _has_more(text, events_max):
                raise too_many(events_max)
        raws = _RAWS.decode(text)
    except UnicodeDecodeError as error:
        raise MalformedBody(f"The JSON array is not UTF-8 at byte {error.start}. Nothing was stored.") from error
    except (msgspec.DecodeError, RecursionError) as error:
        raise MalformedBody(f"The JSON array is not JSON: {error}. Nothing was stored.") from error
    if not raws:
        raise EmptyBatch("The JSON array is empty. Nothing was stored.")
    lines = [bytes(raw) for raw in raws]
    if b"\n" in text or b"\r" in text:
        lines = [one_line(line) for line in lines]
    lines.append(b"")
    return b"\n".join(lines)


def _has_more(array: bytes, events_max: int) -> bool:
    """Whether a valid array has more than so many elements, in constant memory.

    A decoder makes an object of each: 16 MiB of `1,` are 1 GB.
    """
    depth = commas = 0
    for token in _STRUCTURE.finditer(array, 1):
        first = token[0][0]
        if first == 0x2C:
            commas += not depth
            if commas >= events_max:
                return True
        elif first in b"{[" and len(token[0]) == 1:
            depth += 1
        elif first in b"}]":
            depth -= 1
    return False


def json_line(text: bytes) -> bytes:
    """One JSON value as a line. Raises NoValidEvent when it is none."""
    try:
        text.isascii() or text.decode()
        _RAW.decode(text)
    except (UnicodeDecodeError, msgspec.DecodeError, RecursionError) as error:
        code = "not_utf8" if isinstance(error, UnicodeDecodeError) else "not_json"
        rejected = [{"index": 0, "code": code, "detail": str(error)}]
        raise NoValidEvent(f"The body is not JSON: {error}. Nothing was stored.", rejected=rejected) from error
    return one_line(text) + b"\n"
