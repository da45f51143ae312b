"""A hub behind the real server and its real routes, on a port of this process."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import uvloop

from penstock.clock import SystemClock
from penstock.server.app import make_app
from penstock.server.listener import Server
from penstock.server.parser import Limits
from penstock.server.read import Groups, Reads
from penstock.testing import MemoryLog

PATIENCE_S = 20.0


class NoIntake:
    def post(self, *_: object) -> None:
        raise AssertionError("nothing is posted here")


class NoGroups:
    """Notes who was heard; refuses nobody."""

    def __init__(self) -> None:
        self.heard_of: list[tuple[str, int, int, int]] = []

    def heard(self, group: str, partition: int, epoch: int, checkpoint: int) -> None:
        self.heard_of.append((group, partition, epoch, checkpoint))

    def forget(self, group: str) -> bool:
        return False


@contextmanager
def served(hub: Any, groups: Groups | None = None, *, port: int = 0) -> Iterator[str]:
    """The address of an API over `hub`."""
    loop = uvloop.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    log = MemoryLog()
    reads = Reads(hub, groups=groups or NoGroups(), status=dict, producer=lambda *_: None, check=lambda: None)

    async def start(sock: socket.socket) -> tuple[Server, Any]:
        app = make_app(NoIntake(), reads, close=lambda: None, log=log)  # type: ignore[arg-type]
        limits = Limits(grace_s=0.01, linger_s=0.2, sweep_s=0.05)
        server = Server(app.listen, limits=limits, clock=SystemClock(), log=log)  # type: ignore[arg-type]
        await server.start([sock])
        return server, app

    listening = socket.create_server(("127.0.0.1", port))
    server, app = asyncio.run_coroutine_threadsafe(start(listening), loop).result(PATIENCE_S)
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    finally:

        async def stop() -> None:
            await server.drain(0.2)
            app.close()

        asyncio.run_coroutine_threadsafe(stop(), loop).result(PATIENCE_S)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(PATIENCE_S)
        loop.close()
