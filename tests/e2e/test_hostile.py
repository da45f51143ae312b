"""Slow and hostile clients of an installation that runs: answered, cut off, nothing of theirs stored, and nobody else notices."""

from __future__ import annotations

import hashlib
import resource
import socket
import struct
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench.refused import REFUSED, UNFINISHED, WHOLE
from tests.e2e.http_client import Answer, Connection, head, request
from tests.e2e.oracle import Batch, problems
from tests.e2e.system import System, wait_for

PARTITIONS = 4
DEADLINE_S = 1.0
TIMES = [f"--{name}-timeout={DEADLINE_S:g}s" for name in ("header", "body", "idle", "write")]


class Rig:
    """The installation, and the good client's events."""

    def __init__(self, system: System) -> None:
        self.system = system
        self.sent: list[Batch] = []
        self._count = 0

    def event(self) -> bytes:
        self._count += 1
        return b'{"deviceId":"good-1","n":%d}' % self._count

    def good(self) -> None:
        """A good request on a connection of its own is taken."""
        line = self.event()
        answer = request(self.system.url, "POST", "/v1/events", line)
        assert (answer.status, answer.json["accepted"]) == (200, 1), answer
        self.sent.append(Batch([line]))

    def open(self, data: bytes = b"") -> Connection:
        connection = Connection(self.system.url)
        try:
            connection.send(data)
        except OSError:
            connection.close()
            raise
        return connection


def start(folder: Path, *options: str, workers: int = 2) -> System:
    return System(folder, partitions=PARTITIONS, workers=workers, options=options)


def settle(rig: Rig) -> None:
    """Exactly the good events are in the store, each once, and no process has died."""
    rig.system.settle()
    assert problems(rig.system.store, PARTITIONS, [rig.sent]) == []
    assert all(part["restarts"] == 0 for part in rig.system.run_file()["parts"])
    log = rig.system.up.text()
    assert '"level":"error"' not in log, log


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    system = start(tmp_path_factory.mktemp("hostile"), *TIMES)
    try:
        rig = Rig(system.start())
        yield rig
        settle(rig)
    finally:
        system.close()


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    """One worker with room for twenty connections, five of an address."""
    system = start(
        tmp_path_factory.mktemp("small"), "--connections-max", "20", "--connections-per-address-max", "5", workers=1
    )
    try:
        rig = Rig(system.start())
        yield rig
        settle(rig)
    finally:
        system.close()


def refused(answer: Answer | None, status: int, code: str) -> None:
    assert answer is not None, f"no answer instead of {status} {code}"
    assert (answer.status, answer.json["code"]) == (status, code), answer
    assert answer.headers["connection"] == "close"


@pytest.mark.parametrize("name", REFUSED)
def test_79_to_82_each_hostile_request_is_refused_and_ends_its_connection(rig: Rig, name: str) -> None:
    row = REFUSED[name]
    before = rig.system.ends()
    with rig.open(row.data + WHOLE) as connection:
        refused(connection.answer(), row.status, row.code)
        assert connection.answer() is None, "what comes behind it is not read"
    assert rig.system.ends() == before
    rig.good()


def test_control_what_stands_behind_the_hostile_requests_is_good(rig: Rig) -> None:
    """Else nothing would be stored for another reason."""
    with rig.open(WHOLE) as connection:
        answer = connection.answer()
    assert answer is not None and answer.status == 200
    rig.sent.append(Batch([WHOLE.rpartition(b"\r\n\r\n")[2]]))


def test_78_a_request_that_does_not_arrive_whole_is_answered_408(rig: Rig) -> None:
    before = rig.system.ends()
    slow = {name: rig.open(data) for name, data in UNFINISHED.items()}
    rig.good()
    for name, connection in slow.items():
        with connection:
            answer = connection.answer()
            assert answer is not None, name
            refused(answer, 408, "request_timeout")
            assert connection.answer() is None
    assert sum(rig.system.ends()) == sum(before) + 1


DRIPS = {
    "header": b"POST /v1/events HTTP/1.1\r\nX: ",
    "body": head("POST", "/v1/events", {"Content-Length": "100000"}),
    "extension": head("POST", "/v1/events", {"Transfer-Encoding": "chunked"}) + b"1;",
    "trailer": head("POST", "/v1/events", {"Transfer-Encoding": "chunked"}) + b"1\r\nx\r\n0\r\nX: ",
    "behind a good one": head("GET", "/health/live", {}) + b"POST ",
}


def test_78_a_byte_now_and_then_holds_no_connection_beyond_its_deadline(rig: Rig) -> None:
    """Ten bytes within the deadline, and still it is over at the deadline of the first."""
    slow = {name: rig.open(data) for name, data in DRIPS.items()}
    first = slow["behind a good one"].answer("GET")
    assert first is not None and first.status == 200
    stop = threading.Event()

    def drip() -> None:
        while not stop.wait(DEADLINE_S / 10):
            for connection in slow.values():
                try:
                    connection.send(b"x")
                except OSError:  # this one was ended already
                    continue

    dripping = threading.Thread(target=drip)
    dripping.start()
    try:
        for connection in slow.values():
            refused(connection.answer(), 408, "request_timeout")
    finally:
        stop.set()
        dripping.join()
        for connection in slow.values():
            connection.close()
    rig.good()


def test_78_an_idle_connection_is_closed(rig: Rig) -> None:
    with rig.open() as fresh, rig.open(head("GET", "/health/live", {})) as used:
        answer = used.answer("GET")
        assert answer is not None and answer.status == 200
        assert fresh.answer() is None
        assert used.answer() is None


def test_78_who_never_reads_is_cut(rig: Rig) -> None:
    ask = head("GET", "/v1/partitions", {})
    deaf = socket.socket()
    deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    with deaf:
        deaf.settimeout(20)
        deaf.connect(("127.0.0.1", int(rig.system.url.rpartition(":")[2])))
        with pytest.raises((ConnectionResetError, BrokenPipeError)):
            while True:
                deaf.sendall(ask * 1000)
    rig.good()


def reset(connection: Connection) -> None:
    connection.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


@pytest.mark.parametrize("part", [0.5, 1.0], ids=["in the body", "after the body"])
def test_84_a_batch_of_who_hangs_up_is_stored_once_when_it_is_sent_again(rig: Rig, part: float) -> None:
    duplicates = 0
    for number in range(1, 31):
        line = rig.event()
        sha256 = hashlib.sha256(line).hexdigest()
        headers = {
            "Penstock-Producer": f"hang-up-{part};epoch=1;sequence={number};sha256={sha256}",
            "Content-Length": str(len(line)),
        }
        data = head("POST", "/v1/events", headers) + line
        reset(rig.open(data[: int(len(data) - (1 - part) * len(line))]))
        with rig.open(data) as connection:
            answer = connection.answer()
        assert answer is not None and (answer.status, answer.json["accepted"]) == (200, 1)
        duplicates += answer.json["duplicate"]
        rig.sent.append(Batch([line]))
    assert part == 1.0 or duplicates == 0, "half a batch was stored"


def test_83_one_address_cannot_take_all_connections(small: Rig) -> None:
    mine = [small.open(head("GET", "/health/live", {})) for _ in range(5)]
    for connection in mine:
        answer = connection.answer("GET")
        assert answer is not None and answer.status == 200
    with Connection(small.system.url) as one_more:
        answer = one_more.answer("GET")
        refused(answer, 503, "hub_busy")
        assert answer is not None and answer.headers["retry-after"] == "1"
    with Connection(small.system.url, source="127.0.0.2") as other:
        other.send(head("GET", "/health/live", {}))
        answer = other.answer("GET")
        assert answer is not None and answer.status == 200
    for connection in mine:
        connection.close()
    wait_for("there is room again", lambda: small.system.get("/health/live")[0] == 200)
    small.good()


def test_83_a_full_house_closes_the_idle_for_who_comes(small: Rig) -> None:
    idle = [Connection(small.system.url, source=f"127.0.0.{2 + n // 5}") for n in range(20)]

    def admitted() -> bool:
        """Only who has been idle for a second gives his place up, so it takes a moment."""
        with Connection(small.system.url, source="127.0.0.9") as late:
            late.send(head("GET", "/health/live", {}))
            answer = late.answer("GET")
            return answer is not None and answer.status == 200

    wait_for("an idle connection made room", admitted)
    for connection in idle:
        connection.close()
    wait_for("there is room again", lambda: small.system.get("/health/live")[0] == 200)
    small.good()


def test_83_a_worker_without_file_descriptors_goes_on_accepting(small: Rig) -> None:
    """The limit is taken away from under it: accept() fails with EMFILE, as when another part of the process has used them up."""
    (worker,) = small.system.parts("api").values()
    open_files = len(list(Path(f"/proc/{worker}/fd").iterdir()))
    limits = resource.prlimit(worker, resource.RLIMIT_NOFILE)
    resource.prlimit(worker, resource.RLIMIT_NOFILE, (open_files + 3, limits[1]))
    many = [Connection(small.system.url, source=f"127.0.0.{2 + n // 5}") for n in range(15)]
    for connection in many:
        connection.socket.settimeout(1.0)
    served = 0
    for connection in many:
        try:
            connection.send(head("GET", "/health/live", {}))
            answer = connection.answer("GET")
            served += answer is not None and answer.status == 200
        except OSError:  # cut, or left waiting in the kernel's queue
            continue
    assert 0 < served < len(many)
    for connection in many:
        connection.close()
    wait_for("it accepts again", lambda: small.system.get("/health/live")[0] == 200)
    resource.prlimit(worker, resource.RLIMIT_NOFILE, limits)
    small.good()
