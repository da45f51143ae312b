"""An API worker on a Kafka topic: the markers that it writes, and the state that it shows.

The brokers store and delete, and producers are judged by readers; so of what `housekeeping.py` and `status.py` do on the embedded hub
only this is left.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Final, Protocol

from penstock.blobs import BlobStore
from penstock.clock import Clock, timestamp
from penstock.errors import HubError, PenstockError
from penstock.hub import Hub
from penstock.hub.groups import Reader
from penstock.processor.lease import Lease
from penstock.server.parts import Retention, read_runs
from penstock.server.status import PartitionStatus, RetentionStatus, Status, Totals, archive_leases, in_force
from penstock.server.units import Throughput
from penstock.telemetry.log import Log

ROUND_S: Final = 1.0
_READ_BYTES_MAX: Final = 64 << 10


class MarkedHub(Hub, Protocol):
    def maintain(self) -> None:
        """Time markers into partitions whose last events are of an earlier period."""
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
    hub: Hub, store: BlobStore, *, run_folder: Path, clock: Clock, throughput: Throughput | None = None
) -> Status:
    """As `status.build_status`, without what a topic does not tell: events are not counted, and the storage is the brokers'."""
    problems: list[str] = []
    runs = read_runs(run_folder)
    retention = in_force(runs)
    partitions = [
        _partition(hub, partition, lease, retention, clock, problems)
        for partition, lease in enumerate(archive_leases(hub, store, problems))
    ]
    left = min((one.retention_left_s for one in partitions if one.retention_left_s is not None), default=None)
    return Status(
        ok=not problems,
        problems=problems,
        at=timestamp(clock.now_ms()),
        hub=hub.id,
        period_s=hub.period_s,
        totals=Totals(None, None, None),
        storage=None,
        counters={},
        parts=[part for run in runs for part in run.parts],
        partitions=partitions,
        retention=RetentionStatus(retention.after_s if retention else None, "deleted", left, None),
        throughput=throughput,
    )


def _partition(
    hub: Hub, partition: int, lease: Lease | None, retention: Retention | None, clock: Clock, problems: list[str]
) -> PartitionStatus:
    bounds = hub.bounds(partition)
    checkpoint = lease.sequence_number if lease else None
    if checkpoint is not None and checkpoint > bounds.next:
        problems.append(f"The checkpoint of partition {partition} lies beyond the end of the log.")
    if lease is not None and int(lease.offset) < bounds.first >> hub.place_bits:
        problems.append(
            f"Partition {partition} begins at offset {bounds.first >> hub.place_bits}, and its archive is at {lease.offset}: "
            "the brokers have deleted what is between."
        )
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
        retention_left_s=max(0.0, retention.after_s - lag_s) if retention and done < end else None,
        token=lease.token if lease else None,
        lag_records=max(0, end - done),
    )


def _age_s(hub: Hub, partition: int, done: int, clock: Clock) -> float:
    """Of the first events behind the checkpoint. Markers are no lag, though they are records."""
    try:
        read = hub.read(partition, str(done), bytes_max=_READ_BYTES_MAX)
    except HubError:  # trimmed since
        return 0.0
    since_ms = next((frame.enqueued_at_ms for frame in read.frames if not frame.is_marker), clock.now_ms())
    return max(0.0, (clock.now_ms() - since_ms) / 1000)
