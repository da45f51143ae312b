"""`penstock simulate` against a real installation, and against ones that lose, double, change or do not answer."""

from __future__ import annotations

import functools
import gzip
import hashlib
import http.client
import json
import os
import re
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

import pytest

from tests.e2e.oracle import archived
from tests.e2e.system import System, wait_for
from tests.e2e.test_main_job import FLIGHTS
from tests.e2e.topic_system import TopicSystem
from tests.emulators import Emulator
from tests.kafka_broker import Brokers

SHORT = ("--devices", "200", "--rate", "2000", "--seconds", "2s", "--gateways", "4")
FAULTS = {"answer not awaited", "body cut", "gzip cut", "no valid event", "number reused", "slow body", "wrong sha256"}

Make = Callable[..., System]
Forward = Callable[[str, bytes, dict[str, str]], tuple[int, bytes]]
Tamper = Callable[[Forward, int, bytes, dict[str, str]], tuple[int, bytes]]


def check_archive(system: System, accepted: int) -> None:
    """Every event of the run is in the store, once, in order: with nothing of Penstock's own reading code."""
    system.settle()
    last: Counter[str] = Counter()
    for _, line in archived(system.store):
        event = json.loads(line)
        if event["deviceId"].startswith("sim-"):
            last[event["deviceId"]] += 1
            assert event["n"] == last[event["deviceId"]]
    assert last.total() == accepted


def test_all_that_was_sent_is_there_once(system: System) -> None:
    done = system.run("simulate", "--data", str(system.data), *SHORT, "--json")
    report = json.loads(done.stdout)
    assert (done.returncode, report["ok"], report["problems"]) == (0, True, []), done
    assert (report["sent"], report["accepted"], report["found"]) == (4000, 4000, 4000)
    assert (report["rejected"], report["unanswered"], report["storms"]) == (0, 0, 2)
    assert report["duplicates"] >= report["copies"] > 0
    assert 0 < report["p50_ms"] <= report["p99_ms"]
    assert report["audited"] is True
    check_archive(system, 4000)


def test_faults_are_answered_as_they_should_be_while_others_send_and_a_worker_dies(system: System) -> None:
    many = ("--gateways", "16", "--seconds", "4s", "--faults", "--json")
    run = system.process("simulate", "--url", system.url, *SHORT, *many, log="report")
    wait_for("the devices send", lambda: sum(system.ends()) > 0)
    worker = system.parts("api")["api-0"]
    assert system.run("send", "--url", system.url, str(FLIGHTS)).returncode == 0
    os.kill(worker, signal.SIGKILL)
    code = run.wait()
    report = json.loads(run.text())
    assert (code, report["ok"], report["problems"]) == (0, True, []), report
    assert (report["accepted"], report["found"], report["unanswered"]) == (8000, 8000, 0)
    assert report["rejected"] == report["sent"] - 8000 > 0
    assert set(report["faults"]) == FAULTS
    assert sum(system.ends()) == 8000 + 5000
    check_archive(system, 8000)


def test_on_a_topic_what_is_there_again_is_left_out(make_system: Make, kafka: Brokers, azurite: Emulator) -> None:
    """The API takes copies, and other bytes under a used number, and leaves both to readers. What is wrong is seen all the same."""
    kind = functools.partial(TopicSystem, kafka=kafka, azurite=azurite)
    system = make_system(kind=kind, partitions=4, period="2s").start()
    assert isinstance(system, TopicSystem)
    many = ("--gateways", "16", "--seconds", "4s", "--faults", "--json")
    done = system.run("simulate", "--url", system.url, *system.places, *SHORT, *many)
    report = json.loads(done.stdout)
    assert (done.returncode, report["ok"], report["problems"]) == (0, True, []), done
    assert (report["accepted"], report["found"], report["unanswered"], report["audited"]) == (8000, 8000, 0, True)
    assert (set(report["faults"]), report["duplicates"] > report["copies"] > 0) == (FAULTS, True)
    check_archive(system, 8000)
    dead = [json.loads(path.read_bytes()) for path in system.store.glob("_dead/*/*.json")]
    assert {one["reason"] for one in dead} == {"number_reused"}

    some = ("--devices", "5", "--rate", "400", "--seconds", "2", "--gateways", "1", "--timeout", "1s")
    told = {
        honest: "ok: the hub has each accepted event once, in order",
        loses: "events were accepted, and are not in the hub",
        swaps: "devices have other bytes in the hub than were accepted, or another order",
        forgets: "events more are in the hub than were accepted",
    }

    def simulated(tamper: Tamper) -> tuple[int, str]:
        with proxy(system.url, tamper) as url:
            done = system.run("simulate", "--url", url, *some)
        return done.returncode, re.sub(r"\s+", " ", done.stdout.decode())

    with ThreadPoolExecutor(len(told)) as pool:
        found = dict(zip(told, pool.map(simulated, told), strict=True))
    for tamper, says in told.items():
        code, said = found[tamper]
        assert (code, says in said) == (int(tamper is not honest), True), said
    assert system.stop() == 0


def test_it_says_for_people_what_happened_and_ends_early_when_told(system: System) -> None:
    run = system.process("simulate", "--data", str(system.data), "--seconds", "1h", "--rate", "500", log="report")
    wait_for("the devices send", lambda: sum(system.ends()) > 0)
    run.signal(signal.SIGINT)
    assert run.wait() == 0, run.text()
    counted = re.search(r"([\d,]+) accepted, 0 rejected, 0 unanswered", run.text())
    assert counted, run.text()
    assert "ended early" in run.text()
    assert "ok: the hub has each accepted event once, in order, and its audit agrees" in run.text()
    assert sum(system.ends()) == int(counted[1].replace(",", ""))


def _reply(headers: dict[str, str], accepted: int, *, duplicate: bool = False) -> tuple[int, bytes]:
    match = re.match(r"([^;]+);epoch=1;sequence=(\d+)", headers["Penstock-Producer"])
    assert match
    batch = {"batch": f"{match[1]}:1:{match[2]}", "accepted": accepted, "duplicate": duplicate, "rejected": []}
    return 200, json.dumps(batch).encode()


def _as(headers: dict[str, str], producer: str, body: bytes) -> dict[str, str]:
    rest = headers["Penstock-Producer"].partition(";")[2].rpartition("=")[0]
    return {**headers, "Penstock-Producer": f"{producer};{rest}={hashlib.sha256(body).hexdigest()}"}


def honest(forward: Forward, _n: int, body: bytes, headers: dict[str, str]) -> tuple[int, bytes]:
    return forward("/v1/events", body, headers)


def loses(forward: Forward, n: int, body: bytes, headers: dict[str, str]) -> tuple[int, bytes]:
    if n == 7:
        return _reply(headers, gzip.decompress(body).count(b"\n"))
    return forward("/v1/events", body, headers)


def doubles(forward: Forward, n: int, body: bytes, headers: dict[str, str]) -> tuple[int, bytes]:
    if n == 7:
        forward("/v1/events", body, _as(headers, "another", body))
    return forward("/v1/events", body, headers)


def changes(forward: Forward, n: int, body: bytes, headers: dict[str, str]) -> tuple[int, bytes]:
    if n == 7:
        body = gzip.compress(re.sub(rb'"temperature":\S+', b'"temperature":0}', gzip.decompress(body)))
        headers = _as(headers, headers["Penstock-Producer"].partition(";")[0], body)
    return forward("/v1/events", body, headers)


def swaps(forward: Forward, n: int, body: bytes, headers: dict[str, str]) -> tuple[int, bytes]:
    if n == 7:
        body = gzip.compress(b"\n".join(reversed(gzip.decompress(body).splitlines())) + b"\n")
        headers = _as(headers, headers["Penstock-Producer"].partition(";")[0], body)
    return forward("/v1/events", body, headers)


def forgets(forward: Forward, n: int, body: bytes, headers: dict[str, str]) -> tuple[int, bytes]:
    """A hub without a producers' table."""
    status, reply = forward("/v1/events", body, _as(headers, f"another-{n}", body))
    return _reply(headers, json.loads(reply)["accepted"]) if status == 200 else (status, reply)


def fails(forward: Forward, n: int, body: bytes, headers: dict[str, str]) -> tuple[int, bytes]:
    return honest(forward, n, body, headers) if n < 7 else (503, b"{}")


@contextmanager
def proxy(api: str, tamper: Tamper) -> Iterator[str]:
    """The address of a proxy that tampers with what is posted."""
    lock, posts = threading.Lock(), iter(range(1_000_000))

    def exchange(method: str, path: str, body: bytes, headers: dict[str, str]) -> tuple[int, bytes, Any]:
        connection = http.client.HTTPConnection(urlsplit(api).netloc, timeout=20)
        connection.request(method, path, body or None, headers)
        answer = connection.getresponse()
        found = answer.status, answer.read(), answer.headers
        connection.close()
        return found

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            kept = ("Content-Type", "Content-Encoding", "Penstock-Device-Field", "Penstock-Producer")
            headers = {name: self.headers[name] for name in kept}
            with lock:
                status, reply = tamper(lambda *one: exchange("POST", *one)[:2], next(posts), body, headers)
            self.reply(status, reply, "")

        def do_GET(self) -> None:
            status, body, headers = exchange("GET", self.path, b"", {"Accept": self.headers["Accept"] or "*/*"})
            self.reply(status, body, headers.get("Penstock-Next-Offset", ""))

        def reply(self, status: int, body: bytes, following: str) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Penstock-Next-Offset", following)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            return

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join()


@pytest.mark.parametrize(
    ("tamper", "code", "says"),
    [
        (honest, 0, "ok: the hub has each accepted event once, in order"),
        (loses, 1, "events were accepted, and are not in the hub"),
        (doubles, 1, "events more are in the hub than were accepted"),
        (changes, 1, "devices have other bytes in the hub than were accepted, or another order"),
        (swaps, 1, "devices have other bytes in the hub than were accepted, or another order"),
        (forgets, 1, "it was posted again after its answer, and not recognised"),
        (fails, 1, "events were not answered"),
    ],
)
def test_a_hub_that_does_not_have_what_it_accepted_is_found_out(
    system: System, tamper: Tamper, code: int, says: str
) -> None:
    """The negative controls: the hub is sound, so only the recount and the answers can tell."""
    with proxy(system.url, tamper) as url:
        # Few devices, so that each has several events in a batch.
        some = ("--devices", "5", "--rate", "400", "--seconds", "2", "--gateways", "1", "--timeout", "1s")
        done = system.run("simulate", "--url", url, *some)
    assert (done.returncode, says in re.sub(r"\s+", " ", done.stdout.decode())) == (code, True), done
    assert ("PROBLEM" in done.stdout.decode()) is (code == 1)


def test_an_audit_that_disagrees_is_exit_1(make_system: Make) -> None:
    system = make_system(period="1s", partitions=2).start()
    lines = b'{"deviceId":"d-1","n":1}\n' * 100
    assert system.run("send", "--url", system.url, "-", stdin=lines).returncode == 0
    system.settle()
    assert system.stop() == 0
    for record in list(system.store.glob("_ledger/*/*.json"))[:1]:
        record.write_bytes(record.read_bytes().replace(b'"events":', b'"events":1'))
    system.options.append("--archive=none")
    system.start()
    done = system.run("simulate", "--url", system.url, *SHORT)
    assert done.returncode == 1
    assert b"audit: " in done.stdout
