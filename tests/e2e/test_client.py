"""The client behind a network that does everything wrong, killed again and again: each event is archived once, in order."""

from __future__ import annotations

import gzip
import random
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from tests.e2e.fault_proxy import FaultProxy
from tests.e2e.oracle import Batch, problems
from tests.e2e.system import SEED, System

FLIGHTS = Path(__file__).parents[1] / "data" / "flights-sample.ndjson.gz"
LANES = 2
CHUNK = 100
KILLS = 20
# A control has seen enough when one event is there twice.
CONTROL_LINES, CONTROL_KILLS = 1_000, 4

Make = Callable[..., System]

# Takes as many lines as it is told, and says when it has them; then it is killed, or told to flush.
CHILD = """
import sys
from penstock import Client
from penstock.client import sending

sending.BACKOFF_S, sending.PAUSE_S = (0.01, 0.1), (0.02, 0.1)
if "unnumbered" in sys.argv:
    from penstock.client import answers
    from penstock.client.transport import HttpTransport

    post, settled = HttpTransport.post, answers._settled

    def unnumbered(self, body, headers):
        return post(self, body, {name: value for name, value in headers.items() if name != "Penstock-Producer"})

    HttpTransport.post = unnumbered
    answers._settled = lambda reply, status, batch, events: settled(reply, status, reply.batch, events)

with Client(sys.argv[1], spool=sys.argv[2], lanes=2, batch_events=40, linger_s=0.02, timeout_s=0.5) as client:
    for command in sys.stdin.buffer:
        if command == b"flush\\n":
            client.flush(timeout_s=60)
            print("flushed", flush=True)
        else:
            client.send_many(sys.stdin.buffer.readline() for _ in range(int(command)))
            print("taken", flush=True)
"""


class Device:
    """The program that uses the client, as a process."""

    def __init__(self, url: str, spool: Path, *modes: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", CHILD, url, str(spool), *modes], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )

    def ask(self, command: bytes) -> None:
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write(command)
        self._process.stdin.flush()
        assert self._process.stdout.readline() in (b"taken\n", b"flushed\n")

    def end(self, *, kill: bool) -> None:
        assert self._process.stdin and self._process.stdout
        if kill:
            self._process.kill()
        self._process.stdin.close()
        assert self._process.wait(30) == (-9 if kill else 0)
        self._process.stdout.close()


def flights(*, control: bool) -> list[bytes]:
    return gzip.decompress(FLIGHTS.read_bytes()).splitlines()[: CONTROL_LINES if control else None]


def send_all(system: System, lines: list[bytes], *modes: str) -> list[str]:
    """What the oracle finds after all lines were sent through the proxy and the kills."""
    chosen, port = random.Random(SEED), urlsplit(system.url).port
    assert port
    kills = set(chosen.sample(range(len(lines) // CHUNK), CONTROL_KILLS if modes else KILLS))
    with FaultProxy(port, seed=SEED, rate=0.4) as proxy:
        url, spool = f"http://127.0.0.1:{proxy.port}", system.folder / "spool"
        device = Device(url, spool, *modes)
        for number, at in enumerate(range(0, len(lines), CHUNK)):
            part = lines[at : at + CHUNK]
            device.ask(b"%d\n" % len(part) + b"".join(line + b"\n" for line in part))
            if number in kills:
                # Any moment is as good as another: batches are being sealed, numbered and posted meanwhile.
                threading.Event().wait(chosen.random() * 0.1)
                device.end(kill=True)
                device = Device(url, spool, *modes)
        device.ask(b"flush\n")
        device.end(kill=False)
        assert modes or len(proxy.done) == len(FaultProxy.FAULTS) + 1, proxy.done
    system.settle()
    return problems(system.store, 16, [[Batch(lines)]])


@pytest.mark.parametrize("modes", [(), ("unnumbered",)], ids=["numbered", "control: unnumbered"])
def test_each_event_is_archived_once_behind_a_faulty_network_and_kills(
    make_either: Make, modes: tuple[str, ...]
) -> None:
    system = make_either().start()
    found = send_all(system, flights(control=bool(modes)), *modes)
    if modes:
        assert any("copies too many" in problem for problem in found)
    else:
        assert found == []
        assert system.stop() == 0


# `penstock send` with the patience of a test.
SEND = """
from penstock.cli import send
from penstock.cli.main import main
from penstock.client import sending

sending.BACKOFF_S, sending.PAUSE_S, send.ANSWER_TIMEOUT_S = (0.01, 0.1), (0.02, 0.1), 0.5
main()
"""


def send_file(system: System, lines: list[bytes], *, forgets: bool) -> list[str]:
    """What the oracle finds after a file was sent by one command that was killed and repeated. `forgets`: with a new spool each time."""
    chosen, port = random.Random(SEED), urlsplit(system.url).port
    assert port
    file = system.folder / "file.ndjson"
    file.write_bytes(b"".join(line + b"\n" for line in lines))
    with FaultProxy(port, seed=SEED, rate=0.3) as proxy:
        url = f"http://127.0.0.1:{proxy.port}"
        for attempt in range(CONTROL_KILLS if forgets else KILLS):
            spool = f"spool-{attempt if forgets else 0}"
            command = ("send", "file.ndjson", "--batch", "20", "--url", url, "--spool", spool)
            sending = system.process(*command, program=("-c", SEND), log=f"send-{attempt}")
            threading.Event().wait(0.4 + 0.4 * chosen.random())
            if sending.ended:
                break
            sending.kill()
            if (
                "accepted in" in sending.text()
            ):  # killed behind its report: who is told that all is sent does not send it again
                break
        else:
            sending = system.process(*command, program=("-c", SEND), log="send-last")
            assert sending.wait(120) == 0, sending.text()
        assert "accepted in" in sending.text()
        assert forgets or (attempt > 5 and len(proxy.done) == len(FaultProxy.FAULTS) + 1), (attempt, proxy.done)
    system.settle()
    return problems(system.store, 16, [[Batch(lines)]])


@pytest.mark.parametrize("forgets", [False, True], ids=["", "control: a new spool each time"])
def test_a_file_is_archived_once_behind_a_faulty_network_and_kills(make_either: Make, forgets: bool) -> None:
    system = make_either().start()
    found = send_file(system, flights(control=forgets), forgets=forgets)
    if forgets:
        assert any("copies too many" in problem for problem in found)
    else:
        assert found == []
        assert system.stop() == 0
