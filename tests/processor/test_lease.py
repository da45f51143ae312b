from __future__ import annotations

import json

import pytest

from penstock.blobs import BlobStore
from penstock.errors import BlobNotFound, LostRace, StoreError, StoreUnavailable
from penstock.processor.lease import (
    Holding,
    Lease,
    Start,
    Writer,
    claim,
    decode_lease,
    encode_lease,
    lease_name,
    read_leases,
    take_over,
)
from penstock.testing import FakeClock, Fault, FaultyBlobs, MemoryBlobs

NAME = lease_name("g", 3)


def claimed(store: BlobStore, clock: FakeClock, owner: str = "a", instance: str = "i") -> Holding:
    return claim(store, clock, "g", 3, Writer(owner, instance), start=Start("7", 7))


def stored(store: BlobStore) -> Lease:
    return decode_lease(store.get(NAME).body, 3)


def taken(store: BlobStore, clock: FakeClock, owner: str, instance: str = "j") -> Holding:
    blob = store.get(NAME)
    return take_over(store, clock, "g", decode_lease(blob.body, 3), blob.etag, Writer(owner, instance))


def test_the_record_has_exactly_six_keys() -> None:
    lease = Lease(0, "host-name", "i-1", 2, "998", 998)
    assert encode_lease(lease).rstrip(b" ") == (
        b'{"PartitionId": 0, "Owner": "host-name", "Token": "i-1", "Epoch": 2, "Offset": "998", "SequenceNumber": 998}'
    )
    assert decode_lease(encode_lease(lease), 0) == lease
    assert lease.instance == "i"


def test_the_length_tells_epoch_and_giving_back_and_nothing_else() -> None:
    def length(owner: str, epoch: int, number: int = 0) -> int:
        return len(encode_lease(Lease(1023, owner, f"{'i' * 16}-{10 ** (epoch % 10)}", epoch, str(number), number)))

    assert length("a", 1) == length("another", 1, 2**63) == length("x" * 64, 65)
    epochs = [length(owner, epoch) for epoch in range(1, 65) for owner in ("a", "")]
    assert len(set(epochs)) == 128, "neither the next owner's nor that of a lease that was given back meanwhile"


@pytest.mark.parametrize(
    "change",
    [
        {"PartitionId": 1},
        {"Epoch": 0},
        {"SequenceNumber": -1},
        {"Offset": ""},
        {"Offset": 998},
        {"Owner": None},
        {"Expires": 1},
    ],
)
def test_an_unreadable_record_says_so(change: dict[str, object]) -> None:
    record = json.loads(encode_lease(Lease(0, "a", "i-1", 2, "998", 998)))
    with pytest.raises(StoreError, match="lease unreadable"):
        decode_lease(json.dumps(record | change).encode(), 0)


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"null", b'{"PartitionId": 0}', b"\xff"])
def test_bytes_that_are_no_record(body: bytes) -> None:
    with pytest.raises(StoreError, match="lease unreadable"):
        decode_lease(body, 0)


def test_the_life_of_a_lease() -> None:
    store, clock = MemoryBlobs(), FakeClock()
    holding = claimed(store, clock)
    assert stored(store) == holding.lease == Lease(3, "a", "i-1", 1, "7", 7)
    holding.renew()
    assert stored(store) == Lease(3, "a", "i-2", 1, "7", 7)
    holding.checkpoint("9", 9)
    assert stored(store) == Lease(3, "a", "i-3", 1, "9", 9)
    holding.release()
    assert stored(store) == Lease(3, "", "i-4", 1, "9", 9)
    assert not holding.held
    assert not holding.lost
    with pytest.raises(LostRace):
        holding.checkpoint("10", 10)
    assert taken(store, clock, "b").lease == stored(store) == Lease(3, "b", "j-1", 2, "9", 9)


def test_the_first_claim_is_create_only() -> None:
    store, clock = MemoryBlobs(), FakeClock()
    claimed(store, clock)
    with pytest.raises(LostRace):
        claimed(store, clock, "b", "j")
    assert stored(store).owner == "a"


def test_a_checkpoint_never_goes_back() -> None:
    store, clock = MemoryBlobs(), FakeClock()
    holding = claimed(store, clock)
    holding.checkpoint("9", 9)
    before = store.get(NAME)
    holding.checkpoint("8", 8)
    holding.checkpoint("9", 9)
    assert store.get(NAME) == before


def test_one_name_keeps_its_epoch() -> None:
    store, clock = MemoryBlobs(), FakeClock()
    claimed(store, clock)
    assert taken(store, clock, "a").lease.epoch == 1
    assert taken(store, clock, "b").lease.epoch == 2


@pytest.mark.parametrize("act", ["renew", "checkpoint", "release"])
def test_who_lost_it_never_writes_again(act: str) -> None:
    store, clock = MemoryBlobs(), FakeClock()
    zombie = claimed(store, clock)
    owner = taken(store, clock, "b")
    before = store.get(NAME)
    with pytest.raises(LostRace):
        zombie.checkpoint("100", 100) if act == "checkpoint" else getattr(zombie, act)()
    assert zombie.lost
    assert not zombie.held
    with pytest.raises(LostRace):
        zombie.checkpoint("101", 101)
    assert store.get(NAME) == before
    owner.checkpoint("8", 8)
    assert stored(store) == Lease(3, "b", "j-2", 2, "8", 8)


class FreshEtag(Holding):
    """The negative control: asks for the etag of today, as Azure's first host did (their bug 115)."""

    def checkpoint(self, offset: str, sequence_number: int) -> None:
        self._etag = self._store.get(self._name).etag
        super().checkpoint(offset, sequence_number)


def test_control_a_fresh_etag_lets_the_zombie_write() -> None:
    store, clock = MemoryBlobs(), FakeClock()
    made = claimed(store, clock)
    zombie = FreshEtag(store, clock, NAME, Writer("a", "i2"), made.lease, store.get(NAME).etag, since=0)
    taken(store, clock, "b")
    zombie.checkpoint("100", 100)
    assert stored(store).owner == "a"
    assert stored(store).epoch == 1


@pytest.mark.parametrize("write", ["claim", "take over", "renew"])
def test_a_lease_is_as_old_as_the_beginning_of_its_last_write(write: str) -> None:
    """Others may have seen it land at once, and count from there."""
    clock = FakeClock()

    def slow(_operation: str, _name: str) -> None:
        clock.advance(7)

    store = MemoryBlobs()
    held = claimed(FaultyBlobs(store, slow if write == "claim" else lambda *_: None), clock)
    if write == "take over":
        blob = store.get(NAME)
        slowly = FaultyBlobs(store, slow)
        held = take_over(slowly, clock, "g", decode_lease(blob.body, 3), blob.etag, Writer("b", "j"))
    if write == "renew":
        clock.advance(5)
        held._store = FaultyBlobs(store, slow)
        held.renew()
    assert held.age_s() == 7
    assert held.in_doubt(8)


def test_a_deleted_lease_is_lost_and_not_made_again() -> None:
    store, clock = MemoryBlobs(), FakeClock()
    holding = claimed(store, clock)
    store.delete(NAME)
    with pytest.raises(LostRace):
        holding.renew()
    assert holding.lost
    with pytest.raises(BlobNotFound):
        store.get(NAME)


def test_an_unavailable_store_leaves_it_held_until_in_doubt() -> None:
    store, clock = MemoryBlobs(), FakeClock()
    down = False
    faulty = FaultyBlobs(store, lambda _operation, _name: Fault.NOTHING_DONE if down else None)
    holding = claimed(faulty, clock)
    clock.advance(20)
    assert not holding.in_doubt(30)
    down = True
    with pytest.raises(StoreUnavailable):
        holding.renew()
    assert holding.held
    clock.advance(5)
    assert holding.in_doubt(30)
    down = False
    holding.renew()
    assert not holding.in_doubt(30)


@pytest.mark.parametrize("fault", [Fault.DONE, Fault.LATE])
def test_a_write_of_unknown_outcome_that_was_done_loses_the_lease(fault: Fault) -> None:
    store, clock = MemoryBlobs(), FakeClock()
    faults = iter([None, fault])
    faulty = FaultyBlobs(store, lambda _operation, _name: next(faults, None), late_by=1)
    holding = claimed(faulty, clock)
    with pytest.raises(StoreUnavailable):
        holding.checkpoint("8", 8)
    with pytest.raises(LostRace):
        holding.checkpoint("9", 9)
    assert holding.lost
    assert stored(store).sequence_number == 8


def test_read_leases_reports_what_it_cannot_read() -> None:
    store, clock = MemoryBlobs(), FakeClock()
    claimed(store, clock)
    store.create(lease_name("g", 1), b"rubbish", id="rubbish")
    unreadable: list[int] = []
    leases = read_leases(store, "g", range(4), unreadable=lambda partition, _error: unreadable.append(partition))
    assert leases == [None, None, None, stored(store)]
    assert unreadable == [1]
    with pytest.raises(StoreError, match="lease unreadable"):
        read_leases(store, "g", range(4))
