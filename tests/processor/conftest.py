"""Waiting for what threads do."""

from __future__ import annotations

import threading
from collections.abc import Callable

from penstock.clock import SystemClock


def until(condition: Callable[[], object], what: str = "condition", each: Callable[[], object] | None = None) -> None:
    clock, never = SystemClock(), threading.Event()
    deadline = clock.monotonic() + 10
    while not condition():
        assert clock.monotonic() < deadline, f"never: {what}"
        if each is not None:
            each()
        clock.wait(never, 0.001)
