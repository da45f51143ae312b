"""A partition's whole way in memory: hub, store, clock, and a pump of ten lines."""

from __future__ import annotations

import gzip
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec
import pytest

from penstock.archive.archiver import Archiver
from penstock.archive.begin import start
from penstock.archive.check import audit, verify
from penstock.archive.cut import period_start_ms
from penstock.archive.ledger import Ledger, Record, claim
from penstock.archive.report import Report
from penstock.blobs import BlobStore
from penstock.clock import Clock
from penstock.errors import StoreUnavailable
from penstock.files import Files
from penstock.processor import CloseReason
from penstock.processor.lease import Lease, Start, encode_lease, lease_name
from penstock.testing import FakeClock, MemoryBlobs, MemoryHub, MemoryLog

PERIOD_S = 10
START_MS = 1_795_356_000_000  # 2026-11-22T14:00:00Z


class CountingHub(MemoryHub):
    """Counts what it accepts, as the embedded hub does: for the periods still in the log."""

    def __init__(self, partitions: int, *, clock: Clock, period_s: int) -> None:
        super().__init__(partitions, clock=clock, period_s=period_s)
        self.counts: dict[tuple[int, int], int] = {}

    def put(self, partition: int, lines: Sequence[bytes]) -> int:
        first = super().put(partition, lines)
        period = period_start_ms(self.bounds(partition).enqueued_last_ms, self.period_s), partition
        self.counts[period] = self.counts.get(period, 0) + len(lines)
        return first

    def accepted(self) -> Iterator[tuple[int, int, int]]:
        for (start_ms, partition), events in self.counts.items():
            if start_ms >= period_start_ms(self.bounds(partition).enqueued_first_ms, self.period_s):
                yield start_ms, partition, events


class Rig:
    def __init__(self, folder: Path, *, partitions: int = 1, period_s: int = PERIOD_S) -> None:
        self.clock = FakeClock(START_MS)
        self.hub = CountingHub(partitions, clock=self.clock, period_s=period_s)
        self.store = MemoryBlobs()
        self.log = MemoryLog()
        self.folder = folder
        self.checkpoints = dict.fromkeys(range(partitions), "0")
        self.number = 0
        claim(self.store, self.hub, self.clock)

    def put(self, count: int = 1, *, partition: int = 0, width: int = 0) -> None:
        """One frame of `count` numbered events."""
        lines = []
        for _ in range(count):
            lines.append(b'{"deviceId":"d-1","n":%d,"x":"%s"}' % (self.number, b"x" * width))
            self.number += 1
        self.hub.put(partition, lines)

    def next_period(self, count: int = 1) -> None:
        self.clock.advance(self.hub.period_s * count)

    def close_hour(self) -> None:
        """Time goes into the next period and the hub marks idle partitions."""
        self.next_period()
        self.hub.maintain()

    def archiver(
        self, partition: int = 0, *, store: BlobStore | None = None, file_bytes_max: int = 1 << 20, host: str = "a"
    ) -> Archiver:
        return Archiver(
            self.hub,
            store or self.store,
            partition,
            host=host,
            epoch=lambda: 1,
            clock=self.clock,
            files=Files(),
            folder=self.folder,
            file_bytes_max=file_bytes_max,
            log=self.log,
        )

    def start(self, partition: int = 0, *, store: BlobStore | None = None) -> Start:
        """Where a lease begins that is not there."""
        return start(store or self.store, self.hub, partition, host="a", clock=self.clock)

    def begin(self, partition: int = 0, *, store: BlobStore | None = None) -> None:
        """Whoever finds no lease begins there."""
        self.checkpoints[partition] = self.start(partition, store=store).offset

    def run(
        self,
        partition: int = 0,
        *,
        store: BlobStore | None = None,
        file_bytes_max: int = 1 << 20,
        bytes_max: int = 500,
        tries: int = 1,
    ) -> None:
        """Feed a new archiver from the checkpoint to the end of the log; begin again when the store says so."""
        for attempt in range(1, tries + 1):
            archiver = self.archiver(partition, store=store, file_bytes_max=file_bytes_max)
            try:
                self._feed(archiver, partition, bytes_max)
                return
            except StoreUnavailable:
                if attempt == tries:
                    raise
            finally:
                archiver.close(CloseReason.SHUTDOWN)

    def _feed(self, archiver: Archiver, partition: int, bytes_max: int) -> None:
        offset = self.checkpoints[partition]
        while True:
            read = self.hub.read(partition, offset, bytes_max=bytes_max)
            checkpoint = archiver.process(read)
            if checkpoint is not None:
                self.checkpoints[partition] = checkpoint
            if read.next_offset == offset:
                break
            offset = read.next_offset
        self.write_lease(partition)

    def write_lease(self, partition: int) -> None:
        offset = self.checkpoints[partition]
        body = encode_lease(Lease(partition, "a", f"a-{self.number}", 1, offset, int(offset)))
        name = lease_name("$archive", partition)
        self.store.delete(name)
        self.store.create(name, body, id="a")

    def records(self, partition: int = 0) -> list[Record]:
        """Of files. The chain begins at 0, whatever a gap says."""
        return [link for link in Ledger(self.store, self.hub.id, partition).chain(0) if isinstance(link, Record)]

    def archived(self, partition: int = 0) -> list[bytes]:
        return [
            line
            for record in self.records(partition)
            for line in gzip.decompress(self.store.get(record.file).body).splitlines()
        ]

    def logged(self, partition: int = 0) -> list[bytes]:
        frames = self.hub.read(partition, "0", bytes_max=1 << 30).frames
        return [
            line
            for frame in frames
            if not frame.is_marker
            for line in (gzip.decompress(frame.body) if frame.body[:2] == b"\x1f\x8b" else frame.body).splitlines()
        ]

    def rewrite(self, name: str, **changes: object) -> None:
        """Damage a JSON blob."""
        old = msgspec.json.decode(self.store.get(name).body)
        self.store.delete(name)
        self.store.create(name, msgspec.json.encode(old | changes), id="damaged")

    def replace(self, name: str, body: bytes) -> None:
        self.store.delete(name)
        self.store.create(name, body, id="damaged")

    def verified(self) -> Report:
        return verify(self.store)

    def audited(self, *, deep: bool = True) -> Report:
        return audit(self.hub, self.store, deep=deep)

    def check(self) -> None:
        """The whole oracle."""
        for partition in range(self.hub.partitions()):
            assert self.archived(partition) == self.logged(partition)
        assert self.verified().problems == []
        assert self.audited().problems == []


@pytest.fixture
def rig(tmp_path: Path) -> Rig:
    return Rig(tmp_path)


@pytest.fixture
def rig2(tmp_path: Path) -> Rig:
    """Two partitions."""
    return Rig(tmp_path, partitions=2)
