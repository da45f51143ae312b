"""`python -m bench.hosts`: processor hosts as processes: how soon another takes over, and how fast a backlog is archived."""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Final

import msgspec
from rich.console import Console

from bench.codec import gzip_bodies
from bench.report import Target, target, targets_table
from bench.run import Work, measure, plan_of
from bench.system import BenchError, System, cpu_s, environment
from penstock.archive.hours import ARCHIVE_GROUP
from penstock.blobs.disk import DiskBlobs
from penstock.files import Files
from penstock.processor.lease import Lease, read_leases

PARTITIONS: Final = 16
BEYOND_LEASE_S_MOST: Final = 2.0
HAND_OVER_S_MOST: Final = 2.0
CATCH_UP_LEAST: Final = 10.0
CATCH_UPS: Final = {"one": (1, False), "two": (2, False), "cold": (1, True)}
"""How many hosts, and whether the system's cache has nothing of the log any more."""
_WITHIN_S: Final = 120.0
_POLL_S: Final = 0.02


class Host:
    """One `penstock host` on the data of a system."""

    def __init__(self, system: System, name: str, lease_s: float) -> None:
        self.name = name
        self.process = subprocess.Popen(
            [*system.words("host"), "--name", name, "--lease", f"{lease_s:g}s"],
            env=environment(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    def end(self, number: signal.Signals) -> None:
        self.process.send_signal(number)
        self.process.wait(_WITHIN_S)


class Leases:
    """The leases of the archive in a system's store, read as often as one likes."""

    def __init__(self, folder: Path) -> None:
        self._store = DiskBlobs(folder / "data" / "store", Files())

    def __call__(self) -> list[Lease | None]:
        return read_leases(self._store, ARCHIVE_GROUP, range(PARTITIONS))

    def counts(self, hosts: Sequence[Host]) -> list[int]:
        owners = [lease.owner if lease else "" for lease in self()]
        return [owners.count(host.name) for host in hosts]

    def reached(self, ends: Sequence[int]) -> bool:
        """Whether everything below these sequence numbers is archived. Looks no further than the first that is not: the cores are busy."""
        leases = (read_leases(self._store, ARCHIVE_GROUP, (partition,))[0] for partition in range(PARTITIONS))
        return all(lease is not None and lease.sequence_number >= end for lease, end in zip(leases, ends, strict=True))

    def await_even(self, hosts: Sequence[Host]) -> None:
        def even() -> bool:
            counts = self.counts(hosts)
            return sum(counts) == PARTITIONS and max(counts) - min(counts) <= 1

        _await("the hosts are even", even)


def _await(what: str, condition: Callable[[], bool]) -> float:
    """Seconds that it took."""
    began = time.monotonic()
    while not condition():
        if time.monotonic() - began > _WITHIN_S:
            raise BenchError(f"not within {_WITHIN_S:g} s: {what}")
        time.sleep(_POLL_S)
    return time.monotonic() - began


def take_over(folder: Path, lease_s: float) -> tuple[float, float]:
    """Seconds until others have all partitions of a host that was killed, and of one that was asked to end."""
    with System(folder, ["--archive", "none", "--partitions", str(PARTITIONS)]) as system:
        leases = Leases(folder)
        hosts = [Host(system, f"host-{number}", lease_s) for number in range(4)]
        try:
            leases.await_even(hosts)
            asked = hosts.pop()
            asked.process.send_signal(signal.SIGTERM)
            hand_over_s = _await("given back and taken", lambda: sum(leases.counts(hosts)) == PARTITIONS)
            asked.process.wait(_WITHIN_S)
            leases.await_even(hosts)
            hosts.pop().end(signal.SIGKILL)
            take_over_s = _await("taken over", lambda: sum(leases.counts(hosts)) == PARTITIONS)
            return take_over_s, hand_over_s
        finally:
            for host in hosts:
                host.end(signal.SIGKILL)


def catch_up(folder: Path, bodies: Path, seconds: float, hosts: int, *, cold: bool) -> tuple[float, float, float]:
    """Events/s taken in at full load while the hosts are stopped, and then archived by them: by wall time and by their CPU time.

    `cold`: the system's cache has nothing of the log any more. The clock runs from the moment when the hosts go on until the last
    checkpoint, which is behind the last hour file.
    """
    with System(folder, ["--archive", "none", "--partitions", str(PARTITIONS)]) as system:
        leases = Leases(folder)
        running = [Host(system, f"host-{number}", 3 * seconds + 30) for number in range(hosts)]
        pids = [host.process.pid for host in running]
        try:
            leases.await_even(running)
            before = cpu_s(pids)
            for host in running:
                host.process.send_signal(signal.SIGSTOP)
            work = Work("catch up", bodies, 1000, 16, zipped=True, numbered=True)
            window = measure(system, plan_of(work, system, warm_up_s=1, seconds=seconds, producer="load"))
            ingest = window.result.accepted_in_window / window.result.seconds
            ends = system.cut()
            _set_cache(folder / "data" / "hub" / "data.mdb", cold=cold)
            began = time.monotonic()
            for host in running:
                host.process.send_signal(signal.SIGCONT)
            _await("the backlog is archived", lambda: leases.reached(ends))
            took_s = time.monotonic() - began
            used = cpu_s(pids)
            return ingest, sum(ends) / took_s, sum(ends) / sum(used[pid] - before[pid] for pid in pids)
        finally:
            for host in running:
                host.process.send_signal(signal.SIGCONT)
                host.end(signal.SIGTERM)


def _set_cache(log: Path, *, cold: bool) -> None:
    """The system's cache has all of a file, or nothing. A virtual machine may have given some of it back by itself."""
    with log.open("rb", buffering=0) as file:
        if cold:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        while not cold and file.read(1 << 20):
            continue


def targets(
    folder: Path, *, lease_s: float, seconds: float, catch_ups: Sequence[str], out: Console
) -> Iterator[Target]:
    after_kill_s, hand_over_s = take_over(folder / "take-over", lease_s)
    out.print(
        f"lease time {lease_s:g} s: taken over {after_kill_s:.2f} s after a kill, {hand_over_s:.2f} s after SIGTERM"
    )
    yield target("take-over after a kill, beyond the lease time", after_kill_s - lease_s, BEYOND_LEASE_S_MOST, "s")
    yield target("hand-over on a clean stop", hand_over_s, HAND_OVER_S_MOST, "s")
    path = folder / "bodies"
    path.write_bytes(msgspec.msgpack.encode(gzip_bodies(200, events=1000, devices=5000, seed=1)))
    for which in catch_ups:
        hosts, cold = CATCH_UPS[which]
        ingest, wall, cpu = catch_up(folder / f"catch-up-{which}", path, seconds, hosts, cold=cold)
        name = f"catch-up of {hosts} host{'s' * (hosts > 1)}{', log not in the cache' * cold}"
        out.print(
            f"{name}: taken in {ingest:,.0f} events/s; archived {wall:,.0f} events/s, {cpu:,.0f} for each CPU second of the hosts"
        )
        name = f"{name}: archived ÷ taken in, events/s"
        yield target(name, wall / ingest, CATCH_UP_LEAST, "×", at_least=True)


def main(words: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.hosts", description="Take-over and catch-up of processor hosts."
    )
    parser.add_argument("--lease", type=float, default=30.0, help="lease time in seconds (30)")
    parser.add_argument("--seconds", type=float, default=25.0, help="load that makes the backlog (25)")
    parser.add_argument("--folder", type=Path, default=Path("build/bench"))
    parser.add_argument(
        "--catch-up", nargs="+", choices=list(CATCH_UPS), default=list(CATCH_UPS), help="only these (all)"
    )
    given = parser.parse_args(words)
    folder = given.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    out = Console(width=None if sys.stdout.isatty() else 160)
    found = targets(folder, lease_s=given.lease, seconds=given.seconds, catch_ups=given.catch_up, out=out)
    out.print(targets_table([*found]))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
