"""`penstock leases` and `why` on an installation in which nothing runs, so that what they say depends on no moment."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import msgspec
import pytest
from click.testing import CliRunner

from penstock.archive.ledger import Record, claim, record_name
from penstock.blobs.disk import DiskBlobs
from penstock.cli.leases import Sight, observe
from penstock.cli.main import penstock
from penstock.clock import SystemClock
from penstock.errors import SettingsError
from penstock.files import Files
from penstock.hub.embedded import EmbeddedHub, create
from penstock.processor.lease import Lease, encode_lease, lease_name
from penstock.processor.moves import Moves
from penstock.testing import FakeClock, MemoryLog

ALIVE, DEAD = 4e9, 1e9  # the time of a lease's file: in the future it is of age 0, and 2001 is long ago
GIB = 1 << 30


class Place:
    """A data folder with a hub of four partitions, without events, and a store."""

    def __init__(self, data: Path) -> None:
        self.data = data
        self.store = DiskBlobs(data / "store", Files())
        create(data / "hub", partitions=4, period_s=3600, bytes_max=GIB, clock=SystemClock())
        with EmbeddedHub(data / "hub", bytes_max=GIB, clock=SystemClock(), read_only=True) as hub:
            self.hub_id = hub.id
            claim(self.store, hub, SystemClock())

    def lease(
        self, partition: int, owner: str, *, written: float = ALIVE, epoch: int = 1, group: str = "$archive"
    ) -> Lease:
        lease = Lease(partition, owner, f"{owner}-{epoch}-{partition}-1", epoch, "0", 0)
        name = lease_name(group, partition)
        self.store.delete(name)
        self.store.create(name, encode_lease(lease), id=lease.token)
        os.utime(self.data / "store" / name, (written, written))
        return lease

    def run(self, *arguments: str) -> str:
        done = CliRunner().invoke(penstock, [*arguments, "--data", str(self.data)], catch_exceptions=False)
        assert done.exit_code == 0, done.output
        return done.output

    def rows(self, *arguments: str) -> Any:
        return msgspec.json.decode(self.run("leases", "--watch", "0s", "--json", *arguments))

    def table(self) -> list[list[str]]:
        lines = self.run("leases", "--watch", "0s").splitlines()
        return [[cell.strip() for cell in line.split("│")[1:-1]] for line in lines if line.startswith("│")]


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


def test_a_table_in_which_everything_happens(place: Place) -> None:
    moves = Moves(place.store, "$archive", clock=FakeClock(), log=MemoryLog())
    moves.note(place.lease(0, "a"), None, expired=False)
    seen = place.lease(1, "a")
    moves.note(place.lease(1, "b", epoch=2, written=DEAD), seen, expired=True)
    place.lease(2, "")
    rows = place.rows()
    assert [set(row) for row in rows] == [
        {
            *("partition", "owner", "epoch", "offset", "sequence_number", "age_s", "lag_events"),
            *("moved", "next", "problem", "lag_records"),
        }
    ] * 4
    assert rows[0] == {
        "partition": 0,
        "owner": "a",
        "epoch": 1,
        "offset": "0",
        "sequence_number": 0,
        "age_s": 0.0,
        "lag_events": 0,
        "moved": {"why": "first", "from": None, "to": "a", "at": "2026-11-22T14:00:00.000Z"},
        "next": None,
        "problem": None,
        "lag_records": None,
    }
    assert rows[1]["age_s"] > 1e8
    assert [row["moved"] for row in rows[1:]] == [
        {"why": "expired", "from": "a", "to": "b", "at": "2026-11-22T14:00:00.000Z"},
        {"why": "given_back", "from": None, "to": "", "at": None},
        None,
    ]
    assert [row["next"] for row in rows] == [
        None,
        {"why": "expired", "from": "b", "to": "a", "due_s": 0.0},
        {"why": "given_back", "from": None, "to": "a", "due_s": 0.0},
        {"why": "first", "from": None, "to": "a", "due_s": 0.0},
    ]
    assert [[row[0], row[1], row[6], row[7]] for row in place.table()] == [
        ["0", "a", "a was the first to claim it, 2026-11-22T14:00:00.000Z", "none"],
        [
            *("1", "b", "b took it, a did not renew it, 2026-11-22T14:00:00.000Z"),
            "not renewed: a takes it in its next round",
        ],
        ["2", "", "its host gave it back", "a takes it in its next round"],
        ["3", "", "never: nobody has claimed it yet", "a takes it in its next round"],
    ]


def test_a_balanced_table_and_one_that_is_not(place: Place) -> None:
    for partition, owner in enumerate("abab"):
        place.lease(partition, owner)
    assert [row[7] for row in place.table()] == ["none: balanced"] * 4
    assert [row[6] for row in place.table()] == [f"{owner} was the first to claim it" for owner in "abab"]
    for partition, owner in enumerate("aaab"):
        place.lease(partition, owner, epoch=2)
    assert [row["next"] for row in place.rows() if row["next"]] == [
        {"why": "balance", "from": "a", "to": "b", "due_s": 0.0}
    ]
    assert sorted(row[7] for row in place.table()) == ["b takes it in its next round, to even out", *["none"] * 3]
    assert [row[6] for row in place.table()] == ["not noted"] * 4


def test_a_lease_that_cannot_be_read_is_named_and_the_others_are_shown(place: Place) -> None:
    for partition in range(4):
        place.lease(partition, "a")
    (place.data / "store" / lease_name("$archive", 2)).write_bytes(b"{")
    row = place.rows()[2]
    assert (row["owner"], row["next"]) == (None, None)
    assert "lease unreadable: partition 2" in row["problem"]
    assert "lease unreadable: partition 2" in place.table()[2][6]


def test_watching_sees_which_leases_are_renewed() -> None:
    """Partition 0 is renewed once, 1 and 2 are not; of 2 the file's time says that it has been so for longer."""
    clock, looks = FakeClock(jumps=True), 0

    def look() -> list[Lease | None]:
        nonlocal looks
        looks += 1
        return [Lease(p, "a", f"a-{looks > 3 and p == 0}", 1, "0", 0) for p in range(3)]

    sight = Sight(
        look,
        moved=lambda lease: None,
        written_ms=lambda partition: clock.now_ms() - 9_000 if partition == 2 else None,
        ends=lambda: None,
        hosts=frozenset(),
        problems={},
    )
    seen = observe(sight, clock, 1.0)
    assert looks == 6
    assert [round(one.age_s, 6) for one in seen] == [0.4, 1.0, 9.0]
    assert [round(one.age_s, 6) for one in observe(sight, clock, 0.0)] == [0.0, 0.0, 9.0]


def test_another_group_has_leases_of_its_own(place: Place) -> None:
    place.lease(0, "a")
    place.lease(1, "mine", group="alarms")
    assert [row["owner"] for row in place.rows("--group", "alarms")] == [None, "mine", None, None]


def test_the_store_alone_tells_what_it_knows(place: Place, tmp_path: Path) -> None:
    place.lease(0, "a")
    elsewhere = tmp_path / "elsewhere"
    arguments = ["leases", "--watch", "0s", "--json", "--store", str(place.data / "store")]
    done = CliRunner().invoke(penstock, [*arguments, "--data", str(elsewhere)], catch_exceptions=False)
    assert (done.exit_code, elsewhere.exists()) == (0, False)
    assert [(row["owner"], row["lag_events"]) for row in msgspec.json.decode(done.output)] == [
        ("a", None),
        *[(None, None)] * 3,
    ]
    Place(elsewhere)
    with pytest.raises(SettingsError, match="belongs to another hub"):
        CliRunner().invoke(penstock, [*arguments, "--data", str(elsewhere)], catch_exceptions=False)


def test_why_an_hour_closed(place: Place) -> None:
    record = Record(
        hub=place.hub_id,
        partition=0,
        file="0/2026-11-22T14.json.gz",
        hour="2026-11-22T14",
        part=0,
        first=0,
        next=998,
        offset_next="998",
        events=998,
        raw_bytes=239_520,
        crc32=1,
        closed_by="time",
        host="up",
        epoch=1,
        id="1",
        at="2026-11-22T15:00:00.012Z",
    )
    place.store.create(record_name(0, 0), msgspec.json.encode(record), id="1")
    (place.data / "store" / "0").mkdir()
    (place.data / "store" / "0" / "2026-11-22T14.json.gz").touch()
    for hour in ("2026-11-22T14", "2026-11-22T14:59:59Z", "2026-11-22T15:30:00+01:00"):
        said = place.run("why", "0", hour).splitlines()
        assert said[:2] == [
            "partition 0, hour 2026-11-22T14: closed, all its events are in files",
            "  0/2026-11-22T14.json.gz: events 0 to 997 (998, 239,520 bytes). Closed by time: a later hour began: before event 998 "
            "the log has a frame or time marker of it. Decided by up in epoch 1, 2026-11-22T15:00:00.012Z.",
        ]
    found = msgspec.json.decode(place.run("why", "0", "2026-11-22T14", "--json"))
    assert (found["state"], found["files"][0]["closed_by"], found["manifest"]["published"]) == ("closed", "time", False)
    said = place.run("why", "0", "2026-11-22T13").splitlines()
    assert said[:2] == [
        "partition 0, hour 2026-11-22T13: empty",
        "  No event was enqueued in it: the first one of the partition is in hour 2026-11-22T14.",
    ]
    with pytest.raises(SettingsError, match="There is no partition 4; this hub has 0 to 3"):
        place.run("why", "4", "2026-11-22T14")
