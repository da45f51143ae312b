"""Who orders the archive to skip, as `penstock leases skip` does: a process that may be paused or die between any two requests."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from penstock.archive.skip import skip
from penstock.errors import PenstockError
from penstock.processor.skip import Order
from tests.sim.member import SimHub
from tests.sim.node import LEASE_S, Node
from tests.sim.oracle import Violation
from tests.sim.store import SimBlobs

if TYPE_CHECKING:
    from tests.sim.world import World

WATCHES_S = (0, 1, round(LEASE_S / 2))


class Person(Node):
    """Gives one order, once."""

    def __init__(self, world: World, order: Order) -> None:
        self.order = order
        super().__init__(world, order.by)

    def run(self) -> None:
        world = self._world
        hub: Any = SimHub(world.hub, self)
        store = SimBlobs(world.blobs, self, world.broken)
        try:
            done = skip(store, hub, self.order, clock=self.clock, watch_s=self.pick(WATCHES_S))
            self.say(f"* skipped {done}")
        except (PenstockError, OSError) as error:
            self.say(f"* not skipped: {error}")
        except Exception as error:
            raise Violation(f"{self.name} cannot skip: {error!r}") from error
        self._scheduler.call_at(self._scheduler.now, self.die)
        self._scheduler.park()

    def die(self) -> None:
        self._world.gone(self)
