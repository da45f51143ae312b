"""Many connections at once: how many turns of the loop it takes to let them in."""

from __future__ import annotations

import asyncio
import os
import socket
import threading

import pytest

from penstock.server.door import AT_ONCE
from penstock.server.listener import Server
from penstock.server.message import Reply, Request, Response

GET = b"GET / HTTP/1.1\r\nHost: h\r\n\r\n"
COMING = 3 * AT_ONCE


class Turns:
    """A handler that notes in which turn of the loop it is asked, and of what connection."""

    def __init__(self) -> None:
        self.turn = 0
        self.asked: list[int] = []

    def __call__(self, _request: Request, reply: Reply) -> None:
        self.asked.append(self.turn)
        reply(Response(200, b"{}"))


def turns_for_those_who_come_while_the_loop_is_busy(serve) -> int:
    """From the first request to the last, when all have connected and sent one before the loop looks."""
    handler = Turns()
    served = serve(handler)
    held, go = threading.Event(), threading.Event()

    def count() -> None:
        handler.turn += 1
        if len(handler.asked) < COMING:
            served.loop.call_soon(count)

    served.loop.call_soon_threadsafe(lambda: (held.set(), go.wait(10), count()))
    assert held.wait(10)
    clients = [served.client() for _ in range(COMING)]
    for client in clients:
        client.send(GET)
    go.set()
    assert [client.answer().status for client in clients] == [200] * COMING
    return handler.asked[-1] - handler.asked[0]


def test_those_who_came_while_the_loop_was_busy_are_let_in_together(serve):
    assert turns_for_those_who_come_while_the_loop_is_busy(serve) < COMING / 10


def test_control_the_loop_alone_lets_one_in_in_a_turn(serve, monkeypatch):
    monkeypatch.setattr(Server, "_accept", lambda *_: None)
    assert turns_for_those_who_come_while_the_loop_is_busy(serve) >= COMING - 1


@pytest.mark.parametrize("option", [(socket.IPPROTO_TCP, socket.TCP_NODELAY), (socket.SOL_SOCKET, socket.SO_KEEPALIVE)])
def test_who_is_let_in_behind_another_has_the_same_socket(serve, option):
    """An answer in two writes would wait for the client's acknowledgement without the first."""
    served = serve()
    held, go = threading.Event(), threading.Event()
    served.loop.call_soon_threadsafe(lambda: (held.set(), go.wait(10)))
    assert held.wait(10)
    clients = [served.client() for _ in range(3)]
    go.set()
    for client in clients:
        client.ask(GET)
    sockets = [one._transport.get_extra_info("socket") for one in served.server.connections]
    assert len(sockets) == 3
    assert len({one.getsockopt(*option) for one in sockets}) == 1
    assert {os.get_blocking(one.fileno()) for one in sockets} == {False}


def test_a_drain_ends_behind_those_whom_it_lets_in(serve):
    """All of them wait in the kernel: nobody else is there who would keep the drain from its end."""
    served = serve()
    ((listener, _),) = served.server._listeners
    served.on_loop(listener.close)
    clients = [served.client() for _ in range(20)]
    for client in clients:
        client.send(GET)

    async def drained() -> int:
        await served.server.drain(5.0)
        return len(served.server._arriving)

    assert asyncio.run_coroutine_threadsafe(drained(), served.loop).result(10) == 0
    assert {client.answer().status for client in clients} <= {200, 503}
