"""Compressed bodies cut, damaged, swollen; framings. Nothing but the errors of the contract comes out, in bounded memory."""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import subprocess
import sys
import zlib
from typing import Any

import msgspec
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from penstock.errors import (
    BatchTooLarge,
    EmptyBatch,
    MalformedBody,
    MalformedGzip,
    NoValidEvent,
    PenstockError,
    UnsupportedEncoding,
    UnsupportedType,
)
from penstock.wire import body as body_module
from penstock.wire.body import device_field, ndjson, unzip, unzipped_bytes

PLAIN = b'{"deviceId":"d-1","temperature":21.40}\n' * 20
JSON, LINES = "application/json", "application/x-ndjson"


def zstd(data: bytes, *, sized: bool = True, checksum: bool = False) -> bytes:
    return zstandard.ZstdCompressor(write_content_size=sized, write_checksum=checksum).compress(data)


def unsized_zstd(data: bytes) -> bytes:
    stream = zstandard.ZstdCompressor(write_content_size=False).compressobj()
    return stream.compress(data) + stream.flush()


@pytest.mark.parametrize("level", [0, 1, 6, 9])
def test_gzip_comes_out_as_it_went_in(level: int) -> None:
    assert unzip(gzip.compress(PLAIN, level), "gzip", bytes_max=len(PLAIN)) == PLAIN
    assert unzip(gzip.compress(PLAIN, level), "x-gzip", bytes_max=1 << 20) == PLAIN


def test_gzip_with_a_name_and_a_comment_of_the_header() -> None:
    packed = io.BytesIO()
    with gzip.GzipFile("events.ndjson", "wb", fileobj=packed) as file:
        file.write(PLAIN)
    assert unzip(packed.getvalue(), "gzip", bytes_max=1 << 20) == PLAIN


@pytest.mark.parametrize("plain", [PLAIN, b"", b"x", bytes(70_000)])
def test_gzip_cut_at_every_length(plain: bytes) -> None:
    whole = gzip.compress(plain)
    for length in range(len(whole)):
        with pytest.raises(MalformedGzip):
            unzip(whole[:length], "gzip", bytes_max=1 << 20)


@pytest.mark.parametrize(
    "extra", [b"\0", bytes(512), b"x", b"\x1f", b"\x1f\x8b", gzip.compress(b"", mtime=0), gzip.compress(PLAIN, mtime=0)]
)
def test_bytes_behind_the_member(extra: bytes) -> None:
    with pytest.raises(MalformedGzip):
        unzip(gzip.compress(PLAIN) + extra, "gzip", bytes_max=1 << 20)


def test_every_flipped_bit_of_the_trailer_and_the_data() -> None:
    whole = gzip.compress(PLAIN, mtime=0)
    for at in range(10, len(whole)):
        for bit in range(8):
            broken = bytearray(whole)
            broken[at] ^= 1 << bit
            # The last byte of the data may hold bits that mean nothing.
            with contextlib.suppress(MalformedGzip, BatchTooLarge):
                assert unzip(bytes(broken), "gzip", bytes_max=1 << 20) == PLAIN
                assert at == len(whole) - 9


@pytest.mark.parametrize("wrapped", [zlib.compress(PLAIN), zlib.compress(PLAIN)[2:-4], PLAIN, b"\x1f", b"\x1f\x8b\x08"])
def test_what_is_no_gzip(wrapped: bytes) -> None:
    with pytest.raises(MalformedGzip):
        unzip(wrapped, "gzip", bytes_max=1 << 20)


@pytest.mark.parametrize("size", [0, 1, 100, 4095, 4096, 65_535, 65_536, 1 << 20])
def test_the_limit_is_exact(size: int) -> None:
    data = bytes(size)
    for packed, encoding in (
        (gzip.compress(data), "gzip"),
        (zstd(data), "zstd"),
        (unsized_zstd(data), "zstd"),
        (data, "identity"),
        (data, ""),
    ):
        assert unzip(packed, encoding, bytes_max=max(size, 1)) == data
        if size > 1:
            with pytest.raises(BatchTooLarge) as refused:
                unzip(packed, encoding, bytes_max=size - 1)
            assert refused.value.fields == {"limit_bytes": size - 1}


@pytest.mark.parametrize(
    "packed", [zstd(PLAIN), zstd(PLAIN, checksum=True), unsized_zstd(PLAIN), zstd(b""), unsized_zstd(b"")]
)
def test_zstd_cut_at_every_length_or_followed_by_something(packed: bytes) -> None:
    for length in range(len(packed)):
        with pytest.raises(MalformedGzip):
            unzip(packed[:length], "zstd", bytes_max=1 << 20)
    for extra in (b"\0", b"x", zstd(PLAIN), zstd(b""), b"\x50\x2a\x4d\x18\x01\0\0\0x"):
        with pytest.raises(MalformedGzip):
            unzip(packed + extra, "zstd", bytes_max=1 << 20)


def test_zstd_with_a_wrong_checksum_or_declared_too_large() -> None:
    broken = bytearray(zstd(PLAIN, checksum=True))
    broken[-1] ^= 1
    with pytest.raises(MalformedGzip):
        unzip(bytes(broken), "zstd", bytes_max=1 << 20)
    with pytest.raises(BatchTooLarge):
        unzip(zstd(bytes(1 << 20))[:12], "zstd", bytes_max=1000)
    with pytest.raises(MalformedGzip):
        unzip(gzip.compress(PLAIN), "zstd", bytes_max=1 << 20)


@pytest.mark.parametrize("encoding", ["br", "deflate", "compress", "gzip, gzip", "gzip,zstd", "GZIP", "utf-8"])
def test_encodings_that_are_not_supported(encoding: str) -> None:
    with pytest.raises(UnsupportedEncoding) as refused:
        unzip(PLAIN, encoding, bytes_max=1 << 20)
    assert refused.value.fields == {"supported": ["gzip", "zstd", "identity"]}


MIB = 1 << 20
BOMBS = {
    "gzip": ("import gzip; body = gzip.compress(bytes(600 << 20), 1)", 'unzip(body, "gzip", bytes_max=16 << 20)'),
    "zstd": ("body = zstandard.ZstdCompressor().compress(bytes(600 << 20))", 'unzip(body, "zstd", bytes_max=16 << 20)'),
    "zstd without size": (
        "o = zstandard.ZstdCompressor(write_content_size=False).compressobj()\n"
        "body = b''.join(o.compress(bytes(1 << 20)) for _ in range(600)) + o.flush()",
        'unzip(body, "zstd", bytes_max=16 << 20)',
    ),
    "zstd with a large window": (
        "p = zstandard.ZstdCompressionParameters(window_log=27, write_content_size=False, hash_log=12, chain_log=12)\n"
        "o = zstandard.ZstdCompressor(compression_params=p).compressobj()\n"
        "body = b''.join(o.compress(bytes(1 << 20)) for _ in range(600)) + o.flush()",
        'unzip(body, "zstd", bytes_max=16 << 20)',
    ),
    "array of numbers": ("", 'ndjson(b"[" + b"1," * (8 << 20) + b"1]", "application/json")'),
    "array of objects": ("", 'ndjson(b"[" + b"{}," * (5 << 20) + b"1]", "application/json")'),
    "array of lists": ("", 'ndjson(b"[" + b"[]," * (5 << 20) + b"1]", "application/json")'),
    "array of strings": ("", 'ndjson(b"[" + b"\\"\\"," * (5 << 20) + b"1]", "application/json")'),
}


def test_an_array_with_a_string_that_has_no_end_is_refused_at_once() -> None:
    """Looked for from each of its quotes, the end of the string would take days."""
    script = r"""
from penstock.errors import MalformedBody
from penstock.wire.body import ndjson
try:
    ndjson(b'["' + b'\\"' * 7_000_000 + b"," * 530_000, "application/json")
except MalformedBody:
    print("refused")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.stdout == "refused\n"


def test_the_size_that_a_body_says_of_itself() -> None:
    unknown = zstandard.ZstdCompressor(write_content_size=False).compress(PLAIN)
    for body, size in (
        (PLAIN, len(PLAIN)),
        (gzip.compress(bytes(5000), mtime=0), 5000),
        (gzip.compress(bytes(50_000), mtime=0), 10_000),
        (zstd(bytes(5000)), 5000),
        (unknown, 10_000),
        (zstd(bytes(5000))[:6], 6),
        (b"", 0),
    ):
        assert unzipped_bytes(body, bytes_max=10_000) == size


@pytest.mark.parametrize("bomb", BOMBS)
def test_bombs_take_no_memory(bomb: str) -> None:
    """The body is made by one process and unzipped by another, which must not grow by more than the limit and its copy."""
    make, act = BOMBS[bomb]
    made = subprocess.run(
        [sys.executable, "-c", f"import sys, zstandard\nbody = b''\n{make}\nsys.stdout.buffer.write(body)"],
        capture_output=True,
        check=True,
    ).stdout
    script = f"""
import resource, sys, tracemalloc
from penstock.errors import PenstockError
from penstock.wire.body import ndjson, unzip, unzipped_bytes
body = sys.stdin.buffer.read()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    {act}
except PenstockError as error:
    print(error.code, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10)
"""
    done = subprocess.run([sys.executable, "-c", script], input=made, capture_output=True, check=True)
    code, grown_mib = done.stdout.split()
    assert code == b"batch_too_large"
    assert int(grown_mib) < 90


@pytest.mark.parametrize(
    "kind", ["", LINES, "application/ndjson", "application/jsonl", LINES + "; charset=utf-8", "Application/X-NDJSON"]
)
def test_ndjson_stays_what_it_is(kind: str) -> None:
    for data in (PLAIN, b"", b"\xff", b"\r\n"):
        assert ndjson(data, kind) is data


@pytest.mark.parametrize(
    "kind",
    [
        JSON, "application/json; charset=utf-8", 'application/json;charset="UTF-8"', "application/json; Charset=utf8", "APPLICATION/JSON",
        "application/json ; charset=us-ascii", "application/json; charset=utf-8; profile=x", "application/json; profile=x; charset = utf-8",
    ],
)  # fmt: skip
def test_types_that_are_json(kind: str) -> None:
    assert ndjson(b'[{"a":1}]', kind) == b'{"a":1}\n'


@pytest.mark.parametrize(
    "kind",
    [
        "text/plain", "application/xml", "application/x-www-form-urlencoded", "application/jsonx", "json", "application/json+x",
        "application/json; charset=utf-16", "application/json; Charset=latin1", "application/x-ndjson; charset=iso-8859-1",
    ],
)  # fmt: skip
def test_types_that_are_not_supported(kind: str) -> None:
    with pytest.raises(UnsupportedType) as refused:
        ndjson(b'[{"a":1}]', kind)
    assert refused.value.fields["supported"]


VALUES = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-(10**30), 10**30),
        st.floats(allow_nan=False, allow_infinity=False),
        st.text(),
    ),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.text(), inner, max_size=4)),
    max_leaves=12,
)


@given(
    st.lists(VALUES, min_size=1, max_size=8),
    st.sampled_from([None, 0, 2, "\t", "\r\n"]),
    st.booleans(),
    st.sampled_from([(",", ":"), (", ", ": "), (" ,\n", "\r:\n")]),
)
def test_an_array_becomes_lines(
    values: list[object], indent: int | str | None, ascii_only: bool, between: tuple[str, str]
) -> None:
    text = json.dumps(values, indent=indent, ensure_ascii=ascii_only, separators=between).encode("utf-8", "replace")
    lines = ndjson(b" \r\n" + text + b"\n\t", JSON).split(b"\n")
    assert lines.pop() == b""
    assert [json.loads(line) for line in lines] == json.loads(text)
    assert not any(b"\r" in line for line in lines)


def test_an_event_keeps_its_bytes() -> None:
    event = '{ "deviceId" :"d-1","n":21.40,"e":1E+02,"big":123456789012345678901234567890,"s":"\\u00e4ä\\/", "a":[ ] }'.encode()
    assert ndjson(b"[" + event + b",\n  " + event + b"\n]", JSON) == event + b"\n" + event + b"\n"
    assert ndjson(event, JSON) == event + b"\n"
    assert ndjson(b"\n" + event.replace(b",", b",\r\n") + b"\r\n", JSON) == event.replace(b",", b",  ") + b"\n"


@pytest.mark.parametrize("text", [b"", b" ", b"\n\t\r\n", b"[]", b" [ \n] "])
def test_nothing_at_all(text: bytes) -> None:
    with pytest.raises(EmptyBatch):
        ndjson(text, JSON)


@pytest.mark.parametrize("text", [b"{}", b"null", b"1", b'"x"', b"true", b'{"a":[1,2]}'])
def test_one_value_is_one_line(text: bytes) -> None:
    assert ndjson(text, JSON) == text + b"\n"


@pytest.mark.parametrize(
    "text",
    [
        b"[", b"[1", b"[1,", b"[1,]", b"[,1]", b"[1]]", b"[1] x", b"[1][2]", b"[{}{}]", b'[{"a":1}', b'["\n"]', b'["\xff"]', b"[NaN]",
        b'["\xed\xa0\x80"]', b"[1]\x00", "[1]".encode("utf-16-le"), b"[01]", b"[1;2]",
    ],
)  # fmt: skip
def test_arrays_that_are_not_json(text: bytes) -> None:
    with pytest.raises(MalformedBody):
        ndjson(text, JSON)


@pytest.mark.parametrize(
    "text",
    [
        b"\xef\xbb\xbf[1]", b"\xef\xbb\xbf{}", "[1]".encode("utf-16"), b"{", b"{}{}", b'{"a":1}\n{"a":2}',
        b"nul", b"\xff", b"x", b"{}x",
    ],
)  # fmt: skip
def test_one_value_that_is_not_json(text: bytes) -> None:
    with pytest.raises(NoValidEvent) as refused:
        ndjson(text, JSON)
    rejected: Any = refused.value.fields["rejected"]
    code = "not_json" if text.decode(errors="ignore").encode() == text else "not_utf8"
    assert [(one["index"], one["code"]) for one in rejected] == [(0, code)]


@pytest.mark.parametrize("depth", [900, 990, 995, 1000, 10**4, 10**6])
def test_deep_nesting_is_answered(depth: int) -> None:
    for text in (
        b"[" * depth + b"]" * depth,
        b"[" * depth,
        b'{"a":' * depth + b"1" + b"}" * depth,
        b"[" + b'{"a":' * depth,
    ):
        try:
            ndjson(text, JSON)
        except PenstockError as refused:
            assert refused.code in ("malformed_body", "no_valid_event")
        else:
            assert depth < 1000


def test_long_arrays_are_counted_exactly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(body_module, "_COMMAS_AT_ONCE", 0)
    event = b'{"a,]":[1,2,[3,4],"]["],"b":{"c":[],"d":[{},{}]},"e":[1,2,3]}'
    for between in (b",", b" ,\n"):
        text = b"[" + between.join([event] * 7) + b"]"
        assert ndjson(text, JSON, events_max=7).count(b"\n") == 7
        with pytest.raises(BatchTooLarge) as refused:
            ndjson(text, JSON, events_max=6)
        assert refused.value.fields == {"limit_events": 6}


@given(st.lists(VALUES, min_size=2, max_size=9))
def test_elements_are_counted_as_a_decoder_does(values: list[object]) -> None:
    text = msgspec.json.encode(values)
    assert not body_module._has_more(text, len(values))
    assert body_module._has_more(text, len(values) - 1)


@pytest.mark.parametrize("kind", ["application/cloudevents-batch+json", "Application/CloudEvents+JSON; charset=UTF-8"])
def test_cloudevents_are_json(kind: str) -> None:
    event = b'{"specversion":"1.0","id":"1","type":"t","source":"urn:s"}'
    assert ndjson(b"[%b,\n%b]" % (event, event), kind) == event + b"\n" + event + b"\n"
    assert ndjson(event, kind) == event + b"\n"


@pytest.mark.parametrize(
    ("first", "field", "found"),
    [
        (b'{"source":"s","subject":"b","deviceid":"c","deviceId":"d"}', "deviceId", "deviceId"),
        (b'{"source":"s","subject":"b","deviceid":"c"}', "deviceId", "deviceid"),
        (b'{"source":"s","subject":"b"}', "deviceId", "subject"),
        (b'{"source":"s","subject":null,"deviceid":null}', "deviceId", "source"),
        (b'{"source":"s","subject":"b"}', "source", "source"),
        (b'{"data":{"deviceId":"d","subject":"b"},"source":7}', "deviceId", "source"),
        (b'{"id":"1"}', "deviceId", "deviceId"),
        (b"{}", "device", "device"),
        (b"[1]", "deviceId", "deviceId"),
        (b"7", "deviceId", "deviceId"),
        (b'{"s\\u0075bject":"b"}', "deviceId", "subject"),
    ],
)
def test_the_field_that_names_the_device_of_cloudevents(first: bytes, field: str, found: str) -> None:
    lines = first + b'\n{"deviceId":"x","deviceid":"x","subject":"x","source":"x"}\n'
    assert device_field(lines, "Application/CloudEvents-Batch+JSON", field) == found
    for kind in ("application/json", "application/x-ndjson", "", "x; y=application/cloudevents+json"):
        assert device_field(lines, kind, field) == field
