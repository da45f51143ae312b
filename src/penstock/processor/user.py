"""What stands between a pump and the code of users: what `process` is given, and what becomes of what it raises."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

from penstock.events import Event, Frame, Slice
from penstock.processor import CloseReason
from penstock.wire import frame


class Events:
    """What `process` is given: iterates the `Event`s of one read, in order. It may be empty where the log has a marker.

    `frames` are the same as they lie in the log, the first and only the first may begin before `offset`;
    `penstock.wire.frame.content` gives the lines of one. `next_offset` is behind the last event, `end_offset` the end of the log.
    """

    def __init__(self, read: Slice) -> None:
        self._read = read

    def __iter__(self) -> Iterator[Event]:
        return frame.events(self._read)

    @property
    def partition(self) -> int:
        return self._read.partition

    @property
    def offset(self) -> str:
        return self._read.offset

    @property
    def next_offset(self) -> str:
        return self._read.next_offset

    @property
    def end_offset(self) -> str:
        return self._read.end_offset

    @property
    def frames(self) -> Sequence[Frame]:
        return self._read.frames


class UserProcessor(Protocol):
    """One instance for each partition, called from one thread. `close(reason)` is called last, if there is one."""

    def process(self, events: Events) -> str | None:
        """Returns the checkpoint: everything below this offset is done for good, and never comes again. None leaves it."""
        ...


Factory = Callable[[int], UserProcessor]
Function = Callable[[Events], str | None]


class Called:
    """One function as the processor of every partition."""

    def __init__(self, function: Function) -> None:
        self._function = function

    def process(self, events: Events) -> str | None:
        return self._function(events)


class Fed:
    """Stands between a pump and the user's code of one partition, and counts what that raises."""

    def __init__(
        self,
        make: Factory,
        partition: int,
        opened: set[Fed],
        failed: Callable[[int, Exception], None],
        fresh: Callable[[Slice], Slice] | None,
    ) -> None:
        self._partition = partition
        self._opened = opened
        self._failed = failed
        self._fresh = fresh
        with self._counted():
            self._user = make(partition)
        opened.add(self)

    def process(self, events: Slice) -> str | None:
        if self._fresh is not None:
            events = self._fresh(events)
        with self._counted():
            checkpoint: object = self._user.process(Events(events))
            if checkpoint is not None and not isinstance(checkpoint, str):
                raise TypeError(
                    f"process() must return the checkpoint, an offset such as events.next_offset, or None; not {checkpoint!r}"
                )
            return checkpoint

    def close(self, reason: CloseReason) -> None:
        self._opened.discard(self)
        close = getattr(self._user, "close", None)
        if close is not None:
            with self._counted():
                close(reason)

    @contextlib.contextmanager
    def _counted(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self._failed(self._partition, error)
            raise
