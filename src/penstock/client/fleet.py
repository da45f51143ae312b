"""The devices of a simulation: what each says, when, and by which clock. A pure function of the seed and of when the run began.

Times are seconds since then. Each device has an event every `devices / rate` seconds, a little late now and then. Now and then one is
out of reach, and later says all at once (a burst). Twice in a run half of the gateways are out of reach, and come back in the same
moment (a storm). No clock is right: most are wrong by seconds, some by minutes or a time zone, one in fifty by years.
"""

from __future__ import annotations

import heapq
import random
from collections import Counter
from collections.abc import Callable

import msgspec

from penstock.clock import timestamp

_JITTER_S_MAX = 0.5
_BURST_SHARE = 0.001
_BURST_EVENTS = (5, 50)
_STORMS = (1 / 3, 2 / 3)
_STORM_SHARE = 0.1
_STORM_S_MAX = 5.0
_DRIFT = 50e-6
_MINUTE_MS, _HOUR_MS, _YEAR_MS = 60_000, 3_600_000, 31_557_600_000

# How wrong a device's clock is: how many in a hundred, and by how much, given chance and the true time.
_CLOCKS: dict[str, tuple[int, Callable[[random.Random, int], float]]] = {
    "seconds": (87, lambda chance, _now_ms: chance.gauss(0, 2_000)),
    "minutes": (8, lambda chance, _now_ms: chance.uniform(-30, 30) * _MINUTE_MS),
    "hours": (3, lambda chance, _now_ms: chance.choice((-8, -5, 1, 2, 9)) * _HOUR_MS),
    "since 1970": (1, lambda _chance, now_ms: -now_ms),
    "years ahead": (1, lambda chance, _now_ms: chance.uniform(1, 20) * _YEAR_MS),
}
YEARS = ("since 1970", "years ahead")


class Device(msgspec.Struct):
    """`error_ms`: its clock minus the true time when the run begins; `drift`: what it gains in each ms."""

    id: bytes
    gateway: int
    error_ms: float
    drift: float
    temperature: float
    said: int = 0
    away_until_s: float = 0.0
    held: list[bytes] = []

    def event(self, now_ms: float, elapsed_ms: float, change: float) -> bytes:
        """Its next event as a line."""
        self.said += 1
        self.temperature += change
        at = timestamp(int(now_ms + self.error_ms + elapsed_ms * self.drift)).encode()
        return b'{"deviceId":"%b","n":%d,"at":"%b","temperature":%.2f}' % (self.id, self.said, at, self.temperature)


class Fleet:
    """`rate` events/s of `devices` for `seconds`. `run` is part of each device's id, so that what a run sent can be told apart."""

    def __init__(
        self, run: str, *, devices: int, gateways: int, rate: int, seconds: float, seed: int, began_ms: int
    ) -> None:
        self._chance = random.Random(seed)
        self._interval_s = devices / rate
        self._seconds = seconds
        self._began_ms = began_ms
        self.clocks: Counter[str] = Counter()
        self.bursts = self.storms = 0
        self.devices = [
            self._device(b"sim-%b-%d" % (run.encode(), number), number % gateways) for number in range(devices)
        ]
        self._waiting: list[list[bytes]] = [[] for _ in range(gateways)]
        self._away: frozenset[int] = frozenset()
        self._storms = self._plan_storms(gateways)
        # Event `place` is planned for `place / rate`. The devices take turns, in an order of their own.
        self._rate = rate
        self._turns = self._chance.sample(self.devices, devices)
        self._due = [(place / rate, place) for place in range(devices) if place / rate < seconds]

    def advance(self, until_s: float) -> list[int]:
        """All that happens until then. The gateways that come back meanwhile."""
        back: list[int] = []
        while self._storms and self._storms[0][0] <= until_s:
            _, away = self._storms.pop(0)
            back += self._away - away
            self.storms += not away
            self._away = away
        while self._due and self._due[0][0] <= until_s:
            due_s, place = self._due[0]
            self._say(self._turns[place % len(self._turns)], due_s)
            place += len(self._turns)
            if (planned_s := place / self._rate) < self._seconds:
                late_s = self._chance.random() * min(self._interval_s, _JITTER_S_MAX)
                heapq.heapreplace(self._due, (min(planned_s + late_s, self._seconds), place))
            else:
                heapq.heappop(self._due)
        return back

    def take(self, gateway: int) -> list[bytes]:
        """What the gateway has to send, in the order of each device; nothing while it is out of reach."""
        if gateway in self._away or not self._waiting[gateway]:
            return []
        lines, self._waiting[gateway] = self._waiting[gateway], []
        return lines

    def end(self) -> list[int]:
        """The last moment: everything is said, and everyone is back. The gateways that were away."""
        back = self.advance(self._seconds)
        back += self._away
        self._away = frozenset()
        for device in self.devices:
            self._waiting[device.gateway] += device.held
            device.held = []
        return back

    def _device(self, name: bytes, gateway: int) -> Device:
        kind = self._chance.choices(list(_CLOCKS), [share for share, _ in _CLOCKS.values()])[0]
        self.clocks[kind] += 1
        error_ms = _CLOCKS[kind][1](self._chance, self._began_ms)
        return Device(name, gateway, error_ms, self._chance.gauss(0, _DRIFT), self._chance.uniform(-10, 40))

    def _plan_storms(self, gateways: int) -> list[tuple[float, frozenset[int]]]:
        """From when on which gateways are out of reach."""
        lasts_s = min(self._seconds * _STORM_SHARE, _STORM_S_MAX)
        plan: list[tuple[float, frozenset[int]]] = []
        for share in _STORMS:
            away = frozenset(self._chance.sample(range(gateways), (gateways + 1) // 2))
            plan += [(share * self._seconds, away), (share * self._seconds + lasts_s, frozenset())]
        return plan

    def _say(self, device: Device, at_s: float) -> None:
        chance = self._chance
        line = device.event(self._began_ms + at_s * 1000, at_s * 1000, chance.random() - 0.5)
        if at_s < device.away_until_s:
            device.held.append(line)
            return
        waiting = self._waiting[device.gateway]
        if device.held:
            waiting += device.held
            device.held = []
        waiting.append(line)
        if chance.random() < _BURST_SHARE:
            self.bursts += 1
            device.away_until_s = at_s + self._interval_s * chance.uniform(*_BURST_EVENTS)
