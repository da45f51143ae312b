"""What the archive takes of a log that has batches twice: each event once, exactly (hub/duplicates.py judges).

For a hub that keeps no producers. What is known of them at a place in the log is a function of the log before it, so it is kept where
files end, `_producers/{partition}/{next:020}`: written when the file is in the store and before the checkpoint moves there, so whoever
begins at a checkpoint finds it. It is put and not created, since whoever writes it writes the same. When it is missing all the same, the
log is read again from the last place where there is one, or from its beginning; what the brokers had deleted by then is not known any more.
Some older ones are kept for as long as the log reaches back to them: whoever judges the log again (judged.py) begins at the oldest.

Nothing that is left out or dead changes what is known. So it does not matter that a file ends behind the last frame that was taken, and
that what comes behind that is judged again by whoever begins there. Dead letters are named after their place: whoever comes to one again
writes the same again.
"""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Iterator, Sequence
from typing import Final

import msgspec

from penstock.archive.cut import period_start_ms
from penstock.blobs import BlobStore
from penstock.errors import ArchiveError, BlobNotFound, FrameDamaged, OffsetTrimmed
from penstock.events import DEVICE_FIELD, Frame, FrameKind, Source
from penstock.hub import Hub
from penstock.hub.duplicates import Known, Reason, Share, Verdict, identity, judge, shares_of
from penstock.hub.producers import WINDOW_MS
from penstock.processor.pump import Log
from penstock.wire.frame import PLAIN_BYTES_MAX, content, crc32, member

READ_BYTES_MAX: Final = 4 << 20
LOOK_BACK_MS: Final = 3_600_000
FORMAT: Final = 1
STATES_KEPT: Final = 8
"""Beside those where the last file begins and ends."""
_NAME: Final = re.compile(r"_producers/\d+/(\d{20})")


class State(msgspec.Struct, frozen=True):
    """What is known of a partition's producers by its events below `next`: what lies in the store, as MessagePack."""

    format: int
    hub: str
    partition: int
    next: int
    producers: dict[str, Known]
    """By identity (hub/duplicates.py)."""


class Dead(msgspec.Struct, frozen=True, omit_defaults=True):
    """A dead letter: events that came under a producer number which leaves open whether they were stored before. In JSON.

    `owner`: the name of the key that they came with, if with any.
    """

    hub: str
    partition: int
    sequence_number: int
    reason: Reason
    producer: str
    epoch: int
    sequence: int
    sha256: str
    events: list[msgspec.Raw]
    owner: str = ""
    device_field: str = DEVICE_FIELD


def state_name(partition: int, at: int) -> str:
    return f"_producers/{partition}/{at:020}"


def dead_name(partition: int, sequence_number: int) -> str:
    return f"_dead/{partition}/{sequence_number:020}.json"


def states(store: BlobStore, partition: int) -> list[int]:
    """Where a listing shows that what is known is kept, in order."""
    names = (_NAME.fullmatch(blob.name) for blob in store.list(f"_producers/{partition}/"))
    return sorted(int(match[1]) for match in names if match)


def read_state(store: BlobStore, hub_id: str, partition: int, at: int) -> State | None:
    """What is kept there; None if nothing is. Raises ArchiveError."""
    if at == 0:
        return None
    name = state_name(partition, at)
    try:
        packed = store.get(name).body
    except BlobNotFound:
        return None
    try:
        state = msgspec.msgpack.decode(packed, type=State)
    except (msgspec.MsgspecError, ValueError) as error:
        raise ArchiveError(f"{name} cannot be read: {error}", partition=partition) from error
    if (state.format, state.hub, state.partition, state.next) != (FORMAT, hub_id, partition, at):
        raise ArchiveError(f"{name} is not of this place, hub or format", partition=partition)
    return state


def verdicts(known: dict[str, Known], frame: Frame, period_s: int) -> Iterator[tuple[Source, Share, Verdict]]:
    """What becomes of each source of a frame; `known`, by identity, goes on with it."""
    # The period's start, because a reader that began later may clamp a broker's time otherwise within the period.
    at_ms = period_start_ms(frame.enqueued_at_ms, period_s)
    for source, share in shares_of(frame):
        who = identity(source, share)
        verdict, following = judge(known.get(who), source, share, at_ms)
        if following is not None:
            known[who] = following
        yield source, share, verdict


def surplus(kept: Sequence[int], log_first: int) -> list[int]:
    """Of the places where states are kept those that nobody needs: not the last two, and of the others some that the log still reaches."""
    older = [at for at in kept[:-2] if at >= log_first]
    drop = [at for at in kept[:-2] if at < log_first]
    while len(older) > STATES_KEPT:
        # The one whose neighbours are nearest, but never the oldest: so they stay spread over the log.
        around = [*older, kept[-2]]
        at = min(range(1, len(older)), key=lambda n: around[n + 1] - around[n - 1])
        drop.append(older.pop(at))
    return drop


class Producers:
    """What is known of a partition's producers at a place of its log. For one thread, from `begin` or `begin_near` on."""

    def __init__(self, hub: Hub, store: BlobStore, partition: int, log: Log) -> None:
        self.known: dict[str, Known] = {}
        self._hub = hub
        self._store = store
        self._partition = partition
        self._log = log

    def begin(self, at: int) -> None:
        """Know what is to be known at a place where a file ends. Raises ArchiveError, StoreError, HubError."""
        place = at
        while (state := self._read(place)) is None and place > 0:
            place = max((n for n in self.listed() if n < place), default=0)
        self._go_on(state, place, at)

    def begin_near(self, at: int, at_ms: int) -> None:
        """The same at any place, from the nearest state before it. If there is none, of the last hour before `at_ms`, when what is
        there was enqueued. Raises StoreError, HubError."""
        state, place = None, 0
        for place in sorted((n for n in self.listed() if n <= at), reverse=True):
            with contextlib.suppress(ArchiveError):  # it stops the archive, and is said there
                state = self._read(place)
            if state is not None:
                break
        else:
            place = int(self._hub.locate(self._partition, at_ms - LOOK_BACK_MS)) << self._hub.place_bits
        self._go_on(state, place, at)

    def judged(self, frame: Frame) -> Iterator[tuple[Source, Share, Verdict]]:
        return verdicts(self.known, frame, self._hub.period_s)

    def forget(self, at_ms: int) -> None:
        """Those who are as good as new by then."""
        self.known = {name: known for name, known in self.known.items() if at_ms - known.seen_at_ms <= WINDOW_MS}

    def listed(self) -> list[int]:
        return states(self._store, self._partition)

    def _go_on(self, state: State | None, place: int, at: int) -> None:
        self.known = dict(state.producers) if state else {}
        if place < at:
            self._read_again(place, at)

    def _read(self, at: int) -> State | None:
        return read_state(self._store, self._hub.id, self._partition, at)

    def _read_again(self, start: int, end: int) -> None:
        bits = self._hub.place_bits
        start = max(start, self._hub.bounds(self._partition).first)
        self._log.info("producers are read again from the log", partition=self._partition, first=start, next=end)
        floor_ms = 0
        while start < end:
            try:
                read = self._hub.read(self._partition, str(start >> bits), bytes_max=READ_BYTES_MAX)
            except (OffsetTrimmed, FrameDamaged):  # since, or passed over by somebody's order (skip.py)
                start = max(start + (1 << bits), self._hub.bounds(self._partition).first)
                continue
            for frame in read.frames:
                floor_ms = max(floor_ms, frame.enqueued_at_ms)
                if frame.first < end and not frame.is_marker:
                    for _ in self.judged(msgspec.structs.replace(frame, enqueued_at_ms=floor_ms)):
                        continue
            start = int(read.next_offset) << bits


class Filter:
    """Of one partition, for one thread, from `begin` on."""

    def __init__(self, hub: Hub, store: BlobStore, partition: int, log: Log) -> None:
        self._hub = hub
        self._store = store
        self._partition = partition
        self._log = log
        self._producers = Producers(hub, store, partition, log)
        self._kept: list[int] = []

    def begin(self, at: int) -> None:
        """Know what is to be known at a place where a file ends. Raises ArchiveError, StoreError, HubError."""
        self._producers.begin(at)
        self._kept = [*(n for n in self._producers.listed() if n < at), at]

    def passed(self, frame: Frame) -> Frame | None:
        """What of a frame of events is new: itself, a part of it, or nothing. Dead letters are in the store when it returns."""
        keep: list[tuple[int, int]] = []
        at = 0
        for source, share, verdict in self._producers.judged(frame):
            begin = at + verdict.left_out
            if verdict.taken:
                keep.append((begin, begin + verdict.taken))
            if verdict.reason is not None:
                lines = content(frame).split(b"\n")[begin + verdict.taken : at + source.count]
                self._bury(frame.first + begin + verdict.taken, source, share, verdict.reason, lines)
            at += source.count
        if sum(end - begin for begin, end in keep) == frame.count:
            return frame
        return _part(frame, keep) if keep else None

    def save(self, at: int, at_ms: int) -> None:
        """Keep what is known where a file ends, and some of what was known before. `at_ms`: of the file's hour."""
        self._producers.forget(at_ms)
        producers = dict(sorted(self._producers.known.items()))
        state = State(FORMAT, self._hub.id, self._partition, at, producers)
        self._store.put(state_name(self._partition, at), io.BytesIO(msgspec.msgpack.encode(state)))
        self._kept.append(at)
        if len(self._kept) > 2:
            for old in surplus(self._kept, self._hub.bounds(self._partition).first):
                self._store.delete(state_name(self._partition, old))
                self._kept.remove(old)

    def _bury(self, number: int, source: Source, share: Share, reason: Reason, lines: list[bytes]) -> None:
        dead = Dead(
            self._hub.id,
            self._partition,
            number,
            reason,
            source.producer,
            source.epoch,
            source.sequence,
            source.sha256.hex(),
            [msgspec.Raw(line) for line in lines],
            share.owner,
            source.device_field,
        )
        self._store.put(dead_name(self._partition, number), io.BytesIO(msgspec.json.encode(dead)))
        self._log.warning(
            "events are dead letters",
            partition=self._partition,
            file=dead_name(self._partition, number),
            reason=reason,
            producer=source.producer,
            events=len(lines),
        )


def _part(frame: Frame, keep: list[tuple[int, int]]) -> Frame:
    """A frame with only these of its lines, as if it had been written so; where it lies and goes on is the same."""
    lines = content(frame).splitlines(keepends=True)
    ndjson = b"".join([line for begin, end in keep for line in lines[begin:end]])
    is_plain = len(ndjson) < PLAIN_BYTES_MAX
    return msgspec.structs.replace(
        frame,
        kind=FrameKind.PLAIN if is_plain else FrameKind.GZIP,
        count=sum(end - begin for begin, end in keep),
        raw_bytes=len(ndjson),
        content_crc=crc32(ndjson),
        body=ndjson if is_plain else member(ndjson),
        source_count=0,
        sources=b"",
        shares=b"",
        owners=b"",
    )
