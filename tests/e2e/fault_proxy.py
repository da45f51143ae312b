"""A proxy between a client and the API that does to each request what networks, proxies and portals do."""

from __future__ import annotations

import contextlib
import random
import socket
import threading
from collections import Counter

_PATIENCE_S = 20.0
_PORTAL = b"<html><body>Please log in</body></html>"
_OK = b"HTTP/1.1 %b\r\nContent-Type: text/html\r\nContent-Length: %d\r\nRetry-After: %b\r\nConnection: close\r\n\r\n%b"


class FaultProxy:
    """`with FaultProxy(port, seed=…, rate=…) as proxy`: listens on `proxy.port`; `done` counts what it did."""

    FAULTS = ("cut request", "drop answer", "cut answer", "hang", "twice", "500", "503", "429", "portal")

    def __init__(self, api_port: int, *, seed: int, rate: float) -> None:
        self.done: Counter[str] = Counter()
        self._api_port = api_port
        self._random = random.Random(seed)
        self._rate = rate
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listening.getsockname()[1]
        self._threads = [threading.Thread(target=self._accept, daemon=True)]

    def __enter__(self) -> FaultProxy:
        self._threads[0].start()
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):
            self._listening.shutdown(socket.SHUT_RDWR)
        self._listening.close()
        for thread in self._threads:
            thread.join(_PATIENCE_S)

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
            while (request := message(client)) and self._handle(client, request):
                continue

    def _handle(self, client: socket.socket, request: bytes) -> bool:
        """Whether the connection goes on."""
        fault = self._random.choice(self.FAULTS) if self._random.random() < self._rate else ""
        self.done[fault] += 1
        if fault == "portal":
            client.sendall(_OK % (b"200 OK", len(_PORTAL), b"0", _PORTAL))
            return False
        if fault.isdigit():
            client.sendall(_OK % (fault.encode() + b" No", len(_PORTAL), b"garbage", _PORTAL))
            return False
        if fault == "hang":
            client.recv(1)  # until the client has enough
            return False
        if fault == "cut request":
            with socket.create_connection(("127.0.0.1", self._api_port)) as api:
                api.sendall(request[: self._random.randrange(len(request))])
            return False
        answer = b""
        for _ in range(2 if fault == "twice" else 1):
            with socket.create_connection(("127.0.0.1", self._api_port), timeout=_PATIENCE_S) as api:
                api.sendall(request)
                answer = message(api)
        if fault == "drop answer":
            return False
        client.sendall(answer[: self._random.randrange(len(answer))] if fault == "cut answer" else answer)
        return fault != "cut answer"


def message(connection: socket.socket) -> bytes:
    """A whole request or answer; what there is when the other side ends before."""
    data = b""
    while b"\r\n\r\n" not in data:
        if not (part := connection.recv(65536)):
            return b""
        data += part
    head, _, body = data.partition(b"\r\n\r\n")
    fields = dict(line.lower().split(b": ", 1) for line in head.split(b"\r\n")[1:])
    size = int(fields.get(b"content-length", b"0"))
    while len(body) < size and (part := connection.recv(65536)):
        body += part
    return head + b"\r\n\r\n" + body
