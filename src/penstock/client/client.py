"""The client: takes events into a spool on disk, and sends them to the hub from there until it has answered for each.

    with Client("http://127.0.0.1:8480", spool="spool") as client:
        client.send({"deviceId": "d-1", "temperature": 21.4})
        client.flush(timeout_s=30)

`send` returns when the event would survive the death of this process, and at once: the network is the business of one thread for
each lane. A power cut takes at most what was sent in the last `GROUP_SYNC_S`; with `sync="each"`, nothing. What becomes of the events
in every other case is in answers.py (what the API says) and lane.py (what a crash leaves).
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import os
import random
import secrets
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

from penstock.access import Access
from penstock.client.records import RAW_BYTES_MAX, Event, line_of
from penstock.client.sending import Board, Rejected, Sender, Stats, headers_of
from penstock.client.spool import LaneOf, Spool
from penstock.client.transport import HttpTransport, Transport
from penstock.clock import Clock, SystemClock
from penstock.errors import FlushTimeout, SettingsError, SpoolClosed, SpoolFull
from penstock.events import DEVICE_FIELD
from penstock.files import Files

GROUP_SYNC_S = 0.05
CLOSE_S_MAX = 5.0
_IDLE_S = 1.0
_UNSEALED_MAX = 4
_SENDING_BYTES = 1 << 16


class Client:
    """A device's or gateway's way to the hub. Thread-safe.

    `url` is an address or a connection string, which brings its own key (access.py). `key`, the file of authorities `ca`, and the
    `certificate` that is shown to servers that ask for one: what is not given comes from PENSTOCK_URL, PENSTOCK_KEY and so on.
    `lanes`: how many batches may be under way; a device is always in the same, so its order is kept. `batch_events`, and `linger_s`
    after its first event, end a batch. A spool that holds `spool_bytes_max` bytes, from which the hub has taken nothing for
    `spool_age_s_max`, or whose disk is full, makes `send` raise SpoolFull, or wait (`when_full="block"`); nothing that was taken is
    dropped. (The age is measured while this process lives, since a device's clock may be wrong by years; the hub remembers a batch's
    number for 14 days.) `on_rejected` is called in a lane's thread for each event that the API will never take; each is also in
    `{spool}/dead`. What holds up the events is in `stats()`, and in the log `penstock.client`.
    """

    def __init__(
        self,
        url: str | Access | None = None,
        *,
        key: str | None = None,
        ca: str | None = None,
        certificate: str | None = None,
        certificate_key: str | None = None,
        spool: str | Path = "spool",
        lanes: int = 1,
        device_field: str = DEVICE_FIELD,
        batch_events: int = 1000,
        linger_s: float = 1.0,
        sync: Literal["group", "each"] = "group",
        spool_bytes_max: int = 1 << 30,
        spool_age_s_max: float = 13 * 86400.0,
        when_full: Literal["raise", "block"] = "raise",
        on_rejected: Callable[[Rejected], None] | None = None,
        timeout_s: float = 60.0,
        clock: Clock | None = None,
        files: Files | None = None,
        connect: Callable[[], Transport] | None = None,
    ) -> None:
        if lanes < 1 or batch_events < 1:
            raise SettingsError("A client needs at least one lane, and a batch at least one event.")
        self._folder = Path(spool)
        self._lane_count = lanes
        self._device_field = device_field
        self._batch_events = batch_events
        self._linger_s = linger_s
        self._sync = sync
        self._bytes_max = spool_bytes_max
        self._age_s_max = spool_age_s_max
        self._when_full = when_full
        self._clock: Clock = clock or SystemClock()
        self._files = files or Files()
        self._headers = headers_of(device_field)
        access = Access.from_environment(url, key=key, ca=ca, certificate=certificate, certificate_key=certificate_key)
        self._connect = connect or functools.partial(HttpTransport, access, timeout_s=timeout_s)
        self._board = Board(on_rejected, self._clock, lambda: self._spool.events)
        self._mutex = threading.RLock()
        self._here = _Here()
        self._taken = 0
        self._stop = threading.Event()
        self._wake = threading.Event()
        self._closed = self._forked = False
        self._unwritable: OSError | None = None
        self._unlooked = 0
        self._opened_at: dict[int, float] = {}
        self._connect().close()  # raises SettingsError for an address that cannot be one, before anything is touched
        self._spool = self._open_spool()
        self._lane_of = LaneOf(device_field, len(self._spool.lanes))
        self._senders: list[Sender] = []
        self._threads: list[threading.Thread] = []
        self._start()
        _clients.add(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def send(self, event: Event) -> None:
        """Take one event: a mapping, a msgspec Struct, or JSON in one line as bytes or text. Raises SpoolFull, SpoolClosed, OSError.

        None is taken when it raises; but with `sync="each"` an OSError of the sync leaves open whether it outlives a power cut.
        """
        self._take([line_of(event)])

    def send_many(self, events: Iterable[Event]) -> None:
        """Take events, in this order for each device. None is taken when one of them is no event, or has no room.

        After an OSError those of some lanes may be taken.
        """
        if lines := [line_of(event) for event in events]:
            self._take(lines)

    def flush(self, timeout_s: float = 60.0) -> None:
        """Return when the hub has answered for all that was taken until now. Raises FlushTimeout; the events stay in the spool."""
        with self._uninterrupted(), self._mutex:
            self._ready()
            for lane in self._spool.lanes:
                lane.rotate()
            marks = [(lane, lane.mark()) for lane in (*self._spool.lanes, *self._spool.left)]
            self._wake.set()
        until = self._clock.monotonic() + timeout_s
        while not all(lane.reached(mark) for lane, mark in marks):
            if self._clock.monotonic() >= until:
                raise FlushTimeout(
                    f"The hub has not answered for {self._spool.events} events within {timeout_s:g} s; they stay in {self._folder}. "
                    f"The last answer: {self._board.why or 'none'}"
                )
            with self._uninterrupted():
                self._clock.wait(self._board.changed, min(_IDLE_S, max(0.0, until - self._clock.monotonic())))
                self._board.changed.clear()

    def stats(self) -> Stats:
        """Counts since this client began, and what is in the spool now."""
        return self._board.stats(self._taken, self._spool.events, self._spool.bytes, self._spool.quarantined)

    def close(self, timeout_s: float = CLOSE_S_MAX) -> None:
        """Take no more. What was taken is durable, and sent by the next client on this spool; answers under way get `timeout_s`."""
        with self._mutex:
            if self._closed:
                return
            self._closed = True
        self._stop.set()
        self._wake.set()
        for sender in self._senders:
            sender.stop()
        until = self._clock.monotonic() + timeout_s
        for thread in self._threads:
            if thread is not threading.current_thread():  # it is in on_rejected
                thread.join(max(0.0, until - self._clock.monotonic()))
        for sender in self._senders:
            sender.abandon()
        self._spool.close()
        _clients.discard(self)

    def _open_spool(self) -> Spool:
        return Spool(
            self._folder,
            self._files,
            lanes=self._lane_count,
            device_field=self._device_field,
            now_ms=self._clock.now_ms,
            new_producer=lambda: f"c-{secrets.token_hex(8)}",
        )

    def _start(self) -> None:
        self._senders = [
            Sender(lane, self._connect(), self._board, self._clock, random.random, self._headers)
            for lane in (*self._spool.lanes, *self._spool.left)
        ]
        runs = [("seal", self._seal_all), *((f"lane-{n}", sender.run) for n, sender in enumerate(self._senders))]
        self._threads = [threading.Thread(target=run, name=f"penstock-{name}", daemon=True) for name, run in runs]
        for thread in self._threads:
            thread.start()

    def _ready(self) -> None:
        if self._forked:
            self._forked = False
            self._spool = self._open_spool()
            self._lane_of = LaneOf(self._device_field, len(self._spool.lanes))
            self._start()
        if self._closed:
            raise SpoolClosed("The client is closed; this event was not taken.")

    def _sorted(self, lines: list[bytes]) -> Iterable[tuple[int, list[bytes]]]:
        """Lines by lane; in one lane if there is but one."""
        if len(lines) == 1 or len(self._spool.lanes) == 1:
            return ((self._lane_of(lines[0]), lines),)
        lanes: dict[int, list[bytes]] = {}
        for line in lines:
            lanes.setdefault(self._lane_of(line), []).append(line)
        return lanes.items()

    def _take(self, lines: list[bytes]) -> None:
        here = self._here
        if here.inside:
            here.later.append(lines)
            return
        here.inside = True
        try:
            size = sum(map(len, lines))
            self._make_room(size)
            with self._mutex:
                self._ready()  # before their lanes are known: after a fork there may be other ones
                for number, own in self._sorted(lines):
                    self._put(number, own)
        finally:
            here.inside = False
            self._take_later()

    @contextlib.contextmanager
    def _uninterrupted(self) -> Iterator[None]:
        """What a signal handler sends while its thread is in here is taken when the thread comes out."""
        self._here.inside = True
        try:
            yield
        finally:
            self._here.inside = False
            self._take_later()

    def _take_later(self) -> None:
        """The handler's `send` has returned, so its events are taken whether there is room or not."""
        here = self._here
        while here.later:
            here.inside = True
            try:
                with self._mutex:
                    self._ready()
                    for number, own in self._sorted(here.later[0]):
                        self._put(number, own)
                here.later.popleft()
            finally:
                here.inside = False

    def _put(self, number: int, lines: list[bytes]) -> None:
        lane = self._spool.lanes[number]
        if lane.open_bytes + sum(map(len, lines)) > RAW_BYTES_MAX:
            lane.rotate()
        first = not lane.open_events
        lane.append(lines)
        self._taken += len(lines)
        if first:
            self._opened_at[number] = self._clock.monotonic()
            self._wake.set()
        if lane.open_events >= self._batch_events:
            # They are taken, so this must not raise. The other thread syncs too, and says what is wrong with the disk.
            with contextlib.suppress(OSError):
                lane.rotate()
            self._wake.set()
        if self._sync == "each":
            lane.sync()

    def _make_room(self, size: int) -> None:
        """Wait while batches are made slower than events come; and for a spool that is full or broken, if that is how it is set."""
        while not self._closed and not self._forked:
            full = self._full(size)
            if full and (self._when_full == "raise" or size > self._bytes_max):
                raise SpoolFull(
                    f"The spool in {self._folder} {full}. This event was not taken. "
                    f"The last answer of the API: {self._board.why or 'none'}"
                )
            if not full and self._spool.unsealed < _UNSEALED_MAX:
                return
            if (why := self._unwritable) and self._when_full == "raise":
                raise OSError(
                    why.errno, f"The spool in {self._folder} cannot be written. This event was not taken. {why}"
                )
            self._clock.wait(self._board.changed, GROUP_SYNC_S)
            self._board.changed.clear()

    def _full(self, size: int) -> str:
        """Why the spool takes no event of this size; empty if it does.

        To send needs a little room as well, a batch and its number are written first. If events took all, nothing could be sent any more.
        """
        if self._spool.bytes + size > self._bytes_max:
            return f"holds {self._spool.bytes} bytes and may hold {self._bytes_max}; these would be {size} more"
        if not self._spool.events:
            self._board.begin()
        silent_s = self._clock.monotonic() - self._board.settled_at
        if silent_s > self._age_s_max:
            return f"waits since {silent_s:.0f} s for the hub to take anything, and may wait {self._age_s_max:.0f} s"
        self._unlooked -= size
        if self._unlooked < 0:
            free = self._files.free_bytes(self._folder)
            room = free - size - _SENDING_BYTES - sum(lane.open_bytes for lane in self._spool.lanes)
            if room < 0:
                return f"has {free} bytes left on its disk, and needs them to send what it holds"
            self._unlooked = min(room // 2, _SENDING_BYTES)
        return ""

    def _seal_all(self) -> None:
        """The thread that syncs, ends batches that are old enough, and seals them."""
        while not self._stop.is_set():
            try:
                busy = self._seal_once()
                self._unwritable = None
                self._board.well()
            except OSError as error:
                self._unwritable = error
                self._board.trouble(f"The spool cannot be written: {error}")
                busy = True
            self._clock.wait(self._wake, GROUP_SYNC_S if busy else _IDLE_S)
            self._wake.clear()

    def _seal_once(self) -> bool:
        """Whether something is still open."""
        now = self._clock.monotonic()
        for number, lane in enumerate(self._spool.lanes):
            try:
                lane.sync()
            except OSError:
                # The next sync may succeed without what this one lost, so the events are written anew, as a batch.
                with self._mutex:
                    lane.rotate()
                raise
            with self._mutex:
                if lane.open_events and now - self._opened_at.get(number, now) >= self._linger_s:
                    lane.rotate()
        for lane, sender in zip((*self._spool.lanes, *self._spool.left), self._senders, strict=True):
            while not self._stop.is_set() and lane.seal():
                sender.wake.set()
                self._board.changed.set()
                if self._clock.monotonic() - now >= GROUP_SYNC_S:
                    # The next sync is due, also when a lane's events come as fast as they are sealed.
                    self._wake.set()
                    break
        return any(lane.open_events for lane in self._spool.lanes)

    def _forget_threads(self) -> None:
        """In the child after a fork: the threads, the set and its files are the parent's. The child opens a set of its own."""
        self._forked = True
        self._taken = 0
        self._mutex = threading.RLock()
        self._here = _Here()
        self._stop, self._wake = threading.Event(), threading.Event()
        self._board = self._board.anew()
        self._spool.abandon()


class _Here(threading.local):
    """What a thread knows of itself: whether it is taking events, and what its signal handler has sent meanwhile."""

    def __init__(self) -> None:
        self.inside = False
        self.later: deque[list[bytes]] = deque()


_clients: weakref.WeakSet[Client] = weakref.WeakSet()


def _in_child() -> None:
    for client in list(_clients):
        client._forget_threads()


def _at_exit() -> None:
    for client in list(_clients):
        if not client._forked:
            client.close()


os.register_at_fork(after_in_child=_in_child)
atexit.register(_at_exit)
