"""kill -9 and SIGSTOP at random moments, under load: afterwards every answered batch is in the store once, in order."""

from __future__ import annotations

import fcntl
import gzip
import hashlib
import json
import os
import random
import signal
import socket
from collections.abc import Callable, Mapping
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from tests.crash.load import Load
from tests.e2e.oracle import Batch, problems
from tests.e2e.system import ROUNDS, SEED, Process, System, alive, wait_for

Make = Callable[..., System]
PARTITIONS = 8
DATA = Path(__file__).parents[1] / "data"
DEADLY_HOST = Path(__file__).with_name("deadly_host.py")


def _await_batches(load: Load, count: int) -> None:
    goal = load.confirmed + count
    wait_for(f"{count} more batches answered", lambda: load.confirmed >= goal)


def _pid(system: System, part: str, other_than: int = 0) -> int:
    """The process of a part, once it runs."""
    return wait_for(f"{part} runs", lambda: {system.parts(part).get(part, 0)} - {0, other_than}).pop()


def _await_no_orphan(system: System) -> None:
    """The children of a supervisor that was killed die with it."""
    wait_for("the children have died", lambda: alive(system.up.pid) == [])


def test_any_process_is_killed_at_any_moment(make_system: Make) -> None:
    rounds = ROUNDS or 16
    chosen = random.Random(SEED)
    print(f"PENSTOCK_SEED={SEED} PENSTOCK_ROUNDS={rounds}")
    targets = (["api-0", "api-1", "archiver", "up"] * rounds)[:rounds]
    chosen.shuffle(targets)
    system = make_system(period="1s", partitions=PARTITIONS).start()
    load = Load(lambda: system.url, seed=SEED).start()
    for target in targets:
        _await_batches(load, chosen.randrange(20, 300))
        if target == "up":
            os.kill(system.up.pid, signal.SIGKILL)
            _await_no_orphan(system)
            system.start()
        else:
            pid = _pid(system, target)
            os.kill(pid, signal.SIGKILL)
            _pid(system, target, other_than=pid)
    _await_batches(load, 50)
    load.stop()
    system.settle()
    assert problems(system.store, PARTITIONS, load.batches) == []
    assert load.repeated > 0, "no kill met a request: the test shows nothing"
    assert system.stop() == 0


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def test_penstock_send_goes_on_through_kills(make_system: Make) -> None:
    """What a user runs: it waits for the system to come back at the same address, and ends with exit 0."""
    address = f"127.0.0.1:{_free_port()}"
    system = make_system(period="1s", partitions=PARTITIONS, options=("--listen", address)).start()
    flights = gzip.decompress((DATA / "flights-sample.ndjson.gz").read_bytes()).splitlines() * 12
    (system.folder / "flights.ndjson").write_bytes(b"\n".join(flights))
    send = system.process("send", "--url", f"http://{address}", "--batch", "100", "flights.ndjson", log="send.log")
    for target, stored in (("api-0", 5_000), ("archiver", 15_000), ("up", 25_000), ("api-1", 35_000)):
        wait_for(f"{stored} events", lambda: sum(system.ends()) > stored)  # noqa: B023
        assert not send.ended, send.text()
        if target == "up":
            os.kill(system.up.pid, signal.SIGKILL)
            _await_no_orphan(system)
            system.start()
        else:
            os.kill(_pid(system, target), signal.SIGKILL)
    assert send.wait() == 0, send.text()
    assert f"{len(flights):,} events accepted" in send.text()
    system.settle()
    assert problems(system.store, PARTITIONS, [[Batch(flights)]]) == []


def _post(system: System, body: bytes, headers: Mapping[str, str], *, take_answer: bool) -> bytes:
    """Without `take_answer` the client is gone before the answer comes, but not before the events are stored."""
    host, _, port = urlsplit(system.url).netloc.partition(":")
    before = sum(system.ends())
    head = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    request = f"POST /v1/events HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {len(body)}\r\n{head}\r\n"
    with socket.create_connection((host, int(port)), timeout=20) as client:
        client.sendall(request.encode() + body)
        if not take_answer:
            wait_for("the batch is stored", lambda: sum(system.ends()) > before)
            return b""
        answer = b""
        while part := client.recv(65536):
            answer += part
        return answer.partition(b"\r\n\r\n")[2]


@pytest.mark.parametrize("numbered", [True, False])
def test_a_lost_answer_makes_a_duplicate_only_without_a_number(make_system: Make, numbered: bool) -> None:
    """The negative control of the producers' numbers, and of the oracle."""
    system = make_system(partitions=PARTITIONS).start()
    lines = [b'{"deviceId":"d-%d","n":%d}' % (n % 5, n) for n in range(40)]
    body = b"\n".join(lines)
    headers = {"Content-Type": "application/x-ndjson"}
    if numbered:
        headers["Penstock-Producer"] = f"p1;epoch=1;sequence=1;sha256={hashlib.sha256(body).hexdigest()}"
    _post(system, body, headers, take_answer=False)
    # A crash between the two: the number is known from the disk.
    os.kill(system.up.pid, signal.SIGKILL)
    _await_no_orphan(system)
    system.start()
    again = json.loads(_post(system, body, headers, take_answer=True))
    assert (again["accepted"], again["duplicate"]) == (40, numbered)
    system.settle()
    found = problems(system.store, PARTITIONS, [[Batch(lines)]])
    if numbered:
        assert found == []
    else:
        assert len(found) == 1
        assert "40 copies too many" in found[0]


# Hosts of their own


def _owners(system: System) -> list[str]:
    """Who holds each partition, by the lease files."""
    owners = []
    for partition in range(PARTITIONS):
        try:
            lease = json.loads((system.store / "_leases" / "$archive" / f"{partition}.json").read_bytes())
        except (OSError, ValueError):
            return []
        owners.append(lease["Owner"])
    return owners


def _shared(system: System, *names: str) -> bool:
    """Each of `names` has its share, give or take one, and nobody else has any."""
    owners = _owners(system)
    counts = [owners.count(name) for name in names]
    return sum(counts) == PARTITIONS and max(counts) - min(counts) <= 1


def _host(system: System, name: str) -> Process:
    return system.process("host", "--data", str(system.data), "--name", name, "--lease", "1s", log=f"host-{name}.log")


def test_two_hosts_share_and_one_goes_on_alone(make_system: Make) -> None:
    system = make_system(period="1s", partitions=PARTITIONS, options=("--archive", "none"), anonymous=False).start()
    load = Load(lambda: system.url, seed=SEED, headers=system.headers).start()
    one = _host(system, "one")
    wait_for("one has all", lambda: _shared(system, "one"))
    two = _host(system, "two")
    wait_for("they share", lambda: _shared(system, "one", "two"))
    _await_batches(load, 100)

    one.kill()
    wait_for("two has all", lambda: _shared(system, "two"))
    _await_batches(load, 100)

    three = _host(system, "three")
    wait_for("they share", lambda: _shared(system, "two", "three"))
    # Two lease times long one does nothing: then all that it has is the other's.
    three.freeze()
    wait_for("two has all", lambda: _shared(system, "two"))
    _await_batches(load, 100)
    three.thaw()
    wait_for("they share again", lambda: _shared(system, "two", "three"))
    _await_batches(load, 100)

    load.stop()
    system.settle()
    assert problems(system.store, PARTITIONS, load.batches) == []
    assert two.stop() == 0
    wait_for("three has all", lambda: _shared(system, "three"))
    assert three.stop() == 0
    assert set(_owners(system)) == {""}, "leases are given back at the end"
    assert system.stop() == 0


def test_a_host_ends_when_asked_right_after_it_was_frozen(make_system: Make) -> None:
    """Then the signal often reaches another thread than Python's main one, which must notice all the same."""
    system = make_system(partitions=PARTITIONS, options=("--archive", "none")).start()
    for number in range(6):
        host = _host(system, f"host{number}")
        wait_for("it has all", lambda: _shared(system, f"host{number}"))  # noqa: B023
        host.freeze()
        host.thaw()
        assert host.stop(deadline_s=10) == 0


def test_a_host_that_froze_with_a_lock_of_the_store_stops_that_partition_only(make_system: Make) -> None:
    """As if a host had been stopped inside of the few instructions between compare and rename of a lease."""
    system = make_system(period="1s", partitions=PARTITIONS, options=("--archive", "none")).start()
    load = Load(lambda: system.url, seed=SEED).start()
    one = _host(system, "one")
    wait_for("one has all", lambda: _shared(system, "one"))
    with (system.store / "_leases" / "$archive" / ".3.json.lock").open("wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        one.kill()
        two = _host(system, "two")
        wait_for("two has the others", lambda: _owners(system).count("two") == PARTITIONS - 1)
        assert _owners(system)[3] == "one"
        _await_batches(load, 50)
    wait_for("two has all", lambda: _shared(system, "two"))
    load.stop()
    system.settle()
    assert problems(system.store, PARTITIONS, load.batches) == []
    assert two.stop() == 0


def test_a_host_is_killed_before_each_of_its_acts_on_files(make_system: Make) -> None:
    """One after the other, each a step further: between any two of write, sync, link, rename in lease, ledger and hour files."""
    system = make_system(period="1s", partitions=2, workers=1, options=("--archive", "none")).start()
    load = Load(lambda: system.url, lanes=2, seed=SEED).start()
    arguments = ("host", "--data", str(system.data), "--name", "mortal", "--lease", "30s")
    for act in range(1, (ROUNDS or 40) + 1):
        host = system.process(str(act), *arguments, program=(str(DEADLY_HOST),), log="host-mortal.log")
        assert host.wait() == -signal.SIGKILL, host.text()
    files = len(list(system.store.glob("[0-9]*/*.json.gz")))
    host = system.process(*arguments, log="host-mortal.log")
    load.stop()
    system.settle()
    assert problems(system.store, 2, load.batches) == []
    assert 0 < files < len(list(system.store.glob("[0-9]*/*.json.gz")))
    assert host.stop() == 0


def test_a_host_that_froze_in_the_middle_harms_nothing(make_system: Make) -> None:
    """SIGSTOP at random moments for two lease times: whatever it was about to do, it does too late."""
    chosen = random.Random(SEED + 1)
    rounds = ROUNDS or 2
    system = make_system(period="1s", partitions=PARTITIONS, options=("--archive", "none")).start()
    load = Load(lambda: system.url, seed=SEED).start()
    hosts = {"one": _host(system, "one"), "two": _host(system, "two")}
    for _ in range(rounds):
        wait_for("they share", lambda: _shared(system, "one", "two"))
        _await_batches(load, chosen.randrange(5, 200))
        frozen = chosen.choice(sorted(hosts))
        (other,) = hosts.keys() - {frozen}
        hosts[frozen].freeze()
        wait_for(f"{other} has all", lambda: _shared(system, other))  # noqa: B023
        hosts[frozen].thaw()
    wait_for("they share", lambda: _shared(system, "one", "two"))
    load.stop()
    system.settle()
    assert problems(system.store, PARTITIONS, load.batches) == []
    for host in hosts.values():
        assert host.stop() == 0
