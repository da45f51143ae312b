"""Throughput units of a real installation of two workers: in force everywhere, kept, and true to who waits."""

from __future__ import annotations

import hashlib
import json
import math
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import pytest

from penstock import Client
from tests.e2e.http_client import Answer, Connection, head, request
from tests.e2e.system import System
from tests.e2e.topic_system import TopicSystem

NDJSON = {"Content-Type": "application/x-ndjson"}


@pytest.fixture(scope="module", params=["embedded", "topic"])
def system(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    """One for all tests of this module; each sets the units that it needs, which begins anew."""
    folder, options = tmp_path_factory.mktemp("quota"), ("--anonymous", "--throughput-units", "2")
    one: System
    if request.param == "embedded":
        one = System(folder, partitions=4, workers=2, options=(*options, "--archive", "none"))
    else:
        brokers, azurite = request.getfixturevalue("kafka"), request.getfixturevalue("azurite")
        one = TopicSystem(folder, brokers, azurite, partitions=4, workers=2, options=options)
    try:
        yield one.start()
    finally:
        one.close()


# Only there the ends of the partitions count events, and its commands ask the data folder (docs/kafka.md).
embedded_only = pytest.mark.parametrize("system", ["embedded"], indirect=True)


def lines(events: int, first: int = 0, devices: int = 64) -> bytes:
    return b"".join(b'{"deviceId":"d-%d","n":%d}\n' % (n % devices, n) for n in range(first, first + events))


def post(system: System, body: bytes, producer: str = "") -> Answer:
    """On a connection of its own, so at whichever worker."""
    return request(
        system.url, "POST", "/v1/events", body, NDJSON | ({"Penstock-Producer": producer} if producer else {})
    )


def units(system: System, wanted: int | str | None = "") -> Any:
    """What is in force, after it was set to `wanted`."""
    body = None if wanted == "" else json.dumps({"throughput_units": wanted}).encode()
    asked = Request(f"{system.admin}/v1/throughput-units", body, method="GET" if body is None else "PUT")
    with urlopen(asked, timeout=10) as answer:
        return json.loads(answer.read())


class Load:
    """Clients that all want more than there is, and wait as long as they are told."""

    def __init__(self, system: System, seconds: float) -> None:
        self._system, self._end = system, time.monotonic() + seconds
        self._lock, self._never = threading.Lock(), threading.Event()
        self.accepted = self.came_back = self.let_in = self.refused = 0

    def client(self, number: int) -> None:
        sequence, waited = 0, False
        while time.monotonic() < self._end:
            body = lines(250, 1000 * number)
            sha256 = hashlib.sha256(body).hexdigest()
            # Half of them say who they are, the other half is known by what it sends.
            producer = "" if number % 2 else f"p-{number};epoch=1;sequence={sequence + 1};sha256={sha256}"
            answer = post(self._system, body, producer)
            assert answer.status in (200, 429), answer
            with self._lock:
                self.came_back += waited
                if answer.status == 200:
                    self.let_in += waited
                    self.accepted += answer.json["accepted"]
                    sequence += 1
                else:
                    self.refused += 1
            waited = answer.status == 429
            if waited:
                assert answer.json["code"] == "throughput_exceeded"
                assert int(answer.headers["retry-after"]) == max(1, math.ceil(answer.json["retry_after_s"]))
                self._never.wait(int(answer.headers["retry-after"]))


@embedded_only
def test_at_three_times_the_units_they_are_held_and_who_waits_gets_in(system: System) -> None:
    assert units(system)["throughput_units"] == 2
    before, began, load = sum(system.ends()), time.monotonic(), Load(system, 5.0)
    with ThreadPoolExecutor(24) as pool:  # 24 × 250 events, all at once: three seconds of two units
        list(pool.map(load.client, range(24)))
    took_s = time.monotonic() - began
    assert load.came_back >= 24 and load.let_in >= 0.95 * load.came_back, vars(load)
    assert load.accepted == sum(system.ends()) - before, "what was refused is not there"
    assert 0.5 * 2000 * 5 < load.accepted <= 2000 * (took_s + 2), (load.accepted, took_s)
    assert units(system)["refused"]["throughput_units"] == load.refused
    status = json.loads(system.check("status", "--json").stdout)
    assert status["throughput"]["throughput_units"] == 2 and status["throughput"]["used_events_per_s"] > 0
    assert (status["ok"], status["warnings"]) == (True, [])


class Crowd(Load):
    """Clients without a producer that send other bytes each time, each on a connection that it keeps.

    The first of them comes from another address, and at once again whatever he is told.
    """

    def client(self, number: int) -> None:
        heeds, waited, at = number > 0, False, 1_000_000 * number
        with Connection(self._system.url, source="" if heeds else "127.0.0.9") as connection:
            while True:
                at += 250
                body = lines(250, at)
                connection.send(head("POST", "/v1/events", NDJSON | {"Content-Length": str(len(body))}) + body)
                answer = connection.answer()
                assert answer is not None and answer.status in (200, 429), answer
                with self._lock:
                    self.came_back += waited
                    self.let_in += waited and answer.status == 200
                    self.accepted += 250 * (heeds and answer.status == 200)
                    self.refused += not heeds and answer.status == 429
                waited = heeds and answer.status == 429
                wait_s = int(answer.headers["retry-after"]) if waited else 0.0 if heeds else 0.1
                if time.monotonic() + wait_s > self._end:
                    return
                self._never.wait(wait_s)


@embedded_only
def test_who_waits_on_his_connection_gets_in_whatever_he_sends(system: System) -> None:
    """Beside one who ignores what he is told, and gains less by it than the others get."""
    units(system, None)
    units(system, 2)
    before, load = sum(system.ends()), Crowd(system, 8.0)
    with ThreadPoolExecutor(25) as pool:
        list(pool.map(load.client, range(25)))
    assert load.came_back >= 20 and load.let_in >= 0.95 * load.came_back, vars(load)
    his = sum(system.ends()) - before - load.accepted
    assert load.refused >= 40 and his <= load.accepted / 2, (vars(load), his)


def test_a_change_is_in_force_in_every_worker_when_it_is_answered(system: System) -> None:
    body = lines(1000)
    assert units(system, 1)["throughput_units"] == 1
    began = time.monotonic()
    answers = [post(system, body).status for _ in range(40)]
    assert 1 <= answers.count(200) <= 1 + (time.monotonic() - began) and set(answers) == {200, 429}
    assert units(system, None)["throughput_units"] is None
    found = [post(system, body) for _ in range(40)]
    assert [answer.status for answer in found] == [200] * 40
    # A worker names itself in what it answers to who gives no number.
    assert len({answer.json["batch"].split(":")[0] for answer in found}) == 2
    assert {units(system)["throughput_units"] for _ in range(20)} == {None}


def test_a_partition_takes_a_thousand_events_a_second_when_units_are_set(system: System) -> None:
    units(system, 20)
    began = time.monotonic()
    answers = [post(system, lines(500, 1000 * n, devices=1)) for n in range(6)]
    assert answers.count(answers[0]) == 1 and answers[0].status == answers[1].status == 200
    refused = [answer.json for answer in answers if answer.status == 429]
    assert len(refused) >= 4 - 2 * (time.monotonic() - began)
    assert {(one["limit"], one["partition"]) for one in refused} == {("partition", refused[0]["partition"])}
    others = [post(system, lines(1, n)).status for n in range(1, 40)]
    assert 200 in others
    units(system, None)
    assert {post(system, lines(500, 1000 * n, devices=1)).status for n in range(6)} == {200}


@embedded_only
def test_the_client_waits_and_loses_and_doubles_nothing(system: System, tmp_path: Path) -> None:
    units(system, 2)
    before = sum(system.ends())

    def send(number: int) -> tuple[int, int]:
        with Client(system.url, spool=tmp_path / f"spool-{number}") as client:
            for n in range(1500):
                client.send({"deviceId": f"c{number}-{n % 50}", "n": n})
            client.flush(timeout_s=60)
            stats = client.stats()
            return stats.accepted, stats.rejected + stats.duplicates

    refused = sum(units(system)["refused"].values())
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(send, range(4))) == [(1500, 0)] * 4
    assert sum(units(system)["refused"].values()) > refused
    assert sum(system.ends()) - before == 6000


@embedded_only
def test_the_command_and_a_restart(system: System) -> None:
    def command(*arguments: str) -> Any:
        return json.loads(system.check("units", *arguments, "--json").stdout)

    assert command("5")["throughput_units"] == 5 == units(system)["throughput_units"]
    assert command()["events_per_s"] == 5000
    assert system.check("units").stdout.decode().startswith("5, so 5,000 events/s and 5,000,000 bytes/s; ")
    for wrong in ("x", "-1", "1000001"):
        assert system.run("units", "--data", str(system.data), "--", wrong).returncode != 0
    # Killed, not stopped: it was durable when the command returned.
    system.kill()
    offline = json.loads(system.check("status", "--json").stdout)
    assert offline["throughput"]["throughput_units"] == 5
    assert system.run("units", "--data", str(system.data)).returncode == 2
    flag = system.options.index("--throughput-units")
    del system.options[flag : flag + 2]
    system.start()
    assert units(system)["throughput_units"] == 5
    assert system.check("units", "none").stdout.startswith(b"none, no limit")
    # An explicit flag wins over what was kept.
    system.options += ["--throughput-units", "3", "--device-events-per-s", "1"]
    system.kill()
    system.start()
    assert units(system)["throughput_units"] == 3
    assert json.loads((system.data / "units.json").read_bytes()) == {"throughput_units": 3}
    assert post(system, lines(60, devices=2)).status == 200  # 30 s of each of the two
    refused = post(system, lines(60, devices=2)).json
    assert (refused["code"], refused["limit"]) == ("throughput_exceeded", "device") and refused["device"].startswith(
        "d-"
    )
