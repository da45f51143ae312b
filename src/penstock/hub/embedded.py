"""The embedded hub: every partition and every producer's number in one LMDB environment (docs/formats.md, The embedded hub).

One write transaction and one sync carry the frames of all partitions and the producers' entries, so a crash leaves all of a batch
or nothing, and a batch that comes again is recognised by what was committed with it. LMDB writes pages that nothing refers to, syncs
them, and then the meta page that makes them the tree: there is no log to replay and no tail to repair after a power cut.

Several processes may open the same environment, each after its fork and once. Writers wait for LMDB's lock; it is robust, so
the death of its holder frees it. Readers are copied out of and ended before anything is processed, because an open one keeps
freed pages from being used again.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

import lmdb
import msgspec

from penstock.clock import Clock, timestamp
from penstock.errors import (
    HubError,
    NotFound,
    OffsetBeyondEnd,
    SettingsError,
    StorageFull,
)
from penstock.events import Appended, Batch, Bounds, FrameKind, Slice
from penstock.hub import Refused
from penstock.hub.commit import Commit, Positions
from penstock.hub.expiry import Expiry
from penstock.hub.groups import Groups
from penstock.hub.layout import MARKER, META_HUB, META_POSITIONS, Databases, Meta, open_environment
from penstock.hub.producers import DAY_MS, Producer, decode, window_ms
from penstock.hub.reading import (
    Resident,
    decode_all,
    enqueued_at_ms,
    extent,
    is_open,
    locate,
    reading,
    records,
)
from penstock.hub.writing import Writer
from penstock.wire.draft import drafts
from penstock.wire.frame import FRAME_BYTES_MAX

if TYPE_CHECKING:
    from lmdb import _Database as Database

FULL_AT = 0.9
DELETES_AT_ONCE = 1000
RESIDENT_BYTES_MAX = 32 << 20


class Usage(msgspec.Struct, frozen=True):
    """Disk: `used` of `limit` bytes hold data; intake is refused at 90 %. `reader_lag`: commits since the oldest open read began."""

    used: int
    limit: int
    full: bool
    reader_lag: int


def create(folder: Path, *, partitions: int, period_s: int, bytes_max: int, clock: Clock) -> None:
    """Make the hub in `folder`, or check the one that is there. Raises SettingsError when that has other partitions or another period."""
    folder.mkdir(parents=True, exist_ok=True)
    with open_environment(folder, bytes_max, read_only=False) as env, env.begin(write=True) as txn:
        databases = Databases.create(env, txn, partitions)
        found = txn.get(META_HUB, db=databases.meta)
        if found is None:
            meta = Meta.new(partitions, period_s, timestamp(clock.now_ms()))
            txn.put(META_HUB, msgspec.json.encode(meta), db=databases.meta)
            txn.put(META_POSITIONS, bytes(Positions.bytes_for(partitions)), db=databases.meta)
            return
        meta = Meta.decode(found)
        if (meta.partitions, meta.period_s) != (partitions, period_s):
            txn.abort()
            raise SettingsError(
                f"The hub in {folder} was created with {meta.partitions} partitions and a period of {meta.period_s} s; "
                f"{partitions} partitions and {period_s} s were asked for. Both are fixed at creation: start with the values "
                "it has, or on another data folder."
            )


class EmbeddedHub:
    """The hub of one data folder, open in this process. Thread-safe. `held` is for the supervisor (writing.Writer)."""

    def __init__(
        self,
        folder: Path,
        *,
        bytes_max: int,
        clock: Clock,
        read_only: bool = False,
        held: memoryview | None = None,
        frame_bytes_max: int = FRAME_BYTES_MAX,
    ) -> None:
        self._clock = clock
        self._frame_bytes_max = frame_bytes_max
        self._env = open_environment(folder, bytes_max, read_only=read_only)
        try:
            self._databases = Databases.open(self._env)
            with self._env.begin() as txn:
                self._meta = Meta.decode(txn.get(META_HUB, db=self._databases.meta))
        except lmdb.Error as error:
            self._env.close()
            raise SettingsError(f"There is no hub in {folder}: {error}.") from error
        self._writer = Writer(self._env, folder, clock, held)
        self.groups = Groups(self._env, self._databases, self._writer, clock)
        self._resident = Resident(folder / "data.mdb", bytes_max=RESIDENT_BYTES_MAX)
        # LMDB lets go of the interpreter at each record and the checksum at each body: threads that read at once would spend their time on
        # passing it on. So all of a read is one turn, and only what a reader does with its frames goes on beside it.
        self._turn = threading.Lock()
        self._expiry = Expiry(self._env, self._databases, self._writer, clock)

    def __enter__(self) -> EmbeddedHub:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Free the map. No other call may be running."""
        self._resident.close()
        self._env.close()

    @property
    def id(self) -> str:
        return self._meta.hub

    @property
    def period_s(self) -> int:
        return self._meta.period_s

    @property
    def place_bits(self) -> int:
        return 0

    def partitions(self) -> int:
        return self._meta.partitions

    def append(self, batches: Sequence[Batch]) -> Sequence[Appended | Refused]:
        ready = drafts(batches, frame_bytes_max=self._frame_bytes_max)
        with self._writer.transaction() as txn:
            if self._is_full(txn):
                raise StorageFull(
                    f"The hub holds {FULL_AT:.0%} of its {self._env.info()['map_size']} bytes. Nothing of this batch was stored: keep "
                    "it and send it again; events are deleted when they are archived and older than the retention."
                )
            commit = Commit(txn, self._databases, self._meta, self._clock.now_ms())
            answers = commit.add(batches, ready, frame_bytes_max=self._frame_bytes_max)
            commit.finish()
        self._resident.bound()
        return answers

    def _is_full(self, txn: lmdb.Transaction) -> bool:
        info = self._env.info()
        page_bytes: int = self._databases.page_bytes
        if (info["last_pgno"] + 1) * page_bytes < info["map_size"] * FULL_AT:
            return False
        used: int = self._databases.used_pages(txn) * page_bytes
        return bool(used >= info["map_size"] * FULL_AT)

    def read(self, partition: int, offset: str, *, bytes_max: int) -> Slice:
        start = self._number(offset)
        database = self._database(partition)
        with self._turn, reading(self._env, views=True) as txn:
            end = self._positions(txn).next(partition)
            if start > end:
                raise OffsetBeyondEnd(
                    f"Offset {start} of partition {partition} lies beyond the end of the log, {end}.", end=str(end)
                )
            frames = decode_all(records(txn.cursor(database), start, end, partition, bytes_max), partition, start)
        self._resident.bound()
        reached = max((read.next for read in frames), default=start)
        return Slice(partition, offset, frames, str(max(reached, start)), str(end))

    def bounds(self, partition: int) -> Bounds:
        database = self._database(partition)
        with reading(self._env) as txn:
            positions = self._positions(txn)
            end = positions.next(partition)
            cursor = txn.cursor(database)
            first, first_ms = end, positions.floor_ms
            if cursor.first():
                first, first_ms = min(end, extent(cursor)[0]), enqueued_at_ms(cursor)
            return Bounds(first, end, self._databases.bytes_of(txn, database), first_ms, positions.floor_ms)

    def locate(self, partition: int, at_ms: int) -> str:
        database = self._database(partition)
        with reading(self._env) as txn:
            end = self._positions(txn).next(partition)
            return str(locate(txn.cursor(database), end, at_ms))

    def cut(self) -> Sequence[str]:
        with self._writer.transaction() as txn:
            commit = Commit(txn, self._databases, self._meta, self._clock.now_ms())
            ends = [str(commit.mark(partition, FrameKind.CUT_MARKER)) for partition in range(self._meta.partitions)]
            commit.finish()
        return ends

    def trim(self, partition: int, *, before: str) -> None:
        """Drop whole frames that end at or before offset `before`, in small transactions, so that intake waits for none of them long."""
        limit = self._number(before)
        database = self._database(partition)
        while True:
            with self._writer.transaction() as txn:
                deleted = events = 0
                end = self._positions(txn).next(partition)
                cursor = txn.cursor(database)
                more = cursor.first()
                while more and deleted < DELETES_AT_ONCE:
                    number, following, kind = extent(cursor)
                    # A marker at the end is kept: readers have yet to see it.
                    if following > limit or (kind == MARKER and number >= end):
                        break
                    more = cursor.delete() and cursor.key()  # True behind the last one, too
                    deleted += 1
                    events += following - number
                if events:
                    commit = Commit(txn, self._databases, self._meta, 0)
                    commit.count("trimmed_events", events)
                    commit.finish()
                if deleted < DELETES_AT_ONCE:
                    self._trim_accepted(txn, partition)
            self._resident.bound()
            if deleted < DELETES_AT_ONCE:
                return

    def _trim_accepted(self, txn: lmdb.Transaction, partition: int) -> None:
        cursor = txn.cursor(self._database(partition))
        since = enqueued_at_ms(cursor) if cursor.first() else self._positions(txn).floor_ms
        since -= since % (self._meta.period_s * 1000)
        counts = txn.cursor(self._databases.accepted)
        more = counts.first()
        while more:
            start_ms, of = Databases.ACCEPTED.unpack(counts.key())
            if start_ms >= since:
                return
            more = counts.delete() and counts.key() if of == partition else counts.next()

    def maintain(self, *, expire: bool = True) -> None:
        """Once a second or so, from any one thread: time markers, dead readers, how far the groups that read over HTTP are, and
        producers that were not heard of for 14 days (for a day, those that stand for an Idempotency-Key).

        Without `expire` all producers are kept: for when the clock cannot be trusted.
        """
        try:
            self._env.reader_check()
        except lmdb.Error as error:
            raise HubError(f"The hub's table of readers cannot be looked through: {error}.") from error
        period_ms = self._meta.period_s * 1000
        now_ms = self._clock.now_ms()
        with reading(self._env) as txn:
            positions = self._positions(txn)
            since_ms = max(now_ms, positions.floor_ms) // period_ms * period_ms
            due = positions.floor_ms < since_ms or any(
                positions.period(partition)[0] < since_ms and is_open(txn.cursor(database))
                for partition, database in enumerate(self._databases.frames)
            )
        if due:
            # A partition whose last events are of an earlier period gets a marker; whatever comes later is in a later period.
            with self._writer.transaction() as txn:
                commit = Commit(txn, self._databases, self._meta, now_ms)
                for partition in range(self._meta.partitions):
                    commit.mark(partition, FrameKind.TIME_MARKER)
                commit.finish()
        self.groups.keep()
        if expire:
            self._expiry.walk()

    def producer(self, producer: str) -> Producer:
        """What is known of a producer. Raises NotFound."""
        key = producer.encode()
        with reading(self._env) as txn:
            entry = txn.get(key, db=self._databases.producers) if 0 < len(key) < 512 else None
        if entry is None:
            days = window_ms(producer) // DAY_MS
            raise NotFound(f"Producer {producer} is not known: it has not sent a numbered batch for {days} days.")
        return decode(entry)

    def accepted(self) -> Iterator[tuple[int, int, int]]:
        """(start of the period in ms, partition, events accepted in it), for the periods still in the log."""
        with reading(self._env) as txn:
            rows = [
                (*Databases.ACCEPTED.unpack(key), int.from_bytes(value, "little"))
                for key, value in txn.cursor(self._databases.accepted)
            ]
            positions = self._positions(txn)
            rows.extend(
                (period_ms, partition, count)
                for partition in range(self._meta.partitions)
                for period_ms, count in (positions.period(partition),)
                if count
            )
        return iter(rows)

    def counters(self) -> dict[str, int]:
        """Counts that only grow: duplicates, dedup_window_passed, lost_batches, trimmed_events."""
        with reading(self._env) as txn:
            return self._databases.counters(txn)

    def usage(self) -> Usage:
        info = self._env.info()
        with reading(self._env) as txn:
            used = self._databases.used_pages(txn) * self._databases.page_bytes
        readers = (line.split() for line in self._env.readers().splitlines()[1:])
        oldest = min((int(row[2]) for row in readers if len(row) == 3 and row[2].isdigit()), default=info["last_txnid"])
        return Usage(used, info["map_size"], used >= info["map_size"] * FULL_AT, info["last_txnid"] - oldest)

    def _positions(self, txn: lmdb.Transaction) -> Positions:
        return Positions(bytearray(txn.get(META_POSITIONS, db=self._databases.meta)))

    def _database(self, partition: int) -> Database:
        if not 0 <= partition < self._meta.partitions:
            raise NotFound(f"There is no partition {partition}; this hub has 0 to {self._meta.partitions - 1}.")
        return self._databases.frames[partition]

    @staticmethod
    def _number(offset: str) -> int:
        if not (offset.isascii() and offset.isdigit() and len(offset) < 20):
            raise HubError(f"{offset!r} is not an offset of this hub.")
        return int(offset)
