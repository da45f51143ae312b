"""How soon who was told to come later is listened to again.

To refuse costs a fraction of what it costs to store, but who does not wait comes again at once: 10,000 connections that send single events
and ignore `Retry-After` made 55,000 refusals a second of two workers, and left them time to store 400 events a second instead of 24,000.
So a worker that refuses more than `REFUSALS_PER_S` does not read the next request of those that it refuses until it can afford to, and for
no longer than it told them to wait. Who waits as he was told never notices.
"""

from __future__ import annotations

from typing import Final

REFUSALS_PER_S: Final = 2000.0
"""About a twentieth of a worker's time."""
AT_ONCE: Final = 200
REST_S_MOST: Final = 1.0
"""The least that anybody is told."""


class Patience:
    """Of one worker. Times are on one clock, in seconds."""

    def __init__(self) -> None:
        self._paid = 0.0

    def rest_s(self, now: float) -> float:
        """One more was refused: so long its connection is not to be read."""
        self._paid = min(max(self._paid, now - AT_ONCE / REFUSALS_PER_S) + 1 / REFUSALS_PER_S, now + REST_S_MOST)
        return max(0.0, self._paid - now)
