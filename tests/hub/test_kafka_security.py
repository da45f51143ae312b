"""Brokers that ask who comes, and that encrypt: every way in, and of every way that is shut a sentence within seconds."""

from __future__ import annotations

import os
import time
from dataclasses import replace

import msgspec
import pytest

from penstock.errors import HubUnavailable, SettingsError
from penstock.events import Batch, Group
from penstock.hub.duplicates import Share, pack_owners, pack_shares
from penstock.hub.kafka import KafkaHub
from penstock.hub.kafka_cluster import Cluster
from penstock.hub.kafka_security import Security
from penstock.hub.kafka_topic import RECORD_BYTES_MIN, create
from penstock.testing import FakeClock
from penstock.wire.draft import drafts
from penstock.wire.frame import FRAME_BYTES_MAX, content
from tests.kafka_broker import Brokers, made_topic
from tests.kafka_doors import GUEST, OWNER, PASSWORD, Doors

LINES = b'{"deviceId":"d-1","n":1}\n'
BATCH = Batch("p", 1, 1, 1, (Group(0, 1, LINES),), True, b"s" * 32)
SASL = Security("sasl_plaintext", "PLAIN", OWNER, PASSWORD)


def ways(doors: Doors) -> dict[str, tuple[str, Security]]:
    both = replace(SASL, protocol="sasl_ssl", ca=doors.ca)
    return {
        "PLAIN": (doors.sasl, SASL),
        "SCRAM-SHA-256": (doors.sasl, replace(SASL, mechanism="SCRAM-SHA-256")),
        "SCRAM-SHA-512": (doors.both, replace(both, mechanism="SCRAM-SHA-512")),
        "TLS and PLAIN": (doors.both, both),
        "a certificate": (doors.tls, Security("ssl", ca=doors.ca, certificate=doors.client)),
    }


@pytest.mark.parametrize("way", ["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512", "TLS and PLAIN", "a certificate"])
def test_all_clients_come_in(kafka: Brokers, doors: Doors, way: str) -> None:
    """The one that makes the topic, the one that writes, and the one that reads."""
    server, security = ways(doors)[way]
    cluster = Cluster(server, security)
    cluster.check()
    topic = kafka.fresh_topic()
    assert create(cluster, topic, partitions=1, replicas=1, in_sync=1, retention_s=60) == []
    with KafkaHub(cluster, topic, period_s=3600, clock=FakeClock()) as hub:
        hub.append([BATCH])
        assert [content(frame) for frame in hub.read(0, "0", bytes_max=1).frames] == [LINES]


# In librdkafka's words, or those of OpenSSL when librdkafka has forgotten why.
UNVERIFIED = r"no TLS with the Kafka brokers at .*certificate (could not be verified|verify failed)"


@pytest.mark.parametrize(
    ("door", "change", "says"),
    [
        ("PLAIN", {"password": "s3cret"}, r"refuse the user owner \(sasl_plaintext, PLAIN\): .*Invalid username or password"),
        ("SCRAM-SHA-256", {"password": "s3cret"}, r"refuse the user owner .*SCRAM-SHA-256\): .*invalid credentials"),
        ("SCRAM-SHA-512", {"user": "nobody"}, r"refuse the user nobody .*SCRAM-SHA-512\): .*invalid credentials"),
        ("TLS and PLAIN", {"ca": ""}, f"{UNVERIFIED}.* See to --ca"),
        ("TLS and PLAIN", {"ca": "other"}, UNVERIFIED),
        ("a certificate", {"certificate": ""}, "no TLS with the Kafka brokers at .*alert bad certificate"),
        ("TLS and PLAIN", {"protocol": "plaintext"}, "close every connection: they expect something else than --kafka-security plaintext"),
        ("TLS and PLAIN", {"protocol": "sasl_plaintext"}, "something else than --kafka-security sasl_plaintext"),
        ("TLS and PLAIN", {"protocol": "ssl"}, "something else than --kafka-security ssl"),
        ("PLAIN", {"protocol": "plaintext"}, "something else than --kafka-security plaintext"),
        ("PLAIN", {"protocol": "sasl_ssl"}, "connecting to a PLAINTEXT broker listener"),
        ("a certificate", {"protocol": "sasl_ssl", "user": "u", "password": "s3cret"}, "user u .*not valid in current SASL state"),
    ],
)  # fmt: skip
def test_what_is_shut_is_said_within_seconds(
    kafka: Brokers, doors: Doors, door: str, change: dict[str, str], says: str
) -> None:
    server, security = ways(doors)[door]
    changed = {name: doors.other_ca if text == "other" else text for name, text in change.items()}
    began = time.monotonic()
    with pytest.raises(SettingsError, match=says) as refused:
        Cluster(server, replace(security, **changed)).check()  # type: ignore[arg-type]
    assert time.monotonic() - began < 5
    assert "s3cret" not in refused.value.detail
    assert PASSWORD not in refused.value.detail


def test_files_that_are_no_certificates(doors: Doors) -> None:
    with pytest.raises(SettingsError, match=r"there is no way to the Kafka brokers .*ssl\.ca\.location failed"):
        Cluster(doors.both, Security("ssl", ca=__file__))


def test_whoever_has_no_right_is_told_which(kafka: Brokers, doors: Doors) -> None:
    guest = Cluster(doors.sasl, replace(SASL, user=GUEST))
    guest.check()
    there = made_topic(kafka, 1)[1]
    for topic in (there, kafka.fresh_topic()):
        with pytest.raises(SettingsError, match=f"do not let the user {GUEST} see the topic {topic}"):
            create(guest, topic, partitions=1, replicas=1, in_sync=1, retention_s=60)


def test_whoever_asks_for_anything_is_told_why_there_is_no_answer(kafka: Brokers, doors: Doors) -> None:
    topic = made_topic(kafka, 1)[1]
    cluster = Cluster(doors.sasl, replace(SASL, password="s3cret"), delivery_s=1.0, answer_s=1.0)
    with pytest.raises(HubUnavailable, match="refuse the user owner") as refused:
        cluster.describe(topic)
    assert "s3cret" not in refused.value.detail


def test_nobody_is_there_and_nobody_answers() -> None:
    with pytest.raises(HubUnavailable, match=r"cannot be reached: Connect to .* failed: Connection refused"):
        Cluster("127.0.0.1:9", answer_s=0.5).check()
    with pytest.raises(HubUnavailable, match="cannot be reached: Failed to resolve"):
        Cluster("nowhere.invalid:9", answer_s=0.5).check()


def test_the_id_of_an_event_hub_is_its_name(kafka: Brokers, doors: Doors) -> None:
    """Which the endpoint tells, and no uuid."""
    cluster = Cluster(doors.both, replace(SASL, protocol="sasl_ssl", ca=doors.ca, event_hubs=True))
    first, second = (made_topic(kafka, 2)[1] for _ in range(2))
    ids = [found.id for topic in (first, second, first) if (found := cluster.describe(topic))]
    assert ids[0] == ids[2] != ids[1]
    with KafkaHub(cluster, first, period_s=3600, clock=FakeClock()) as hub:
        assert (hub.id, hub.bounds(0).enqueued_last_ms) == (ids[0], 0)
        hub.append([BATCH, replace_group(BATCH, 1)])
        hub.append([BATCH])
        [*_, last] = hub.read(0, "0", bytes_max=1 << 20).frames
        assert hub.bounds(0).enqueued_last_ms == last.enqueued_at_ms > 0


def replace_group(batch: Batch, partition: int) -> Batch:
    return msgspec.structs.replace(batch, groups=(Group(partition, 1, LINES),))


@pytest.mark.parametrize("events", ["small", "large"])
def test_every_record_is_smaller_than_event_hubs_takes(events: str) -> None:
    """With everything about a source as long as it can be. RECORD_BYTES_MIN is what librdkafka sends at most, and Azure 46,528 more."""
    line = b'{"deviceId":"d","x":"%b"}\n' % (
        b"" if events == "small" else os.urandom(1 << 17).hex().encode()[: (1 << 18) - 64]
    )
    stamped = len(line) + 64 + (1 << 14)  # receivedAt, and properties of a header block
    lines = line.ljust(stamped, b" ") if events == "large" else line
    properties = b"p" * (1 << 14) if events == "large" else b""
    batches = [
        Batch("p" * 64, 1, n, 1, (Group(0, 1, lines),), True, b"s" * 32, properties, "f" * 64, owner="o" * 64)
        for n in range(4096 if events == "small" else 3)
    ]
    largest = 0
    for draft in drafts(batches, frame_bytes_max=FRAME_BYTES_MAX):
        shares = [Share(0, 1, batches[index].owner) for index, _ in draft.members]
        value = draft.placed(0, 0)
        largest = max(largest, len(value) + len(pack_shares(shares)) + len(pack_owners(shares)))
    assert FRAME_BYTES_MAX // 2 < largest < RECORD_BYTES_MIN - 4096


@pytest.mark.parametrize(("given", "lacks"), [("DESCRIBE", "READ"), ("WRITE", "READ"), ("READ", "WRITE")])
def test_a_right_that_is_missing_is_named(kafka: Brokers, doors: Doors, given: str, lacks: str) -> None:
    """At the start; and later where the brokers did not tell, as an event hub's do not."""
    topic = made_topic(kafka, 1)[1]
    doors.grant(GUEST, topic, given)
    with KafkaHub(kafka.client, topic, period_s=3600, clock=FakeClock()) as hub:
        hub.append([BATCH])
    act = "read" if lacks == "READ" else "write into"
    says = f"do not let the user {GUEST} {act} the topic {topic}"
    guest = Cluster(doors.sasl, replace(SASL, user=GUEST))
    with pytest.raises(SettingsError, match=rf"{says} \(the right {lacks} is missing\)"):
        if lacks == "WRITE":
            create(guest, topic, partitions=1, replicas=1, in_sync=1, retention_s=60)
        KafkaHub(guest, topic, period_s=3600, clock=FakeClock())

    azure = Cluster(doors.sasl, replace(SASL, user=GUEST, event_hubs=True))
    with KafkaHub(azure, topic, period_s=3600, clock=FakeClock()) as hub:
        assert hub.retention() is None
        for _ in range(2):  # the producer of the first can do nothing more
            began = time.monotonic()
            with pytest.raises(HubUnavailable, match=says):
                hub.append([BATCH]) if lacks == "WRITE" else hub.read(0, "0", bytes_max=1)
            assert time.monotonic() - began < 8
        if lacks == "WRITE":
            assert len(hub.read(0, "0", bytes_max=1 << 20).frames) == 1


def test_with_these_rights_alone_all_is_done(kafka: Brokers, doors: Doors) -> None:
    """No right to make a topic, to see its settings, or for a consumer group."""
    topic = made_topic(kafka, 1)[1]
    doors.grant(GUEST, topic, "READ", "WRITE", "DESCRIBE")
    guest = Cluster(doors.sasl, replace(SASL, user=GUEST))
    assert "retention.ms" in create(guest, topic, partitions=1, replicas=1, in_sync=1, retention_s=60)
    with KafkaHub(guest, topic, period_s=3600, clock=FakeClock()) as hub:
        hub.append([BATCH])
        assert hub.cut() == ["1"]
        assert len(hub.read(0, "0", bytes_max=1 << 20).frames) == 2
        assert (hub.bounds(0).next >> 20, hub.locate(0, 0)) == (2, "0")
    with pytest.raises(SettingsError, match=f"do not let the user {GUEST} see the topic"):
        create(guest, kafka.fresh_topic(), partitions=1, replicas=1, in_sync=1, retention_s=60)
