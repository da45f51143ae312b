"""The door of a TLS port: who comes has a seat before he shakes hands.

A loop's own TLS server knows of a connection when its handshake is done. Until then nobody would count it, and a client that says nothing
would hold a descriptor for each socket that it opens. So sockets are accepted here, and refused by closing them: without a handshake
there is nothing to tell a client in.
"""

from __future__ import annotations

import asyncio
import functools
import socket
from collections.abc import Callable
from typing import Protocol

from penstock.errors import PenstockError
from penstock.server.crowd import Guest
from penstock.server.parser import Limits
from penstock.server.tls import Certificates

_HANDSHAKE_S_MAX = 10.0
AT_ONCE = 64
_BACKLOG = 4096
_NO_DESCRIPTOR_S = 1.0


class Seats(Protocol):
    """Who is let in, of the connections and of those that shake hands (listener.py)."""

    def enter(self, guest: Guest, host: str) -> PenstockError | None: ...
    def forget(self, guest: Guest) -> None: ...


class Handshake:
    """The guest in whose seat the connection sits down. The loop has his deadline; where a seat is needed, he counts as idle."""

    def __init__(self, since: float, task: asyncio.Task[object]) -> None:
        self._since = since
        self._task = task

    def check(self, now: float) -> None:
        """Nothing to be done."""

    def idle_since(self) -> float | None:
        return self._since

    def close_if_idle(self) -> None:
        self._task.cancel()

    def abandon(self) -> None:
        self._task.cancel()


class Door:
    """Accepts on one listening socket, which is its own from then on, until it is closed."""

    def __init__(
        self,
        seats: Seats,
        factory: Callable[[], asyncio.Protocol],
        listening: socket.socket,
        *,
        certificates: Certificates,
        limits: Limits,
    ) -> None:
        self._seats = seats
        self._factory = factory
        self._listening = listening
        self._certificates = certificates
        self._handshake_s = min(limits.header_s, _HANDSHAKE_S_MAX)
        self._shutdown_s = limits.linger_s
        self._shaking: dict[asyncio.Protocol, Handshake] = {}
        self._again: asyncio.TimerHandle | None = None
        self._loop = asyncio.get_running_loop()
        listening.setblocking(False)
        listening.listen(_BACKLOG)
        self._open()

    def close(self) -> None:
        """Take what the kernel has queued, and no more."""
        self._loop.remove_reader(self._listening)
        self._accept(_BACKLOG)
        if self._again is not None:
            self._again.cancel()
        self._listening.close()

    def through(self, connection: asyncio.Protocol) -> Handshake | None:
        """Whose handshake is done, if it was here: from now on his seat is the connection's affair."""
        return self._shaking.pop(connection, None)

    def _open(self) -> None:
        self._loop.add_reader(self._listening, self._accept, AT_ONCE)

    def _accept(self, at_most: int) -> None:
        for _ in range(at_most):
            try:
                accepted, address = self._listening.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except (
                OSError
            ):  # no file descriptor: the socket stays readable, and asking it in each turn would help nobody
                self._loop.remove_reader(self._listening)
                self._again = self._loop.call_later(_NO_DESCRIPTOR_S, self._open)
                return
            self._take(accepted, address[0])

    def _take(self, accepted: socket.socket, host: str) -> None:
        connection = self._factory()
        task = self._loop.create_task(self._shake(connection, accepted))
        handshake = Handshake(self._loop.time(), task)
        try:
            refused = self._seats.enter(handshake, host) is not None
        except ConnectionAbortedError:
            refused = True
        self._shaking[connection] = handshake
        task.add_done_callback(functools.partial(self._done, connection, accepted))
        if refused:
            task.cancel()

    async def _shake(self, connection: asyncio.Protocol, accepted: socket.socket) -> None:
        await self._loop.connect_accepted_socket(
            lambda: connection,
            accepted,
            ssl=self._certificates.context,
            ssl_handshake_timeout=self._handshake_s,
            ssl_shutdown_timeout=self._shutdown_s,
        )

    def _done(self, connection: asyncio.Protocol, accepted: socket.socket, task: asyncio.Task[None]) -> None:
        if not task.cancelled():
            task.exception()  # a client that does not shake hands properly is nobody's concern
        handshake = self._shaking.pop(connection, None)
        if handshake is not None:
            self._seats.forget(handshake)
            accepted.close()
