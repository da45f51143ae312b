"""A pump: the one thread that reads a partition, feeds its processor, and alone writes the checkpoint.

When anything fails the processor is dropped with all that it holds, and a new one starts at the last checkpoint. Faults
that time can heal (a store or disk that does not answer) are tried again for ever; a processor that fails `TRIES` times at
the same place is parked: nothing is skipped and the lease is kept, so that the partition stands still where people see it.
What the log or the archive itself says is wrong parks at once.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from typing import Any, Protocol

from penstock.clock import Clock
from penstock.errors import (
    ArchiveError,
    FrameDamaged,
    HubBroken,
    HubUnavailable,
    LostRace,
    OffsetBeyondEnd,
    OffsetTrimmed,
    PenstockError,
    ReaderFenced,
    StoreUnavailable,
    WrongHub,
)
from penstock.events import Slice
from penstock.hub import Hub
from penstock.processor import Checkpoint, CloseReason, Processor, ProcessorFactory
from penstock.processor.lease import Holding
from penstock.processor.skip import gone

POLL_S = 0.25
HUB_PAUSE_S = 2.0
HEARD_S = 5.0
READ_BYTES_MAX = 1 << 20
TRIES = 5
BACKOFF_S_MAX = 30.0


class Log(Protocol):
    """What of a logger is used: a fixed sentence and fields."""

    def info(self, event: str, **fields: Any) -> Any: ...
    def warning(self, event: str, **fields: Any) -> Any: ...
    def error(self, event: str, **fields: Any) -> Any: ...


class Pump:
    """One partition, from `start` until `stop`, the loss of its lease, or a `fatal` fault."""

    def __init__(
        self,
        hub: Hub,
        holding: Holding,
        factory: ProcessorFactory,
        *,
        clock: Clock,
        log: Log,
        lease_s: float,
        fatal: Callable[[Exception], None],
    ) -> None:
        self.partition = holding.lease.partition
        self.holding = holding
        self.ended = threading.Event()
        self.fenced = 0
        self._hub = hub
        self._factory = factory
        self._clock = clock
        self._log = log
        self._lease_s = lease_s
        self._fatal = fatal
        self._stop = threading.Event()
        self._reason: CloseReason | None = None
        self._processor: Processor | None = None
        self._offset = holding.lease.offset
        self._markers: tuple[object, ...] = ()
        self._due: Checkpoint | None = None
        self._checkpoint_waits = self._hub_waits = False
        self._parked: str | None = None
        self._heard_again_at = clock.monotonic()
        self._failures = 0
        self._tries = 0
        self._failed_to = -1
        self._furthest = int(self._offset)
        self._progress_at = clock.monotonic()
        self._thread = threading.Thread(target=self._run, name=f"pump-{self.partition}", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self, reason: CloseReason) -> None:
        """Read no more and close the processor with the first `reason` given. `ended` is set when that is done."""
        self._reason = self._reason or reason
        self._stop.set()

    @property
    def offset(self) -> str:
        """What is read next."""
        return self._offset

    @property
    def checkpoint(self) -> int:
        """Everything below this sequence number is done for good, if it is written in the lease yet or not."""
        return self._due.sequence_number if self._due else self.holding.lease.sequence_number

    @property
    def parked(self) -> str | None:
        """Why the partition stands still, if it does."""
        return self._parked

    def stalled_s(self) -> float:
        """Since when it has neither got further than ever before nor read the end of the log. A parked one stands on purpose."""
        return 0.0 if self._parked else self._clock.monotonic() - self._progress_at

    def _run(self) -> None:
        try:
            while not self._stop.is_set():
                pause_s = self._turn()
                if pause_s:
                    self._clock.wait(self._stop, pause_s)
            if self.holding.held:
                self._settle()
        except Exception as error:  # the top of the thread
            self._log.error("pump failed", partition=self.partition, exc_info=error)
            self._fatal(error)
        finally:
            self._close(self._reason or CloseReason.FAILED)
            self.ended.set()

    def _turn(self) -> float:
        """One read and what follows from it; the seconds to wait before the next."""
        doubt = self.holding.in_doubt(self._lease_s)
        if not self.holding.held:
            # Lost while we renewed in time: a living host took it to even out.
            self.stop(CloseReason.LEASE_LOST if doubt else CloseReason.REBALANCED)
            return 0.0
        if doubt:
            self._progress_at = self._clock.monotonic()  # it is not the processor that stands still
            return POLL_S
        try:
            return self._stand_still() if self._parked else self._step()
        except (HubBroken, WrongHub):
            raise
        except ReaderFenced as error:
            # A newer epoch reads: the lease is lost, whether or not this host has seen that in the store. If it has not, because somebody
            # deleted the lease and its epochs began anew, the next one must lie behind those that the hub knows.
            last = error.fields.get("last_epoch")
            self.fenced = last if isinstance(last, int) else 0
            self._log.warning("reader fenced", partition=self.partition, offset=self._offset, error=str(error))
            self.stop(CloseReason.LEASE_LOST)
        except OffsetTrimmed as error:
            # Of a host that was paused it may say no more than that another has taken its lease and got on.
            try:
                self.holding.renew()
            except (LostRace, StoreUnavailable):
                return POLL_S
            self._park(self._gone(error))
        except (OffsetBeyondEnd, FrameDamaged, ArchiveError) as error:
            self._park(error)
        except Exception as error:  # user code may raise anything
            return self._failed(error)
        return 0.0

    def _gone(self, error: OffsetTrimmed) -> OffsetTrimmed:
        """With what is to be done about it."""
        first, lease = error.fields.get("first"), self.holding.lease
        if not (isinstance(first, str) and first.isdigit() and int(lease.offset) < int(first)):
            return error
        said = gone(self.holding.group, self.partition, at=int(lease.offset), first=int(first))
        return OffsetTrimmed(said, **error.fields)

    def _stand_still(self) -> float:
        """Of a parked partition: a hub that is read over HTTP must hear of it, or its retention would not wait for it."""
        if self._clock.monotonic() >= self._heard_again_at:
            self._heard_again_at = self._clock.monotonic() + HEARD_S
            with contextlib.suppress(HubUnavailable):
                self._hub.bounds(self.partition)
        return POLL_S

    def _step(self) -> float:
        self._settle()
        try:
            events = self._hub.read(self.partition, self._offset, bytes_max=READ_BYTES_MAX)
        except HubUnavailable as error:
            # The processor has done nothing wrong and keeps what it has; the offset is the same.
            if not self._hub_waits:
                self._log.warning(
                    "hub does not answer", partition=self.partition, offset=self._offset, error=str(error)
                )
            self._hub_waits = True
            self._progress_at = self._clock.monotonic()
            return HUB_PAUSE_S
        self._hub_waits = False
        markers = _markers_at_end(events)
        # Markers take no sequence number: they are found again at the same offset, and then are nothing new.
        if events.next_offset == self._offset and markers == self._markers:
            if events.next_offset == events.end_offset:
                self._progress_at = self._clock.monotonic()
            return POLL_S
        if self._processor is None:
            self._processor = self._factory(self.partition)
        checkpoint = self._processor.process(events)
        if checkpoint is not None:
            self._due = _checked(checkpoint, events, self._hub.place_bits)
        self._offset, self._markers = events.next_offset, markers
        self._note_progress(int(events.next_offset))
        self._settle()
        # At the end of a log that is being written, a moment's patience makes one read of many commits.
        return POLL_S if self.holding.held and events.next_offset == events.end_offset else 0.0

    def _note_progress(self, reached: int) -> None:
        # Not simply "read something": a processor that fails again and again also reads the same again and again.
        if reached > self._furthest:
            self._furthest = reached
            self._progress_at = self._clock.monotonic()
        if self._failures and reached >= self._failed_to:
            self._log.info("processor goes on", partition=self.partition, after_failures=self._failures)
            self._failures, self._tries, self._failed_to = 0, 0, -1

    def _settle(self) -> None:
        """Write the checkpoint that is due. It stays due while the store does not answer; a lost lease is seen in `_turn`."""
        if self._due is None:
            return
        try:
            self.holding.checkpoint(*self._due)
        except LostRace:
            return
        except StoreUnavailable as error:
            if not self._checkpoint_waits:
                self._log.warning("checkpoint waits for the store", partition=self.partition, error=str(error))
            self._checkpoint_waits = True
            return
        self._due = None
        self._checkpoint_waits = False

    def _failed(self, error: Exception) -> float:
        """Drop the processor and go back to the last checkpoint; the seconds to wait."""
        self._failures += 1
        # Only getting past the place that failed ends the row of failures, not what lies between checkpoint and there.
        self._failed_to = max(self._failed_to, self._furthest, int(self._offset) + 1)
        heals = isinstance(error, OSError) or (isinstance(error, PenstockError) and error.retryable)
        if heals:
            if self._failures == 1:
                self._log.warning("processor waits", partition=self.partition, offset=self._offset, error=str(error))
        else:
            self._tries += 1
            self._log.error(
                "processor failed", partition=self.partition, offset=self._offset, tries=self._tries, exc_info=error
            )
        self._close(CloseReason.FAILED)
        self._offset = self._due.offset if self._due else self.holding.lease.offset
        self._markers = ()
        if self._tries >= TRIES:
            self._park(error)
        return float(min(2.0 ** min(self._failures - 1, 10), BACKOFF_S_MAX))

    def _park(self, error: Exception) -> None:
        self._close(CloseReason.FAILED)
        code = error.code if isinstance(error, PenstockError) else type(error).__name__
        self._parked = f"{code}: {error}"
        self._log.error(
            "partition parked", partition=self.partition, offset=self._offset, alarm=True, reason=self._parked
        )

    def _close(self, reason: CloseReason) -> None:
        processor, self._processor = self._processor, None
        if processor is None:
            return
        try:
            processor.close(reason)
        except Exception as error:  # user code may raise anything
            self._log.error("processor failed to close", partition=self.partition, exc_info=error)


def _markers_at_end(events: Slice) -> tuple[object, ...]:
    if not events.frames:
        return ()
    end = events.frames[-1].next
    return tuple(
        (frame.kind, frame.enqueued_at_ms) for frame in events.frames if frame.is_marker and frame.first == end
    )


def _checked(given: str | Checkpoint, events: Slice, place_bits: int) -> Checkpoint:
    checkpoint = Checkpoint(given, int(given) << place_bits) if isinstance(given, str) else given
    if int(checkpoint.offset) > int(events.next_offset):
        raise ValueError(
            f"process() returned the checkpoint {checkpoint.offset}, but was given only what is below {events.next_offset}"
        )
    return checkpoint
