"""What a partition of a topic has of a simulated run, each event once: judged as by the archive and the audit (hub/duplicates.py).

Over HTTP a frame comes without the shares that say which events of its batch it holds. But the events of a simulated batch all differ,
so an event's place in its batch is that at which it was seen first: of each partition every attempt has left a prefix.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable

from penstock.events import Frame, Source
from penstock.hub.duplicates import Known, Share, identity, judge
from penstock.wire import frame


class Once:
    """Of one partition, whose frames come in order. `copies` were left out, since they were there before."""

    def __init__(self, begins: bytes, stamp_bytes: int) -> None:
        """Of the run are events that begin so; so many bytes at the end of each line are the server's."""
        self.copies = 0
        self._begins = begins
        self._stamp_bytes = stamp_bytes
        self._known: dict[str, Known] = {}
        self._places: dict[str, dict[tuple[int, int, bytes], dict[bytes, int]]] = {}

    def passed(self, frames: bytes) -> Iterable[bytes]:
        """The events of the run that are new, without their stamps. Raises FrameDamaged."""
        for part in frame.split(frames):
            read = frame.decode(part)
            if not read.is_marker:
                yield from self._new(read)

    def _new(self, read: Frame) -> Iterable[bytes]:
        lines = iter(frame.content(read).split(b"\n"))
        for source in frame.sources_of(read):
            of = list(itertools.islice(lines, source.count))
            if not of[0].startswith(self._begins):
                continue
            events = [line[: -self._stamp_bytes] for line in of]
            share = Share(self._place(source, events), 0)
            who = identity(source, share)
            verdict, following = judge(self._known.get(who), source, share, read.enqueued_at_ms)
            if following is not None:
                self._known[who] = following
                kept = {(batch.epoch, batch.sequence, batch.sha256) for batch in following.batches}
                self._places[who] = {at: places for at, places in self._places[who].items() if at in kept}
            self.copies += verdict.left_out
            yield from events[verdict.left_out : verdict.left_out + verdict.taken]

    def _place(self, source: Source, events: list[bytes]) -> int:
        """Of the first in its batch."""
        batch = source.epoch, source.sequence, source.sha256
        places = self._places.setdefault(source.producer, {}).setdefault(batch, {})
        start = places.get(events[0], len(places))
        for place, event in enumerate(events, start):
            places.setdefault(event, place)
        return start
