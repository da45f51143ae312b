"""`python -m bench`: the real system under load. What the figures mean: docs/benchmarks.md.

A figure never makes it fail. Exit 1 if counts are wrong: accepted is not sent, or `penstock audit` finds a difference.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import msgspec
from rich.console import Console

from bench.client import client_run
from bench.codec import floor_ns, gzip_bodies, telemetry
from bench.growth import RANGES, Bench, Growth, Say, Soak, show_growth, show_soak
from bench.kafka import KafkaReport, kafka_report, show_kafka
from bench.memory import warm_memory
from bench.processor import processor_run
from bench.report import Report, floor_of, make_report, show
from bench.run import Options, Run, Work, run
from bench.system import BenchError, System

SINGLES = 4000
KINDS = ("batches", "single", "single numbered")
CLIENT = "client"
PROCESSOR = "processor"
_ROOM = 3  # The log, as much again for the archive, and for what the measured windows add.


def arguments(words: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench", description="Measure the real system under load.")
    add = parser.add_argument
    add("--json", metavar="FILE", help="write the figures as JSON; `-` for standard output")
    add(
        "--growth",
        nargs="*",
        metavar="RANGE",
        help=f"cost per event over ranges: {', '.join(RANGES)} (all of them)",
    )
    add("--log-bytes", type=int, default=5_000_000_000, help="far end of the range of the log (5000000000)")
    add("--soak", type=float, nargs="?", const=600.0, metavar="SECONDS", help="memory over a long run (600 s)")
    add("--hub", choices=("embedded", "kafka"), default="embedded", help="kafka: a topic beside the embedded hub")
    add("--brokers", type=int, default=1, help="of the topic, on this machine (1)")
    add("--only", action="append", choices=(*KINDS, CLIENT, PROCESSOR), help="only this; may be given several times")
    add("--seconds", type=float, default=20.0, help="length of each measured window (20)")
    add("--warm-up", type=float, default=3.0, help="seconds of load before it (3)")
    add("--floor-seconds", type=float, default=2.0, help="length of each measurement of the codec floor (2)")
    add("--workers", type=int, default=os.cpu_count() or 1, help="API workers (cores)")
    add("--partitions", type=int, default=16)
    add("--period", default="1h", help="length of an hour file (1h)")
    add("--connections", type=int, default=16, help="of the load of batches (16)")
    add("--single-connections", type=int, default=64, help="of the loads of single events (64)")
    add("--events-per-batch", type=int, default=1000)
    add("--devices", type=int, default=5000)
    add("--bodies", type=int, default=400, help="distinct request bodies (400)")
    add("--client-events", type=int, default=400_000, help="events of the client's measurements (400000)")
    add("--spool-bytes", type=int, default=10_000_000_000, help="size of a large spool (10000000000)")
    add("--processor-events", type=int, default=2_000_000, help="events that processors read (2000000)")
    add("--seed", type=int, default=1)
    add("--folder", type=Path, default=Path("build/bench"), help="where data lie meanwhile (build/bench)")
    given = parser.parse_args(words)
    if given.growth is not None:
        given.growth = given.growth or RANGES
        if unknown := set(given.growth) - set(RANGES):
            parser.error(f"--growth: no such range: {', '.join(sorted(unknown))}")
    return given


def options_of(given: argparse.Namespace) -> Options:
    return Options(
        seconds=given.seconds,
        warm_up_s=given.warm_up,
        floor_s=given.floor_seconds,
        workers=given.workers,
        partitions=given.partitions,
        period=given.period,
        connections=given.connections,
        single_connections=given.single_connections,
        events_per_batch=given.events_per_batch,
        devices=given.devices,
        bodies=given.bodies,
        seed=given.seed,
        client_events=given.client_events,
        spool_bytes=given.spool_bytes,
        processor_events=given.processor_events,
    )


class Prepared:
    """Request bodies, made once for each number of devices, and the files that load generators read them from."""

    def __init__(self, folder: Path, options: Options, say: Say) -> None:
        self._folder = folder
        self._options = options
        self._say = say
        self._made: dict[int, tuple[Path, Sequence[bytes]]] = {}

    def batches(self, devices: int) -> tuple[Path, Sequence[bytes]]:
        if devices not in self._made:
            options = self._options
            self._say(f"preparing {options.bodies} bodies of {options.events_per_batch} events, {devices:,} devices")
            bodies = gzip_bodies(options.bodies, events=options.events_per_batch, devices=devices, seed=options.seed)
            self._made[devices] = (self._write(f"batches-{devices}", bodies), bodies)
        return self._made[devices]

    def singles(self) -> Path:
        events = telemetry(SINGLES, devices=self._options.devices, seed=self._options.seed)
        return self._write("singles", [event.rstrip() for event in events])

    def _write(self, name: str, bodies: Sequence[bytes]) -> Path:
        path = self._folder / name
        path.write_bytes(msgspec.msgpack.encode(bodies))
        return path


def batches_of(options: Options, bodies: Path) -> Work:
    return Work("batches", bodies, options.events_per_batch, options.connections, zipped=True, numbered=True)


def load_runs(folder: Path, options: Options, prepared: Prepared, kinds: Sequence[str], say: Say) -> Report:
    path, bodies = prepared.batches(options.devices)
    singles = prepared.singles()
    works = [batches_of(options, path)] + [
        Work(kind, singles, 1, options.single_connections, zipped=False, numbered=kind != "single")
        for kind in KINDS[1:]
    ]
    say("codec floor")
    before_ns = floor_ns(bodies, events=options.events_per_batch, seconds=options.floor_s)
    runs: list[Run] = []
    for work in works:
        if work.name in kinds:
            say(f"{work.name}: {work.connections} connections, {options.warm_up_s:g} + {options.seconds:g} s")
            runs.append(run(System(folder / work.name.replace(" ", "-"), options.up()), options, work))
    after_ns = floor_ns(bodies, events=options.events_per_batch, seconds=options.floor_s)
    client = None
    if CLIENT in kinds:
        say(f"client: {options.client_events:,} events three times, and a spool of {options.spool_bytes / 1e9:g} GB")
        client = client_run(
            folder / CLIENT, options.up(), path, events=options.client_events, spool_bytes=options.spool_bytes
        )
    processor = None
    if PROCESSOR in kinds:
        say(f"processor: {options.processor_events:,} events, from the data folder and over HTTP")
        processor = processor_run(
            folder / PROCESSOR, options.up(), path, per_body=options.events_per_batch, events=options.processor_events
        )
    return make_report(options, floor_of(before_ns, after_ns), runs, client, processor)


def kafka_run(folder: Path, options: Options, prepared: Prepared, given: argparse.Namespace, say: Say) -> KafkaReport:
    work = batches_of(options, prepared.batches(options.devices)[0])
    return kafka_report(folder, options, work, nodes=given.brokers, backlog_s=given.seconds, say=say)


def main(words: Sequence[str]) -> int:
    given = arguments(words)
    options = options_of(given)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    out = Console(stderr=given.json == "-", width=None if sys.stdout.isatty() else 160)
    progress = Console(stderr=True)
    given.folder.mkdir(parents=True, exist_ok=True)
    ranges = given.growth or ()
    if "log" in ranges and shutil.disk_usage(given.folder).free < _ROOM * given.log_bytes:
        progress.print(f"--growth log needs {_ROOM * given.log_bytes / 1e9:g} GB of free disk in {given.folder}.")
        return 2

    def say(text: str) -> None:
        progress.print(f"bench: {text}", style="dim", markup=False, highlight=False)

    say("touching free memory")
    try:
        with warm_memory(), tempfile.TemporaryDirectory(prefix="run-", dir=given.folder.resolve()) as name:
            folder = Path(name)
            prepared = Prepared(folder, options, say)
            figures: Report | Growth | Soak | KafkaReport
            if given.hub == "kafka":
                figures = kafka_run(folder, options, prepared, given, say)
                show_kafka(figures, out)
            elif ranges:
                figures = Bench(folder, options, prepared.batches, say).growth(ranges, given.log_bytes)
                show_growth(figures, out)
            elif given.soak is not None:
                figures = Bench(folder, options, prepared.batches, say).soak(given.soak)
                show_soak(figures, out)
            else:
                figures = load_runs(folder, options, prepared, given.only or (*KINDS, CLIENT, PROCESSOR), say)
                show(figures, out)
    except KeyboardInterrupt:
        return 130
    except (BenchError, OSError, subprocess.TimeoutExpired) as error:
        progress.print(f"bench: {error}", style="bold red", markup=False)
        return 1
    if given.json:
        text = msgspec.json.format(msgspec.json.encode(figures)) + b"\n"
        Path("/dev/stdout" if given.json == "-" else given.json).write_bytes(text)
    return 0 if figures.ok else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
