"""Requests that must be refused, as bytes: smuggling, framing, sizes. The rows of docs/faults.md 79 to 82, for tests and the hostile load.

Where there can be a body, it is a good event of the device `hostile`: a server that took it in would store it, and it would be found.
"""

from __future__ import annotations

from typing import NamedTuple

DEVICE = b"hostile"
EVENT = b'{"deviceId":"hostile"}'
BODY_BYTES_MAX = 1 << 20
HEADER_BYTES_MAX = 16 << 10
TARGET_BYTES_MAX = 8 << 10

_LINE = b"POST /v1/events HTTP/1.1"
_HOST = b"Host: h"
_SIZE = len(EVENT)
_CHUNK = b"%x\r\n%b\r\n" % (_SIZE, EVENT)


class Row(NamedTuple):
    """What is answered, before the connection ends. `limit` is what a 413, 414 or 431 names."""

    data: bytes
    status: int = 400
    code: str = "bad_header"
    limit: int = 0


def head(*headers: bytes, line: bytes = _LINE) -> bytes:
    return b"\r\n".join((line, *headers)) + b"\r\n\r\n"


CHUNKED = head(_HOST, b"Transfer-Encoding: chunked")
WHOLE = head(_HOST, b"Content-Length: %d" % _SIZE) + EVENT
"""Nothing is wrong with this one but its sender: it is put behind others, where it must not be read."""


def _lengths(*values: bytes) -> bytes:
    return head(_HOST, *(b"Content-Length:" + value for value in values)) + EVENT


def _coding(*headers: bytes, line: bytes = _LINE) -> bytes:
    return head(_HOST, *headers, line=line) + _CHUNK + b"0\r\n\r\n"


_BAD: dict[str, bytes] = {
    "length and coding": _coding(b"Content-Length: 5", b"Transfer-Encoding: chunked"),
    "coding and length": _coding(b"Transfer-Encoding: chunked", b"Content-Length: 5"),
    "two equal lengths": _lengths(b" %d" % _SIZE, b" %d" % _SIZE),
    "two lengths": _lengths(b" %d" % _SIZE, b" %d" % (_SIZE - 1)),
    "a list of lengths": _lengths(b" %d, %d" % (_SIZE, _SIZE)),
    "length +n": _lengths(b" +%d" % _SIZE),
    "length -1": _lengths(b" -1"),
    "length 0xn": _lengths(b" 0x%x" % _SIZE),
    "length 0_n": _lengths(b" 0_%d" % _SIZE),
    "length n n": _lengths(b" 2 2"),
    "empty length": _lengths(b""),
    "length 10^30": _lengths(b" 1" + b"0" * 30),
    "xchunked": _coding(b"Transfer-Encoding: xchunked"),
    "identity, chunked": _coding(b"Transfer-Encoding: identity, chunked"),
    "chunked, identity": _coding(b"Transfer-Encoding: chunked, identity"),
    "chunked twice": _coding(b"Transfer-Encoding: chunked", b"Transfer-Encoding: chunked"),
    "chunked, chunked": _coding(b"Transfer-Encoding: chunked, chunked"),
    "gzip, chunked": _coding(b"Transfer-Encoding: gzip, chunked"),
    "space before the colon": _coding(b"Transfer-Encoding : chunked"),
    "tab before the colon": _coding(b"Transfer-Encoding\t: chunked"),
    "vertical tab before chunked": _coding(b"Transfer-Encoding: \x0bchunked"),
    "coding in HTTP/1.0": _coding(b"Transfer-Encoding: chunked", line=b"POST /v1/events HTTP/1.0"),
    "bare LF everywhere": b"POST /v1/events HTTP/1.1\nHost: h\nContent-Length: %d\n\n%b" % (_SIZE, EVENT),
    "bare LF after a header": b"POST /v1/events HTTP/1.1\r\nHost: h\nContent-Length: %d\r\n\r\n%b" % (_SIZE, EVENT),
    "bare LF at the end": b"POST /v1/events HTTP/1.1\r\nHost: h\r\nContent-Length: %d\r\n\n%b" % (_SIZE, EVENT),
    "bare CR": b"POST /v1/events HTTP/1.1\r\nHost: h\rX: y\r\nContent-Length: %d\r\n\r\n%b" % (_SIZE, EVENT),
    "NUL in a value": head(b"Host: h\0", b"Content-Length: %d" % _SIZE) + EVENT,
    "NUL in a name": head(_HOST, b"X\0: y", b"Content-Length: %d" % _SIZE) + EVENT,
    "obs-fold": head(_HOST, b"X: y", b" z", b"Content-Length: %d" % _SIZE) + EVENT,
    "space before the first header": head(b" Host: h", b"Content-Length: %d" % _SIZE) + EVENT,
    "a header without a colon": head(_HOST, b"nonsense", b"Content-Length: %d" % _SIZE) + EVENT,
    "a header without a name": head(_HOST, b": x", b"Content-Length: %d" % _SIZE) + EVENT,
    "no host": head(b"Content-Length: %d" % _SIZE) + EVENT,
    "two hosts": head(_HOST, b"host: h", b"Content-Length: %d" % _SIZE) + EVENT,
    "two producers": head(_HOST, b"Penstock-Producer: a", b"Penstock-Producer: a", b"Content-Length: 0"),
    "two encodings": head(_HOST, b"Content-Encoding: gzip", b"Content-Encoding: gzip", b"Content-Length: 0"),
    "two properties": head(_HOST, b"Penstock-Property-A: 1", b"penstock-property-a: 2", b"Content-Length: 0"),
    "chunk size not hex": CHUNKED + b"z\r\n" + EVENT + b"\r\n0\r\n\r\n",
    "chunk size negative": CHUNKED + b"-1\r\n" + EVENT + b"\r\n0\r\n\r\n",
    "chunk size 0xn": CHUNKED + b"0x" + _CHUNK + b"0\r\n\r\n",
    "chunk size huge": CHUNKED + b"F" * 40 + b"\r\n" + EVENT,
    "chunk longer than its size": CHUNKED + b"2\r\n" + EVENT + b"\r\n0\r\n\r\n",
    "chunk without its end": CHUNKED + _CHUNK[:-2] + b"0\r\n\r\n",
    "chunk size ends in LF": CHUNKED + _CHUNK.replace(b"\r\n", b"\n", 1) + b"0\r\n\r\n",
    "space after the chunk size": CHUNKED + _CHUNK.replace(b"\r\n", b" \r\n", 1) + b"0\r\n\r\n",
    "a space in the target": head(_HOST, line=b"GET /a b HTTP/1.1"),
    "an unknown method": head(_HOST, line=b"FROB / HTTP/1.1"),
    "a method in lower case": head(_HOST, b"Content-Length: %d" % _SIZE, line=b"post /v1/events HTTP/1.1") + EVENT,
    "HTTP/2 prior knowledge": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "HTTP/2.0": head(_HOST, line=b"GET / HTTP/2.0"),
    "HTTP/1.2": head(_HOST, line=b"GET / HTTP/1.2"),
    "HTTP/0.9": b"GET /\r\n\r\n",
    "TLS": bytes.fromhex("16030100c8010000c40303"),
    "CONNECT": head(_HOST, line=b"CONNECT h:1 HTTP/1.1"),
    "not HTTP": b"hello\r\n\r\n",
}


def _large(data: bytes) -> Row:
    return Row(data, 413, "body_too_large", BODY_BYTES_MAX)


def _header(data: bytes) -> Row:
    return Row(data, 431, "header_too_large", HEADER_BYTES_MAX)


def _target(size: int) -> Row:
    return Row(head(_HOST, line=b"GET /" + b"x" * size + b" HTTP/1.1"), 414, "uri_too_long", TARGET_BYTES_MAX)


_EXPECTING = b"Expect: 100-continue"

TOO_MUCH: dict[str, Row] = {
    "a length over the limit": _large(head(_HOST, b"Content-Length: %d" % (BODY_BYTES_MAX + 1))),
    "an expected body over the limit": _large(head(_HOST, b"Content-Length: %d" % (BODY_BYTES_MAX + 1), _EXPECTING)),
    "a length of 1 TB": _large(head(_HOST, b"Content-Length: 1000000000000")),
    "chunks over the limit": _large(
        CHUNKED + b"80000\r\n" + b"x" * 0x80000 + b"\r\n80001\r\n" + b"x" * 0x80001,
    ),
    "a header of 100 KB": _header(head(_HOST, b"X: " + b"x" * 100_000)),
    "half a header of 100 KB": _header(b"GET / HTTP/1.1\r\nX: " + b"x" * 100_000),
    "5000 headers": _header(head(_HOST, *(b"X%d: x" % n for n in range(5000)))),
    "half a trailer of 1 MB": _header(CHUNKED + b"1\r\nx\r\n0\r\nX: " + b"x" * 1_000_000),
    "half a chunk's extension of 1 MB": _header(CHUNKED + b"1;x=" + b"x" * 1_000_000),
    "a trailer of 100 KB": _header(CHUNKED + _CHUNK + b"0\r\nX: " + b"x" * 100_000 + b"\r\n\r\n"),
    "a target of 100 KB": _target(100_000),
    "a target of 8 KiB and one": _target(TARGET_BYTES_MAX),
}

HOSTILE: dict[str, Row] = {name: Row(data) for name, data in _BAD.items()}
OTHERS: dict[str, Row] = {
    "another expectation": Row(
        head(_HOST, b"Content-Length: %d" % _SIZE, b"Expect: a-miracle") + EVENT, 417, "expectation_failed"
    ),
    "no length": Row(head(_HOST), 411, "length_required"),
}

REFUSED: dict[str, Row] = {**HOSTILE, **TOO_MUCH, **OTHERS}
"""Every one of them."""

UNFINISHED: dict[str, bytes] = {
    "half a header": b"POST /v1/events HTTP/1.1\r\nHost: h\r\nContent-Le",
    "half a body": WHOLE[:-1],
    "a chunk and no end": CHUNKED + _CHUNK,
    "half a chunk": CHUNKED + _CHUNK[:-5],
    "no last line": CHUNKED + _CHUNK + b"0\r\n",
}
"""Answered 408 when the deadline has passed."""
