"""`python -m bench.hostile`: what slow and hostile clients and too much load do to a good client. `make hostile SECONDS=600`.

One system, one after the other: its capacity; a good client at half of that, alone, and beside idle and slow connections; beside all
attacks of bench.attack, for as long as is wanted; and three times the capacity, with batches and with single events. Then all that was
accepted is archived and checked: it is what the good clients sent, each batch once, and nothing of a hostile one. Exit 1 if that is
wrong; no figure makes it fail.
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import http.client
import os
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final, NamedTuple

import msgspec
from rich.console import Console

from bench.attack import AttackResult
from bench.attack import Plan as AttackPlan
from bench.codec import gzip_bodies, telemetry
from bench.load import ANSWERS_WITHIN_S, Latency, Plan, latency_ms
from bench.memory import warm_memory
from bench.paced import Paced, PacedResult
from bench.refused import DEVICE
from bench.report import Machine, Target, machine, target, targets_table
from bench.run import Generator, Loader
from bench.system import BenchError, Sampler, System, cpu_s, megabytes

P99_RATIO_MOST: Final = 2.0
ACCEPTED_RATIO_LEAST: Final = 0.9
REFUSAL_MS_MOST: Final = 50.0
WORKER_MB_MOST: Final = 300.0
OVERLOAD: Final = 3.0
_CONNECTIONS = 64
_SINGLE_CONNECTIONS = 256
_GOOD_CONNECTIONS = 64
_OVERLOAD_CONNECTIONS = 2000
_CONNECTIONS_OF_A_SOURCE = 1000
_HEALTH_EVERY_S = 0.05
_BODIES = 200
_ROOM = 3  # the log, as much again for the archive, and the other windows


class Sent(NamedTuple):
    """What a request carries: `bodies` is a file as bench.load reads it. Connections of its closed loop, and of too much of it: more than
    the workers queue."""

    name: str
    bodies: Path
    events: int
    zipped: bool
    connections: int
    overload_connections: int


class Options(msgspec.Struct, frozen=True):
    seconds: float
    warm_up_s: float
    attack_seconds: float
    events_per_batch: int
    idle: int
    slow: int
    attacks_per_s: float
    share: float
    single_connections: int


class Capacity(msgspec.Struct, frozen=True):
    """Events/s of a closed loop, and events for a second of the workers' CPU."""

    rate: float
    per_cpu_s: float


class Phase(msgspec.Struct, frozen=True):
    """The good client in one phase, and the latency of /health beside it. CPU of the workers in the window; MB are the most of one."""

    name: str
    load: PacedResult
    cpu_s: float
    health_ms: Latency
    worker_mb: float
    attack: AttackResult | None


class Hostile(msgspec.Struct, frozen=True):
    """`ok` is about what is stored alone. `capacities` are those of the closed loops, in their order, by what was sent."""

    ok: bool
    machine: Machine
    options: Options
    capacities: dict[str, list[Capacity]]
    phases: list[Phase]
    targets: list[Target]
    problems: list[str]


class Health:
    """Asks /health/live again and again, in a thread, while it is entered."""

    def __init__(self, port: int) -> None:
        self.latencies: list[float] = []
        self._port = port
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Health:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ending.set()
        self._thread.join()

    def _run(self) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=ANSWERS_WITHIN_S)
        while not self._ending.wait(_HEALTH_EVERY_S):
            began = time.perf_counter()
            connection.request("GET", "/health/live")
            with connection.getresponse() as answer:
                answer.read()
            self.latencies.append(time.perf_counter() - began)
        connection.close()


class Bench:
    """One system and its phases. `accepted` is what the good clients were told, `problems` what is wrong."""

    def __init__(self, system: System, options: Options, out: Console) -> None:
        self.system = system
        self.options = options
        self.accepted = 0
        self.problems: list[str] = []
        self.capacities: dict[str, list[Capacity]] = {}
        self._loads = 0
        self.phases: list[Phase] = []
        self._out = out
        self._workers = [pid for pid, name in system.parts().items() if name.startswith("api")]

    def capacity(self, sent: Sent) -> float:
        """Events/s of the closed loop of bench.load."""
        options = self.options
        plan = Plan(
            self.system.port,
            str(sent.bodies),
            sent.events,
            sent.connections,
            options.warm_up_s,
            options.seconds,
            sent.zipped,
            True,
            self._producer(),
        )
        with Loader(plan) as loader:
            used_s = self._cpu_in_window(loader)
            result = loader.result()
        self._count(result.accepted, result.sent, result.failures)
        rate = round(result.accepted_in_window / result.seconds, 1)
        self.capacities.setdefault(sent.name, []).append(Capacity(rate, result.accepted_in_window / used_s))
        self._out.print(f"capacity, {sent.name}: {rate:,.0f} events/s, p99 {result.latency_ms.p99:,.1f} ms")
        return rate

    def phase(
        self,
        name: str,
        sent: Sent,
        rate: float,
        seconds: float,
        attack: AttackPlan | None = None,
        *,
        overload: bool = False,
    ) -> None:
        """A load of `rate` events/s beside an attack; when the attack has begun."""
        connections = sent.overload_connections if overload else _GOOD_CONNECTIONS
        plan = Paced(
            self.system.port,
            str(sent.bodies),
            sent.events,
            connections,
            rate / sent.events,
            self.options.warm_up_s,
            seconds,
            sent.zipped,
            not overload,
            self._producer(),
            1 + connections // _CONNECTIONS_OF_A_SOURCE,
        )
        attacked: AttackResult | None = None
        with contextlib.ExitStack() as closing:
            attacker: Generator[AttackResult] | None = None
            if attack is not None:
                attacker = closing.enter_context(Generator("bench.attack", attack, AttackResult))
                attacker.await_mark("began")
            health = closing.enter_context(Health(self.system.port))
            with Sampler(self._workers, 0.5) as sampler, Generator("bench.paced", plan, PacedResult) as generator:
                used_s = self._cpu_in_window(generator)
                result = generator.result()
            if attacker is not None:
                attacker.stop()
                attacked = attacker.result()
                self.problems += attacked.unexpected
        most = max(megabytes(memory.anonymous) for samples in sampler.samples.values() for memory in samples)
        self._count(result.accepted, result.sent, result.failures)
        self.phases.append(Phase(name, result, used_s, latency_ms(health.latencies), most, attacked))
        self._say(self.phases[-1])

    def overload(self, sent: Sent) -> None:
        """Three times the capacity, between two measurements of it."""
        name = f"at {OVERLOAD:g} × the capacity, {sent.name}"
        self.phase(name, sent, OVERLOAD * self.capacity(sent), self.options.seconds, overload=True)
        self.capacity(sent)

    def settle(self, folder: Path) -> None:
        """Everything into the store, and what is there against what was accepted."""
        for command in (("flush", "--timeout", "600s"), ("audit", "--deep"), ("verify",)):
            if self.system.command(*command):
                self.problems.append(f"penstock {' '.join(command)} did not end with exit code 0")
        status = self.system.status()
        if status.totals.accepted != self.accepted:
            self.problems.append(
                f"{self.accepted} events of good clients were accepted, {status.totals.accepted} are stored"
            )
        self.problems += [f"{part.name} was started again" for part in status.parts if part.restarts]
        found = hostile_lines(folder / "data" / "store")
        if found:
            self.problems.append(f"{found} events of hostile clients are stored")

    def _cpu_in_window(self, generator: Loader | Generator[PacedResult]) -> float:
        """Of the workers, in seconds."""
        generator.await_mark("began")
        before = cpu_s(self._workers)
        generator.await_mark("ended")
        return sum(cpu_s(self._workers).values()) - sum(before.values())

    def _producer(self) -> str:
        """Another name for each load: its numbers begin at one."""
        self._loads += 1
        return f"load-{self._loads}"

    def _count(self, accepted: int, sent: int, failures: Sequence[str]) -> None:
        self.accepted += accepted
        self.problems += failures
        if accepted != sent:
            self.problems.append(f"{sent} events were sent, {accepted} accepted")

    def _say(self, phase: Phase) -> None:
        load = phase.load
        held = (
            phase.attack
            and f"; {phase.attack.idle} idle, {phase.attack.slow} slow, {phase.attack.reopened} opened again"
        )
        self._out.print(
            f"{phase.name}: {load.accepted_in_window / load.seconds:,.0f} events/s, p50 {load.latency_ms.p50:,.1f} ms, "
            f"p99 {load.latency_ms.p99:,.1f} ms; {load.refused_in_window} refused, p99 {load.refusal_ms.p99:,.1f} ms; sending late by "
            f"{load.lag_ms.p99:,.1f} ms, the generator's loop by {load.own_ms.p99:,.1f} ms; "
            f"/health p99 {phase.health_ms.p99:,.1f} ms; worker {phase.worker_mb:,.0f} MB{held or ''}",
            highlight=False,
        )
        if phase.attack and any(phase.attack.answers.values()):
            self._out.print(f"  attacks: {phase.attack.answers}", highlight=False)


def hostile_lines(store: Path) -> int:
    """Events of the hostile device in the hour files."""
    mark = b'"deviceId":"%b"' % DEVICE
    count = 0
    for path in store.glob("[0-9]*/*.json.gz"):
        with gzip.open(path, "rb") as file:
            rest = b""
            while part := file.read(1 << 20):
                part = rest + part
                count += part.count(mark)
                rest = part[1 - len(mark) :]
    return count


def targets(bench: Bench) -> Iterator[Target]:
    before, held, after, attacked, *over = bench.phases
    alone_ms = (before.load.latency_ms.p99 + after.load.latency_ms.p99) / 2
    what = f"beside {bench.options.idle} idle and {bench.options.slow} slow connections: p99 ÷ p99 alone"
    yield target(what, held.load.latency_ms.p99 / alone_ms, P99_RATIO_MOST, "×")
    yield target("beside all attacks: p99 ÷ p99 alone", attacked.load.latency_ms.p99 / alone_ms, P99_RATIO_MOST, "×")
    for phase, capacities in zip(over, bench.capacities.values(), strict=True):
        accepted, two = phase.load.accepted_in_window, capacities[-2:]
        ratio = accepted / phase.load.seconds / (sum(one.rate for one in two) / 2)
        yield target(f"{phase.name}: accepted ÷ capacity", ratio, ACCEPTED_RATIO_LEAST, "×", at_least=True)
        ratio = accepted / phase.cpu_s / (sum(one.per_cpu_s for one in two) / 2)
        yield target(f"{phase.name}: the same, by the workers' CPU", ratio, ACCEPTED_RATIO_LEAST, "×", at_least=True)
        yield target(f"{phase.name}: refusals, p99", phase.load.refusal_ms.p99, REFUSAL_MS_MOST, "ms")
        yield target(f"{phase.name}: /health, p99", phase.health_ms.p99, REFUSAL_MS_MOST, "ms")
    yield target("a worker's anonymous memory, most", max(p.worker_mb for p in bench.phases), WORKER_MB_MOST, "MB")


def what_is_sent(folder: Path, options: Options) -> tuple[Sent, Sent]:
    """Batches, and single events."""
    events = options.events_per_batch
    batches = Sent("batches", folder / "bodies", events, True, _CONNECTIONS, _OVERLOAD_CONNECTIONS)
    singles = Sent("single events", folder / "singles", 1, False, _SINGLE_CONNECTIONS, options.single_connections)
    bodies = gzip_bodies(_BODIES, events=events, devices=5000, seed=1)
    batches.bodies.write_bytes(msgspec.msgpack.encode(bodies))
    events_alone = [event.rstrip() for event in telemetry(_BODIES, devices=5000, seed=2)]
    singles.bodies.write_bytes(msgspec.msgpack.encode(events_alone))
    return batches, singles


def run(folder: Path, options: Options, out: Console) -> Hostile:
    batches, singles = what_is_sent(folder, options)
    workers = str(os.cpu_count() or 1)
    with System(folder / "system", ["--workers", workers, "--period", "1h"]) as system:
        bench = Bench(system, options, out)
        rate = bench.capacity(batches) * options.share
        seconds = options.seconds
        event_bytes = batches.bodies.stat().st_size / (_BODIES * options.events_per_batch)
        needed = _ROOM * event_bytes * rate * options.attack_seconds
        if shutil.disk_usage(folder).free < needed:
            raise BenchError(f"{options.attack_seconds:g} s of it need {needed / 1e9:.0f} GB of free disk in {folder}.")
        bench.phase("alone", batches, rate, seconds)
        held = AttackPlan(system.port, options.idle, options.slow, 0.0, False)
        bench.phase("beside idle and slow", batches, rate, seconds, held)
        bench.phase("alone again", batches, rate, seconds)
        tokens = asks_for_keys(system.port)
        all_of_it = AttackPlan(system.port, options.idle // 10, options.slow, options.attacks_per_s, tokens)
        bench.phase("beside all attacks", batches, rate, options.attack_seconds, all_of_it)
        for sent in (batches, singles):
            bench.overload(sent)
        bench.settle(folder / "system")
    return Hostile(
        not bench.problems,
        machine(),
        options,
        bench.capacities,
        bench.phases,
        list(targets(bench)),
        bench.problems,
    )


def asks_for_keys(port: int) -> bool:
    """Whether a wrong token is refused; asked with an event that would be refused in any case."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=ANSWERS_WITHIN_S)
    connection.request("POST", "/v1/events", b"{}", {"Authorization": "Bearer x"})
    with connection.getresponse() as answer:
        answer.read()
    connection.close()
    return answer.status == 401


def main(words: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.hostile", description="Good clients beside hostile ones.")
    add = parser.add_argument
    add("--seconds", type=float, default=20.0, help="length of each window but that of the attacks (20)")
    add("--warm-up", type=float, default=3.0, help="seconds of load before each (3)")
    add("--attack-seconds", type=float, default=60.0, help="length of the window beside all attacks (60)")
    add("--events-per-batch", type=int, default=1000)
    add("--idle", type=int, default=10_000, help="idle connections (10000)")
    add("--slow", type=int, default=500, help="connections that send a byte a second (500)")
    add("--attacks", type=float, default=100.0, help="attacks a second (100)")
    add(
        "--single-connections",
        type=int,
        default=10_000,
        help="of too much of single events: more than are queued (10000)",
    )
    add("--share", type=float, default=0.5, help="of the capacity, for the good client (0.5)")
    add("--json", metavar="FILE", help="write the figures as JSON; `-` for standard output")
    add("--folder", type=Path, default=Path("build/bench"))
    given = parser.parse_args(words)
    options = Options(
        given.seconds,
        given.warm_up,
        given.attack_seconds,
        given.events_per_batch,
        given.idle,
        given.slow,
        given.attacks,
        given.share,
        given.single_connections,
    )
    given.folder.mkdir(parents=True, exist_ok=True)
    out = Console(stderr=given.json == "-", width=None if sys.stdout.isatty() else 200)
    try:
        with warm_memory(), tempfile.TemporaryDirectory(prefix="run-", dir=given.folder.resolve()) as name:
            figures = run(Path(name), options, out)
    except KeyboardInterrupt:
        return 130
    except (BenchError, OSError) as error:
        out.print(f"bench: {error}", style="bold red", markup=False)
        return 1
    out.print(targets_table(figures.targets))
    for problem in figures.problems:
        out.print(f"PROBLEM: {problem}", style="bold red", markup=False)
    if given.json:
        text = msgspec.json.format(msgspec.json.encode(figures)) + b"\n"
        Path("/dev/stdout" if given.json == "-" else given.json).write_bytes(text)
    return 0 if figures.ok else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
