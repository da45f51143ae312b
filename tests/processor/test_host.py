"""Hosts on a hub and a store in memory. Rounds are called by hand, so that a test decides who acts when; pumps are real threads."""

from __future__ import annotations

import contextlib
import random
import threading
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from penstock.errors import ArchiveError, LostRace, ReaderFenced, WrongHub
from penstock.events import Slice
from penstock.processor import CloseReason
from penstock.processor.host import EventProcessorHost
from penstock.processor.lease import Holding, Lease, Start, Writer, claim, read_leases, take_over
from penstock.processor.watch import LOOKS
from penstock.testing import FakeClock, Fault, FaultyBlobs, MemoryBlobs, MemoryHub, MemoryLog
from penstock.wire.frame import events as events_of
from tests.processor.conftest import until

LEASE_S = 30.0


class Member:
    """A host and what its processors saw. `gate` stops all its processors when it is cleared."""

    def __init__(self, world: World, name: str, **options: object) -> None:
        self.log = MemoryLog()
        self.gate = threading.Event()
        self.gate.set()
        self.inside = threading.Event()
        self.closed: list[tuple[int, CloseReason]] = []
        self.seen: dict[int, list[int]] = defaultdict(list)
        self.down = False
        store = FaultyBlobs(world.store, lambda _operation, _name: Fault.NOTHING_DONE if self.down else None)
        self.host = EventProcessorHost(
            hub=world.hub,
            store=store,
            group="g",
            name=name,
            clock=world.clock,
            log=self.log,
            lease_s=LEASE_S,
            **options,  # type: ignore[arg-type]
        )

    def factory(self, partition: int) -> Probe:
        return Probe(self, partition)

    def round(self) -> None:
        self.host.round(self.factory)

    def partitions(self) -> list[int]:
        return [state.partition for state in self.host.state()]


class Probe:
    def __init__(self, member: Member, partition: int) -> None:
        self._member = member
        self._partition = partition

    def process(self, events: Slice) -> str | None:
        self._member.inside.set()
        assert self._member.gate.wait(20)
        self._member.seen[self._partition] += [event.sequence_number for event in events_of(events)]
        return events.next_offset

    def close(self, reason: CloseReason) -> None:
        self._member.closed.append((self._partition, reason))


class World:
    def __init__(self, partitions: int) -> None:
        self.clock = FakeClock()
        self.hub = MemoryHub(partitions, clock=self.clock)
        self.store = MemoryBlobs()
        self.members: list[Member] = []

    def member(self, name: str, **options: object) -> Member:
        self.members.append(Member(self, name, **options))
        return self.members[-1]

    def leases(self) -> list[Lease | None]:
        return read_leases(self.store, "g", range(self.hub.partitions()))

    def lease(self, partition: int = 0) -> Lease:
        lease = self.leases()[partition]
        assert lease is not None
        return lease

    def put(self, partition: int = 0, count: int = 1) -> None:
        self.hub.put(partition, [b'{"deviceId":"d"}'] * count)

    def nudge(self, *living: Member) -> Callable[[], None]:
        """For `until`: lets pumps poll again, and keeps the leases of the living from coming into doubt."""

        def nudge() -> None:
            self.clock.advance(0.05)
            for member in living:
                member.round()

        return nudge

    def pass_time(self, seconds: float, *living: Member) -> None:
        """The members that live do a round every third of the lease time."""
        for _ in range(round(seconds / (LEASE_S / 3))):
            self.clock.advance(LEASE_S / 3)
            for member in living:
                member.round()


@pytest.fixture
def one() -> Iterator[World]:
    yield from world_of(1)


@pytest.fixture
def many() -> Iterator[World]:
    yield from world_of(16)


def world_of(partitions: int) -> Iterator[World]:
    world = World(partitions)
    try:
        yield world
    finally:
        for member in world.members:
            member.down = True
            member.gate.set()
            member.host.stop()


def test_takes_free_partitions_and_gives_them_back(many: World) -> None:
    a = many.member("a")
    for partition in range(16):
        many.put(partition, 3)
    a.round()
    assert a.partitions() == list(range(16))
    until(lambda: all(lease and lease.sequence_number == 3 for lease in many.leases()))
    a.host.stop()
    assert Counter(a.closed) == Counter((partition, CloseReason.SHUTDOWN) for partition in range(16))
    assert {lease.owner for lease in many.leases() if lease} == {""}
    b = many.member("b")
    b.round()
    assert b.partitions() == list(range(16)), "what was given back is free at once"
    assert many.lease(5).epoch == 2
    assert many.lease(5).sequence_number == 3


def test_renewal_goes_on_while_a_processor_works(one: World) -> None:
    a, b = one.member("a"), one.member("b")
    a.gate.clear()
    one.put()
    a.round()
    assert a.inside.wait(10)
    one.pass_time(4 * LEASE_S, a, b)
    assert one.lease().owner == "a"
    a.gate.set()
    until(lambda: one.lease().sequence_number == 1)


def test_an_expired_lease_is_taken_after_the_lease_time_and_not_before(one: World) -> None:
    a, b = one.member("a"), one.member("b")
    a.round()
    a.down = True
    one.pass_time(LEASE_S, b)
    assert one.lease().owner == "a", "b has watched it for less than the lease time"
    one.pass_time(LEASE_S / 3, b)
    assert one.lease().owner == "b"
    assert one.lease().epoch == 2


def test_no_lease_expires_by_anybodys_wall_clock(one: World) -> None:
    a, b = one.member("a"), one.member("b")
    a.round()
    b.round()
    one.clock.step(86_400)
    b.round()
    one.clock.step(-2 * 86_400)
    b.round()
    assert one.lease().owner == "a"


strict = Holding._write


def forgiving(self: Holding, change: Callable[[Lease], Lease | None]) -> None:
    """The negative control: asks for the etag of today."""
    self._etag = self._store.get(self._name).etag
    strict(self, change)


def zombie_wakes(world: World) -> tuple[Member, Member]:
    """`a` stops in the middle of `process` for twice the lease time, as with SIGSTOP, and wakes when `b` is done."""
    a, b = world.member("a"), world.member("b")
    a.gate.clear()
    world.put(count=2)
    a.round()
    assert a.inside.wait(10)
    world.pass_time(2 * LEASE_S, b)
    assert b.partitions() == [0]
    until(lambda: world.lease().sequence_number == 2)
    world.put(count=3)
    until(lambda: world.lease().sequence_number == 5, each=world.nudge(b))
    a.gate.set()
    return a, b


def test_a_zombie_cannot_move_the_checkpoint(one: World) -> None:
    a, b = zombie_wakes(one)
    until(lambda: a.closed)
    a.round()
    b.round()
    assert a.closed == [(0, CloseReason.LEASE_LOST)]
    assert a.partitions() == []
    assert (one.lease().owner, one.lease().epoch, one.lease().sequence_number) == ("b", 2, 5)
    assert a.host.error is None


def test_control_a_zombie_that_asks_for_a_fresh_etag_breaks_it(one: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Holding, "_write", forgiving)
    zombie_wakes(one)
    until(lambda: one.lease().owner == "a", "the zombie overwrites the lease")
    assert one.lease().epoch == 1, "and its epoch goes back"


def test_two_hosts_even_out(many: World) -> None:
    a, b = many.member("a"), many.member("b")
    for partition in range(16):
        many.put(partition)
    a.round()
    until(lambda: all(lease and lease.sequence_number == 1 for lease in many.leases()))
    many.pass_time(9 * LEASE_S / 3, a, b)
    until(lambda: len(a.closed) == 8)
    assert len(a.partitions()) == len(b.partitions()) == 8
    assert sorted(a.partitions() + b.partitions()) == list(range(16))
    assert {reason for _, reason in a.closed} <= {CloseReason.REBALANCED}
    moved = [lease.epoch for lease in many.leases() if lease and lease.owner == "b"]
    assert moved == [2] * 8


def test_one_dies_and_the_other_misses_nothing(many: World) -> None:
    a, b = many.member("a"), many.member("b")
    a.round()
    many.pass_time(10 * LEASE_S / 3, a, b)
    for _ in range(3):
        for partition in range(16):
            many.put(partition, 2)
        many.clock.advance(0.2)
    until(
        lambda: all(lease and lease.sequence_number == 6 for lease in many.leases()),
        each=many.nudge(a, b),
    )
    a.gate.clear()  # a dies: its processors return no more, it renews no more
    a.down = True
    for partition in range(16):
        many.put(partition, 4)
    many.pass_time(3 * LEASE_S, b)
    until(
        lambda: all(lease and lease.sequence_number == 10 for lease in many.leases()),
        each=many.nudge(b),
    )
    assert b.partitions() == list(range(16))
    for partition in range(16):
        a_saw, b_saw = a.seen[partition], b.seen[partition]
        assert a_saw == sorted(set(a_saw))
        assert b_saw == sorted(set(b_saw))
        # What lies below a checkpoint is seen once; here all that a has seen was.
        assert a_saw + b_saw == list(range(10))


def ordeal(seed: int) -> None:
    """Three hosts that pause and start again, each on a store that fails in every way. Raises AssertionError if it harms."""
    with contextlib.contextmanager(world_of)(4) as world:
        endure(world, random.Random(seed), seed)


def endure(world: World, source: random.Random, seed: int) -> None:
    members = [world.member(name) for name in "abc"]
    for number, member in enumerate(members):
        member.host._store = FaultyBlobs.random(world.store, seed=seed * 10 + number, rate=0.15)
    stood = [(0, 0)] * 4

    def look() -> None:
        for partition, lease in enumerate(world.leases()):
            if lease is None:
                continue
            now = lease.epoch, lease.sequence_number
            assert now[0] >= stood[partition][0]
            assert now[1] >= stood[partition][1]
            stood[partition] = now
            seen = {number for member in members for number in member.seen[partition]}
            assert seen >= set(range(lease.sequence_number))

    for _ in range(120):
        world.put(source.randrange(4))
        world.clock.advance(LEASE_S / 3)
        for member in source.sample(members, source.randrange(4)):
            member.round()
        look()
    for member in members:
        assert member.host.error is None
        member.host._store = world.store
    total = [world.hub.bounds(partition).next for partition in range(4)]

    def drive() -> None:
        world.clock.advance(1)
        for member in members:
            member.round()

    until(lambda: [lease and lease.sequence_number for lease in world.leases()] == total, each=drive)
    look()


@pytest.mark.parametrize("seed", range(4))
def test_whatever_the_store_does_checkpoints_only_grow_and_cover_what_was_seen(seed: int) -> None:
    ordeal(seed)


def test_control_the_ordeal_finds_hosts_that_ask_for_a_fresh_etag(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Holding, "_write", forgiving)
    with pytest.raises(AssertionError):
        for seed in range(4):
            ordeal(seed)


def test_after_a_crash_a_name_takes_its_own_leases_at_once(one: World) -> None:
    before = one.member("up")
    before.round()
    before.down = True
    after = one.member("up")
    after.round()
    assert after.partitions() == [0]
    assert one.lease().epoch == 1


def test_of_two_hosts_with_one_name_the_loser_ends(one: World) -> None:
    a, twin = one.member("a"), one.member("a")
    a.round()
    twin.round()
    one.pass_time(LEASE_S / 3, a)
    assert isinstance(a.host.error, LostRace)
    assert "another host named 'a'" in str(a.host.error)
    assert twin.host.error is None
    assert twin.partitions() == [0]


def test_a_lost_answer_is_not_taken_for_a_twin(one: World) -> None:
    faults: list[Fault | None] = []
    a = one.member("a")
    a.host._store = FaultyBlobs(one.store, lambda _operation, _name: faults.pop(0) if faults else None)
    a.round()
    faults.append(Fault.DONE)
    one.pass_time(2 * LEASE_S / 3, a)
    assert a.host.error is None
    until(lambda: 0 not in a.host._leaving or a.host._leaving[0].ended.is_set())
    a.round()
    assert a.partitions() == [0]


def test_run_raises_what_ended_it(one: World) -> None:
    a, twin = one.member("a"), one.member("a")
    raised: list[Exception] = []

    def run() -> None:
        try:
            a.host.run(a.factory)
        except LostRace as error:
            raised.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    until(lambda: a.partitions() == [0])
    twin.round()
    until(lambda: raised, each=lambda: one.clock.advance(1))
    thread.join()


def test_the_thread_renews_and_stop_gives_back(one: World) -> None:
    a = one.member("a")
    with a.host:
        a.host.start(a.factory)
        until(lambda: a.partitions() == [0])
        token = one.lease().token
        until(lambda: one.lease().token != token, each=lambda: one.clock.advance(1))
    assert one.lease().owner == ""
    assert a.host.error is None


def test_a_stuck_processor_loses_its_lease_to_another_host(one: World) -> None:
    a, b = one.member("a"), one.member("b")
    a.gate.clear()
    one.put()
    a.round()
    assert a.inside.wait(10)
    one.pass_time(10 * LEASE_S, a)
    assert one.lease().owner == "a"
    one.pass_time(LEASE_S, a)
    assert one.lease().owner == ""
    assert a.log.count("processor stuck", partition=0) == 1
    b.round()
    until(lambda: one.lease().sequence_number == 1)
    assert b.partitions() == [0]
    a.gate.set()
    until(lambda: a.closed == [(0, CloseReason.STUCK)])
    assert one.lease().owner == "b"


def test_who_was_stuck_does_not_read_twice_at_once(one: World) -> None:
    a = one.member("a", stuck_s=LEASE_S)
    a.gate.clear()
    one.put()
    a.round()
    assert a.inside.wait(10)
    one.pass_time(10 * LEASE_S, a)
    assert a.partitions() == [], "its old thread still runs"
    a.gate.set()
    until(lambda: a.host._leaving[0].ended.is_set())
    a.round()
    assert a.partitions() == [0]
    until(lambda: one.lease().sequence_number == 1)


def test_an_idle_partition_is_not_stuck(one: World) -> None:
    a = one.member("a", stuck_s=LEASE_S)
    a.round()
    for _ in range(9):
        before = one.clock.monotonic()
        one.pass_time(LEASE_S / 3, a)
        until(lambda: a.host._pumps[0].stalled_s() < one.clock.monotonic() - before)  # noqa: B023
    assert a.partitions() == [0]


@pytest.mark.parametrize("at_once", [True, False])
def test_a_store_that_is_slow_with_one_lease_keeps_no_other_from_renewal(many: World, at_once: bool) -> None:
    """Case 49. Without several at once, the negative control, the others wait for the slow one."""
    renewed: list[str] = []
    others = threading.Event()

    def slow(operation: str, name: str) -> None:
        if operation == "replace":
            if name == "_leases/g/0.json" and at_once:
                assert others.wait(20), "the others are not renewed meanwhile"
            renewed.append(name)
            if len(renewed) == 15:
                others.set()

    with ThreadPoolExecutor(4) as pool:
        a = many.member("a", **({"each": pool.map} if at_once else {}))
        a.round()
        for pump in a.host._pumps.values():
            pump.holding._store = FaultyBlobs(many.store, slow)
        many.pass_time(LEASE_S / 3, a)
        first = list(a.host._pumps).index(0)
        a.host.stop()
    assert renewed.index("_leases/g/0.json") == (15 if at_once else first)


def test_a_stolen_lease_is_noticed_at_the_next_look(one: World) -> None:
    """And not at the next renewal, until when two would read the same partition."""
    a = one.member("a")
    one.pass_time(LEASE_S, a)
    a.round()
    blob = one.store.get("_leases/g/0.json")
    take_over(one.store, one.clock, "g", one.lease(), blob.etag, Writer("thief", "t"))
    a.round()
    assert a.partitions() == []
    assert a.log.count("lease lost", partition=0) == 1


def test_who_was_robbed_meanwhile_is_passed_over() -> None:
    """What a victim has is read before it is robbed: since the listing another may have taken the difference."""
    world = World(4)
    for partition, owner in enumerate(("a", "a", "b", "b")):
        claim(world.store, world.clock, "g", partition, Writer(owner, owner), start=Start("0", 0))
    # One that prefers `a` among equals.
    thief = next(
        name for name in map(str, range(99)) if zlib.crc32(f"{name} a".encode()) > zlib.crc32(f"{name} b".encode())
    )
    c = world.member(thief)
    c.host._watch.look({})
    (stolen,) = c.host._chosen()
    assert world.lease(stolen).owner == "a"
    other = world.store.get("_leases/g/0.json")
    take_over(world.store, world.clock, "g", world.lease(0), other.etag, Writer("d", "d"))
    # What was seen before is the same; its marks say that it has been written since.
    for partition in (0, 1):
        seen = c.host._watch.seen(partition)
        assert seen is not None
        seen.mark = "later"
    (stolen,) = c.host._chosen()
    assert world.lease(stolen).owner == "b"


def test_a_slow_store_does_not_let_expire_what_was_taken_first(many: World) -> None:
    """To read sixteen takes longer than a lease time, and so does to take them. (Renewals go several at once.)"""
    a = many.member("a")

    def slowly(operation: str, _name: str) -> None:
        if operation != "replace":
            many.clock.advance(LEASE_S / 12)

    slow = FaultyBlobs(many.store, slowly)
    a.host._store = a.host._watch._store = slow
    a.round()
    oldest = max(pump.holding.age_s() for pump in a.host._pumps.values())
    assert len(a.partitions()) == 16
    assert many.clock.monotonic() > 2 * LEASE_S
    assert oldest < LEASE_S * 0.5


def test_hosts_even_out_on_a_slow_store(many: World) -> None:
    """While the newcomer reads what its victim has, this one renews it all."""
    a, b = many.member("a"), many.member("b")
    a.round()

    def slow(_operation: str, _name: str) -> None:
        many.clock.advance(LEASE_S / 50)
        a.host._renew_due()

    b.host._store = b.host._watch._store = FaultyBlobs(many.store, slow)
    for _ in range(3 * LOOKS):
        b.round()
        a.round()
        many.clock.advance(LEASE_S / LOOKS)
    assert len(b.partitions()) == 8


def test_a_log_that_fails_does_not_keep_a_host_from_its_end(many: World) -> None:
    class Gone(MemoryLog):
        def info(self, event: str, **fields: object) -> None:
            if event == "lease given back":
                raise BrokenPipeError("nobody reads the log")

    a = many.member("a")
    a.host._log = Gone()
    a.host.start(a.factory)
    until(lambda: len(a.partitions()) == 16)
    a.host.stop()
    assert {lease.owner for lease in many.leases() if lease} == {""}
    assert isinstance(a.host.error, BrokenPipeError)


def test_an_epoch_that_the_hub_has_seen_is_passed_over(one: World) -> None:
    """Somebody deleted the lease, and its epochs began anew; a hub that is read over HTTP knows later ones."""
    read = one.hub.read

    def fencing(partition: int, offset: str, *, bytes_max: int) -> Slice:
        if a.host.epoch(partition) < 8:
            raise ReaderFenced("epoch 7 reads", last_epoch=7)
        return read(partition, offset, bytes_max=bytes_max)

    one.hub.read = fencing  # type: ignore[method-assign]
    one.put(count=2)
    a = one.member("a")
    a.round()
    until(lambda: a.log.count("reader fenced", partition=0) == 1)
    until(lambda: a.seen[0] == [0, 1], each=one.nudge(a))
    assert one.lease().epoch == 8


@pytest.mark.parametrize("body", [b"rubbish", b"", b"{}", b"x" * 1_000_000, b'{"PartitionId": 0'])
def test_unreadable_is_not_free(one: World, body: bytes) -> None:
    one.store.create("_leases/g/0.json", body, id="rubbish")
    a = one.member("a")
    one.pass_time(4 * LEASE_S, a)
    assert a.partitions() == []
    assert a.log.count("lease not read", partition=0) == 1
    assert one.store.get("_leases/g/0.json").body == body


def test_an_outage_of_the_store_is_said_once_and_survived(one: World) -> None:
    a = one.member("a")
    a.round()
    a.down = True
    one.pass_time(4 * LEASE_S, a)
    assert a.log.count("lease not renewed", partition=0) == 1
    a.down = False
    a.round()
    assert a.log.count("lease reached again", partition=0) == 1
    assert a.partitions() == [0]
    assert one.lease().owner == "a"


def test_a_deleted_lease_is_lost_and_claimed_anew(one: World) -> None:
    a = one.member("a", start=lambda _partition: Start("1", 1))
    one.put(count=3)
    a.round()
    until(lambda: one.lease().sequence_number == 3)
    one.store.delete("_leases/g/0.json")
    one.pass_time(LEASE_S / 3, a)
    until(lambda: a.host._leaving[0].ended.is_set())
    a.round()
    assert a.partitions() == [0]
    assert one.lease().epoch == 2, "an epoch that was seen never comes again"
    until(lambda: a.seen[0] == [1, 2, 1, 2])


def test_a_start_that_cannot_be_found_is_said_and_others_go_on(many: World) -> None:
    def start(partition: int) -> Start:
        if partition == 3:
            raise ArchiveError("the chain is broken")
        return Start("0", 0)

    a = many.member("a", start=start)
    many.pass_time(LEASE_S, a)
    assert a.partitions() == [partition for partition in range(16) if partition != 3]
    assert a.log.count("lease not taken", partition=3) == 1


def test_another_hub_ends_the_host_before_it_has_a_lease(one: World) -> None:
    def start(partition: int) -> Start:
        raise WrongHub("hub 2 answers and not hub 1")

    a = one.member("a", start=start)
    with pytest.raises(WrongHub):
        one.pass_time(LEASE_S, a)
    assert a.log.count("lease not taken") == 0


def test_without_a_lease_reading_begins_at_the_first_event_kept(one: World) -> None:
    one.put(count=2)
    one.put(count=2)
    one.hub.trim(0, before="2")
    a = one.member("a")
    a.round()
    until(lambda: a.seen[0] == [2, 3])


def test_state_and_epoch(one: World) -> None:
    a = one.member("a")
    assert a.host.epoch(0) == 0
    one.put(count=2)
    a.round()
    until(lambda: one.lease().sequence_number == 2)
    (state,) = a.host.state()
    assert (state.partition, state.epoch, state.offset, state.checkpoint, state.parked) == (0, 1, "2", 2, None)
    assert a.host.epoch(0) == 1


def test_a_processor_that_does_not_return_loses_its_lease_on_stop(one: World) -> None:
    a = one.member("a")
    a.gate.clear()
    one.put()
    a.round()
    assert a.inside.wait(10)
    stopping = threading.Thread(target=a.host.stop)
    stopping.start()
    until(lambda: one.lease().owner == "", each=lambda: one.clock.advance(1))
    stopping.join()
    a.gate.set()
    until(lambda: a.closed == [(0, CloseReason.SHUTDOWN)])
    assert one.lease().sequence_number == 0
    assert a.log.count("processor did not end") == 1
