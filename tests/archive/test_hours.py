from __future__ import annotations

from typing import Any

import msgspec
import pytest

from penstock.archive.hours import HourKeeper, Manifest, checkpoint, refuse_older
from penstock.blobs import Listed
from penstock.errors import ArchiveError, SettingsError
from penstock.processor.lease import Lease, encode_lease, lease_name

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
    rig.store.create("_hours/2026-11-22T14-00-00.json", b"{}", id="")
    found = keeper(rig)
    found._cursors = {0: 0}
    with pytest.raises(ArchiveError, match="not what the ledger says"):
        found.publish()
    assert rig.verified().problems == ["_hours/2026-11-22T14-00-00.json: not what the ledger says"]


class Meanwhile(HourKeeper):
    """While it looks, between checkpoints and ledgers, an archiver finishes the hour."""

    rig: Rig

    def _checkpoints(self) -> list[int] | None:
        done = super()._checkpoints()
        run_all(self.rig)
        return done


class FollowsFirst(Meanwhile):
    """Reads the ledgers before the checkpoints."""

    def _checkpoints(self) -> list[int] | None:
        super()._follow()
        run_all(self.rig)
        return HourKeeper._checkpoints(self)

    def _follow(self) -> None:
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
