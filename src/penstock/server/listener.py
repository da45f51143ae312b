"""The sockets that connections come from, and the connections that there are: accept, look after, drain."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import socket
import ssl
from collections.abc import Sequence
from email.utils import formatdate
from typing import TypedDict

from penstock.clock import Clock
from penstock.errors import PenstockError
from penstock.server.crowd import TICKS, Crowd, Guest
from penstock.server.http import Connection
from penstock.server.message import Handler
from penstock.server.parser import Limits
from penstock.server.problems import unexpected
from penstock.server.tls import Certificates
from penstock.telemetry.log import Log

_BACKLOG = 4096


class _Tls(TypedDict, total=False):
    ssl: ssl.SSLContext
    ssl_handshake_timeout: float
    ssl_shutdown_timeout: float


class Server:
    """Serves one handler on sockets that listen already. Lives on one event loop."""

    def __init__(
        self, handler: Handler, *, limits: Limits, clock: Clock, log: Log, certificates: Certificates | None = None
    ) -> None:
        self.handler = handler
        self._certificates = certificates
        self.limits = limits
        self.crowd = Crowd(limits)
        self.draining = False
        self.now = 0.0
        self.date = b""
        self._clock = clock
        self._log = log
        self._listeners: list[tuple[asyncio.Server, socket.socket]] = []
        self._sweeper: asyncio.TimerHandle | None = None
        self._empty = asyncio.Event()

    async def start(self, sockets: Sequence[socket.socket]) -> None:
        loop = asyncio.get_running_loop()
        self._sweep(loop)
        for listening in sockets:
            # The copy outlives the listener, so that what the kernel has queued can still be accepted when that closes.
            copy = listening.dup()
            factory = functools.partial(Connection, self)
            listener = await loop.create_server(factory, sock=listening, backlog=_BACKLOG, **self._tls())
            self._listeners.append((listener, copy))

    async def drain(self, timeout_s: float) -> None:
        """Stop accepting, answer what is under way, close the rest; after `timeout_s` close that too."""
        self.draining = True
        for listener, copy in self._listeners:
            listener.close()
            await self._accept_queued(copy)
        # A request may be on its way on a connection that looks idle; a moment is enough to answer it.
        await self._wait_empty(min(self.limits.grace_s, timeout_s))
        for connection in self.connections:
            connection.close_if_idle()
        await self._wait_empty(timeout_s)
        for _ in ("answer", "cut"):
            for connection in self.connections:
                connection.abandon()
            await self._wait_empty(self.limits.grace_s)
        if self._sweeper is not None:
            self._sweeper.cancel()

    @property
    def connections(self) -> tuple[Guest, ...]:
        """All that there are now."""
        return tuple(self.crowd.connections)

    def enter(self, connection: Connection, host: str) -> PenstockError | None:
        return self.crowd.enter(connection, host)

    def forget(self, connection: Connection) -> None:
        self.crowd.leave(connection)
        if self.draining and not self.crowd.connections:
            self._empty.set()

    def fault(self, error: BaseException, **about: object) -> PenstockError:
        """Log what should not have happened, once; the error to answer with. `about` the request are more fields of the line."""
        self._log.error("A request failed for a reason that the server does not know.", **about, exc_info=error)
        return unexpected(error)

    async def _accept_queued(self, listening: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        listening.setblocking(False)
        taken = []
        with listening, contextlib.suppress(OSError):  # none left, or no file descriptor to take it
            while True:
                accepted, _ = listening.accept()
                taken.append(loop.connect_accepted_socket(functools.partial(Connection, self), accepted, **self._tls()))
        with contextlib.suppress(TimeoutError):  # of a client that is slow to shake hands
            await asyncio.wait_for(asyncio.gather(*taken, return_exceptions=True), self.limits.grace_s)

    def _tls(self) -> _Tls:
        """What the loop's calls are told of TLS. A connection is known here, and counted, when its handshake is done."""
        if self._certificates is None:
            return {}
        return {
            "ssl": self._certificates.context,
            "ssl_handshake_timeout": self.limits.header_s,
            "ssl_shutdown_timeout": self.limits.linger_s,
        }

    async def _wait_empty(self, timeout_s: float) -> None:
        if self.crowd.connections:
            try:
                await asyncio.wait_for(self._empty.wait(), timeout_s)
            except TimeoutError:
                return

    def _sweep(self, loop: asyncio.AbstractEventLoop) -> None:
        self.now = loop.time()
        self.date = formatdate(self._clock.now_ms() / 1000, usegmt=True).encode()
        if self._certificates is not None:
            self._certificates.renew()
        self.crowd.look(self.now)
        self._sweeper = loop.call_later(self.limits.sweep_s / TICKS, self._sweep, loop)
