"""The commands that ask an installation on Kafka, from any machine: `--hub kafka://… --store …`."""

from __future__ import annotations

import gzip
import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from penstock.archive.ledger import Gap, Ledger, Record, owner
from penstock.blobs.disk import DiskBlobs
from penstock.files import Files
from tests.e2e.http_client import request
from tests.e2e.system import System, wait_for
from tests.kafka_broker import Brokers

Make = Callable[..., System]
ONE_COPY = ("--replicas", "1", "--in-sync-replicas", "1")


class Installation:
    """An API and a host on a topic, and commands on a machine that knows nothing but the two addresses."""

    def __init__(self, make: Make, kafka: Brokers, folder: Path) -> None:
        self.store = folder / "store"
        self._places = ("--hub", kafka.fresh_url(), "--store", str(self.store))
        self.api = make("api", command="api", period="1h", partitions=2, workers=1, options=(*self._places, *ONE_COPY))
        self.api.start()
        self._elsewhere = make("elsewhere")
        host = self.api.process(
            "host", *self._places, "--data", str(self.api.folder / "h"), "--lease", "2s", log="h.log"
        )
        wait_for("the host has a lease", lambda: "lease taken" in host.text() or host.ended)

    def post(self, number: str, *events: dict[str, object], headers: Mapping[str, str] | None = None) -> None:
        body = "".join(json.dumps(event) + "\n" for event in events).encode()
        number = f"{number};sha256={hashlib.sha256(body).hexdigest()}"
        more = {"Content-Type": "application/x-ndjson", "Penstock-Producer": number, **(headers or {})}
        answer = request(self.api.url, "POST", "/v1/events", body, more)
        assert answer.status == 200, answer

    def run(self, command: str, *arguments: str, code: int = 0) -> str:
        done = self._elsewhere.run(*command.split(), *arguments, *self._places)
        assert done.returncode == code, done.stdout.decode() + done.stderr.decode()
        return (done.stdout + done.stderr).decode()

    def json(self, command: str, *arguments: str, code: int = 0) -> Any:
        return json.loads(self.run(command, *arguments, "--json", code=code))

    def dead(self, command: str, *arguments: str, code: int = 0) -> str:
        done = self._elsewhere.run("dead", command, *arguments, "--store", str(self.store))
        assert done.returncode == code, done.stdout.decode() + done.stderr.decode()
        return (done.stdout + done.stderr).decode()

    def totals(self) -> dict[str, int]:
        self.run("flush")
        report = self.json("audit", "--deep")
        assert (report["ok"], report["problems"], report["notes"]) == (True, [], [])
        return {name: report["totals"][name] for name in ("logged", "archived", "copies", "dead", "pending")}

    def archived(self) -> list[dict[str, Any]]:
        self.run("flush")
        files = self.store.glob("[0-9]*/*.json.gz")
        return [json.loads(line) for file in files for line in gzip.decompress(file.read_bytes()).splitlines()]


@pytest.fixture
def installed(make_system: Make, kafka: Brokers, tmp_path: Path) -> Installation:
    found = Installation(make_system, kafka, tmp_path)
    found.post("p;epoch=1;sequence=1", {"deviceId": "d-1", "n": 1}, {"deviceId": "d-2", "n": 2})
    found.post("p;epoch=1;sequence=2", {"deviceId": "d-1", "n": 3})
    found.post("p;epoch=1;sequence=1", {"deviceId": "d-1", "n": 1}, {"deviceId": "d-2", "n": 2})
    site = {"Penstock-Property-Site": "Zürich".encode().decode("latin-1"), "Penstock-Device-Field": "address"}
    found.post("p;epoch=1;sequence=2", {"address": "d-1", "n": 4.50}, {"address": "d-1", "n": 5}, headers=site)
    return found


def test_from_another_machine(installed: Installation) -> None:
    assert installed.run("flush").startswith("Everything until now is in hour files")
    assert installed.totals() == {"logged": 7, "archived": 3, "copies": 2, "dead": 2, "pending": 0}
    assert "ok: in the log = archived + copies + dead letters + pending" in installed.run("audit")
    status = installed.json("status")
    assert (status["ok"], status["counters"], status["storage"]) == (True, {"dead_letters": 1}, None)
    assert "dead_letters 1" in installed.run("status")
    leases = installed.json("leases")
    assert [(row["lag_events"], row["lag_records"]) for row in leases] == [(None, 0), (None, 0)]
    installed.post("p;epoch=1;sequence=3", {"deviceId": "d-1", "n": 6})
    file = next(installed.store.glob("[0-9]*/*.json.gz"))
    partition, hour = file.parent.name, file.name[:13]
    why = installed.json("why", partition, hour)
    assert (why["state"], why["files"][0]["closed_by"], why["partition"]) == ("open", "cut", int(partition))
    lags = [installed.json("why", n, hour)["lag_events"] for n in ("0", "1")]
    assert sorted(lags) == [0, 1]
    records = [json.loads(installed.run("dump", f"{partition}/{offset}")) for offset in (0, 1, 2)]
    assert [(one["kind"], one["offset"]) for one in records] == [("record", offset) for offset in (0, 1, 2)]
    assert "p" in [source["producer"] for one in records for source in one["sources"]]
    assert "lies beyond the end" in installed.run("dump", f"{partition}/4711", code=1)
    done = installed._elsewhere.run("dump", f"{partition}/{file.name}", "--store", str(installed.store))
    assert json.loads(done.stdout)["kind"] == "hour file"
    [producers] = [path for path in installed.store.glob("_producers/*/*") if path.parent.name == partition][:1]
    done = installed._elsewhere.run("dump", f"_producers/{partition}/{producers.name}", "--store", str(installed.store))
    assert json.loads(done.stdout)["producers"]["p"]["batches"][0]["reached"] == 2
    assert "cannot name a blob" in installed._elsewhere.run("dump", "../x", "--store", "s").stderr.decode()

    # A file that somebody has changed.
    file = max(installed.store.glob("[0-9]*/*.json.gz"), key=lambda path: path.stat().st_size)
    lines = gzip.decompress(file.read_bytes()).splitlines(keepends=True)
    file.write_bytes(gzip.compress(b"".join([*lines, lines[0]])))
    twice = f"{file.parent.name}/{file.name}: lines that are there twice: {len(lines) + 1}"
    assert twice in installed.json("audit", "--deep", code=1)["problems"]

    # A file that was declared lost, as `leases skip` does it.
    store = DiskBlobs(installed.store, Files())
    known = owner(store)
    assert known is not None
    ledger = Ledger(store, known.hub, int(file.parent.name))
    [record] = [link for link in ledger.chain(0) if isinstance(link, Record) and link.file.endswith(file.name)]
    ledger.lose(
        Gap(
            known.hub, record.partition, record.first, record.next, "", "skipped: a bad disk", "ann@ops", 1, "i", "then"
        )
    )
    file.unlink()
    text = installed.run("audit", "--deep")
    assert f"{record.file} was decided, and is lost: skipped: a bad disk (ann@ops, then)" in text
    assert "ok: in the log = archived + copies + dead letters + lost + pending" in text
    assert installed.json("audit")["totals"]["lost"] == record.events
    assert "closed, and a file is missing" in installed.run("why", str(record.partition), hour)


def test_dead_letters_are_sent_again_once(installed: Installation) -> None:
    installed.run("flush")
    [letter] = json.loads(installed.dead("list", "--json"))
    assert {name: letter[name] for name in ("events", "reason", "producer", "epoch", "sequence", "replayed")} == {
        "events": 2, "reason": "number_reused", "producer": "p", "epoch": 1, "sequence": 2, "replayed": None,
    }  # fmt: skip
    name = letter["id"]
    assert letter["at"][:2] == "20" and name in installed.dead("list") and "number_reused" in installed.dead("list")
    assert installed.dead("show", name, "--raw") == '{"address": "d-1", "n": 4.5}\n{"address": "d-1", "n": 5}\n'
    assert "other bytes came before under this number" in installed.dead("show", name)
    assert "nothing to put right" in installed.dead("fix", name, "--drop", "n", code=2)
    url = ("--url", installed.api.url)
    assert "no dead letter 'x'" in installed.dead("replay", "x", *url, code=2)

    stopped = installed.dead("replay", name, "--url", "http://127.0.0.1:9", code=1)
    assert "gives no answer" in stopped and not list(installed.store.glob("_dead/*/*.number.json"))
    assert f"{name}: 2 events accepted, 0 rejected." in installed.dead("replay", "--all", *url)
    assert installed.totals() == {"logged": 9, "archived": 5, "copies": 2, "dead": 2, "pending": 0}
    again = [event for event in installed.archived() if "address" in event]
    assert [(event["n"], event["properties"]) for event in again] == [
        (4.5, {"site": "Zürich"}),
        (5, {"site": "Zürich"}),
    ]
    assert "1 dead letters were sent again before" in installed.dead("replay", "--all", *url)
    assert installed.json("status")["counters"] == {"dead_letters": 0}
    assert json.loads(installed.dead("list", "--json"))[0]["replayed"]["accepted"] == 2

    # Another key would make the number another producer's.
    [note] = installed.store.glob("_dead/*/*.replayed.json")
    answered = note.read_bytes()
    note.unlink()
    assert "sent with no key" in installed.dead("replay", name, *url, "--key", "k.s", code=1)
    note.write_bytes(answered)

    # It died between the post and the note; so the events are posted once more, under the number that stands.
    [note] = installed.store.glob("_dead/*/*.replayed.json")
    note.unlink()
    assert "2 events accepted" in installed.dead("replay", name, *url)
    assert installed.totals() == {"logged": 11, "archived": 5, "copies": 4, "dead": 2, "pending": 0}

    # The negative control: without the number they are archived twice.
    note.unlink()
    next(installed.store.glob("_dead/*/*.number.json")).unlink()
    installed.dead("replay", name, *url)
    assert installed.totals()["archived"] == 7

    # A letter of another hub.
    note.unlink()
    path = installed.store / letter["path"]
    path.write_text(json.dumps(json.loads(path.read_bytes()) | {"hub": "1" * 32}))
    said = installed.dead("replay", "--all", *url, code=2)
    assert "are of 1111" in said and "Nothing was sent" in said
    path.unlink()
    assert "is missing" in "".join(installed.json("audit", code=1)["problems"])


def test_what_cannot_be_asked(make_system: Make, tmp_path: Path) -> None:
    elsewhere = make_system("elsewhere")

    def refused(*arguments: str) -> str:
        done = elsewhere.run(*arguments)
        assert done.returncode == 2, done
        return done.stderr.decode()

    topic, store = ("--hub", "kafka://127.0.0.1:9/t"), ("--store", str(tmp_path / "s"))
    for command in (["audit"], ["status"], ["leases"], ["flush"], ["why", "0", "2026-11-22T14"], ["dump", "0/1"]):
        assert "the store must be named" in refused(*command, *topic)
    assert "asks a Kafka topic" in refused("audit", "--hub", "http://127.0.0.1:9", *store)
