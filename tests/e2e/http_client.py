"""Requests as bytes on a socket, so that a test can send what no client library would, and the answers."""

from __future__ import annotations

import hashlib
import http.client
import io
import json
import socket
from collections.abc import Mapping
from typing import Any, NamedTuple
from urllib.parse import urlsplit

PATIENCE_S = 20.0


class Answer(NamedTuple):
    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


class Connection:
    """One connection; requests may be sent in parts, and several answers read from it."""

    def __init__(self, url: str, *, source: str = "") -> None:
        host, _, port = urlsplit(url).netloc.partition(":")
        self.socket = socket.create_connection((host, int(port)), PATIENCE_S, (source, 0) if source else None)
        self._received = self.socket.makefile("rb")

    def __enter__(self) -> Connection:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._received.close()
        self.socket.close()

    def send(self, data: bytes) -> None:
        self.socket.sendall(data)

    def answer(self, method: str = "POST") -> Answer | None:
        """The next answer; None when the connection ended instead."""
        try:
            if not self._received.peek(1):
                return None
            response = http.client.HTTPResponse(_Receiving(self._received), method=method)  # type: ignore[arg-type]
            response.begin()
            headers = {name.lower(): value for name, value in response.getheaders()}
            return Answer(response.status, headers, response.read())
        except ConnectionResetError:
            return None


class _Receiving:
    """What HTTPResponse takes for a socket: it reads from the connection's one buffer and does not close it."""

    def __init__(self, file: io.BufferedReader) -> None:
        self._file = file

    def makefile(self, _mode: str) -> _Receiving:
        return self

    def readline(self, size: int = -1) -> bytes:
        return self._file.readline(size)

    def read(self, size: int = -1) -> bytes:
        return self._file.read(size)

    def readinto(self, buffer: bytearray) -> int:
        return self._file.readinto(buffer)

    def flush(self) -> None: ...

    def close(self) -> None: ...


def head(method: str, path: str, headers: Mapping[str, str]) -> bytes:
    lines = [f"{method} {path} HTTP/1.1", "Host: penstock", *(f"{name}: {value}" for name, value in headers.items())]
    return "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n"


def request(url: str, method: str, path: str, body: bytes = b"", headers: Mapping[str, str] | None = None) -> Answer:
    """One exchange on a connection of its own. Content-Length is added unless the headers frame the body."""
    given = dict(headers or {})
    if method == "POST" and not {"Content-Length", "Transfer-Encoding"} & given.keys():
        given["Content-Length"] = str(len(body))
    with Connection(url) as connection:
        connection.send(head(method, path, given) + body)
        answer = connection.answer(method)
    assert answer is not None, "the connection ended without an answer"
    return answer


def post_numbered(url: str, producer: str, sequence: int, body: bytes = b"") -> Answer:
    """One event of device d-1 in a batch with a number."""
    body = body or b'{"deviceId":"d-1","n":%d}' % sequence
    number = f"{producer};epoch=1;sequence={sequence};sha256={hashlib.sha256(body).hexdigest()}"
    headers = {"Content-Type": "application/json", "Penstock-Producer": number}
    return request(url, "POST", "/v1/events", body, headers)
