"""The audit of a log that has batches twice (a Kafka topic): each event in it is in one file, a copy, a dead letter, lost, or waits.

Nobody counts there what was accepted, so the log itself is judged again (judging.py), and what it takes of each record's range is compared
with the record: the number of events, and with `deep` their bytes; then `verify` compares the files with the records. What differs is named
event by event. What the brokers have deleted, and what lies before the first place where judging can begin, is not compared; that is said.

One partition after the other is judged, so in memory are what is known of its producers, and the ledger and a row for each hour of all.

It reads only, and may run while the system does: first the lease, then the ledger, then the log's end. So whatever lies below the
checkpoint that was read has its record or letter, and every record lies below the end. If the brokers delete what is being read, the
partition is begun anew.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict, deque
from collections.abc import Iterable, Iterator, Sequence
from typing import Final

import msgspec

from penstock.archive.check import chain, verify
from penstock.archive.differences import COPIES, DEAD, differences, digest_of
from penstock.archive.filter import dead_name
from penstock.archive.hours import archive_lease
from penstock.archive.judging import Begin, JudgedLog
from penstock.archive.ledger import Gap, Ledger, Link, Record, owner
from penstock.archive.letters import places, read_dead
from penstock.archive.lost import lost_files
from penstock.archive.report import Report, Rows
from penstock.blobs import BlobStore
from penstock.errors import ArchiveError, FrameDamaged, OffsetTrimmed
from penstock.events import Bounds, Frame, Source
from penstock.hub import Hub
from penstock.hub.duplicates import Reason, Share, Verdict
from penstock.processor.lease import Lease
from penstock.wire.frame import content, crc32

NAMED_FILES: Final = 5
"""Of so many files of a partition the events are named in which they differ."""


class Contents(msgspec.Struct):
    """What the log holds of a record. `hours`: those of its events that are not the record's."""

    events: int = 0
    raw_bytes: int = 0
    crc: int = 0
    hours: set[str] = msgspec.field(default_factory=set)


class Counts(msgspec.Struct):
    """Events of an hour in the log."""

    logged: int = 0
    pending: int = 0
    copies: int = 0
    dead: int = 0
    lost: int = 0


class Tally(msgspec.Struct):
    """What one pass over a partition's log has found. `letters`: the places of events that are dead."""

    problems: list[str] = []
    hours: defaultdict[str, Counts] = msgspec.field(default_factory=lambda: defaultdict(Counts))
    files: defaultdict[int, Contents] = msgspec.field(default_factory=lambda: defaultdict(Contents))
    letters: set[int] = msgspec.field(default_factory=set)
    passed_over: int = 0


class Wanted(msgspec.Struct):
    """What a file is to hold: digests and sequence numbers of its events in order; and what else the log has in its range."""

    events: list[tuple[bytes, int]] = []
    left: dict[bytes, str] = {}


def audit(hub: Hub, store: BlobStore, *, deep: bool = False) -> Report:
    """In the log = archived + copies + dead letters + lost + pending. `deep` compares the bytes too, and verifies.

    Raises HubUnavailable, StoreUnavailable.
    """
    problems: list[str] = []
    rows = Rows()
    known = owner(store)
    if known is not None and known.hub != hub.id:
        return rows.report([f"the store belongs to hub {known.hub}, the log to {hub.id}"])
    parts = []
    for partition in range(hub.partitions()):
        lease = archive_lease(store, partition)
        links = chain(store, known, partition, problems) if known else []
        lost = lost_files(store, Ledger(store, hub.id, partition), links, problems)
        part = _Partition(hub, store, partition, lease, links, lost, deep)
        part.check(rows)
        parts.append(part)
    if deep and known is not None:
        differing: list[Record] = []
        verified = verify(store, differing=differing).problems
        for part in parts:
            part.problems += part.named(record for record in differing if record.partition == part.partition)
        problems += verified
    problems += [problem for part in parts for problem in part.problems]
    gaps = [gap for part in parts for gap in part.gaps]
    lost = {file: gap for part in parts for file, gap in part.lost.items()}
    return rows.report(problems, gaps, lost, [note for part in parts for note in part.notes])


class _Partition:
    """The audit of one partition: `check`, and then what it found."""

    def __init__(
        self,
        hub: Hub,
        store: BlobStore,
        partition: int,
        lease: Lease | None,
        links: list[Link],
        lost: dict[str, Gap],
        deep: bool,
    ) -> None:
        self.partition = partition
        self.lost = lost
        self.problems: list[str] = []
        self.notes: list[str] = []
        self.gaps = [link for link in links if isinstance(link, Gap)]
        self._hub = hub
        self._bits = hub.place_bits
        self._store = store
        self._lease = lease
        self._links = links
        self._records = [link for link in links if isinstance(link, Record)]
        self._tail = links[-1].next if links else 0
        self._done = max(int(lease.offset) if lease else 0, self._tail >> self._bits)
        self._deep = deep
        self._log = JudgedLog(hub, store, partition, lease, links, lost)
        self._begun: int | None = None
        self._differing: list[Record] = []

    def check(self, rows: Rows) -> None:
        bounds, tally = self._passed()
        begin = self._begun
        self.problems += tally.problems
        self._ends(bounds)
        compared = [record for record in self._records if begin is not None and record.first >= begin]
        self._note(bounds, begin, self._records[: len(self._records) - len(compared)])
        for record in self._records:
            is_lost = record.file in self.lost
            rows.add(record, "lost" if is_lost else "archived")
            if is_lost or begin is None or record.first < begin:
                # Of a lost file the log has what can be read of it.
                row = rows.at(record.hour, self.partition)
                row.logged = (row.logged or 0) + record.events - tally.files[record.first].events
        for hour, counts in tally.hours.items():
            row = rows.at(hour, self.partition)
            row.logged = (row.logged or 0) + counts.logged
            row.pending += counts.pending
            row.copies, row.dead = counts.copies, counts.dead
            row.lost += counts.lost
        for record in compared:
            if record.file not in self.lost:
                self._compare(record, tally.files[record.first])
        if begin is not None:
            self._letters(begin, bounds.next, tally)

    def named(self, others: Iterable[Record]) -> list[str]:
        """The events in which files differ from the log: those of `check`, and `others`. One file's are in memory at a time."""
        every = {record.first: record for record in (*self._differing, *others)}
        chosen = [record for _, record in sorted(every.items())][:NAMED_FILES]
        if self._begun is None or not chosen:
            return []
        said: list[str] = []
        # The first is no fault, the others were told.
        with contextlib.suppress(OffsetTrimmed, FrameDamaged, ArchiveError):
            begin = self._log.begin(self._hub.bounds(self.partition))
            if begin is not None:
                for record, wanted in self._wanted(begin, [record for record in chosen if record.first >= begin.at]):
                    said += differences(self._store, record, wanted.events, wanted.left)
        return said

    def _passed(self) -> tuple[Bounds, Tally]:
        """A pass over the log as it is; again when the brokers delete under it."""
        while True:
            bounds, tally = self._hub.bounds(self.partition), Tally()
            with contextlib.suppress(OffsetTrimmed):
                try:
                    begin = self._log.begin(bounds)
                    self._begun = None if begin is None else begin.at
                    if begin is not None:
                        for judged in self._log.walk(begin, bounds.next):
                            self._count(tally, *judged)
                except (FrameDamaged, ArchiveError) as error:
                    tally.problems.append(f"{self._here}: {error.detail}")
                return bounds, tally

    def _count(self, tally: Tally, frame: Frame, hour: str, judged: Sequence[tuple[Source, Share, Verdict]]) -> None:
        counts = tally.hours[hour]
        counts.logged += frame.count
        keep: list[tuple[int, int]] = []
        at = 0
        for source, share, verdict in judged:
            begin, end = at + verdict.left_out, at + verdict.left_out + verdict.taken
            at += source.count
            counts.copies += verdict.left_out
            keep.append((begin, end))
            if verdict.reason is not None:
                self._dead(tally, counts, frame, source, share, verdict.reason, end, at)
        events = sum(end - begin for begin, end in keep)
        link = self._log.link(frame.first)
        if not events:
            return
        if link is None:
            counts.pending += events
            tally.passed_over += events if frame.first >> self._bits < self._done else 0
        elif isinstance(link, Gap):
            counts.lost += events
        else:
            found = tally.files[link.first]
            found.events += events
            if hour != link.hour:
                found.hours.add(hour)
            if self._deep:
                ndjson = content(frame)
                if events != frame.count:
                    lines = ndjson.splitlines(keepends=True)
                    ndjson = b"".join([line for begin, end in keep for line in lines[begin:end]])
                found.raw_bytes += len(ndjson)
                found.crc = crc32(ndjson, found.crc)

    def _dead(
        self,
        tally: Tally,
        counts: Counts,
        frame: Frame,
        source: Source,
        share: Share,
        reason: Reason,
        begin: int,
        end: int,
    ) -> None:
        """Events `[begin, end)` of the frame must lie in a letter, if the archive has come so far."""
        number = frame.first + begin
        name = dead_name(self.partition, number)
        tally.letters.add(number)
        try:
            letter = read_dead(self._store, name)
        except ArchiveError as error:
            tally.problems.append(error.detail)
            return
        if letter is None and self._log.is_passed_over(self._log.link(frame.first)):
            counts.lost += end - begin
            return
        if letter is None:
            counts.pending += end - begin
            if frame.first >> self._bits < self._done:
                tally.problems.append(
                    f"{self._here}: {end - begin} events from {number} on are dead letters ({reason}), and {name} is missing"
                )
            return
        counts.dead += end - begin
        lines = content(frame).split(b"\n")[begin:end]
        stated = (letter.reason, letter.producer, letter.epoch, letter.sequence, letter.sha256, letter.owner)
        held = (reason, source.producer, source.epoch, source.sequence, source.sha256.hex(), share.owner)
        if [bytes(event) for event in letter.events] != lines or stated != held:
            tally.problems.append(f"{name}: not what the log holds")

    def _ends(self, bounds: Bounds) -> None:
        if self._tail > bounds.next:
            self._say(f"the ledger ends at {self._tail}, beyond the end of the log, {bounds.next}")
        first = bounds.first >> self._bits
        if first > self._done and (self._links or self._lease):
            self._say(
                f"the log begins at offset {first}, the archive ends at {self._done}: events between are in neither"
            )

    def _note(self, bounds: Bounds, begin: int | None, before: Sequence[Record]) -> None:
        first = bounds.first >> self._bits
        if begin is None:
            self.notes.append(
                f"{self._here}: nothing is compared. The log begins at offset {first}, and what was known of producers there is not kept."
            )
        elif before:
            unknown = f", and of what is known of producers at {begin >> self._bits}" if begin > bounds.first else ""
            self.notes.append(
                f"{self._here}: the log begins at offset {first}{unknown}. {len(before)} files before that, up to {before[-1].file}, are "
                "not compared with it."
            )

    def _compare(self, record: Record, found: Contents) -> None:
        if record.events != found.events:
            self.problems.append(f"{record.file}: {record.events} events, and of the log {found.events} belong to it")
        elif self._deep and (record.raw_bytes, record.crc32) != (found.raw_bytes, found.crc):
            self.problems.append(f"{record.file}: its record is not what the log holds from {record.first} on")
        elif found.hours:
            self.problems.append(f"{record.file}: events of it are of {', '.join(sorted(found.hours))}")
            return
        else:
            return
        self._differing.append(record)

    def _letters(self, begin: int, end: int, tally: Tally) -> None:
        for number in places(self._store, self.partition):
            if begin <= number < end and number not in tally.letters:
                self.problems.append(
                    f"{dead_name(self.partition, number)}: these events are no dead letters by the log"
                )
        if tally.passed_over:
            self._say(f"{tally.passed_over} events lie before the checkpoint and are in no file")

    def _wanted(self, begin: Begin, chosen: Sequence[Record]) -> Iterator[tuple[Record, Wanted]]:
        """For each of these records, in order, what the log has in its range."""
        left = deque(chosen)
        wanted = Wanted()
        for frame, _, judged in self._log.walk(begin, chosen[-1].next if chosen else 0):
            while left and left[0].next <= frame.first:
                yield left.popleft(), wanted
                wanted = Wanted()
            if not left or frame.first < left[0].first:
                continue
            digests = [digest_of(line) for line in content(frame).splitlines(keepends=True)]
            at = 0
            for source, _, verdict in judged:
                begin_at, end_at = at + verdict.left_out, at + verdict.left_out + verdict.taken
                wanted.left.update(dict.fromkeys(digests[at:begin_at], COPIES))
                wanted.events += [(digests[place], frame.first + place) for place in range(begin_at, end_at)]
                at += source.count
                wanted.left.update(dict.fromkeys(digests[end_at:at], DEAD))
        for record in left:
            yield record, wanted
            wanted = Wanted()

    @property
    def _here(self) -> str:
        return f"partition {self.partition}"

    def _say(self, problem: str) -> None:
        self.problems.append(f"{self._here}: {problem}")
