"""What brokers delete before it is read: said in time, and passed over only by an order that leaves a record."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from confluent_kafka import TopicPartition
from confluent_kafka.admin import AlterConfigOpType, ConfigEntry, ConfigResource

from penstock import EventProcessorHost, Events
from penstock.testing import MemoryBlobs, MemoryLog
from tests.e2e.http_client import request
from tests.e2e.system import System, wait_for
from tests.e2e.test_kafka import Machines
from tests.kafka_broker import Brokers

Make = Callable[..., System]
DEVICES = 40


class Running:
    """An API on a topic of two partitions with its store in a folder."""

    def __init__(self, make: Make, kafka: Brokers, folder: Path) -> None:
        self.kafka = kafka
        self.store = folder / "store"
        self.machines = Machines(make, kafka.fresh_url(), str(self.store))
        self.topic = self.machines.topic.rpartition("/")[2]
        self.api = self.machines.api("api", "--partitions", "2").start()
        self.sent = 0

    def post(self, sequence: int = 0) -> None:
        """The next numbered batch, or that one again."""
        self.sent += not sequence
        number = sequence or self.sent
        body = b"\n".join(b'{"deviceId":"d-%d","b":%d}' % (device, number) for device in range(DEVICES))
        producer = f"p;epoch=1;sequence={number};sha256={hashlib.sha256(body).hexdigest()}"
        headers = {"Content-Type": "application/x-ndjson", "Penstock-Producer": producer}
        assert request(self.api.url, "POST", "/v1/events", body, headers).status == 200

    def events(self) -> list[tuple[int, int]]:
        """Device and batch of each event that is sent."""
        return [(device, batch) for batch in range(1, self.sent + 1) for device in range(DEVICES)]

    def delete(self) -> list[int]:
        """What is in the topic by now; where it begins then."""
        ends = [end >> 20 for end in self.api.ends()]
        places = [TopicPartition(self.topic, partition, end) for partition, end in enumerate(ends)]
        self.kafka.client.answers(lambda: self.kafka.client.admin.delete_records(places))
        return ends

    def set(self, **values: int) -> None:
        changes = [
            ConfigEntry(name.replace("_", "."), str(value), incremental_operation=AlterConfigOpType.SET)
            for name, value in values.items()
        ]
        resource = ConfigResource(ConfigResource.Type.TOPIC, self.topic, incremental_configs=changes)
        self.kafka.client.answers(lambda: self.kafka.client.admin.incremental_alter_configs([resource]))

    def status(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.api.get("/v1/status")[1])
        return found

    def skip(self, *arguments: str) -> dict[str, Any]:
        done = self.api.run("leases", "skip", *self.places(), "--json", "--watch", "0.2s", *arguments)
        assert done.returncode == 0, done
        found: dict[str, Any] = json.loads(done.stdout)
        return found

    def places(self) -> tuple[str, ...]:
        return ("--hub", self.machines.topic, "--store", str(self.store))


@pytest.fixture
def running(make_system: Make, kafka: Brokers, tmp_path: Path) -> Running:
    return Running(make_system, kafka, tmp_path)


def test_events_that_were_deleted_before_they_were_archived(running: Running) -> None:
    api = running.api
    running.post()
    host = running.machines.host(api, "first")
    api.check("flush", "--store", str(running.store))
    assert host.stop() == 0

    running.post()
    left = [one["retention_left_s"] for one in running.status()["partitions"]]
    assert all(604_000 < one <= 604_800 for one in left), left
    running.set(retention_ms=3_600_000_000, retention_bytes=1 << 40)
    now = running.status()
    assert [now["retention"][name] for name in ("after_s", "unread", "partition_bytes")] == [
        3_600_000,
        "deleted",
        1 << 40,
    ]
    assert ([one["code"] for one in now["warnings"]], now["ok"]) == (["retention_bytes"], True)
    running.set(retention_ms=1000, retention_bytes=-1)
    wait_for(
        "the time left is short", lambda: "retention_short" in [one["code"] for one in running.status()["warnings"]]
    )
    running.set(retention_ms=-1)
    now = running.status()
    assert (now["retention"]["after_s"], now["retention"]["left_s"], now["warnings"]) == (None, None, [])
    assert b"the brokers keep everything" in api.run("status", "--url", api.url).stdout

    done = {one["partition"]: int(one["offset"]) for one in now["partitions"]}
    first = running.delete()
    running.post()
    host = running.machines.host(api, "second")
    wait_for("both are parked", lambda: host.text().count("partition parked") == 2)
    assert "offset_trimmed: " in host.text()
    for partition in (0, 1):
        gone = f"Offsets {done[partition]} to {first[partition] - 1} of partition {partition}, which $archive would read next, were deleted"
        assert gone in host.text()
        assert gone in running.status()["problems"][partition]
        seen = api.run("leases", "--json", "--watch", "0s", "--store", str(running.store), "--url", api.url)
        rows = json.loads(seen.stdout)
        assert gone in rows[partition]["problem"]
    assert api.run("status", "--url", api.url).returncode == 1
    for wrong in (str(first[0] - 1), str(first[0] + 1), "x"):
        order = ("--partition", "0", "--to", wrong, "--reason", "r", "--watch", "0s")
        refused = api.run("leases", "skip", *running.places(), *order)
        assert refused.returncode == 2, refused

    for partition in (0, 1):
        made = running.skip("--partition", str(partition), "--to", "earliest", "--reason", "two weeks off")
        assert (made["offset"], made["offset_next"]) == (str(done[partition]), str(first[partition]))
    wait_for("it goes on", lambda: running.status()["ok"])
    api.check("flush", "--store", str(running.store))
    report = json.loads(api.check("verify", "--json", "--store", str(running.store)).stdout)
    assert [(gap["reason"], gap["next"] >> 20) for gap in report["gaps"]] == [
        ("skipped: two weeks off", first[0]),
        ("skipped: two weeks off", first[1]),
    ]
    assert (report["ok"], report["totals"]["archived"]) == (True, 2 * DEVICES)
    assert host.stop() == 0


class Notes:
    """What the processors of a group were given, over all their lives."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, int]] = []
        self.numbers: dict[tuple[int, int], int] = {}
        self.fails = False
        self._one = threading.Lock()

    def __call__(self, events: Events) -> str:
        with self._one:
            for event in events:
                told = json.loads(event.body)
                key = int(told["deviceId"][2:]), told["b"]
                assert event.device == told["deviceId"]
                assert self.numbers.setdefault(key, event.sequence_number) == event.sequence_number
                self.seen.append(key)
        return events.next_offset


def host_of(running: Running, group: str, store: Path | MemoryBlobs, **more: Any) -> EventProcessorHost:
    given: dict[str, Any] = {
        "group": group,
        "store": store,
        "archive": running.store,
        "lease_s": 1.0,
        "log": MemoryLog(),
    }
    return EventProcessorHost(running.machines.topic, **given | more)


def test_processors_of_users_are_given_each_event_once(running: Running, tmp_path: Path) -> None:
    """Although batches are in the topic twice: within one life of a host, over a restart of it, and behind what the archive knows."""
    archiver = running.machines.host(running.api, "archiver")
    notes, leases = Notes(), tmp_path / "leases"
    for round_ in range(3):
        with host_of(running, "g", leases, name=f"host-{round_}") as host:
            host.start(notes)
            if running.sent:
                running.post(running.sent)  # of the host before
            running.post()
            running.post(running.sent)
            running.post()
            running.post(running.sent)
            wait_for("it has them all", lambda: len(set(notes.seen)) == len(running.events()))
            wait_for("it is at the end", lambda host=host: _at_end(running, host))
            assert sum(state.copies for state in host.state()) == (3 if round_ else 2) * DEVICES
        if round_ == 0:
            running.api.check("flush", "--store", str(running.store))
            assert list((running.store / "_producers").rglob("0*"))
    assert sorted(notes.seen) == sorted(running.events())
    assert archiver.stop() == 0


def test_without_the_filter_they_are_given_copies(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(EventProcessorHost, "_fresh", lambda *_: None)
    notes = Notes()
    monkeypatch.setattr(notes, "numbers", _Any())
    running.post()
    running.post(1)
    with host_of(running, "g", MemoryBlobs()) as host:
        host.start(notes)
        wait_for("it has them twice", lambda: len(notes.seen) == 2 * DEVICES)
    assert len(set(notes.seen)) == DEVICES


class _Any(dict[tuple[int, int], int]):
    """Keeps nothing."""

    def setdefault(self, key: tuple[int, int], number: int = 0) -> int:  # type: ignore[override]
        return number


def _at_end(running: Running, host: EventProcessorHost) -> bool:
    ends = running.api.ends()
    return [state.offset for state in host.state()] == [str(end >> 20) for end in ends]


def test_a_group_of_processors_whose_events_were_deleted(running: Running) -> None:
    leases, notes = running.store, Notes()
    running.post()
    with host_of(running, "g", leases, name="one") as host:
        host.start(notes)
        wait_for("it has them all", lambda: len(notes.seen) == DEVICES)
        wait_for("it is at the end", lambda: _at_end(running, host))
    running.post()
    first = running.delete()
    running.post()
    log = MemoryLog()
    with host_of(running, "g", leases, name="two", log=log) as host:
        host.start(notes)
        wait_for("both are parked", lambda: all(state.parked for state in host.state()) and len(host.state()) == 2)
        assert all("offset_trimmed: " in str(state.parked) for state in host.state())
        assert all("leases skip --group 'g'" in str(state.parked) for state in host.state())
        for partition in (0, 1):
            more = ("--group", "g", "--to", "earliest", "--reason", "gone")
            done = running.skip("--partition", str(partition), *more)
            assert done["offset_next"] == str(first[partition])
            assert done["records"][0].startswith(f"_skips/g/{partition}/")
        wait_for("it has the rest", lambda: len(notes.seen) == 2 * DEVICES)
    assert {batch for _, batch in notes.seen} == {1, 3}


def test_what_makes_no_host_on_a_topic(running: Running, tmp_path: Path) -> None:
    from penstock.errors import SettingsError

    with pytest.raises(SettingsError, match="is nobody's"):
        host_of(running, "g", MemoryBlobs(), archive=tmp_path / "empty").start(Notes())
    with pytest.raises(SettingsError, match="`store` is missing"):
        EventProcessorHost(running.machines.topic, group="g")
    with pytest.raises(SettingsError, match="not an address"):
        EventProcessorHost("kafka://nowhere", group="g", store=running.store).start(Notes())
