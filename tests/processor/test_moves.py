"""Why leases moved and will move: what is noted, what of it is believed, and what is seen coming."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import pytest

from penstock.processor.balance import View, plan
from penstock.processor.lease import Holding, Lease, Start, Writer, claim, lease_name, read_leases, take_over
from penstock.processor.moves import PAUSE_S, Due, Moved, Moves, Observed, forecast, move_name, moved, read_move
from penstock.testing import FakeClock, Fault, FaultyBlobs, MemoryBlobs, MemoryLog

LEASE_S = 30.0


class World:
    """One partition of group `g`, and hosts that take it by hand."""

    def __init__(self) -> None:
        self.clock = FakeClock()
        self.store = MemoryBlobs()
        self.log = MemoryLog()
        self.writers = {name: Writer(name, f"{name}-1") for name in ("a", "b")}

    @property
    def lease(self) -> Lease | None:
        return read_leases(self.store, "g", (0,))[0]

    def take(self, name: str, *, expired: bool = False, note: bool = True, writer: Writer | None = None) -> Holding:
        seen, writer = self.lease, writer or self.writers[name]
        if seen is None:
            held = claim(self.store, self.clock, "g", 0, writer, start=Start("0", 0))
        else:
            etag = self.store.get(lease_name("g", 0)).etag
            held = take_over(self.store, self.clock, "g", seen, etag, writer)
        if note:
            self.moves().note(held.lease, seen, expired=expired)
        return held

    def moves(self, store: FaultyBlobs | None = None) -> Moves:
        return Moves(store or self.store, "g", clock=self.clock, log=self.log)

    def moved(self) -> Moved | None:
        lease = self.lease
        assert lease is not None
        return moved(lease, read_move(self.store, "g", lease))


def test_each_reason_is_noted_and_read() -> None:
    world = World()
    at = "2026-11-22T14:00:00.000Z"
    held = world.take("a")
    assert world.moved() == Moved("first", None, "a", at)
    held.renew()
    assert world.moved() == Moved("first", None, "a", at), "renewing moves nothing"
    world.take("b", expired=True)
    assert world.moved() == Moved("expired", "a", "b", at)
    held = world.take("a")
    assert world.moved() == Moved("balance", "b", "a", at)
    held.release()
    assert world.moved() == Moved("given_back", "a", "", None)
    world.take("b")
    assert world.moved() == Moved("given_back", "a", "b", at), (
        "the lease does not say who gave it back, the note before does"
    )
    world.take("b", writer=Writer("b", "b-2"))
    assert world.moved() == Moved("own", "b", "b", at)
    assert set(msgspec.json.decode(world.store.get(move_name("g", 0)).body)) == {
        *("epoch", "from", "to", "why", "at", "token")
    }


def test_a_note_of_another_take_over_is_not_believed() -> None:
    world = World()
    world.take("a")
    world.take("b", note=False)
    assert world.moved() is None, "the note is of epoch 1"
    world.take("b", writer=Writer("b", "b-2"), expired=True)
    assert world.moved() == Moved("own", "b", "b", "2026-11-22T14:00:00.000Z")
    world.take("b", writer=Writer("b", "b-3"), note=False)
    assert world.moved() is None, "the same epoch, but the note is of the instance before"


def test_without_a_note_the_lease_says_what_it_can() -> None:
    world = World()
    held = world.take("a", note=False)
    assert world.moved() == Moved("first", None, "a", None)
    held.release()
    assert world.moved() == Moved("given_back", None, "", None)
    world.take("b", note=False)
    assert world.moved() is None


def test_a_late_note_does_not_hide_a_newer_one() -> None:
    world = World()
    first = world.take("a", note=False).lease
    world.take("b", expired=True)
    newer = world.moved()
    world.moves().note(first, None, expired=False)
    assert world.moved() == newer


@pytest.mark.parametrize("body", [b"{", b"[]", b'{"epoch": 1}'])
def test_a_note_that_cannot_be_read_is_none_and_is_replaced(body: bytes) -> None:
    world = World()
    world.store.create(move_name("g", 0), body, id="")
    world.take("a", note=False)
    assert world.moved() == Moved("first", None, "a", None)
    world.take("b")
    assert world.moved() == Moved("balance", "a", "b", "2026-11-22T14:00:00.000Z")


@pytest.mark.parametrize("operation", ["create", "replace"])
@pytest.mark.parametrize("fault", list(Fault))
def test_a_store_that_fails_is_logged_once_and_harms_nothing(operation: str, fault: Fault) -> None:
    world = World()
    world.take("a")
    failing = True
    tried: list[str] = []

    def plan(what: str, _name: str) -> Fault | None:
        tried.append(what)
        return fault if failing and what == operation else None

    store = FaultyBlobs(world.store, plan)
    moves = world.moves(store)
    fails = fault is not Fault.STALE
    for take in range(4):
        if take == 2:  # till then nothing was tried again
            assert tried.count(operation) == (1 if fails else 2)
            world.clock.advance(PAUSE_S)
        seen = world.lease
        held = world.take("ba"[take % 2], note=False)
        moves.note(held.lease, seen, expired=False)
    assert tried.count(operation) == (2 if fails else 4)
    assert world.log.count("the reason of a lease's move is not noted", partition=0) == (1 if fails else 0)
    store.land()
    assert world.moved() in (None, Moved("balance", "b", "a", "2026-11-22T14:01:00.000Z"))
    failing = False
    world.clock.advance(PAUSE_S)
    seen = world.lease
    moves.note(world.take("b", note=False).lease, seen, expired=True)
    moved = world.moved()
    assert moved is not None
    assert (moved.why, moved.from_owner, moved.to) == ("expired", "a", "b")


def observed(*leases: tuple[str | None, float]) -> list[Observed]:
    """(owner, age) of each partition; None: there is no lease."""
    return [
        Observed(p, None if owner is None else Lease(p, owner, "i-1", 1, "0", 0), age_s)
        for p, (owner, age_s) in enumerate(leases)
    ]


@pytest.mark.parametrize(
    ("leases", "hosts", "due"),
    [
        ([("a", 1), ("b", 2)], (), [None, None]),
        ([("a", 1), ("a", 2), ("b", 0)], (), [None, None, None]),
        ([(None, 0), ("a", 1)], (), [Due("first", None, "a", 0), None]),
        ([(None, 0), ("a", 1), ("b", 1)], (), [Due("first", None, None, 0), None, None]),
        ([("", 50), ("a", 1)], (), [Due("given_back", None, "a", 0), None]),
        ([("", 50)], (), [Due("given_back", None, None, 0)]),
        ([("a", 15), ("b", 1)], (), [None, None]),
        ([("a", 20), ("b", 1)], (), [Due("expired", "a", "b", 10), None]),
        ([("a", 31), ("b", 1)], (), [Due("expired", "a", "b", 0), None]),
        ([("a", 31)], ("b",), [Due("expired", "a", "b", 0)]),
        ([("a", 1), ("a", 1)], ("b",), [Due("balance", "a", "b", 0), None]),
    ],
)
def test_the_next_move(leases: list[tuple[str | None, float]], hosts: Sequence[str], due: list[Due | None]) -> None:
    found = forecast(observed(*leases), hosts, lease_s=LEASE_S)
    if any(one and one.why == "balance" for one in due):  # which of the partitions is for `plan` to say
        assert sorted(found, key=bool) == sorted(due, key=bool)
    else:
        assert found == due


def test_what_cannot_be_read_is_nobodys_next_move() -> None:
    found = forecast([Observed(0, None, 99.0, readable=False)], ("a",), lease_s=LEASE_S)
    assert found == [None]


def test_evening_out_is_what_plan_says_for_each_host() -> None:
    owners = ["a"] * 7 + ["b"] * 3
    found = forecast(observed(*((owner, 1.0) for owner in owners)), ("c",), lease_s=LEASE_S)
    views = [View(partition, owner, free=False) for partition, owner in enumerate(owners)]
    steals = {host: plan(views, host).steal for host in "abc"}
    assert steals["a"] is None and steals["b"] is not None and steals["c"] is not None
    assert {p: due.to for p, due in enumerate(found) if due} in (
        {steals["b"]: "b", steals["c"]: "c"},
        {steals["b"]: "b"},  # both want the same one
    )
