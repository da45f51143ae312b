"""The state of an installation as one value: what `GET /v1/status` and `penstock status` show."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final, Literal, Protocol

import msgspec

from penstock.archive.hours import ARCHIVE_GROUP
from penstock.blobs import BlobStore
from penstock.clock import Clock, timestamp
from penstock.errors import HubError, StoreError
from penstock.events import Bounds
from penstock.hub import Hub, WholeHub
from penstock.hub.embedded import FULL_AT
from penstock.hub.groups import Progress, Reader
from penstock.processor.lease import Lease, read_leases
from penstock.processor.skip import gone
from penstock.server.parts import PartState, Retention, Run, read_runs
from penstock.server.units import STORED_BYTES_PER_UNIT, Throughput

RATE_S: Final = 60.0
"""The present rate is that of the last minute."""


class HubUsage(Protocol):
    """What a hub tells of its disk."""

    @property
    def used(self) -> int: ...
    @property
    def limit(self) -> int: ...
    @property
    def full(self) -> bool: ...


class KnownGroups(Protocol):
    """The groups that read over HTTP (penstock.hub.groups)."""

    def all(self) -> Sequence[Reader]: ...


class MeasuredHub(WholeHub, Protocol):
    @property
    def groups(self) -> KnownGroups: ...
    def usage(self) -> HubUsage: ...
    def counters(self) -> Mapping[str, int]: ...


class PartitionStatus(msgspec.Struct, frozen=True):
    """`[first, next)` is in the log. `checkpoint` is the archive's, None when it has none yet; lags are behind it.

    `lag_bytes` is an estimate; `lag_s` the age of the oldest event that is not archived, and `retention_left_s` the time
    until that is as old as the retention: None if there is no such event, or nothing is deleted. `token` is new whenever the
    lease was written. In a Kafka topic records are counted, frames and markers: `lag_records`, and `lag_events` is None (topic.py).
    `first_offset` is where the log begins, as `offset` is where the archive goes on.
    """

    partition: int
    first: int
    next: int
    bytes: int
    enqueued_at: str
    owner: str | None
    epoch: int | None
    offset: str | None
    checkpoint: int | None
    lag_events: int | None
    lag_bytes: int | None
    lag_s: float
    retention_left_s: float | None = None
    token: str | None = None
    lag_records: int | None = None
    first_offset: str = ""


class Storage(msgspec.Struct, frozen=True):
    bytes_used: int
    bytes_max: int
    state: str


class RetentionStatus(msgspec.Struct, frozen=True):
    """What is older than `after_s` is deleted; None: no API worker runs, so nothing is deleted, and nothing comes in.

    `unread`, what is not archived, is `kept` all the same, or `deleted` (`--archive none`, and no host has the lease).
    Of a Kafka topic these are its own settings: the brokers delete; `after_s` is None where they keep for ever, and `partition_bytes` is
    `retention.bytes`, beyond which they delete the oldest of a partition whatever its age.
    `left_s`: the least `retention_left_s` of all partitions. `full_in_s`: when the hub refuses new events if they come at the
    rate of the last minute and nothing is deleted until then; None if none come, or what there is now is deleted before.
    """

    after_s: float | None
    unread: Literal["kept", "deleted"]
    left_s: float | None
    full_in_s: float | None
    partition_bytes: int | None = None


class Totals(msgspec.Struct, frozen=True):
    """None where the hub does not count events."""

    accepted: int | None
    archived: int | None
    lag_events: int | None


class GroupStatus(msgspec.Struct, frozen=True):
    """A group that reads a partition over HTTP. `age_s` since it was heard of; that and the checkpoint may lag by seconds."""

    group: str
    partition: int
    epoch: int
    checkpoint: int
    lag_events: int
    age_s: float


class Warned(msgspec.Struct, frozen=True):
    """What people should know; nothing is refused because of it. `storage_full`: more is stored than the throughput units are for;
    `retention_short`: brokers soon delete what is not archived; `retention_bytes`: they may at any time; `retention_unknown`: they do not
    tell."""

    code: Literal["storage_full", "retention_short", "retention_bytes", "retention_unknown"]
    detail: str


class Status(msgspec.Struct, frozen=True):
    """`ok` is false when `problems` names any. `groups` are those that read over HTTP. `storage` is None where it is the brokers'."""

    ok: bool
    problems: Sequence[str]
    at: str
    hub: str
    period_s: int
    totals: Totals
    storage: Storage | None
    counters: Mapping[str, int]
    parts: Sequence[PartState]
    partitions: Sequence[PartitionStatus]
    retention: RetentionStatus | None = None
    groups: Sequence[GroupStatus] = ()
    throughput: Throughput | None = None
    warnings: Sequence[Warned] = ()


def build_status(
    hub: MeasuredHub, store: BlobStore, *, run_folder: Path, clock: Clock, throughput: Throughput | None = None
) -> Status:
    """Reads the hub, the leases and DATA/run; a store that does not answer is a problem in it, not an error."""
    problems: list[str] = []
    leases = archive_leases(hub, store, problems)
    runs = read_runs(run_folder)
    retention = in_force(runs)
    readers = hub.groups.all()
    # An archiver that reads over HTTP may have its leases in a store that is not ours.
    remote = {reader.partition: reader.progress for reader in readers if reader.group == ARCHIVE_GROUP}
    partitions = [
        _partition(hub, partition, lease, remote.get(partition), retention, clock, problems)
        for partition, lease in enumerate(leases)
    ]
    usage = hub.usage()
    if usage.full:
        problems.append("The hub's storage is full: new events are refused.")
    return Status(
        ok=not problems,
        problems=problems,
        at=timestamp(clock.now_ms()),
        hub=hub.id,
        period_s=hub.period_s,
        totals=Totals(
            accepted=sum(one.next for one in partitions),
            archived=sum(one.checkpoint or 0 for one in partitions),
            lag_events=sum(one.lag_events or 0 for one in partitions),
        ),
        storage=Storage(usage.used, usage.limit, "full" if usage.full else "ok"),
        counters=hub.counters(),
        parts=[part for run in runs for part in run.parts],
        partitions=partitions,
        retention=_retention(hub, usage, partitions, readers, retention, clock),
        groups=[_group(reader, partitions[reader.partition], clock) for reader in readers],
        throughput=throughput,
        warnings=list(_warnings(usage, throughput)),
    )


def _warnings(usage: HubUsage, throughput: Throughput | None) -> Iterator[Warned]:
    units = throughput.throughput_units if throughput else None
    if units and usage.used > (meant := units * STORED_BYTES_PER_UNIT):
        yield Warned(
            "storage_full",
            f"The hub holds {usage.used / 1e9:,.1f} GB, and {units} throughput units are meant for {meant / 1e9:,.0f} GB. Nothing is "
            "refused because of it; set more units, or a shorter retention.",
        )


def archive_leases(hub: Hub, store: BlobStore, problems: list[str]) -> Sequence[Lease | None]:
    """The archive's; what cannot be read is named in `problems`."""
    try:
        return read_leases(
            store,
            ARCHIVE_GROUP,
            range(hub.partitions()),
            unreadable=lambda _partition, error: problems.append(error.detail),
        )
    except StoreError as error:
        problems.append(error.detail)
        return [None] * hub.partitions()


def _partition(
    hub: Hub,
    partition: int,
    lease: Lease | None,
    remote: Progress | None,
    retention: Retention | None,
    clock: Clock,
    problems: list[str],
) -> PartitionStatus:
    bounds = hub.bounds(partition)
    checkpoint = lease.sequence_number if lease else remote.checkpoint if remote else None
    if checkpoint is not None and checkpoint > bounds.next:
        problems.append(f"The checkpoint of partition {partition} lies beyond the end of the log.")
    if lease is not None and int(lease.offset) < bounds.first:
        problems.append(gone(ARCHIVE_GROUP, partition, at=int(lease.offset), first=bounds.first))
    lag = max(0, bounds.next - max(checkpoint or 0, bounds.first))
    lag_s = _age_s(hub, partition, max(checkpoint or 0, bounds.first), clock) if lag else 0.0
    return PartitionStatus(
        partition=partition,
        first=bounds.first,
        next=bounds.next,
        bytes=bounds.bytes,
        enqueued_at=timestamp(bounds.enqueued_last_ms),
        owner=lease.owner if lease else None,
        epoch=lease.epoch if lease else remote.epoch if remote else None,
        offset=lease.offset if lease else None,
        checkpoint=checkpoint,
        lag_events=lag,
        lag_bytes=round(_bytes_each(bounds) * lag),
        lag_s=lag_s,
        retention_left_s=max(0.0, retention.after_s - lag_s) if retention and lag else None,
        token=lease.token if lease else None,
        first_offset=str(bounds.first),
    )


def _bytes_each(bounds: Bounds) -> float:
    return bounds.bytes / max(1, bounds.next - bounds.first)


def _group(reader: Reader, partition: PartitionStatus, clock: Clock) -> GroupStatus:
    progress = reader.progress
    return GroupStatus(
        group=reader.group,
        partition=reader.partition,
        epoch=progress.epoch,
        checkpoint=progress.checkpoint,
        lag_events=max(0, partition.next - max(progress.checkpoint, partition.first)),
        age_s=max(0.0, (clock.now_ms() - progress.seen_at_ms) / 1000),
    )


def _age_s(hub: Hub, partition: int, number: int, clock: Clock) -> float:
    try:
        frames = hub.read(partition, str(number), bytes_max=1).frames
    except HubError:  # trimmed since: no longer of interest
        return 0.0
    # A marker may lie there from long before the event.
    since_ms = next((frame.enqueued_at_ms for frame in frames if not frame.is_marker), clock.now_ms())
    return max(0.0, (clock.now_ms() - since_ms) / 1000)


def in_force(runs: Sequence[Run]) -> Retention | None:
    """Each run's workers delete by their own settings, so the hardest ones count."""
    found = [run.retention for run in runs if run.retention]
    if not found:
        return None
    return Retention(min(one.after_s for one in found), all(one.waits for one in found))


def _retention(
    hub: Hub,
    usage: HubUsage,
    partitions: Sequence[PartitionStatus],
    readers: Sequence[Reader],
    retention: Retention | None,
    clock: Clock,
) -> RetentionStatus:
    if retention is None:
        return RetentionStatus(None, "kept", None, None)
    left = min((one.retention_left_s for one in partitions if one.retention_left_s is not None), default=None)
    remote = {reader.partition for reader in readers if reader.group == ARCHIVE_GROUP}
    kept = retention.waits or all(one.owner or one.partition in remote for one in partitions)
    room, bytes_s = max(0.0, FULL_AT * usage.limit - usage.used), _bytes_s(hub, clock)
    full_in_s = room / bytes_s if bytes_s else None
    # Until then what is in the hub now is deleted, if it is archived in time: new events alone do not fill it.
    others_wait = any(
        reader.progress.checkpoint < partitions[reader.partition].next
        for reader in readers
        if reader.group != ARCHIVE_GROUP
    )
    makes_room = not others_wait and (not kept or left is None or left > 0)
    if full_in_s is not None and full_in_s >= retention.after_s and makes_room:
        full_in_s = None
    return RetentionStatus(retention.after_s, "kept" if kept else "deleted", left, full_in_s)


def _bytes_s(hub: Hub, clock: Clock) -> float:
    """Bytes that the hub has grown by in a second, as far as the log has events of the last minute."""
    now_ms = clock.now_ms()
    since_ms, grown = now_ms, 0.0
    for partition in range(hub.partitions()):
        bounds = hub.bounds(partition)
        recent = bounds.next - max(bounds.first, int(hub.locate(partition, now_ms - round(RATE_S * 1000))))
        if recent > 0:
            grown += recent * _bytes_each(bounds)
            since_ms = min(since_ms, bounds.enqueued_first_ms)
    # A log that began in this minute has not had a minute to grow.
    return grown / min(RATE_S, max(1.0, (now_ms - since_ms) / 1000))
