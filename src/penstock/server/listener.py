"""The sockets that connections come from, and the connections that there are: accept, look after, drain."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import socket
from collections.abc import Sequence
from email.utils import formatdate

from penstock.clock import Clock
from penstock.errors import PenstockError
from penstock.server.crowd import TICKS, Crowd, Guest
from penstock.server.door import AT_ONCE, Door
from penstock.server.http import Connection
from penstock.server.message import Admit, Handler, admit_all
from penstock.server.parser import Limits
from penstock.server.patience import Patience
from penstock.server.problems import unexpected
from penstock.server.tls import Certificates
from penstock.telemetry.log import Log

_BACKLOG = 4096


class Server:
    """Serves one handler on sockets that listen already. Lives on one event loop."""

    def __init__(
        self,
        handler: Handler,
        *,
        limits: Limits,
        clock: Clock,
        log: Log,
        admit: Admit = admit_all,
        certificates: Certificates | None = None,
    ) -> None:
        self.handler = handler
        self.admit = admit
        self.arriving_bytes = 0
        self._certificates = certificates
        self.limits = limits
        self.crowd = Crowd(limits)
        self.draining = False
        self.now = 0.0
        self.date = b""
        self._clock = clock
        self._patience = Patience()
        self._log = log
        self._listeners: list[tuple[asyncio.Server, socket.socket]] = []
        self._doors: list[Door] = []
        self._arriving: set[asyncio.Task[object]] = set()
        self._sweeper: asyncio.TimerHandle | None = None
        self._empty = asyncio.Event()

    async def start(self, sockets: Sequence[socket.socket]) -> None:
        loop = asyncio.get_running_loop()
        self._sweep(loop)
        for listening in sockets:
            if self._certificates is not None:
                door = Door(self, self._connection, listening, certificates=self._certificates, limits=self.limits)
                self._doors.append(door)
                continue
            # The copy outlives the listener, so that what the kernel has queued can still be accepted when that closes.
            copy = listening.dup()
            copy.setblocking(False)
            listener = await loop.create_server(
                functools.partial(self._first_of, copy), sock=listening, backlog=_BACKLOG
            )
            self._listeners.append((listener, copy))

    async def drain(self, timeout_s: float) -> None:
        """Stop accepting, answer what is under way, close the rest; after `timeout_s` close that too."""
        self.draining = True
        for listener, copy in self._listeners:
            listener.close()
            with copy:
                self._accept(copy, _BACKLOG)
        await asyncio.gather(*self._arriving, return_exceptions=True)
        for door in self._doors:
            door.close()
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

    def enter(self, guest: Guest, host: str) -> PenstockError | None:
        """Take a connection in, or why not (crowd.py). Who comes through a door has a seat, which is given back and taken at once."""
        for door in self._doors:
            if isinstance(guest, Connection) and (handshake := door.through(guest)) is not None:
                self.crowd.leave(handshake)
        return self.crowd.enter(guest, host)

    def forget(self, guest: Guest) -> None:
        self.crowd.leave(guest)
        if self.draining and not self.crowd.connections:
            self._empty.set()

    def rest_s(self) -> float:
        """For how long a connection whose request was just refused for now is not to be read (patience.py)."""
        return self._patience.rest_s(self._clock.monotonic())

    def fault(self, error: BaseException, **about: object) -> PenstockError:
        """Log what should not have happened, once; the error to answer with. `about` the request are more fields of the line."""
        self._log.error("A request failed for a reason that the server does not know.", **about, exc_info=error)
        return unexpected(error)

    def _connection(self) -> Connection:
        return Connection(self)

    def _first_of(self, listening: socket.socket) -> Connection:
        """The connection that the loop has accepted, and those that wait behind it.

        libuv accepts one in a turn of the loop. A turn takes 5 to 10 ms where there is too much to do, so that 1,000 that came at once
        waited up to 6 s, and what they sent meanwhile lay unread, neither stored nor refused.
        """
        self._accept(listening, AT_ONCE)
        return self._connection()

    def _accept(self, listening: socket.socket, at_most: int) -> None:
        loop = asyncio.get_running_loop()
        with contextlib.suppress(OSError):  # none left, or no file descriptor to take it
            for _ in range(at_most):
                accepted, _ = listening.accept()
                task = loop.create_task(loop.connect_accepted_socket(self._connection, accepted))
                self._arriving.add(task)
                task.add_done_callback(self._arrived)

    def _arrived(self, task: asyncio.Task[object]) -> None:
        self._arriving.discard(task)
        if not task.cancelled():
            task.exception()  # a client that is gone already is nobody's concern

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
