"""Bytes to requests, without a socket: framing and limits of HTTP/1.1.

llhttp (through httptools) refuses what is not HTTP. What it lets pass and a server must not is refused here: two lengths,
two hosts, a length and a coding, more bytes than the limits. The first fault ends the parser: nothing behind it is read,
because nobody can say where the next request would begin.
"""

from __future__ import annotations

import enum
from collections import deque
from collections.abc import Mapping
from typing import NamedTuple

import httptools

from penstock.errors import (
    BadHeader,
    BodyTooLarge,
    Draining,
    ExpectationFailed,
    HeaderTooLarge,
    LengthRequired,
    PenstockError,
    UriTooLong,
)
from penstock.server.message import Request

_WITH_BODY = frozenset((b"POST", b"PUT", b"PATCH"))
_ONCE = frozenset(
    b"authorization content-encoding content-length content-type expect host idempotency-key transfer-encoding".split()
)


class Limits(NamedTuple):
    """What a connection may cost. A deadline fires at most two `sweep_s` late and never early."""

    body_bytes_max: int = 1 << 20
    header_bytes_max: int = 16 << 10
    target_bytes_max: int = 8 << 10
    header_s: float = 30.0
    body_s: float = 30.0
    idle_s: float = 30.0
    write_s: float = 30.0
    linger_s: float = 2.0
    grace_s: float = 0.2
    sweep_s: float = 1.0
    connections_max: int = 10_000
    connections_per_address_max: int = 0
    arriving_bytes_max: int = 256 << 20


class Arriving(enum.IntEnum):
    """What of the next request is here."""

    NOTHING = 0
    HEADER = 1
    BODY = 2


_NOTHING, _HEADER, _BODY = Arriving  # to look up a member of an enum costs too much for each header


class Parser:
    """Fed with what one connection receives; `ready` gets what came of it, in order, a fault last."""

    __slots__ = (
        *("admitted", "arriving", "draining", "expects", "ready", "_limits"),
        *(
            "_body",
            "_body_bytes",
            "_body_bytes_max",
            "_head_bytes",
            "_headers",
            "_http",
            "_keeps",
            "_raw_bytes",
            "_target",
            "_upgrade",
            "_version",
        ),
    )

    def __init__(self, limits: Limits) -> None:
        self.admitted = False
        self.arriving = _NOTHING
        self.draining = False
        self.expects = False
        self.ready: deque[Request | BaseException] = deque()
        self._limits = limits
        self._http = httptools.HttpRequestParser(self)
        self._raw_bytes = 0
        self._body: bytes | bytearray = b""
        self._body_bytes = 0
        self._body_bytes_max = limits.body_bytes_max
        self._keeps = True
        self._headers: dict[bytes, bytes] = {}
        self._target = b""
        self._head_bytes = 0
        self._upgrade = False
        self._version = ""

    @property
    def headers(self) -> Mapping[bytes, bytes]:
        """Those of the request that arrived last, as far as they are here."""
        return self._headers

    @property
    def kept_bytes(self) -> int:
        """Of the body that is arriving."""
        return len(self._body)

    def head(self) -> Request:
        """The request whose body is arriving, without it."""
        return self._request(b"", False)

    def let_go(self) -> None:
        """Forget what came of the body. Not to be fed again."""
        self._body = b""

    def feed(self, data: bytes) -> None:
        """Take what was received. Not to be called again once `ready` has held a fault."""
        self._raw_bytes += len(data)
        upgraded_at = None
        try:
            self._http.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            upgraded_at = upgrade.args[0]
        except httptools.HttpParserError as error:
            # What a callback below raised is the cause; anything else is the parser's own verdict.
            self.ready.append(error.__context__ or BadHeader(f"The request is not HTTP/1.1: {error}."))
        else:
            # The parser itself keeps a header or trailer until it is whole.
            most = self._limits.header_bytes_max + self._limits.target_bytes_max
            if self.arriving is not _NOTHING and self._raw_bytes > most:
                self.ready.append(self._header_too_large())
        if upgraded_at is not None:
            # Not where it was caught: what is raised there would have the upgrade for its context.
            self.feed(self._without_upgrade() + data[upgraded_at:])

    def _without_upgrade(self) -> bytes:
        """The request's head for a parser that sees no upgrade: it is declined by ignoring it (RFC 9110, 7.8).

        Java's HTTP client asks for h2c with its first request, body included; llhttp would end there.
        """
        dropped = (b"http2-settings", b"upgrade")
        headers = {name: value for name, value in self._headers.items() if name not in dropped}
        options = [option for part in headers.get(b"connection", b"").split(b",") if (option := part.strip())]
        headers[b"connection"] = b", ".join(option for option in options if option.lower() not in dropped)
        lines = [b"%b %b HTTP/%b" % (self._http.get_method(), self._target, self._http.get_http_version().encode())]
        lines += [b"%b: %b" % header for header in headers.items()]
        self._http = httptools.HttpRequestParser(self)
        self._raw_bytes = 0
        return b"\r\n".join(lines) + b"\r\n\r\n"

    # What llhttp calls

    def on_message_begin(self) -> None:
        if self.draining:
            raise draining()
        self.arriving = _HEADER
        self.expects = self._upgrade = self.admitted = False
        self._body = self._target = b""
        self._body_bytes = 0
        self._headers = {}
        self._head_bytes = 0

    def on_url(self, part: bytes) -> None:
        self._target += part
        limit = self._limits.target_bytes_max
        if len(self._target) > limit:
            raise UriTooLong(f"The request target is longer than {limit} bytes.", limit_bytes=limit)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._head_bytes += len(name) + len(value) + 4
        if self._head_bytes > self._limits.header_bytes_max:
            raise self._header_too_large()
        if self.arriving is _BODY:  # a trailer: among the headers it could pass for one of them
            return
        name = name.lower()
        before = self._headers.get(name)
        if before is not None:
            if name in _ONCE or name.startswith(b"penstock-"):
                text = name.decode("latin-1")
                raise BadHeader(f"The header {text} occurs twice.", header=text)
            value = before + b", " + value
        self._headers[name] = value

    def on_headers_complete(self) -> None:
        headers = self._headers
        version = self._version = self._http.get_http_version()
        if version not in ("1.1", "1.0"):
            raise BadHeader(f"HTTP/{version} is not spoken here.")
        if b"host" not in headers and version == "1.1":
            raise BadHeader("The header host is missing.", header="host")
        length = headers.get(b"content-length")
        coding = headers.get(b"transfer-encoding")
        if coding is not None and (length is not None or version == "1.0" or coding.lower() != b"chunked"):
            raise BadHeader("The only Transfer-Encoding is chunked, in HTTP/1.1, without a Content-Length.")
        method = self._http.get_method()
        if method == b"CONNECT":
            raise BadHeader("CONNECT is not spoken here.")
        if length is not None:
            self._check_length(length)
        elif coding is None and method in _WITH_BODY:
            raise LengthRequired("A request with a body needs Content-Length or Transfer-Encoding: chunked.")
        expected = headers.get(b"expect") if version == "1.1" else None
        if expected is not None and expected.lower() != b"100-continue":
            raise ExpectationFailed("The only Expect is 100-continue.")
        self.arriving = _BODY
        self._keeps = method in _WITH_BODY  # what comes with other methods means nothing (RFC 9110, 9.3.1)
        self._raw_bytes = 0
        self.expects = expected is not None
        self._upgrade = self._http.should_upgrade()

    def on_body(self, part: bytes) -> None:
        self.expects = False
        self._raw_bytes = 0
        self._body_bytes += len(part)
        if self._body_bytes > self._body_bytes_max:
            raise self._body_too_large()
        if not self._keeps:
            return
        if not self._body:
            self._body = part
        else:
            if isinstance(self._body, bytes):
                self._body = bytearray(self._body)
            self._body += part

    def on_message_complete(self) -> None:
        if self._upgrade:
            return
        keep_alive = self._http.should_keep_alive() and self._version == "1.1"
        self.ready.append(self._request(bytes(self._body), keep_alive))
        self.arriving = _NOTHING
        self.expects = False
        self._body = b""
        self._raw_bytes = 0

    def _request(self, body: bytes, keep_alive: bool) -> Request:
        path, _, query = self._target.partition(b"?")
        if not path.startswith(b"/"):
            path = _origin(path)
        return Request(self._http.get_method(), path, query, self._headers, body, keep_alive)

    def _check_length(self, length: bytes) -> None:
        if not length.isdigit():
            raise BadHeader("Content-Length is not a number.", header="content-length")
        if int(length) > self._limits.body_bytes_max:
            raise self._body_too_large()

    def _body_too_large(self) -> BodyTooLarge:
        limit = self._limits.body_bytes_max
        return BodyTooLarge(f"The body is larger than {limit} bytes. Send smaller batches.", limit_bytes=limit)

    def _header_too_large(self) -> HeaderTooLarge:
        limit = self._limits.header_bytes_max
        return HeaderTooLarge(f"The header block is larger than {limit} bytes.", limit_bytes=limit)


def draining() -> PenstockError:
    return Draining("The server is shutting down. Send the same request again.", retry_after_s=1)


def _origin(target: bytes) -> bytes:
    """The path of an absolute target, `http://host/path`; other forms name nothing here."""
    _, _, rest = target.partition(b"://")
    return rest[rest.find(b"/") :] if b"/" in rest else b"/" if rest else target
