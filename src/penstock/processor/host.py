"""A host: takes leases of a group's partitions, runs a pump for each, and evens out with the other hosts.

Hosts share nothing but the lease blobs. Each looks at them (`watch.py`) twenty times in a lease time and just when one
expires, in a thread of its own, so that leases are renewed whatever the processors do. No clock is compared with another
host's: a lease has expired when this host has seen the same write of it for the lease time on its own monotonic clock.
"""

from __future__ import annotations

import secrets
import threading
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Self

import msgspec

from penstock.blobs import BlobStore
from penstock.clock import Clock
from penstock.errors import LostRace, PenstockError, StoreError, WrongHub
from penstock.hub import Hub
from penstock.processor import CloseReason, ProcessorFactory
from penstock.processor.balance import Plan, View, plan
from penstock.processor.lease import (
    Each,
    Holding,
    Start,
    Writer,
    claim,
    decode_lease,
    lease_name,
    one_by_one,
    released,
    renewed,
    take_over,
)
from penstock.processor.moves import Moves
from penstock.processor.pump import Log, Pump
from penstock.processor.watch import LOOKS, Seen, Watch

STOP_S_MAX = 5.0
RENEWALS_AT_ONCE = 32
WAKE_S = 0.5


class PumpState(msgspec.Struct, frozen=True):
    """A partition that this host reads. `offset` is read next; everything below `checkpoint` is done for good."""

    partition: int
    epoch: int
    offset: str
    checkpoint: int
    stalled_s: float
    parked: str | None


class EventProcessorHost:
    """Runs a processor for each partition of `group` that it gets.

    `start` says where a partition begins that has no lease (default: at the first event kept).
    A pump without progress for `stuck_s` (default: ten lease times) gives its lease back. `each` may renew several leases at once.
    """

    def __init__(
        self,
        *,
        hub: Hub,
        store: BlobStore,
        group: str,
        name: str,
        clock: Clock,
        log: Log,
        lease_s: float = 30.0,
        stuck_s: float | None = None,
        start: Callable[[int], Start] | None = None,
        instance: str | None = None,
        each: Each = one_by_one,
    ) -> None:
        self.name = name
        self._each = each
        self._hub = hub
        self._store = store
        self._group = group
        self._clock = clock
        self._log = log
        self._lease_s = lease_s
        self._stuck_s = 10 * lease_s if stuck_s is None else stuck_s
        self._start = start or self._first_kept
        self._writer = Writer(name, instance or secrets.token_hex(8))
        self._pumps: dict[int, Pump] = {}
        self._leaving: dict[int, Pump] = {}
        self._cool_until: dict[int, float] = {}
        self._troubles: set[tuple[int | None, str]] = set()
        self._epochs: dict[int, int] = {}
        self._fenced: dict[int, int] = {}
        self._watch = Watch(
            store,
            group,
            hub.partitions(),
            me=name,
            clock=clock,
            lease_s=lease_s,
            trouble=self._not_read,
            between=self._between,
        )
        self._moves = Moves(store, group, clock=clock, log=log)
        self._stop = threading.Event()
        self._done = threading.Event()
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def run(self, factory: ProcessorFactory) -> None:
        """`start`, then block until the host is stopped. Raises what ended it, if that was not `stop`."""
        self.start(factory)
        try:
            # In turns: a signal may reach another thread (after SIGCONT it often does), and Python handles it when this one wakes up.
            while not self._done.wait(WAKE_S):
                continue
        finally:
            self.stop()
        if self._error is not None:
            raise self._error

    def start(self, factory: ProcessorFactory) -> None:
        """Begin in the background. `factory(partition)` is called in the partition's own thread."""
        self._thread = threading.Thread(target=self._run, args=(factory,), name="host", daemon=True)
        self._thread.start()

    def ask_stop(self) -> None:
        """Stop soon; does not wait, so a signal handler may call it."""
        self._stop.set()

    def stop(self) -> None:
        """Close the processors, write their checkpoints, give the leases back. Waits for it."""
        self._stop.set()
        if self._thread is None:
            self._shut()
        else:
            self._done.wait()

    @property
    def error(self) -> Exception | None:
        """What ended the host, if it did not end on request."""
        return self._error

    def state(self) -> list[PumpState]:
        """The partitions that this host reads now."""
        return [
            PumpState(
                partition=pump.partition,
                epoch=pump.holding.lease.epoch,
                offset=pump.offset,
                checkpoint=pump.holding.lease.sequence_number,
                stalled_s=pump.stalled_s(),
                parked=pump.parked,
            )
            for _, pump in sorted(self._pumps.copy().items())
        ]

    def epoch(self, partition: int) -> int:
        """The epoch under which this host reads the partition; 0 if it does not."""
        pump = self._pumps.get(partition)
        return pump.holding.lease.epoch if pump else 0

    def checkpoint(self, partition: int) -> int:
        """The sequence number up to which the partition's processors of this host have done everything; 0 if it has none."""
        pump = self._pumps.get(partition)
        return pump.checkpoint if pump else 0

    def round(self, factory: ProcessorFactory) -> None:
        """Renew what is due, look at the rest, take what `plan` says. The thread does it `LOOKS` times in a lease time."""
        self._leaving = {p: pump for p, pump in self._leaving.items() if not pump.ended.is_set()}
        self._renew_due()
        try:
            touched = self._watch.look({p: pump.holding.lease.token for p, pump in self._pumps.items()})
        except StoreError as error:
            self._trouble(None, "leases not listed", error)
            return
        self._well(None, "leases not listed")
        self._renew([self._pumps[partition] for partition in touched if partition in self._pumps])
        for partition in self._chosen():
            if self._stop.is_set():
                return
            self._take(partition, factory)
            self._renew_due()

    def _renew_due(self) -> None:
        """Between any two calls of the store that may be slow: what was taken first must not expire while the last is taken."""
        due = [pump for pump in list(self._pumps.values()) if self._is_due(pump)]
        self._renew(sorted(due, key=lambda pump: pump.holding.age_s(), reverse=True))

    def _chosen(self) -> Sequence[int]:
        """The partitions to take in this round."""
        confirmed: set[str] = set()
        while True:
            chosen = self._plan()
            if chosen.steal is None:
                return chosen.claim
            seen = self._watch.seen(chosen.steal)
            assert seen is not None, "only what somebody has is stolen"
            if seen.lease.owner in confirmed:
                # By now it may have been renewed again: a store that is slow takes long for all that a victim has.
                return (chosen.steal,) if self._watch.has(seen.lease.owner, chosen.steal) else ()
            self._watch.confirm(seen.lease.owner)
            confirmed.add(seen.lease.owner)

    def _plan(self) -> Plan:
        return plan([self._view(partition) for partition in range(self._hub.partitions())], self.name)

    def _run(self, factory: ProcessorFactory) -> None:
        try:
            while not self._stop.is_set():
                self.round(factory)
                pause_s = min(self._lease_s / LOOKS, self._watch.expires_in())
                self._clock.wait(self._stop, max(pause_s, self._lease_s / LOOKS / 10))
        except Exception as error:  # the top of the thread
            self._fail(error)
        finally:
            try:
                self._shut()
            except Exception as error:  # the top of the thread, and others wait for its end
                self._error = self._error or error
            finally:
                self._done.set()

    def _is_due(self, pump: Pump) -> bool:
        """Whether to renew: three times in a lease time, and when the lease is lost. Gives back what has to be given back."""
        if pump.holding.held and pump.ended.is_set():
            self._give_back(pump, CloseReason.FAILED, "a newer epoch reads" if pump.fenced else "processor ended")
            return False
        if pump.holding.held and pump.stalled_s() > self._stuck_s:
            self._give_back(pump, CloseReason.STUCK, "processor stuck")
            return False
        return not pump.holding.held or pump.holding.age_s() >= self._lease_s / 3

    def _renew(self, pumps: Sequence[Pump]) -> None:
        for pump, error in zip(pumps, self._each(renewed, [pump.holding for pump in pumps]), strict=True):
            if isinstance(error, LostRace):
                self._lost(pump)
            elif error is not None:
                self._trouble(pump.partition, "lease not renewed", error)
            else:
                self._well(pump.partition, "lease not renewed")

    def _lost(self, pump: Pump) -> None:
        doubt = pump.holding.in_doubt(self._lease_s)
        self._let_go(pump, CloseReason.LEASE_LOST if doubt else CloseReason.REBALANCED)
        self._log.warning("lease lost", partition=pump.partition, epoch=pump.holding.lease.epoch)
        try:
            taker = decode_lease(self._store.get(lease_name(self._group, pump.partition)).body, pump.partition)
        except StoreError:
            return
        # A token of this very instance: our own write whose answer was lost.
        if taker.owner == self.name and taker.instance != self._writer.instance:
            self._fail(
                LostRace(
                    f"another host named {self.name!r} runs in group {self._group!r}: give each host a name of its own",
                    host=self.name,
                    group=self._group,
                )
            )

    def _give_back(self, pump: Pump, reason: CloseReason, why: str) -> None:
        # Others need a chance to take it before we do.
        self._cool_until[pump.partition] = self._clock.monotonic() + 2 * self._lease_s
        self._fenced[pump.partition] = pump.fenced
        self._let_go(pump, reason)
        self._log.error(why, partition=pump.partition, offset=pump.offset, stalled_s=round(pump.stalled_s(), 1))
        self._release(pump)

    def _let_go(self, pump: Pump, reason: CloseReason) -> None:
        """The thread ends when `process` returns; until then this host does not read the partition again."""
        pump.stop(reason)
        self._leaving[pump.partition] = pump
        del self._pumps[pump.partition]

    def _release(self, pump: Pump) -> None:
        self._say_released(pump, released(pump.holding))

    def _say_released(self, pump: Pump, error: StoreError | None) -> None:
        if isinstance(error, LostRace):
            return
        if error is not None:
            self._log.warning("lease not given back", partition=pump.partition, error=str(error))
            return
        self._log.info("lease given back", partition=pump.partition, checkpoint=pump.holding.lease.sequence_number)

    def _view(self, partition: int) -> View:
        """What can be said of a partition after this look. What cannot be read is not free."""
        if partition in self._pumps:
            return View(partition, self.name, free=False)
        seen = self._watch.seen(partition)
        if seen is not None:
            self._epochs[partition] = max(seen.lease.epoch, self._epochs.get(partition, 0))
        barred = partition in self._leaving or self._cool_until.get(partition, 0.0) > self._clock.monotonic()
        if not self._watch.known(partition):
            return View(partition, None, free=False)
        if seen is None or seen.lease.owner in ("", self.name) or self._watch.expired(partition):
            return View(partition, None, free=not barred)
        return View(partition, None if barred else seen.lease.owner, free=False)

    def _take(self, partition: int, factory: ProcessorFactory) -> None:
        seen = self._watch.seen(partition)
        try:
            holding = self._claimed(partition, seen)
        except LostRace:
            return
        except WrongHub:
            raise
        except PenstockError as error:
            self._trouble(partition, "lease not taken", error)
            return
        lease = holding.lease
        self._epochs[partition] = lease.epoch
        self._troubles.discard((partition, "lease not taken"))
        self._log.info(
            "lease taken",
            partition=partition,
            epoch=lease.epoch,
            checkpoint=lease.sequence_number,
            from_owner=seen.lease.owner if seen else None,
        )
        pump = Pump(
            self._hub,
            holding,
            factory,
            clock=self._clock,
            log=self._log,
            lease_s=self._lease_s,
            fatal=self._fail,
        )
        self._pumps[partition] = pump
        pump.start()
        self._moves.note(lease, seen.lease if seen else None, expired=self._watch.expired(partition))

    def _claimed(self, partition: int, seen: Seen | None) -> Holding:
        if seen is not None:
            least = self._fenced.get(partition, 0) + 1
            return take_over(
                self._store, self._clock, self._group, seen.lease, seen.etag, self._writer, epoch_least=least
            )
        # An epoch that was seen never comes again, not even when somebody deleted the lease.
        start = self._start(partition)
        before = max(self._epochs.get(partition, 0), self._fenced.get(partition, 0))
        start = start._replace(epoch=max(start.epoch, before + 1))
        return claim(self._store, self._clock, self._group, partition, self._writer, start=start)

    def _first_kept(self, partition: int) -> Start:
        first = self._hub.bounds(partition).first
        return Start(str(first), first)

    def _shut(self) -> None:
        """All pumps are told before the first is waited for. One whose `process` does not return loses its lease all the same."""
        pumps = list(self._pumps.values())
        for pump in pumps:
            pump.stop(CloseReason.SHUTDOWN)
        until = self._clock.monotonic() + STOP_S_MAX
        for pump in pumps:
            if not self._clock.wait(pump.ended, max(0.0, until - self._clock.monotonic())):
                self._log.warning("processor did not end", partition=pump.partition, offset=pump.offset)
        self._pumps.clear()
        for pump, error in zip(pumps, self._each(released, [pump.holding for pump in pumps]), strict=True):
            self._say_released(pump, error)

    def _fail(self, error: Exception) -> None:
        if self._error is None:
            self._error = error
            self._log.error("host ends", host=self.name, group=self._group, error=str(error), exc_info=error)
        self._stop.set()

    def _between(self) -> bool:
        self._renew_due()
        return not self._stop.is_set()

    def _not_read(self, partition: int, error: StoreError | None) -> None:
        if error is None:
            self._well(partition, "lease not read")
        else:
            self._trouble(partition, "lease not read", error)

    def _trouble(self, partition: int | None, sentence: str, error: PenstockError) -> None:
        if (partition, sentence) not in self._troubles:
            self._troubles.add((partition, sentence))
            self._log.warning(sentence, partition=partition, error=str(error))

    def _well(self, partition: int | None, sentence: str) -> None:
        if (partition, sentence) in self._troubles:
            self._troubles.remove((partition, sentence))
            self._log.info("lease reached again", partition=partition)
