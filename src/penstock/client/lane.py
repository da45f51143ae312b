"""A lane of the spool: one producer, its events and batches on disk, and the order of acts that loses and doubles nothing.

The batches are posted in the order of `n`, one at a time, so `state.json` need name only the last batch that got a number: whatever
lies before it is done, and a leftover of it that a power cut brings back is deleted. Each act is durable before the next:

1. an event is a line of the open file (`append`; durable after `sync`);
2. `seal`: the batch file, then the open file is deleted. Of both the batch counts;
3. `number`: the state names the batch and its number, and what of which source it holds. Then it is posted, as often as needed;
4. `done`: the batch file is deleted. If that is lost, the batch is posted again under its number, and recognised.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import os
import re
import threading
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import msgspec

from penstock.client.records import (
    Batch,
    Contents,
    Dead,
    State,
    Zip,
    batch_text,
    gzipped,
    open_lines,
    read_batch,
    read_header,
    read_open,
)
from penstock.errors import SpoolDamaged
from penstock.files import Appending, Files

DEAD, QUARANTINE = "dead", "quarantine"
COMPLETE = -1
_STATE = "state.json"
_NAME = re.compile(r"(\d{12}[ab]*)(?:\.open|-(\d+)\.batch)")


class Numbered(msgspec.Struct, frozen=True):
    """The identity of a batch. `anew`: the batch or its producer is of this process's life, so no other copy of the spool knows it."""

    producer: str
    epoch: int
    sequence: int
    after: int
    anew: bool


class _Ended(msgspec.Struct, frozen=True, gc=False):
    """An open file that nothing is added to any more."""

    stem: str
    path: Path
    events: int
    bytes: int


def _stem(name: str) -> str:
    return name.partition(".")[0].partition("-")[0]


def _events(name: str) -> int:
    """Of a batch file."""
    return int(name[name.index("-") + 1 : name.index(".")])


def is_done(stem: str, numbered: str) -> bool:
    """Whether a batch lies before the one that was numbered last: then the hub has answered for it."""
    return stem < numbered


class Lane:
    """One lane's folder. `append`, `rotate` are for one thread, `seal` for another, the rest for a third; `waiting` is for all."""

    def __init__(
        self,
        folder: Path,
        spool: Path,
        files: Files,
        *,
        device_field: str,
        now_ms: Callable[[], int],
        new_producer: Callable[[], str],
    ) -> None:
        self._folder = folder
        self._spool = spool
        self._files = files
        self._device_field = device_field
        self._now_ms = now_ms
        self._new_producer = new_producer
        self._lock = threading.RLock()
        self._open: Appending | None = None
        self._open_path: Path = folder
        self._open_events = 0
        self._open_bytes = 0
        self.events = 0
        self.bytes = 0
        self._rotated: deque[_Ended] = deque()
        # Names of files and nothing else: there may be hundreds of thousands.
        self._sealed: deque[str] = deque()
        self._taken: dict[str, int] = {}
        self.quarantined = 0
        files.make_folders(folder)
        files.sweep(folder)
        self.state = self._load_state()
        self._sealing = threading.Lock()
        self._known = self._recover()
        self._numbers = itertools.count(self._known + 1)

    @property
    def unsealed(self) -> int:
        """Open files that were ended and wait for `seal`."""
        return len(self._rotated)

    @property
    def sealed(self) -> int:
        """Batches that wait, the one that is posted among them."""
        return len(self._sealed)

    @property
    def open_events(self) -> int:
        return self._open_events

    @property
    def open_bytes(self) -> int:
        return self._open_bytes

    @property
    def taken(self) -> Mapping[str, int]:
        """Of each source that is being read, the last line that is in this lane's batches, or COMPLETE."""
        with self._lock:
            return dict(self._taken)

    def append(self, lines: Sequence[bytes]) -> None:
        """Take events. They outlive this process when it returns, and a power cut after `sync`."""
        if self._open is None:
            self._open_path = self._folder / f"{next(self._numbers):012}.open"
            self._open = self._files.append(self._open_path)
        text = open_lines(lines)
        self._open.write(text)
        self._open_events += len(lines)
        self._open_bytes += len(text)
        self._count(len(lines), len(text))

    def sync(self) -> None:
        """All that was appended is durable when it returns."""
        file = self._open
        if file is not None:
            file.sync()

    def rotate(self) -> None:
        """End the open file: what follows is another batch's. It is ended too when its sync fails: `seal` writes its events anew."""
        if self._open is None:
            return
        try:
            self._open.sync()
        finally:
            self._end_open(self._open)

    def _end_open(self, open_file: Appending) -> None:
        open_file.close()
        file = _Ended(self._open_path.stem, self._open_path, self._open_events, self._open_bytes)
        with self._lock:
            self._rotated.append(file)
            self._open, self._open_events, self._open_bytes = None, 0, 0

    def seal(self) -> bool:
        """Make a batch of the oldest ended open file; False if there is none."""
        with self._sealing:
            if not self._rotated:
                return False
            file = self._rotated[0]
            lines, damaged = read_open(self._files.read(file.path))
            for line in damaged:
                self._quarantine_bytes(f"{file.stem}.line", line)
            stem = file.stem
            late = self._is_late(stem)
            if late:
                stem = f"{next(self._numbers):012}"
            made, size = self._write(stem, Contents(lines, self._taken)) if lines else ("", 0)
            if late:
                # Its number does not tell any more that it was sealed, so it must not come back.
                self._files.remove(file.path)
            else:
                self._files.discard(file.path)
            with self._lock:
                self._rotated.popleft()
                if made:
                    self._sealed.append(made)
            self._count(len(lines) - file.events, size - file.bytes)
            return True

    def _is_late(self, stem: str) -> bool:
        """Whether a later batch stands in line already: so it is when the batch that was made of the file is in quarantine."""
        with self._lock:
            return bool(self._sealed and stem < _stem(self._sealed[-1])) or stem <= self.state.batch[:12]

    def put(self, lines: Sequence[bytes], source: str, numbers: Sequence[int], zipped: Zip = gzipped) -> None:
        """Seal lines of a source that outlives this process itself; `numbers` are theirs in it, in ascending order."""
        with self._sealing:
            with self._lock:
                self._taken = {**self._taken, source: numbers[-1]}
            made, size = self._write(
                f"{next(self._numbers):012}", Contents(lines, self._taken, source, numbers, zipped)
            )
            with self._lock:
                self._sealed.append(made)
            self._count(len(lines), size)

    def complete(self, sources: Iterable[str]) -> None:
        """Say durably, in one act, that nothing of these sources is missing any more."""
        with self._lock:
            self._taken |= dict.fromkeys(sources, COMPLETE)
        self._save(msgspec.structs.replace(self.state, taken=dict(self._taken)))

    def forget(self, sources: Iterable[str]) -> None:
        """When the sources are given again, they are read again."""
        with self._lock:
            if not [source for source in sources if self._taken.pop(source, None) is not None]:
                return
        self._save(msgspec.structs.replace(self.state, taken=dict(self._taken)))

    def head(self) -> Batch | None:
        """The batch to be posted. One that is damaged goes to quarantine, and the next one's turn comes."""
        while self._sealed:
            path = self._folder / self._sealed[0]
            text = self._files.read(path)
            try:
                return read_batch(_stem(path.name), path, text)
            except SpoolDamaged:
                self._quarantine(path)
                self._drop_head(len(text))
        return None

    def number(self, batch: Batch) -> Numbered:
        """The batch's number, durable when it returns; the same each time."""
        state = self.state
        if state.batch != batch.stem:
            taken = {
                **state.taken,
                **{source: line for source, line in batch.header.taken.items() if source in self._taken},
            }
            state = msgspec.structs.replace(state, sequence=state.sequence + 1, batch=batch.stem, taken=taken)
            self._save(state)
        return Numbered(state.producer, state.epoch, state.sequence, state.after, int(batch.stem[:12]) > self._known)

    def renumber(self, batch: Batch) -> None:
        """A new producer, with its first number for this batch: the hub knows the old one's numbers as another's."""
        self._known = -1
        self._save(State(self._new_producer(), sequence=1, batch=batch.stem, taken=self.state.taken))

    def done(self, batch: Batch, *, stored: bool) -> None:
        """The hub has answered for every event of the batch; `stored`, it now knows the batch's number."""
        if stored:
            # Durable with the next number. If that is lost, the missing file tells the same.
            self.state = msgspec.structs.replace(self.state, after=self.state.sequence)
        self._drop_head(batch.size)
        self._files.discard(batch.path)

    def split(self, batch: Batch) -> None:
        """Two batches in the place of one, to be posted under numbers of their own."""
        header = batch.header
        whole = Contents(batch.lines(), header.taken, header.source, header.numbers)
        halves = [self._write(batch.stem + half, part) for half, part in zip("ab", whole.halves(), strict=True)]
        self._files.discard(batch.path)
        with self._lock:  # so that `reached` sees the batch or its halves
            self._drop_head(batch.size)
            self._sealed.extendleft(name for name, _ in reversed(halves))
            self._count(header.events, sum(size for _, size in halves))

    def bury(self, numbered: Numbered, records: Sequence[Dead]) -> None:
        """Keep what the API will never take. Burying it again, after a crash, leaves the same."""
        folder = self._spool / DEAD
        self._files.make_folders(folder)
        text = b"".join([msgspec.json.encode(record) + b"\n" for record in records])
        self._files.replace(folder / f"{numbered.producer}-{numbered.epoch}-{numbered.sequence:012}.ndjson", text)

    def mark(self) -> int:
        """All that was taken until now lies before it (after `rotate`)."""
        return next(self._numbers)

    def reached(self, mark: int) -> bool:
        """Whether all before a mark is done."""
        with self._lock:
            waiting = [file.stem for file in self._rotated]
            if self._sealed:
                waiting.append(self._sealed[0])
        return all(int(stem[:12]) >= mark for stem in waiting)

    def close(self) -> None:
        """What was appended is durable."""
        if self._open is not None:
            self._open.sync()
            self._open.close()
            self._open = None

    def abandon(self) -> None:
        """In a child after a fork: let go of the open file."""
        if self._open is not None:
            self._open.abandon()
            self._open = None

    def _recover(self) -> int:
        """Sort what lies in the folder, and delete what is done or half-made; the last `n`."""
        last = int(self.state.batch[:12] or 0)
        self._taken = dict(self.state.taken)
        names = sorted(entry.name for entry in os.scandir(self._folder) if _NAME.fullmatch(entry.name))
        for number, group in itertools.groupby(names, key=lambda name: name[:12]):
            last = max(last, int(number))
            together = list(group)
            stems = {stem for name in together if name.endswith(".batch") and (stem := _stem(name)) >= self.state.batch}
            for name in together:
                stem, path = _stem(name), self._folder / name
                is_half = any(stem[:cut] in stems for cut in range(12, len(stem)))
                if name.endswith(".open"):
                    # Sealed already, or even done: only its deletion was lost.
                    if stem in stems or stem <= self.state.batch[:12]:
                        self._files.discard(path)
                    else:
                        text = self._files.read(path)
                        self._rotated.append(_Ended(stem, path, len(read_open(text)[0]), len(text)))
                        self._count(self._rotated[-1].events, len(text))
                elif is_done(stem, self.state.batch) or is_half:
                    self._files.discard(path)
                else:
                    self._sealed.append(name)
                    self._count(_events(name), path.stat().st_size)
        # Neither it nor its halves: then the hub has it.
        if self.state.batch and not (self._sealed and self._sealed[0].startswith(self.state.batch)):
            self.state = msgspec.structs.replace(self.state, after=self.state.sequence)
        for name in reversed(self._sealed):
            # A batch says of all sources how far they are taken, so the last one that can be read says it all.
            with contextlib.suppress(SpoolDamaged):
                self._taken |= read_header(self._files.read(self._folder / name)).taken
                break
        return last

    def _write(self, stem: str, given: Contents) -> tuple[str, int]:
        """The name of the batch file and its size. It is counted when the act is done that it is a part of, for that may be repeated."""
        name = f"{stem}-{len(given.lines)}.batch"
        text = batch_text(given, sealed_at_ms=self._now_ms(), device_field=self._device_field)
        self._files.replace(self._folder / name, text)
        return name, len(text)

    def _load_state(self) -> State:
        path = self._folder / _STATE
        try:
            return msgspec.json.decode(self._files.read(path), type=State)
        except FileNotFoundError:
            state = State(self._new_producer())
        except msgspec.MsgspecError:
            # Whatever had a number gets one of a new producer. What of it was stored and not answered is then stored twice.
            self._quarantine(path)
            state = State(self._new_producer())
        self._save(state)
        return state

    def _save(self, state: State) -> None:
        self._files.replace(self._folder / _STATE, msgspec.json.encode(state))
        self.state = state

    def _drop_head(self, size: int) -> None:
        with self._lock:
            name = self._sealed.popleft()
        self._count(-_events(name), -size)

    def _count(self, events: int, size: int) -> None:
        with self._lock:
            self.events += events
            self.bytes += size

    def _quarantine(self, path: Path) -> None:
        self._quarantine_bytes(path.name, self._files.read(path))
        self._files.discard(path)

    def _quarantine_bytes(self, name: str, body: bytes) -> None:
        folder = self._spool / QUARANTINE
        self._files.make_folders(folder)
        digest = hashlib.sha256(body).hexdigest()[:16]
        self._files.replace(folder / f"{self._folder.parent.name}-{self._folder.name}-{digest}-{name}", body)
        self.quarantined += 1
