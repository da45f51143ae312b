"""Producers that were not heard of for their time are forgotten (docs/guarantees.md, Producers).

The table lies in the order of names, which says nothing about age, so it is walked from end to end, again and again: the whole of it in
`WALK_S`, however large it is. An entry outlives its time by no more than one walk, so under any steady load the table holds a quarter
more than a day's Idempotency-Keys at most, and each post costs as many looks as walks fit into a day, which is four.
"""

from __future__ import annotations

from typing import Final

import lmdb

from penstock.clock import Clock
from penstock.hub.layout import Databases
from penstock.hub.producers import decode, window_ms
from penstock.hub.reading import reading
from penstock.hub.writing import Writer

WALK_S: Final = 6 * 3600.0
AT_ONCE: Final = 1000
"""Entries to a transaction, so that intake waits for none long; and so many are looked at in any case."""
SECONDS_MOST: Final = 0.25
"""Of one call: what else its thread does for the hub must not wait for a walk through a huge table. The rest is made up for later."""


def looks(entries: int, elapsed_s: float) -> int:
    """How many of so many entries to look at, so long after the last time."""
    return min(entries, max(AT_ONCE, round(entries * elapsed_s / WALK_S)))


class Expiry:
    """Of one process's open hub. One process is enough; that several walk changes nothing but the cost."""

    def __init__(self, env: lmdb.Environment, databases: Databases, writer: Writer, clock: Clock) -> None:
        self._env = env
        self._producers = databases.producers
        self._writer = writer
        self._clock = clock
        self._walked_at_s = clock.monotonic()
        self._next = b""

    def walk(self) -> None:
        """As far as is due. To be called about once a second, from one thread."""
        began_s = self._clock.monotonic()
        with reading(self._env) as txn:
            entries: int = txn.stat(self._producers)["entries"]
        left = looks(entries, began_s - self._walked_at_s)
        while left > 0 and self._clock.monotonic() <= began_s + SECONDS_MOST:
            self._look(min(left, AT_ONCE))
            left = left - AT_ONCE if self._next else 0
        self._walked_at_s = began_s - (WALK_S * left / entries if left > 0 else 0.0)

    def _look(self, count: int) -> None:
        now_ms = self._clock.now_ms()

        def is_due(key: bytes, entry: bytes) -> bool:
            return decode(entry).seen_at_ms < now_ms - window_ms(key.decode())

        with reading(self._env) as txn:
            cursor = txn.cursor(self._producers)
            found: list[bytes] = []
            more = cursor.set_range(self._next)
            for _ in range(count):
                if not more:
                    break
                if is_due(cursor.key(), cursor.value()):
                    found.append(cursor.key())
                more = cursor.next()
            self._next = cursor.key() if more else b""
        if found:
            with self._writer.transaction() as txn:
                for key in found:
                    entry = txn.get(key, db=self._producers)
                    if entry is not None and is_due(key, entry):
                        txn.delete(key, db=self._producers)
