"""What of a log is there twice, where the hub keeps no producers: judged by whoever reads (docs/guarantees.md, Producers, on Kafka).

A writer may die, or not hear of an acknowledgement, with any part of a batch written; the client sends the batch again, to any
writer. What makes this exact is what each frame carries: of each source the producer, epoch, sequence and sha256 of its batch, and its
*share*: which of the events that the batch has in this partition the source holds. A partition's frames of a batch are written one
after the other, each after the acknowledgement of the one before, so each attempt leaves a prefix, and the union of attempts is one.

A reader keeps for each producer the last few batches that had events in the partition, and up to which event each was read. Then a
source is, event by event,

- *taken* when its batch is the producer's newest here, or newer, and the event lies behind what was read of that batch;
- *left out* when its batch is one of those kept and the event was read;
- *dead* otherwise: other bytes under a number that was used, or a number that is too old to be known. It is not dropped: nobody
  can tell that it was stored.

All of this is a function of the log from the beginning of a producer on, so every reader decides alike, and a state that was lost can
be made again. Batches without a producer number (no sha256) are always taken.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from typing import Final, Literal, NamedTuple

import msgspec

from penstock.errors import FrameDamaged
from penstock.events import Frame, Source
from penstock.hub.producers import KEPT_BATCHES, WINDOW_MS
from penstock.wire.frame import sources_of

_SHARE: Final = struct.Struct("<II")

Reason = Literal["number_reused", "number_too_old", "producer_fenced"]


class Share(NamedTuple):
    """Of the `whole` events that its batch has in the partition, a source holds those from `start` on."""

    start: int
    whole: int


def pack_shares(shares: Iterable[Share]) -> bytes:
    """The shares of a frame's sources, in order: 8 bytes each, two little-endian numbers."""
    return b"".join([_SHARE.pack(*share) for share in shares])


def shares_of(frame: Frame) -> Iterator[tuple[Source, Share]]:
    """Each source of a frame with its share. Raises FrameDamaged."""
    sources = sources_of(frame)
    if len(frame.shares) != len(sources) * _SHARE.size:
        raise FrameDamaged(
            f"The frame at {frame.partition}/{frame.first} has {len(sources)} sources and {len(frame.shares)} bytes of shares.",
            where=f"{frame.partition}/{frame.first}",
        )
    for source, (start, whole) in zip(sources, _SHARE.iter_unpack(frame.shares), strict=True):
        if start + source.count > whole:
            raise FrameDamaged(
                f"A source at {frame.partition}/{frame.first} holds {source.count} events from {start} on, and its batch has {whole}.",
                where=f"{frame.partition}/{frame.first}",
            )
        yield source, Share(start, whole)


class Read(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """A batch of which the first `reached` of `whole` events were read."""

    epoch: int
    sequence: int
    sha256: bytes
    whole: int
    reached: int

    @property
    def number(self) -> tuple[int, int]:
        return self.epoch, self.sequence


class Known(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """A producer as a partition's readers know it. `batches` are its last ones here, the newest last."""

    seen_at_ms: int
    batches: tuple[Read, ...]


class Verdict(NamedTuple):
    """Of a source's events the first `left_out` were read before, then `taken` are new, and all others are dead for `reason`."""

    left_out: int
    taken: int
    reason: Reason | None = None


def judge(known: Known | None, source: Source, share: Share, at_ms: int) -> tuple[Verdict, Known | None]:
    """What becomes of a source that was enqueued at `at_ms`, and what is known of its producer from then on."""
    if not source.sha256:
        return Verdict(0, source.count), known
    if known is not None and at_ms - known.seen_at_ms > WINDOW_MS:
        known = None
    end = share.start + source.count
    read = Read(source.epoch, source.sequence, source.sha256, share.whole, end)
    if known is None or read.number > known.batches[-1].number:
        before = known.batches[1 - KEPT_BATCHES :] if known else ()
        return Verdict(0, source.count), Known(at_ms, (*before, read))
    same = next((batch for batch in known.batches if batch.number == read.number), None)
    if same is None:
        newest = known.batches[-1]
        return Verdict(0, 0, "producer_fenced" if read.epoch < newest.epoch else "number_too_old"), known
    if (same.sha256, same.whole) != (read.sha256, read.whole):
        return Verdict(0, 0, "number_reused"), known
    left_out = min(source.count, max(0, same.reached - share.start))
    if same is not known.batches[-1]:
        # What is new of it comes behind newer batches: out of order, from one who has given the batch up.
        return Verdict(left_out, 0, "number_too_old" if left_out < source.count else None), known
    if left_out < source.count:
        known = Known(at_ms, (*known.batches[:-1], read))
    return Verdict(left_out, source.count - left_out), known
