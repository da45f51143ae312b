"""`python -m tests.sim --seed 17`: one seed with all its steps. `--seeds 200000 --processes 2`: many, until one fails."""

from __future__ import annotations

import argparse
import multiprocessing
import sys
from collections.abc import Iterable

from tests.sim.oracle import Violation
from tests.sim.world import simulate

CHUNK = 100


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.sim", description="Simulated hosts; see tests/sim/world.py.")
    parser.add_argument("--seed", type=int, help="one seed; prints its trace")
    parser.add_argument("--first", type=int, default=0, help="the first of many seeds")
    parser.add_argument("--seeds", type=int, default=200_000, help="how many")
    parser.add_argument("--processes", type=int, default=2)
    given = parser.parse_args()
    if given.seed is not None:
        return shown(given.seed)
    return tried(range(given.first, given.first + given.seeds), given.processes)


def shown(seed: int) -> int:
    try:
        simulate(seed, trace=print)
    except Violation as violation:
        print(f"seed {seed} fails: {violation}")
        return 1
    print(f"seed {seed}: all came right")
    return 0


def tried(seeds: range, processes: int) -> int:
    chunks = [seeds[at : at + CHUNK] for at in range(0, len(seeds), CHUNK)]
    done = failed = 0
    with multiprocessing.Pool(processes) as pool:
        for chunk, failures in zip(chunks, pool.imap(failures_of, chunks), strict=True):
            done += len(chunk)
            for failure in failures:
                failed += 1
                print(failure, flush=True)
            if done % 1000 == 0 or done == len(seeds):
                print(f"{done:,} seeds, {failed} failed", flush=True)
    return min(failed, 1)


def failures_of(seeds: Iterable[int]) -> list[str]:
    return [failure for seed in seeds if (failure := failure_of(seed))]


def failure_of(seed: int) -> str | None:
    try:
        simulate(seed)
    except Violation as violation:
        return f"make sim SEED={seed}: {violation}"
    return None


if __name__ == "__main__":
    sys.exit(main())
