"""Several machines, and every ten seconds one of them dies, stands still, or is cut off: each event is archived once, in order.

Three brokers, two APIs behind a TCP balancer that loses answers, three hosts, Azurite. Each API and host reaches the brokers by doors
of its own, so that it can be cut off alone. `PENSTOCK_CHAOS_S` is how long it goes on, `PENSTOCK_SEED` chooses who is hit.
"""

from __future__ import annotations

import contextlib
import functools
import gzip
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, Protocol, Self

import pytest

from penstock.clock import SystemClock
from penstock.errors import HubUnavailable
from penstock.hub.kafka import KafkaHub
from penstock.hub.kafka_cluster import DELIVERY_S, Cluster
from penstock.hub.kafka_topic import create
from tests.balancer import Balancer
from tests.crash.load import Load
from tests.e2e.http_client import Answer, post_numbered
from tests.e2e.oracle import Batch, archived, problems
from tests.e2e.system import SEED, Found, Process, System, wait_for
from tests.emulators import Emulator
from tests.kafka_broker import Brokers, Node, brokers, free_ports

Make = Callable[..., System]

SECONDS = float(os.environ.get("PENSTOCK_CHAOS_S", "120"))
FLIGHTS = Path(__file__).parents[1] / "data" / "flights-sample.ndjson.gz"
FLIGHTS_PER_S = 680  # and the numbered lanes bring about 150 a second: half a million in ten minutes
LANES, LANE_PACE_S = 4, 0.25
ANSWERS_DROPPED = 0.02
PARTITIONS = 6
PERIOD_S, LEASE_S = 5, 3
STEP_S, PAUSE_S = 10.0, 8.0  # a pause is longer than a lease and a broker's session
BACK_S_MAX = LEASE_S + 10.0
DRAIN_S = 120.0
BEGINNERS = 12
APIS, HOSTS = ("api-1", "api-2"), ("host-a", "host-b", "host-c")
UNFILTERED = Path(__file__).with_name("unfiltered_host.py")


class Victim(Protocol):
    name: str

    def kill(self) -> None: ...
    def start(self) -> None: ...
    def signal(self, number: signal.Signals) -> None: ...


class Broker:
    """A node as a victim."""

    def __init__(self, node: Node) -> None:
        self.name = f"broker {node.number}"
        self.kill, self.start, self.signal = node.kill, node.start, node.signal


class Machine:
    """An API or a host, which is started again as a service manager does it."""

    def __init__(self, name: str, begin: Callable[[], Process]) -> None:
        self.name = name
        self._begin = begin
        self._said_before = 0
        self.process = begin()

    def kill(self) -> None:
        self.process.kill()

    def start(self) -> None:
        self._said_before = len(self.process.text())
        self.process = self._begin()

    def found_trouble(self) -> bool:
        """Whether it ended because the brokers were in trouble when it began: then it says that, and nothing of work."""
        said = self.process.text()[self._said_before :]
        return "lease taken" not in said and said.rstrip().rpartition("\n")[2].startswith(
            "penstock: The Kafka brokers at"
        )

    def signal(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)


class Flights(threading.Thread):
    """`penstock send -` with its spool on a disk, and who writes into it: real flights, those of later rounds numbered."""

    def __init__(self, folder: Path, url: str, count: int) -> None:
        super().__init__(daemon=True)
        real = gzip.decompress(FLIGHTS.read_bytes()).splitlines()
        again = (b'%b,"round":%d}' % (line[:-1], number) for number in itertools.count(1) for line in real)
        self.lines = list(itertools.islice(itertools.chain(real, again), count))
        self._log = folder / "send.log"
        words = (sys.executable, "-m", "penstock", "send", "-", "--url", url, "--spool", "spool", "--batch", "50")
        with self._log.open("wb") as output:
            self._sender = subprocess.Popen(
                words, cwd=folder, stdin=subprocess.PIPE, stdout=output, stderr=subprocess.STDOUT
            )

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._sender.kill()
        self._sender.wait()
        self.join()

    def run(self) -> None:
        assert self._sender.stdin is not None
        began, at_once = time.monotonic(), FLIGHTS_PER_S // 10
        with contextlib.suppress(BrokenPipeError), self._sender.stdin as stdin:
            for at in range(0, len(self.lines), at_once):
                threading.Event().wait(max(0.0, began + at / FLIGHTS_PER_S - time.monotonic()))
                stdin.write(b"".join(line + b"\n" for line in self.lines[at : at + at_once]))
                stdin.flush()

    def finish(self) -> str:
        """What it says when all is accepted."""
        code = self._sender.wait(DRAIN_S)
        said = self._log.read_text()
        assert code == 0, said
        return said.splitlines()[-1]


class Machines:
    """All that run around one topic and one store. `doors`: by the name of an API or host, what lies between it and each broker."""

    def __init__(self, make: Make, at: Brokers, azurite: Emulator, doors: Mapping[str, list[Balancer]]) -> None:
        self.brokers = at
        self.topic = at.fresh_topic()
        self.store = azurite.fresh_url()
        self.doors = doors
        self.ports = free_ports(len(APIS))
        self.systems = [
            make(
                name,
                command="api",
                period=f"{PERIOD_S}s",
                partitions=PARTITIONS,
                workers=1,
                options=("--hub", self.hub(name), "--store", self.store, "--listen", f"127.0.0.1:{port}"),
                environment=azurite.environment,
            )
            for name, port in zip(APIS, self.ports, strict=True)
        ]
        self.apis: list[Machine] = []
        for name, system, port in zip(APIS, self.systems, self.ports, strict=True):
            system.url = f"http://127.0.0.1:{port}"
            self.apis.append(Machine(name, functools.partial(system.process, *system.up_arguments())))
            wait_for("it takes events", functools.partial(self._ready, system))
        self.hosts = [Machine(name, functools.partial(self._host, name)) for name in HOSTS]
        self.ended: list[str] = []
        wait_for("each host has its share", lambda: sorted(self.owners().values()) == [2, 2, 2], 60)

    def hub(self, name: str) -> str:
        """The topic as an API or host reaches it."""
        return f"kafka://{','.join(f'127.0.0.1:{door.port}' for door in self.doors[name])}/{self.topic}"

    def _ready(self, system: System) -> bool:
        assert all(not api.process.ended for api in self.apis), self.apis[-1].process.text()
        return system.get("/health/ready")[0] == 200

    def _host(self, name: str) -> Process:
        places = ("--hub", self.hub(name), "--store", self.store, "--data", name, "--lease", f"{LEASE_S}s")
        return self.systems[0].process("host", "--name", name, *places, log=f"{name}.log")

    def status(self) -> list[dict[str, object]]:
        """Of each partition, from the first API that answers."""
        for system in self.systems:
            code, body = system.get("/v1/status")
            if code == 200:
                found: list[dict[str, object]] = json.loads(body)["partitions"]
                return found
        return []

    def owners(self) -> Counter[object]:
        return Counter(partition["owner"] for partition in self.status())

    def lag_s(self) -> float:
        return max((float(str(partition["lag_s"])) for partition in self.status()), default=float("inf"))

    def revive(self) -> None:
        """Whoever has ended by himself is started again, and named."""
        for machine in (*self.apis, *self.hosts):
            if machine.process.ended:
                if not machine.found_trouble():
                    self.ended.append(f"{machine.name}: {machine.process.text()[-1000:]}")
                machine.start()

    def check(self, command: str, store: str, *more: str) -> None:
        """It must exit 0."""
        system = self.systems[0]
        done = system.run(command, "--data", str(system.data), "--store", store, *more)
        assert done.returncode == 0, f"{command}: {done.stdout.decode()}{done.stderr.decode()}"

    def events(self) -> int:
        """In the log, copies and all."""
        total = 0
        with KafkaHub(Cluster(self.brokers.servers), self.topic, period_s=PERIOD_S, clock=SystemClock()) as hub:
            for partition in range(PARTITIONS):
                offset, end = "0", ""
                while offset != end:
                    read = hub.read(partition, offset, bytes_max=4 << 20)
                    total += sum(frame.count for frame in read.frames if not frame.is_marker)
                    offset, end = read.next_offset, read.end_offset
        return total


class Cut(NamedTuple):
    """Three brokers, and by API and host what lies between it and each of them."""

    brokers: Brokers
    doors: dict[str, list[Balancer]]


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cut]:
    with contextlib.ExitStack() as closing:
        doors: dict[str, list[Balancer]] = {name: [] for name in (*APIS, *HOSTS)}

        def give_doors(node: Node) -> None:
            """A listener for each, which is told to clients by what lies before it."""
            inside = dict(zip(doors, free_ports(len(doors)), strict=True))
            made = {name: closing.enter_context(Balancer(port)) for name, port in inside.items()}
            for name, door in made.items():
                doors[name].append(door)
            for setting, more in (
                ("listeners", {name: f"//127.0.0.1:{port}" for name, port in inside.items()}),
                ("advertised.listeners", {name: f"//127.0.0.1:{door.port}" for name, door in made.items()}),
                ("listener.security.protocol.map", dict.fromkeys(doors, "PLAINTEXT")),
            ):
                added = [f"{name.upper()}:{what}" for name, what in more.items()]
                node.set(f"{setting}={','.join([node.setting(setting), *added])}\n")

        running = closing.enter_context(brokers(tmp_path_factory.mktemp("kafka"), 3, before=give_doors))
        yield Cut(running, {name: of[-3:] for name, of in doors.items()})


@pytest.fixture
def machines(make_system: Make, three: Cut, azurite: Emulator) -> Machines:
    return Machines(make_system, three.brokers, azurite, three.doors)


def faults(machines: Machines) -> Iterator[tuple[str, Callable[[], None]]]:
    """Each kind in turn, in an order and with victims that the seed decides."""
    chosen, nobody = random.Random(SEED), threading.Event()

    def kill(victim: Victim) -> None:
        victim.kill()
        victim.start()

    def pause(victim: Victim) -> None:
        victim.signal(signal.SIGSTOP)
        nobody.wait(PAUSE_S)
        victim.signal(signal.SIGCONT)

    def cut_off(doors: Sequence[Balancer]) -> None:
        for door in doors:
            door.cut()
        nobody.wait(PAUSE_S)
        for door in doors:
            door.mend()

    groups: list[Sequence[Victim]] = [[Broker(node) for node in machines.brokers.nodes], machines.apis, machines.hosts]
    while True:
        kinds: list[tuple[str, Callable[[], None]]] = []
        for group in groups:
            for act in (kill, pause):
                victim = chosen.choice(group)
                kinds.append((f"{act.__name__} {victim.name}", functools.partial(act, victim)))
        for name in (chosen.choice(APIS), chosen.choice(HOSTS)):
            kinds.append((f"cut off {name}", functools.partial(cut_off, machines.doors[name])))
        number = chosen.randrange(3)
        column = [doors[number] for doors in machines.doors.values()]
        kinds.append((f"cut off broker {number + 1}", functools.partial(cut_off, column)))
        chosen.shuffle(kinds)
        yield from kinds


def lag_after_a_kill(machines: Machines) -> tuple[float, float]:
    """The greatest lag of three hosts, and how long after the death of one it takes until it is no greater. In s."""
    normal, until = 0.0, time.monotonic() + 2 * PERIOD_S
    while time.monotonic() < until:
        normal = max(normal, machines.lag_s())
        threading.Event().wait(0.1)
    doomed = machines.hosts[0]
    doomed.kill()
    began = time.monotonic()
    wait_for(
        "the others have its partitions and the lag is as before",
        lambda: doomed.name not in machines.owners() and machines.lag_s() <= normal,
    )
    took = time.monotonic() - began
    doomed.start()
    return normal, took


@pytest.mark.timeout(SECONDS + 400)
def test_each_event_is_archived_once_whoever_dies(machines: Machines, azurite: Emulator, tmp_path: Path) -> None:
    began = time.monotonic()
    with contextlib.ExitStack() as closing:
        front = closing.enter_context(Balancer(*machines.ports, drops=ANSWERS_DROPPED, seed=SEED))
        url = f"http://127.0.0.1:{front.port}"
        flights = closing.enter_context(Flights(tmp_path, url, int(SECONDS * FLIGHTS_PER_S)))
        load = Load(lambda: url, lanes=LANES, seed=SEED, pace_s=LANE_PACE_S).start()
        closing.callback(load.abandon)
        normal_s, back_s = lag_after_a_kill(machines)
        print(f"lag {normal_s:.1f} s; {back_s:.1f} s after a host was killed it was that again")
        for name, fault in faults(machines):
            step = time.monotonic()
            if step > began + SECONDS - STEP_S:
                break
            print(f"{step - began:6.1f} s: {name}; {load.confirmed} batches of the lanes confirmed")
            fault()
            threading.Event().wait(max(0.0, step + STEP_S - time.monotonic()))
            machines.revive()
        print(f"{time.monotonic() - began:6.1f} s: the end; {front.dropped} answers were dropped")
        said = flights.finish()
        load.stop(DRAIN_S)
        print(f"{time.monotonic() - began:6.1f} s: {said}; lanes: {load.confirmed} batches, {load.repeated} repeated")
    assert back_s <= BACK_S_MAX
    sent = [[Batch(flights.lines)], *load.batches]
    machines.check("flush", machines.store)
    machines.check("verify", machines.store)
    hub = f"kafka://{machines.brokers.servers}/{machines.topic}"
    machines.check("audit", machines.store, "--deep", "--hub", hub)
    folder = azurite.download(machines.store, tmp_path / "copy")
    assert problems(folder, PARTITIONS, sent) == []
    once, in_log = sum(1 for _ in archived(folder)), machines.events()
    print(f"{once} events, and {in_log - once} copies in the log; dead letters: {sorted(folder.glob('_dead/*/*'))}")
    assert in_log > once
    unfiltered = without_the_filter(machines, folder)
    assert [found for found in problems(unfiltered, PARTITIONS, sent) if f"{in_log - once} copies too many" in found]
    for machine in (*machines.hosts, *machines.apis):
        machine.process.signal(signal.SIGTERM)
        assert machine.process.wait() == 0, machine.process.text()[-4000:]
    assert machines.ended == []


def without_the_filter(machines: Machines, archive: Path) -> Path:
    """The negative control: what a host archives from the same log that leaves nothing out."""
    store = archive.with_name("unfiltered")
    store.mkdir()
    shutil.copy(archive / "_hub.json", store)
    words = ("host", "--hub", machines.hub(HOSTS[0]), "--store", str(store), "--data", "data", "--name", "unfiltered")
    host = machines.systems[0].process(*words, program=(str(UNFILTERED),), log="unfiltered.log")
    machines.check("flush", str(store))
    host.kill()
    return store


def test_who_asked_a_leader_that_stands_still_is_answered_by_the_next(three: Cut) -> None:
    """Where the partition ends while the first stands still, and what comes next when it is back and says that it leads no more."""
    cluster, topic = Cluster(three.brokers.servers), three.brokers.fresh_topic()
    create(cluster, topic, partitions=1, replicas=3, in_sync=2, retention_s=7 * 86_400)

    def leader(asked: Sequence[Node]) -> int:
        fresh = Cluster(",".join(node.address for node in asked)).admin
        return int(fresh.list_topics(topic, timeout=10).topics[topic].partitions[0].leader)

    with KafkaHub(cluster, topic, period_s=3600, clock=SystemClock()) as hub:
        wait_for("it has a leader", lambda: _answered(lambda: hub.bounds(0)))
        assert hub.read(0, "0", bytes_max=1).end_offset == "0"
        old = leader(three.brokers.nodes)
        others = [node for node in three.brokers.nodes if node.number != old]
        all_stand_still([node for node in three.brokers.nodes if node.number == old])
        try:
            wait_for("another leads", lambda: leader(others) not in (old, -1))
            wait_for("it says where the partition ends", lambda: _answered(lambda: hub.bounds(0)))
        finally:
            all_is_well(three.brokers)
        with KafkaHub(cluster, topic, period_s=3600, clock=SystemClock()) as new:
            wait_for("who is new is answered", lambda: _answered(lambda: new.read(0, "0", bytes_max=1)))
        assert hub.read(0, "0", bytes_max=1).end_offset == "0"


def _answered(ask: Callable[[], object]) -> bool:
    with contextlib.suppress(HubUnavailable):
        ask()
        return True
    return False


def all_stand_still(nodes: Sequence[Node]) -> None:
    for node in nodes:
        node.signal(signal.SIGSTOP)


def test_who_begins_beside_a_broker_that_stands_still_asks_the_others(
    make_system: Make, three: Cut, tmp_path: Path
) -> None:
    """An API, a host, and many who begin at once: each client takes any broker for the controller, also the one that says nothing."""
    topic = three.brokers.fresh_topic()
    create(Cluster(three.brokers.servers), topic, partitions=3, replicas=3, in_sync=2, retention_s=7 * 86_400)

    def begin(_number: int) -> int:
        cluster = Cluster(three.brokers.servers)
        cluster.check()
        with KafkaHub(cluster, topic, period_s=3600, clock=SystemClock()) as hub:
            return hub.partitions()

    places = ("--hub", f"kafka://{three.brokers.servers}/{topic}", "--store", str(tmp_path / "store"))
    api = make_system(command="api", partitions=3, workers=1, options=places)
    all_stand_still(three.brokers.nodes[:1])
    try:
        with ThreadPoolExecutor(BEGINNERS + 1) as pool:
            started = pool.submit(api.start)
            assert list(pool.map(begin, range(BEGINNERS))) == [3] * BEGINNERS
            started.result()
        host = api.process("host", *places, "--data", str(tmp_path / "host"), log="host.log")
        wait_for("the host has leases", lambda: host.text().count("lease taken") == 3 or host.ended)
        assert not host.ended, host.text()
        # Another broker leads when the brokers have missed the one that stands still.
        wait_for("a batch is taken", lambda: post_numbered(api.url, "p", 1).status == 200)
    finally:
        all_is_well(three.brokers)
    assert (host.stop(), api.stop()) == (0, 0)


def one_is_dead(nodes: Sequence[Node]) -> None:
    """And every record is to be at all three."""
    nodes[0].kill()


def all_is_well(at: Brokers) -> None:
    for node in at.nodes:
        if node.lives:
            node.signal(signal.SIGCONT)
        else:
            node.start()
    at.wait()


@pytest.mark.parametrize("trouble", [all_stand_still, one_is_dead])
def test_trouble_of_the_brokers_is_answered_within_seconds(
    make_system: Make, three: Cut, tmp_path: Path, trouble: Callable[[Sequence[Node]], None]
) -> None:
    """To everybody, also who comes while others wait, and while the API would write markers: a period is two seconds."""
    hub = f"kafka://{three.brokers.servers}/{three.brokers.fresh_topic()}"
    options = ("--hub", hub, "--store", str(tmp_path / "store"), "--in-sync-replicas", "3")
    api = make_system(command="api", period="2s", partitions=3, workers=1, options=options).start()

    def asked(producer: str) -> list[tuple[Answer, float]]:
        return [timed(functools.partial(post_numbered, api.url, producer, sequence)) for sequence in (2, 3)]

    assert post_numbered(api.url, "p", 1).status == 200
    trouble(three.brokers.nodes)
    try:
        with ThreadPoolExecutor(4) as pool:
            answers = list(itertools.chain(*pool.map(asked, "pqrs")))
        if trouble is one_is_dead:
            wait_for("it is ready, since another leads", lambda: api.get("/health/ready")[0] == 200)
        else:
            assert api.get("/health/ready")[0] == 503
    finally:
        all_is_well(three.brokers)
    told = {(answer.status, answer.json["code"], answer.headers["retry-after"]) for answer, _ in answers}
    assert (len(answers), told) == (8, {(503, "hub_unavailable", "2")})
    assert max(took for _, took in answers) < DELIVERY_S + 4
    wait_for("it is taken again", lambda: post_numbered(api.url, "p", 2).status == 200)
    wait_for("it is ready again", lambda: api.get("/health/ready")[0] == 200)


def timed(act: Callable[[], Found]) -> tuple[Found, float]:
    """What it returns, and how many seconds that took."""
    began = time.monotonic()
    return act(), time.monotonic() - began
