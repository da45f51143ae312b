from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.processor.balance import Plan, View, plan


def views(owners: list[str | None]) -> list[View]:
    return [View(partition, owner, free=owner is None) for partition, owner in enumerate(owners)]


def test_free_partitions_are_all_claimed() -> None:
    chosen = plan(views([None, "b", None]), "a")
    assert sorted(chosen.claim) == [0, 2]
    assert chosen.steal is None


def test_what_cannot_be_had_is_left() -> None:
    assert plan([View(0, None, free=False), View(1, None, free=False), View(2, "a", free=False)], "a") == Plan()
    assert plan([], "a") == Plan()


def test_steals_only_from_one_with_at_least_two_more() -> None:
    assert plan(views(["b", "b", "a"]), "a") == Plan()
    assert plan(views(["b"]), "a") == Plan()
    assert plan(views(["b", "b"]), "a").steal in (0, 1)
    assert plan(views(["b", "b", "c", "c", "c", "a"]), "a").steal in (2, 3, 4)


def settle(partitions: int, hosts: list[str], owners: list[str | None], source: random.Random) -> int:
    """Rounds until nobody moves. In a round hosts act in any order, some of them on what they saw at its beginning."""
    for number in range(1, 200):
        before = list(owners)
        for host in source.sample(hosts, len(hosts)):
            seen = before if source.random() < 0.3 else list(owners)
            chosen = plan(views(seen), host)
            for partition in (*chosen.claim, *([] if chosen.steal is None else [chosen.steal])):
                if owners[partition] == seen[partition]:  # compare-and-set
                    owners[partition] = host
        if owners == before:
            return number
    raise AssertionError(f"no end: {owners}")


@settings(max_examples=150, deadline=None)
@given(
    partitions=st.integers(1, 40),
    hosts=st.integers(1, 8),
    dead=st.integers(0, 3),
    seed=st.integers(0, 2**32),
)
def test_hosts_even_out_whatever_the_start(partitions: int, hosts: int, dead: int, seed: int) -> None:
    source = random.Random(seed)
    names = [f"host-{number}" for number in range(hosts)]
    owners = [source.choice([*names, *[None] * (dead + 1)]) for _ in range(partitions)]
    rounds = settle(partitions, names, owners, source)
    counts = Counter(dict.fromkeys(names, 0))
    counts.update(owner for owner in owners if owner)
    assert sum(counts.values()) == partitions
    assert max(counts.values()) - min(counts.values()) <= 1
    assert rounds <= partitions + 3


def test_hosts_that_start_together_are_even_at_once() -> None:
    owners: list[str | None] = [None] * 16
    assert settle(16, ["a", "b"], owners, random.Random(1)) <= 10


@pytest.mark.parametrize("margin", [1, 0])
def test_control_a_smaller_margin_never_ends(margin: int) -> None:
    """Stealing from a host that has only one more goes round for ever."""
    owners = ["a", "b", "a"]
    moves = 0
    for _ in range(100):
        for me, other in (("a", "b"), ("b", "a")):
            if owners.count(other) >= owners.count(me) + margin:
                owners[owners.index(other)] = me
                moves += 1
    assert moves >= 100
