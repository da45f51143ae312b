"""The proof that nothing is missing: `verify` looks at the archive alone, `audit` compares it with the log and the intake.

Both read only, may run while the system does, and name every difference instead of stopping at the first. What makes that
sound is the order of reading, always from what follows to what it follows from: a file or manifest that is listed had its
records before, and events that are in the ledger were in the log before and counted as accepted before that.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Final, NamedTuple, Protocol

from penstock.archive.cut import hour_name, hour_start_ms, period_start_ms
from penstock.archive.differences import Ranges
from penstock.archive.hours import checkpoint, is_right
from penstock.archive.ledger import HUB_BLOB, Gap, Ledger, Link, Owner, Record, owner
from penstock.archive.lost import all_declared, lost_files
from penstock.archive.report import Report, Row, Rows
from penstock.blobs import BlobStore
from penstock.errors import ArchiveError, BlobNotFound, FrameDamaged, OffsetTrimmed, SettingsError
from penstock.events import Frame
from penstock.hub import Hub
from penstock.wire.members import measure

READ_BYTES_MAX: Final = 4 << 20
FILES_AT_ONCE: Final = 4
RECORDS_AT_ONCE: Final = 32
FILES_QUEUED: Final = 1000
_DATA: Final = re.compile(r"\d+/")
_MANIFEST: Final = re.compile(r"_hours/(.+)\.json")


class AuditedHub(Hub, Protocol):
    """A hub that counts what it accepted apart from what it stores."""

    def accepted(self) -> Iterable[tuple[int, int, int]]:
        """(start of the period in ms, partition, events accepted in it) for all time, as of one moment."""
        ...


def verify(store: BlobStore, *, differing: list[Record] | None = None) -> Report:
    """Ledger, files and manifests of a store: adjacent, complete, and the content what the records say.

    `differing` gets the records whose files are there and not so.
    """
    problems: list[str] = []
    rows = Rows()
    known = _owner(store, problems)
    if known is None:
        return rows.report(problems)
    names = {blob.name for blob in store.list("")}
    found: list[tuple[Record, bool]] = []
    hours: dict[str, list[Record]] = {}
    gaps: list[Gap] = []
    may_be_lost: dict[str, Gap] = {}
    for partition in range(known.partitions):
        done = checkpoint(store, partition)
        records = chain(store, known, partition, problems)
        may_be_lost |= all_declared(Ledger(store, known.hub, partition), records, problems)
        for record in records:
            if isinstance(record, Gap):
                gaps.append(record)
                continue
            hours.setdefault(record.hour, []).append(record)
            waits = record is records[-1] and done is not None and done <= record.first
            found.append((record, waits or record.file in may_be_lost))
        if done is not None and records and done > records[-1].next:
            problems.append(f"partition {partition}: checkpoint {done} is beyond the ledger's end {records[-1].next}")
    lost: dict[str, Gap] = {}
    for (record, _), (present, wrong) in zip(found, _files(store, found), strict=True):
        problems += wrong
        if present and wrong and differing is not None:
            differing.append(record)
        if not present and record.file in may_be_lost:
            lost[record.file] = may_be_lost[record.file]
        rows.add(record, "archived" if present else "lost" if record.file in lost else "pending")
    files = {record.file for record, _ in found}
    problems += [
        f"{name}: no record in the ledger" for name in sorted(names) if _DATA.match(name) and name not in files
    ]
    _manifests(store, known, names, hours, may_be_lost, problems)
    return rows.report(problems, gaps, lost)


def _owner(store: BlobStore, problems: list[str]) -> Owner | None:
    try:
        known = owner(store)
    except SettingsError as error:
        problems.append(str(error))
        return None
    if known is None:
        problems.append(f"{HUB_BLOB} is missing: this is no archive, or no archiver has started yet")
    return known


def chain(store: BlobStore, known: Owner, partition: int, problems: list[str]) -> list[Link]:
    """All records of a partition in order. Where the chain is broken, it goes on at the next that is listed."""
    ledger = Ledger(store, known.hub, partition)
    listed = ledger.listed()
    with ThreadPoolExecutor(RECORDS_AT_ONCE) as readers:  # a cloud is far away, and each record names the next
        ledger.fetch(listed, readers.map)
    records: list[Link] = []
    read: set[int] = set()
    reached = 0
    before: Record | None = None
    for first in (0, *listed):
        if first < reached:
            if first not in read:
                problems.append(f"partition {partition}: the record at {first} lies inside of the file before it")
            continue
        try:
            for record in ledger.chain(first):
                if record.first != reached:
                    problems.append(f"partition {partition}: no record for {reached} to {record.first}")
                    before = None
                if isinstance(record, Record):
                    problems += _contradictions(before, record, known)
                    before = record
                records.append(record)
                read.add(record.first)
                reached = record.next
        except ArchiveError as error:
            problems.append(str(error))
    return records


def _contradictions(before: Record | None, record: Record, known: Owner) -> Iterator[str]:
    """`before`: the file before it on the chain."""
    start_ms = hour_start_ms(record.hour)
    if hour_name(start_ms, known.period) != record.hour or period_start_ms(start_ms, known.period) != start_ms:
        yield f"{record.file}: {record.hour} is not the start of a period of {known.period} s"
    if (
        (record.events > record.next - record.first)
        if known.place_bits
        else (record.events != record.next - record.first)
    ):
        yield f"{record.file}: {record.events} events from {record.first} to {record.next}"
    if before is None:
        return
    if record.hour < before.hour:
        yield f"{record.file}: its hour is before that of {before.file}"
    if record.part != (before.part + 1 if record.hour == before.hour else 0):
        yield f"{record.file}: part {record.part} does not follow {before.file}"


def _files(store: BlobStore, records: list[tuple[Record, bool]]) -> Iterator[tuple[bool, list[str]]]:
    """`_file` of each, in order. Several at a time: unzipping leaves the interpreter to others, and a cloud is far away."""
    with ThreadPoolExecutor(FILES_AT_ONCE) as readers:
        for at in range(0, len(records), FILES_QUEUED):
            yield from readers.map(lambda one: _file(store, *one), records[at : at + FILES_QUEUED])


def _file(store: BlobStore, record: Record, waits: bool) -> tuple[bool, list[str]]:
    """Whether the file is there, and what is wrong with it. `waits`: it is decided and not confirmed, so it may be missing."""
    try:
        found = measure(store.stream(record.file))
    except BlobNotFound:
        return not waits, [] if waits else [f"{record.file}: missing"]
    except ValueError as error:
        return True, [f"{record.file}: damaged: {error}"]
    return True, [
        f"{record.file}: {what} {holds}, the ledger says {stated}"
        for what, holds, stated in (
            ("events", found.lines, record.events),
            ("raw bytes", found.raw_bytes, record.raw_bytes),
            ("crc32", found.crc32, record.crc32),
        )
        if holds != stated
    ]


def _manifests(
    store: BlobStore,
    known: Owner,
    names: set[str],
    hours: dict[str, list[Record]],
    may_be_lost: Collection[str],
    problems: list[str],
) -> None:
    for name in sorted(names):
        match = _MANIFEST.fullmatch(name)
        if match and not is_right(store.get(name).body, known.hub, match[1], hours.get(match[1], []), may_be_lost):
            problems.append(f"{name}: not what the ledger says")


def audit(hub: AuditedHub, store: BlobStore, *, deep: bool = False, archived: bool = True) -> Report:
    """accepted = logged = archived + lost + pending, for each hour and partition. `deep` checks the content too, and verifies.

    `archived` is False for a hub without an archiver: what retention deleted is then in no ledger, and not missed. Nor is it where no
    archive has begun, in a partition without lease and record: its log is deleted only under `--archive none`.

    Read in this order: ledger, accepted, log. `accepted` is the state of one moment, and its sum is how far the log was at that
    moment; the log is read up to there, so events that come in meanwhile do not matter.
    """
    problems: list[str] = []
    rows = Rows()
    known = owner(store)
    if known is not None and known.hub != hub.id:
        problems.append(f"the store belongs to hub {known.hub}, the log to {hub.id}")
        return rows.report(problems)
    partitions = range(hub.partitions())
    records = [chain(store, known, partition, problems) if known else [] for partition in partitions]
    lost: dict[str, Gap] = {}
    for partition in partitions:
        lost |= lost_files(store, Ledger(store, hub.id, partition), records[partition], problems)
    bounds = [hub.bounds(partition) for partition in partitions]
    accepted: list[dict[str, int]] = [{} for _ in partitions]
    for start_ms, partition, events in hub.accepted():
        hour = hour_name(start_ms, hub.period_s)
        accepted[partition][hour] = accepted[partition].get(hour, 0) + events
    for partition in partitions:
        begun = bool(records[partition]) or checkpoint(store, partition) is not None
        compared = archived and (begun or hub.bounds(partition).first == 0)
        part = _Partition(hub, partition, records[partition], lost, accepted[partition], deep, compared, problems)
        part.check(bounds[partition].next, rows)
    if deep and known is not None:
        problems += verify(store).problems
    return rows.report(problems, [record for links in records for record in links if isinstance(record, Gap)], lost)


class Counts(NamedTuple):
    """Events by hour: in the log, of them those not archived, and those that lie in gaps of the ledger."""

    logged: dict[str, int]
    pending: dict[str, int]
    in_gaps: dict[str, int]


class _Partition:
    """The audit of one partition."""

    def __init__(
        self,
        hub: AuditedHub,
        partition: int,
        records: list[Link],
        lost: Collection[str],
        accepted: dict[str, int],
        deep: bool,
        archived: bool,
        problems: list[str],
    ) -> None:
        self._hub = hub
        self._partition = partition
        self._records = [record for record in records if isinstance(record, Record)]
        self._lost = lost
        self._orders = [link for link in records if isinstance(link, Gap) or link.file in lost]
        self._blurred = {hour for hour in accepted if _may_miss(records, hour)}
        self._tail = records[-1].next if records else 0
        self._accepted = accepted
        self._deep = deep
        self._archived = archived
        self._problems = problems

    def check(self, next_before: int, rows: Rows) -> None:
        """`next_before`: the end of the log before `accepted` was read."""
        end = self._end(next_before)
        found: Counts | None = None
        while found is None:
            # Retention may delete while this reads; then what it deleted is in the ledger, and reading starts again.
            with contextlib.suppress(OffsetTrimmed):
                found = self._read(end)
        logged, pending, in_gaps = found
        for record in self._records:
            rows.add(record, "lost" if record.file in self._lost else "archived")
        for hour in {*self._accepted, *logged, *pending}:
            row = rows.at(hour, self._partition)
            row.pending += pending.get(hour, 0)
            row.lost += in_gaps.get(hour, 0)
            if hour >= min(self._accepted, default=""):
                row.accepted = self._accepted.get(hour, 0)
                row.logged = logged.get(hour, 0)
                self._compare(row)

    def _end(self, next_before: int) -> int:
        """How far the log was when `accepted` was read: the events before its first hour, and those that it counts.

        How many events of an hour are in a gap nobody knows, so counting begins behind the last such hour.
        """
        if not self._archived:
            return next_before
        blurred = max(self._blurred, default="")
        counted = {hour: events for hour, events in self._accepted.items() if hour > blurred}
        end = self._first_behind(blurred) if blurred else self._archived_before(min(counted, default="~"))
        end += sum(counted.values())
        next_after = self._hub.bounds(self._partition).next
        if not next_before <= end <= next_after:
            self._say(f"{end} events are accepted, but the log ends at {next_after}")
        if self._tail > next_after:
            self._say(f"the ledger ends at {self._tail}, beyond the end of the log, {next_after}")
        return min(max(end, next_before), next_after)

    def _archived_before(self, hour: str) -> int:
        return max((record.next for record in self._records if record.hour < hour), default=0)

    def _first_behind(self, hour: str) -> int:
        """The first event of a later hour. What no record has yet is still in the log."""
        end_ms = hour_start_ms(hour) + self._hub.period_s * 1000
        archived = (record.first for record in self._records if record.hour > hour)
        return next(archived, None) or int(self._hub.locate(self._partition, end_ms))

    def _read(self, end: int) -> Counts:
        """Of what retention has deleted, and of what cannot be read and was declared lost, the ledger tells."""
        logged, pending, in_gaps = found = Counts({}, {}, {})
        first = self._hub.bounds(self._partition).first
        for record in self._records:
            if record.first < first:
                logged[record.hour] = logged.get(record.hour, 0) + min(record.next, first) - record.first
        if first > self._tail and self._archived:
            self._say(f"the log begins at {first}, the ledger ends at {self._tail}: events between are in neither")
        ranges = Ranges([record for record in self._records if record.file not in self._lost], first)
        for frame in self._frames(first, end, logged):
            hour = hour_name(period_start_ms(frame.enqueued_at_ms, self._hub.period_s), self._hub.period_s)
            logged[hour] = logged.get(hour, 0) + frame.count
            if frame.first >= self._tail:
                pending[hour] = pending.get(hour, 0) + frame.count
            elif isinstance(self._passed_over(frame.first), Gap):
                in_gaps[hour] = in_gaps.get(hour, 0) + frame.count
            if self._deep:
                self._problems += ranges.pass_over(frame)
        return found

    def _passed_over(self, number: int) -> Link | None:
        """Which gap or lost file it lies in."""
        return next((link for link in self._orders if link.first <= number < link.next), None)

    def _frames(self, first: int, end: int, logged: dict[str, int]) -> Iterator[Frame]:
        """The frames of `[first, end)`; says where one is missing or damaged. `logged` gets those of a lost file that cannot be read."""
        offset = str(first)
        while first < end:
            try:
                read = self._hub.read(self._partition, offset, bytes_max=READ_BYTES_MAX)
            except FrameDamaged as error:
                if (order := self._passed_over(first)) is None:
                    self._say(str(error))
                    return
                if isinstance(order, Record):
                    logged[order.hour] = logged.get(order.hour, 0) + order.next - first
                first, offset = order.next, str(order.next)
                continue
            for frame in read.frames:
                if frame.is_marker or frame.first >= end:
                    continue
                if frame.first != first:
                    self._say(f"the log goes on at {frame.first} instead of {first}")
                yield frame
                first = frame.next
            if read.next_offset == offset:
                self._say(f"the log ends at {first} instead of {end}")
                return
            offset = read.next_offset

    def _compare(self, row: Row) -> None:
        if not self._archived:  # without a ledger nobody knows where in an hour retention or this moment cuts the log
            return
        if row.accepted != row.logged and row.hour not in self._blurred:
            self._say(f"{row.hour}: accepted {row.accepted}, in the log {row.logged}")
        if row.logged != row.archived + row.lost + row.pending:
            lost = f", lost {row.lost}" if row.lost else ""
            self._say(f"{row.hour}: in the log {row.logged}, archived {row.archived}{lost} and pending {row.pending}")

    def _say(self, problem: str) -> None:
        self._problems.append(f"partition {self._partition}: {problem}")


def _may_miss(records: Sequence[Link], hour: str) -> bool:
    """Whether events of the hour may be in a gap: those of a gap are of the hours from the file before it to the file behind it."""
    before, gap = "", False
    for record in records:
        if isinstance(record, Gap):
            gap = True
            continue
        if gap and before <= hour <= record.hour:
            return True
        before, gap = record.hour, False
    return gap and before <= hour
