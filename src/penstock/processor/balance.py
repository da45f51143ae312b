"""Which partitions a host should take now. Pure: what was seen in, what to do out.

Free partitions are taken all at once, so that none waits. Then hosts even out: in a round a host that has nothing to claim
takes one partition from the host that has the most, if that has at least two more than itself. Each such move makes the
sum of the squares of the counts smaller, so it ends, and where it ends no two hosts differ by more than one.

Every host begins its choice at a place of its own (from its name), and prefers other victims among equals. Hosts that start
together then meet half-way instead of racing for the same partitions, and seldom want to steal the same one.
"""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Sequence

import msgspec


class View(msgspec.Struct, frozen=True):
    """A partition as a host sees it. `free`: nobody reads it (no lease, given back, expired, or left by our own name).

    `owner` is None when nobody is known to read it and it cannot be had either: unreadable, or not for us now.
    """

    partition: int
    owner: str | None
    free: bool


class Plan(msgspec.Struct, frozen=True):
    """Partitions to claim in this order, and the one to take from a living host."""

    claim: tuple[int, ...] = ()
    steal: int | None = None


def plan(leases: Sequence[View], me: str) -> Plan:
    """What `me` should do in this round."""
    start = zlib.crc32(me.encode()) % max(len(leases), 1)
    turned = [*leases[start:], *leases[:start]]
    claim = tuple(view.partition for view in turned if view.free)
    if claim:
        return Plan(claim=claim)
    counts = Counter(view.owner for view in turned if view.owner is not None)
    # Between equals the names decide: nothing but what was seen, and for another host another choice.
    most = max(counts, key=lambda owner: (counts[owner], zlib.crc32(f"{me} {owner}".encode())), default=me)
    if counts[most] < counts[me] + 2:
        return Plan()
    return Plan(steal=next(view.partition for view in turned if view.owner == most))
