"""Real Kafka brokers for the tests, from Maven Central: one node, or several with replication; each a process of this machine."""

from __future__ import annotations

import base64
import contextlib
import fcntl
import functools
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from penstock.hub.kafka_cluster import Cluster

_HERE = Path(__file__).parent / "kafka"
_LIB = Path(sys.prefix) / "kafka"
_WHOLE, _CLASSES = _LIB / ".whole", _LIB / "classes.jsa"
_START_S, _INSTALL_S = 90.0, 300.0
_TRIES = 3
QUICK_TO_START = ("-Xms256m", "-Xmx256m", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1")
FAST = ("-Xms512m", "-Xmx512m", "-XX:+UseG1GC")


def _java(jvm: Sequence[str], *words: str) -> list[str]:
    """A JVM with Kafka's classes, which come from an archive where there is one."""
    archive = [f"-XX:SharedArchiveFile={_CLASSES}"] if _CLASSES.exists() and _CLASSES.stat().st_size else []
    jars = os.pathsep.join(sorted(map(str, _LIB.glob("*.jar"))))
    return ["java", *jvm, *archive, f"-Dlog4j2.configurationFile={_HERE / 'log4j2.properties'}", "-cp", jars, *words]


class Died(Exception):
    """A broker ended by itself. Somebody else may have taken its port."""


class Node:
    """One broker, which is a controller too. Its data outlives its process."""

    def __init__(self, number: int, folder: Path, settings: str, port: int) -> None:
        self.number = number
        self.jvm: Sequence[str] = QUICK_TO_START
        self.address = f"127.0.0.1:{port}"
        self._folder = folder
        self._settings = folder / "server.properties"
        self._process: subprocess.Popen[bytes] | None = None
        folder.mkdir(parents=True)
        self._settings.write_text(settings)

    def set(self, lines: str) -> None:
        """More settings, before it starts; of two of a name the last counts."""
        with self._settings.open("a") as settings:
            settings.write(lines)

    def setting(self, name: str) -> str:
        lines = self._settings.read_text().splitlines()
        return [line.partition("=")[2] for line in lines if line.startswith(f"{name}=")][-1]

    def format(self, cluster: str) -> None:
        words = ["kafka.tools.StorageTool", "format", "--cluster-id", cluster, "--config", str(self._settings)]
        done = subprocess.run(
            _java(QUICK_TO_START, *words),
            capture_output=True,
            timeout=_START_S,
            check=False,
        )
        assert done.returncode == 0, done.stdout.decode() + done.stderr.decode()

    def start(self) -> None:
        with (self._folder / "broker.log").open("ab") as output:
            self._process = subprocess.Popen(
                _java(self.jvm, "kafka.Kafka", str(self._settings)),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        assert self._process is not None, "only a started broker has one"
        return self._process.pid

    @property
    def lives(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def log(self) -> str:
        return (self._folder / "broker.log").read_text(errors="replace")[-4000:]

    def signal(self, number: signal.Signals) -> None:
        assert self._process is not None, "only a started broker gets signals"
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)

    def stop(self) -> None:
        self.signal(signal.SIGTERM)
        if self._process is not None:
            self._process.wait(_START_S)

    def kill(self) -> None:
        """At once, as kill -9 does; `start` brings it back with its data."""
        if self._process is not None:
            self.signal(signal.SIGKILL)
            self._process.wait(_START_S)


class Brokers:
    """Brokers that run. `servers` is what a client needs."""

    def __init__(self, nodes: list[Node]) -> None:
        self.nodes = nodes
        self.servers = ",".join(node.address for node in nodes)

    @functools.cached_property
    def client(self) -> Cluster:
        """One for all tests. So is its producer, since the first record of each takes half a second."""
        from penstock.hub.kafka_cluster import Cluster

        client = Cluster(self.servers)
        client.producer = functools.cache(client.producer)  # type: ignore[method-assign]
        return client

    def fresh_topic(self) -> str:
        """A name that nobody has used."""
        return f"penstock-{uuid.uuid4().hex[:12]}"

    def fresh_url(self) -> str:
        return f"kafka://{self.servers}/{self.fresh_topic()}"

    def wait(self) -> None:
        """Until every broker takes part. Raises Died."""
        from confluent_kafka import KafkaException
        from confluent_kafka.admin import AdminClient

        admin = AdminClient({"bootstrap.servers": self.servers, "log_level": 0})
        end, tick = time.monotonic() + _START_S, threading.Event()
        while True:
            if dead := [node for node in self.nodes if not node.lives]:
                raise Died(dead[0].log())
            with contextlib.suppress(KafkaException):
                if len(admin.list_topics(timeout=1).brokers) == len(self.nodes):
                    return
            assert time.monotonic() < end, f"not within {_START_S:.0f} s: {self.nodes[0].log()}"
            tick.wait(0.1)


def made_topic(at: Brokers, partitions: int) -> tuple[Cluster, str]:
    """A topic that nobody has used, and a client of its brokers."""
    from penstock.hub.kafka_topic import create

    topic = at.fresh_topic()
    create(at.client, topic, partitions=partitions, replicas=1, in_sync=1, retention_s=7 * 86_400)
    return at.client, topic


@contextlib.contextmanager
def brokers(folder: Path, count: int = 1, *, before: Callable[[Node], None] | None = None) -> Iterator[Brokers]:
    """`count` brokers with their data in `folder`; `before` each starts. Skips the test when this machine cannot have them."""
    pytest.importorskip("confluent_kafka", reason="confluent-kafka is not installed: pip install 'penstock[kafka]'")
    install()
    for attempt in range(_TRIES):
        made = _made(folder / str(attempt), count)
        try:
            for node in made.nodes:
                if before is not None:
                    before(node)
                node.start()
            try:
                made.wait()
            except Died:
                if attempt == _TRIES - 1:
                    raise
                continue
            yield made
            return
        finally:
            for node in made.nodes:
                node.kill()


def _made(folder: Path, count: int) -> Brokers:
    ports = free_ports(2 * count)
    voters = ",".join(f"{number + 1}@127.0.0.1:{ports[count + number]}" for number in range(count))
    nodes = [
        Node(
            number + 1,
            folder / str(number + 1),
            _settings(folder / str(number + 1), number + 1, count, ports[number], ports[count + number], voters),
            ports[number],
        )
        for number in range(count)
    ]
    cluster = base64.urlsafe_b64encode(uuid.uuid4().bytes).rstrip(b"=").decode().replace("-", "_")
    with ThreadPoolExecutor(count) as pool:
        list(pool.map(lambda node: node.format(cluster), nodes))
    return Brokers(nodes)


def _settings(folder: Path, number: int, count: int, port: int, controller: int, voters: str) -> str:
    replicas = min(count, 3)
    in_sync = 2 if replicas == 3 else 1
    return f"""
process.roles=broker,controller
node.id={number}
controller.quorum.voters={voters}
listeners=PLAINTEXT://127.0.0.1:{port},CONTROLLER://127.0.0.1:{controller}
advertised.listeners=PLAINTEXT://127.0.0.1:{port}
controller.listener.names=CONTROLLER
listener.security.protocol.map=PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT
inter.broker.listener.name=PLAINTEXT
log.dirs={folder / "data"}
auto.create.topics.enable=false
default.replication.factor={replicas}
min.insync.replicas={in_sync}
offsets.topic.replication.factor={replicas}
offsets.topic.num.partitions=4
transaction.state.log.replication.factor={replicas}
transaction.state.log.min.isr={in_sync}
transaction.state.log.num.partitions=4
share.coordinator.state.topic.replication.factor={replicas}
share.coordinator.state.topic.min.isr={in_sync}
share.coordinator.state.topic.num.partitions=1
broker.session.timeout.ms={3000 if count > 1 else 30_000}
broker.heartbeat.interval.ms=500
num.network.threads=2
num.io.threads=4
log.cleaner.dedupe.buffer.size=16777216
"""


def free_ports(count: int) -> list[int]:
    """Ports that the kernel does not give to outgoing connections: who listens there may end and find his port again."""
    end = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    chosen = random.Random(os.urandom(8))
    found: list[int] = []
    with contextlib.ExitStack() as held:
        while len(found) < count:
            each, port = held.enter_context(socket.socket()), chosen.randrange(10_000, end)
            with contextlib.suppress(OSError):
                each.bind(("127.0.0.1", port))
                found.append(port)
    return found


def install() -> None:
    """What brokers consist of, if it is not there yet. Skips the test when this machine cannot have them."""
    if shutil.which("java") is None:
        pytest.skip("there is no java for a Kafka broker")
    if _installed():
        return
    _LIB.mkdir(exist_ok=True)
    with (_LIB / "lock").open("wb") as lock:  # another test run may do the same
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not _WHOLE.exists():
            _fetch()
        if not _installed():
            _archive_classes()


def _installed() -> bool:
    """With an archive that is of these jars, which may have been fetched anew."""
    return _WHOLE.exists() and _CLASSES.exists() and _CLASSES.stat().st_mtime >= _WHOLE.stat().st_mtime


def _fetch() -> None:
    if shutil.which("mvn") is None:
        pytest.skip("there is no mvn to fetch a Kafka broker with")
    command = ["mvn", "-B", "-q", "-f", str(_HERE / "pom.xml"), "dependency:copy-dependencies"]
    command += ["-DincludeScope=runtime", f"-DoutputDirectory={_LIB}"]
    done = subprocess.run(command, capture_output=True, timeout=_INSTALL_S, check=False)
    if done.returncode:
        pytest.skip(f"Maven cannot fetch Kafka: {done.stdout.decode(errors='replace')[-500:]}")
    _WHOLE.touch()


def _archive_classes() -> None:
    """Once, by a broker that starts and ends: the next start in half the time, as the JVM finds what it loaded ready for use.

    A JVM that cannot do so leaves an empty file, and one that was replaced passes the archive by.
    """
    with tempfile.TemporaryDirectory() as folder:
        _CLASSES.unlink(missing_ok=True)
        made, archive = _made(Path(folder) / "node", 1), Path(folder) / _CLASSES.name
        (node,) = made.nodes
        node.jvm = (*QUICK_TO_START, f"-XX:ArchiveClassesAtExit={archive}")
        node.start()
        try:
            made.wait()
            node.stop()
        except Died:
            archive.unlink(missing_ok=True)
        finally:
            node.kill()
        archive.touch()
        part = _LIB / f"{_CLASSES.name}.part"
        shutil.copyfile(archive, part)
        part.replace(_CLASSES)
