"""The hub's dead letters in the store, and how their events are sent again (docs/dead-letters.md; filter.py writes them).

    _dead/{partition}/{sequence number:020}.json            a letter, as the log says: whoever comes to its place again writes it again
    _dead/{partition}/{sequence number:020}.number.json     create-only: the producer under whose first number its events are sent again
    _dead/{partition}/{sequence number:020}.replayed.json   create-only: they were, and the hub has answered

So whoever sends them again, from any machine and after any crash, does it under the one number that stands, with the bytes that follow
from the letter: of all attempts the archive takes one. A letter itself stays, for the audit; one with the third note waits no more.
"""

from __future__ import annotations

import re
import secrets
from typing import Final, TypeVar

import msgspec

from penstock.archive.filter import Dead, dead_name
from penstock.blobs import BlobStore, Exists
from penstock.clock import Clock, timestamp
from penstock.errors import ArchiveError, BlobNotFound
from penstock.hub.producers import DAY_MS, WINDOW_MS
from penstock.wire.frame import fields_of
from penstock.wire.route import PROPERTIES, RESERVED

Noted = TypeVar("Noted")

_LETTER: Final = re.compile(r"_dead/(\d+)/(\d{20})\.json")
_REPLAYED: Final = re.compile(r"(_dead/\d+/\d{20})\.replayed\.json")


class Number(msgspec.Struct, frozen=True):
    """Under which producer the events of a letter are sent again: epoch 1, sequence 1. `at_ms`: when that was decided.

    `key`: the id of the key that they are sent with, empty without one. With a key of another name it would be another producer.
    """

    producer: str
    at_ms: int
    key: str = ""


class Rejected(msgspec.Struct, frozen=True):
    """An event of a letter that the API did not take: its place from 0, and why."""

    index: int
    code: str
    detail: str


class Replayed(msgspec.Struct, frozen=True):
    """What the hub answered. What is `rejected` is in the letter only."""

    producer: str
    at: str
    accepted: int
    rejected: tuple[Rejected, ...] = ()


class Letter(msgspec.Struct, frozen=True):
    """A letter, and what became of it. `id` is for people: `{partition}-{sequence number}`."""

    id: str
    name: str
    dead: Dead
    replayed: Replayed | None

    @property
    def at(self) -> str:
        """When the API got its events."""
        return _stamp(bytes(self.dead.events[0]))[1] if self.dead.events else ""


def places(store: BlobStore, partition: int) -> list[int]:
    """The sequence numbers at which a listing shows letters, in order."""
    names = (_LETTER.fullmatch(blob.name) for blob in store.list(f"_dead/{partition}/"))
    return sorted(int(match[2]) for match in names if match)


def waiting(store: BlobStore) -> int:
    """How many letters a listing shows that were not sent again."""
    names = [blob.name for blob in store.list("_dead/")]
    done = {f"{match[1]}.json" for match in map(_REPLAYED.fullmatch, names) if match}
    return sum(1 for name in names if _LETTER.fullmatch(name) and name not in done)


def read_dead(store: BlobStore, name: str) -> Dead | None:
    """None if it is not there. Raises ArchiveError."""
    return _read(store, name, Dead)


def every(store: BlobStore) -> list[Letter]:
    """By partition and place. Raises ArchiveError, StoreError."""
    found = sorted(
        (int(match[1]), int(match[2])) for blob in store.list("_dead/") if (match := _LETTER.fullmatch(blob.name))
    )
    letters = (_letter(store, partition, number) for partition, number in found)
    return [letter for letter in letters if letter is not None]


def number(store: BlobStore, letter: Letter, key: str, clock: Clock) -> Number:
    """The number of a letter, decided now if it was not before. Raises ArchiveError where it is too old, or another key's."""
    name = _beside(letter, "number")
    mine = Number(f"dead-{secrets.token_hex(8)}", clock.now_ms(), key)
    answer = store.create(name, msgspec.json.encode(mine), id=mine.producer)
    standing = _decoded(answer.blob.body, name, Number) if isinstance(answer, Exists) else mine
    if standing.key != key:
        raise ArchiveError(
            f"{name}: a replay of {letter.id} was interrupted that sent with {f'the key {standing.key}' if standing.key else 'no key'}. "
            "With another key the hub takes its events for others: replay it as it was begun.",
            file=name,
        )
    if clock.now_ms() - standing.at_ms > WINDOW_MS - DAY_MS:
        raise ArchiveError(
            f"{name} was written on {timestamp(standing.at_ms)}: a replay was interrupted then, and the hub does not know its number any "
            f"more. Look in the archive whether the events of {letter.id} are there. If they are not, delete {name} and replay again.",
            file=name,
        )
    return standing


def settle(store: BlobStore, letter: Letter, replayed: Replayed) -> Replayed:
    """Note that its events were sent again; what stands."""
    name = _beside(letter, "replayed")
    body = msgspec.json.encode(replayed)
    answer = store.create(name, body, id=body.decode())
    return _decoded(answer.blob.body, name, Replayed) if isinstance(answer, Exists) else replayed


def as_sent(letter: Letter) -> bytes:
    """The events without the server's stamp, as the client had them: NDJSON, the same bytes each time."""
    return b"".join([_stamp(bytes(line))[0] + b"\n" for line in letter.dead.events])


def properties(letter: Letter) -> dict[str, str]:
    """What the events were stamped with: the same for all, since they are of one batch."""
    return _stamp(bytes(letter.dead.events[0]))[2] if letter.dead.events else {}


def _letter(store: BlobStore, partition: int, at: int) -> Letter | None:
    name = dead_name(partition, at)
    dead = read_dead(store, name)
    if dead is None:
        return None
    return Letter(f"{partition}-{at}", name, dead, _read(store, name.removesuffix("json") + "replayed.json", Replayed))


def _beside(letter: Letter, what: str) -> str:
    return f"{letter.name.removesuffix('json')}{what}.json"


def _stamp(line: bytes) -> tuple[bytes, str, dict[str, str]]:
    """A line of the log: the event as it came, when, and the properties of its batch. The stamp is its last fields (wire/route.py)."""
    fields = dict(fields_of(line))
    if RESERVED not in fields:
        return line, "", {}
    key = b'"%b":' % RESERVED.encode()
    value_at = fields[RESERVED]
    begin = value_at - len(key)
    stamp = msgspec.json.decode(b"{" + line[begin:], type=dict[str, msgspec.Raw])
    at = msgspec.json.decode(stamp.pop(RESERVED), type=str)
    given = msgspec.json.decode(stamp[PROPERTIES], type=dict[str, str]) if PROPERTIES in stamp else {}
    return line[:begin].removesuffix(b",") + b"}", at, given


def _read(store: BlobStore, name: str, kind: type[Noted]) -> Noted | None:
    try:
        return _decoded(store.get(name).body, name, kind)
    except BlobNotFound:
        return None


def _decoded(body: bytes, name: str, kind: type[Noted]) -> Noted:
    try:
        return msgspec.json.decode(body, type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise ArchiveError(f"{name} cannot be read: {error}", file=name) from error
