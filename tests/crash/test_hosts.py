"""Three hosts on a store that fails, under load: killed, frozen for longer than their leases, cut off; and every event is archived once.

The store is Azurite behind a proxy that does to a part of the hosts' requests what networks and clouds do (tests/blobs/store_proxy.py).
The API is not disturbed, so what it has answered is what the archive has to hold.
"""

from __future__ import annotations

import json
import random
import signal
import threading
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from penstock.archive.hours import ARCHIVE_GROUP
from penstock.processor.lease import read_leases
from tests.blobs.store_proxy import Fault, StoreProxy
from tests.crash.load import Load
from tests.e2e.oracle import problems
from tests.e2e.system import ROUNDS, SEED, Process, System, wait_for
from tests.emulators import Emulator

Make = Callable[..., System]
PARTITIONS = 6
LEASE_S = 1.5
ROUNDS_LEAST, ROUNDS_MOST = 60, 240
CARELESS_HOST = Path(__file__).with_name("careless_host.py")
# A request that hangs costs its client the whole timeout, so that is rare.
FAULTS = [*[fault for fault in Fault if fault not in (Fault.NONE, Fault.HANG)] * 4, Fault.HANG]


class Fleet:
    """Three hosts, each in the place of one that was before, on `url` through a proxy."""

    def __init__(
        self,
        system: System,
        azurite: Emulator,
        url: str,
        proxy: StoreProxy,
        chosen: random.Random,
        program: tuple[str, ...] = ("-m", "penstock"),
    ) -> None:
        self._program = program
        here, there = f"127.0.0.1:{proxy.port}/", f"127.0.0.1:{azurite.port}/"
        self._environment = {name: value.replace(there, here) for name, value in azurite.environment.items()}
        self._system = system
        self._url = url
        self._random = chosen
        self._count = 0
        self._frozen: list[Process] = []
        self.done: list[str] = []
        self.hosts = [self._host() for _ in range(3)]

    def _host(self, name: str = "") -> Process:
        self._count += 1
        arguments = ("--data", str(self._system.data), "--store", self._url, "--lease", f"{LEASE_S:g}s")
        name = name or f"host-{self._count}"
        return self._system.process(
            "host",
            *arguments,
            *("--name", name),
            program=self._program,
            log=f"{name}.log",
            environment=self._environment,
        )

    def act(self) -> None:
        """Something happens to one of them; a fourth may run meanwhile that was frozen and thinks it has its leases."""
        place = self._random.randrange(3)
        host = self.hosts[place]
        act = self._random.choice(("kill", "freeze", "stop", "same name"))
        if act == "kill":
            host.kill()
            self.hosts[place] = self._host()
        elif act == "same name":
            host.kill()
            self.hosts[place] = self._host(host.log.stem)
        elif act == "stop":
            host.signal(signal.SIGTERM)
            self.hosts[place] = self._host()
        else:
            host.freeze_anywhere()
            self._frozen.append(host)
            self.hosts[place] = self._host()
        self.done.append(act)

    def thaw(self) -> None:
        """Those that were frozen go on, side by side with those that took over from them, until they are asked to end."""
        frozen, self._frozen = self._frozen, []
        for host in frozen:
            host.thaw()
        for host in frozen:
            host.signal(signal.SIGTERM)


@pytest.fixture
def proxy(azurite: Emulator) -> Iterator[StoreProxy]:
    with StoreProxy(azurite.port) as running:
        yield running


def test_hosts_are_killed_frozen_and_cut_off(
    make_system: Make, azurite: Emulator, proxy: StoreProxy, tmp_path: Path
) -> None:
    """Cases 28, 30, 31, 33, 45, 47, 49, 53."""
    chosen = random.Random(SEED)
    url = azurite.fresh_url()
    system = make_system(
        period="2s",
        partitions=PARTITIONS,
        workers=1,
        options=("--archive", "none"),
        environment={**azurite.environment, "PENSTOCK_STORE": url},
        anonymous=False,
    ).start()
    load = Load(lambda: system.url, lanes=3, seed=SEED, headers=system.headers).start()
    fleet = Fleet(system, azurite, url, proxy, chosen)
    tick = threading.Event()
    faulty = random.Random(SEED + 1)
    rate = 0.0
    met = Counter[Fault]()

    def plan(_method: str, _path: str) -> Fault:
        fault = faulty.choice(FAULTS) if faulty.random() < rate else Fault.NONE
        met[fault] += 1
        return fault

    proxy.plan = plan
    for number in range(ROUNDS or ROUNDS_MOST):
        if not ROUNDS and number >= ROUNDS_LEAST and _hands(azurite, url) > 2:
            break
        rate = chosen.choice((0.0, 0.1, 0.3))
        fleet.act()
        # Every fourth round is as long as a lease and a look: what was frozen meanwhile has lost its leases.
        tick.wait(LEASE_S * 1.2 if number % 4 == 3 else chosen.random())
        proxy.land()
        if number % 4 == 3:
            fleet.thaw()
    rate = 0.0
    proxy.land()
    fleet.thaw()
    load.stop()
    wait_for("the three that live share all leases", lambda: _owned(azurite, url, fleet), 60)
    system.settle()
    assert problems(azurite.download(url, tmp_path / "copy"), PARTITIONS, load.batches) == []
    if not ROUNDS:
        assert (set(fleet.done), set(met)) == ({"kill", "freeze", "stop", "same name"}, set(Fault))
    for host in fleet.hosts:
        assert host.stop() == 0, host.text()
    leases = json.loads(system.check("leases", "--json").stdout)
    assert {lease["owner"] for lease in leases} == {""}, "given back"
    assert ROUNDS or _hands(azurite, url) > 2, "each partition went through several hands"


def test_control_hosts_that_trust_an_unknown_result_are_noticed(
    make_system: Make, azurite: Emulator, proxy: StoreProxy
) -> None:
    url = azurite.fresh_url()
    system = make_system(
        period="2s",
        partitions=PARTITIONS,
        workers=1,
        options=("--archive", "none"),
        environment={**azurite.environment, "PENSTOCK_STORE": url},
    ).start()
    load = Load(lambda: system.url, lanes=3, seed=SEED).start()
    Fleet(system, azurite, url, proxy, random.Random(SEED), program=(str(CARELESS_HOST),))

    def plan(method: str, path: str) -> Fault:
        """One record of four is never written: honest hosts would wait for it."""
        refused = method == "PUT" and "/_ledger/" in path and zlib.crc32(path.encode()) % 4 == 0
        return Fault.BUSY if refused else Fault.NONE

    proxy.plan = plan

    def noticed() -> bool:
        return system.run("verify", "--data", str(system.data)).returncode == 1

    wait_for("verify finds it", noticed, 60)
    load.stop()


def _hands(azurite: Emulator, url: str) -> int:
    """Through how many hands each partition went at least."""
    leases = read_leases(azurite.open(url), ARCHIVE_GROUP, range(PARTITIONS))
    return min(lease.epoch if lease else 0 for lease in leases)


def _owned(azurite: Emulator, url: str, fleet: Fleet) -> bool:
    leases = read_leases(azurite.open(url), ARCHIVE_GROUP, range(PARTITIONS))
    return {lease.owner if lease else "" for lease in leases} == {host.log.stem for host in fleet.hosts}
