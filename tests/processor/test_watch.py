"""What is read and what is not, and when a lease is called expired."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest

from penstock.blobs import Blob, BlobStore, Listed
from penstock.errors import StoreError, StoreUnavailable
from penstock.processor.lease import Holding, Start, Writer, claim, encode_lease, lease_name, take_over
from penstock.processor.watch import LOOKS, Seen, Watch
from penstock.testing import FakeClock, Fault, FaultyBlobs, MemoryBlobs

LEASE_S = 30.0
PARTITIONS = 8


class World:
    """Leases of other hosts in a store that counts what it is asked."""

    def __init__(self) -> None:
        self.clock = FakeClock()
        self.store = MemoryBlobs()
        self.asked: Counter[str] = Counter()
        self.troubles: list[tuple[int, str]] = []
        self.counting = FaultyBlobs(self.store, lambda operation, _name: self.asked.update((operation,)))
        self.watch = self.watching(self.counting)
        self.writers: dict[str, Writer] = {}
        self.holdings: dict[int, Holding] = {}

    def watching(self, store: BlobStore) -> Watch:
        def trouble(partition: int, error: StoreError | None) -> None:
            if error is not None:
                self.troubles.append((partition, str(error)))

        return Watch(store, "g", PARTITIONS, me="me", clock=self.clock, lease_s=LEASE_S, trouble=trouble)

    def give(self, partition: int, owner: str) -> None:
        writer = self.writers.setdefault(owner, Writer(owner, f"{owner}-i"))
        found = self.watch.seen(partition)
        if partition not in self.holdings:
            self.holdings[partition] = claim(self.store, self.clock, "g", partition, writer, start=Start("0", 0))
            return
        blob = self.store.get(lease_name("g", partition))
        assert found is not None
        self.holdings[partition] = take_over(
            self.store, self.clock, "g", self.holdings[partition].lease, blob.etag, writer
        )

    def pass_time(self, seconds: float, *, living: bool = True, watch: Watch | None = None) -> None:
        """Looks, and the renewals of those that live, three in a lease time."""
        for turn in range(round(seconds / (LEASE_S / LOOKS))):
            self.clock.advance(LEASE_S / LOOKS)
            for partition, holding in self.holdings.items():
                if living and holding.held and (turn + partition) % (LOOKS // 3) == 0:
                    holding.renew()
            (watch or self.watch).look({})

    def owner(self, partition: int) -> str | None:
        seen = self.watch.seen(partition)
        return None if seen is None else seen.lease.owner


@pytest.fixture
def world() -> World:
    world = World()
    for partition in range(PARTITIONS):
        world.give(partition, f"host-{partition % 2}")
    world.watch.look({})
    return world


def test_a_quiet_group_costs_one_listing_a_look(world: World) -> None:
    assert world.asked == {"list": 1, "get": PARTITIONS}
    world.asked.clear()
    world.pass_time(4 * LEASE_S)
    assert world.asked == {"list": 4 * LOOKS}
    assert not any(world.watch.expired(partition) for partition in range(PARTITIONS))


def test_what_was_given_back_is_seen_at_the_next_look(world: World) -> None:
    world.pass_time(LEASE_S)
    world.holdings[3].release()
    world.watch.look({})
    assert world.owner(3) == ""


def test_a_lease_expires_after_the_lease_time_and_not_before(world: World) -> None:
    world.pass_time(LEASE_S / 2)
    for holding in world.holdings.values():
        holding.renew()
    world.watch.look({})
    silent_since = world.clock.monotonic()
    del world.holdings[3]
    assert world.watch.expires_in() == LEASE_S
    world.pass_time(LEASE_S - LEASE_S / LOOKS)
    assert not world.watch.expired(3)
    world.clock.advance(world.watch.expires_in())
    assert world.clock.monotonic() == silent_since + LEASE_S, "it says when to look"
    world.watch.look({})
    assert [partition for partition in range(PARTITIONS) if world.watch.expired(partition)] == [3]


@pytest.mark.parametrize("given_back", [False, True])
def test_another_owner_is_seen_at_the_next_look(world: World, given_back: bool) -> None:
    """By the lease's length, whatever the names: also when it was given back and taken since the last look."""
    world.pass_time(LEASE_S)
    world.asked.clear()
    if given_back:
        world.holdings[1].release()
    world.give(1, "host-0")
    world.watch.look({})
    assert world.owner(1) == "host-0"
    assert world.asked == {"list": 1, "get": 1}


def test_control_a_lease_of_one_length_hides_its_owner(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("penstock.processor.lease.encode_lease", lambda lease: encode_lease(lease).ljust(1000))
    for holding in world.holdings.values():
        holding.renew()
    world.watch.look({})
    world.give(1, "host-0")
    world.watch.look({})
    assert world.owner(1) == "host-1"


def test_what_the_victim_has_is_read_before_stealing(world: World) -> None:
    world.pass_time(LEASE_S)
    world.asked.clear()
    world.watch.confirm("host-1")
    assert world.asked == {"get": PARTITIONS / 2}
    seen = world.watch.seen(1)
    assert seen is not None and seen.etag == world.store.get(lease_name("g", 1)).etag


def test_a_deleted_lease_is_seen_as_none(world: World) -> None:
    world.holdings.pop(2)
    world.store.delete(lease_name("g", 2))
    world.watch.look({})
    assert world.watch.seen(2) is None
    assert world.watch.known(2)


def test_an_unreadable_lease_is_not_known(world: World) -> None:
    blob = world.store.get(lease_name("g", 2))
    world.holdings.pop(2)
    world.store.replace(lease_name("g", 2), b"rubbish", etag=blob.etag, id="rubbish")
    world.watch.look({})
    assert not world.watch.known(2)
    assert [partition for partition, _ in world.troubles] == [2]


def test_a_lease_that_could_not_be_read_is_read_at_the_next_look(world: World) -> None:
    """Its mark was noted when the read failed. Without a second read its old owner would be believed until it expires."""
    failing = ["get"]
    faulty = FaultyBlobs(
        world.store, lambda operation, _name: Fault.NOTHING_DONE if operation in failing and failing.pop() else None
    )
    watch = world.watching(faulty)
    failing.clear()
    watch.look({})
    world.give(3, "host-9")
    failing.append("get")
    watch.look({})
    assert not watch.known(3)
    watch.look({})
    seen = watch.seen(3)
    assert watch.known(3) and seen is not None and seen.lease.owner == "host-9"


def test_in_the_end_every_lease_is_read(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("penstock.processor.watch._READ_ANYWAY", 2 * LOOKS)
    world.pass_time(LEASE_S)
    seen = world.watch.seen(1)
    assert seen is not None and seen.lease.owner == "host-1"
    world.store.delete(lease_name("g", 1))
    world.holdings[1] = claim(world.store, world.clock, "g", 1, Writer("host-0", "new"), start=Start("0", 0))
    world.watch.look({})
    assert world.owner(1) == "host-1", "it has the epoch of before, and so the length"
    world.pass_time(2 * LEASE_S)
    assert world.owner(1) == "host-0"


def test_what_another_wrote_of_ones_own_is_noticed(world: World) -> None:
    mine = world.holdings[5]
    assert list(world.watch.look({5: mine.lease.token})) == []
    mine.renew()
    assert list(world.watch.look({5: mine.lease.token})) == [], "it was its own write"
    blob = world.store.get(lease_name("g", 5))
    take_over(world.store, world.clock, "g", mine.lease, blob.etag, Writer("thief", "t"))
    assert list(world.watch.look({5: mine.lease.token})) == [5]


def test_no_listing_is_an_error_and_nothing_is_taken_for_expired(world: World) -> None:
    world.pass_time(LEASE_S / 2)

    def fail(_prefix: str) -> Iterator[Listed]:
        raise StoreUnavailable("no", blob="")

    world.counting.list = fail  # type: ignore[method-assign]
    world.clock.advance(2 * LEASE_S)
    with pytest.raises(StoreUnavailable):
        world.watch.look({})
    assert not any(world.watch.expired(partition) for partition in range(PARTITIONS))


def test_listings_that_have_other_marks_than_reads_do_not_keep_the_dead(world: World) -> None:
    class Foreign(FaultyBlobs):
        def list(self, prefix: str) -> Iterator[Listed]:
            return (Listed(blob.name, blob.size, "always the same") for blob in super().list(prefix))

    watch = world.watching(Foreign(world.store, lambda _operation, _name: None))
    watch.look({})
    world.holdings.clear()
    expired: set[int] = set()
    for _ in range(LOOKS + 2):
        world.pass_time(LEASE_S / LOOKS, watch=watch)
        expired |= {partition for partition in range(PARTITIONS) if watch.expired(partition)}
    assert expired == set(range(PARTITIONS))


class Slow:
    """A store whose answers take up to one and a half lease times, before it has looked and after; the living renew meanwhile.

    Listings hide some leases, which are read then.
    """

    def __init__(self, world: World, source: random.Random) -> None:
        self._world = world
        self._random = source

    def get(self, name: str) -> Blob:
        self._take()
        found = self._world.store.get(name)
        self._take()
        return found

    def list(self, prefix: str) -> Iterator[Listed]:
        self._take()
        found = [*self._world.store.list(prefix)]
        self._take()
        return iter([blob for blob in found if self._random.random() < 0.8])

    def _take(self) -> None:
        for _ in range(self._random.choice((0, 0, 0, 10, 45))):
            self._world.clock.advance(1)
            for holding in self._world.holdings.values():
                if holding.age_s() >= LEASE_S / 3:
                    holding.renew()


def taken_for_dead(seed: int) -> int:
    """How often a watch on a slow store calls a lease expired whose holder renews it three times in a lease time."""
    world = World()
    for partition in range(PARTITIONS):
        world.give(partition, f"host-{partition % 2}")
    watch = world.watching(Slow(world, random.Random(seed)))  # type: ignore[arg-type]
    found = 0
    for _ in range(LOOKS):
        watch.look({})
        found += sum(watch.expired(partition) for partition in range(PARTITIONS))
        watch.confirm("host-0")
        found += sum(watch.expired(partition) for partition in range(PARTITIONS))
    return found


def test_a_slow_store_never_makes_the_living_look_dead() -> None:
    assert [taken_for_dead(seed) for seed in range(40)] == [0] * 40


def test_control_the_time_before_the_question_is_too_early_for_its_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    def early(*fields: Any) -> Seen:
        """As if each request had been answered long before it was."""
        return Seen(*fields[:-2], *(since - 2 * LEASE_S for since in fields[-2:]))

    monkeypatch.setattr("penstock.processor.watch.Seen", early)
    assert any(taken_for_dead(seed) for seed in range(40))


class Stale:
    """A store whose listings are up to `behind` listings old, or hide names, as the seed says."""

    def __init__(self, store: MemoryBlobs, source: random.Random, behind: int) -> None:
        self._store = store
        self._random = source
        self._behind = behind
        self._past: list[list[Listed]] = []
        self.get = store.get

    def list(self, prefix: str) -> Iterator[Listed]:
        self._past = [*self._past[-self._behind :], [*self._store.list(prefix)]]
        found = self._random.choice(self._past)
        return iter([blob for blob in found if self._random.random() < 0.9])


def early(seed: int) -> list[int]:
    """Partitions that a watch of stale listings calls expired within the lease time after their last renewal."""
    world = World()
    for partition in range(PARTITIONS):
        world.give(partition, f"host-{partition % 2}")
    source = random.Random(seed)
    watch = world.watching(Stale(world.store, source, behind=12))  # type: ignore[arg-type]
    found: list[int] = []
    for _ in range(10 * LOOKS):
        world.clock.advance(LEASE_S / LOOKS)
        for holding in world.holdings.values():
            if source.random() < 0.08:
                holding.renew()
        watch.look({})
        found += [
            partition
            for partition, holding in world.holdings.items()
            if watch.expired(partition) and holding.age_s() < LEASE_S
        ]
    return found


def test_listings_that_are_old_or_partial_never_expire_a_lease_too_early() -> None:
    assert [early(seed) for seed in range(150)] == [[]] * 150


def test_control_a_watch_that_believes_its_listings_expires_them_too_early(monkeypatch: pytest.MonkeyPatch) -> None:
    def believes(watch: Watch, partition: int) -> None:
        seen = watch._seen.get(partition)
        read(watch, partition)
        if seen is not None and watch._clock.monotonic() - seen.since >= LEASE_S:
            watch._expired.add(partition)

    read = Watch._read
    monkeypatch.setattr(Watch, "_read", believes)
    assert any(early(seed) for seed in range(150))
