"""What an API worker does for the hub beside intake, about once a second: markers, retention, alarms.

Every worker does it, so it goes on when one hangs; doing it twice changes nothing. Retention deletes what is older than it
*and* archived: the log is the only copy until an hour file is confirmed, and the checkpoint says that it is. It waits for the groups
that read over HTTP too, until one was not heard of for as long as the retention; then that is forgotten.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Final, Protocol

from penstock.archive.hours import ARCHIVE_GROUP, archive_lease
from penstock.blobs import BlobStore
from penstock.clock import Clock
from penstock.errors import HubBroken, PenstockError
from penstock.hub.groups import SEEN_MS, Reader, seen_at_ms
from penstock.server.status import HubUsage, KnownGroups, MeasuredHub
from penstock.telemetry.log import Log

ROUND_S: Final = 1.0
READER_LAG_MOST: Final = 10_000
RETAIN_S_MOST: Final = 60.0
"""Retention looks so often, or a hundred times in its time: each look reads the archive's leases, which costs money in a cloud."""
CLOCK_MOVES_MOST_S: Final = 60.0
CLOCK_DOUBTED_S: Final = 3600.0
LISTENED_S: Final = 3600.0
"""A group is forgotten only by a worker that has listened for so long, or for the retention: the API may have been away, not the group."""


class KeptUsage(HubUsage, Protocol):
    @property
    def reader_lag(self) -> int:
        """Commits since the oldest open read began: it keeps their pages from being used again."""
        ...


class KeptGroups(KnownGroups, Protocol):
    def forget(self, group: str, *, not_since_ms: int) -> bool:
        """Drop a group that was not heard of since. True if it is gone and was there."""
        ...


class KeptHub(MeasuredHub, Protocol):
    @property
    def groups(self) -> KeptGroups: ...
    def usage(self) -> KeptUsage: ...
    def trim(self, partition: int, *, before: str) -> None:
        """Drop whole frames that end at or before offset `before`. Never moves the end."""
        ...

    def maintain(self, *, expire: bool) -> None:
        """Time markers, dead readers; with `expire`, producers that were not heard of for long."""
        ...


class Housekeeping:
    """`archived` is False with `--archive none`: then retention waits for an archiver where one has the lease, or read over HTTP."""

    def __init__(
        self, hub: KeptHub, store: BlobStore, *, retention_s: float, archived: bool, clock: Clock, log: Log
    ) -> None:
        self._hub = hub
        self._store = store
        self._retention_ms = int(retention_s * 1000)
        self._archived = archived
        self._clock = clock
        self._log = log
        self._said: dict[str, str] = {}
        self._ahead_s = clock.now_ms() / 1000 - clock.monotonic()
        self._trusted_from_s = clock.monotonic()
        self._listening_since_s = clock.monotonic()
        self._retain_s = min(RETAIN_S_MOST, retention_s / 100)
        self._retain_at_s = clock.monotonic()

    def run(self, stop: threading.Event, broken: Callable[[HubBroken], None]) -> None:
        """Until `stop` is set. `broken` is called, and it ends, when the hub's storage failed."""
        while not self._clock.wait(stop, ROUND_S):
            try:
                self.round()
                self._say("failed", "")
            except HubBroken as error:
                broken(error)
                return
            except PenstockError as error:
                self._say("failed", error.detail)
            except Exception as error:  # the top of the thread: without it hours stay open and the disk fills
                self._say("failed", f"Housekeeping failed: {error!r}.", error)

    def round(self) -> None:
        """Raises what hub and store raise; the next round tries again."""
        trusted = self._clock_is_trusted()
        self._hub.maintain(expire=trusted)
        usage = self._hub.usage()
        self._say("full", "The hub's storage is full: new events are refused." if usage.full else "")
        pinned = usage.reader_lag > READER_LAG_MOST
        self._say(
            "pinned", "A reader has been open for too long and keeps pages from being used again." if pinned else ""
        )
        if not trusted or self._clock.monotonic() < self._retain_at_s:
            return
        self._retain_at_s = self._clock.monotonic() + self._retain_s
        self._forget()
        holding: dict[str, list[int]] = {}
        for partition in range(self._hub.partitions()):
            for group in self._trim(partition):
                holding.setdefault(group, []).append(partition)
        held = holding.pop(ARCHIVE_GROUP, [])
        self._say("held", f"Retention waits for the archive in partitions {held}." if held else "")
        waits = "; ".join(f"group {group} in partitions {of}" for group, of in sorted(holding.items()))
        self._say("groups", f"Retention waits for groups that read over HTTP: {waits}." if waits else "")

    def _clock_is_trusted(self) -> bool:
        """Not for a while after it was set: what is deleted for its age by a wrong clock does not come back."""
        now_s, monotonic_s = self._clock.now_ms() / 1000, self._clock.monotonic()
        moved_s = now_s - monotonic_s - self._ahead_s
        if abs(moved_s) > CLOCK_MOVES_MOST_S:
            self._ahead_s += moved_s
            self._trusted_from_s = monotonic_s + CLOCK_DOUBTED_S
            self._say(
                "clock",
                f"The clock was set by {moved_s:+.0f} s: for {CLOCK_DOUBTED_S:.0f} s nothing is deleted for its age.",
            )
        elif monotonic_s >= self._trusted_from_s:
            self._ahead_s += moved_s
            self._say("clock", "")
        return monotonic_s >= self._trusted_from_s

    def _forget(self) -> None:
        """The archive is never forgotten for its silence: while it is away the log is the only copy."""
        if self._clock.monotonic() - self._listening_since_s < min(LISTENED_S, self._retention_ms / 1000):
            return
        groups: dict[str, list[Reader]] = {}
        for reader in self._hub.groups.all():
            groups.setdefault(reader.group, []).append(reader)
        not_since_ms = self._clock.now_ms() - self._retention_ms - 2 * SEEN_MS
        for group, readers in groups.items():
            silent = group != ARCHIVE_GROUP and seen_at_ms(readers) < not_since_ms
            if silent and self._hub.groups.forget(group, not_since_ms=not_since_ms):
                self._log.warning(
                    "A group was not heard of for as long as the retention: it is forgotten, and nothing waits for it.",
                    group=group,
                    checkpoints={reader.partition: reader.progress.checkpoint for reader in readers},
                )

    def _trim(self, partition: int) -> list[str]:
        """Delete what is due. The groups for which more of it stays than the retention says; `$archive` for the archive."""
        oldest_ms = self._clock.now_ms() - self._retention_ms
        bounds = self._hub.bounds(partition)
        if bounds.enqueued_first_ms >= oldest_ms:
            return []
        # Offsets of the embedded hub are sequence numbers; they compare as numbers.
        due = int(self._hub.locate(partition, oldest_ms))
        reached = self._reached(partition, bounds.next)
        before = min([due, *reached.values()])
        if before > bounds.first:
            self._hub.trim(partition, before=str(before))
        return [group for group, checkpoint in reached.items() if checkpoint < due]

    def _reached(self, partition: int, end: int) -> dict[str, int]:
        """How far each is that retention waits for."""
        reached = {
            reader.group: reader.progress.checkpoint
            for reader in self._hub.groups.all()
            # Where there is an archiver here its lease says more, and says it sooner.
            if reader.partition == partition and not (self._archived and reader.group == ARCHIVE_GROUP)
        }
        lease = archive_lease(self._store, partition)
        # Without an archiver here there may be hosts elsewhere: one that has the lease, or died with it.
        if self._archived or (lease is not None and lease.owner):
            checkpoint = lease.sequence_number if lease and lease.sequence_number <= end else 0
            reached[ARCHIVE_GROUP] = min(checkpoint, reached.get(ARCHIVE_GROUP, checkpoint))
        return reached

    def _say(self, what: str, sentence: str, error: Exception | None = None) -> None:
        """One line for each change of state."""
        if self._said.get(what, "") == sentence:
            return
        self._said[what] = sentence
        if sentence:
            self._log.warning(sentence, exc_info=error)
        else:
            self._log.info("Over.", problem=what)
