"""Producer numbers: what makes a batch that is sent again stored once (docs/guarantees.md, Producers).

Pure: the hub reads a producer's entry, asks `judge`, and writes what `remember` gives, all in the transaction of the frames.
"""

from __future__ import annotations

import msgspec

from penstock.errors import NumberReused, NumberTooOld, ProducerFenced
from penstock.events import Appended, Batch

KEPT_BATCHES = 5
DAY_MS = 24 * 3600 * 1000
WINDOW_MS = 14 * DAY_MS
KEYED_WINDOW_MS = DAY_MS
KEYED = "idempotency:"
"""How the producers begin that stand for an Idempotency-Key: no client's own id can, for a colon is not in it."""


class Kept(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """A batch that can still be recognised. `ranges`: (partition, first, next) of its events."""

    epoch: int
    sequence: int
    sha256: bytes
    accepted: int
    enqueued_at_ms: int
    ranges: list[tuple[int, int, int]]


class Producer(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """A producer as the hub knows it. `kept` is oldest first, and may reach back over an epoch change.

    `owner` is the name of the key that its first batch came with; empty if it came without one.
    """

    epoch: int
    sequence: int
    seen_at_ms: int
    kept: tuple[Kept, ...]
    owner: str = ""


_DECODER = msgspec.msgpack.Decoder(Producer)
_ENCODER = msgspec.msgpack.Encoder()


def decode(entry: bytes) -> Producer:
    """An entry of the hub's `producers` database."""
    return _DECODER.decode(entry)


def encode(producer: Producer) -> bytes:
    """The bytes of an entry."""
    return _ENCODER.encode(producer)


def window_ms(producer: str) -> int:
    """How long a producer is remembered after its last batch."""
    return KEYED_WINDOW_MS if producer.startswith(KEYED) else WINDOW_MS


def judge(known: Producer | None, batch: Batch) -> Appended | NumberReused | NumberTooOld | ProducerFenced | None:
    """The answer for a batch that must not be stored (again); None when it must be."""
    if known is None:
        return None
    if known.owner and batch.owner and known.owner != batch.owner:
        return ProducerFenced(
            f"Producer {batch.producer} sends with a key of another name. Nothing was stored; take a new producer id.",
            last_epoch=known.epoch,
            last_sequence=known.sequence,
        )
    for kept in known.kept:
        if kept.epoch == batch.epoch and kept.sequence == batch.sequence:
            if kept.sha256 == batch.sha256:
                return Appended(kept.accepted, duplicate=True)
            return NumberReused(
                _reused(batch),
                last_epoch=known.epoch,
                last_sequence=known.sequence,
            )
    if batch.epoch < known.epoch:
        return ProducerFenced(
            f"Producer {batch.producer} has moved on to epoch {known.epoch}. Nothing was stored; take a new producer id.",
            last_epoch=known.epoch,
            last_sequence=known.sequence,
        )
    if batch.epoch == known.epoch and batch.sequence <= known.sequence:
        return NumberTooOld(
            f"Sequence {batch.sequence} of producer {batch.producer} lies before the last {KEPT_BATCHES} batches, so whether "
            "it was stored is not known any more. Nothing was stored now; take a new producer id.",
            last_epoch=known.epoch,
            last_sequence=known.sequence,
        )
    return None


def _reused(batch: Batch) -> str:
    if batch.producer.startswith(KEYED):
        return (
            "Another body was sent under this Idempotency-Key. Nothing of this one was stored; send it under a new key."
        )
    return (
        f"Producer {batch.producer} has sent other bytes under epoch {batch.epoch}, sequence {batch.sequence}. "
        "Nothing was stored; take a new producer id and send the same bytes again."
    )


def lost_before(known: Producer | None, batch: Batch) -> bool:
    """Whether the producer acknowledges a batch that this hub never had: something between was lost."""
    return (
        known is not None and batch.after is not None and batch.epoch == known.epoch and batch.after != known.sequence
    )


def remember(known: Producer | None, batch: Batch, enqueued_at_ms: int, ranges: list[tuple[int, int, int]]) -> Producer:
    """The entry after `batch` is stored. `ranges` may be filled later, before it is encoded."""
    kept = Kept(batch.epoch, batch.sequence, batch.sha256, batch.accepted, enqueued_at_ms, ranges)
    before = known.kept[-(KEPT_BATCHES - 1) :] if known else ()
    owner = known.owner if known and known.owner else batch.owner
    return Producer(batch.epoch, batch.sequence, enqueued_at_ms, (*before, kept), owner)
