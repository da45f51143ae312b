from __future__ import annotations

from typing import Any

import msgspec
import pytest

from penstock.archive.ledger import HUB_BLOB, Gap, Ledger, Record, claim, owner, record_name
from penstock.blobs import Listed
from penstock.errors import ArchiveError, SettingsError
from penstock.testing import MemoryBlobs, MemoryHub

Rig = Any
HUB = "0" * 32


def record(first: int, following: int, **changes: object) -> Record:
    values: dict[str, object] = {
        "hub": HUB,
        "partition": 3,
        "file": f"3/2026-11-22T14{f'_{first:03d}' if first else ''}.json.gz",
        "hour": "2026-11-22T14",
        "part": first,
        "first": first,
        "next": following,
        "offset_next": str(following),
        "events": following - first,
        "raw_bytes": 10,
        "crc32": 0xDEADBEEF,
        "closed_by": "time",
        "host": "up",
        "epoch": 1,
        "id": f"{first}-{following}",
        "at": "2026-11-22T15:00:00.012Z",
    }
    return Record(**values | changes)  # type: ignore[arg-type]


def test_a_record_is_as_documented() -> None:
    store = MemoryBlobs()
    Ledger(store, HUB, 3).create(record(0, 998, id="i"))
    assert record_name(3, 0) == "_ledger/3/00000000000000000000.json"
    assert store.get(record_name(3, 0)).body == (
        b'{"hub":"00000000000000000000000000000000","partition":3,"file":"3/2026-11-22T14.json.gz","hour":"2026-11-22T14",'
        b'"part":0,"first":0,"next":998,"offset_next":"998","events":998,"raw_bytes":10,"crc32":3735928559,'
        b'"closed_by":"time","host":"up","epoch":1,"id":"i","at":"2026-11-22T15:00:00.012Z"}'
    )


def test_the_first_to_create_decides_and_the_others_learn() -> None:
    ledger = Ledger(MemoryBlobs(), HUB, 3)
    assert ledger.create(record(0, 5)).next == 5
    assert ledger.create(record(0, 9)).next == 5
    assert ledger.read(0) == record(0, 5)
    assert ledger.read(5) is None


def test_the_chain_is_followed_by_next() -> None:
    ledger = Ledger(MemoryBlobs(), HUB, 3)
    for first, following in ((0, 5), (5, 7), (7, 20)):
        ledger.create(record(first, following))
    assert [each.first for each in ledger.chain(0)] == [0, 5, 7]
    assert [each.first for each in ledger.chain(5)] == [5, 7]
    assert ledger.tail(5) == ledger.read(7)
    assert ledger.tail(20) is None
    assert [each and each.first for each in map(ledger.before, (0, 5, 7, 20))] == [None, 0, 5, 7]
    assert [ledger.before(between) for between in (3, 6, 21)] == [None, None, None]
    assert ledger.last() == ledger.read(7)


def gap(first: int, following: int, **changes: object) -> Gap:
    values: dict[str, object] = {
        "hub": HUB,
        "partition": 3,
        "first": first,
        "next": following,
        "offset_next": str(following),
        "reason": "they were gone",
        "host": "up",
        "epoch": 1,
        "id": f"gap-{first}-{following}",
        "at": "2026-11-22T15:00:00.012Z",
    }
    return Gap(**values | changes)  # type: ignore[arg-type]


def test_a_gap_is_as_documented_and_lies_on_the_chain() -> None:
    store = MemoryBlobs()
    ledger = Ledger(store, HUB, 3)
    assert ledger.create(gap(0, 5)) == gap(0, 5)
    assert store.get(record_name(3, 0)).body == (
        b'{"hub":"00000000000000000000000000000000","partition":3,"first":0,"next":5,"offset_next":"5",'
        b'"reason":"they were gone","host":"up","epoch":1,"id":"gap-0-5","at":"2026-11-22T15:00:00.012Z"}'
    )
    ledger.create(record(5, 7))
    ledger.create(gap(7, 9))
    assert list(ledger.chain(0)) == [gap(0, 5), record(5, 7), gap(7, 9)]
    assert (ledger.last(), ledger.before(9), ledger.before(7), ledger.before(5)) == (
        *(gap(7, 9), gap(7, 9), record(5, 7), gap(0, 5)),
    )


def test_of_a_gap_and_a_file_one_stands() -> None:
    ledger = Ledger(MemoryBlobs(), HUB, 3)
    assert ledger.create(gap(0, 5)) == ledger.create(record(0, 9)) == ledger.create(gap(0, 7)) == gap(0, 5)
    other = Ledger(MemoryBlobs(), HUB, 3)
    assert other.create(record(0, 9)) == other.create(gap(0, 5)) == record(0, 9)


@pytest.mark.parametrize("shown", [(), (0,), (3,), (9,), (0, 3, 7, 9), (99,)])
def test_the_last_record_is_found_whatever_a_listing_shows(
    shown: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    store = MemoryBlobs()
    ledger = Ledger(store, HUB, 3)
    for first in range(10):
        ledger.create(gap(first, first + 1) if first in (0, 4) else record(first, first + 1))
    monkeypatch.setattr(store, "list", lambda prefix: (Listed(record_name(3, first), 0, "") for first in shown))
    assert ledger.last() == record(9, 10)


@pytest.mark.parametrize(
    "wrong", [{"hub": "1" * 32}, {"partition": 2}, {"first": 1}, {"next": 0}, {"reason": None}, {"id": 7}]
)
def test_a_gap_that_is_not_right_is_an_error(wrong: dict[str, object]) -> None:
    store = MemoryBlobs()
    store.create(record_name(3, 0), msgspec.json.encode(msgspec.structs.replace(gap(0, 5), **wrong)), id="")
    with pytest.raises(ArchiveError):
        Ledger(store, HUB, 3).read(0)


def test_before_walks_when_the_listing_is_stale(monkeypatch: pytest.MonkeyPatch) -> None:
    store = MemoryBlobs()
    ledger = Ledger(store, HUB, 3)
    for first in range(10):
        ledger.create(record(first, first + 1))
    for shown in ([], [record_name(3, 4)], [record_name(3, 4), "_ledger/3/x.json"]):
        monkeypatch.setattr(store, "list", lambda prefix, shown=shown: (Listed(name, 0, "") for name in shown))
        found = ledger.before(10)
        assert found is not None
        assert found.first == 9


@pytest.mark.parametrize("body", [b"", b"{}", b"[]", b"\xff", b'{"hub":1}', b"0" * 100_000])
def test_a_record_that_cannot_be_read_is_an_error_and_not_absent(body: bytes) -> None:
    store = MemoryBlobs()
    store.create(record_name(3, 0), body, id="")
    with pytest.raises(ArchiveError):
        Ledger(store, HUB, 3).read(0)


@pytest.mark.parametrize(
    "wrong",
    [
        {"hub": "1" * 32},
        {"partition": 2},
        {"first": 1, "file": "3/2026-11-22T14_001.json.gz", "part": 1},
        {"next": 0},
        {"part": -1},
        {"part": 1},
        {"file": "2/2026-11-22T14.json.gz"},
        {"hour": "2026-11-22"},
    ],
)
def test_what_is_there_is_adopted_only_if_it_is_this_partitions(wrong: dict[str, object]) -> None:
    store = MemoryBlobs()
    store.create(record_name(3, 0), msgspec.json.encode(msgspec.structs.replace(record(0, 5), **wrong)), id="")
    with pytest.raises(ArchiveError):
        Ledger(store, HUB, 3).create(record(0, 5))


def test_a_store_belongs_to_one_hub(rig: Rig) -> None:
    store = MemoryBlobs()
    assert owner(store) is None
    claim(store, rig.hub, rig.clock)
    rig.clock.advance(5)
    claim(store, rig.hub, rig.clock)
    assert store.get(HUB_BLOB).body == (
        b'{"hub":"00000000000000000000000000000000","partitions":1,"period":10,"created":"2026-11-22T14:00:00.000Z"}'
    )
    other = MemoryHub()
    other.id = "1" * 32
    for stranger in (MemoryHub(2, period_s=10), MemoryHub(1, period_s=20), other):
        with pytest.raises(SettingsError, match="belongs to another"):
            claim(store, stranger, rig.clock)


def test_an_unreadable_owner_is_refused(rig: Rig) -> None:
    store = MemoryBlobs()
    store.create(HUB_BLOB, b"{", id="")
    with pytest.raises(SettingsError):
        claim(store, rig.hub, rig.clock)
