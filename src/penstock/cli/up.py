"""`penstock up`, `api` and `host`: the processes of an installation."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from penstock.cli.options import settings
from penstock.errors import SettingsError

if TYPE_CHECKING:
    from penstock.cli.wiring import Layout
    from penstock.files import Files, Held
    from penstock.kinds import Address
    from penstock.server.parts import PartState
    from penstock.settings import Values

_ORPHANS_S = 5.0


@click.command()
@settings("up")
def up(values: Values) -> None:
    """Run the whole system on this machine: hub, API workers, archiver. Ctrl-C stops all of it."""
    _serve(values, whole=True)


@click.command()
@settings("api")
def api(values: Values) -> None:
    """Run API workers alone, on a data folder that others may use too or, with --hub, on a Kafka topic from any number of machines."""
    _serve(values, whole=False)


@click.command()
@settings("host")
def host(values: Values) -> None:
    """Run an archiver host alone, on the data folder of `up` or `api` or, with --hub, anywhere. Any number share the partitions."""
    from penstock.cli import archiving, topic, wiring
    from penstock.clock import SystemClock, timestamp
    from penstock.files import Files
    from penstock.server.parts import PartState, Run, remove_run, write_run

    where, files, clock = topic.placed(wiring.layout(values), values), Files(), SystemClock()
    name, url = archiving.host_name(values), values.text("hub")
    with archiving.host_hub(where, values, url) as hub:
        archiving.claim_store(where, hub, clock)
    _made(where)
    pid = os.getpid()
    write_run(where.run, files, Run(pid, "", "", [PartState(name, pid, timestamp(clock.now_ms()))]))
    try:
        archiving.run_host(name, values, where, part=name, url=url)
    finally:
        remove_run(where.run, files, pid)


def _serve(values: Values, *, whole: bool) -> None:
    from penstock.cli import archiving, security, wiring, workers
    from penstock.cli.supervisor import Part, Supervisor, shared_slots
    from penstock.clock import SystemClock
    from penstock.files import Files
    from penstock.server.parts import Retention, Run, remove_dead, remove_run, write_run

    where, files = wiring.layout(values), Files()
    log = wiring.part_log("up" if whole else "api", values)
    security.check(values, log)
    if not whole:
        where = _hub_of_api(where, values)
    # A lock that is there is asked before the addresses: "already runs" says more than "address in use".
    held = _hold(where, files) if whole and where.lock.exists() else None
    with contextlib.ExitStack() as closing:
        kept, listen = wiring.reserve(values.address("listen"))
        closing.callback(kept.close)
        kept, admin = wiring.reserve(values.address("admin"))
        closing.callback(kept.close)
        _made(where)
        if whole and held is None:
            held = _hold(where, files)
        wiring.prepare(where, values)
        security.make_first_key(values, where.data, SystemClock())
        remove_dead(where.run, files)

        def worker(index: int, slot: memoryview) -> Part:
            name = workers.worker_name(index)
            return Part(
                name, lambda: workers.run_api(index, values, where, listen=listen, admin=admin, held=slot), 0, slot
            )

        parts = [worker(index, slot) for index, slot in enumerate(shared_slots(values.count("workers")))]
        if whole and values.text("archive") == "on":
            parts.append(
                Part("archiver", lambda: archiving.run_host(wiring.UP_HOST, values, where, part="archiver"), 1)
            )
        pid = os.getpid()
        retention = Retention(values.seconds("retention"), values.text("archive") == "on")

        def record(running: Sequence[PartState]) -> None:
            try:
                certificate = security.certificate(values)
                write_run(where.run, files, Run(pid, str(listen), str(admin), running, retention, certificate))
            except OSError as error:  # a full disk must not end the supervisor
                log.warning("The list of parts cannot be written.", detail=str(error))

        Supervisor(
            parts,
            clock=SystemClock(),
            log=log,
            stop_timeout_s=values.seconds("stop-timeout"),
            record=record,
            ready=lambda: _answers(listen) and _answers(admin),
            announce=lambda: click.echo(_announcement(values, where, listen, admin)),
        ).run()
        remove_run(where.run, files, pid)


def _hub_of_api(where: Layout, values: Values) -> Layout:
    from penstock.archive.topic import is_topic
    from penstock.cli import topic

    if (url := values.text("hub")) and not is_topic(url):
        raise SettingsError(
            f"--hub {url}: an API has its hub in the data folder, or in a topic, kafka://HOST:PORT/TOPIC."
        )
    return topic.placed(where, values)


def _hold(where: Layout, files: Files) -> Held:
    from penstock.clock import SystemClock
    from penstock.server.parts import lives

    clock, never = SystemClock(), threading.Event()
    until = clock.monotonic() + _ORPHANS_S
    while (held := files.hold(where.lock)) is None:
        pid = where.lock.read_text().strip()
        # A supervisor that was killed takes its children with it, but they need a moment; until then they have the lock.
        if not pid.isdigit() or lives(int(pid)) or clock.monotonic() > until:
            raise SettingsError(f"`penstock up` already runs on {where.data}, as process {pid}. Nothing was started.")
        clock.wait(never, 0.05)
    return held


def _made(where: Layout) -> None:
    from penstock.cli.wiring import make_folders

    try:
        make_folders(where)
    except OSError as error:
        raise SettingsError(f"The folder {error.filename or where.data} cannot be made: {error.strerror}.") from error


def _answers(address: Address) -> bool:
    # Not create_connection: it looks the address up, and for that imports more than all the rest takes.
    with socket.socket(socket.AF_INET6 if ":" in address.host else socket.AF_INET) as probe:
        probe.settimeout(0.2)
        return probe.connect_ex((address.host, address.port)) == 0


def _announcement(values: Values, where: Layout, listen: Address, admin: Address) -> str:
    from penstock.cli.security import advice

    scheme = "https" if values.text("tls-cert") else "http"
    period = f"hour files in {where.store_name}, a new one every {values.seconds('period'):.0f} s"
    archive = "no archive" if values.text("archive") == "none" else period
    return (
        f"Penstock takes events on {scheme}://{listen}, admin on http://{admin}; "
        f"{values.count('partitions')} partitions, {archive}.\n"
        f"{advice(values, where.data, listen)}\n"
        "Ctrl-C stops everything."
    )
