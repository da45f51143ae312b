"""A partition's log, judged again by the rules of the archive's filter (hub/duplicates.py): what judged.py compares with the archive.

Judging needs what was known of producers where it begins: nothing, where nothing was ever before; else a state that the filter has kept
(filter.py). Of them those are forgotten on the way that are as good as new by then.
"""

from __future__ import annotations

import itertools
from bisect import bisect_right
from collections.abc import Collection, Iterator, Mapping, Sequence
from operator import attrgetter
from typing import NamedTuple

import msgspec

from penstock.archive.begin import passed_ms
from penstock.archive.check import READ_BYTES_MAX
from penstock.archive.cut import hour_name, hour_start_ms, period_start_ms
from penstock.archive.filter import read_state, states, verdicts
from penstock.archive.ledger import Gap, Link, Record
from penstock.blobs import BlobStore
from penstock.errors import FrameDamaged
from penstock.events import Bounds, Frame, Source
from penstock.hub import Hub
from penstock.hub.duplicates import Known, Share, Verdict
from penstock.hub.producers import DAY_MS, WINDOW_MS
from penstock.processor.lease import Lease

Judged = tuple[Frame, str, Sequence[tuple[Source, Share, Verdict]]]
"""A frame, its hour, and its sources."""


class Begin(NamedTuple):
    """Where judging begins, and what is known there."""

    at: int
    known: Mapping[str, Known]


class JudgedLog:
    """`links`: the partition's chain; `lost`: those of its files that were declared lost and are not there."""

    def __init__(
        self, hub: Hub, store: BlobStore, partition: int, lease: Lease | None, links: list[Link], lost: Collection[str]
    ) -> None:
        self._hub = hub
        self._bits = hub.place_bits
        self._store = store
        self._partition = partition
        self._lease = lease
        self._links = links
        self._lost = lost

    def begin(self, bounds: Bounds) -> Begin | None:
        """The first place from which everything is known; None if there is none. Raises ArchiveError for a state that is not right."""
        first = bounds.first
        never = self._lease is None and not self._links
        leading = 0
        for link in itertools.takewhile(lambda link: isinstance(link, Gap), self._links):
            leading = link.next
        if never or first <= leading:
            return Begin(first, {})
        lease = self._lease
        behind = lease is not None and lease.sequence_number < first <= int(lease.offset) << self._bits
        if lease is not None and behind:  # only markers, copies and dead events lay between: they change nothing
            state = read_state(self._store, self._hub.id, self._partition, lease.sequence_number)
            if state is not None or lease.sequence_number <= leading:
                return Begin(first, state.producers if state else {})
        for at in states(self._store, self._partition):
            state = read_state(self._store, self._hub.id, self._partition, at) if at >= first else None
            if state is not None:
                return Begin(at, state.producers)
        return None

    def walk(self, begin: Begin, end: int) -> Iterator[Judged]:
        """The frames of events from there on, judged. Times are clamped as the archiver does it."""
        known = dict(begin.known)
        before = next(
            (record for record in reversed(self._links) if isinstance(record, Record) and record.next <= begin.at), None
        )
        floor_ms = hour_start_ms(before.hour) if before else 0
        if begin.at > (before.next if before else 0):
            floor_ms = passed_ms(self._hub, self._partition, begin.at >> self._bits, floor_ms)
        offset, forget_ms = begin.at >> self._bits, floor_ms + DAY_MS
        hour, hour_end_ms = "", 0
        while offset << self._bits < end:
            try:
                read = self._hub.read(self._partition, str(offset), bytes_max=READ_BYTES_MAX)
            except FrameDamaged:
                if not self.is_passed_over(self.link(offset << self._bits)):
                    raise
                offset += 1  # somebody's order has passed over it (skip.py)
                continue
            for frame in read.frames:
                if frame.first >= end:
                    return
                floor_ms = max(floor_ms, frame.enqueued_at_ms)
                if floor_ms > forget_ms:
                    known = {who: one for who, one in known.items() if floor_ms - one.seen_at_ms <= WINDOW_MS}
                    forget_ms = floor_ms + DAY_MS
                if not frame.is_marker:
                    if frame.enqueued_at_ms != floor_ms:
                        frame = msgspec.structs.replace(frame, enqueued_at_ms=floor_ms)
                    if floor_ms >= hour_end_ms:
                        hour = hour_name(period_start_ms(floor_ms, self._hub.period_s), self._hub.period_s)
                        hour_end_ms = hour_start_ms(hour) + self._hub.period_s * 1000
                    yield frame, hour, list(verdicts(known, frame, self._hub.period_s))
            offset = int(read.next_offset)

    def is_passed_over(self, link: Link | None) -> bool:
        return isinstance(link, Gap) or (link is not None and link.file in self._lost)

    def link(self, number: int) -> Link | None:
        """The record that it lies in."""
        at = bisect_right(self._links, number, key=attrgetter("first")) - 1
        return self._links[at] if at >= 0 and number < self._links[at].next else None
