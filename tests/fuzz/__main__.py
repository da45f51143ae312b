"""`python -m tests.fuzz --seconds 60 [TARGET…]`: each target in a process of its own, all at once, guided by coverage.

What fails is kept as a file in tests/fuzz/corpus/TARGET: put it into the repository, and `make test` runs it for ever.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

PROJECT = Path(__file__).parents[2]
CORPUS = Path(__file__).parent / "corpus"
INPUT_S = 5
MEMORY_MIB = 1024
_RUNS = re.compile(r"^stat::number_of_executed_units: *([0-9]+)", re.MULTILINE)


class Outcome(NamedTuple):
    target: str
    code: int
    text: str
    kept: list[Path]

    @property
    def runs(self) -> int:
        """How many inputs were tried."""
        found = _RUNS.search(self.text)
        return int(found[1]) if found else 0


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description="Fuzzing; see tests/fuzz/targets.py.")
    parser.add_argument("target", nargs="*", help="all of them if none is named")
    parser.add_argument("--seconds", type=int, default=10, help="for each")
    parser.add_argument("--seed", type=int, default=0, help="0: another each time")
    parser.add_argument(
        "--here", action="store_true", help="one target in this process; what follows goes to libFuzzer"
    )
    given, options = parser.parse_known_args()
    if given.here:
        run_here(given.target[0], [*given.target[1:], *options])
    from tests.fuzz.targets import TARGETS

    failed = 0
    for outcome in fuzz(given.target or list(TARGETS), seconds=given.seconds, seed=given.seed):
        failed |= bool(outcome.code)
        print(f"{outcome.target}: {outcome.runs:,} inputs", flush=True)
        if outcome.code:
            print(outcome.text[-4000:], *(f"kept: {path}" for path in outcome.kept), sep="\n", flush=True)
    return failed


def fuzz(targets: list[str], *, seconds: int, seed: int = 0) -> list[Outcome]:
    """Fuzz these targets at once. What is found on the way and does not fail is thrown away; what fails is kept."""
    with ThreadPoolExecutor(len(targets)) as pool:
        return list(pool.map(lambda target: _fuzz(target, seconds, seed), targets))


def _fuzz(target: str, seconds: int, seed: int) -> Outcome:
    folder = CORPUS / target
    before = set(folder.iterdir())
    with tempfile.TemporaryDirectory() as found:
        arguments = [
            *(sys.executable, "-m", "tests.fuzz", target, "--here", found, str(folder)),
            *(f"-max_total_time={seconds}", f"-seed={seed}", f"-timeout={INPUT_S}", f"-rss_limit_mb={MEMORY_MIB}"),
            *(f"-artifact_prefix={folder}/", "-print_final_stats=1", "-verbosity=1"),
        ]
        done = subprocess.run(
            arguments, cwd=PROJECT, capture_output=True, text=True, errors="replace", timeout=seconds + 150, check=False
        )
    return Outcome(target, done.returncode, done.stdout + done.stderr, sorted(set(folder.iterdir()) - before))


def run_here(name: str, options: list[str]) -> None:
    """Never returns: libFuzzer ends the process."""
    import atheris

    os.nice(15)  # all of them at once must not hold up other tests, which wait for deadlines
    with atheris.instrument_imports(include=["penstock"]):
        from tests.fuzz.targets import TARGETS
    target = TARGETS[name]
    atheris.Setup([name, f"-max_len={target.bytes_max}", *options], target.run)
    atheris.Fuzz()


if __name__ == "__main__":
    sys.exit(main())
