"""The hub: the service's durable, partitioned log. This is its whole contract.

`Hub` is what everyone may do with it: read. `WholeHub` is what its owner may do too, the API workers: append, mark, delete.
`embedded.py` keeps it in LMDB, `remote.py` reads one through the API of another process.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from penstock.errors import NumberReused, NumberTooOld, ProducerFenced
from penstock.events import Appended, Batch, Bounds, Slice

Refused = NumberReused | NumberTooOld | ProducerFenced


class Hub(Protocol):
    """The reading half. Thread-safe. Offsets are opaque strings; sequence numbers are whole numbers that grow in a partition.

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

    def partitions(self) -> int:
        """How many partitions there are: fixed at creation, numbered from 0."""
        ...

    def read(self, partition: int, offset: str, *, bytes_max: int) -> Slice:
        """Whole frames and markers from `offset` on, at least one if there is any, then as many as fit `bytes_max`.

        Raises OffsetTrimmed, OffsetBeyondEnd, FrameDamaged. Never skips.
        """
        ...

    def bounds(self, partition: int) -> Bounds:
        """First and next sequence number, bytes, times."""
        ...

    def locate(self, partition: int, at_ms: int) -> str:
        """Offset of the first frame or marker enqueued at or after `at_ms`; the end of the log if there is none."""
        ...


class WholeHub(Hub, Protocol):
    """Both halves."""

    def append(self, batches: Sequence[Batch]) -> Sequence[Appended | Refused]:
        """Commit batches together; must not return before they are durable.

        One answer for each batch in the same order: `Appended`, or the refusal of its producer number. A batch is stored
        whole or not at all; a known one is answered as a duplicate. Raises NotConfirmed (StorageFull, HubUnavailable) or
        HubBroken, and then no batch of the call counts as stored.
        """
        ...

    def cut(self) -> Sequence[str]:
        """Put a cut marker into every partition that has an open file; the end offset of each partition afterwards."""
        ...

    def trim(self, partition: int, *, before: str) -> None:
        """Drop whole frames that end at or before offset `before`. Never moves the end."""
        ...
