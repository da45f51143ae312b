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

A producer belongs to the name of the key that its batches come with, where there are keys: the same id with a key of another name is
another producer (`identity`). So whoever learns an id can neither fence it nor have its events taken for copies; the embedded hub
refuses such batches.

All of this is a function of the log from the beginning of a producer on, so every reader decides alike, and a state that was lost can
be made again. Batches without a producer number (no sha256) are always taken.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Sequence
from typing import Final, Literal, NamedTuple

import msgspec

from penstock.errors import FrameDamaged
from penstock.events import Frame, Source
from penstock.hub.producers import KEPT_BATCHES, WINDOW_MS
from penstock.wire.frame import sources_of

_SHARE: Final = struct.Struct("<II")

Reason = Literal["number_reused", "number_too_old", "producer_fenced"]


class Share(NamedTuple):
    """Of the `whole` events that its batch has in the partition, a source holds those from `start` on. `owner`: as of a Batch."""

    start: int
    whole: int
    owner: str = ""


def pack_shares(shares: Iterable[Share]) -> bytes:
    """The shares of a frame's sources, in order: 8 bytes each, two little-endian numbers."""
    return b"".join([_SHARE.pack(share.start, share.whole) for share in shares])


def pack_owners(shares: Sequence[Share]) -> bytes:
    """Their owners likewise: a byte with the length, and the name in UTF-8. Empty if none has one."""
    if not any(share.owner for share in shares):
        return b""
    names = [share.owner.encode() for share in shares]
    return b"".join([b"%c%b" % (len(name), name) for name in names])


def identity(source: Source, share: Share) -> str:
    """Who sent a source: its producer's id, and behind a blank, which no id has, the name of its key."""
    return f"{source.producer} {share.owner}" if share.owner else source.producer


def shares_of(frame: Frame) -> Iterator[tuple[Source, Share]]:
    """Each source of a frame with its share. Raises FrameDamaged."""
    sources = sources_of(frame)
    if len(frame.shares) != len(sources) * _SHARE.size:
        raise FrameDamaged(
            f"The frame at {frame.partition}/{frame.first} has {len(sources)} sources and {len(frame.shares)} bytes of shares.",
            where=f"{frame.partition}/{frame.first}",
        )
    owners = _owners(frame, len(sources))
    for source, (start, whole), owner in zip(sources, _SHARE.iter_unpack(frame.shares), owners, strict=True):
        if start + source.count > whole:
            raise FrameDamaged(
                f"A source at {frame.partition}/{frame.first} holds {source.count} events from {start} on, and its batch has {whole}.",
                where=f"{frame.partition}/{frame.first}",
            )
        yield source, Share(start, whole, owner)


def _owners(frame: Frame, number: int) -> Sequence[str]:
    if not frame.owners:
        return ("",) * number
    found, at = [], 0
    try:
        while at < len(frame.owners):
            end = at + 1 + frame.owners[at]
            found.append(frame.owners[at + 1 : end].decode())
            at = end
    except UnicodeDecodeError:
        found.clear()
    if len(found) != number or at != len(frame.owners):
        raise FrameDamaged(
            f"The frame at {frame.partition}/{frame.first} has {number} sources, and its owners do not fit.",
            where=f"{frame.partition}/{frame.first}",
        )
    return found


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
