"""What any reader takes of a log that has batches twice: each event once, with its own sequence number (hub/duplicates.py judges).

For groups other than the archive. They keep no state of what they know of producers: whoever begins at a checkpoint takes the archive's
nearest state before it and reads on from there. The archive keeps those of its last two files and a few older ones; a group that is
behind all of them begins with what the last hour of the log tells, and a copy that came later than that is given to it.

Where the archive makes one frame of what is new in one, here events must keep their places, because their sequence numbers follow
from them: each row of new events becomes a frame of its own, which begins at the place of the first.
"""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from penstock.archive.cut import period_start_ms
from penstock.archive.filter import Producers
from penstock.blobs import BlobStore
from penstock.events import Frame, FrameKind, Slice, Source
from penstock.hub import Hub
from penstock.processor.pump import Log
from penstock.wire.frame import PLAIN_BYTES_MAX, content, crc32, member, pack_sources


class Counts:
    """Events of a partition that were not given to its processors: copies, and dead letters (the archive has them in `_dead/`)."""

    def __init__(self) -> None:
        self.copies = 0
        self.dead = 0


class Fresh:
    """Of one partition, for one thread, from the first slice on."""

    def __init__(self, hub: Hub, store: BlobStore, partition: int, counts: Counts, log: Log) -> None:
        self._hub = hub
        self._partition = partition
        self._counts = counts
        self._log = log
        self._producers = Producers(hub, store, partition, log)
        self._began = False
        self._period_ms = 0

    def passed(self, events: Slice) -> Slice:
        """The same with what is new of its frames, and its markers. Raises StoreError, HubError, FrameDamaged."""
        if not events.frames:
            return events
        if not self._began:
            at_ms = events.frames[0].enqueued_at_ms
            self._producers.begin_near(int(events.offset) << self._hub.place_bits, at_ms)
            self._began = True
        frames = [new for frame in events.frames for new in ((frame,) if frame.is_marker else self._new(frame))]
        return msgspec.structs.replace(events, frames=frames)

    def _new(self, frame: Frame) -> Iterator[Frame]:
        period_ms = period_start_ms(frame.enqueued_at_ms, self._hub.period_s)
        if period_ms != self._period_ms:
            self._period_ms = period_ms
            self._producers.forget(period_ms)
        rows: list[tuple[int, list[Source]]] = []
        at = end = 0
        for source, _, verdict in self._producers.judged(frame):
            begin = at + verdict.left_out
            if verdict.taken:
                new = msgspec.structs.replace(source, count=verdict.taken)
                if rows and end == begin:
                    rows[-1][1].append(new)
                else:
                    rows.append((begin, [new]))
                end = begin + verdict.taken
            dead = source.count - verdict.left_out - verdict.taken
            self._counts.copies += verdict.left_out
            if dead:
                self._counts.dead += dead
                self._log.warning(
                    "events are dead letters",
                    partition=self._partition,
                    sequence_number=frame.first + begin + verdict.taken,
                    reason=verdict.reason,
                    producer=source.producer,
                    events=dead,
                )
            at += source.count
        if [begin for begin, _ in rows] == [0] and end == frame.count:
            yield frame
            return
        lines = content(frame).splitlines(keepends=True) if rows else []
        for begin, sources in rows:
            yield _piece(frame, begin, sources, lines)


def _piece(frame: Frame, begin: int, sources: list[Source], lines: list[bytes]) -> Frame:
    count = sum(source.count for source in sources)
    ndjson = b"".join(lines[begin : begin + count])
    is_plain = len(ndjson) < PLAIN_BYTES_MAX
    return msgspec.structs.replace(
        frame,
        kind=FrameKind.PLAIN if is_plain else FrameKind.GZIP,
        first=frame.first + begin,
        count=count,
        raw_bytes=len(ndjson),
        content_crc=crc32(ndjson),
        body=ndjson if is_plain else member(ndjson),
        source_count=len(sources),
        sources=pack_sources(sources),
        shares=b"",
    )
