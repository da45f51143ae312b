"""`penstock dead`: look at the events that the API rejected, put them right and send them again (docs/dead-letters.md).

With `--store` it is about the hub's own dead letters (dead_hub.py).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import msgspec

from penstock.cli import dead_hub
from penstock.cli.options import as_json, beats, console, echo_client_log, events_text, settings, shown
from penstock.cli.reach import api
from penstock.errors import PenstockError, SettingsError

if TYPE_CHECKING:
    from penstock.client.client import Client
    from penstock.client.dead import Change, Letter, Letters
    from penstock.client.records import Dead
    from penstock.settings import Values


@click.group()
def dead() -> None:
    """Events that the API rejected: kept in the client's spool, to be looked at, put right and sent again.

    With --store those that a hub in a Kafka topic left open: kept in its store.
    """


@dead.command("list")
@as_json
@settings("dead")
def list_(values: Values, as_json: bool) -> None:
    """One line for each batch with rejected events. `show`, `fix` and `replay` take its id, or the beginning of it."""
    from penstock.clock import timestamp

    if _of_hub(values):
        dead_hub.list_letters(values, as_json)
        return
    with _letters(values) as letters:
        found = letters.all()
    if as_json:
        click.echo(msgspec.json.encode([_summary(letter) for letter in found]))
        return
    if not found:
        click.echo(f"No rejected events in {letters.folder}.")
        return
    from rich.markup import escape
    from rich.table import Table

    table = Table("id", "when", "events", "codes", "first")
    for letter in found:
        codes = ", ".join(f"{code} {count:,}" for code, count in letter.codes.most_common())
        first = letter.damaged or letter.records[0].detail
        cells = letter.id, timestamp(letter.at_ms), f"{len(letter.records):,}", codes, first
        table.add_row(*(escape(shown(cell)) for cell in cells))
    console().print(table)


@dead.command()
@click.argument("id")
@click.option("--event", type=click.IntRange(1), metavar="N", help="Only this event, from 1.")
@click.option("--code", help="Only events that were rejected with this code.")
@click.option("--raw", is_flag=True, help="Only the events, as they were sent, one a line: for `fix --file`.")
@as_json
@settings("dead")
def show(values: Values, id: str, event: int | None, code: str | None, raw: bool, as_json: bool) -> None:
    """The rejected events of a batch, and why."""
    from penstock.client.dead import event_of

    if _of_hub(values):
        if code:
            raise SettingsError("The events of a hub's dead letter have no codes: leave out --code.")
        dead_hub.show_letter(values, id, event, raw, as_json)
        return
    with _letters(values) as letters:
        letter = letters.find(id)
    if event and event > len(letter.records):
        raise SettingsError(f"{letter.id} has {len(letter.records)} events, so there is no event {event}.")
    chosen = {place: letter.records[place] for place in _places(letter, code) if event in (None, place + 1)}
    if raw:
        for record in chosen.values():
            click.echo(event_of(record))
    elif as_json:
        click.echo(msgspec.json.encode([_row(place, record) for place, record in chosen.items()]))
    else:
        click.echo(f"{letter.id}: {events_text(len(letter.records))}")
        for place, record in chosen.items():
            where = f" ({record.place})" if record.place else ""
            click.echo(shown(f"{place + 1}. {record.code}: {record.detail}{where}"))
            click.echo("   " + shown(event_of(record).decode("utf-8", "backslashreplace")))


@dead.command()
@click.argument("id")
@click.option("--set", "put", multiple=True, metavar="FIELD=JSON", help="Give the field this value.")
@click.option("--rename", multiple=True, metavar="OLD=NEW", help="Give the field another name.")
@click.option("--drop", multiple=True, metavar="FIELD", help="Take the field out.")
@click.option("--edit", is_flag=True, help="Open the events in $EDITOR, one a line.")
@click.option("--file", type=click.File("rb"), help="Take the events from this file, one a line; - for standard input.")
@click.option("--code", help="Only events that were rejected with this code.")
@click.option("--dry-run", is_flag=True, help="Print the events as they would be, and change nothing.")
@settings("dead-fix")
def fix(values: Values, id: str, edit: bool, file: Any, code: str | None, dry_run: bool, **fields: Any) -> None:
    """Put the events of a batch right, in the place where they lie; `replay` then sends them.

    --rename, --drop and --set go over the outermost fields, in this order; the other fields keep their text. With --edit or --file
    line N is event N, and an empty line drops its event. All of the events are changed or none.
    """
    from penstock.client.dead import event_of, fixed

    if _of_hub(values):
        raise SettingsError(
            "There is nothing to put right in a hub's dead letters: the API took their events once. `penstock dead show --raw` prints "
            "them, for `penstock send`."
        )
    change = _change(**fields)
    if [change is not None, edit, file is not None].count(True) != 1:
        raise SettingsError(
            "Say how: with --set, --rename and --drop, or with --edit, or with --file. Nothing was changed."
        )
    with _letters(values) as letters, letters.held() if not dry_run else contextlib.nullcontext():
        letter = letters.find(id)
        places = _places(letter, code)
        text = file.read() if file else _edited(letter, places) if edit else b""
        try:
            lines = _changed(letter, places, change) if change else _given(letter, places, text)
            records = fixed(letter.records, lines, values.text("device-field"))
        except PenstockError as error:
            if edit:
                aside = letters.put_aside(letter, text)
                raise PenstockError(f"{error.detail} What you wrote is in {aside}, to be given with --file.") from error
            raise
        if dry_run:
            for record in records:
                click.echo(event_of(record))
            return
        if list(letter.records) != records:
            letters.keep(letter, records)
    changed = sum(line not in (b"", event_of(letter.records[place])) for place, line in lines.items())
    dropped = len(letter.records) - len(records)
    click.echo(f"{letter.id}: {events_text(changed)} changed, {dropped} dropped, {len(records) - changed} as before.")
    if changed:
        click.echo(f"Send them with: penstock dead replay {letter.id}")


@dead.command()
@click.argument("ids", nargs=-1, metavar="[ID]…")
@click.option("--all", "every", is_flag=True, help="All that there are.")
@settings("dead-replay")
def replay(values: Values, ids: Sequence[str], every: bool) -> None:
    """Send the events of batches again, through the spool. Exit 1 if any is rejected again.

    What waits in the spool is sent first. Whenever this is interrupted, repeat it: no event is lost, and none is sent twice.
    """
    from penstock.client.client import Client
    from penstock.client.dead import replay as send_again
    from penstock.clock import SystemClock

    echo_client_log()
    if bool(ids) == every:
        raise SettingsError("Name the batches that are to be sent again, or say --all. Nothing was sent.")
    if _of_hub(values):
        dead_hub.replay_letters(values, ids, every)
        return
    to, device_field, timeout_s = api(values), values.text("device-field"), values.seconds("dead-timeout")
    spool = Path(values.text("spool"))

    def open_client() -> Client:
        return Client(to, spool=spool, device_field=device_field)

    with _letters(values) as letters, letters.held():
        chosen = letters.all() if every else list({one.id: one for one in map(letters.find, ids)}.values())
        for letter in chosen:
            if letter.damaged:
                raise PenstockError(f"Nothing was sent. {letter.damaged}")
        again = send_again(
            letters, chosen, open_client, device_field=device_field, now_ms=SystemClock().now_ms, timeout_s=timeout_s
        )
    rejected = sum(map(len, again.rejected.values()))
    click.echo(f"{events_text(again.events)} sent again: {again.events - rejected:,} accepted, {rejected:,} rejected.")
    for name, records in again.rejected.items():
        click.echo(
            shown(f"{name}: {events_text(len(records))}, first {records[0].code}: {records[0].detail}"), err=True
        )
    if rejected:
        raise click.exceptions.Exit(1)


def _of_hub(values: Values) -> bool:
    """Whether the store was named, and the spool not as plainly."""
    return beats(values, "store") and not beats(values, "spool", "store")


@contextlib.contextmanager
def _letters(values: Values) -> Iterator[Letters]:
    from penstock.client.dead import Letters
    from penstock.files import Files

    spool = Path(values.text("spool"))
    if not spool.is_dir():
        raise SettingsError(f"There is no spool folder {spool}; --spool names another.")
    try:
        yield Letters(spool, Files())
    except BrokenPipeError:
        raise
    except OSError as error:
        raise PenstockError(f"{spool} cannot be used: {error}. No event is lost; repeat the command.") from error


def _places(letter: Letter, code: str | None) -> list[int]:
    """Where the chosen events stand in the letter."""
    places = [place for place, record in enumerate(letter.records) if code in (None, record.code)]
    if not places:
        there = ", ".join(letter.codes)
        raise SettingsError(f"{letter.id} has no event with the code {code}; there are {there}. Nothing was touched.")
    return places


def _change(put: Sequence[str], rename: Sequence[str], drop: Sequence[str]) -> Change | None:
    from penstock.client.dead import Change

    values = [_pair("--set", text) for text in put]
    for name, value in values:
        try:
            msgspec.json.decode(value)
        except (msgspec.MsgspecError, UnicodeEncodeError) as error:
            raise SettingsError(
                f"--set {name}={value}: {value} is not JSON ({error}); a text stands in quotes: --set '{name}=\"…\"'."
            ) from error
    if not (put or rename or drop):
        return None
    one_line = tuple((name, " ".join(value.splitlines())) for name, value in values)
    return Change(tuple(_pair("--rename", text) for text in rename), frozenset(drop), one_line)


def _pair(option: str, text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not (name and equals and value):
        raise SettingsError(f"{option} {text}: it takes two parts with = between them. Nothing was changed.")
    return name, value


def _changed(letter: Letter, places: Sequence[int], change: Change) -> dict[int, bytes]:
    from penstock.client.dead import changed, event_of

    lines: dict[int, bytes] = {}
    for place in places:
        record = letter.records[place]
        try:
            lines[place] = changed(event_of(record), change)
        except ValueError as error:
            raise PenstockError(
                f"Nothing was changed: event {place + 1} ({record.code}) cannot be, because {error}. --code chooses others; "
                "--edit and --file take any text."
            ) from error
    return lines


def _edited(letter: Letter, places: Sequence[int]) -> bytes:
    from penstock.client.dead import event_of

    text = b"".join([event_of(letter.records[place]) + b"\n" for place in places])
    edited = click.edit(text, extension=".ndjson")
    assert not isinstance(edited, str), "bytes for bytes"
    return text if edited is None else bytes(edited)


def _given(letter: Letter, places: Sequence[int], text: bytes) -> dict[int, bytes]:
    """The given lines, by the place of their events."""
    lines = [line.strip(b" \t\r") for line in text.removesuffix(b"\n").split(b"\n")]
    if len(lines) != len(places):
        raise SettingsError(
            f"There are {len(places)} events to be put right in {letter.id}, and {len(lines)} lines. Nothing was changed; "
            "a line stands for an event, and an empty one drops it."
        )
    return dict(zip(places, lines, strict=True))


def _summary(letter: Letter) -> Mapping[str, object]:
    from penstock.clock import timestamp

    return {
        "id": letter.id,
        "at": timestamp(letter.at_ms),
        "events": len(letter.records),
        "codes": letter.codes,
        "detail": letter.records[0].detail if letter.records else "",
        "path": str(letter.path),
        "damaged": letter.damaged,
    }


def _row(place: int, record: Dead) -> Mapping[str, object]:
    return {"n": place + 1, **msgspec.to_builtins(record)}
