"""A processor host of the simulated world: a real host, archivers and keeper of hours, and their hub, work files and log."""

from __future__ import annotations

import errno
import io
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from penstock.archive import begin
from penstock.archive.archiver import archivers
from penstock.archive.hours import ARCHIVE_GROUP, HourKeeper
from penstock.errors import LostRace, StoreError
from penstock.events import Bounds, Slice
from penstock.files import Files
from penstock.processor.host import EventProcessorHost
from penstock.testing import MemoryHub
from tests.sim.node import LEASE_S, Node
from tests.sim.oracle import Violation
from tests.sim.scheduler import Event
from tests.sim.store import SimBlobs

if TYPE_CHECKING:
    from tests.sim.world import World

PUBLISH_S = 20.0
BYTES_MAX = (600, 2000, 1 << 20)
BAD_NEWS = {"partition parked", "processor failed", "processor failed to close", "pump failed"}


class Member(Node):
    """`host_name` may be another's too, `name` is the instance's own."""

    def __init__(self, world: World, host_name: str, number: int) -> None:
        self.host_name = host_name
        self.host: EventProcessorHost | None = None
        super().__init__(world, f"{host_name}#{number}")

    def run(self) -> None:
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

    def die(self) -> None:
        self._world.kill(self)

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

    def holds(self, partition: int) -> bool:
        """Whether this process has the lease, in truth."""
        return self._world.owners()[partition] == self.name

    def behind(self, partition: int) -> bool:
        """Whether the lease stands before the log, by no fault of the program's: see world.py."""
        return partition in self._world.behind()

    def stuck(self) -> None:
        # Its host does not look at that partition for two lease times, so it cannot even out either.
        self._world.note_trouble(lasting_s=LEASE_S)


class SimHub:
    """What of a hub hosts, archivers, keepers and orders use."""

    def __init__(self, hub: MemoryHub, node: Node) -> None:
        self.id = hub.id
        self.period_s, self.place_bits = hub.period_s, hub.place_bits
        self._hub = hub
        self._node = node

    def partitions(self) -> int:
        return self._hub.partitions()

    def read(self, partition: int, offset: str, *, bytes_max: int) -> Slice:
        self._node.step()
        if self._node.fails():
            raise OSError(errno.EIO, "the log cannot be read")
        return self._hub.read(partition, offset, bytes_max=min(bytes_max, self._node.pick(BYTES_MAX)))

    def bounds(self, partition: int) -> Bounds:
        self._node.step()
        return self._hub.bounds(partition)

    def locate(self, partition: int, at_ms: int) -> str:
        self._node.step()
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
