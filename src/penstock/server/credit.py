"""How long others may have to wait for the tickets of one crowd: the senders of one key, or of one address. In memory that processes share.

A ticket (buckets.py) makes others wait until it is claimed, so it takes what it will cost from its crowd's credit, and who is let in on one
puts that back and a quarter more. Who comes to his times keeps his credit or gains some. Who ignores what he is told,
and comes under another name each time, lets his tickets run out: he has no credit after `FIRST_S`, gets no more tickets, and holds up
nobody. Who sends other bytes each time, and no name, does come to the times of some of his tickets, since all of his address are as good as
his. So what he sends without credit costs him too, and he gets tickets again when he has sent less for a while.

Without credit one is told true times and gets in when there is room, but others may have come first. Crowds have `CROWDS` cells; two that
share one share its credit.
"""

from __future__ import annotations

from typing import Final

FIRST_S: Final = 20.0
MOST_S: Final = 30.0
LEAST_S: Final = -5.0
CROWDS: Final = 1 << 12
CELLS: Final = 2 * CROWDS

_BACK = 1.25
_BY_ITSELF = 0.02  # s in each second, up to the first


class Credit:
    """`cells` are `CELLS` doubles, zero at first: how much of `FIRST_S` a crowd has spent, and when that was so."""

    def __init__(self, cells: memoryview[float]) -> None:
        self._cells = cells

    def of(self, crowd: int, now: float) -> float:
        """In seconds of a bucket; above 0: a ticket may be given."""
        at = crowd % CROWDS * 2
        spent, since = self._cells[at], self._cells[at + 1]
        return FIRST_S - (spent if spent < 0.0 else max(0.0, spent - _BY_ITSELF * (now - since)))

    def spend(self, crowd: int, now: float, cost: float) -> None:
        at = crowd % CROWDS * 2
        credit = min(max(self.of(crowd, now) - cost, LEAST_S), MOST_S)
        self._cells[at], self._cells[at + 1] = FIRST_S - credit, now

    def put_back(self, crowd: int, now: float, used: float) -> None:
        """Someone was let in on a ticket and used so much of it."""
        self.spend(crowd, now, -_BACK * used)
