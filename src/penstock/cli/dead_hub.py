"""`penstock dead` on the hub's own dead letters, which lie in a store (docs/dead-letters.md)."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import click
import msgspec

from penstock.cli.options import console, events_text, shown
from penstock.cli.reach import api, fetch
from penstock.errors import HubUnavailable, PenstockError, SettingsError

if TYPE_CHECKING:
    from penstock.access import Access
    from penstock.archive.letters import Letter, Replayed
    from penstock.blobs import BlobStore
    from penstock.settings import Values

_TIMEOUT_S = 30.0


class _Hub(msgspec.Struct):
    hub: str


def list_letters(values: Values, as_json: bool) -> None:
    """A line for each."""
    letters = _every(_store(values))
    if as_json:
        click.echo(msgspec.json.encode([_summary(letter) for letter in letters]))
        return
    if not letters:
        click.echo(f"No dead letters of the hub in {_store_name(values)}.")
        return
    from rich.markup import escape
    from rich.table import Table

    table = Table("id", "received", "events", "reason", "producer", "epoch", "sequence", "replayed")
    for letter in letters:
        dead = letter.dead
        done = f"{letter.replayed.at}, {len(letter.replayed.rejected)} rejected" if letter.replayed else ""
        count = f"{len(dead.events):,}"
        table.add_row(
            letter.id, letter.at, count, dead.reason, escape(dead.producer), str(dead.epoch), str(dead.sequence), done
        )
    console().print(table)


def show_letter(values: Values, id: str, event: int | None, raw: bool, as_json: bool) -> None:
    """Its events, and why they are dead. `raw`: as the client sent them."""
    from penstock.archive.letters import as_sent

    letter = _find(_every(_store(values)), id)
    events = as_sent(letter).splitlines() if raw else [bytes(line) for line in letter.dead.events]
    if event and event > len(events):
        raise SettingsError(f"{letter.id} has {len(events)} events, so there is no event {event}.")
    chosen = {place: line for place, line in enumerate(events, 1) if event in (None, place)}
    rejected = {one.index + 1: one for one in letter.replayed.rejected} if letter.replayed else {}
    if raw:
        for line in chosen.values():
            click.echo(line)
    elif as_json:
        rows = [{"n": n, "event": msgspec.Raw(line), "rejected": rejected.get(n)} for n, line in chosen.items()]
        click.echo(msgspec.json.encode({**_summary(letter), "rows": rows}))
    else:
        dead = letter.dead
        click.echo(
            f"{letter.id}: {events_text(len(events))} of producer {dead.producer}, epoch {dead.epoch}, sequence {dead.sequence}"
        )
        click.echo(f"{dead.reason}: {_REASONS[dead.reason]}")
        for n, line in chosen.items():
            why = f" ({rejected[n].code}: {rejected[n].detail})" if n in rejected else ""
            click.echo(shown(f"{n}. {line.decode('utf-8', 'backslashreplace')}{why}"))


def replay_letters(values: Values, ids: Sequence[str], every: bool) -> None:
    """Send the events again, those of each letter once, whatever is interrupted."""
    store, to = _store(values), api(values)
    letters = _every(store)
    chosen = letters if every else list({one.id: one for one in (_find(letters, id) for id in ids)}.values())
    waiting = [letter for letter in chosen if letter.replayed is None]
    if waiting:
        _same_hub(to, waiting[0], _store_name(values))
    rejected = 0
    for letter in waiting:
        answered = _replay(store, to, letter)
        rejected += len(answered.rejected)
        click.echo(f"{letter.id}: {events_text(answered.accepted)} accepted, {len(answered.rejected):,} rejected.")
        for one in answered.rejected:
            click.echo(f"{letter.id}, event {one.index + 1}: {one.code}: {one.detail}", err=True)
    if len(chosen) > len(waiting):
        click.echo(f"{len(chosen) - len(waiting):,} dead letters were sent again before.")
    if rejected:
        raise click.exceptions.Exit(1)


def _replay(store: BlobStore, to: Access, letter: Letter) -> Replayed:
    """Number, post, note: each is durable before the next, and the first and the last are decided once for all who try."""
    from penstock.archive.letters import Rejected, Replayed, as_sent, number, properties, settle
    from penstock.client.answers import Again, Paused, Settled, reaction
    from penstock.client.transport import HttpTransport
    from penstock.clock import SystemClock, timestamp

    clock = SystemClock()
    under = number(store, letter, _key(to), clock)
    body = as_sent(letter)
    sha256 = hashlib.sha256(body).hexdigest()
    headers = {
        "Content-Type": "application/x-ndjson",
        "Penstock-Device-Field": letter.dead.device_field,
        "Penstock-Producer": f"{under.producer};epoch=1;sequence=1;sha256={sha256}",
    }
    # As UTF-8 on the wire: http.client writes Latin-1.
    headers |= {
        f"Penstock-Property-{name}": value.encode().decode("latin-1") for name, value in properties(letter).items()
    }
    transport = HttpTransport(to, timeout_s=_TIMEOUT_S)
    try:
        answer = transport.post(body, headers)
    except HubUnavailable as error:
        raise _not_yet(letter, error.detail) from error
    finally:
        transport.close()
    batch, events = f"{under.producer}:1:1", len(letter.dead.events)
    answered = reaction(answer, batch=batch, events=events, now_ms=clock.now_ms())
    if not isinstance(answered, Settled):
        raise _not_yet(
            letter, answered.why if isinstance(answered, Again | Paused) else f"{answered.code}: {answered.detail}"
        )
    rejected = tuple(Rejected(one.index, one.code, one.detail) for one in answered.rejected)
    result = Replayed(under.producer, timestamp(clock.now_ms()), answered.accepted, rejected)
    # What was rejected as a whole may be taken another time, under the same number: nothing of it was stored.
    return settle(store, letter, result) if answered.stored else result


def _key(to: Access) -> str:
    """The id of the key that opens the API, or the name that signs for it."""
    kind, _, text = to.headers().get("Authorization", "").partition(" ")
    if kind == "Bearer":
        return text.partition(".")[0]
    return next((field[4:] for field in text.split("&") if field.startswith("skn=")), "")


def _not_yet(letter: Letter, why: str) -> PenstockError:
    return PenstockError(
        f"{letter.id} may or may not be sent: {why.rstrip('.')}. Replay it again; it goes under the same number and is archived once."
    )


def _same_hub(to: Access, letter: Letter, store_name: str) -> None:
    found = msgspec.json.decode(fetch(to, "/v1/partitions"), type=_Hub).hub
    if found != letter.dead.hub:
        raise SettingsError(
            f"{to.where} is an API of hub {found}, and the dead letters in {store_name} are of {letter.dead.hub}. Nothing was sent."
        )


def _store(values: Values) -> BlobStore:
    from penstock.cli import wiring

    where = wiring.layout(values)
    store = wiring.open_store(where)
    wiring.owner_of(where, store)
    return store


def _store_name(values: Values) -> str:
    from penstock.cli import wiring

    return wiring.layout(values).store_name


def _every(store: BlobStore) -> list[Letter]:
    from penstock.archive.letters import every

    return every(store)


def _find(letters: Sequence[Letter], id: str) -> Letter:
    """By id, or the beginning of one."""
    found = [one for one in letters if one.id == id] or [one for one in letters if one.id.startswith(id)]
    if len(found) != 1:
        ids = ", ".join(one.id for one in found or letters) or "none"
        says = f"{id!r} is the beginning of several dead letters" if found else f"There is no dead letter {id!r}"
        raise SettingsError(f"{says}: {ids}. Nothing was sent.")
    return found[0]


def _summary(letter: Letter) -> Mapping[str, object]:
    dead = letter.dead
    return {
        "id": letter.id,
        "at": letter.at,
        "events": len(dead.events),
        "reason": dead.reason,
        "producer": dead.producer,
        "epoch": dead.epoch,
        "sequence": dead.sequence,
        "path": letter.name,
        "replayed": letter.replayed,
    }


_REASONS = {
    "number_reused": "other bytes came before under this number, so these are not stored.",
    "number_too_old": "the number is lower than the producer's last and too old to be known, so these may be stored already.",
    "producer_fenced": "the producer had moved on to a newer epoch, so these may be stored already.",
}
