"""Processors: user code for a partition, and the host that gives it partitions to read."""

from __future__ import annotations

import enum
from collections.abc import Callable
from typing import NamedTuple, Protocol

from penstock.events import Slice


class CloseReason(enum.Enum):
    """Why a processor gets no more events."""

    SHUTDOWN = "shutdown"
    LEASE_LOST = "lease_lost"
    REBALANCED = "rebalanced"
    STUCK = "stuck"
    FAILED = "failed"


class Checkpoint(NamedTuple):
    """A checkpoint of a processor that has its own mind of where the next event is: reading goes on at `offset`, and no event lies
    from `sequence_number` to there. Of a mere offset the hub makes the sequence number."""

    offset: str
    sequence_number: int


class Processor(Protocol):
    """One instance for each partition, called from one thread."""

    def process(self, events: Slice) -> str | Checkpoint | None:
        """Take what was read. Returns the checkpoint: everything below this offset is done for good; None leaves it."""
        ...

    def close(self, reason: CloseReason) -> None:
        """The last call. Nothing that happens in it can move the checkpoint."""
        ...


ProcessorFactory = Callable[[int], Processor]
