"""`python -m bench.balance`: how soon very many hosts are even, and what it costs the store, on a simulated clock.

The hosts are real (processor/host.py: watch, plan, leases), their pumps asleep; the store is in memory and counts requests. They act in an
order that the seed decides, one after the other within a round. Beside them runs the rule of Azure's EventProcessorHost: every
third of a lease time renew what is one's own, read all leases, take all that have expired, and if there were none steal one
from the host that has the most, if that has two more.
"""

from __future__ import annotations

import argparse
import random
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any, BinaryIO, Final, Protocol

import msgspec
from rich.console import Console
from rich.table import Table

from penstock.blobs import Blob, Created, Exists, Listed
from penstock.errors import BlobNotFound, LostRace
from penstock.events import Slice
from penstock.processor import CloseReason
from penstock.processor.host import EventProcessorHost
from penstock.processor.lease import Holding, Start, Writer, claim, decode_lease, lease_name, read_leases, take_over
from penstock.processor.watch import LOOKS
from penstock.testing import MemoryBlobs, MemoryHub, MemoryLog

GROUP: Final = "scale"
LEASE_S: Final = 30.0
_ROUNDS_MAX: Final = 100 * LOOKS


class Clock:
    """Moves when it is told to; who waits sleeps until he is woken."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def now_ms(self) -> int:
        return round(self.now_s * 1000)

    def monotonic(self) -> float:
        return self.now_s

    def wait(self, event: threading.Event, timeout_s: float) -> bool:
        return event.wait()


class Counted:
    """A store in memory that counts requests. A page of a listing has 5,000 names (Azure's; S3's and GCS's have 1,000)."""

    def __init__(self) -> None:
        self._store = MemoryBlobs()
        self._listed: dict[str, Listed] = {}
        self.requests: Counter[str] = Counter()

    def create(self, name: str, body: bytes, *, id: str) -> Created | Exists:
        self.requests["create"] += 1
        made = self._store.create(name, body, id=id)
        if isinstance(made, Created):
            self._listed[name] = Listed(name, len(body), made.etag)
        return made

    def replace(self, name: str, body: bytes, *, etag: str, id: str) -> str:
        self.requests["replace"] += 1
        made = self._store.replace(name, body, etag=etag, id=id)
        self._listed[name] = Listed(name, len(body), made)
        return made

    def put(self, name: str, body: BinaryIO) -> None:
        self.requests["put"] += 1
        self._store.put(name, body)

    def get(self, name: str) -> Blob:
        self.requests["get"] += 1
        return self._store.get(name)

    def size(self, name: str) -> int:
        self.requests["get"] += 1
        return self._store.size(name)

    def stream(self, name: str) -> Iterator[bytes]:
        self.requests["get"] += 1
        return self._store.stream(name)

    def list(self, prefix: str) -> Iterator[Listed]:
        # Made once for each write: sorting them for each look would be most of the work.
        found = [blob for name, blob in self._listed.items() if name.startswith(prefix)]
        self.requests["list"] += 1 + len(found) // 5000
        return iter(found)

    def delete(self, name: str) -> None:
        self.requests["delete"] += 1
        self._store.delete(name)


class Asleep:
    """A processor that is never given anything."""

    def process(self, events: Slice) -> str | None:
        return None

    def close(self, reason: CloseReason) -> None:
        return


class Member(Protocol):
    """A host of either rule."""

    name: str

    def round(self) -> None: ...
    def stop(self) -> None: ...
    def die(self) -> None: ...


class Ours:
    def __init__(self, name: str, world: World) -> None:
        self.name = name
        self._dead = False
        self._host = EventProcessorHost(
            hub=world.hub,
            store=world.store,
            group=GROUP,
            name=name,
            clock=world.clock,
            log=MemoryLog(),
            lease_s=LEASE_S,
            instance=world.instance(),
        )

    def round(self) -> None:
        self._host.round(lambda _partition: Asleep())

    def stop(self) -> None:
        self._host.stop()

    def die(self) -> None:
        for pump in self._host._pumps.values():
            pump.stop(CloseReason.LEASE_LOST)


class Theirs:
    """The rule of EventProcessorHost, on our leases."""

    def __init__(self, name: str, world: World) -> None:
        self.name = name
        self._store, self._clock = world.store, world.clock
        self._partitions = world.hub.partitions()
        self._writer = Writer(name, world.instance())
        self._own: dict[int, Holding] = {}
        self._seen: dict[int, tuple[str, float]] = {}
        self._due = self._clock.monotonic()

    def round(self) -> None:
        if self._clock.monotonic() < self._due:
            return
        self._due = self._clock.monotonic() + LEASE_S / 3
        for partition, holding in [*self._own.items()]:
            try:
                holding.renew()
            except LostRace:
                del self._own[partition]
        owners: dict[int, str] = {}
        expired = False
        for partition in range(self._partitions):
            free, owner = self._look(partition)
            expired = expired or free
            if free:
                self._take(partition)
            elif owner:
                owners[partition] = owner
        counts = Counter(owners.values())
        if not expired and counts:
            victim, most = counts.most_common(1)[0]
            if most >= len(self._own) + 2:
                self._take(next(partition for partition, owner in owners.items() if owner == victim))

    def _look(self, partition: int) -> tuple[bool, str]:
        if partition in self._own:
            return False, self.name
        now = self._clock.monotonic()
        try:
            blob = self._store.get(lease_name(GROUP, partition))
        except BlobNotFound:
            return True, ""
        seen = self._seen.get(partition)
        if seen is None or seen[0] != blob.etag:
            seen = self._seen[partition] = (blob.etag, now)
        owner = decode_lease(blob.body, partition).owner
        return not owner or now - seen[1] >= LEASE_S, owner

    def _take(self, partition: int) -> None:
        try:
            try:
                blob = self._store.get(lease_name(GROUP, partition))
            except BlobNotFound:
                start = Start("0", 0)
                self._own[partition] = claim(self._store, self._clock, GROUP, partition, self._writer, start=start)
                return
            seen = decode_lease(blob.body, partition)
            self._own[partition] = take_over(self._store, self._clock, GROUP, seen, blob.etag, self._writer)
        except LostRace:
            return

    def stop(self) -> None:
        for holding in self._own.values():
            try:
                holding.release()
            except LostRace:
                continue

    def die(self) -> None:
        self._own.clear()


class Phase(msgspec.Struct, frozen=True):
    """What happened until all was even: simulated seconds, partitions that changed hands, and requests of all hosts by kind."""

    rule: str
    what: str
    hosts: int
    seconds: float
    moves: int
    requests: dict[str, int]

    @property
    def per_host_minute(self) -> float:
        return sum(self.requests.values()) / self.hosts / max(self.seconds / 60, 1 / 60)


class World:
    """Hosts of one rule on one store."""

    def __init__(self, rule: Callable[[str, World], Member], partitions: int, seed: int) -> None:
        self.clock = Clock()
        self.store = Counted()
        self.hub = MemoryHub(partitions)
        self.members: list[Member] = []
        self._rule = rule
        self._random = random.Random(seed)
        self._names = 0
        self._owners: list[str | None] = [None] * partitions

    def instance(self) -> str:
        return f"{self._random.getrandbits(64):016x}"

    def join(self, count: int) -> None:
        for _ in range(count):
            self._names += 1
            self.members.append(self._rule(f"host-{self._names:04d}", self))

    def kill(self, count: int) -> None:
        for member in self._random.sample(self.members, count):
            self.members.remove(member)
            member.die()

    def turn(self) -> int:
        """All hosts once, within a twentieth of the lease time; how many partitions have another owner now."""
        order = self._random.sample(self.members, len(self.members))
        for member in order:
            self.clock.now_s += LEASE_S / LOOKS / len(order)
            member.round()
        before, self._owners = self._owners, self._now()
        return sum(new is not None and old != new for old, new in zip(before, self._owners, strict=True))

    def even(self) -> bool:
        """Whether every partition has a living owner and no two hosts differ by more than one."""
        counts = Counter({member.name: 0 for member in self.members})
        living = set(counts)
        counts.update(owner for owner in self._owners if owner is not None)
        return None not in self._owners and set(counts) == living and max(counts.values()) - min(counts.values()) <= 1

    def _now(self) -> list[str | None]:
        requests = self.store.requests.copy()
        leases = read_leases(self.store, GROUP, range(self.hub.partitions()))
        self.store.requests = requests
        return [lease.owner or None if lease else None for lease in leases]

    def phase(self, rule: str, what: str, step: Callable[[], bool]) -> Phase:
        """Turns until `step`, called before each, has nothing more to do and all is even."""
        self.store.requests.clear()
        began_s, moves = self.clock.now_s, 0
        for _ in range(_ROUNDS_MAX):
            more = step()
            moves += self.turn()
            if not more and self.even():
                break
        else:
            raise RuntimeError(f"{rule}: {what}: not even after {_ROUNDS_MAX} rounds")
        requests = dict(sorted(self.store.requests.items()))
        return Phase(rule, what, len(self.members), self.clock.now_s - began_s, moves, requests)


def phases(
    rule: str, make: Callable[[str, World], Member], *, partitions: int, hosts: int, seed: int
) -> Iterator[Phase]:
    """Start, a quarter of the hosts dead at once, a rolling restart, and a quiet time."""
    world = World(make, partitions, seed)
    try:
        world.join(hosts)
        yield world.phase(rule, f"{hosts} hosts start at once", lambda: False)
        world.kill(hosts // 4)
        yield world.phase(rule, f"{hosts // 4} die at once", lambda: False)
        waiting = world.members[: hosts // 10]

        def restart() -> bool:
            if waiting:
                leaver = waiting.pop()
                leaver.stop()
                world.members.remove(leaver)
                world.join(1)
            return bool(waiting)

        yield world.phase(rule, f"rolling restart of {len(waiting)}, one each {LEASE_S / LOOKS:g} s", restart)
        quiet = [None] * (4 * LOOKS)
        yield world.phase(rule, "quiet", lambda: bool(quiet and (quiet.pop() or True)))
    finally:
        for member in world.members:
            member.stop()


def show(found: Sequence[Phase], out: Console) -> None:
    table = Table(title="Hosts, until every partition has an owner and no two hosts differ by more than one")
    for name in ("rule", "what", "hosts", "seconds", "moves", "requests a host and minute", "of them"):
        table.add_column(name, justify="left" if name in ("rule", "what", "of them") else "right")
    for phase in found:
        minutes = max(phase.seconds / 60, 1 / 60) * phase.hosts
        kinds = ", ".join(f"{kind} {count / minutes:,.1f}" for kind, count in phase.requests.items())
        row = [phase.rule, phase.what, str(phase.hosts), f"{phase.seconds:,.0f}", f"{phase.moves:,}"]
        table.add_row(*row, f"{phase.per_host_minute:,.0f}", kinds)
    out.print(table)


def main(words: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.balance", description="How soon very many hosts are even.")
    parser.add_argument("--partitions", type=int, default=1024)
    parser.add_argument("--hosts", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args(words)
    rules: dict[str, Callable[[str, World], Any]] = {"Penstock": Ours, "EventProcessorHost": Theirs}
    found = []
    for rule, make in rules.items():
        for phase in phases(rule, make, partitions=given.partitions, hosts=given.hosts, seed=given.seed):
            print(f"bench: {rule}: {phase.what}: {phase.seconds:,.0f} s", file=sys.stderr)
            found.append(phase)
    show(found, Console(width=None if sys.stdout.isatty() else 160))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
