"""More than one machine: APIs and hosts that share nothing but a Kafka topic and a store."""

from __future__ import annotations

import hashlib
import itertools
import json
import random
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from confluent_kafka.admin import NewPartitions

from tests.e2e.http_client import post_numbered, request
from tests.e2e.oracle import Batch, problems
from tests.e2e.system import Process, System, wait_for
from tests.emulators import Emulator
from tests.kafka_broker import Brokers

Make = Callable[..., System]
PARTITIONS = 4
LANES, BATCHES, EVENTS = 6, 40, 25
ONE_COPY = ("--replicas", "1", "--in-sync-replicas", "1")


class Machines:
    """Machines around one topic and one store, each with a folder of its own."""

    def __init__(self, make: Make, topic: str, store: str, **options: object) -> None:
        self.topic = topic
        self.store = store
        self._make = make
        self._options = options

    def api(self, name: str, *more: str, workers: int = 1) -> System:
        places = ("--hub", self.topic, "--store", self.store, *ONE_COPY, *more)
        return self._make(
            name, command="api", period="2s", partitions=PARTITIONS, workers=workers, options=places, **self._options
        )

    def host(self, api: System, name: str) -> Process:
        places = ("--hub", self.topic, "--store", self.store, "--data", str(api.folder / name))
        started = api.process("host", *places, "--name", name, "--lease", "2s", log=f"{name}.log")
        wait_for(f"{name} has a lease", lambda: "lease taken" in started.text() or started.ended)
        return started


class Lane:
    """One sender: numbered batches, one at a time, each to whichever API answers, and now and then again although it was answered."""

    def __init__(self, number: int, apis: list[System]) -> None:
        self.copies = 0
        self._number = number
        self._apis = itertools.cycle(apis[number % len(apis) :] + apis[: number % len(apis)])
        self._chance = random.Random(number)
        self.batches = [
            Batch([b'{"deviceId":"d-%d-%d","b":%d,"n":%d}' % (number, n % 7, batch, n) for n in range(EVENTS)])
            for batch in range(BATCHES)
        ]

    def send(self) -> None:
        for sequence, batch in enumerate(self.batches, 1):
            body = b"\n".join(batch.lines)
            sha256 = hashlib.sha256(body).hexdigest()
            headers = {
                "Content-Type": "application/x-ndjson",
                "Penstock-Producer": f"lane-{self._number};epoch=1;sequence={sequence};sha256={sha256}",
            }
            wait_for("a batch is accepted", lambda: self._posted(body, headers))  # noqa: B023
            while self._chance.random() < 0.2:  # the answer was lost
                self.copies += 1
                wait_for("it is accepted again", lambda: self._posted(body, headers))  # noqa: B023

    def _posted(self, body: bytes, headers: dict[str, str]) -> bool:
        try:
            answer = request(next(self._apis).url, "POST", "/v1/events", body, headers)
        except (OSError, AssertionError):
            return False
        assert answer.status in (200, 503), answer
        return answer.status == 200


@pytest.fixture
def store(azurite: Emulator) -> str:
    return azurite.fresh_url()


def test_an_api_and_a_host_killed(
    make_system: Make, kafka: Brokers, azurite: Emulator, store: str, tmp_path: Path
) -> None:
    """Each event is once in the archive, although the log has many twice."""
    machines = Machines(make_system, kafka.fresh_url(), store, environment=azurite.environment)
    first, second = machines.api("first", workers=2).start(), machines.api("second").start()
    doomed, staying = machines.host(first, "doomed"), machines.host(second, "staying")
    lanes = [Lane(number, [first, second]) for number in range(LANES)]
    with ThreadPoolExecutor(LANES) as pool:
        sending = [pool.submit(lane.send) for lane in lanes]
        wait_for("a third is there", lambda: sum(second.ends()) >> 20 > LANES * BATCHES * PARTITIONS // 12)
        first.kill()
        doomed.kill()
        for one in sending:
            one.result()
    first.start()
    wait_for("the one host has all partitions", lambda: _owners(second, machines) == {"staying"})
    flushed = second.check("flush", "--store", store)
    assert flushed.stdout.startswith(b"Everything until now is in hour files")
    second.check("verify", "--store", store)
    logged = [event for partition in range(PARTITIONS) for event in _logged(first, partition)]
    copies = sum(lane.copies for lane in lanes)
    assert copies > 10
    assert len(logged) >= (LANES * BATCHES + copies) * EVENTS
    status = json.loads(second.get("/v1/status")[1])
    assert status["ok"] and status["storage"] is None

    def lags() -> set[float]:
        return {one["lag_s"] for one in json.loads(second.get("/v1/status")[1])["partitions"]}

    wait_for("the marker of an hour that ended just now is read too", lambda: lags() == {0})
    staying.signal(signal.SIGTERM)
    assert (staying.wait(), first.stop(), second.stop()) == (0, 0, 0)
    folder = azurite.download(store, tmp_path / "copy")
    assert problems(folder, PARTITIONS, [lane.batches for lane in lanes]) == []
    assert not (folder / "_dead").exists()


def _owners(system: System, machines: Machines) -> set[str]:
    return {
        row["owner"]
        for row in json.loads(system.check("leases", "--json", "--watch", "0s", "--store", machines.store).stdout)
    }


def _logged(system: System, partition: int) -> Iterator[bytes]:
    """Every event in the log of a partition, as the API gives it."""
    offset = "start"
    while True:
        answer = request(system.url, "GET", f"/v1/partitions/{partition}/events?from={offset}&limit=10000")
        assert answer.status == 200
        yield from answer.body.splitlines()
        following = answer.headers["penstock-next-offset"]
        if following in (offset, answer.headers["penstock-end-offset"]):
            return
        offset = following


def test_hours_close_without_events_that_follow(make_system: Make, kafka: Brokers, tmp_path: Path) -> None:
    """By the markers that the API writes; and then the hour has its manifest."""
    folder = tmp_path / "store"
    machines = Machines(make_system, kafka.fresh_url(), str(folder))
    api = machines.api("api").start()
    host = machines.host(api, "host")
    assert post_numbered(api.url, "p", 1).status == 200
    wait_for("its hour is complete", lambda: list((folder / "_hours").glob("*.json")))
    [manifest] = [json.loads(path.read_bytes()) for path in (folder / "_hours").glob("*.json")]
    assert manifest["events"] == 1
    host.signal(signal.SIGTERM)
    assert host.wait() == 0


def test_numbers_are_judged_by_who_reads(make_system: Make, kafka: Brokers, tmp_path: Path) -> None:
    """A copy, other bytes under its number, a number too old to be known: the API takes all of them, the archive what is new."""
    folder = tmp_path / "store"
    machines = Machines(make_system, kafka.fresh_url(), str(folder))
    api = machines.api("api").start()
    machines.host(api, "host")
    other = b'{"deviceId":"d-1","n":"other"}'
    answers = [post_numbered(api.url, "p", 2 * n) for n in range(1, 8)]
    answers += [post_numbered(api.url, "p", 14), post_numbered(api.url, "p", 14, other), post_numbered(api.url, "p", 5)]
    assert {(answer.status, answer.json["accepted"], answer.json["duplicate"]) for answer in answers} == {
        (200, 1, False)
    }
    assert api.get("/v1/producers/p")[0] == 404
    for command in ("flush", "verify"):
        api.check(command, "--store", str(folder))
    assert problems(folder, PARTITIONS, [[Batch([b'{"deviceId":"d-1","n":%d}' % (2 * n)]) for n in range(1, 8)]]) == []
    dead = [json.loads(path.read_bytes()) for path in sorted(folder.glob("_dead/*/*.json"))]
    assert [(one["reason"], one["sequence"], one["events"][0]["n"]) for one in dead] == [
        ("number_reused", 14, "other"),
        ("number_too_old", 5, 5),
    ]


def test_what_does_not_fit_is_refused(make_system: Make, kafka: Brokers, tmp_path: Path) -> None:
    topic, store = kafka.fresh_topic(), str(tmp_path / "store")
    url = f"kafka://{kafka.servers}/{topic}"
    system = make_system(command="api", partitions=2, workers=1)

    def refused(command: str, *places: str, because: str) -> None:
        more = ("--listen", "127.0.0.1:0", "--admin", "127.0.0.1:0", "--partitions", "2") if command == "api" else ()
        done = system.run(command, "--data", str(system.data), *more, *places)
        assert (done.returncode, because in done.stderr.decode()) == (2, True), done

    places = ("--hub", url, "--store", store)
    refused("api", "--hub", url, *ONE_COPY, because="the store must be named")
    refused("api", "--hub", "http://127.0.0.1:1", because="an API has its hub in the data folder, or in a topic")
    refused("api", "--hub", "kafka://nowhere", "--store", store, because="is not an address of the form kafka://")
    refused("api", *places, because="--replicas 3 and --in-sync-replicas 2 cannot be created")
    refused("host", *places, because="is nobody's: start `penstock api")

    api = Machines(make_system, url, store).api("api", "--partitions", "2").start()
    refused("api", *places, *ONE_COPY, "--partitions", "3", because="it has 2 partitions, not 3")
    refused("api", *places, *ONE_COPY, "--period", "3s", because="its period in seconds is 2, not 3")
    refused("api", *places, *ONE_COPY, "--retention", "9d", because="retention.ms is 604800000, less than 777600000")
    other = ("--hub", f"kafka://{kafka.servers}/{kafka.fresh_topic()}", "--store", store)
    refused("api", *other, *ONE_COPY, "--period", "2s", because="the store belongs to another archive: its hub is")
    refused("host", "--hub", api.url, "--store", store, because="is a Kafka topic: give its address, kafka://")
    assert api.stop() == 0

    kafka.client.answers(lambda: kafka.client.admin.create_partitions([NewPartitions(topic, 3)]))
    refused("host", *places, because="was made with 2 partitions and has 3")
    refused(
        "api", *places, *ONE_COPY, "--partitions", "3", "--period", "2s", because="its number of partitions is 2, not 3"
    )


def test_the_package_is_missing(make_system: Make, tmp_path: Path) -> None:
    gone = tmp_path / "without"
    gone.mkdir()
    (gone / "confluent_kafka.py").write_text("raise ModuleNotFoundError(name='confluent_kafka')")
    system = make_system()
    path = f"{gone}:{Path(__file__).parents[2] / 'src'}"
    system.environment = {"PYTHONPATH": path}
    places = ("--hub", "kafka://127.0.0.1:9/t", "--store", str(tmp_path / "store"))
    for command in ("api", "host"):
        done = system.run(command, "--data", str(system.data), *places)
        assert (done.returncode, b"pip install 'penstock[kafka]'" in done.stderr) == (2, True), done
