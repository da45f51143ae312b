"""A proxy between a client and a store that does to each request what a test has planned."""

from __future__ import annotations

import contextlib
import enum
import re
import socket
import struct
import threading
from collections.abc import Callable

from tests.e2e.fault_proxy import message

_PATIENCE_S = 20.0
_ERROR = b"<?xml version='1.0'?><Error><Code>%b</Code><Message>planned</Message></Error>"
_ANSWER = b"HTTP/1.1 %b\r\nContent-Type: application/xml\r\nContent-Length: %d\r\nConnection: close\r\n\r\n%b"
_NOT_DONE = b"503 Server Busy"
_CONDITION = re.compile(rb"^if-(?:none-)?match: [^\r]*\r\n", re.IGNORECASE | re.MULTILINE)


class Fault(enum.Enum):
    """What becomes of a request."""

    NONE = "it is done and answered"
    RESET = "not done; the connection is reset"
    BUSY = "not done; answered 503"
    CONFLICT = "not done; answered 409, as Azure does while a container is being deleted and S3 when two requests cross"
    DROP = "done; the connection ends without an answer"
    DONE_BUSY = "done; answered 503"
    HANG = "done; no answer ever"
    LATE = "the connection ends without an answer; done when the test calls `land`"
    CUT = "done; the answer ends in its middle"
    SHORT = "done; the answer has half of its body and says so"


Plan = Callable[[str, str], Fault]
"""Method and path with query → what is done. Called for each request, from several threads."""


class StoreProxy:
    """`with StoreProxy(port) as proxy`: listens on `proxy.port`. `plan` may be changed at any time.

    `unconditional` takes If-Match and If-None-Match out of the requests, as a store does that does not know them.
    """

    def __init__(self, port: int) -> None:
        self.plan: Plan = lambda method, path: Fault.NONE
        self.before_answer: Callable[[], None] = lambda: None
        self.requests: list[str] = []
        self.unconditional = False
        self._store_port = port
        self._late: list[bytes] = []
        self._ended = threading.Event()
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listening.getsockname()[1]
        self._threads = [threading.Thread(target=self._accept, daemon=True)]

    def __enter__(self) -> StoreProxy:
        self._threads[0].start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        with contextlib.suppress(OSError):
            self._listening.shutdown(socket.SHUT_RDWR)
        self._listening.close()
        for thread in self._threads:
            thread.join(_PATIENCE_S)

    def land(self) -> None:
        """Do the requests that were late."""
        late, self._late = self._late, []
        for request in late:
            self._forward(request)

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listening.accept()
                client.settimeout(_PATIENCE_S)
                thread = threading.Thread(target=self._serve, args=(client,), daemon=True)
                self._threads.append(thread)
                thread.start()

    def _serve(self, client: socket.socket) -> None:
        with contextlib.suppress(OSError), client:
            if not (request := message(client)):
                return
            method, path, _ = request.split(b" ", 2)
            self.requests.append(f"{method.decode()} {path.decode()}")
            self._handle(client, request, self.plan(method.decode(), path.decode()))

    def _handle(self, client: socket.socket, request: bytes, fault: Fault) -> None:
        if fault is Fault.RESET:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            return
        if fault is Fault.LATE:
            self._late.append(request)
            return
        if fault in (Fault.BUSY, Fault.CONFLICT):
            client.sendall(_error(fault))
            return
        answer = self._forward(request)
        self.before_answer()
        if fault is Fault.DROP:
            return
        if fault is Fault.HANG:
            client.settimeout(None)
            while not self._ended.is_set() and client.recv(1):
                continue
            return
        if fault is Fault.DONE_BUSY:
            answer = _error(fault)
        if fault is Fault.CUT:
            answer = answer[: len(answer) - _body_bytes(answer) // 2 - 1]
        if fault is Fault.SHORT:
            answer = _halved(answer)
        client.sendall(answer)

    def _forward(self, request: bytes) -> bytes:
        """The whole answer: the store is asked to end the connection behind it."""
        line, _, rest = request.partition(b"\r\n")
        if self.unconditional:
            head, _, body = rest.partition(b"\r\n\r\n")
            rest = _CONDITION.sub(b"", head + b"\r\n") + b"\r\n" + body
        with socket.create_connection(("127.0.0.1", self._store_port), timeout=_PATIENCE_S) as store:
            store.sendall(line + b"\r\nConnection: close\r\n" + rest)
            answer = b""
            while part := store.recv(1 << 16):
                answer += part
        return answer


def _error(fault: Fault) -> bytes:
    status, code = (
        (b"409 Conflict", b"ContainerBeingDeleted") if fault is Fault.CONFLICT else (_NOT_DONE, b"ServerBusy")
    )
    body = _ERROR % code
    return _ANSWER % (status, len(body), body)


def _body_bytes(answer: bytes) -> int:
    return len(answer.partition(b"\r\n\r\n")[2])


def _halved(answer: bytes) -> bytes:
    head, _, body = answer.partition(b"\r\n\r\n")
    half = body[: len(body) // 2]
    head = re.sub(rb"(?i)content-length: \d+", b"Content-Length: %d" % len(half), head)
    return head + b"\r\n\r\n" + half
