"""The benchmark as a program: what it sends, that it counts right, that it ends all it starts. No figure is judged."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import threading
from pathlib import Path

import msgspec
import pytest

from bench.codec import EVENT_BYTES, gzip_bodies, telemetry
from bench.growth import drift
from bench.load import Latency, Plan, Result
from bench.run import Loader, wrong_counts
from bench.system import Memory
from tests import kafka_broker

ROOT = Path(__file__).parent.parent.parent


def result(*, sent: int = 1000, accepted: int = 1000, busy: int = 0, failures: tuple[str, ...] = ()) -> Result:
    return Result(1.0, 1, accepted, Latency(1.0, 1.0, 1.0), 0.1, sent, accepted, busy, 0, list(failures))


def test_events_are_of_one_size_and_the_same_for_a_seed() -> None:
    events = telemetry(200, devices=50, seed=7)
    assert {len(event) for event in events} == {EVENT_BYTES}
    assert all(event.endswith(b"}\n") and "deviceId" in json.loads(event) for event in events)
    assert len({json.loads(event)["deviceId"] for event in events}) <= 50
    assert events == telemetry(200, devices=50, seed=7)
    bodies = gzip_bodies(3, events=10, devices=50, seed=7)
    assert len(set(bodies)) == 3 and bodies == gzip_bodies(3, events=10, devices=50, seed=7)


@pytest.mark.parametrize(
    ("of_load", "stored", "audit_exit", "numbered", "wrong"),
    [
        (result(), 1000, 0, True, False),
        (result(accepted=999), 999, 0, True, True),
        (result(), 999, 0, True, True),
        (result(), 1001, 0, True, True),
        (result(), 1001, 0, False, True),
        (result(busy=1), 1001, 0, False, False),
        (result(busy=1), 1001, 0, True, True),
        (result(), 1000, 1, True, True),
        (result(failures=("the connection was lost",)), 1000, 0, True, True),
    ],
)
def test_only_wrong_counts_are_problems(
    of_load: Result, stored: int, audit_exit: int, numbered: bool, wrong: bool
) -> None:
    assert bool(wrong_counts([of_load], stored, audit_exit, numbered=numbered)) is wrong


def test_drift_is_of_the_second_half() -> None:
    sizes = [10_000_000 + 1_000_000 * second for second in range(10)] + [20_000_000] * 10
    part = drift("api-0", [Memory(size, size // 2, size) for size in sizes])
    assert (part.start_mb, part.end_mb, part.slope_mb_per_min) == (12.5, 20.0, 0.0)
    assert part.anonymous_end_mb == 10.0


class Stub(threading.Thread):
    """Answers one connection: the first request with 503, each other as if `accepted` of its events were stored."""

    def __init__(self, accepted: int) -> None:
        super().__init__(daemon=True)
        self.listening = socket.create_server(("127.0.0.1", 0))
        self.port = self.listening.getsockname()[1]
        self.seen: list[tuple[int, str]] = []
        self._accepted = accepted

    def run(self) -> None:
        connection, _ = self.listening.accept()
        with self.listening, connection, connection.makefile("rb") as lines:
            while lines.readline():
                head = b"".join(iter(lines.readline, b"\r\n")).decode()
                lines.read(int(re.findall(r"Content-Length: (\d+)", head)[0]))
                self.seen += [(int(n), sha) for n, sha in re.findall(r"sequence=(\d+);sha256=(\w{64})", head)]
                status, more, body = "200 OK", "", b'{"accepted":%d,"duplicate":false}' % self._accepted
                if len(self.seen) == 1:
                    status, more, body = "503 Service Unavailable", "Retry-After: 0\r\n", b"{}"
                connection.sendall(f"HTTP/1.1 {status}\r\n{more}Content-Length: {len(body)}\r\n\r\n".encode() + body)


@pytest.mark.parametrize("lost", [0, 1])
def test_a_refused_batch_is_sent_again_under_its_number(tmp_path: Path, lost: int) -> None:
    (tmp_path / "bodies").write_bytes(msgspec.msgpack.encode(gzip_bodies(2, events=10, devices=5, seed=1)))
    stub = Stub(accepted=10 - lost)
    stub.start()
    plan = Plan(stub.port, str(tmp_path / "bodies"), 10, 1, 0.0, 60.0, True, True, "load")
    with Loader(plan) as loader:
        loader.await_mark("began")
        loader.stop()
        of_load = loader.result()
    stub.join(30)
    assert stub.seen[0] == stub.seen[1]
    assert [number for number, _ in stub.seen[1:]] == list(range(1, len(stub.seen)))
    assert (of_load.busy, of_load.sent) == (1, 10 * (len(stub.seen) - 1))
    assert bool(wrong_counts([of_load], of_load.accepted, 0, numbered=True)) is bool(lost)


def bench(*words: str) -> subprocess.CompletedProcess[bytes]:
    path = os.pathsep.join(filter(None, (str(ROOT / "src"), os.environ.get("PYTHONPATH"))))
    environment = os.environ | {"PYTHONPATH": path}
    return subprocess.run([sys.executable, "-m", *words], cwd=ROOT, env=environment, capture_output=True, timeout=200)


def test_many_hosts_on_a_simulated_clock() -> None:
    done = bench("bench.balance", "--partitions", "24", "--hosts", "8")
    assert done.returncode == 0, done.stderr.decode()
    lines = [line for line in done.stdout.decode().splitlines() if "Penstock" in line or "EventProcessorHost" in line]
    assert len(lines) == 8, "four phases of either rule"


def test_take_over_and_catch_up(tmp_path: Path) -> None:
    done = bench("bench.hosts", "--lease", "2", "--seconds", "1", "--catch-up", "cold", "--folder", str(tmp_path))
    assert done.returncode == 0, done.stderr.decode()
    assert b"hand-over on a clean stop" in done.stdout and b"catch-up" in done.stdout
    assert {path.name for path in tmp_path.iterdir()} == {"bodies"}


def test_a_moment_beside_hostile_clients_and_a_moment_of_too_much(tmp_path: Path) -> None:
    small = "--seconds 0.5 --warm-up 0.2 --attack-seconds 1 --events-per-batch 100 --idle 200 --slow 20 --attacks 50"
    done = bench(
        "bench.hostile", *small.split(), "--single-connections", "1000", "--folder", str(tmp_path), "--json", "-"
    )
    assert done.returncode == 0, done.stderr.decode()
    report = json.loads(done.stdout)
    assert report["ok"] is True and report["problems"] == []
    assert {kind: len(rates) for kind, rates in report["capacities"].items()} == {"batches": 3, "single events": 2}
    assert len(report["phases"]) == 6 and len(report["targets"]) == 11
    assert all(phase["load"]["accepted_in_window"] > 0 for phase in report["phases"])
    attack = report["phases"][3]["attack"]
    assert (attack["idle"], attack["slow"], attack["unexpected"]) == (20, 20, [])
    assert list(tmp_path.iterdir()) == []


def test_one_second_of_everything(tmp_path: Path) -> None:
    small = "--seconds 1 --warm-up 0.2 --floor-seconds 0.1 --bodies 4 --events-per-batch 100 --workers 2 --partitions 4"
    client = "--client-events 400 --spool-bytes 1000000 --processor-events 400"
    done = bench("bench", *small.split(), *client.split(), "--period", "1s", "--folder", str(tmp_path), "--json", "-")
    assert done.returncode == 0, done.stderr.decode()
    report = json.loads(done.stdout)
    assert report["ok"] is True
    assert [run["name"] for run in report["runs"]] == ["batches", "single", "single numbered"]
    for run in report["runs"]:
        assert 0 < run["sent"] == run["accepted"] == run["archived"]
        assert {part["name"] for part in run["parts"]} == {"supervisor", "api-0", "api-1", "archiver"}
        assert all(part["memory_peak_mb"] > 0 for part in run["parts"])
        assert run["remarks"] == []
    assert report["floor"]["ns_per_event"] > 0
    assert report["client"]["problems"] == [] and report["client"]["spool_bytes"] >= 1_000_000
    assert report["processor"]["problems"] == [] and len(report["processor"]["figures"]) == 4
    assert len(report["targets"]) == 16
    assert list(tmp_path.iterdir()) == []


def test_a_moment_on_a_topic(tmp_path: Path) -> None:
    """Its counts, that is; a broker that has just begun does not do more."""
    kafka_broker.install()
    small = "--hub kafka --seconds 0.5 --warm-up 0.1 --bodies 4 --events-per-batch 100 --workers 1 --partitions 2"
    done = bench("bench", *small.split(), "--folder", str(tmp_path), "--json", "-")
    assert done.returncode == 0, done.stderr.decode()
    report = json.loads(done.stdout)
    assert report["ok"] is True and report["topic"]["remarks"] == []
    assert 0 < report["topic"]["sent"] == report["topic"]["accepted"] == report["topic"]["archived"]
    assert report["backlog"]["events"] > 0 and report["backlog"]["problems"] == []
    parts = {part["name"]: part for part in report["topic"]["parts"]}
    assert set(parts) == {"supervisor", "api-0", "archiver", "broker 1"}
    assert parts["broker 1"]["cpu_us_per_event_to_the_end"] > 0
    assert len(report["targets"]) == 2
    assert list(tmp_path.iterdir()) == []


def test_brokers_to_try_a_topic_with() -> None:
    kafka_broker.install()
    words = [sys.executable, "-m", "tests.brokers", "--count", "1"]
    with subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, text=True) as program:
        assert program.stdout is not None
        said = [program.stdout.readline() for _ in range(2)]
        found = re.fullmatch(r"broker 1 at (127\.0\.0\.1):(\d+), process (\d+)\n", said[0])
        assert found is not None and said[1].startswith(f"--hub kafka://{found[1]}:{found[2]}/telemetry ")
        socket.create_connection((found[1], int(found[2])), 10).close()
        program.terminate()
        assert program.wait(30) == 0
    assert not Path(f"/proc/{found[3]}").exists()
