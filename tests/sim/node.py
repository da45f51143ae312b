"""What every process of the simulated world has: clocks, a line to the store, and all that goes wrong with them."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import msgspec

from penstock.blobs import Listed
from tests.sim.broken import Broken
from tests.sim.scheduler import Process, SimClock
from tests.sim.store import FINE, READS, WRITES, WRITING, Fate

if TYPE_CHECKING:
    from tests.sim.world import World

START_MS = 1_795_356_000_000
LEASE_S = 30.0
GLANCES = 0.2
PAUSES_S = (0.5, 2.0, 10.0, 0.9 * LEASE_S, 1.1 * LEASE_S, 2.5 * LEASE_S, 12 * LEASE_S)


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


class Node(Process):
    """A process with its clocks. `run` is its main thread's."""

    def __init__(self, world: World, name: str) -> None:
        super().__init__(name)
        self._world = world
        self._chaos = world.chaos
        self._random = world.random
        self._draw = world.random.random
        self._latency_s = self._chaos.latency_s
        self._faults = self._chaos.faults
        self._traced = world.trace is not None
        self._scheduler = world.scheduler
        self._unrest = self._chaos.thread_pauses + self._chaos.process_pauses + self._chaos.deaths + self._chaos.jumps
        clock = WallClock if world.broken is Broken.WALL_CLOCK else SimClock
        self.clock = clock(
            world.scheduler,
            start_ms=START_MS + self._random.choice((0, 0, -40_000, 40_000, 86_400_000)),
            rate=self._random.uniform(0.99, 1.01),
            step=self.glance,
        )
        world.scheduler.spawn(self, f"{self.name} main", self.run)

    def run(self) -> None:
        raise NotImplementedError

    def die(self) -> None:
        """To be called by the world."""
        raise NotImplementedError

    def step(self) -> None:
        """Here others get their turn, and a thread or the whole process may stop for a while, or for ever."""
        chance = self._draw()
        if chance < self._unrest and not self._world.quiet:
            self._upset(chance)
        self._scheduler.sleep(self._latency_s * self._draw())

    def glance(self) -> None:
        """A step that takes no time, unless something happens in it: a look at the clock."""
        if self._draw() < GLANCES:
            self.step()

    # The line between the host and its store.

    def before(self, operation: str, name: str) -> Fate:
        self.step()
        fate = FINE
        if not self._world.quiet and self._draw() < self._faults:
            fate = self._random.choice(WRITES if operation in WRITING else READS)
        if self._traced:
            self.say(f"{operation} {name} {'' if fate is FINE else fate.value}")
        return fate

    def after(self, answer: object) -> None:
        if self._traced:  # what an answer looks like takes as long to say as to give
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
        self._scheduler.call_at(self._scheduler.now, self.die)
        self._scheduler.park()

    def pick(self, values: Sequence[int]) -> int:
        return self._random.choice(values)

    def fails(self) -> bool:
        return not self._world.quiet and self._draw() < self._faults


class WallClock(SimClock):
    """Negative control: durations are measured with the clock that people set."""

    def monotonic(self) -> float:
        self._step()
        return self.now_ms() / 1000
