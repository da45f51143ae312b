"""One process of the simulated world: a real host, archivers, keeper of hours, and what goes wrong between it and the rest."""

from __future__ import annotations

import errno
import io
import random
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import msgspec

from penstock.archive import begin
from penstock.archive.archiver import archivers
from penstock.archive.hours import ARCHIVE_GROUP, HourKeeper
from penstock.blobs import Listed
from penstock.errors import LostRace, StoreError
from penstock.events import Bounds, Slice
from penstock.files import Files
from penstock.processor.host import EventProcessorHost
from penstock.testing import MemoryHub
from tests.sim.broken import Broken
from tests.sim.oracle import Violation
from tests.sim.scheduler import Event, Process, SimClock
from tests.sim.store import READS, WRITES, WRITING, Fate, SimBlobs

if TYPE_CHECKING:
    from tests.sim.world import World

START_MS = 1_795_356_000_000
LEASE_S = 30.0
PUBLISH_S = 20.0
GLANCES = 0.2
PAUSES_S = (0.5, 2.0, 10.0, 0.9 * LEASE_S, 1.1 * LEASE_S, 2.5 * LEASE_S, 12 * LEASE_S)
BYTES_MAX = (600, 2000, 1 << 20)
BAD_NEWS = {"partition parked", "processor failed", "processor failed to close", "pump failed"}


class Chaos(msgspec.Struct, frozen=True):
    """How much goes wrong: probabilities at each step (pauses, deaths, jumps of the wall clock) or request (faults)."""

    latency_s: float
    faults: float
    bad_lists: float
    thread_pauses: float
    process_pauses: float
    deaths: float
    jumps: float
    strangers: float
    deletes: bool
    stuck_s: float

    @classmethod
    def of(cls, source: random.Random) -> Chaos:
        pick = source.choice
        return cls(
            latency_s=pick((0.001, 0.02, 0.1)),
            faults=pick((0.0, 0.01, 0.05, 0.2)),
            bad_lists=pick((0.0, 0.1, 0.5)),
            thread_pauses=pick((0.0, 0.001, 0.01)),
            process_pauses=pick((0.0, 0.0005, 0.003)),
            deaths=pick((0.0, 0.0005, 0.002)),
            jumps=pick((0.0, 0.002)),
            strangers=pick((0.0, 0.4)),
            deletes=pick((True, False)),
            stuck_s=pick((10 * LEASE_S, 2 * LEASE_S)),
        )


class Member(Process):
    """`host_name` may be another's too, `name` is the instance's own."""

    def __init__(self, world: World, host_name: str, number: int) -> None:
        super().__init__(f"{host_name}#{number}")
        self.host_name = host_name
        self.host: EventProcessorHost | None = None
        self._world = world
        self._chaos = world.chaos
        self._random = world.random
        self._scheduler = world.scheduler
        self._unrest = self._chaos.thread_pauses + self._chaos.process_pauses + self._chaos.deaths + self._chaos.jumps
        clock = WallClock if world.broken is Broken.WALL_CLOCK else SimClock
        self.clock = clock(
            world.scheduler,
            start_ms=START_MS + self._random.choice((0, 0, -40_000, 40_000, 86_400_000)),
            rate=self._random.uniform(0.99, 1.01),
            step=self.glance,
        )
        world.scheduler.spawn(self, f"{self.name} main", self._main)

    def step(self) -> None:
        """Here others get their turn, and a thread or the whole process may stop for a while, or for ever."""
        chance = self._random.random()
        if chance < self._unrest and not self._world.quiet:
            self._upset(chance)
        self._scheduler.sleep(self._chaos.latency_s * self._random.random())

    def glance(self) -> None:
        """A step that takes no time, unless something happens in it: a look at the clock."""
        if self._random.random() < GLANCES:
            self.step()

    # The line between the host and its store.

    def before(self, operation: str, name: str) -> Fate:
        self.step()
        fate = Fate.FINE
        if not self._world.quiet and self._random.random() < self._chaos.faults:
            fate = self._random.choice(WRITES if operation in WRITING else READS)
        self.say(f"{operation} {name} {'' if fate is Fate.FINE else fate.value}")
        return fate

    def after(self, answer: object) -> None:
        self.say(f"    {answer}")
        self.step()

    def later(self, name: str, what: tuple[object, ...], write: Callable[[], object]) -> None:
        self._world.late.append((name, write))

    def listing(self, prefix: str, fresh: list[Listed]) -> list[Listed]:
        if self._world.quiet or not self._chaos.bad_lists:
            return fresh
        older = self._world.listings.setdefault(prefix, [])
        older.append(fresh)
        del older[:-5]
        if self._random.random() >= self._chaos.bad_lists:
            return fresh
        if self._random.random() < 0.5:
            return self._random.choice(older)
        return [listed for listed in fresh if self._random.random() < 0.5]

    def say(self, what: str) -> None:
        if self._world.trace is not None:
            task = self._scheduler.current
            self._world.say(task.name if task else self.name, what)

    def _upset(self, chance: float) -> None:
        chaos, world = self._chaos, self._world
        for likely, upset in (
            (chaos.thread_pauses, self._pause_thread),
            (chaos.process_pauses, self._pause_process),
            (chaos.deaths, self._die),
            (chaos.jumps, lambda: world.jump(self.clock, self.name)),
        ):
            if chance < likely:
                upset()
                return
            chance -= likely

    def _pause_thread(self) -> None:
        seconds = self._pause_s()
        self.say(f"this thread stands still for {seconds:.1f} s")
        self._scheduler.sleep(seconds)

    def _pause_process(self) -> None:
        seconds = self._pause_s()
        self.say(f"the whole process stands still for {seconds:.1f} s")
        self.paused_until = self._scheduler.now + seconds

    def _pause_s(self) -> float:
        return min(self._random.choice(PAUSES_S), self._world.quiet_at - self._scheduler.now)

    def _die(self) -> None:
        self._scheduler.call_at(self._scheduler.now, lambda: self._world.kill(self))
        self._scheduler.park()

    def _main(self) -> None:
        world = self._world
        hub: Any = SimHub(world.hub, self)
        store = SimBlobs(world.blobs, self, world.broken)
        log = SimLog(self)
        self.host = EventProcessorHost(
            hub=hub,
            store=store,
            group=ARCHIVE_GROUP,
            name=self.host_name,
            clock=self.clock,
            log=log,
            lease_s=LEASE_S,
            stuck_s=self._chaos.stuck_s,
            start=lambda partition: begin.start(store, hub, partition, host=self.host_name, clock=self.clock),
            instance=self.name,
        )
        factory = archivers(
            hub,
            store,
            host=self.host_name,
            epoch=self.host.epoch,
            clock=self.clock,
            files=SimFiles(self.fails),
            folder=Path("nowhere"),
            file_bytes_max=self._random.choice(BYTES_MAX),
            log=log,
        )
        self._scheduler.spawn(self, f"{self.name} hours", lambda: self._publish(HourKeeper(hub, store)))
        try:
            self.host.run(factory)
        except LostRace as error:
            self.say(str(error))
        except Exception as error:
            raise Violation(f"{self.name} ended: {error!r}") from error
        self._scheduler.call_at(self._scheduler.now, lambda: self._world.ended(self))
        self._scheduler.park()

    def _publish(self, keeper: HourKeeper) -> None:
        never: Any = Event(self._scheduler)
        while not self.clock.wait(never, PUBLISH_S):
            try:
                for hour in keeper.publish():
                    self.say(f"hour {hour} is complete")
            except StoreError as error:
                self.say(f"hours wait: {error}")
            except Exception as error:
                raise Violation(f"{self.name} cannot publish hours: {error!r}") from error

    def fails(self) -> bool:
        return not self._world.quiet and self._random.random() < self._chaos.faults

    def holds(self, partition: int) -> bool:
        """Whether this process has the lease, in truth."""
        return self._world.owners()[partition] == self.name

    def behind(self, partition: int) -> bool:
        """Whether the lease stands before the log, by no fault of the program's: see world.py."""
        return partition in self._world.behind()

    def stuck(self) -> None:
        # Its host does not look at that partition for two lease times, so it cannot even out either.
        self._world.note_trouble(lasting_s=LEASE_S)

    def read_bytes_max(self) -> int:
        return self._random.choice(BYTES_MAX)


class WallClock(SimClock):
    """Negative control: durations are measured with the clock that people set."""

    def monotonic(self) -> float:
        self._step()
        return self.now_ms() / 1000


class SimHub:
    """What of a hub hosts, archivers and keepers use."""

    def __init__(self, hub: MemoryHub, member: Member) -> None:
        self.id = hub.id
        self.period_s, self.place_bits = hub.period_s, hub.place_bits
        self._hub = hub
        self._member = member

    def partitions(self) -> int:
        return self._hub.partitions()

    def read(self, partition: int, offset: str, *, bytes_max: int) -> Slice:
        self._member.step()
        if self._member.fails():
            raise OSError(errno.EIO, "the log cannot be read")
        return self._hub.read(partition, offset, bytes_max=min(bytes_max, self._member.read_bytes_max()))

    def bounds(self, partition: int) -> Bounds:
        self._member.step()
        return self._hub.bounds(partition)

    def locate(self, partition: int, at_ms: int) -> str:
        self._member.step()
        return self._hub.locate(partition, at_ms)


class SimFiles(Files):
    """Work files in memory, when there is room."""

    def __init__(self, fails: Callable[[], bool]) -> None:
        self._fails = fails

    def work_file(self, folder: Path) -> BinaryIO:
        if self._fails():
            raise OSError(errno.ENOSPC, "no space left")
        return io.BytesIO()


class SimLog:
    """Tells the trace, and ends the simulation with what must never be logged."""

    def __init__(self, member: Member) -> None:
        self._member = member

    def info(self, event: str, **fields: Any) -> None:
        self._member.say(f"* {event} {fields}")

    def warning(self, event: str, **fields: Any) -> None:
        self._member.say(f"* {event} {fields}")

    def error(self, event: str, **fields: Any) -> None:
        self._member.say(f"* {event} {fields}")
        if event == "partition parked" and not self._member.holds(fields["partition"]):
            return  # It was paused between its last look at the clock and its read, and will find that it has lost the lease.
        if event == "partition parked" and self._member.behind(fields["partition"]):
            return
        if event in BAD_NEWS:
            raise Violation(f"{self._member.name}: {event}: {fields}")
        if event == "processor stuck":
            self._member.stuck()
