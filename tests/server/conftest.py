"""A server in a thread of its own, and clients that are plain sockets."""

from __future__ import annotations

import asyncio
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import pytest
import uvloop

from penstock.clock import SystemClock
from penstock.server.listener import Server
from penstock.server.message import Handler, Reply, Request, Response
from penstock.server.parser import Limits
from penstock.server.tls import Certificates
from penstock.testing import MemoryLog

QUICK = Limits(header_s=0.3, body_s=0.3, idle_s=0.3, write_s=0.3, linger_s=0.3, grace_s=0.1, sweep_s=0.02)
PATIENCE_S = 10.0


def listening(family: int = socket.AF_INET) -> socket.socket:
    made = socket.socket(family)
    made.bind(("127.0.0.1", 0))
    made.listen(128)
    return made


def echo(request: Request, reply: Reply) -> None:
    body = b"|".join((request.method, request.path, request.query, request.body))
    reply(Response(200, body, b"text/plain"))


class Answer(NamedTuple):
    status: int
    headers: dict[bytes, bytes]
    body: bytes
    interim: tuple[int, ...] = ()


class Client:
    """One connection. Answers are read exactly: what follows stays in `rest`."""

    def __init__(self, address: tuple[str, int], *, receive_bytes: int | None = None, source: str = "") -> None:
        self.socket = socket.socket()
        if source:
            self.socket.bind((source, 0))
        if receive_bytes is not None:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
        self.socket.settimeout(PATIENCE_S)
        try:
            self.socket.connect(address)
        except OSError:
            self.socket.close()
            raise
        self.rest = b""

    def send(self, data: bytes) -> None:
        self.socket.sendall(data)

    def answer(self, *, head: bool = False) -> Answer:
        interim: list[int] = []
        while True:
            top, _, self.rest = self._until(b"\r\n\r\n").partition(b"\r\n\r\n")
            status = int(top.split(b" ", 2)[1])
            if status >= 200:
                break
            interim.append(status)
        lines = [line.partition(b": ") for line in top.split(b"\r\n")[1:]]
        headers = {name.lower(): value for name, _, value in lines}
        assert len(headers) == len(lines)
        length = 0 if head else int(headers[b"content-length"])
        while len(self.rest) < length:
            self.rest += self._receive()
        body, self.rest = self.rest[:length], self.rest[length:]
        return Answer(status, headers, body, tuple(interim))

    def ask(self, data: bytes) -> Answer:
        self.send(data)
        return self.answer()

    def ended(self) -> bytes:
        """What is left until the server ends the stream; a reset is an error."""
        while part := self.socket.recv(65536):
            self.rest += part
        return self.rest

    def reset(self) -> None:
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.socket.close()

    def _until(self, mark: bytes) -> bytes:
        while mark not in self.rest:
            self.rest += self._receive()
        return self.rest

    def _receive(self) -> bytes:
        part = self.socket.recv(65536)
        if not part:
            raise EOFError(f"the server ended the stream after {self.rest!r}")
        return part


@dataclass
class Served:
    """A running server. `on_loop` runs something on its loop and waits."""

    server: Server
    loop: asyncio.AbstractEventLoop
    address: tuple[str, int]
    log: MemoryLog
    clients: list[Client] = field(default_factory=list)

    def client(self, *, receive_bytes: int | None = None, source: str = "") -> Client:
        made = Client(self.address, receive_bytes=receive_bytes, source=source)
        self.clients.append(made)
        return made

    def ask(self, data: bytes) -> Answer:
        return self.client().ask(data)

    def start_drain(self, timeout_s: float) -> Callable[[], None]:
        future = asyncio.run_coroutine_threadsafe(self.server.drain(timeout_s), self.loop)
        return lambda: future.result(PATIENCE_S)

    def on_loop(self, act: Callable[[], object]) -> None:
        done = threading.Event()
        self.loop.call_soon_threadsafe(lambda: (act(), done.set()))
        assert done.wait(PATIENCE_S)

    def until(self, condition: Callable[[], object]) -> None:
        """Wait for something on the loop's thread, by looking after each of its turns."""
        found = threading.Event()

        def look() -> None:
            if condition():
                found.set()
            else:
                self.loop.call_later(0.002, look)

        self.loop.call_soon_threadsafe(look)
        assert found.wait(PATIENCE_S)


Serve = Callable[..., Served]


@pytest.fixture
def serve() -> Iterator[Serve]:
    with ExitStack() as stack:

        def start(
            handler: Handler = echo, limits: Limits = QUICK, certificates: Certificates | None = None, **given: Any
        ) -> Served:
            loop = uvloop.new_event_loop()
            log = MemoryLog()
            server = Server(handler, limits=limits, clock=SystemClock(), log=log, certificates=certificates, **given)
            sock = listening()
            address = sock.getsockname()
            thread = threading.Thread(target=loop.run_forever)
            thread.start()
            asyncio.run_coroutine_threadsafe(server.start([sock]), loop).result(PATIENCE_S)
            served = Served(server, loop, address, log)

            def stop() -> None:
                for client in served.clients:
                    client.socket.close()
                if not server.draining:
                    served.start_drain(0.2)()
                loop.call_soon_threadsafe(loop.stop)
                thread.join(PATIENCE_S)
                loop.close()

            stack.callback(stop)
            return served

        yield start
