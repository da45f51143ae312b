"""One HTTP/1.1 connection: requests in, answers out, deadlines. Framing is parser.py's; no routes, no events.

One request of a connection is handled at a time. Complete requests that arrived together wait in a queue, anything behind
them waits unparsed, and the socket is not read meanwhile. No task, future or timer belongs to a request: a connection
notes when it last got somewhere, and the server looks at all of them once in `sweep_s` (crowd.py).

Who may not send is refused before his body is there, and bodies that arrive are bounded together. Both are looked at only when
a connection waits for more of a body: a request that came whole in one read costs nothing of this.

Who is told to come later is not read for a moment when there are many such (patience.py).

Who is refused while the request is still arriving gets the answer and the end of the stream at once, and what still comes
is thrown away for `linger_s`: closing a socket with unread bytes would reset it, and the client would lose the answer.
"""

from __future__ import annotations

import asyncio
import socket
import struct
from http import HTTPStatus
from typing import TYPE_CHECKING, cast

from penstock.errors import HubBusy, PenstockError, RequestTimeout
from penstock.server import trace
from penstock.server.message import Line, Request, Response
from penstock.server.parser import Arriving, Parser, draining
from penstock.server.problems import problem

if TYPE_CHECKING:
    from penstock.server.listener import Server

# Of an answer within `write_s`, or all of it: a byte now and then does not hold it for ever.
_READ_BYTES_LEAST = 64 << 10
_BODY = Arriving.BODY  # what a member of an enum costs to look up is too much for each read
_LATER = frozenset((429, 503))
_RESET = struct.pack("ii", 1, 0)
_STATUS = {status.value: b"HTTP/1.1 %d %s" % (status, status.phrase.encode()) for status in HTTPStatus}


class Connection(asyncio.Protocol):
    """One client. `_current` is the request that is being handled, `_held` what waits unparsed behind it."""

    __slots__ = (
        *("_arriving_bytes", "_blocked", "_closing", "_current", "_ended", "_held", "_line", "_parser"),
        *("_paused", "_peer", "_resting", "_server", "_since", "_stepping", "_transport", "_unsent"),
    )

    def __init__(self, server: Server) -> None:
        self._server = server
        self._transport: asyncio.Transport | None = None
        self._parser = Parser(server.limits)
        self._held = b""
        self._peer = ""
        self._line = Line()
        self._current: Request | None = None
        self._since = server.now
        self._unsent = 0
        self._arriving_bytes = 0
        self._stepping = self._paused = self._blocked = self._resting = self._closing = self._ended = False

    # What the transport calls

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        peer = transport.get_extra_info("peername")
        self._peer = peer[0] if peer else "gone"
        try:
            refusal = self._server.enter(self, self._peer)
        except ConnectionAbortedError:
            self._transport.abort()
        else:
            if refusal is not None:
                self._refuse(refusal)

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self._held = b""
        self._count(0)
        self._server.forget(self)

    def eof_received(self) -> bool:
        """A client that ends its side still gets the answers to what arrived whole; half a request is dropped."""
        self._ended = True
        half_open = self._transport is not None and self._transport.can_write_eof()  # TLS closes both ways at once
        return half_open and not self._closing and (self._current is not None or self._blocked or self._resting)

    def pause_writing(self) -> None:
        self._blocked = True
        self._since = self._server.now

    def resume_writing(self) -> None:
        self._blocked = False
        self._since = self._server.now
        self._step()

    def data_received(self, data: bytes) -> None:
        if self._closing:
            return
        if self._current is None and not self._blocked and not self._resting:
            self._parse(data)
            self._step()
            return
        self._held += data
        if not self._paused and self._transport is not None:
            self._paused = True
            self._transport.pause_reading()

    # In: one request at a time to the handler

    def _parse(self, data: bytes) -> None:
        parser = self._parser
        before = parser.arriving
        parser.draining = self._server.draining
        parser.feed(data)
        if parser.arriving is not before:
            self._since = self._server.now
        if parser.arriving is _BODY:
            self._admit(parser)
        elif self._arriving_bytes:
            self._count(0)

    def _admit(self, parser: Parser) -> None:
        """More of a body is to come: whether it is wanted, and whether there is room."""
        server = self._server
        if not parser.admitted:
            parser.admitted = True
            head = parser.head()
            head.peer = self._peer
            try:
                server.admit(head)
            except Exception as error:
                parser.ready.append(error)
                return
        self._count(parser.kept_bytes)
        if server.arriving_bytes > server.limits.arriving_bytes_max:
            parser.ready.append(
                HubBusy("The bodies that are arriving fill the room that there is for them.", retry_after_s=1)
            )

    def _count(self, arriving_bytes: int) -> None:
        self._server.arriving_bytes += arriving_bytes - self._arriving_bytes
        self._arriving_bytes = arriving_bytes

    def _step(self) -> None:
        if self._stepping:  # the handler replied at once: the loop below goes on
            return
        self._stepping = True
        try:
            while self._current is None and not self._waits() and self._transport is not None:
                if self._parser.ready:
                    self._take(self._parser.ready.popleft())
                elif self._held:
                    held, self._held = self._held, b""
                    self._parse(held)
                else:
                    self._await_more(self._transport)
                    break
        finally:
            self._stepping = False

    def _waits(self) -> bool:
        """Whether the next request is to wait where it is."""
        return self._blocked or self._resting or self._closing

    def _take(self, item: Request | BaseException) -> None:
        if isinstance(item, BaseException):
            self._refuse(item if isinstance(item, PenstockError) else self._server.fault(item))
            return
        self._current = item
        item.peer, item.line = self._peer, self._line
        try:
            self._server.handler(item, self._reply)
        except Exception as error:
            failure = self._server.fault(error, **trace.fields(item.headers))
            if self._current is item:
                self._reply(trace.traced(item.headers, problem(failure)))

    def _await_more(self, transport: asyncio.Transport) -> None:
        if self._ended:
            self._close(transport)
            return
        if self._parser.expects:
            self._parser.expects = False
            transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        if self._paused:
            self._paused = False
            transport.resume_reading()

    # Out: one way for every answer

    def _reply(self, response: Response) -> None:
        request = self._current
        assert request is not None, "a request was answered twice"
        self._current = None
        transport = self._transport
        if transport is None or self._closing or transport.is_closing():
            return
        keep = request.keep_alive and not self._server.draining
        self._write(transport, response, keep, request.method)
        self._since = self._server.now
        if not keep:
            self._close(transport)
            return
        if response.status in _LATER and (rest_s := self._server.rest_s()):
            self._resting = True
            asyncio.get_running_loop().call_later(rest_s, self._rested)
        self._step()

    def _rested(self) -> None:
        self._resting = False
        self._step()

    def _write(self, transport: asyncio.Transport, response: Response, keep: bool, method: bytes) -> None:
        more = b"".join([b"%b: %b\r\n" % header for header in response.headers]) if response.headers else b""
        transport.write(
            b"%b\r\nDate: %b\r\nContent-Type: %b\r\nContent-Length: %d\r\n%b%b\r\n%b"
            % (
                _STATUS[response.status],
                self._server.date,
                response.content_type,
                len(response.body),
                more,
                b"" if keep else b"Connection: close\r\n",
                b"" if method == b"HEAD" else response.body,
            )
        )

    def _refuse(self, error: PenstockError) -> None:
        """Answer a request that has not arrived whole, end the stream, throw away what still comes."""
        transport = self._transport
        if transport is None or self._closing or transport.is_closing():
            return
        self._closing = True
        self._since = self._server.now
        self._count(0)
        headers = self._parser.headers if self._current is None else self._current.headers
        self._write(transport, trace.traced(headers, problem(error)), False, b"")
        self._parser.let_go()
        if self._ended:
            transport.close()
            return
        if transport.can_write_eof():  # through TLS the client learns from `Connection: close` that nothing follows
            transport.write_eof()
        if self._paused:
            transport.resume_reading()

    def _close(self, transport: asyncio.Transport) -> None:
        self._closing = True
        self._since = self._server.now
        transport.close()

    # What the server calls

    def check(self, now: float) -> None:
        """Enforce the deadlines."""
        transport = self._transport
        if transport is None:
            return
        unsent = transport.get_write_buffer_size()
        if unsent > self._unsent:
            self._unsent = unsent
        elif self._unsent and (not unsent or self._unsent - unsent >= _READ_BYTES_LEAST):
            self._unsent = unsent
            self._since = now
        limits = self._server.limits
        quiet_s = now - self._since - limits.sweep_s
        if unsent or self._closing:
            if quiet_s > (limits.write_s if unsent else limits.linger_s):
                # A reset: else the kernel keeps what it has of the answer, megabytes perhaps, for who does not read it.
                transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
                transport.abort()
        elif self._current is None:
            arriving = self._parser.arriving
            if arriving is Arriving.NOTHING and quiet_s > limits.idle_s:
                self._close(transport)
            elif arriving is Arriving.HEADER and quiet_s > limits.header_s:
                self._refuse(RequestTimeout(f"The header did not arrive within {limits.header_s:g} s."))
            elif arriving is Arriving.BODY and quiet_s > limits.body_s:
                self._refuse(RequestTimeout(f"The body did not arrive within {limits.body_s:g} s."))

    def idle_since(self) -> float | None:
        """None: something is arriving, under way or unread, or it ends already."""
        nothing = self._current is None and self._parser.arriving is Arriving.NOTHING
        return self._since if nothing and not (self._unsent or self._closing) else None

    def close_if_idle(self) -> None:
        if self._resting:  # what came meanwhile is to have its answer
            self._rested()
        idle = self._current is None and self._parser.arriving is Arriving.NOTHING
        if idle and not self._closing and self._transport is not None:
            self._close(self._transport)

    def abandon(self) -> None:
        """The last act of a drain: a request without an answer gets one, `not confirmed`; what was said already is cut."""
        if not self._closing:
            self._refuse(draining())
        elif self._transport is not None:
            self._transport.abort()
