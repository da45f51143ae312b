"""The fleet as a model: what its devices say, when, and by which clock."""

from __future__ import annotations

from collections import Counter
from datetime import datetime
from typing import Any

import msgspec
import pytest

from penstock.client.fleet import YEARS, Fleet

BEGAN_MS = 1_795_356_000_000
GATEWAYS = 4


def fleet(*, devices: int = 100, rate: int = 500, seconds: float = 10.0, seed: int = 7) -> Fleet:
    return Fleet("run", devices=devices, gateways=GATEWAYS, rate=rate, seconds=seconds, seed=seed, began_ms=BEGAN_MS)


def play(one: Fleet, seconds: float = 10.0) -> list[tuple[float, int, list[bytes]]]:
    """(time, gateway, lines) of everything that is sent; gateways are asked each 0.1 s."""
    sent = []
    for step in range(1, round(seconds * 10) + 1):
        back = one.advance(step / 10) if step < seconds * 10 else one.end()
        assert set(back) <= set(range(GATEWAYS))
        sent += [(step / 10, gateway, lines) for gateway in range(GATEWAYS) if (lines := one.take(gateway))]
    return sent


def events(sent: list[tuple[float, int, list[bytes]]]) -> list[Any]:
    return [msgspec.json.decode(line) for _, _, lines in sent for line in lines]


def test_a_seed_tells_it_all() -> None:
    assert play(fleet(seed=3)) == play(fleet(seed=3))
    assert play(fleet(seed=3)) != play(fleet(seed=4))


@pytest.mark.parametrize(("devices", "rate", "seconds"), [(100, 500, 10.0), (7, 90, 3.0), (5_000, 300, 4.0)])
def test_the_rate_is_exact_and_nothing_is_held_back(devices: int, rate: int, seconds: float) -> None:
    assert len(events(play(fleet(devices=devices, rate=rate, seconds=seconds), seconds))) == rate * seconds


def test_each_device_speaks_in_order_through_one_gateway() -> None:
    last: Counter[str] = Counter()
    through: dict[str, int] = {}
    one = fleet(rate=2_000)
    for _, gateway, lines in play(one):
        for event in map(msgspec.json.decode, lines):
            last[event["deviceId"]] += 1
            assert event["n"] == last[event["deviceId"]]
            assert through.setdefault(event["deviceId"], gateway) == gateway
    assert set(last) == {device.id.decode() for device in one.devices}
    assert one.bursts


def test_every_clock_is_wrong_and_some_by_years() -> None:
    one = fleet(devices=2_000, rate=2_000)
    errors_s: dict[str, float] = {}
    for at_s, _, lines in play(one):
        for event in map(msgspec.json.decode, lines):
            own_s = datetime.fromisoformat(event["at"]).timestamp()
            errors_s.setdefault(event["deviceId"], own_s - BEGAN_MS / 1000 - at_s)
    years = [error_s for error_s in errors_s.values() if abs(error_s) > 300 * 86_400]
    assert len(years) == sum(one.clocks[kind] for kind in YEARS)
    assert min(years) < -40 * 365 * 86_400 < 0 < max(years)
    assert 0 < len(years) < len(errors_s) / 20
    assert set(one.clocks) == {"seconds", "minutes", "hours", *YEARS}


def test_a_burst_is_what_a_device_gathered_while_it_was_out_of_reach() -> None:
    one = fleet(devices=10, rate=10_000)
    most = max(max(Counter(event["deviceId"] for event in events([load])).values()) for load in play(one))
    usual = 10_000 / 10 * 0.1
    assert one.bursts
    assert most > 1.2 * usual


def test_in_a_storm_half_of_the_gateways_come_back_at_once() -> None:
    one = fleet()
    returned = {step: back for step in range(1, 100) if (back := one.advance(step / 10))}
    assert [len(set(back)) for back in returned.values()] == [GATEWAYS / 2] * 2
    assert one.storms == 2
    one = fleet()
    one.advance(3.5)
    reached = [bool(one.take(gateway)) for gateway in range(GATEWAYS)]
    assert reached.count(False) == GATEWAYS / 2
    one.advance(4.4)
    assert all(one.take(gateway) for gateway in range(GATEWAYS))
