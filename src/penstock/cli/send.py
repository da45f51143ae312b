"""`penstock send`: NDJSON files into the API."""

from __future__ import annotations

import contextlib
import gzip
import io
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from penstock.cli.options import echo_client_log, settings
from penstock.cli.reach import api
from penstock.errors import PenstockError, SettingsError, SpoolError

if TYPE_CHECKING:
    from penstock.client.feed import Feed
    from penstock.client.sending import Rejected, Stats
    from penstock.settings import Values

ANSWER_TIMEOUT_S = 60.0
_STOP_WITHIN_S = 2.0
_FILES_MAX = 500


@click.command()
@click.argument("files", nargs=-1, required=True, metavar="FILE…")
@settings("send")
def send(values: Values, files: Sequence[str]) -> None:
    """Send the events of NDJSON files, one JSON object a line; gzip too, `-` for standard input.

    The same command after a crash goes on where it stopped. Exit 1 if an event was rejected; each is named with its line, and kept
    in the spool's dead letters.
    """
    from penstock.client.feed import Feed
    from penstock.client.transport import HttpTransport
    from penstock.clock import SystemClock
    from penstock.files import Files
    from penstock.wire.frame import member
    from penstock.wire.route import is_field

    field, folder = values.text("device-field"), Path(values.text("spool"))
    if not is_field(field):
        raise SettingsError(f"--device-field {field!r} cannot name a field. Nothing was sent.")
    given = _resolved(files)
    to, clock = api(values), SystemClock()
    echo_client_log()
    began = clock.monotonic()
    try:
        feed = Feed(
            folder,
            lambda: HttpTransport(to, timeout_s=ANSWER_TIMEOUT_S),
            lanes=values.count("lanes"),
            device_field=field,
            batch_events=values.count("batch"),
            timeout_s=values.seconds("send-timeout"),
            on_rejected=lambda rejected: _name(rejected, given),
            clock=clock,
            files=Files(),
            reading=given,
            zipped=member,
        )
    except OSError as error:
        raise SpoolError(f"The spool in {folder} cannot be opened: {error}. Nothing was sent.") from error
    if feed.lanes != values.count("lanes"):
        click.echo(f"The spool in {folder} has {feed.lanes} lanes until it is empty.", err=True)
    try:
        _read_all(files, feed)
        feed.finish()
    except BaseException as error:
        feed.close(_STOP_WITHIN_S)
        stats = feed.stats()
        click.echo(
            f"Not all was sent. {stats.accepted:,} events were accepted, {stats.waiting_events:,} wait in the spool in {folder}. "
            "The same command goes on from here.",
            err=True,
        )
        if isinstance(error, OSError):
            raise SpoolError(f"The spool in {folder} cannot be written: {error}.") from error
        raise
    try:
        _report(feed.stats(), feed.skipped, clock.monotonic() - began)
        feed.forget()
    finally:
        # Whatever fails here, "the same command goes on" would not be true: all is sent, and perhaps forgotten.
        feed.close(_STOP_WITHIN_S)
    if feed.stats().rejected:
        raise click.exceptions.Exit(1)


def _resolved(files: Sequence[str]) -> dict[str, str]:
    """The files by their full names. Raises SettingsError."""
    from penstock.client.feed import STDIN

    for file in files:
        if file != STDIN and not Path(file).is_file():
            raise SettingsError(f"There is no file {file}. Nothing was sent.")
    given = {file if file == STDIN else str(Path(file).resolve()): file for file in files}
    if len(given) < len(files):
        raise SettingsError("A file is given twice. Nothing was sent.")
    if len(given) > _FILES_MAX:
        raise SettingsError(
            f"{len(given)} files are given; at most {_FILES_MAX} can be at once, for each batch says how far every one is taken. "
            "Nothing was sent. Send them in groups, or all through `-`."
        )
    return given


def _name(rejected: Rejected, given: Mapping[str, str]) -> None:
    file, _, line = rejected.place.rpartition(":")
    where = f"{given.get(file, file)}:{line}" if file else "in the spool"
    click.echo(f"{where}: rejected: {rejected.code}: {rejected.detail}", err=True)


def _report(stats: Stats, skipped: int, took_s: float) -> None:
    rate = stats.accepted / max(took_s, 1e-3)
    text = f"{rate / 1000:.0f} k/s" if rate >= 10_000 else f"{rate:,.0f}/s"
    events = "event" if stats.accepted == 1 else "events"
    if skipped:
        click.echo(f"{skipped:,} lines had been taken before")
    click.echo(
        f"{stats.accepted:,} {events} accepted in {took_s:.1f} s ({text}), {stats.rejected:,} rejected, "
        f"{stats.duplicates:,} duplicates recognised"
    )


def _read_all(files: Sequence[str], feed: Feed) -> None:
    sources = [feed.source(file) for file in files]
    if not sys.stderr.isatty():
        for file, source in zip(files, sources, strict=True):
            _read(file, source, feed, None)
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    sizes = [0 if file == "-" else Path(file).stat().st_size for file in files]
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeElapsedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as progress:
        task = progress.add_task("sending", total=None if "-" in files else sum(sizes))
        for index, (file, source) in enumerate(zip(files, sources, strict=True)):
            before = sum(sizes[:index])

            def moved(position: int, before: int = before) -> None:
                stats = feed.stats()
                rate = stats.accepted / max(progress.tasks[0].elapsed or 0.0, 0.001)
                text = f"{stats.accepted:,} accepted, {rate:,.0f}/s"
                progress.update(task, completed=before + position, description=text)

            _read(file, source, feed, moved)


def _read(file: str, source: str, feed: Feed, moved: Callable[[int], None] | None) -> None:
    from penstock.client.feed import lines_of
    from penstock.client.records import RAW_BYTES_MAX

    feed.begin(source)
    number = 1
    with _opened(file) as (stream, raw):
        try:
            for number, lines in lines_of(stream):
                if lines is None:
                    feed.reject(number, "event_too_large", f"longer than {RAW_BYTES_MAX} bytes")
                else:
                    feed.add(lines, number)
                if moved:
                    moved(raw.tell())
        except (OSError, EOFError, zlib.error) as error:
            raise PenstockError(f"{file} cannot be read behind line {number}: {error}.") from error
    feed.end()


@contextlib.contextmanager
def _opened(file: str) -> Iterator[tuple[io.BufferedReader | gzip.GzipFile, io.BufferedReader]]:
    """A file unzipped if it is zipped, and as it is."""
    with contextlib.ExitStack() as closing:
        raw = sys.stdin.buffer if file == "-" else closing.enter_context(Path(file).open("rb"))
        assert isinstance(raw, io.BufferedReader), "a binary file that is open for reading is buffered"
        zipped = raw.peek(2)[:2] == b"\x1f\x8b"
        yield closing.enter_context(gzip.GzipFile(fileobj=raw)) if zipped else raw, raw
