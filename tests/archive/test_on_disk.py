"""The same with the embedded hub and the store on a disk: their counts, offsets and trimming are the real ones."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from penstock.archive.archiver import archivers
from penstock.archive.begin import start
from penstock.archive.check import audit, verify
from penstock.archive.hours import HourKeeper
from penstock.archive.ledger import claim
from penstock.blobs.disk import DiskBlobs
from penstock.events import Batch, Group
from penstock.files import Files
from penstock.hub.embedded import EmbeddedHub, create
from penstock.processor import CloseReason
from penstock.processor.lease import Lease, encode_lease, lease_name
from penstock.testing import FakeClock, MemoryLog

PERIOD_S = 10


class Machine:
    def __init__(self, folder: Path) -> None:
        self.clock = FakeClock(1_795_356_000_000)
        create(folder / "hub", partitions=2, period_s=PERIOD_S, bytes_max=64 << 20, clock=self.clock)
        self.hub = EmbeddedHub(folder / "hub", bytes_max=64 << 20, clock=self.clock)
        self.store = DiskBlobs(folder / "store", Files())
        self.folder = folder
        self.offsets = ["0", "0"]
        self.number = 0
        claim(self.store, self.hub, self.clock)

    def put(self, partition: int, count: int) -> None:
        ndjson = b"".join(b'{"deviceId":"d","n":%d}\n' % (self.number + at) for at in range(count))
        group = Group(partition, count, ndjson)
        self.number += count
        self.hub.append([Batch("p", 1, self.number, count, (group,))])

    def archive(self) -> None:
        make = archivers(
            self.hub,
            self.store,
            host="h",
            epoch=lambda partition: 1,
            clock=self.clock,
            files=Files(),
            folder=self.folder,
            file_bytes_max=20_000,
            log=MemoryLog(),
        )
        for partition, offset in enumerate(self.offsets):
            archiver = make(partition)
            while True:
                read = self.hub.read(partition, offset, bytes_max=2000)
                self.offsets[partition] = archiver.process(read) or self.offsets[partition]
                if read.next_offset == offset:
                    break
                offset = read.next_offset
            archiver.close(CloseReason.SHUTDOWN)
            self._write_lease(partition)

    def _write_lease(self, partition: int) -> None:
        offset, name = self.offsets[partition], lease_name("$archive", partition)
        self.store.delete(name)
        self.store.create(name, encode_lease(Lease(partition, "h", "h-1", 1, offset, int(offset))), id="h-1")

    def start(self, partition: int) -> tuple[str, int]:
        return start(self.store, self.hub, partition, host="h", clock=self.clock)[:2]

    def check(self) -> Any:
        assert verify(self.store).problems == []
        report = audit(self.hub, self.store, deep=True)
        assert report.problems == []
        return report.totals


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machine]:
    made = Machine(tmp_path)
    yield made
    made.hub.close()


def test_hours_on_a_machine(machine: Machine) -> None:
    keeper = HourKeeper(machine.hub, machine.store)
    published = []
    for hour in range(5):
        machine.put(0, 3)
        machine.put(hour % 2, 400)
        machine.put(0, 2)
        machine.archive()
        totals = machine.check()
        if hour == 2:
            machine.hub.cut()
            machine.archive()
            machine.put(0, 1)
        machine.clock.advance(PERIOD_S)
        machine.hub.maintain()
        machine.archive()
        published += keeper.publish()
        assert machine.check().pending == 0
        assert [machine.start(p) for p in (0, 1)] == [(at, int(at)) for at in machine.offsets]
        if hour == 3:
            for partition, offset in enumerate(machine.offsets):
                machine.hub.trim(partition, before=str(int(offset) - 1))
            machine.check()
    assert len(published) == 5
    for partition, offset in enumerate(machine.offsets):
        machine.hub.trim(partition, before=offset)
    totals = machine.check()
    assert totals.archived == machine.number
    machine.put(1, 7)
    assert machine.check().pending == 7
