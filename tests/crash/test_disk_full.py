"""A full disk: new events are refused and nothing is half stored, the archiver waits and says so, and with space all goes on."""

from __future__ import annotations

import base64
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.crash.disk import SmallDisk
from tests.crash.load import Load
from tests.e2e.http_client import Answer, request
from tests.e2e.oracle import Batch, problems
from tests.e2e.system import SEED, System, wait_for

Make = Callable[..., System]
PARTITIONS = 4
NDJSON = {"Content-Type": "application/x-ndjson"}


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[SmallDisk]:
    made = SmallDisk(tmp_path / "small", 32)
    yield made
    made.close()


class Filler:
    """Posts batches that zip badly until one is refused, and remembers those that were taken."""

    def __init__(self, system: System) -> None:
        self.system = system
        self.taken: list[Batch] = []
        self._random = random.Random(SEED)
        self._number = 0

    def batch(self, count: int = 300) -> list[bytes]:
        lines = []
        for _ in range(count):
            self._number += 1
            noise = base64.b64encode(self._random.randbytes(900)).decode()
            lines.append(f'{{"deviceId":"full-{self._number % 11}","n":{self._number},"noise":"{noise}"}}'.encode())
        return lines

    def post(self, lines: list[bytes]) -> Answer:
        answer = request(self.system.url, "POST", "/v1/events", b"\n".join(lines), NDJSON)
        if answer.status == 200:
            assert answer.json["accepted"] == len(lines)
            self.taken.append(Batch(lines))
        return answer

    def until_full(self, size: int = 300) -> Answer:
        for _ in range(2000):
            answer = self.post(self.batch(size))
            if answer.status != 200:
                return answer
        raise AssertionError("it is never full")


def refused_as_full(answer: Answer) -> None:
    assert (answer.status, answer.json["code"], answer.json["retryable"]) == (503, "storage_full", True), answer
    assert answer.headers["content-type"] == "application/problem+json"
    assert int(answer.headers["retry-after"]) >= 1


def test_the_hub_reaches_its_own_limit(make_system: Make) -> None:
    system = make_system(partitions=PARTITIONS, period="1s", options=("--hub-bytes-max", "16MiB")).start()
    filler = Filler(system)
    refused_as_full(filler.until_full())
    ends = system.ends()
    for size in (1, 10, 300):
        refused_as_full(filler.post(filler.batch(size)))
    assert system.ends() == ends
    assert sum(ends) == sum(len(batch.lines) for batch in filler.taken)

    code, body = system.get("/v1/status")
    status = json.loads(body)
    assert (code, status["ok"], status["storage"]["state"]) == (200, False, "full")
    assert any("full" in problem for problem in status["problems"])
    assert system.run("status", "--data", str(system.data)).returncode == 1
    assert (system.get("/health/ready")[0], system.get("/health/live")[0]) == (503, 200)
    wait_for("the log says so", lambda: "The hub's storage is full: new events are refused." in system.up.text())
    # Reading and archiving go on; retention has nothing to delete for 7 days.
    assert system.get("/v1/partitions/0/events?limit=1")[0] == 200
    system.settle()
    assert problems(system.store, PARTITIONS, [filler.taken]) == []
    refused_as_full(filler.post(filler.batch(1)))

    # A full hub starts again, and a shorter retention makes room without a larger limit.
    assert system.stop() == 0
    system.start(ready=False)
    refused_as_full(filler.post(filler.batch(1)))
    assert system.stop() == 0
    system.options += ["--retention", "2s"]
    system.start()
    for _ in range(3):
        assert filler.post(filler.batch()).status == 200
    system.settle()
    assert problems(system.store, PARTITIONS, [filler.taken]) == []
    assert system.ends() == [end for end in system.ends() if end > 0]
    assert system.stop() == 0


def test_the_disk_of_the_hub_is_full(disk: SmallDisk, make_system: Make) -> None:
    store = disk.folder.parent / "store"
    options = ("--store", str(store))
    system = make_system(data=disk.folder / "data", partitions=PARTITIONS, period="1s", options=options)
    filler = Filler(system)
    system.start()
    assert filler.post(filler.batch()).status == 200
    ballast = disk.fill(leave_bytes=8 << 20)
    refused_as_full(filler.until_full())
    assert sum(system.ends()) == sum(len(batch.lines) for batch in filler.taken)
    more = disk.fill(leave_bytes=0, name="more")
    # Small batches still find pages that are free inside of the hub's file, until those are used too.
    for size in (100, 10, 1):
        refused_as_full(filler.until_full(size))
    assert sum(system.ends()) == sum(len(batch.lines) for batch in filler.taken)
    load = Load(lambda: system.url, lanes=3, seed=SEED).start()
    wait_for("lanes are refused", lambda: "storage_full" in load.codes and load.repeated > 20)
    confirmed = load.confirmed
    assert all(part["restarts"] == 0 for part in system.run_file()["parts"])
    ballast.unlink()
    more.unlink()
    wait_for("all goes on by itself", lambda: load.confirmed > confirmed + 20)
    load.stop()
    assert filler.post(filler.batch(30)).status == 200
    system.check("flush", "--store", str(store))
    system.check("audit", "--deep", "--store", str(store))
    system.check("verify", "--store", str(store))
    assert problems(store, PARTITIONS, [filler.taken, *load.batches]) == []
    # A full disk is no broken disk. (A write that ends short just when space comes back cannot be told from a fault.)
    assert all(part["restarts"] <= 1 for part in system.run_file()["parts"])
    assert system.stop() == 0


def test_the_disk_of_the_store_is_full(disk: SmallDisk, make_system: Make) -> None:
    store = disk.folder / "store"
    system = make_system(partitions=PARTITIONS, period="1s", options=("--store", str(store))).start()
    filler = Filler(system)
    assert filler.post(filler.batch()).status == 200
    system.check("flush", "--store", str(store))
    ballast = disk.fill(leave_bytes=100 << 10)
    # The intake does not care.
    for _ in range(4):
        assert filler.post(filler.batch()).status == 200
    wait_for("the archiver waits and says so", lambda: '"event":"processor waits"' in system.up.text())
    assert "No space left" in system.up.text()
    assert system.run("flush", "--data", str(system.data), "--store", str(store), "--timeout", "1s").returncode == 1
    assert filler.post(filler.batch()).status == 200
    archived = problems(store, PARTITIONS, [filler.taken])
    assert any("missing" in problem for problem in archived) and len(archived) == 1, (
        "it is not yet there, but nothing is wrong"
    )
    for command in ("audit", "verify"):
        system.check(command, "--store", str(store))
    ballast.unlink()
    system.check("flush", "--store", str(store))
    system.check("audit", "--deep", "--store", str(store))
    system.check("verify", "--store", str(store))
    assert problems(store, PARTITIONS, [filler.taken]) == []
    assert all(part["restarts"] == 0 for part in system.run_file()["parts"])
    assert system.stop() == 0
