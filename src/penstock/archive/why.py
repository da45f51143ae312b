"""Why an hour file closed, or what keeps it open: told from the ledger, the leases and, where it can be reached, the log.

Nothing here decides or changes anything. What makes the answers sure is that a ledger is one chain: if a record of a later hour
stands, the hour has got all its files; and if the chain passes over the hour, no event was enqueued in it. So the store alone
can tell of every hour but the ones behind the end of the chain; of these the log tells.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final, Literal

import msgspec

from penstock.archive.cut import hour_name, period_start_ms
from penstock.archive.hours import ARCHIVE_GROUP, HourRecords, find_hour, manifest_name
from penstock.archive.ledger import Gap, Ledger, Owner, Record
from penstock.archive.lost import in_store
from penstock.blobs import BlobStore
from penstock.clock import timestamp
from penstock.errors import ArchiveError, BlobNotFound, FrameDamaged, HubError, NotFound, OffsetTrimmed
from penstock.events import Bounds, Frame, FrameKind
from penstock.hub import Hub
from penstock.processor.lease import Lease, read_leases

READ_BYTES_MAX: Final = 1 << 20
READS_MAX: Final = 64
"""So much of what the archiver has to read next is looked at for damage."""

State = Literal["closed", "open", "waiting", "empty", "future", "unknown"]


class HourFile(msgspec.Struct, frozen=True):
    """One file of the hour, as its ledger record says, and why it ends where it does. `in_store`: it lies there."""

    file: str
    part: int
    first: int
    next: int
    events: int
    raw_bytes: int
    closed_by: str
    host: str
    epoch: int
    at: str
    in_store: bool
    why: str


class Missing(msgspec.Struct, frozen=True):
    """A partition that has not archived the hour yet, as far as is known."""

    partition: int
    why: str


class HourManifest(msgspec.Struct, frozen=True):
    """Whether all partitions have archived the hour. `missing` are those that have not."""

    name: str
    published: bool
    why: str
    missing: tuple[Missing, ...]


class Explanation(msgspec.Struct, frozen=True):
    """`state`: closed (all its events are in files), open (it goes on), waiting (it is over, but not in files yet), empty (over,
    and nothing was enqueued in it), future, unknown (the hub must be asked). `due`: when the hub writes the time marker that closes
    an open hour. `lag_events`: events of the hour in the log that are in no file; None without the hub.
    """

    partition: int
    hour: str
    begins: str
    ends: str
    state: State
    why: tuple[str, ...]
    due: str | None
    lag_events: int | None
    owner: str | None
    files: tuple[HourFile, ...]
    manifest: HourManifest


class Inquiry:
    """Questions about the hours of one store. `hub` is its hub if that can be reached; `lease_ages` tells for how many
    seconds the lease of a partition was not renewed, where that is known, and `lease_s` after how many it may be taken.
    """

    def __init__(
        self,
        store: BlobStore,
        known: Owner,
        hub: Hub | None,
        *,
        now_ms: int,
        lease_s: float,
        lease_age_s: dict[int, float] | None = None,
    ) -> None:
        self._store = store
        self._known = known
        self._hub = hub
        self._now_ms = now_ms
        self._lease_s = lease_s
        self._lease_age_s = lease_age_s or {}
        self._troubles: dict[int, str] = {}
        self._leases = read_leases(
            store,
            ARCHIVE_GROUP,
            range(known.partitions),
            unreadable=lambda partition, error: self._troubles.update({partition: error.detail}),
        )

    def explain(self, partition: int, at_ms: int) -> Explanation:
        """The period that holds `at_ms`. Raises NotFound (no such partition), ArchiveError, StoreUnavailable."""
        if not 0 <= partition < self._known.partitions:
            raise NotFound(f"There is no partition {partition}; this hub has 0 to {self._known.partitions - 1}.")
        start_ms = period_start_ms(at_ms, self._known.period)
        found = self._find(partition, start_ms)
        state, why = self._state(partition, start_ms, found)
        lease = self._leases[partition]
        return Explanation(
            partition=partition,
            hour=self._name(start_ms),
            begins=timestamp(start_ms),
            ends=timestamp(self._end(start_ms)),
            state=state,
            why=tuple(why),
            due=timestamp(self._end(start_ms)) if state == "open" else None,
            lag_events=self._lag(partition, start_ms, found),
            owner=lease.owner if lease else None,
            files=tuple(self._file(record) for record in found.records),
            manifest=self._manifest(start_ms),
        )

    def _name(self, start_ms: int) -> str:
        return hour_name(start_ms, self._known.period)

    def _end(self, start_ms: int) -> int:
        return start_ms + self._known.period * 1000

    def _ledger(self, partition: int) -> Ledger:
        return Ledger(self._store, self._known.hub, partition)

    def _find(self, partition: int, start_ms: int) -> HourRecords:
        return find_hour(self._ledger(partition), start_ms)

    def _state(self, partition: int, start_ms: int, found: HourRecords) -> tuple[State, list[str]]:
        missing = [record for record in found.records if not in_store(self._store, record.file)]
        if missing:
            return self._file_missing(partition, missing[-1], found)
        if found.whole and found.records:
            return "closed", [_may_be_missing(gap) for gap in found.gaps]
        if found.later is not None:
            return self._passed_over(found, found.later)
        if self._hub is None:
            return self._store_alone(partition, start_ms, found)
        bounds, end_ms = self._hub.bounds(partition), self._end(start_ms)
        if bounds.enqueued_last_ms >= end_ms:
            return self._over(self._hub, partition, start_ms, found)
        if max(self._now_ms, bounds.enqueued_last_ms) < start_ms:
            return "future", [f"It begins at {timestamp(start_ms)}."]
        if self._now_ms < end_ms:
            return "open", [*self._goes_on(start_ms), self._so_far(partition, start_ms, found)]
        why = (
            f"It is over, but the hub's time stands at {timestamp(bounds.enqueued_last_ms)}: no later frame or marker is in the log. "
            "The API workers write a time marker within a second after its end: does `penstock up` or `api` run?"
        )
        return "waiting", [why, self._so_far(partition, start_ms, found), *self._holder(partition)]

    def _passed_over(self, found: HourRecords, later: Record) -> tuple[State, list[str]]:
        if found.gaps:
            return "unknown", [_may_be_missing(gap) for gap in found.gaps]
        if not later.first:
            return "empty", [f"No event was enqueued in it: the first one of the partition is in hour {later.hour}."]
        numbers = "" if self._known.place_bits else f"from event {later.first - 1} to {later.first}, "
        return "empty", [f"No event was enqueued in it: the ledger goes {numbers or 'on '}in hour {later.hour}."]

    def _store_alone(self, partition: int, start_ms: int, found: HourRecords) -> tuple[State, list[str]]:
        if self._now_ms < start_ms:
            return "future", [f"By this machine's clock it begins at {timestamp(start_ms)}."]
        known = f"The ledger of this partition ends at event {found.next}" if found.next else "The ledger has no file"
        why = [
            f"{known}; whether the log has later events cannot be told, because the hub was not reached: name its --data."
        ]
        if self._now_ms < self._end(start_ms):
            return "open", [*self._goes_on(start_ms), *why]
        return "unknown", [*why, *self._holder(partition)]

    def _goes_on(self, start_ms: int) -> list[str]:
        end = timestamp(self._end(start_ms))
        return [
            f"The hour goes on until {end}: its file closes with the first frame of a later hour, or with the time marker that the "
            f"hub writes within a second after {end}. `penstock flush` closes it now."
        ]

    def _so_far(self, partition: int, start_ms: int, found: HourRecords) -> str:
        lag = self._lag(partition, start_ms, found)
        return f"{lag:,} events of it wait in the log." if lag else "No event of it waits in the log."

    def _over(self, hub: Hub, partition: int, start_ms: int, found: HourRecords) -> tuple[State, list[str]]:
        """The hub's time has passed its end, and the ledger says nothing of what came behind it."""
        bounds, tail = hub.bounds(partition), found.next or 0
        if bounds.first > tail and bounds.enqueued_first_ms >= self._end(start_ms):
            return "unknown", [
                f"The log begins at event {bounds.first} and the archive ends at {tail}: what was between was deleted without "
                f"being archived{'' if hub.place_bits else ' (`--archive none`)'}."
            ]
        lag = self._lag(partition, start_ms, found)
        if not lag:
            # What is in a gap was enqueued before what the log has behind it.
            gaps = [_may_be_missing(gap) for gap in found.gaps if bounds.enqueued_first_ms >= start_ms]
            if found.records or gaps:
                return ("closed" if found.records else "unknown"), gaps
            return "empty", ["No event was enqueued in it."]
        why = [f"It is over, and {lag:,} events of it are in no file yet."]
        closing = self._closing(hub, partition, start_ms)
        if closing is None:
            why.append(
                "No later frame or marker is in this partition yet; the API workers write a time marker within a second."
            )
        else:
            why.append(f"It ends before {closing}.")
        return "waiting", [*why, *self._behind(hub, partition, bounds), *self._holder(partition)]

    def _closing(self, hub: Hub, partition: int, start_ms: int) -> str | None:
        """The first frame or marker of a later hour, in words."""
        end_ms = self._end(start_ms)
        try:
            behind = _frames(hub, partition, hub.locate(partition, end_ms))
            frame = next((frame for frame in behind if frame.enqueued_at_ms >= end_ms), None)
        except FrameDamaged as error:
            return f"a frame that cannot be read: {error.detail.rstrip('.')}"
        if frame is None:
            return None
        kind = {FrameKind.TIME_MARKER: "time marker", FrameKind.CUT_MARKER: "cut marker"}.get(frame.kind, "frame")
        return f"the {kind} at {frame.first}, of {timestamp(frame.enqueued_at_ms)}"

    def _behind(self, hub: Hub, partition: int, bounds: Bounds) -> Iterator[str]:
        """Where the archiver stands and, if it cannot get on from there, why."""
        lease = self._leases[partition]
        if lease is None:
            return
        what, bits = ("records", hub.place_bits) if hub.place_bits else ("events", 0)
        reached = int(lease.offset)
        yield f"The archiver's checkpoint is {reached}, {max(0, (bounds.next >> bits) - reached):,} {what} behind the end of the log."
        stop = self._stop(hub, partition, bounds, lease)
        if stop is not None:
            yield f"The partition is parked, or will be: {stop} Nothing was skipped; `penstock audit` and `verify` say more."

    def _stop(self, hub: Hub, partition: int, bounds: Bounds, lease: Lease) -> str | None:
        """What an archiver that goes on from this checkpoint finds wrong (archiver.py), if it does."""
        done, reached, bits = lease.sequence_number, int(lease.offset), hub.place_bits
        if reached << bits > bounds.next:
            return f"the checkpoint {reached} lies beyond the end of the log, {bounds.next >> bits}; the hub is older than its archive."
        try:
            if reached << bits < bounds.first:
                raise OffsetTrimmed(f"the log begins at {bounds.first >> bits}, behind the checkpoint {reached}.")
            last = self._ledger(partition).before(done)
            if last is None and done != 0:
                return f"nothing in the ledger ends at the checkpoint {done}."
            if isinstance(last, Record) and not in_store(self._store, last.file) and not self._lost(last):
                return f"{last.file} is behind the checkpoint {done} and not in the store."
            for _ in _frames(hub, partition, lease.offset):
                continue
        except (ArchiveError, FrameDamaged, HubError) as error:
            return f"{error.detail.rstrip('.')}."
        return None

    def _holder(self, partition: int) -> Iterator[str]:
        """Who reads the partition, and whether he seems to live."""
        lease, age_s = self._leases[partition], self._lease_age_s.get(partition)
        if lease is None:
            yield self._troubles.get(partition) or "No host has ever had its lease: does an archiver run?"
        elif not lease.owner:
            yield "No host holds its lease, it was given back: does an archiver run?"
        elif age_s is not None and age_s >= self._lease_s:
            yield (
                f"Its lease is {lease.owner}'s, who has not renewed it for {age_s:.0f} s: the next host takes it, if one runs."
            )
        else:
            yield (
                f"{lease.owner} holds its lease, in epoch {lease.epoch}. If the checkpoint does not move, the host has parked "
                "the partition: its log has the line `partition parked` with the reason."
            )

    def _lag(self, partition: int, start_ms: int, found: HourRecords) -> int | None:
        """Events of the hour that are in the log and in no file."""
        if self._hub is None:
            return None
        first = int(self._hub.locate(partition, start_ms))
        following = int(self._hub.locate(partition, self._end(start_ms)))
        bits = self._hub.place_bits
        if not bits:
            return max(0, following - max(first, found.next or 0))
        lease = self._leases[partition]
        # Behind the checkpoint of an archive with no open file lie no events that it has not looked at.
        passed = int(lease.offset) if lease is not None and lease.sequence_number == (found.next or 0) else 0
        begin = max(first, (found.next or 0) >> bits, passed, self._hub.bounds(partition).first >> bits)
        return _events(self._hub, partition, begin, following)

    def _file(self, record: Record) -> HourFile:
        return HourFile(
            file=record.file,
            part=record.part,
            first=record.first,
            next=record.next,
            events=record.events,
            raw_bytes=record.raw_bytes,
            closed_by=record.closed_by,
            host=record.host,
            epoch=record.epoch,
            at=record.at,
            in_store=in_store(self._store, record.file),
            why={
                "time": f"a later hour began: before event {record.next} the log has a frame or time marker of it",
                "cut": f"`penstock flush` put a cut marker behind event {record.next - 1}",
                "size": f"with the frame at {record.next} it would have been larger than --file-bytes-max",
            }[record.closed_by],
        )

    def _file_missing(self, partition: int, record: Record, found: HourRecords) -> tuple[State, list[str]]:
        lease, gap = self._leases[partition], self._lost(record)
        if gap is not None:
            return "closed", [f"{record.file} is lost, and will never be there: {gap.reason} ({gap.host}, {gap.at})."]
        if found.next == record.next and (lease is None or lease.sequence_number <= record.first):
            why = f"{record.file} is decided, but not in the store yet: whoever has the lease writes it from the log."
            return "waiting", [why, *self._holder(partition)]
        return "closed", [f"{record.file} was in the store, and is not there any more: see `penstock verify`."]

    def _lost(self, record: Record) -> Gap | None:
        return self._ledger(record.partition).lost(record.first)

    def _manifest(self, start_ms: int) -> HourManifest:
        name = manifest_name(self._name(start_ms))
        try:
            self._store.get(name)
        except BlobNotFound:
            pass
        else:
            return HourManifest(name, True, "Every partition has archived the hour.", ())
        missing = tuple(self._missing(start_ms))
        if missing:
            why = f"{len(missing)} of {self._known.partitions} partitions have not archived the hour yet."
        elif any(self._find(partition, start_ms).records for partition in range(self._known.partitions)):
            why = "Every partition has archived the hour: the next host that looks, within some seconds, publishes it."
        else:
            why = "No partition has an event of the hour: it gets none."
        return HourManifest(name, False, why, missing)

    def _missing(self, start_ms: int) -> Iterator[Missing]:
        """As archive/hours.py asks it with the hub; without, as far as the ledger tells."""
        end_ms = self._end(start_ms)
        for partition, lease in enumerate(self._leases):
            if self._hub is None:
                if not self._find(partition, start_ms).whole:
                    yield Missing(partition, "not known without the hub: the ledger has nothing of a later hour")
                continue
            goal = int(self._hub.locate(partition, end_ms))
            if self._hub.bounds(partition).enqueued_last_ms < end_ms:
                yield Missing(partition, "the hub's time has not passed the end of the hour")
            elif lease is None:
                yield Missing(partition, self._troubles.get(partition) or "no host has ever had its lease")
            elif int(lease.offset) < goal:
                yield Missing(partition, f"its checkpoint is {lease.offset}, and must be {goal}")


def _may_be_missing(gap: Gap) -> str:
    return f"Events {gap.first} to {gap.next - 1} are in no file, and may have been of this hour: {gap.reason}."


def _events(hub: Hub, partition: int, offset: int, end: int) -> int:
    """How many lie between two offsets of a log that is not dense: they have to be read, and copies are some of them."""
    count = 0
    while offset < end:
        read = hub.read(partition, str(offset), bytes_max=READ_BYTES_MAX)
        count += sum(frame.count for frame in read.frames if frame.first >> hub.place_bits < end)
        offset = int(read.next_offset)
    return count


def _frames(hub: Hub, partition: int, offset: str) -> Iterator[Frame]:
    for _ in range(READS_MAX):
        read = hub.read(partition, offset, bytes_max=READ_BYTES_MAX)
        yield from read.frames
        if read.next_offset == offset:
            return
        offset = read.next_offset
