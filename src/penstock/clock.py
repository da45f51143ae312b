"""The only reader of time. Everything else is handed a `Clock`, so that tests and simulations can jump.

Wall time is a whole number of milliseconds since 1970 in UTC; it may step either way. Durations are measured on the
monotonic clock in seconds. Sleeping is waiting for an event with a timeout, so that whoever sleeps can be woken.
"""

from __future__ import annotations

import threading
import time
from datetime import UTC, datetime, timedelta
from typing import Protocol

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


class Clock(Protocol):
    def now_ms(self) -> int:
        """Wall time, milliseconds since 1970-01-01T00:00:00Z. May step back."""
        ...

    def monotonic(self) -> float:
        """Seconds on a clock that never steps; only differences mean anything. The same for all processes of a machine."""
        ...

    def wait(self, event: threading.Event, timeout_s: float) -> bool:
        """Block until `event` is set (True) or `timeout_s` have passed (False)."""
        ...


class SystemClock:
    """The machine's clocks."""

    def now_ms(self) -> int:
        return time.time_ns() // 1_000_000

    def monotonic(self) -> float:
        return time.monotonic()

    def wait(self, event: threading.Event, timeout_s: float) -> bool:
        return event.wait(timeout_s)


def timestamp(at_ms: int) -> str:
    """RFC 3339 in UTC with milliseconds: `2026-11-22T14:03:21.123Z`."""
    seconds, ms = divmod(at_ms, 1000)
    # isoformat, because strftime looks at the machine's time zone file each time.
    return f"{datetime.fromtimestamp(seconds, UTC).isoformat()[:19]}.{ms:03d}Z"


def parse_timestamp(text: str) -> int:
    """Milliseconds of an RFC 3339 time with its zone, rounded up. Raises ValueError."""
    at = datetime.fromisoformat(text)
    if at.tzinfo is None:
        raise ValueError(f"{text!r} has no time zone")
    return -((_EPOCH - at) // timedelta(milliseconds=1))
