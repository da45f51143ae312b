"""`penstock send`: NDJSON files into the API."""

from __future__ import annotations

import contextlib
import gzip
import io
import sys
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, cast

import click

from penstock.cli.options import api_url, settings
from penstock.errors import PenstockError, SettingsError

if TYPE_CHECKING:
    from penstock.client.sender import Rejected, Sender, Summary
    from penstock.settings import Values

_ANSWER_TIMEOUT_S = 60.0


@click.command()
@click.argument("files", nargs=-1, required=True, metavar="FILE…")
@settings("send")
def send(values: Values, files: Sequence[str]) -> None:
    """Send the events of NDJSON files, one JSON object a line; gzip too, `-` for standard input.

    Exit 1 if an event was rejected; each is named with its line.
    """
    import random
    import secrets

    from penstock.client.sender import Sender
    from penstock.client.transport import HttpTransport
    from penstock.clock import SystemClock
    from penstock.wire.route import is_field

    if not is_field(values.text("device-field")):
        raise SettingsError(f"--device-field {values.text('device-field')!r} cannot name a field. Nothing was sent.")
    for file in files:
        if file != "-" and not Path(file).is_file():
            raise SettingsError(f"There is no file {file}. Nothing was sent.")
    url, clock = api_url(values), SystemClock()
    transports = [HttpTransport(url, timeout_s=_ANSWER_TIMEOUT_S) for _ in range(values.count("lanes"))]
    began = clock.monotonic()
    sender = Sender(
        transports,
        device_field=values.text("device-field"),
        batch_events=values.count("batch"),
        timeout_s=values.seconds("send-timeout"),
        clock=clock,
        on_rejected=_name,
        new_producer=lambda: f"send-{secrets.token_hex(8)}",
        jitter=random.random,
    )
    try:
        _read_all(files, sender)
        summary = sender.finish()
    except BaseException:
        sender.abandon()
        so_far = sender.summary()
        click.echo(f"Not all was sent. Until now {so_far.accepted:,} events were accepted.", err=True)
        raise
    _report(summary, clock.monotonic() - began)


def _name(rejected: Rejected) -> None:
    place = rejected.place
    click.echo(f"{place.file}:{place.line}: rejected: {rejected.code}: {rejected.detail}", err=True)


def _report(summary: Summary, took_s: float) -> None:
    rate = summary.accepted / max(took_s, 1e-3)
    text = f"{rate / 1000:.0f} k/s" if rate >= 10_000 else f"{rate:,.0f}/s"
    events = "event" if summary.accepted == 1 else "events"
    click.echo(
        f"{summary.accepted:,} {events} accepted in {took_s:.1f} s ({text}), {summary.rejected:,} rejected, "
        f"{summary.duplicates:,} duplicates recognised"
    )
    if summary.rejected:
        raise click.exceptions.Exit(1)


def _read_all(files: Sequence[str], sender: Sender) -> None:
    if not sys.stderr.isatty():
        for file in files:
            _read(file, sender, None)
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    sizes = [0 if file == "-" else Path(file).stat().st_size for file in files]
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeElapsedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as progress:
        task = progress.add_task("sending", total=None if "-" in files else sum(sizes))
        for index, file in enumerate(files):
            before = sum(sizes[:index])

            def moved(position: int, before: int = before) -> None:
                accepted = sender.summary().accepted
                rate = accepted / max(progress.tasks[0].elapsed or 0.0, 0.001)
                text = f"{accepted:,} accepted, {rate:,.0f}/s"
                progress.update(task, completed=before + position, description=text)

            _read(file, sender, moved)


def _read(file: str, sender: Sender, moved: Callable[[int], None] | None) -> None:
    from penstock.client.sender import RAW_BYTES_MAX, Place

    with _opened(file) as (lines, raw):
        number = 0
        try:
            while line := lines.readline(RAW_BYTES_MAX):
                number += 1
                if moved and number % 500 == 0:
                    moved(raw.tell())
                if not line.endswith(b"\n") and len(line) == RAW_BYTES_MAX:
                    while (rest := lines.readline(RAW_BYTES_MAX)) and not rest.endswith(b"\n"):
                        continue
                    sender.reject(Place(file, number), "event_too_large", f"longer than {RAW_BYTES_MAX} bytes")
                elif line := line.strip(b" \t\r\n"):
                    sender.add(line, Place(file, number))
        except (OSError, EOFError, zlib.error) as error:
            raise PenstockError(f"{file} cannot be read behind line {number}: {error}.") from error


@contextlib.contextmanager
def _opened(file: str) -> Iterator[tuple[BinaryIO, BinaryIO]]:
    """Lines, unzipped if they are zipped, and the file that they come from."""
    with contextlib.ExitStack() as closing:
        raw = sys.stdin.buffer if file == "-" else closing.enter_context(Path(file).open("rb"))
        assert isinstance(raw, io.BufferedReader), "a binary file that is open for reading is buffered"
        if raw.peek(2)[:2] == b"\x1f\x8b":
            yield cast(BinaryIO, closing.enter_context(gzip.GzipFile(fileobj=raw))), raw
        else:
            yield raw, raw
