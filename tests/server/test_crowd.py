"""Who gets a seat, from which address, and who gives his up."""

from __future__ import annotations

import pytest

from penstock.errors import HubBusy
from penstock.server.crowd import TICKS, Crowd, subscriber
from penstock.server.parser import Limits


class Guest:
    """A connection that is idle since then, or busy."""

    def __init__(self, since: float | None = 0.0) -> None:
        self.since = since
        self.checked: list[float] = []
        self.closed = False

    def check(self, now: float) -> None:
        self.checked.append(now)

    def idle_since(self) -> float | None:
        return None if self.closed else self.since

    def close_if_idle(self) -> None:
        self.closed = True

    def abandon(self) -> None: ...


def crowd(**limits: int) -> Crowd:
    return Crowd(Limits(**limits))  # type: ignore[arg-type]


def rounds(of: Crowd, now: float, count: int = 2) -> None:
    for _ in range(count * (TICKS + 1)):
        of.look(now)


def test_seats_are_counted_by_address_and_given_back() -> None:
    here = crowd(connections_max=100, connections_per_address_max=2)
    first, second = Guest(), Guest()
    assert here.enter(first, "10.0.0.1") is None
    assert here.enter(second, "10.0.0.1") is None
    assert isinstance(here.enter(Guest(), "10.0.0.1"), HubBusy)
    assert here.enter(Guest(), "10.0.0.2") is None
    here.leave(first)
    assert here.enter(Guest(), "10.0.0.1") is None
    assert isinstance(here.enter(Guest(), "10.0.0.1"), HubBusy)


def test_nothing_is_kept_of_who_has_left() -> None:
    here = crowd(connections_max=10)
    guests = [Guest() for _ in range(8)]
    for number, guest in enumerate(guests):
        assert here.enter(guest, f"10.0.0.{number}") is None
    for guest in guests:
        here.leave(guest)
        here.leave(guest)
    assert (here.connections, here._seats, here._seats_of) == ({}, 0, {})


def test_zero_is_no_cap() -> None:
    here = crowd(connections_max=5000, connections_per_address_max=0)
    assert {here.enter(Guest(), "10.0.0.1") for _ in range(5000)} == {None}


def test_who_is_refused_takes_no_seat_and_only_a_few_linger() -> None:
    """Else a flood from one address that is at its cap would fill the house for all others."""
    here = crowd(connections_max=100, connections_per_address_max=1)
    assert here.enter(Guest(), "10.0.0.1") is None
    refused, cut = 0, 0
    for _ in range(1000):
        try:
            refused += here.enter(Guest(), "10.0.0.1") is not None
        except ConnectionAbortedError:
            cut += 1
    assert (refused, cut) == (12, 988)
    assert [here.enter(Guest(), f"10.0.1.{n}") for n in range(99)] == [None] * 99


def test_the_longest_idle_gives_its_seat_up() -> None:
    here = crowd(connections_max=4)
    busy, old, older, fresh = Guest(None), Guest(20.0), Guest(10.0), Guest(99.5)
    for guest in (busy, old, older, fresh):
        assert here.enter(guest, "10.0.0.1") is None
    refused = Guest()
    assert isinstance(here.enter(refused, "10.0.0.1"), HubBusy), "nobody was seen to be idle yet"
    here.leave(refused)
    rounds(here, 100.0)
    assert here.enter(Guest(None), "10.0.0.1") is None
    assert (older.closed, old.closed) == (True, False)
    here.leave(older)
    old.since = 100.0  # it has been used since
    assert isinstance(here.enter(Guest(), "10.0.0.1"), HubBusy)
    assert not any(guest.closed for guest in (busy, old, fresh))
    rounds(here, 102.0)
    assert here.enter(Guest(None), "10.0.0.1") is None
    assert (fresh.closed, old.closed, busy.closed) == (True, False, False)


def test_everyone_is_looked_at_once_in_a_round_and_a_share_in_a_tick() -> None:
    here = crowd(connections_max=2000)
    guests = [Guest() for _ in range(1000)]
    for guest in guests:
        here.enter(guest, "10.0.0.1")
    most = 0
    for tick in range(TICKS):
        here.look(float(tick))
        most = max(most, sum(guest.checked[-1:] == [tick] for guest in guests))
    assert {len(guest.checked) for guest in guests} == {1}
    assert most <= 1000 // TICKS + 1


@pytest.mark.parametrize(
    ("host", "address"),
    [
        ("192.0.2.7", "192.0.2.7"),
        ("::ffff:192.0.2.7", "192.0.2.7"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("2001:db8:1:2:ffff::1", "2001:db8:1:2::/64"),
        ("2001:db8:1:3::1", "2001:db8:1:3::/64"),
        ("fe80::1%eth0", "fe80::/64"),
        ("gone", "gone"),
    ],
)
def test_an_address_is_a_subscriber_s(host: str, address: str) -> None:
    assert subscriber(host) == address
