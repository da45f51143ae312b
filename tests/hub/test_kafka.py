"""The hub in a Kafka topic, on a real broker: what the contract suite does not ask of every hub."""

from __future__ import annotations

import hashlib
import random
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
from confluent_kafka import KafkaError, KafkaException, Producer, TopicPartition
from confluent_kafka.admin import AlterConfigOpType, ConfigEntry, ConfigResource, NewTopic

from penstock.errors import FrameDamaged, HubError, HubUnavailable, NotFound, OffsetTrimmed, SettingsError
from penstock.events import Appended, Batch, Frame, FrameKind, Group
from penstock.hub.kafka import PLACE_BITS, KafkaHub
from penstock.hub.kafka_cluster import Address, Cluster, parse_url
from penstock.hub.kafka_topic import create
from penstock.hub.kafka_writing import Outgoing, Writer
from penstock.testing import FakeClock
from penstock.wire.draft import drafts
from penstock.wire.frame import content, pack
from tests.kafka_broker import Brokers, made_topic

HOUR_MS = 3_600_000
NINE_MS = 1_795_417_200_000  # 2026-11-23T09:00
DAYS_S = 7 * 86_400.0


@contextmanager
def opened(brokers: Brokers, topic: str, *, clock: FakeClock | None = None) -> Iterator[KafkaHub]:
    with KafkaHub(brokers.client, topic, period_s=3600, clock=clock or FakeClock(NINE_MS)) as hub:
        yield hub


@pytest.fixture
def hub(kafka: Brokers) -> Iterator[KafkaHub]:
    with opened(kafka, made_topic(kafka, 2)[1]) as made:
        yield made


def batch(sequence: int, partition: int = 0, count: int = 2) -> Batch:
    lines = b"".join(b'{"deviceId":"d-1","b":%d,"n":%d}\n' % (sequence, n) for n in range(count))
    return Batch("p", 1, sequence, count, (Group(partition, count, lines),), True, hashlib.sha256(lines).digest())


def frames_of(hub: KafkaHub, partition: int = 0) -> list[Frame]:
    found: list[Frame] = []
    offset = str(hub.bounds(partition).first >> PLACE_BITS)
    while True:
        read = hub.read(partition, offset, bytes_max=1 << 20)
        found += read.frames
        if read.next_offset == read.end_offset:
            return found
        offset = read.next_offset


def kinds(hub: KafkaHub, partition: int = 0) -> list[FrameKind]:
    return [frame.kind for frame in frames_of(hub, partition)]


E, TIME, CUT = FrameKind.PLAIN, FrameKind.TIME_MARKER, FrameKind.CUT_MARKER


class TestAddress:
    @pytest.mark.parametrize(
        ("url", "expected"),
        [
            ("kafka://b:9092/telemetry", Address("b:9092", "telemetry")),
            ("kafka://127.0.0.1:1,b-2.x:65535/a.b_c-d", Address("127.0.0.1:1,b-2.x:65535", "a.b_c-d")),
            ("kafka://[::1]:9092/t", Address("[::1]:9092", "t")),
        ],
    )
    def test_good(self, url: str, expected: Address) -> None:
        assert parse_url(url) == expected
        assert str(expected) == url

    @pytest.mark.parametrize(
        "url",
        ["kafka://b/t", "kafka://b:9092", "kafka://b:9092/", "kafka://b:9092/a/b", "kafka://b:9092,/t", "kafka://:9/t", "http://b:9092/t",
         "kafka://b:9092/" + "t" * 250, "kafka://u@b:9092/t", "kafka://b:x/t"],
    )  # fmt: skip
    def test_bad(self, url: str) -> None:
        with pytest.raises(SettingsError, match="not an address"):
            parse_url(url)


class TestTopic:
    def test_made_as_asked_for_and_left_alone_the_next_time(self, kafka: Brokers) -> None:
        cluster, topic = made_topic(kafka, 3)
        found = cluster.describe(topic)
        assert found is not None and (found.partitions, found.replicas) == (3, 1)
        settings = cluster.settings_of(topic)
        wanted = {"message.timestamp.type": "LogAppendTime", "retention.ms": "604800000", "min.insync.replicas": "1"}
        assert {name: settings[name] for name in wanted} == wanted
        create(cluster, topic, partitions=3, replicas=1, in_sync=1, retention_s=DAYS_S)
        assert cluster.describe(topic) == found

    def test_a_broker_that_does_not_know_it_yet_is_asked_again(
        self, kafka: Brokers, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        cluster, topic = made_topic(kafka, 1)
        really, asked = cluster.admin.describe_configs, []

        def late(resources: Sequence[ConfigResource], **more: float) -> dict[ConfigResource, Future[object]]:
            asked.append(resources)
            if len(asked) > 1:
                return really(resources, **more)
            unknown: Future[object] = Future()
            unknown.set_exception(KafkaException(KafkaError(KafkaError.UNKNOWN_TOPIC_OR_PART)))
            return {resources[0]: unknown}

        monkeypatch.setattr(cluster.admin, "describe_configs", late)
        create(cluster, topic, partitions=1, replicas=1, in_sync=1, retention_s=DAYS_S)
        assert len(asked) == 2

    def test_everything_that_does_not_fit_is_named(self, kafka: Brokers) -> None:
        cluster, topic = kafka.client, kafka.fresh_topic()
        config = {
            "message.timestamp.type": "CreateTime",
            "retention.ms": "1000",
            "retention.bytes": "100000",
            "cleanup.policy": "compact",
            "unclean.leader.election.enable": "true",
            "max.message.bytes": "100000",
        }
        new = NewTopic(topic, num_partitions=2, replication_factor=1, config=config)
        cluster.answers(lambda: cluster.admin.create_topics([new]))
        with pytest.raises(SettingsError) as refused:
            create(cluster, topic, partitions=3, replicas=2, in_sync=2, retention_s=DAYS_S)
        said = refused.value.detail
        for name in ("2 partitions, not 3", "1 replicas, not 2", "min.insync.replicas is 1", *config):
            assert name in said
        right = {"message.timestamp.type": "LogAppendTime", "cleanup.policy": "delete", "max.message.bytes": "2000000"}
        right |= {"retention.ms": "-1", "retention.bytes": "-1", "unclean.leader.election.enable": "false"}
        changes = [
            ConfigEntry(name, value, incremental_operation=AlterConfigOpType.SET) for name, value in right.items()
        ]
        resource = ConfigResource(ConfigResource.Type.TOPIC, topic, incremental_configs=changes)
        cluster.answers(lambda: cluster.admin.incremental_alter_configs([resource]))
        create(cluster, topic, partitions=2, replicas=1, in_sync=1, retention_s=DAYS_S)

    def test_what_the_brokers_refuse_is_said_in_their_words(self, kafka: Brokers) -> None:
        with pytest.raises(
            SettingsError, match=r"--replicas 3 and --in-sync-replicas 2 cannot be created: .*only 1 broker"
        ):
            create(kafka.client, kafka.fresh_topic(), partitions=1, replicas=3, in_sync=2, retention_s=DAYS_S)

    def test_there_is_no_hub_without_a_topic(self, kafka: Brokers) -> None:
        with pytest.raises(SettingsError, match="There is no topic"), opened(kafka, kafka.fresh_topic()):
            pass

    def test_a_topic_that_is_made_again_is_another_hub(self, kafka: Brokers) -> None:
        cluster, topic = made_topic(kafka, 1)
        with opened(kafka, topic) as first:
            assert len(first.id) == 32
        cluster.answers(lambda: cluster.admin.delete_topics([topic]))
        end = time.monotonic() + 20
        while cluster.describe(topic) is not None:
            assert time.monotonic() < end
        create(cluster, topic, partitions=1, replicas=1, in_sync=1, retention_s=DAYS_S)
        with opened(kafka, topic) as second:
            assert second.id != first.id


class TestReading:
    def test_what_is_no_offset_or_partition(self, hub: KafkaHub) -> None:
        for offset in ("-1", "x", "", "1" * 20):
            with pytest.raises(HubError, match="is not an offset"):
                hub.read(0, offset, bytes_max=1)
        for partition in (-1, 2):
            for ask in (hub.bounds, lambda p: hub.read(p, "0", bytes_max=1), lambda p: hub.locate(p, 0)):
                with pytest.raises(NotFound):
                    ask(partition)

    def test_what_the_brokers_deleted_is_trimmed(self, kafka: Brokers, hub: KafkaHub) -> None:
        for sequence in range(1, 6):
            hub.append([batch(sequence)])
        reader = hub.read(0, "0", bytes_max=1)
        assert (reader.next_offset, reader.end_offset) == ("1", "5")
        topic = hub._topic
        kafka.client.answers(lambda: kafka.client.admin.delete_records([TopicPartition(topic, 0, 3)]))
        assert (hub.bounds(0).first, hub.bounds(0).next) == (3 << PLACE_BITS, 5 << PLACE_BITS)
        with pytest.raises(OffsetTrimmed) as trimmed:
            hub.read(0, "0", bytes_max=1)
        assert trimmed.value.fields == {"first": "3"}
        assert len(frames_of(hub)) == 2
        assert hub.locate(0, 0) == "3"

    def test_offsets_that_no_record_has_are_passed(self, kafka: Brokers, hub: KafkaHub) -> None:
        """A transaction's end takes an offset. Penstock has none; a mirror of its topic may."""
        one, two = (draft.placed(0, 0) for draft in drafts([batch(1), batch(2)], frame_bytes_max=1))
        shares = [("shares", bytes([0, 0, 0, 0, 2, 0, 0, 0]))]
        foreign = Producer({"bootstrap.servers": kafka.servers, "transactional.id": hub._topic})
        foreign.init_transactions(30)
        for value in (one, two):
            foreign.begin_transaction()
            foreign.produce(hub._topic, value, partition=0, headers=shares)
            foreign.commit_transaction(30)
        read = hub.read(0, "0", bytes_max=1)
        assert (read.frames[0].first, read.next_offset) == (0, "1")
        assert [frame.first >> PLACE_BITS for frame in frames_of(hub)] == [0, 2]
        at_end = hub.read(0, "3", bytes_max=1)
        assert (list(at_end.frames), at_end.next_offset, at_end.end_offset) == ([], "4", "4")
        assert hub.locate(0, NINE_MS * 2) == hub.cut()[0] == "4"

    def test_a_record_that_is_no_frame_stops_the_partition_where_it_lies(self, kafka: Brokers, hub: KafkaHub) -> None:
        hub.append([batch(1), batch(1, partition=1)])
        good = drafts([batch(2)], frame_bytes_max=1)[0].placed(0, 0)
        writer = Writer(kafka.client, hub._topic)
        writer.write({0: [Outgoing(b"hello")], 1: [Outgoing(good)]})
        for partition, what in ((0, "a header has"), (1, "a frame of partition 0")):
            read = hub.read(partition, "0", bytes_max=1 << 20)
            assert (len(read.frames), read.next_offset, read.end_offset) == (1, "1", "2")
            with pytest.raises(FrameDamaged, match=what) as damaged:
                hub.read(partition, "1", bytes_max=1)
            assert damaged.value.fields == {"where": f"{partition}/1"}

    def test_a_backlog_is_read_without_pauses(self, hub: KafkaHub) -> None:
        """Who works on what he read finds more ready: the client fetches on when room is left, and not a second later."""
        line = b'{"deviceId":"d-1","x":"%b"}\n' % random.Random(1).randbytes(90_000).hex().encode()
        hub.append([Batch("p", 1, 1, 140, tuple(Group(0, 1, line) for _ in range(140)), True, b"s" * 32)])
        offset, size, work = "0", 0, threading.Event()
        began = time.monotonic()
        while size < 12_000_000:
            read = hub.read(0, offset, bytes_max=1 << 20)
            offset, size = read.next_offset, size + sum(len(frame.body) for frame in read.frames)
            work.wait(0.05)
        assert time.monotonic() - began < 2.5

    def test_many_read_at_once(self, hub: KafkaHub) -> None:
        for sequence in range(1, 40):
            hub.append([batch(sequence, partition=sequence % 2)])
        expected = {partition: frames_of(hub, partition) for partition in (0, 1)}
        wrong: list[object] = []

        def look(number: int) -> None:
            for step in range(10):
                start = (number * 7 + step) % 18
                read = hub.read(number % 2, str(start), bytes_max=1 << (6 + step))
                count = len(read.frames)
                if count == 0 or list(read.frames) != expected[number % 2][start : start + count]:
                    wrong.append((number, start, read))

        threads = [threading.Thread(target=look, args=(number,)) for number in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert wrong == []

    def test_an_end_that_the_brokers_do_not_say_is_no_end(self, hub: KafkaHub, monkeypatch: pytest.MonkeyPatch) -> None:
        """`penstock flush` would take it for an empty log and say that everything is archived."""
        hub.append([batch(1)])
        nowhere = SimpleNamespace(offset=-1, timestamp=-1)
        monkeypatch.setattr(hub, "_offsets", lambda partitions, _which: dict.fromkeys(partitions, nowhere))
        for ask in (hub.cut, lambda: hub.bounds(0), lambda: hub.locate(0, NINE_MS)):
            with pytest.raises(HubUnavailable, match="do not say where"):
                ask()


class TestWriting:
    def test_of_a_partition_each_record_waits_for_the_one_before(self, kafka: Brokers, hub: KafkaHub) -> None:
        """What a failure leaves is a prefix in each partition, and the retry completes it."""
        frames = [draft.placed(0, 0) for draft in drafts([batch(n) for n in (1, 2, 3)], frame_bytes_max=1)]
        writer = Writer(kafka.client, hub._topic)
        with pytest.raises(HubUnavailable, match="large"):
            writer.write({0: [Outgoing(frames[0]), Outgoing(b"x" * 1_100_000), Outgoing(frames[2])], 1: []})
        assert [content(frame) for frame in frames_of(hub)] == [batch(1).groups[0].content]
        assert writer.write({0: [Outgoing(frame) for frame in frames]}) > NINE_MS
        assert len(frames_of(hub)) == 4

    def test_a_batch_of_many_frames_is_in_order_and_says_what_each_holds(self, hub: KafkaHub) -> None:
        line = b'{"deviceId":"d-1","x":"%b"}\n' % (b"x" * 900)
        groups = tuple(Group(0, 200, line * 200) for _ in range(4))
        hub.append([Batch("p", 1, 1, 800, groups, True, b"s" * 32), batch(2, count=3)])
        found = frames_of(hub)
        assert [frame.count for frame in found] == [200, 200, 200, 203]
        shares = [
            tuple(int.from_bytes(frame.shares[at : at + 4], "little") for at in range(0, len(frame.shares), 4))
            for frame in found
        ]
        assert shares == [(0, 800), (200, 800), (400, 800), (600, 800, 0, 3)]

    def test_brokers_that_do_not_answer_are_said_within_seconds(self, kafka: Brokers) -> None:
        _, topic = made_topic(kafka, 1)
        cluster = Cluster(kafka.servers, delivery_s=1.0)
        with KafkaHub(cluster, topic, period_s=3600, clock=FakeClock()) as hub:
            assert hub.append([batch(1)]) == [Appended(2, False)]
            kafka.nodes[0].signal(signal.SIGSTOP)
            try:
                began = time.monotonic()
                with pytest.raises(HubUnavailable) as refused:
                    hub.append([batch(2)])
                assert time.monotonic() - began < 5
                assert refused.value.fields == {"retry_after_s": 2.0}
            finally:
                kafka.nodes[0].signal(signal.SIGCONT)
            kafka.wait()
            end = time.monotonic() + 30
            while True:
                try:
                    assert hub.append([batch(2)]) == [Appended(2, False)]
                    break
                except HubUnavailable:
                    assert time.monotonic() < end
            # The one that was not confirmed may be there or not, and before its copy.
            numbers = [content(frame) for frame in frames_of(hub)]
            assert numbers in ([batch(n).groups[0].content for n in which] for which in ((1, 2), (1, 2, 2)))

    def test_nobody_is_there(self) -> None:
        cluster = Cluster("127.0.0.1:9", answer_s=0.5)
        with pytest.raises(HubUnavailable, match=r"127\.0\.0\.1:9"):
            cluster.describe("t")


class TestTimes:
    """On a topic that takes the times that these tests give to the records, as if the brokers had given them."""

    @pytest.fixture
    def topic(self, kafka: Brokers) -> str:
        topic = kafka.fresh_topic()
        config = {"message.timestamp.after.max.ms": str(1 << 62)}
        new = NewTopic(topic, num_partitions=1, replication_factor=1, config=config)
        kafka.client.answers(lambda: kafka.client.admin.create_topics([new]))
        with opened(kafka, topic) as hub:
            hub.bounds(0)  # its leader is there
        return topic

    def write(self, kafka: Brokers, topic: str, *records: tuple[FrameKind, int]) -> None:
        """Records with the times, in minutes behind nine o'clock."""
        producer = kafka.client.producer()
        for number, (kind, minutes) in enumerate(records):
            if kind is E:
                value = drafts([batch(number + 1)], frame_bytes_max=1)[0].placed(0, 0)
            else:
                value = pack(kind, 0, 0, 0, 0, 0, 0, 0, b"", 0, b"")
            producer.produce(topic, value, partition=0, timestamp=NINE_MS + minutes * 60_000)
            assert producer.flush(10) == 0

    def test_times_never_decrease(self, kafka: Brokers, topic: str) -> None:
        self.write(kafka, topic, (E, 10), (E, 65), (E, 59), (E, 64), (E, 66))
        with opened(kafka, topic) as hub:
            assert [(frame.enqueued_at_ms - NINE_MS) // 60_000 for frame in frames_of(hub)] == [10, 65, 65, 65, 66]
            bounds = hub.bounds(0)
            assert (bounds.enqueued_first_ms, bounds.enqueued_last_ms) == (NINE_MS + 600_000, NINE_MS + 66 * 60_000)
            for minutes, offset in ((0, 0), (10, 0), (11, 1), (60, 1), (65, 1), (66, 4), (67, 5)):
                assert hub.locate(0, NINE_MS + minutes * 60_000) == str(offset)
        with opened(kafka, topic) as another:
            piece = [another.read(0, str(offset), bytes_max=1).frames[0] for offset in range(5)]
            assert [(frame.enqueued_at_ms - NINE_MS) // 60_000 for frame in piece] == [10, 65, 65, 65, 66]

    @pytest.mark.parametrize(
        ("records", "now", "due"),
        [
            ([], 5, True),
            ([(E, 10)], 50, False),
            ([(E, 10)], 65, True),
            ([(E, 10), (TIME, 61)], 65, False),
            ([(E, 10), (TIME, 61)], 125, True),  # also where nothing happens, so that all see that the hour is over
            ([(E, 10), (TIME, 50)], 65, True),  # by a broker whose clock was behind
            ([(E, 10), (CUT, 50)], 65, True),
            ([(E, 61)], 65, False),
            ([(E, 61), (E, 59)], 65, False),  # clamped, both are of the running hour
        ],
    )
    def test_time_markers(
        self, kafka: Brokers, topic: str, records: Sequence[tuple[FrameKind, int]], now: int, due: bool
    ) -> None:
        self.write(kafka, topic, *records)
        with opened(kafka, topic, clock=FakeClock(NINE_MS + now * 60_000)) as hub:
            hub.maintain()
            assert kinds(hub) == [kind for kind, _ in records] + [TIME] * due
            hub.maintain()
            assert len(kinds(hub)) == len(records) + due

    def test_cut_markers(self, kafka: Brokers, topic: str) -> None:
        self.write(kafka, topic, (E, 10), (TIME, 60))
        with opened(kafka, topic) as hub:
            assert [hub.cut(), hub.cut()] == [["2"], ["2"]]
            assert kinds(hub) == [E, TIME, CUT]

    def test_a_marker_that_the_broker_dates_too_early_is_written_again_when_its_time_has_come(
        self, kafka: Brokers
    ) -> None:
        _, topic = made_topic(kafka, 1)
        now_ms = time.time_ns() // 1_000_000
        clock = FakeClock(now_ms + HOUR_MS - now_ms % HOUR_MS)  # for us the next hour has begun
        with opened(kafka, topic, clock=clock) as hub:
            hub.append([batch(1)])
            hub.maintain()
            assert kinds(hub) == [E, TIME]
            clock.advance(30)
            hub.maintain()
            assert kinds(hub) == [E, TIME]
            clock.advance(3600 - 30)  # the broker's clock does not move so far: once more it is too early
            hub.maintain()
            assert kinds(hub) == [E, TIME, TIME]
