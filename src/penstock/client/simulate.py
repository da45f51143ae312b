"""A run of a simulated fleet against a real API: the schedule, and a thread for each gateway."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator, Sequence

from penstock.client.fleet import Fleet
from penstock.client.gateway import Gateway
from penstock.clock import Clock

PERIOD_S = 0.2
"""How often a gateway posts what its devices have said."""
_STOP_S = 1.0


class Schedule:
    """Sends what the fleet says when it says it. `ended` ends it early; `stop` is what the gateways obey.

    For answers that do not come it waits `patience_s`, both at the end and when a gateway cannot get rid of its events.
    """

    def __init__(
        self,
        fleet: Fleet,
        gateways: Sequence[Gateway],
        *,
        patience_s: float,
        clock: Clock,
        ended: threading.Event,
        stop: threading.Event,
    ) -> None:
        self._fleet = fleet
        self._gateways = gateways
        self._patience_s = patience_s
        self._clock = clock
        self._ended = ended
        self._stop = stop

    def run(self, seconds: float, moved: Callable[[float], None]) -> float:
        """Returns when all is answered or patience has ended: how long that took. `moved` is told how far it is, often."""
        threads = [threading.Thread(target=gateway.run, daemon=True) for gateway in self._gateways]
        for thread in threads:
            thread.start()
        began = self._clock.monotonic()
        for at_s, turn in self._steps(seconds):
            self._clock.wait(self._ended, max(0.0, began + at_s - self._clock.monotonic()))
            if self._ended.is_set():
                break
            for number in self._fleet.advance(at_s) if at_s < seconds else self._fleet.end():
                self._hand_over(number, reconnect=True)
            for number in turn:
                self._hand_over(number)
            moved(at_s)
        for gateway in self._gateways:
            gateway.close()
        self._join(threads, self._patience_s)
        took_s = self._clock.monotonic() - began
        self._stop.set()
        self._join(threads, _STOP_S)
        return took_s

    def _steps(self, seconds: float) -> Iterator[tuple[float, Sequence[int]]]:
        """When whose turn is. The times are fixed, so a late step makes no other late; and each gateway has a moment of its own."""
        count = len(self._gateways)
        for step in itertools.count(1):
            at_s = step * PERIOD_S / count
            if at_s >= seconds:
                yield seconds, range(count)
                return
            yield at_s, (step % count,)

    def _hand_over(self, number: int, *, reconnect: bool = False) -> None:
        """Waits while the gateway has too much already, so that memory stays small."""
        gateway, until = self._gateways[number], self._clock.monotonic() + self._patience_s
        while gateway.full and not self._ended.is_set():
            self._clock.wait(self._ended, PERIOD_S)
            if self._clock.monotonic() >= until:
                self._ended.set()
        lines = self._fleet.take(number)
        if lines and not self._ended.is_set():
            gateway.put(lines, reconnect=reconnect)

    def _join(self, threads: Sequence[threading.Thread], timeout_s: float) -> None:
        until = self._clock.monotonic() + timeout_s
        for thread in threads:
            thread.join(max(0.0, until - self._clock.monotonic()))
