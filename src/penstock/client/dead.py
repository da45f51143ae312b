"""Dead letters: events that the API will never take as they are, to be looked at, put right and sent again (docs/dead-letters.md).

    {spool}/dead/{id}.ndjson     a `Dead` for each rejected event of one batch; the id is producer, epoch and number of that batch
    {spool}/dead/{id}.batch      the same on its way back into the spool; it counts only when the .ndjson is gone
    {spool}/dead/{id}.edited     what was written in an editor and could not be taken
    {spool}/dead/lock            held by the process that changes something here

The way back loses no event and sends none twice: at each moment one file counts, and each act is durable before the next.

1. The batch file is written. The dead letters count; a replay that is repeated writes it anew.
2. The dead letters are deleted. The batch file counts, and the next replay goes on with it.
3. The batch file is moved, in one act, into a lane of the spool, and sent from there under its number like every batch.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import re
import secrets
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import msgspec

from penstock.client.client import Client
from penstock.client.lane import DEAD, Lane
from penstock.client.records import Contents, Dead, State, batch_text, read_batch, source_of
from penstock.errors import SettingsError, SpoolDamaged, SpoolError
from penstock.files import Files

FIXED = "fixed"
_REPLAYING = "replaying"
_LOCK = "lock"
_STATE = "state.json"
_BLANK = b" \t\r\n"
_BETWEEN = re.compile(r"[ \t\r\n,:]*")
# Numbers as text: they may be longer than Python takes.
_VALUE = json.JSONDecoder(parse_int=str, parse_float=str).raw_decode


class Letter(msgspec.Struct, frozen=True):
    """The rejected events of one batch. `damaged` says why they cannot be read; then there are none here."""

    id: str
    path: Path
    at_ms: int
    records: tuple[Dead, ...] = ()
    damaged: str = ""

    @property
    def codes(self) -> Counter[str]:
        return Counter(record.code for record in self.records)


class Change(msgspec.Struct, frozen=True):
    """What is done to the outermost fields of an event: first `rename`, then `drop`, then `put`, whose values are JSON."""

    rename: tuple[tuple[str, str], ...] = ()
    drop: frozenset[str] = frozenset()
    put: tuple[tuple[str, str], ...] = ()


class Again(msgspec.Struct, frozen=True):
    """What became of events that were sent again: `rejected` by the dead letters where they are now."""

    events: int
    rejected: dict[str, tuple[Dead, ...]]


class _Field(msgspec.Struct, frozen=True):
    name: str
    key: str
    value: str


def read_lines(path: Path, text: bytes) -> Iterator[Dead]:
    """The records of a file of dead letters. Raises SpoolDamaged at the first that is none."""
    for number, line in enumerate(text.splitlines(), 1):
        try:
            record = msgspec.json.decode(line, type=Dead)
            event = event_of(record)
            if not event.strip(_BLANK) or b"\n" in event:
                raise ValueError("an event is something in one line")
        except (ValueError, msgspec.MsgspecError, RecursionError) as error:
            raise SpoolDamaged(f"{path}, line {number}, is damaged: {error}.") from error
        yield record


def event_of(record: Dead) -> bytes:
    """The event as it was sent."""
    return record.event_base64 or record.event.encode()


def changed(event: bytes, change: Change) -> bytes:
    """The event with its fields changed; the text of the others, and their order, stay. ValueError says what is wrong."""
    fields = _fields(event)
    for old, new in change.rename:
        if any(one.name == old for one in fields):
            if any(one.name == new for one in fields):
                raise ValueError(f"it has both {old} and {new}")
            fields = [
                _Field(new, json.dumps(new, ensure_ascii=False), one.value) if one.name == old else one
                for one in fields
            ]
    fields = [one for one in fields if one.name not in change.drop]
    for name, value in change.put:
        at = next((n for n, one in enumerate(fields) if one.name == name), len(fields))
        kept = [one for one in fields if one.name != name]
        fields = [*kept[:at], _Field(name, json.dumps(name, ensure_ascii=False), value), *kept[at:]]
    return b"{" + ",".join(f"{one.key}:{one.value}" for one in fields).encode() + b"}"


def check(event: bytes, device_field: str) -> None:
    """ValueError unless the event is a JSON object that names its device once. The API looks closer."""
    devices = [one.value for one in _fields(event) if one.name == device_field]
    if len(devices) != 1:
        raise ValueError(f"it has {device_field} {len(devices)} times" if devices else f"it has no {device_field}")
    if not devices[0].startswith('"') or devices[0] == '""':
        raise ValueError(f"its {device_field} is not the name of a device")


def fixed(records: Sequence[Dead], lines: Mapping[int, bytes], device_field: str) -> list[Dead]:
    """The records with new events in their places; an empty line drops its event. SpoolError names all that are still wrong."""
    wrong: list[str] = []
    result: list[Dead] = []
    for place, record in enumerate(records):
        line = lines.get(place, event_of(record))
        if line == event_of(record):
            result.append(record)
        elif line:
            try:
                check(line, device_field)
            except ValueError as error:
                wrong.append(f"event {place + 1}: {error}")
            result.append(_mended(record, line))
    if wrong:
        raise SpoolError(f"Nothing was changed, because an event would still be wrong: {'; '.join(wrong)}.")
    return result


def _mended(record: Dead, line: bytes) -> Dead:
    detail = record.detail if record.code == FIXED else f"was {record.code}: {record.detail}"
    as_sent = Dead.of(line, FIXED, detail)
    return msgspec.structs.replace(
        record, code=FIXED, detail=detail, event=as_sent.event, event_base64=as_sent.event_base64
    )


def _fields(event: bytes) -> list[_Field]:
    """The outermost fields as they are written; a name that is there twice is here twice."""
    try:
        msgspec.json.decode(event, type=dict[str, msgspec.Raw])
        text = event.decode()
        fields, at = [], text.index("{") + 1
        while text[begin := _after(text, at)] != "}":
            name, end = _VALUE(text, begin)
            value_at = _after(text, end)
            at = _VALUE(text, value_at)[1]
            fields.append(_Field(name, text[begin:end], text[value_at:at]))
    except (ValueError, msgspec.MsgspecError, RecursionError) as error:
        raise ValueError(f"it is no JSON object ({error})") from error
    return fields


def _after(text: str, at: int) -> int:
    found = _BETWEEN.match(text, at)
    assert found, "it matches nothing too"
    return found.end()


class Letters:
    """The dead letters of a spool."""

    def __init__(self, spool: Path, files: Files) -> None:
        self._spool = spool
        self._files = files
        self.folder = spool / DEAD

    def all(self) -> list[Letter]:
        """Every batch with dead letters, the oldest first."""
        found = {path.stem: path for suffix in ("batch", "ndjson") for path in self.folder.glob(f"*.{suffix}")}
        letters = [letter for name, path in found.items() if (letter := self._read(name, path))]
        return sorted(letters, key=lambda letter: (letter.at_ms, letter.id))

    def find(self, name: str) -> Letter:
        """By id, or the beginning of one. Raises SettingsError unless that is one; SpoolDamaged."""
        letters = self.all()
        found = [one for one in letters if one.id == name] or [one for one in letters if one.id.startswith(name)]
        if len(found) != 1:
            ids = ", ".join(one.id for one in found or letters) or "none"
            says = f"{name!r} is the beginning of several" if found else f"There are no dead letters {name!r}"
            raise SettingsError(f"{says} in {self.folder}: {ids}. Nothing was touched.")
        if found[0].damaged:
            raise SpoolDamaged(found[0].damaged)
        return found[0]

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Nobody else changes anything here while the block runs. Raises SpoolError if somebody does."""
        held = self._files.hold(self.folder / _LOCK)
        if held is None:
            raise SpoolError(f"Another process changes {self.folder}. Nothing was touched; try again when it is done.")
        try:
            yield
        finally:
            held.release()

    def keep(self, letter: Letter, records: Sequence[Dead]) -> None:
        """Other records in the place of these, durable when it returns; the file is deleted when none is left."""
        self._must_be_settled(letter)
        path = self.folder / f"{letter.id}.ndjson"
        if records:
            self._files.replace(path, b"".join([msgspec.json.encode(record) + b"\n" for record in records]))
        else:
            self._files.remove(self.folder / f"{letter.id}.batch")
            self._files.remove(path)
        self._files.discard(self._aside(letter))

    def put_aside(self, letter: Letter, text: bytes) -> Path:
        """Keep what somebody wrote and cannot be taken. Where it is."""
        path = self._aside(letter)
        self._files.replace(path, text)
        return path

    def to_spool(self, letters: Sequence[Letter], *, device_field: str, now_ms: Callable[[], int]) -> list[Path]:
        """Put the events back into the spool: each is in one of the two whenever it dies. The batches, each in its place."""
        for letter in letters:
            self._must_be_settled(letter)
        # A batch that a power cut brought back would be answered, and buried, once more.
        for path in self._lanes():
            self._files.sync_folder(path)
        with self._free_lane(device_field, now_ms) as (lane, folder):
            return [self._move(letter, folder, lane.mark(), device_field, now_ms()) for letter in letters]

    def _read(self, name: str, path: Path) -> Letter | None:
        try:
            at_ms, text = path.stat().st_mtime_ns // 1_000_000, self._files.read(path)
        except FileNotFoundError:
            return None  # a replay has just taken it
        try:
            read = _from_batch if path.suffix == ".batch" else read_lines
            return Letter(name, path, at_ms, tuple(read(path, text)))
        except SpoolDamaged as error:
            return Letter(name, path, at_ms, damaged=f"{error.detail} It was left as it is: mend it or move it away.")

    def _aside(self, letter: Letter) -> Path:
        return self.folder / f"{letter.id}.edited"

    def _lanes(self) -> list[Path]:
        return [path.parent for path in self._spool.glob(f"[0-9]*/[0-9]*/{_STATE}")]

    def _must_be_settled(self, letter: Letter) -> None:
        """A client that was killed after it had buried the events has the batch still, and would bury them once more."""
        for path in self._lanes():
            with contextlib.suppress(FileNotFoundError, msgspec.MsgspecError):
                state = msgspec.json.decode(self._files.read(path / _STATE), type=State)
                number = f"{state.producer}-{state.epoch}-{state.sequence:012}"
                if number == letter.id and any(path.glob(f"{state.batch}-*.batch")):
                    raise SpoolError(
                        f"The spool is not done with the batch of {letter.id}. Nothing was touched; "
                        "let its client, or `penstock dead replay`, send what waits in the spool first."
                    )

    @contextlib.contextmanager
    def _free_lane(self, device_field: str, now_ms: Callable[[], int]) -> Iterator[tuple[Lane, Path]]:
        """A lane with nothing in it, in a set that nobody uses while the block runs, and its folder."""
        for number in itertools.count():
            folder = self._spool / str(number) / "0"
            self._files.make_folders(folder)
            held = self._files.hold(folder.parent / _LOCK)
            if held is None:
                continue
            try:
                lane = Lane(
                    folder,
                    self._spool,
                    self._files,
                    device_field=device_field,
                    now_ms=now_ms,
                    new_producer=_new_producer,
                )
                if lane.bytes:
                    continue
                # A new producer: a copy of this spool that went on has used the old one's numbers, but never had these events.
                state = State(_new_producer(), batch=lane.state.batch, taken=lane.state.taken)
                self._files.replace(folder / _STATE, msgspec.json.encode(state))
                yield lane, folder
                return
            finally:
                held.release()

    def _move(self, letter: Letter, lane: Path, number: int, device_field: str, now_ms: int) -> Path:
        events = [event_of(record) for record in letter.records]
        batch = self.folder / f"{letter.id}.batch"
        source, numbers = _origin(letter.records)
        contents = Contents(events, source=source, numbers=numbers)
        text = batch_text(contents, sealed_at_ms=now_ms, device_field=device_field)
        self._files.replace(batch, text)
        self._files.remove(self.folder / f"{letter.id}.ndjson")
        path = lane / f"{number:012}-{len(events)}.batch"
        self._files.move(batch, path)
        return path


def replay(
    letters: Letters,
    chosen: Sequence[Letter],
    open_client: Callable[[], Client],
    *,
    device_field: str,
    now_ms: Callable[[], int],
    timeout_s: float,
) -> Again:
    """Send the events again, and wait until the hub has answered for all. Raises FlushTimeout; the events are in the spool then.

    What waits in the spool goes first: while that cannot be sent, the dead letters stay where they are.
    """
    with open_client() as client:
        client.flush(timeout_s)
    before = {letter.id for letter in letters.all()}
    batches = letters.to_spool(chosen, device_field=device_field, now_ms=now_ms)
    with open_client() as client:
        client.flush(timeout_s)
    waiting = [path for path in batches if any(path.parent.glob(f"{path.name[:12]}*.batch"))]
    if waiting:
        raise SpoolError(
            f"Another process of this spool has begun to send {waiting[0]}, and is not done. Nothing is lost."
        )
    sent = {event_of(record) for letter in chosen for record in letter.records}
    rejected: dict[str, tuple[Dead, ...]] = {}
    for letter in letters.all():
        again = tuple(record for record in letter.records if event_of(record) in sent)
        if letter.id not in before and again:
            rejected[letter.id] = again
    return Again(sum(len(letter.records) for letter in chosen), rejected)


def _new_producer() -> str:
    return f"c-{secrets.token_hex(8)}"


def _from_batch(path: Path, text: bytes) -> list[Dead]:
    why = "A replay was interrupted; the next one goes on with it."
    batch = read_batch(path.stem, path, text)
    return [Dead.of(line, _REPLAYING, why, batch.place(index)) for index, line in enumerate(batch.lines())]


def _origin(records: Sequence[Dead]) -> tuple[str, list[int]]:
    """The source and the numbers of the lines that the events were read from, if it was one file: for those rejected again."""
    places = [record.place.rpartition(":") for record in records]
    file = places[0][0]
    if not file or any(place[0] != file or not place[2].isdecimal() for place in places):
        return "", []
    return source_of(file, "replay"), [int(place[2]) for place in places]
