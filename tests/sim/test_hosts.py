"""Thousands of seeds of the simulated world (`world.py`), and that it misses each safety step which is taken away.

`make sim SEED=17` shows what one seed decides, step by step; `make sim-long` goes on to other seeds.
"""

from __future__ import annotations

import pytest

from tests.sim.broken import Broken
from tests.sim.oracle import Violation
from tests.sim.world import simulate

SEEDS = 2_000
CHUNK = 250


@pytest.mark.parametrize("first", range(0, SEEDS, CHUNK))
def test_all_comes_right(first: int) -> None:
    for seed in range(first, first + CHUNK):
        try:
            simulate(seed)
        except Violation as violation:
            raise AssertionError(f"make sim SEED={seed}: {violation}") from violation


@pytest.mark.parametrize("broken", Broken)
def test_a_step_that_is_taken_away_is_missed(broken: Broken) -> None:
    for seed in range(SEEDS):
        try:
            simulate(seed, broken=broken)
        except Violation as violation:
            print(f"seed {seed}: {violation}")
            return
    pytest.fail(f"nobody noticed in {SEEDS} seeds: {broken.value}")


@pytest.mark.parametrize("seed", range(3))
def test_a_seed_decides_all(seed: int) -> None:
    one: list[str] = []
    other: list[str] = []
    simulate(seed, trace=one.append)
    simulate(seed, trace=other.append)
    assert one == other
    assert len(one) > 1000
