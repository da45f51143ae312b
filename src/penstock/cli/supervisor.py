"""The process tree of `penstock up`: starts the parts, starts again what dies, stops all.

The supervisor opens no hub and no store, has one thread, and waits for signals only, so there is little in it that can
fail. Its children die with it (PR_SET_PDEATHSIG): nobody writes to a data folder whose lock has gone. Linux only.

Stopping goes in stages: API workers first, so that what they answered is committed, then the archiver, which gives its
leases back.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import signal
import struct
import sys
from collections.abc import Callable, Sequence
from typing import Final

import msgspec

from penstock.clock import Clock, timestamp
from penstock.errors import HubBroken
from penstock.server.parts import PartState
from penstock.telemetry.log import Log

EXIT_HUB_BROKEN: Final = 70
LOCK_HELD_MOST_S: Final = 5.0
_BACKOFF_FIRST_S, _BACKOFF_MOST_S, _WELL_AFTER_S = 0.1, 10.0, 30.0
_TICK_S, _STARTING_TICK_S = 0.2, 0.02
_STOP = frozenset({signal.SIGTERM, signal.SIGINT, signal.SIGHUP})
_SIGNALS = _STOP | {signal.SIGCHLD}
_PR_SET_PDEATHSIG = 1
_HELD = struct.Struct("<q")


class Part(msgspec.Struct, frozen=True):
    """A process to be. `run` is called in the child and returns its exit code; SIGTERM asks it to return.

    `held` are 8 bytes shared with the child: since which monotonic millisecond it has had the hub's write lock, or 0.
    """

    name: str
    run: Callable[[], int]
    stage: int = 0
    held: memoryview | None = None


class _Running:
    def __init__(self, part: Part) -> None:
        self.part = part
        self.pid = 0
        self.since_ms = 0
        self.since = 0.0
        self.restarts = -1
        self.backoff_s = _BACKOFF_FIRST_S
        self.due = 0.0


def shared_slots(count: int) -> list[memoryview]:
    """`count` times 8 bytes of zeros that this process shares with those it forks."""
    view = memoryview(mmap.mmap(-1, max(1, count) * _HELD.size))
    return [view[i * _HELD.size : (i + 1) * _HELD.size] for i in range(count)]


class Supervisor:
    """`record` is called with the running parts after each change, `ready` each tick until it is True, then `announce`."""

    def __init__(
        self,
        parts: Sequence[Part],
        *,
        clock: Clock,
        log: Log,
        stop_timeout_s: float,
        record: Callable[[Sequence[PartState]], None],
        ready: Callable[[], bool],
        announce: Callable[[], None],
    ) -> None:
        self._running = [_Running(part) for part in parts]
        self._clock = clock
        self._log = log
        self._stop_timeout_s = stop_timeout_s
        self._record = record
        self._ready = ready
        self._announce = announce

    def run(self) -> None:
        """Returns when SIGTERM, SIGINT or SIGHUP came and every part has ended."""
        # Blocked, not handled: a signal that comes between two waits stays pending, and none interrupts anything.
        self._mask = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
        announced = False
        try:
            while True:
                self._start_due()
                got = signal.sigtimedwait(_SIGNALS, _TICK_S if announced else _STARTING_TICK_S)
                if got and got.si_signo in _STOP:
                    break
                self._reap()
                self._watch_locks()
                if not announced and self._ready():
                    announced = True
                    self._announce()
            self._stop()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, self._mask)

    def _start_due(self) -> None:
        now = self._clock.monotonic()
        started = False
        for running in self._running:
            if running.pid == 0 and running.due <= now:
                self._start(running)
                started = True
        if started:
            self._tell()

    def _start(self, running: _Running) -> None:
        if running.part.held is not None:
            _HELD.pack_into(running.part.held, 0, 0)
        sys.stdout.flush()
        sys.stderr.flush()
        parent = os.getpid()
        pid = os.fork()
        if pid == 0:
            os._exit(_child(running.part, parent, self._mask, self._log))
        running.pid = pid
        running.since, running.since_ms = self._clock.monotonic(), self._clock.now_ms()
        running.restarts += 1
        self._log.info("Part started.", name=running.part.name, pid=pid, restarts=running.restarts)

    def _tell(self) -> None:
        alive = [running for running in self._running if running.pid]
        self._record([PartState(r.part.name, r.pid, timestamp(r.since_ms), r.restarts) for r in alive])

    def _reap(self) -> None:
        codes = self._ended()
        if EXIT_HUB_BROKEN in codes:
            # What is in memory may not be what is on disk: only processes that open the environment anew know.
            self._log.error("The hub's storage failed: all parts are started again.")
            self._signal(self._running, signal.SIGKILL)
        if codes:
            self._tell()

    def _ended(self) -> list[int]:
        codes = []
        for running in self._running:
            if running.pid == 0:
                continue
            pid, status = os.waitpid(running.pid, os.WNOHANG)
            if pid == 0:
                continue
            code = os.waitstatus_to_exitcode(status)
            codes.append(code)
            now = self._clock.monotonic()
            if now - running.since >= _WELL_AFTER_S:
                running.backoff_s = _BACKOFF_FIRST_S
            running.due = now + running.backoff_s
            self._log.warning(
                "Part ended.",
                name=running.part.name,
                pid=pid,
                code=code,
                alive_s=round(now - running.since, 3),
                again_in_s=running.backoff_s,
            )
            running.backoff_s = min(2 * running.backoff_s, _BACKOFF_MOST_S)
            running.pid = 0
        return codes

    def _watch_locks(self) -> None:
        """A worker that is stopped or hangs inside a commit would keep all others waiting; its death frees the lock."""
        now_ms = self._clock.monotonic() * 1000
        for running in self._running:
            if running.pid == 0 or running.part.held is None:
                continue
            since_ms = _HELD.unpack_from(running.part.held)[0]
            if since_ms and now_ms - since_ms > LOCK_HELD_MOST_S * 1000:
                self._log.error("Part holds the hub's write lock too long: killed.", name=running.part.name)
                _HELD.pack_into(running.part.held, 0, 0)
                self._signal([running], signal.SIGKILL)

    def _signal(self, all_of: Sequence[_Running], what: signal.Signals) -> None:
        for running in all_of:
            if running.pid:
                os.kill(running.pid, what)

    def _stop(self) -> None:
        """Every stage gets what is left of the time, but two thirds at most if another comes after it."""
        self._log.info("Stopping.")
        stages = sorted({running.part.stage for running in self._running})
        end = self._clock.monotonic() + self._stop_timeout_s
        for stage in stages:
            members = [running for running in self._running if running.part.stage == stage]
            left_s = end - self._clock.monotonic()
            until = end if stage == stages[-1] else self._clock.monotonic() + left_s * 2 / 3
            self._signal(members, signal.SIGTERM)
            self._await_end(members, until)
            late = [running.part.name for running in members if running.pid]
            if late:
                self._log.warning("Parts did not end in time: killed.", names=late)
                self._signal(members, signal.SIGKILL)
                for running in members:
                    if running.pid:
                        os.waitpid(running.pid, 0)
                        running.pid = 0
        self._tell()
        self._log.info("Stopped.")

    def _await_end(self, members: Sequence[_Running], until: float) -> None:
        while True:
            for running in members:
                if running.pid and os.waitpid(running.pid, os.WNOHANG)[0]:
                    running.pid = 0
            left_s = until - self._clock.monotonic()
            if left_s <= 0 or not any(running.pid for running in members):
                return
            signal.sigtimedwait(_SIGNALS, min(left_s, _TICK_S))


def _child(part: Part, parent: int, mask: set[int | signal.Signals], log: Log) -> int:
    die_with_parent()
    if os.getppid() != parent:
        return 1
    # A terminal sends Ctrl-C to all; the supervisor decides when each part ends.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    try:
        code = part.run()
    except HubBroken as error:
        log.error("The hub's storage failed.", name=part.name, detail=error.detail)
        code = EXIT_HUB_BROKEN
    except BaseException:  # the top of the process: logged once, and the supervisor decides
        log.exception("Part failed.", name=part.name)
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    return code


def die_with_parent() -> None:
    """Have the kernel kill this process when the thread that forked it ends."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
