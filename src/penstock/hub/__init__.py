"""The hub: the service's durable, partitioned log. This is its whole contract.

`Hub` is what everyone may do with it: read. `WholeHub` is what its owner may do too, the API workers: append, mark, delete.
`embedded.py` keeps it in LMDB, `kafka.py` in a topic, `remote.py` reads one through the API of another process.

Offsets are opaque strings; those of one partition compare as numbers. An event's sequence number is the offset of the record that it
lies in, times 2 to the power of `place_bits`, plus its place in it. In the embedded hub these bits are 0 and an event is as good as a
record: offset and sequence number are the same, and dense. On Kafka they are 20, since the brokers number records: sequence numbers
have gaps, and whoever wants to know how many events lie between two of them must read them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from penstock.errors import NumberReused, NumberTooOld, ProducerFenced
from penstock.events import Appended, Batch, Bounds, Slice

Refused = NumberReused | NumberTooOld | ProducerFenced


class Hub(Protocol):
    """The reading half. Thread-safe.

    A hub that is reached over a network raises HubUnavailable from any of these when it does not answer.
    """

    @property
    def id(self) -> str:
        """The hub's identity, made when it was created."""
        ...

    @property
    def period_s(self) -> int:
        """The archive's period in seconds, fixed at creation."""
        ...

    @property
    def place_bits(self) -> int:
        """`sequence number == int(offset) << place_bits`, where a record begins."""
        ...

    def partitions(self) -> int:
        """How many partitions there are: fixed at creation, numbered from 0."""
        ...

    def read(self, partition: int, offset: str, *, bytes_max: int) -> Slice:
        """Whole frames and markers from `offset` on, at least one if there is any, then as many as fit `bytes_max`.

        Raises OffsetTrimmed, OffsetBeyondEnd, FrameDamaged. Never skips.
        """
        ...

    def bounds(self, partition: int) -> Bounds:
        """First and next sequence number, bytes (0 where the hub does not know), times."""
        ...

    def locate(self, partition: int, at_ms: int) -> str:
        """Offset of the first frame or marker enqueued at or after `at_ms`; the end of the log if there is none."""
        ...


class WholeHub(Hub, Protocol):
    """Both halves. How what is old gets deleted is each hub's own affair."""

    def append(self, batches: Sequence[Batch]) -> Sequence[Appended | Refused]:
        """Commit batches together; must not return before they are durable.

        One answer for each batch in the same order: `Appended`, or the refusal of its producer number. A batch is stored
        whole or not at all; a known one is answered as a duplicate. Raises NotConfirmed (StorageFull, HubUnavailable) or
        HubBroken, and then no batch of the call counts as stored.

        On Kafka a failure can leave the first of a batch's events in a partition, which the retry completes; a copy is stored again
        and answered as new, and readers leave it out (penstock.hub.duplicates).
        """
        ...

    def cut(self) -> Sequence[str]:
        """Put a cut marker into every partition that may have an open file; the offset behind the last event of each partition."""
        ...
