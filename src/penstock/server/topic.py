"""An API worker on a Kafka topic: the markers that it writes, and the state that it shows.

The brokers store and delete, and producers are judged by readers; so of what `housekeeping.py` and `status.py` do on the embedded hub
only this is left.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final, Protocol

from penstock.archive.hours import ARCHIVE_GROUP
from penstock.archive.letters import waiting
from penstock.blobs import BlobStore
from penstock.clock import Clock, timestamp
from penstock.errors import HubError, PenstockError, StoreError
from penstock.hub import Hub
from penstock.hub.groups import Reader
from penstock.processor.lease import Lease
from penstock.processor.skip import gone
from penstock.server.parts import read_runs
from penstock.server.status import PartitionStatus, RetentionStatus, Status, Totals, Warned, archive_leases, in_force
from penstock.server.units import Throughput
from penstock.telemetry.log import Log

ROUND_S: Final = 1.0
SHORT: Final = 0.1
"""A tenth of the retention is a short time: of a week that is a night."""
_READ_BYTES_MAX: Final = 64 << 10


class MarkedHub(Hub, Protocol):
    def maintain(self) -> None:
        """Time markers into partitions whose last events are of an earlier period."""
        ...


class KeptHub(Hub, Protocol):
    def retention(self) -> tuple[float | None, int | None] | None:
        """The brokers delete what is older than so many seconds, and the oldest beyond so many bytes of a partition; None: they do not.

        None in place of both: they do not tell.
        """
        ...


class NoGroups:
    """Groups that read over HTTP are not kept: nothing waits for them, and their leases are in stores of their own."""

    def heard(self, group: str, partition: int, epoch: int, checkpoint: int) -> None:
        return

    def forget(self, group: str) -> bool:
        return False

    def all(self) -> Sequence[Reader]:
        return ()


def mark(hub: MarkedHub, stop: threading.Event, clock: Clock, log: Log) -> None:
    """Write the time markers that are due, about once a second, until `stop` is set."""
    said = ""
    while not clock.wait(stop, ROUND_S):
        try:
            hub.maintain()
            sentence = ""
        except PenstockError as error:
            sentence = error.detail
        except Exception as error:  # the top of the thread: without it hours stay open
            sentence = repr(error)
        if sentence and not said:
            log.warning("Time markers wait.", detail=sentence)
        elif said and not sentence:
            log.info("Time markers are written again.")
        said = sentence


def build_topic_status(
    hub: KeptHub, store: BlobStore, *, run_folder: Path, clock: Clock, throughput: Throughput | None = None
) -> Status:
    """As `status.build_status`, without what a topic does not tell: events are not counted, and the storage is the brokers'."""
    problems: list[str] = []
    runs = read_runs(run_folder)
    told = hub.retention()
    after_s, bytes_max = told or (None, None)
    leases = archive_leases(hub, store, problems)
    partitions = [_partition(hub, partition, lease, after_s, clock, problems) for partition, lease in enumerate(leases)]
    left = min((one.retention_left_s for one in partitions if one.retention_left_s is not None), default=None)
    counters = {"dead_letters": _dead_letters(store, problems)}
    workers = in_force(runs)
    missed = any(leases) or workers is None or workers.waits
    return Status(
        ok=not problems,
        problems=problems,
        at=timestamp(clock.now_ms()),
        hub=hub.id,
        period_s=hub.period_s,
        totals=Totals(None, None, None),
        storage=None,
        counters=counters,
        parts=[part for run in runs for part in run.parts],
        partitions=partitions,
        retention=RetentionStatus(after_s, "deleted", left, None, bytes_max),
        throughput=throughput,
        warnings=list(_warnings(after_s, bytes_max, partitions, told=told is not None)) if missed else [],
    )


def _warnings(
    after_s: float | None, bytes_max: int | None, partitions: Sequence[PartitionStatus], *, told: bool
) -> Iterator[Warned]:
    """To be given where an archive is, or is to be."""
    if not told:
        yield Warned(
            "retention_unknown",
            "The brokers do not tell how long they keep events, so that nobody knows how much time is left for what is not archived: "
            "look at the retention of the topic where it was made.",
        )
    left = {one.partition: one.retention_left_s for one in partitions if one.retention_left_s is not None}
    short = [partition for partition, left_s in left.items() if after_s is not None and left_s < SHORT * after_s]
    if short:
        yield Warned(
            "retention_short",
            f"Of partitions {short} the brokers delete events that are not archived in {min(left.values()):.0f} s: see that an archiver "
            "runs and gets on, or raise retention.ms of the topic until it has.",
        )
    if bytes_max is not None:
        yield Warned(
            "retention_bytes",
            f"The topic has retention.bytes={bytes_max}: the brokers delete a partition's oldest events beyond that, archived or not, "
            "and no time says when. Set it to -1.",
        )


def _dead_letters(store: BlobStore, problems: list[str]) -> int:
    """Those that nobody has sent again."""
    try:
        return waiting(store)
    except StoreError as error:
        if error.detail not in problems:
            problems.append(error.detail)
        return 0


def _partition(
    hub: Hub, partition: int, lease: Lease | None, after_s: float | None, clock: Clock, problems: list[str]
) -> PartitionStatus:
    bounds = hub.bounds(partition)
    checkpoint = lease.sequence_number if lease else None
    if checkpoint is not None and checkpoint > bounds.next:
        problems.append(f"The checkpoint of partition {partition} lies beyond the end of the log.")
    if lease is not None and int(lease.offset) < bounds.first >> hub.place_bits:
        problems.append(gone(ARCHIVE_GROUP, partition, at=int(lease.offset), first=bounds.first >> hub.place_bits))
    bits = hub.place_bits
    done, end = max(int(lease.offset) if lease else 0, bounds.first >> bits), bounds.next >> bits
    lag_s = _age_s(hub, partition, done, clock) if done < end else 0.0
    return PartitionStatus(
        partition=partition,
        first=bounds.first,
        next=bounds.next,
        bytes=0,
        enqueued_at=timestamp(bounds.enqueued_last_ms),
        owner=lease.owner if lease else None,
        epoch=lease.epoch if lease else None,
        offset=lease.offset if lease else None,
        checkpoint=checkpoint,
        lag_events=None,
        lag_bytes=None,
        lag_s=lag_s,
        retention_left_s=max(0.0, after_s - lag_s) if after_s is not None and lag_s else None,
        token=lease.token if lease else None,
        lag_records=max(0, end - done),
        first_offset=str(bounds.first >> bits),
    )


def _age_s(hub: Hub, partition: int, done: int, clock: Clock) -> float:
    """Of the first events behind the checkpoint. Markers are no lag, though they are records."""
    try:
        read = hub.read(partition, str(done), bytes_max=_READ_BYTES_MAX)
    except HubError:  # trimmed since
        return 0.0
    since_ms = next((frame.enqueued_at_ms for frame in read.frames if not frame.is_marker), clock.now_ms())
    return max(0.0, (clock.now_ms() - since_ms) / 1000)
