"""A worker process from its start to its drain: real signals, real limits of the system."""

from __future__ import annotations

import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import pytest

WORKER = """
import asyncio, socket, sys, threading
from penstock.clock import SystemClock
from penstock.server.app import Service, make_app, run_worker
from penstock.server.message import Response
from penstock.server.parser import Limits
from penstock.server.read import Reads
from penstock.testing import MemoryHub, MemoryLog

class Intake:
    # A post is answered when the worker's standard input says so.
    def post(self, request, device, reply):
        self.loop.run_in_executor(None, sys.stdin.readline).add_done_callback(lambda _: reply(Response(200, b"{}")))
        print("posted", flush=True)

def listening():
    made = socket.create_server(("127.0.0.1", 0))
    print(made.getsockname()[1], flush=True)
    return made

def build():
    intake.loop = asyncio.get_running_loop()
    reads = Reads(MemoryHub(), groups=None, status=lambda: {"ok": True}, producer=lambda *_: None, check=lambda: None)
    return make_app(intake, reads, close=lambda: print("closed", flush=True), log=MemoryLog())

intake = Intake()
limits = Limits(grace_s=0.05, linger_s=0.2, sweep_s=0.05)
service = Service([listening()], [listening()], limits, 5.0, SystemClock(), MemoryLog())
run_worker(service, build, ready=lambda: print("ready", flush=True))
print("returned", flush=True)
"""

POST = b"POST /v1/events HTTP/1.1\r\nHost: h\r\nContent-Length: 2\r\n\r\n{}"


def get(path: str) -> bytes:
    return f"GET {path} HTTP/1.1\r\nHost: h\r\n\r\n".encode()


class Worker:
    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.listen, self.admin = int(self.line()), int(self.line())
        assert self.line() == "ready"

    def line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def answer_post(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()


@pytest.fixture
def start() -> Iterator[Callable[..., Worker]]:
    processes: list[subprocess.Popen[str]] = []

    def make(files_max: int | None = None) -> Worker:
        def limit() -> None:
            if files_max is not None:
                resource.setrlimit(resource.RLIMIT_NOFILE, (files_max, files_max))

        process = subprocess.Popen(
            [sys.executable, "-c", WORKER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            preexec_fn=limit,
        )
        processes.append(process)
        return Worker(process)

    yield make
    for process in processes:
        process.kill()
        process.communicate()


@pytest.fixture
def connect() -> Iterator[Callable[[int], socket.socket]]:
    made: list[socket.socket] = []

    def make(port: int) -> socket.socket:
        made.append(socket.create_connection(("127.0.0.1", port), timeout=10))
        return made[-1]

    yield make
    for each in made:
        each.close()


def status(connection: socket.socket) -> int:
    return int(connection.recv(65536).split(b" ", 2)[1])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_drains_both_listeners_and_the_worker_returns(start, connect, number):
    worker = start()
    busy, idle, admin = connect(worker.listen), connect(worker.listen), connect(worker.admin)
    for connection, path in ((idle, "/v1/partitions"), (admin, "/v1/status")):
        connection.sendall(get(path))
        assert status(connection) == 200
    busy.sendall(POST)
    assert worker.line() == "posted"
    worker.process.send_signal(number)
    assert (idle.recv(1), admin.recv(1)) == (b"", b"")
    worker.answer_post()
    assert status(busy) == 200
    assert busy.recv(1) == b""
    assert [worker.line(), worker.line()] == ["closed", "returned"]
    assert worker.process.wait(10) == 0


def test_a_worker_at_its_limit_of_open_files_refuses_and_goes_on_accepting(start, connect):
    worker = start(files_max=128)
    many = [connect(worker.listen) for _ in range(200)]
    seen = {200: 0, 503: 0, 0: 0}
    for connection in many:
        seen[live(connection)] += 1
    assert seen[200] == 96
    assert seen[503] >= 1
    for connection in many:
        connection.close()
    deadline = time.monotonic() + 10
    while live(connect(worker.listen)) != 200:
        assert time.monotonic() < deadline


def live(connection: socket.socket) -> int:
    """The status of an answer, 0 when the connection was cut."""
    try:
        connection.sendall(get("/health/live"))
        return status(connection)
    except (OSError, IndexError):
        return 0
