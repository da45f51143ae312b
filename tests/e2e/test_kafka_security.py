"""APIs and hosts on brokers that ask who comes: events through a door into the archive, and doors that shut, at the start and later."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import json
import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from penstock import EventProcessorHost, Events
from penstock.clock import SystemClock
from penstock.errors import SettingsError
from penstock.hub.kafka import KafkaHub
from penstock.hub.kafka_cluster import Cluster
from penstock.hub.kafka_security import Security
from penstock.testing import MemoryLog
from tests.e2e.http_client import Answer, request
from tests.e2e.system import System, wait_for
from tests.event_hubs import EventHubs
from tests.kafka_broker import Brokers, made_topic
from tests.kafka_doors import AZURE, OWNER, PASSWORD, WORKER, Doors

Make = Callable[..., System]
POLICY_VIOLATION, MESSAGE_TOO_LARGE = 44, 10
ERRORS = (POLICY_VIOLATION, 45, 47, 59, MESSAGE_TOO_LARGE)
"""What Event Hubs answers to a record that would have to wait for longer than its time-out; then what an idempotent producer may hear:
OUT_OF_ORDER_SEQUENCE_NUMBER, INVALID_PRODUCER_EPOCH, UNKNOWN_PRODUCER_ID, of which librdkafka sends some again by itself."""
ONE_COPY = ("--replicas", "1", "--in-sync-replicas", "1")


@pytest.fixture
def password_file(tmp_path: Path) -> str:
    path = tmp_path / "password"
    path.write_text(f"{PASSWORD}\n")
    return str(path)


def scram(password_file: str, user: str) -> tuple[str, ...]:
    sasl = ("--kafka-security", "sasl_plaintext", "--kafka-mechanism", "SCRAM-SHA-256")
    return *sasl, "--kafka-user", user, "--kafka-password-file", password_file


def post(api: System, sequence: int, *, epoch: int = 1, key: str = "") -> Answer:
    body = b'{"deviceId":"d-1","epoch":%d,"n":%d}' % (epoch, sequence)
    number = f"p;epoch={epoch};sequence={sequence};sha256={hashlib.sha256(body).hexdigest()}"
    headers = {"Content-Type": "application/json", "Penstock-Producer": number}
    return request(api.url, "POST", "/v1/events", body, headers | ({"Authorization": f"Bearer {key}"} if key else {}))


def test_events_get_into_the_archive_and_a_user_who_is_shut_out_is_answered_503(
    make_system: Make, kafka: Brokers, doors: Doors, password_file: str, tmp_path: Path
) -> None:
    """The API comes in with SCRAM as somebody who loses his right and gets it back; the host with TLS and a password."""
    doors.let_in(WORKER)
    topic, store = kafka.fresh_topic(), tmp_path / "store"
    places = ("--hub", f"kafka://{doors.sasl}/{topic}", "--store", str(store), *ONE_COPY, *scram(password_file, WORKER))
    api = make_system(command="api", period="2s", partitions=2, workers=1, options=places).start()
    there = ("--hub", f"kafka://{doors.both}/{topic}", "--store", str(store), "--data", str(api.folder / "host"))
    both = ("--kafka-security", "sasl_ssl", "--ca", doors.ca, "--kafka-user", OWNER)
    host = api.process("host", *there, *both, log="host.log", environment={"PENSTOCK_KAFKA_PASSWORD": PASSWORD})
    assert post(api, 1).status == 200

    doors.shut_out(WORKER)
    wait_for("it is not ready", lambda: api.get("/health/ready")[0] == 503)
    refused = post(api, 2)
    assert (refused.status, refused.json["code"], refused.headers["retry-after"]) == (503, "hub_unavailable", "2")
    assert "refuse the user worker" in refused.json["detail"]
    doors.let_in(WORKER)
    wait_for("it is taken", lambda: post(api, 2).status == 200)

    wait_for("both are archived", lambda: sum(hour["events"] for hour in _hours(store)) == 2)
    host.signal(signal.SIGTERM)
    assert (host.wait(), api.stop()) == (0, 0)
    said = api.up.text() + host.text()
    assert PASSWORD not in said
    assert len(said.splitlines()) < 60


def _hours(store: Path) -> list[dict[str, int]]:
    return [json.loads(path.read_bytes()) for path in (store / "_hours").glob("*.json")]


def test_commands_end_within_seconds_and_say_why(
    make_system: Make, kafka: Brokers, doors: Doors, password_file: str, tmp_path: Path
) -> None:
    system = make_system(command="api", partitions=2, workers=1)
    wrong = tmp_path / "wrong"
    wrong.write_text("s3cret")

    def refused(command: str, door: str, *security: str, because: str) -> None:
        more = ("--listen", "127.0.0.1:0", "--admin", "127.0.0.1:0", *ONE_COPY) if command == "api" else ()
        places = ("--data", str(system.data), "--hub", f"kafka://{door}/t", "--store", str(tmp_path / "store"))
        began = time.monotonic()
        done = system.run(command, *places, *more, *security)
        said = done.stderr.decode()
        assert time.monotonic() - began < 20
        assert (done.returncode, bool(re.search(because, said))) == (2, True), done
        assert "s3cret" not in said
        assert PASSWORD not in said
        assert len(said.splitlines()) <= 2

    (tmp_path / "store").mkdir()
    claimed = {"hub": "0" * 32, "partitions": 2, "period": 2, "created": "2026-11-22T14:00:00.000Z", "place_bits": 20}
    for command in ("api", "host"):
        refused(command, doors.sasl, *scram(str(wrong), OWNER), because="refuse the user owner .*invalid credentials")
        refused(command, doors.both, "--kafka-security", "ssl", because="no TLS with the Kafka brokers .*See to --ca")
        refused(command, doors.both, because="close every connection: .*--kafka-security plaintext")
        (tmp_path / "store" / "_hub.json").write_text(json.dumps(claimed))  # without it a host asks nobody
    guest = ("--kafka-security", "sasl_plaintext", "--kafka-user", "guest", "--kafka-password-file", password_file)
    refused("api", doors.sasl, *guest, because="do not let the user guest see the topic t")


@contextlib.contextmanager
def reading(hub: str, **given: Any) -> Iterator[list[bytes]]:
    """What a processor of a program is given there, while its host runs."""
    seen: list[bytes] = []

    def take(events: Events) -> str:
        seen.extend(event.body for event in events)
        return events.next_offset

    with EventProcessorHost(hub, name="one", lease_s=1.0, **given) as host:
        host.start(take)
        yield seen


def test_processors_come_in_with_the_same_settings(
    make_system: Make, kafka: Brokers, doors: Doors, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As arguments, in the environment, or some of both; an argument counts more, and a password is shown to nobody."""
    topic, store, log = kafka.fresh_topic(), tmp_path / "store", MemoryLog()
    places = ("--hub", f"kafka://{kafka.servers}/{topic}", "--store", str(store), *ONE_COPY)
    api = make_system(command="api", partitions=1, workers=1, options=places).start()
    assert post(api, 1).status == 200

    def seen(door: str, group: str, **given: str) -> None:
        with reading(f"kafka://{door}/{topic}", group=group, store=store, log=log, **given) as bodies:
            wait_for(f"{group} has the event", lambda: len(bodies) == 1)

    seen(doors.tls, "certificate", kafka_security="ssl", ca=doors.ca, certificate=doors.client)
    (tmp_path / "wrong").write_text("s3cret")
    for name, text in {"SECURITY": "sasl_ssl", "USER": OWNER, "PASSWORD_FILE": str(tmp_path / "wrong")}.items():
        monkeypatch.setenv(f"PENSTOCK_KAFKA_{name}", text)
    monkeypatch.setenv("PENSTOCK_CA", doors.ca)
    with pytest.raises(SettingsError, match=r"refuse the user owner .*See to kafka_user, the password") as refused:
        seen(doors.both, "nobody")
    seen(doors.both, "password", kafka_password=PASSWORD)
    sasl = {"kafka_security": "sasl_plaintext", "kafka_mechanism": "SCRAM-SHA-512", "kafka_password": PASSWORD}
    seen(doors.sasl, "scram", **sasl)
    assert not any(secret in refused.value.detail + repr(log.lines) for secret in (PASSWORD, "s3cret"))
    assert api.stop() == 0


def test_a_producer_belongs_to_the_name_of_its_key(make_system: Make, kafka: Brokers, tmp_path: Path) -> None:
    """Somebody with a key of his own sends under another's producer id and a higher epoch: it fences nobody, and copies stay copies."""
    store = tmp_path / "store"
    places = ("--hub", kafka.fresh_url(), "--store", str(store))
    api = make_system(
        command="api", period="2s", partitions=2, workers=1, anonymous=False, options=(*places, *ONE_COPY)
    ).start()
    host = api.process("host", *places, "--data", str(api.folder / "host"), log="host.log")
    create = ("key", "create", "--data", str(api.data), "--right", "send", "--json", "--name")
    press, thief = (json.loads(api.run(*create, name).stdout)["key"] for name in ("press", "thief"))
    for key, epoch, sequence in ((press, 1, 1), (thief, 9, 9), (press, 1, 2), (press, 1, 2), (press, 1, 1)):
        assert post(api, sequence, epoch=epoch, key=key).status == 200
    wait_for("all is archived", lambda: sum(hour["events"] for hour in _hours(store)) == 3)
    host.signal(signal.SIGTERM)
    assert (host.wait(), api.stop()) == (0, 0)
    files = [gzip.decompress(path.read_bytes()) for path in sorted(store.glob("[0-9]*/*.json.gz"))]
    archived = [json.loads(each) for file in files for each in file.splitlines()]
    assert [(event["epoch"], event["n"]) for event in archived] == [(1, 1), (9, 9), (1, 2)]
    assert not (store / "_dead").exists()


@pytest.fixture
def hubs(doors: Doors, kafka: Brokers) -> Iterator[EventHubs]:
    with doors.event_hubs() as running:
        yield running


def test_an_event_hub_by_its_connection_string(
    make_system: Make, kafka: Brokers, doors: Doors, hubs: EventHubs, tmp_path: Path
) -> None:
    """Its user sees the topics that are there, may make none, and is not told how they are configured, as at Azure's endpoint, and
    nothing is asked for that this does not speak."""
    _, topic = made_topic(kafka, 3)
    store = tmp_path / "store"
    places = ("--store", str(store), "--ca", doors.ca)
    # The test's broker knows the string without the path, as it knows each password by heart.
    system = make_system(
        command="api",
        workers=1,
        environment={"PENSTOCK_KAFKA_PASSWORD": f"{doors.connection_string()};EntityPath={topic}"},
    )
    nameless = ("api", "--data", str(system.data), "--listen", "127.0.0.1:0", "--admin", "127.0.0.1:0", *places)
    done = system.run(*nameless, "--hub", "kafka:///another")
    assert (done.returncode, b"the EntityPath of the connection string" in done.stderr) == (2, True), done
    system.environment = {"PENSTOCK_KAFKA_PASSWORD": doors.connection_string()}
    done = system.run(*nameless, "--hub", "kafka:///penstock-none")
    assert (done.returncode, b"There is no event hub penstock-none" in done.stderr) == (2, True), done
    done = system.run(*nameless, "--hub", f"kafka:///{topic}", "--partitions", "4")
    assert (done.returncode, b"it has 3 partitions, not 4" in done.stderr) == (2, True), done

    hub = ("--hub", f"kafka:///{topic}", *places)
    system.options = ["--period", "1h", "--workers", "1", "--anonymous", *hub]
    system.start()
    assert "do not tell message.timestamp.type, cleanup.policy, retention.ms of the topic" in system.up.text()
    host = system.process("host", *hub, "--data", str(tmp_path / "host"), log="host.log")
    assert len(system.ends()) == 3
    large = b"".join(b'{"deviceId":"d-%d","x":"%b"}\n' % (n, os.urandom(100_000).hex().encode()) for n in range(5))
    assert request(system.url, "POST", "/v1/events", large, {"Content-Type": "application/x-ndjson"}).status == 200
    answers = {}
    for sequence, error in enumerate(ERRORS, 1):
        hubs.errors.append(error)
        answer = post(system, sequence)
        answers[error] = answer.status
        assert answer.status == 200 or answer.json["code"] == "hub_unavailable", (error, answer)
        wait_for("it is taken", lambda sequence=sequence: post(system, sequence).status == 200)
    assert answers[POLICY_VIOLATION] == answers[MESSAGE_TOO_LARGE] == 503
    assert not hubs.errors
    for command in ("flush", "status", "leases", "audit"):
        done = system.run(command, *hub)
        assert done.returncode == 0, done
    assert "ok: in the log = archived" in done.stdout.decode()
    archived = json.loads(system.run("verify", "--json", "--store", str(store)).stdout)["totals"]["archived"]
    assert archived == 5 + len(ERRORS)
    given = {"kafka_password": doors.connection_string(), "ca": doors.ca}
    with reading(f"kafka:///{topic}", group="g", store=store, log=MemoryLog(), **given) as bodies:
        wait_for("a processor has them too", lambda: len(bodies) == archived)
    host.signal(signal.SIGTERM)
    assert (host.wait(), system.stop()) == (0, 0)
    assert "SharedAccessKey=" not in system.up.text() + host.text()
    assert hubs.refused == []
    assert {key for key, _ in hubs.asked} <= {0, 1, 2, 3, 10, 17, 18, 22, 36}, "no group is joined, no topic made"


def test_what_is_asked_of_other_brokers_is_not_spoken_there(kafka: Brokers, doors: Doors, hubs: EventHubs) -> None:
    """The negative control."""
    _, topic = made_topic(kafka, 1)
    for event_hubs in (True, False):
        azure = Security("sasl_ssl", "PLAIN", AZURE, doors.connection_string(), ca=doors.ca, event_hubs=event_hubs)
        cluster = Cluster(doors.hubs, azure)
        assert cluster.settings_of(topic) == {}
        if event_hubs:
            with KafkaHub(cluster, topic, period_s=3600, clock=SystemClock()) as hub:
                assert hub.bounds(0).next == 0
            continue
        with pytest.raises(SettingsError, match="The brokers give topics no ids"):
            cluster.describe(topic)
