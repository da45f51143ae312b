"""The state of an installation as one value: what `GET /v1/status` and `penstock status` show."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

import msgspec

from penstock.archive.hours import ARCHIVE_GROUP
from penstock.blobs import BlobStore
from penstock.clock import Clock, timestamp
from penstock.errors import HubError, StoreError
from penstock.hub import Hub
from penstock.processor.lease import Lease, read_leases
from penstock.server.parts import PartState, read_runs


class HubUsage(Protocol):
    """What a hub tells of its disk."""

    @property
    def used(self) -> int: ...
    @property
    def limit(self) -> int: ...
    @property
    def full(self) -> bool: ...


class MeasuredHub(Hub, Protocol):
    def usage(self) -> HubUsage: ...
    def counters(self) -> Mapping[str, int]: ...


class PartitionStatus(msgspec.Struct, frozen=True):
    """`[first, next)` is in the log. `checkpoint` is the archive's, None when it has none yet; lags are behind it.

    `lag_bytes` is an estimate; `lag_s` the age of the oldest event that is not archived.
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
    lag_events: int
    lag_bytes: int
    lag_s: float


class Storage(msgspec.Struct, frozen=True):
    bytes_used: int
    bytes_max: int
    state: str


class Totals(msgspec.Struct, frozen=True):
    accepted: int
    archived: int
    lag_events: int


class Status(msgspec.Struct, frozen=True):
    """`ok` is false when `problems` names any."""

    ok: bool
    problems: Sequence[str]
    at: str
    hub: str
    period_s: int
    totals: Totals
    storage: Storage
    counters: Mapping[str, int]
    parts: Sequence[PartState]
    partitions: Sequence[PartitionStatus]


def build_status(hub: MeasuredHub, store: BlobStore, *, run_folder: Path, clock: Clock) -> Status:
    """Reads the hub, the leases and DATA/run; a store that does not answer is a problem in it, not an error."""
    problems: list[str] = []
    leases = _leases(hub, store, problems)
    partitions = [_partition(hub, partition, lease, clock, problems) for partition, lease in enumerate(leases)]
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
            lag_events=sum(one.lag_events for one in partitions),
        ),
        storage=Storage(usage.used, usage.limit, "full" if usage.full else "ok"),
        counters=hub.counters(),
        parts=[part for run in read_runs(run_folder) for part in run.parts],
        partitions=partitions,
    )


def _leases(hub: Hub, store: BlobStore, problems: list[str]) -> Sequence[Lease | None]:
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


def _partition(hub: Hub, partition: int, lease: Lease | None, clock: Clock, problems: list[str]) -> PartitionStatus:
    bounds = hub.bounds(partition)
    checkpoint = lease.sequence_number if lease else None
    if checkpoint is not None and checkpoint > bounds.next:
        problems.append(f"The checkpoint of partition {partition} lies beyond the end of the log.")
    lag = max(0, bounds.next - max(checkpoint or 0, bounds.first))
    kept = max(1, bounds.next - bounds.first)
    return PartitionStatus(
        partition=partition,
        first=bounds.first,
        next=bounds.next,
        bytes=bounds.bytes,
        enqueued_at=timestamp(bounds.enqueued_last_ms),
        owner=lease.owner if lease else None,
        epoch=lease.epoch if lease else None,
        offset=lease.offset if lease else None,
        checkpoint=checkpoint,
        lag_events=lag,
        lag_bytes=round(bounds.bytes * lag / kept),
        lag_s=_age_s(hub, partition, max(checkpoint or 0, bounds.first), clock) if lag else 0.0,
    )


def _age_s(hub: Hub, partition: int, number: int, clock: Clock) -> float:
    try:
        frames = hub.read(partition, str(number), bytes_max=1).frames
    except HubError:  # trimmed since: no longer of interest
        return 0.0
    since_ms = frames[0].enqueued_at_ms if frames else clock.now_ms()
    return max(0.0, (clock.now_ms() - since_ms) / 1000)
