from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from penstock.archive.begin import gap
from penstock.archive.hours import HourKeeper, Manifest, checkpoint, manifest, refuse_older
from penstock.archive.ledger import Ledger, Record, lost_name
from penstock.blobs import BlobStore, Listed
from penstock.errors import ArchiveError, SettingsError, StoreUnavailable
from penstock.processor.lease import Lease, encode_lease, lease_name
from penstock.testing import Fault, FaultyBlobs, MemoryBlobs
from tests.archive.conftest import Rig as make_rig

Rig = Any


def keeper(rig: Rig) -> HourKeeper:
    return HourKeeper(rig.hub, rig.store)


def run_all(rig: Rig) -> None:
    for partition in range(rig.hub.partitions()):
        rig.run(partition)


def test_an_hour_is_published_when_every_partition_has_archived_it(rig2: Rig) -> None:
    rig = rig2
    rig.put(3)
    rig.put(2, partition=1)
    rig.close_hour()
    publisher = keeper(rig)
    assert publisher.publish() == []  # no lease: unknown
    rig.run(0)
    rig.write_lease(1)
    assert publisher.publish() == []
    rig.run(1)
    assert publisher.publish() == ["2026-11-22T14-00-00"]
    assert publisher.publish() == []
    found = msgspec.json.decode(rig.store.get("_hours/2026-11-22T14-00-00.json").body, type=Manifest)
    assert [(each.file, each.first, each.next, each.events) for each in found.files] == [
        ("0/2026-11-22T14-00-00.json.gz", 0, 3, 3),
        ("1/2026-11-22T14-00-00.json.gz", 0, 2, 2),
    ]
    assert (found.hub, found.events) == (rig.hub.id, 5)
    assert found.raw_bytes == sum(each.raw_bytes for each in found.files)
    rig.check()


def test_an_hour_that_goes_on_is_not_published_although_its_files_were_cut(rig2: Rig) -> None:
    rig = rig2
    rig.put(3)
    rig.hub.cut()
    run_all(rig)
    publisher = keeper(rig)
    assert publisher.publish() == []
    rig.put(1)
    rig.close_hour()
    run_all(rig)
    assert publisher.publish() == ["2026-11-22T14-00-00"]
    assert len(msgspec.json.decode(rig.store.get("_hours/2026-11-22T14-00-00.json").body)["files"]) == 2


def test_hours_without_events_have_none_and_idle_partitions_hold_nothing_up(rig2: Rig) -> None:
    rig = rig2
    rig.put(1)
    rig.next_period(5)
    rig.put(1)
    rig.close_hour()
    run_all(rig)
    assert keeper(rig).publish() == ["2026-11-22T14-00-00", "2026-11-22T14-00-50"]


def test_whoever_publishes_writes_the_same_and_goes_on_where_another_stopped(rig2: Rig) -> None:
    rig = rig2
    first, second = keeper(rig), keeper(rig)
    expected = []
    for _ in range(3):
        rig.put(1)
        rig.put(1, partition=1)
        rig.close_hour()
        run_all(rig)
        expected.append(first.publish())
    assert [len(hours) for hours in expected] == [1, 1, 1]
    assert second.publish() == []
    rig.put(1)
    rig.close_hour()
    run_all(rig)
    assert keeper(rig).publish() == second.publish() == first.publish()
    rig.check()


@pytest.mark.parametrize("shown", [[], ["_ledger/0/00000000000000000001.json"]])
def test_a_stale_listing_never_makes_a_wrong_manifest(
    rig2: Rig, shown: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    rig = rig2
    for _ in range(3):
        rig.put(1)
        rig.put(1, partition=1)
        rig.close_hour()
    run_all(rig)
    with monkeypatch.context() as patched:
        patched.setattr(
            rig.store,
            "list",
            lambda prefix: (Listed(name, 0, "") for name in shown if name.startswith(prefix)),
        )
        assert len(keeper(rig).publish()) == 3
    rig.check()


def test_a_manifest_that_is_wrong_is_named(rig: Rig) -> None:
    rig.put(1)
    rig.close_hour()
    rig.run()
    publisher = HourKeeper(rig.hub, Hiding(rig.store, {"_hours/2026-11-22T14-00-00.json"}))
    rig.store.create("_hours/2026-11-22T14-00-00.json", b"{}", id="")
    with pytest.raises(ArchiveError, match="not what the ledger says"):
        publisher.publish()
    assert rig.verified().problems == ["_hours/2026-11-22T14-00-00.json: not what the ledger says"]


def test_a_file_that_was_declared_lost_stands_apart(rig2: Rig) -> None:
    """And whoever wrote the manifest before or after that, or its file late, is no fault."""
    rig, name = rig2, "_hours/2026-11-22T14-00-00.json"
    rig.put(3)
    rig.put(2, partition=1)
    rig.close_hour()
    run_all(rig)
    first, second, third = keeper(rig), keeper(rig), keeper(rig)
    for publisher in (second, third):
        publisher._resume()  # before another publishes
    first.publish()
    everything = rig.store.get(name).body

    [record] = rig.records(1)
    lose(rig, record)
    assert second.publish() == ["2026-11-22T14-00-00"]
    assert (rig.store.get(name).body, rig.verified().problems) == (everything, [])

    file = rig.store.get(record.file).body
    rig.store.delete(record.file)
    rig.store.delete(name)
    assert third.publish() == ["2026-11-22T14-00-00"]
    found = msgspec.json.decode(rig.store.get(name).body, type=Manifest)
    assert ([one.file for one in found.files], found.events, found.raw_bytes) == (
        [rig.records(0)[0].file],
        3,
        found.files[0].raw_bytes,
    )
    assert [(one.file, one.events) for one in found.lost] == [(record.file, 2)]
    assert rig.verified().problems == rig.audited().problems == []
    rig.replace(record.file, file)
    assert rig.verified().problems == []

    rig.store.delete(lost_name(1, 0))
    assert rig.verified().problems == [f"{name}: not what the ledger says"]


def lose(rig: Rig, record: Record) -> None:
    order = gap(
        rig.hub, record.partition, record.first, record.next, "skipped: gone", host="ann", epoch=1, clock=rig.clock
    )
    Ledger(rig.store, rig.hub.id, record.partition).lose(order)


def test_what_is_no_manifest_does_not_count_as_the_last_one(rig: Rig) -> None:
    for name in ("_hours/zzz.json", "_hours/2026-11-22T14-00-00", "_hours/2026-11-22T99.json"):
        rig.store.create(name, b"", id="")
    rig.put(1)
    rig.close_hour()
    rig.run()
    assert keeper(rig).publish() == ["2026-11-22T14-00-00"]


class Meanwhile(HourKeeper):
    """While it looks, between checkpoints and ledgers, an archiver finishes the hour."""

    rig: Rig

    def _checkpoints(self) -> list[Lease] | None:
        done = super()._checkpoints()
        run_all(self.rig)
        return done


class FollowsFirst(Meanwhile):
    """Reads the ledgers before the checkpoints."""

    def _checkpoints(self) -> list[Lease] | None:
        super()._follow()
        run_all(self.rig)
        return HourKeeper._checkpoints(self)

    def _follow(self) -> None:
        return

    def _check_reached(self, done: list[Lease]) -> None:
        return


@pytest.mark.parametrize("kind", [Meanwhile, FollowsFirst])
def test_a_manifest_has_the_file_that_is_archived_while_it_is_made(rig: Rig, kind: type[Meanwhile]) -> None:
    rig.put(3)
    rig.hub.cut()
    rig.run()
    rig.put(1)
    rig.close_hour()
    publisher = kind(rig.hub, rig.store)
    publisher.rig = rig
    while not publisher.publish():
        continue
    found = msgspec.json.decode(rig.store.get("_hours/2026-11-22T14-00-00.json").body, type=Manifest)
    assert found.events == (4 if kind is Meanwhile else 3)
    assert (rig.verified().problems == []) == (kind is Meanwhile)


class Hiding(FaultyBlobs):
    """A store whose listings do not show some names."""

    def __init__(self, store: BlobStore, hidden: Collection[str]) -> None:
        super().__init__(store, lambda _operation, _name: None)
        self._hidden = hidden

    def list(self, prefix: str) -> Iterator[Listed]:
        return (blob for blob in super().list(prefix) if blob.name not in self._hidden)


class NothingPassedOver(HourKeeper):
    """Takes records of published hours for news."""

    def _resume(self) -> None:
        super()._resume()
        self._published = ""


class WaitsForNobody(HourKeeper):
    """Publishes what some partition has archived."""

    def _complete(self, hour: str, done: list[int]) -> bool:
        return any(super(WaitsForNobody, self)._complete(hour, [number] * len(done)) for number in done)


class LedgersFirst(HourKeeper):
    """Reads the checkpoints last: what they prove is of another moment than what was followed."""

    def _checkpoints(self) -> list[Lease] | None:
        if super()._checkpoints() is None:
            return None
        super()._follow()
        return super()._checkpoints()

    def _follow(self) -> None:
        return

    def _check_reached(self, done: list[Lease]) -> None:
        return


class TrustsLedgers(HourKeeper):
    """Does not see that a record is gone."""

    def _check_reached(self, done: list[Lease]) -> None:
        return


def truth(rig: Rig) -> dict[str, bytes]:
    """The manifests of all hours, from the whole ledger."""
    hours: dict[str, list[Record]] = {}
    for partition in range(rig.hub.partitions()):
        ledger = Ledger(rig.store, rig.hub.id, partition)
        for record in ledger.chain(0):
            if isinstance(record, Record):
                hours.setdefault(record.hour, []).append(record)
    return {f"_hours/{hour}.json": manifest(rig.hub.id, hour, records) for hour, records in hours.items()}


def published(rig: Rig) -> dict[str, bytes]:
    return {blob.name: rig.store.get(blob.name).body for blob in rig.store.list("_hours/")}


def scene(folder: Path) -> Rig:
    """Three partitions, one idle since the beginning, and two hours; the first has two files in partition 0. Nothing is archived."""
    rig = make_rig(folder, partitions=3)
    rig.write_lease(2)
    rig.put(2)
    rig.hub.cut()
    rig.put(1)
    rig.put(1, partition=1)
    rig.close_hour()
    rig.put(1, partition=1)
    rig.put(1)
    rig.close_hour()
    return rig


def publish_in_the_end(rig: Rig, kind: type[HourKeeper], store: BlobStore | None = None) -> list[str]:
    """Everything is archived and a host starts; what is wrong then."""
    run_all(rig)
    try:
        for _ in range(3):
            kind(rig.hub, store or rig.store).publish()
    except ArchiveError as error:
        return [error.detail]
    found, wanted = published(rig), truth(rig)
    return [name for name in found | wanted if found.get(name) != wanted.get(name)] + rig.verified().problems


@pytest.mark.parametrize("kind", [HourKeeper, NothingPassedOver])
def test_whatever_a_listing_hides_the_manifests_are_right(tmp_path: Path, kind: type[HourKeeper]) -> None:
    rig = scene(tmp_path)
    rig.run(0, bytes_max=1)
    rig.run(1)
    rig.run(2)
    assert len(keeper(rig).publish()) == 2
    rig.store.delete("_hours/2026-11-22T14-00-10.json")
    names = [blob.name for prefix in ("_ledger/", "_hours/") for blob in rig.store.list(prefix)]
    assert len(names) == 6
    wrong = []
    for shown in itertools.product((True, False), repeat=len(names)):
        hidden = {name for name, seen in zip(names, shown, strict=True) if not seen}
        rig.store.delete("_hours/2026-11-22T14-00-10.json")
        wrong += publish_in_the_end(rig, kind, Hiding(rig.store, hidden))
    assert (wrong == []) == (kind is HourKeeper)


def test_an_archive_that_began_late_has_all_its_hours(rig2: Rig) -> None:
    """Events 0 and 1 were gone before there was an archive; 2 to 4 are archived, of which the log has kept only 4."""
    rig = rig2
    for _ in range(5):
        rig.put(1)
    rig.put(1, partition=1)
    rig.hub.trim(0, before="2")
    rig.begin()
    rig.close_hour()
    run_all(rig)
    rig.hub.trim(0, before="4")
    hidden = {f"_ledger/0/{first:020}.json" for first in (0, 2)}
    assert HourKeeper(rig.hub, Hiding(rig.store, hidden)).publish() == ["2026-11-22T14-00-00"]
    assert published(rig) == truth(rig)
    assert [each.first for each in msgspec.json.decode(*published(rig).values(), type=Manifest).files] == [2, 0]
    rig.verified()


@pytest.mark.parametrize("kind", [HourKeeper, TrustsLedgers])
def test_nothing_is_published_of_a_ledger_that_lacks_a_record(rig2: Rig, kind: type[HourKeeper]) -> None:
    rig = rig2
    for _ in range(2):
        rig.put(1)
        rig.put(1, partition=1)
        rig.hub.cut()
    rig.close_hour()
    run_all(rig)
    rig.store.delete(f"_ledger/0/{1:020}.json")
    publisher = kind(rig.hub, rig.store)
    if kind is HourKeeper:
        with pytest.raises(ArchiveError, match="followed to 1, and its checkpoint is 2"):
            publisher.publish()
    else:
        publisher.publish()
    assert len(published(rig)) == (kind is not HourKeeper)


Meantime = Callable[[Rig, HourKeeper], object]

MEANTIMES: dict[str, Meantime] = {
    "nothing happens": lambda rig, other: None,
    "another publishes": lambda rig, other: other.publish(),
    "partition 0 is archived": lambda rig, other: rig.run(0),
    "all is archived": lambda rig, other: run_all(rig),
    "all is archived, and another publishes": lambda rig, other: (run_all(rig), other.publish()),
}


def explored(folder: Path, kind: type[HourKeeper]) -> Iterator[list[str]]:
    """What is wrong after each run: a host publishes, and at one of its requests a fault happens, and something else meanwhile."""
    for archived, (name, act), fault in itertools.product(((), (0,), (0, 1)), MEANTIMES.items(), (None, *Fault)):
        at = requests = 0
        while at <= requests:
            rig = scene(folder)
            for partition in (0, 1):
                rig.write_lease(partition)
            for partition in archived:
                rig.run(partition)
            requests, wrong = interrupted(rig, kind, at, fault, act)
            wrong += publish_in_the_end(rig, kind)
            yield [f"{archived} archived, {name}, {fault} at request {at}: {what}" for what in wrong]
            at += 1


def interrupted(rig: Rig, kind: type[HourKeeper], at: int, fault: Fault | None, act: Meantime) -> tuple[int, list[str]]:
    """Two calls of `publish`, with `act` and the fault at request `at`: how many requests there were, and what was wrong."""
    requests = 0
    other = kind(rig.hub, rig.store)

    def plan(_operation: str, _name: str) -> Fault | None:
        nonlocal requests
        requests += 1
        if requests - 1 != at:
            return None
        act(rig, other)
        return fault

    store = FaultyBlobs(rig.store, plan)
    mine = kind(rig.hub, store)
    wrong = []
    for _ in range(2):
        try:
            mine.publish()
        except StoreUnavailable:
            continue
        except ArchiveError as error:
            wrong.append(error.detail)
    store.land()
    return requests, wrong


def test_several_hosts_faults_and_restarts_at_every_request(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = list(explored(tmp_path, HourKeeper))
    with capsys.disabled():
        print(f"\nhour manifests: {len(runs):,} runs")
    assert [wrong for wrong in runs if wrong] == []


@pytest.mark.parametrize("kind", [WaitsForNobody, LedgersFirst])
def test_a_careless_host_is_found_out(tmp_path: Path, kind: type[HourKeeper]) -> None:
    assert any(explored(tmp_path, kind))


def test_a_hub_that_ends_before_its_archive_is_refused(rig: Rig) -> None:
    lease = Lease(0, "up", "x-1", 1, "1", 1)
    rig.store.create(lease_name("$archive", 0), encode_lease(lease), id="x-1")
    with pytest.raises(SettingsError, match="older than its archive"):
        refuse_older(rig.store, rig.hub)
    rig.put(1)
    refuse_older(rig.store, rig.hub)


def test_an_unreadable_lease_is_no_checkpoint(rig: Rig) -> None:
    assert checkpoint(rig.store, 0) is None
    rig.write_lease(0)
    assert checkpoint(rig.store, 0) == 0
    rig.replace("_leases/$archive/0.json", b"{")
    assert checkpoint(rig.store, 0) is None


def test_a_listing_that_hides_the_last_records_of_a_published_hour_changes_nothing(rig: Rig) -> None:
    """A keeper that begins then begins inside of that hour. It must not take the rest of it for the whole of it."""
    rig.put(3)
    rig.hub.cut()
    rig.put(2)
    rig.close_hour()
    rig.run()
    assert keeper(rig).publish() == ["2026-11-22T14-00-00"]
    rig.put(1)
    rig.close_hour()
    rig.run()

    class Hiding(MemoryBlobs):
        def list(self, prefix: str) -> Iterator[Listed]:
            found = list(super().list(prefix))
            return iter(found[:1] if prefix.startswith("_ledger/") else found)

    hiding = Hiding()
    hiding._blobs = rig.store._blobs
    assert HourKeeper(rig.hub, hiding).publish() == ["2026-11-22T14-00-10"]
    rig.check()
