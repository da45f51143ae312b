"""The API: its routes as data, and a worker process that serves them.

    Route(method, path, action, where, right, about)    where: the listener for everyone, the admin listener, or both

A path is exact, or has `{names}` that each stand for one segment (`{hub}`: for one that is not the API's own).
What an action is given of those is percent-decoded and otherwise as it came: whether it is a device, a producer or a number is for the
action to say.
"""

from __future__ import annotations

import asyncio
import ctypes
import enum
import functools
import gc
import os
import resource
import signal
import socket
import sys
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, Protocol
from urllib.parse import unquote_to_bytes

import uvloop

from penstock.clock import Clock
from penstock.errors import MethodNotAllowed, NotFound, PenstockError
from penstock.server import operations as told
from penstock.server import trace
from penstock.server.answers import Health
from penstock.server.auth import Guard, check, no_guard
from penstock.server.eventhubs import NO_HUBS, EventHubs
from penstock.server.framing import Intake
from penstock.server.listener import Server
from penstock.server.message import Reply, Request, Response, Right
from penstock.server.openapi import Operation
from penstock.server.pages import pages
from penstock.server.parser import Limits
from penstock.server.problems import problem, unexpected
from penstock.server.read import Names, Reads, json
from penstock.server.tls import Certificates
from penstock.telemetry.log import Log

_READERS = 2
_NONE = Right.NONE
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3  # malloc.h

Action = Callable[[Request, Names, Reply], None]
Blocking = Callable[[Request, Names], Response]


class Where(enum.Flag):
    LISTEN = enum.auto()
    ADMIN = enum.auto()


class Route(NamedTuple):
    method: bytes
    path: bytes
    action: Action
    where: Where
    right: Right = Right.NONE
    about: Operation | None = None


class Units(Protocol):
    """The throughput units."""

    def get(self, request: Request, names: Names) -> Response: ...
    def put(self, request: Request, names: Names) -> Response: ...


class App(NamedTuple):
    """The handlers of both listeners, and what is to be closed, on the loop's thread, after the last answer."""

    listen: Router
    admin: Router
    close: Callable[[], None]


def make_app(
    ingest: Intake,
    reads: Reads,
    *,
    close: Callable[[], None],
    log: Log,
    guard: Guard = no_guard,
    units: Units | None = None,
) -> App:
    """The API over an intake and what can be read. To be called on the event loop's thread."""
    readers = ThreadPoolExecutor(_READERS, thread_name_prefix="read")
    every = routes(ingest, reads, functools.partial(_in_thread, readers, log), units)

    def close_all() -> None:
        readers.shutdown(wait=False, cancel_futures=True)
        close()

    listen, admin = (
        Router(with_pages([route for route in every if where in route.where], where, guard), guard)
        for where in (Where.LISTEN, Where.ADMIN)
    )
    return App(listen, admin, close_all)


def with_pages(served: Sequence[Route], where: Where, guard: Guard = no_guard) -> list[Route]:
    """The routes of a listener, and those that describe them."""
    described = pages(served, open_to_anyone=guard is no_guard)
    return [
        *served,
        *(Route(page.method, page.path, _always(page.answer), where, about=page.about) for page in described),
    ]


def _always(answer: Response) -> Action:
    return lambda _request, _names, reply: reply(answer)


def routes(
    ingest: Intake, reads: Reads, run: Callable[[Blocking], Action], units: Units | None = None
) -> tuple[Route, ...]:
    """All that the API answers. `run` makes an action of what blocks."""
    listen, admin, both = Where.LISTEN, Where.ADMIN, Where.LISTEN | Where.ADMIN
    send, read, manage = Right.SEND, Right.LISTEN, Right.MANAGE
    return (
        Route(
            b"POST", b"/v1/events", lambda request, _, reply: ingest.post(request, None, reply), listen, send, told.SEND
        ),
        Route(
            b"POST",
            b"/v1/devices/{device}/events",
            lambda r, names, reply: ingest.post(r, names[0], reply),
            listen,
            send,
            told.SEND_OF_DEVICE,
        ),
        Route(b"GET", b"/v1/partitions", run(reads.partitions), listen, read, told.PARTITIONS),
        Route(b"GET", b"/v1/partitions/{n}", run(reads.partition), listen, read, told.PARTITION),
        Route(b"GET", b"/v1/partitions/{n}/events", run(reads.events), listen, read, told.EVENTS),
        Route(b"GET", b"/v1/partitions/{n}/offset", run(reads.offset), listen, read, told.OFFSET),
        Route(b"GET", b"/v1/producers/{id}", run(reads.producer), listen, send | read, told.PRODUCER),
        Route(b"GET", b"/v1/status", run(reads.status), both, read, told.STATUS),
        Route(b"GET", b"/health/live", _always(json(Health(True))), both, about=told.LIVE),
        Route(b"GET", b"/health/ready", run(reads.ready), both, about=told.READY),
        Route(b"POST", b"/v1/cut", run(reads.cut), admin, manage, told.CUT),
        Route(b"DELETE", b"/v1/groups/{group}", run(reads.forget), admin, manage, told.FORGET),
        *(_of_units(units, run) if units is not None else ()),
        *(Route(b"POST", path, action, listen, send, about) for path, action, about in EventHubs(ingest).paths()),
    )


def _of_units(units: Units, run: Callable[[Blocking], Action]) -> Iterable[Route]:
    path = b"/v1/throughput-units"
    yield Route(b"GET", path, run(units.get), Where.ADMIN, Right.LISTEN, told.UNITS)
    yield Route(b"PUT", path, run(units.put), Where.ADMIN, Right.MANAGE, told.SET_UNITS)


class Router:
    """A handler that finds the action of a request and asks the guard; 404, 405, 401 and 403 are its own."""

    def __init__(self, served: Iterable[Route], guard: Guard = no_guard) -> None:
        self._guard = guard
        self._exact: dict[bytes, dict[bytes, Route]] = {}
        self._patterns: dict[tuple[bytes, ...], dict[bytes, Route]] = {}
        for route in served:
            if b"{" in route.path:
                self._patterns.setdefault(tuple(route.path.split(b"/")), {})[route.method] = route
            else:
                self._exact.setdefault(route.path, {})[route.method] = route

    def __call__(self, request: Request, reply: Reply) -> None:
        if b"traceparent" in request.headers:
            reply = trace.tracing(request.headers, reply)
        try:
            route, names = self._find(request)
            if route.right is not _NONE:
                request.grant = self._guard(request)
                check(request.grant, route.right)
        except PenstockError as error:
            reply(problem(error))
            return
        route.action(request, names, reply)

    def admit(self, request: Request) -> None:
        """Whether to wait for the rest of a request (message.py Admit)."""
        route, _ = self._find(request)
        if route.right is not _NONE:
            check(self._guard(request), route.right)

    def _find(self, request: Request) -> tuple[Route, Names]:
        methods = self._exact.get(request.path)
        names: Names = ()
        if methods is None:
            methods, names = self._match(request.path)
        if methods is None:
            raise NotFound("There is nothing at this path.")
        route = methods.get(b"GET" if request.method == b"HEAD" else request.method)
        if route is None:
            allow = [method.decode() for method in methods] + ["HEAD"] * (b"GET" in methods)
            raise MethodNotAllowed(f"This path takes {', '.join(allow)}.", allow=allow)
        return route, names

    def _match(self, path: bytes) -> tuple[dict[bytes, Route] | None, Names]:
        segments = path.split(b"/")
        for pattern, methods in self._patterns.items():
            if len(pattern) == len(segments) and all(map(_fits, pattern, segments)):
                given = [got for want, got in zip(pattern, segments, strict=True) if want.startswith(b"{")]
                return methods, tuple(unquote_to_bytes(name).decode("utf-8", "replace") for name in given)
        return None, ()


def _fits(want: bytes, got: bytes) -> bool:
    """Whether a segment is what a pattern has there. The name of a hub is anyone's choice, but not the API's own words."""
    return want == got or (want.startswith(b"{") and (want != b"{hub}" or got not in NO_HUBS))


def answer(work: Blocking, log: Log, request: Request, names: Names) -> Response:
    """What `work` returns, or the answer for what it raises."""
    try:
        return work(request, names)
    except PenstockError as error:
        return problem(error)
    except Exception as error:  # the top of a reader's thread: the client must get an answer
        about = {"path": request.path.decode("latin-1"), **trace.fields(request.headers)}
        log.error("A request could not be answered.", **about, exc_info=error)
        return problem(unexpected(error))


def _in_thread(readers: ThreadPoolExecutor, log: Log, work: Blocking) -> Action:
    def action(request: Request, names: Names, reply: Reply) -> None:
        done = asyncio.get_running_loop().run_in_executor(readers, answer, work, log, request, names)
        done.add_done_callback(lambda future: None if future.cancelled() else reply(future.result()))

    return action


class Service(NamedTuple):
    """How a worker serves: sockets that listen already, how long it may take to stop, and the processor that it has to itself, if any.

    `certificates`: the listener for everyone speaks TLS; the admin listener never does.
    """

    listen: Sequence[socket.socket]
    admin: Sequence[socket.socket]
    limits: Limits
    drain_timeout_s: float
    clock: Clock
    log: Log
    core: int | None = None
    certificates: Certificates | None = None


def run_worker(service: Service, build: Callable[[], App], *, ready: Callable[[], None]) -> None:
    """Serve in this process until SIGTERM or SIGINT, then drain and return.

    `build` is called once, on the event loop's thread, before anything is accepted; `ready` when both listeners accept.
    """
    _tune_process(service.core)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_until_signal(service, build, ready))


def _tune_process(core: int | None) -> None:
    """Measured with `make bench`: together a seventh of the CPU per event."""
    if core is not None:
        # What the loop's thread has unzipped and split is in this processor's cache when the commit's thread zips it.
        os.sched_setaffinity(0, {core})
    # The commit thread waits for the disk most of the time; it gets the interpreter back sooner when it does not.
    sys.setswitchinterval(0.0005)
    # What was imported is never garbage.
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)
    # Each batch takes and frees some buffers of 100 KB and more: by default glibc maps and unmaps, and so faults, each of them anew.
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, 32 << 20)
        mallopt(_M_TRIM_THRESHOLD, 64 << 20)
        mallopt(_M_TOP_PAD, 4 << 20)


async def _until_signal(service: Service, build: Callable[[], App], ready: Callable[[], None]) -> None:
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    await serve(service, build(), ready=ready, stop=stop)


async def serve(service: Service, app: App, *, ready: Callable[[], None], stop: asyncio.Event) -> None:
    """Serve until `stop` is set; returns when every connection has had its answer or `drain_timeout_s` have passed."""
    log = service.log
    limits = service.limits._replace(connections_max=min(service.limits.connections_max, _connections_max()))
    servers = [
        Server(router, admit=router.admit, limits=limits, clock=service.clock, log=log, certificates=certificates)
        for router, certificates in ((app.listen, service.certificates), (app.admin, None))
    ]
    try:
        for server, sockets in zip(servers, (service.listen, service.admin), strict=True):
            await server.start(sockets)
        ready()
        await stop.wait()
        log.info("The worker stops accepting and finishes what is under way.")
        await asyncio.gather(*(server.drain(service.drain_timeout_s) for server in servers))
    finally:
        app.close()
    log.info("The worker has stopped.")


def _connections_max() -> int:
    """Three quarters of the files that this process may open at most: a connection beyond them is answered, not reset."""
    _, files_max = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (files_max, files_max))
    return sys.maxsize if files_max == resource.RLIM_INFINITY else files_max * 3 // 4
