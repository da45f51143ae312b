"""Hosts of other machines: users' processors and archivers that know the system only by its address, killed with -9."""

from __future__ import annotations

import json
import re
import signal
import sqlite3
from collections import Counter
from collections.abc import Callable
from operator import itemgetter
from typing import Any

import pytest

from tests.e2e.http_client import request
from tests.e2e.system import PROJECT, Process, System, wait_for

Make = Callable[..., System]
PARTITIONS = 4

# A processor with a sink that remembers sequence numbers, in one transaction with what it writes.
HOST = """
import sqlite3, sys
from penstock import EventProcessorHost

url, leases, archive, name, sink, *modes = sys.argv[1:]

class Sink:
    def __init__(self, partition):
        self.calls = 0
        self.db = sqlite3.connect(sink, timeout=60, isolation_level=None)

    def process(self, events):
        self.db.execute("begin immediate")
        [(last,)] = self.db.execute("select coalesce(max(number), -1) from last where partition = ?", (events.partition,))
        for event in events:
            if event.sequence_number > last or "forgetful" in modes:
                self.db.execute("insert into log values (?, ?, ?)", (events.partition, event.sequence_number, event.body))
                last = max(last, event.sequence_number)
        self.db.execute("insert or replace into last values (?, ?)", (events.partition, last))
        self.db.execute("commit")
        self.calls += 1
        return events.next_offset if self.calls % 3 == 0 else None

    def close(self, reason):
        self.db.close()

EventProcessorHost(url, store=leases, archive=archive, group="sink", name=name, lease_s=2).run(Sink)
"""


class Hosts:
    """Hosts of the group `sink` as processes, and what they have written. They read a topic, or over HTTP."""

    def __init__(self, system: System, *modes: str, topic: str = "") -> None:
        self.system = system
        self._hub = topic or system.url
        self.leases = system.folder / "leases"
        self._sink = system.folder / "sink.db"
        self._modes = modes
        self._sent = 0
        with sqlite3.connect(self._sink) as db:
            db.execute("pragma journal_mode = wal")
            db.execute("create table log (partition, number, body)")
            db.execute("create table last (partition primary key, number)")
        db.close()

    def start(self, name: str) -> Process:
        words = (self._hub, str(self.leases), str(self.system.store), name, str(self._sink), *self._modes)
        key = {"PENSTOCK_KEY": self.system.key}
        return self.system.process(*words, program=("-c", HOST), log=f"host-{name}.log", environment=key)

    def send(self, batches: int) -> None:
        for _ in range(batches):
            lines = [b'{"deviceId":"d-%d","n":%d}\n' % (n % 20, n) for n in range(self._sent, self._sent + 40)]
            answer = request(
                self.system.url,
                "POST",
                "/v1/events",
                b"".join(lines),
                {"Content-Type": "application/x-ndjson", **self.system.headers},
            )
            assert answer.status == 200
            self._sent += 40

    def rows(self, what: str) -> list[Any]:
        db = sqlite3.connect(self._sink, timeout=60)
        try:
            return db.execute(what).fetchall()
        finally:
            db.close()

    def written(self) -> Counter[int]:
        """Of each event, by the number that it was sent with, how often it is in the sink."""
        return Counter(json.loads(body)["n"] for (body,) in self.rows("select body from log"))

    def places(self) -> list[tuple[int, int]]:
        """Partition and sequence number of what is in the sink, as it was written."""
        return self.rows("select partition, number from log order by rowid")

    def last(self) -> dict[int, int]:
        return dict(self.rows("select partition, number from last"))

    def lease(self, partition: int) -> dict[str, object]:
        try:
            found: dict[str, object] = json.loads((self.leases / f"_leases/sink/{partition}.json").read_bytes())
        except FileNotFoundError:
            return {}
        return found

    def owners(self) -> list[object]:
        return [self.lease(partition).get("Owner") for partition in range(PARTITIONS)]

    def expected(self) -> set[int]:
        return set(range(self._sent))


def kill_with_work_undone(hosts: Hosts, victim: Process, name: str) -> None:
    """kill -9 at a moment when the sink has more of a partition than its checkpoint says."""

    def undone() -> bool:
        hosts.send(1)
        victim.freeze()
        mine = [p for p in range(PARTITIONS) if hosts.lease(p).get("Owner") == name]
        last = hosts.last()
        if any(last.get(p, -1) >= int(str(hosts.lease(p)["SequenceNumber"])) for p in mine):
            return True
        victim.thaw()
        return False

    wait_for("something is written and no checkpoint says so", undone)
    victim.kill()


@pytest.mark.parametrize(
    ("where", "modes"),
    [("http", ()), ("http", ("forgetful",)), ("topic", ())],
    ids=["sink that remembers", "control: sink that forgets", "sink that remembers, on a topic"],
)
def test_a_host_is_killed_and_another_goes_on(
    make_system: Make, where: str, modes: tuple[str, ...], request: pytest.FixtureRequest
) -> None:
    topic = request.getfixturevalue("kafka").fresh_url() if where == "topic" else ""
    system = make_system(partitions=PARTITIONS, anonymous=False, **(on_topic(topic) if topic else {})).start()
    hosts = Hosts(system, *modes, topic=topic)
    first = hosts.start("a")
    hosts.start("b")
    wait_for("both hosts have partitions", lambda: sorted(map(str, hosts.owners())) == ["a", "a", "b", "b"])
    hosts.send(10)
    kill_with_work_undone(hosts, first, "a")
    hosts.send(10)
    expected = hosts.expected()
    wait_for("the other has written everything", lambda: expected <= hosts.written().keys())
    assert set(hosts.owners()) == {"b"}
    written, places = hosts.written(), hosts.places()
    assert written.keys() == expected
    doubled = [one for one, count in written.items() if count > 1]
    assert bool(doubled) is bool(modes)
    assert len(set(places)) == len(expected)
    assert modes or sorted(places, key=itemgetter(0)) == sorted(places)
    remote = {one["group"]: one["epoch"] for one in json.loads(system.get("/v1/status")[1])["groups"]}
    assert remote == ({} if topic else {"sink": remote["sink"]})


def on_topic(url: str) -> dict[str, Any]:
    """What makes a system an API there."""
    places = ("--hub", url, "--store", "data/store", "--replicas", "1", "--in-sync-replicas", "1")
    return {"command": "api", "workers": 1, "options": places}


def test_archivers_of_another_machine(make_system: Make) -> None:
    """`up` without an archiver, and two that know only its address and the store. One is killed."""
    system = make_system(period="2s", partitions=PARTITIONS, options=("--archive", "none"), anonymous=False).start()
    words = ("--hub", system.url, "--store", str(system.store), "--lease", "2s")
    hosts = {
        name: system.process(
            *("host", "--name", name, "--data", str(system.folder / name)),
            *words,
            log=f"{name}.log",
            environment={"PENSTOCK_KEY": system.key},
        )
        for name in ("a", "b")
    }

    def owners() -> set[str]:
        paths = system.store.glob("_leases/$archive/*.json")
        return {json.loads(path.read_bytes())["Owner"] for path in paths}

    wait_for("both archive", lambda: owners() == {"a", "b"})
    lines = b"".join(b'{"deviceId":"d-%d","n":%d}\n' % (n % 20, n) for n in range(2000))
    kind = {"Content-Type": "application/x-ndjson", **system.headers}
    assert request(system.url, "POST", "/v1/events", lines, kind).status == 200
    wait_for("an hour is complete", lambda: list(system.store.glob("_hours/*.json")))
    assert request(system.url, "POST", "/v1/events", lines, kind).status == 200
    hosts["a"].kill()
    wait_for("the other has all partitions", lambda: owners() == {"b"})
    assert request(system.url, "POST", "/v1/events", lines, kind).status == 200
    system.settle()
    manifests = [json.loads(path.read_bytes()) for path in sorted(system.store.glob("_hours/*.json"))]
    assert sum(manifest["events"] for manifest in manifests) in (2000, 4000, 6000)
    groups = json.loads(system.get("/v1/status")[1])["groups"]
    assert {one["group"] for one in groups} == {"$archive"}
    assert hosts["b"].stop() == 0


def test_a_host_by_address_needs_a_store_that_is_named(make_system: Make) -> None:
    system = make_system()
    done = system.run("host", "--hub", "http://127.0.0.1:9")
    assert (done.returncode, b"--store" in done.stderr) == (2, True), done
    done = system.run("host", "--hub", "amqp://h:1/t", "--store", "s")
    assert (done.returncode, b"http://HOST:PORT" in done.stderr) == (2, True), done
    done = system.run("host", "--hub", "http://127.0.0.1:9", "--store", "s")
    assert (done.returncode, b"gives no answer" in done.stderr) == (1, True), done
    assert list(system.folder.iterdir()) == []


def test_the_example_of_the_handbook(make_system: Make) -> None:
    system = make_system(partitions=PARTITIONS).start()
    text = (PROJECT / "docs" / "hosts.md").read_text("utf-8")
    example = re.findall(r"```python\n(.*?)```", text, re.DOTALL)[0]
    assert len([line for line in example.splitlines() if line.strip()]) <= 12
    code = example.replace("http://127.0.0.1:8480", system.url)
    assert code != example
    lines = b"".join(b'{"deviceId":"d-%d","temperature":%d}\n' % (n, 20 + 5 * n) for n in range(20))
    assert request(system.url, "POST", "/v1/events", lines, {"Content-Type": "application/x-ndjson"}).status == 200
    host = Process(["-u", "-c", code], system.folder / "example.log")
    try:
        wait_for("all hot devices are printed", lambda: host.text().count(" is hot at ") == 7)
        host.signal(signal.SIGINT)
        assert host.wait() == 0, host.text()
    finally:
        host.kill()
    assert "d-19 is hot at 115" in host.text()
    assert "Traceback" not in host.text() and "KeyboardInterrupt" not in host.text()
    leases = list((system.folder / "leases").glob("_leases/alarms/*.json"))
    assert [json.loads(path.read_bytes())["Owner"] for path in leases] == [""] * PARTITIONS
