"""A world of processor hosts that one seed decides: the real hosts, archivers and keepers of hours, and all that may go wrong.

Two to four hosts archive three to six partitions. While the world lives, threads and whole processes pause for any time at any
step, processes die and come back with the same name, another, or somebody else's; hosts join and leave; wall clocks jump and
monotonic ones drift apart; requests are not done, done and not answered, done much later, or sent twice by their client;
listings are partial or old, work files cannot be written, logs cannot be read, leases are deleted, events come and retention
deletes. How much of each is also decided by the seed. Then all faults end, except that wall clocks go on jumping, and
everything must come right: see `settle` and `judge`; `WatchedBlobs` looks at every single write.

In a third of the seeds the archive begins late: of each log the first events are gone, in some partitions all.

In a quarter of the seeds events are deleted that were not archived, and people order to skip, at any moment, in any partition: what is
gone, or by force what is there. Then they do so until nothing stands still.

Where leases are deleted and retention goes on, a lease that was created when none was there, by a request that landed long after
its client gave up, may stand before events that retention has deleted since. Then the partition parks, until people delete the
lease: so they do here. That is in the seeds in which the archive begins late; in the others leases are deleted or events are.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import random
from collections import Counter
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from unittest.mock import patch

from penstock.archive import archiver, begin, check
from penstock.archive.hours import ARCHIVE_GROUP, manifest_name
from penstock.archive.ledger import Gap, Record, claim
from penstock.blobs import Listed
from penstock.errors import PenstockError
from penstock.processor import skip
from penstock.processor.lease import Lease, decode_lease, lease_name
from penstock.processor.skip import EARLIEST, Order
from tests.archive.conftest import CountingHub
from tests.sim.broken import Broken, breaking
from tests.sim.member import Member
from tests.sim.node import LEASE_S, START_MS, Chaos
from tests.sim.oracle import ORDER, SKIPPED, Line, Violation, WatchedBlobs, hour_of, judge
from tests.sim.person import Person
from tests.sim.scheduler import InPlace, Scheduler, SimClock, simulated_threads

PERIOD_S = 60
POLL_S = 3.0
"""Twelve times the real one: an idle pump does nothing but look, and a simulated one costs as much as one that works."""

BALANCED_S = 2 * LEASE_S
ARCHIVED_S = 20 * LEASE_S
ENDLESS_S = 200 * LEASE_S
ORDERS_MAX = 100


class World:
    def __init__(
        self, seed: int, *, broken: Broken | None = None, trace: Callable[[str], object] | None = None
    ) -> None:
        self.random = random.Random(seed)
        self.broken = broken
        self.trace = trace
        self.chaos = Chaos.of(self.random)
        self.scheduler = Scheduler()
        self.quiet_at = LEASE_S * self.random.uniform(2, 6)
        self.troubled_until = self.quiet_at
        self.clock = SimClock(self.scheduler, start_ms=START_MS)
        self.hub = CountingHub(self.random.randint(3, 6), clock=self.clock, period_s=PERIOD_S)
        self.partitions = range(self.hub.partitions())
        self.blobs = WatchedBlobs()
        self.late: list[tuple[str, Callable[[], object]]] = []
        self.listings: dict[str, list[list[Listed]]] = {}
        self.logged: list[list[Line]] = [[] for _ in self.partitions]
        self.events = 0
        self.members: list[Member] = []
        self.joined = 0
        self.skips = seed % 4 == 3
        self.people: list[Person] = []
        self.orders = 0
        self.begins = [0 for _ in self.partitions]
        self.began_late = self.random.random() < 1 / 3
        if self.began_late:
            self._lose_some()
        claim(self.blobs, self.hub, self.clock)

    @property
    def quiet(self) -> bool:
        """Whether all faults are over."""
        return self.scheduler.now >= self.quiet_at

    def say(self, who: str, what: str) -> None:
        if self.trace is not None:
            self.trace(f"{self.scheduler.now:9.3f}  {who:<16} {what}")

    def live(self) -> None:
        """Until all faults are over."""
        hosts = self.random.randint(2, 4)
        self.say("world", f"{len(self.partitions)} partitions, {hosts} hosts, {self.chaos}")
        for number in range(hosts):
            self._join_at(self.random.uniform(0, LEASE_S / 2), f"h{number}")
        for mean_s, act in (
            (2.0, lambda: self.put(self.random.choice(self.partitions))),
            (5.0, self.hub.maintain),
            (40.0, self.hub.cut),
            (15.0, self._land_some),
            (60.0, self._leave),
            (90.0, lambda: self.jump(self.clock, "the hub")),
            (60.0, self._delete_lease if self.chaos.deletes else self._trim),
            *([(30.0, self._trim)] if self.began_late else []),
            *([(40.0, self._lose), (20.0, self._order)] if self.skips else []),
        ):
            self._now_and_then(mean_s, act)
        self.scheduler.run(self.quiet_at)

    def put(self, partition: int) -> None:
        """Events come."""
        count = self.random.choice((1, 1, 2, 5, 45))
        lines = [b'{"deviceId":"d","n":%06d,"x":"%0100d"}' % (self.events + i, 0) for i in range(count)]
        self.events += count
        self.hub.put(partition, lines)
        hour = hour_of(self.hub.bounds(partition).enqueued_last_ms, PERIOD_S)
        self.logged[partition] += [(hour, line) for line in lines]

    def jump(self, clock: SimClock, whose: str) -> None:
        """Somebody sets a wall clock."""
        seconds = self.random.choice((-86_400, -PERIOD_S, -1.5, 1.5, PERIOD_S, 3 * PERIOD_S))
        self.say("world", f"sets the wall clock of {whose} by {seconds} s")
        clock.jump(seconds)

    def kill(self, member: Member) -> None:
        self.say("world", f"{member.name} dies")
        self.ended(member)

    def ended(self, member: Member) -> None:
        """A process is gone, and with it all its threads. Another comes in a while."""
        if member.dead:  # of two things at once
            return
        self.scheduler.kill(member)
        self.members.remove(member)
        self.note_trouble()
        if self.quiet:
            self._join_at(self.scheduler.now, f"q{self.joined}")
            return
        name = member.host_name
        if self.random.random() < self.chaos.strangers:
            name = self.random.choice((f"n{self.joined}", *(living.host_name for living in self.members)))
        latest = max(self.scheduler.now, self.quiet_at - 0.001)
        self._join_at(min(self.scheduler.now + self.random.uniform(0, 2 * LEASE_S), latest), name)

    def note_trouble(self, lasting_s: float = 0.0) -> None:
        """From its end on the hosts have time to even out."""
        self.troubled_until = max(self.troubled_until, self.scheduler.now + lasting_s)

    def behind(self) -> list[int]:
        """Partitions whose lease stands before the log."""
        if not (self.skips or (self.began_late and self.chaos.deletes)):
            return []
        leases = [lease for lease in self._leases() if lease is not None]
        return [lease.partition for lease in leases if lease.sequence_number < self.hub.bounds(lease.partition).first]

    def owners(self) -> list[str]:
        """The instance that holds each lease."""
        return [lease.instance if lease and lease.owner else "" for lease in self._leases()]

    def settle(self) -> None:
        """No more faults. Raises Violation unless in time all is archived and the hosts are even, and stay so."""
        self._calm()
        balanced = False
        while not (balanced and self._archived()):
            self._pass_time(LEASE_S / 10)
            self._go_on()
            since_s = self.scheduler.now - self.troubled_until
            balanced = self._balanced()
            if not balanced and since_s > BALANCED_S:
                raise Violation(f"not even {since_s:.0f} s after the last fault: {self._table()}")
            if since_s > ARCHIVED_S:
                raise Violation(f"not everything is archived {since_s:.0f} s after the last fault: {self._table()}")
            if self.scheduler.now - self.quiet_at > ENDLESS_S:
                raise Violation(f"hosts make trouble without end: {self._table()}")
        owners, troubled_until = self.owners(), self.troubled_until
        self._pass_time(LEASE_S)
        # A lease with an epoch that was there before may hide its owner for long; who sees it then evens out.
        if self.owners() != owners and self.troubled_until == troubled_until and not self.blobs.epochs_come_again:
            raise Violation(f"leases move although the hosts are even: {owners}, then {self._table()}")
        for name, write in self.late:
            self._land(name, write)

    def judge(self) -> None:
        """Raises Violation unless the archive is the log, and its hours are all there."""
        judge(self.hub, self.blobs, [self._kept(partition) for partition in self.partitions])
        hours = {blob.name for blob in self.blobs.list("_hours/")}
        if hours != {manifest_name(hour) for hour in self._hours()}:
            raise Violation(f"hours are missing, or too many: there are {sorted(hours)}, not {sorted(self._hours())}")

    def _now_and_then(self, mean_s: float, act: Callable[[], object]) -> None:
        at = self.scheduler.now + self.random.expovariate(1 / mean_s)

        def do() -> None:
            act()
            self._now_and_then(mean_s, act)

        if at < self.quiet_at:
            self.scheduler.call_at(at, do)

    def _trim(self) -> None:
        """Retention, which never passes a checkpoint."""
        for lease in self._leases():
            if lease is not None:
                self.hub.trim(lease.partition, before=lease.offset)

    def _lose_some(self) -> None:
        """What came and went before there was an archive."""
        for partition in self.partitions:
            for _ in range(self.random.randint(1, 4)):
                self.put(partition)
            frames = self.hub.read(partition, "0", bytes_max=1 << 30).frames
            before = self.random.choice(frames).next
            self.hub.trim(partition, before=str(before))
            del self.logged[partition][:before]
            self.begins[partition] = before

    def _kept(self, partition: int) -> list[Line]:
        left_out, first = self.blobs.left_out(partition), self.begins[partition]
        return [line for number, line in enumerate(self.logged[partition], first) if number not in left_out]

    def _lose(self) -> None:
        """What was not archived is deleted, as brokers do: behind a file, for what is gone before is no order's."""
        lease = self.random.choice(self._leases())
        if lease is None or not self.blobs.ends_file(lease.partition, lease.sequence_number):
            return
        frames = self.hub.read(lease.partition, str(self.hub.bounds(lease.partition).first), bytes_max=1 << 30).frames
        before = self.random.choice([frame.next for frame in frames] or [0])
        self.say("world", f"deletes the events of {lease.partition} before {before}")
        self.hub.trim(lease.partition, before=str(before))

    def _order(self) -> None:
        """Somebody orders to skip."""
        partition = self.random.choice(self.partitions)
        bounds, to, forced = self.hub.bounds(partition), EARLIEST, self.random.random() < 0.7
        if forced and self.random.random() < 0.8:
            to = str(self.random.randint(bounds.first, bounds.next))
            frames = self.hub.read(partition, str(bounds.first), bytes_max=1 << 30).frames
            if frames and self.random.random() < 0.8:
                to = str(self.random.choice(frames).next)
        self.skip(partition, to, forced=forced)

    def skip(self, partition: int, to: str, *, forced: bool) -> None:
        self.orders += 1
        order = Order(partition, to, "somebody said so", f"p{self.orders}", forced)
        self.say("world", f"has it ordered: {order}")
        self.blobs.order(partition, lambda: self.hub.bounds(partition).first if to == EARLIEST else int(to))
        self.people.append(Person(self, order))

    def gone(self, person: Person) -> None:
        """It has done what it could, or died before."""
        if not person.dead:
            self.scheduler.kill(person)
            self.people.remove(person)
            self.note_trouble()

    def _go_on(self) -> None:
        """People see what stands still."""
        for partition in self.behind():
            if not self.skips:
                self._delete_lease(partition)
                self.note_trouble()
            elif not self._is_ordered(partition):
                self.skip(partition, EARLIEST, forced=False)
        for lease in self._leases() if self.skips else ():
            gap = self._gap_behind(lease)
            if gap is not None and not self._is_ordered(gap.partition):
                self.skip(gap.partition, gap.offset_next, forced=True)  # who ordered it did not come to move the lease
        if self.orders > ORDERS_MAX:
            raise Violation(f"orders to skip do not help: {self._table()}")

    def _gap_behind(self, lease: Lease | None) -> Gap | None:
        """What was ordered to be left out and is not, behind files that are all there."""
        link = self.blobs.link(lease.partition, lease.sequence_number) if lease is not None else None
        while isinstance(link, Record) and self.blobs.there(link.file):
            link = self.blobs.link(link.partition, link.next)
        return link if isinstance(link, Gap) and link.reason.startswith(SKIPPED) else None

    def _is_ordered(self, partition: int) -> bool:
        self.note_trouble()
        return any(person.order.partition == partition for person in self.people)

    def _delete_lease(self, partition: int | None = None) -> None:
        if partition is None:
            partition = self.random.choice(self.partitions)
        self.say("world", f"deletes the lease of {partition}")
        self.blobs.delete(lease_name(ARCHIVE_GROUP, partition))

    def _join_at(self, at: float, host_name: str) -> None:
        def join() -> None:
            self.joined += 1
            self.note_trouble()
            self.members.append(Member(self, host_name, self.joined))
            self.say("world", f"{self.members[-1].name} joins")

        self.scheduler.call_at(at, join)

    def _leave(self) -> None:
        member = self.random.choice(self.members) if self.members else None
        if member is not None and member.host is not None:
            self.say("world", f"{member.name} is asked to leave")
            member.host.ask_stop()

    def _land_some(self) -> None:
        while self.late and self.random.random() < 0.7:
            self._land(*self.late.pop(self.random.randrange(len(self.late))))

    def _land(self, name: str, write: Callable[[], object]) -> None:
        """A late write arrives."""
        try:
            write()
        except PenstockError as error:
            self.say("late", str(error))
        else:
            self.say("late", f"{name} is written")

    def _calm(self) -> None:
        """The end of the last faults: no two hosts of one name, no late lease; and the last period of the log ends."""
        self.say("world", "no more faults")
        late, self.late = self.late, []
        for name, write in late:
            if name.startswith("_leases/") or self.random.random() < 0.5:
                self._land(name, write)
            else:
                self.late.append((name, write))
        names = Counter(member.host_name for member in self.members)
        for member in self.members.copy():
            if names[member.host_name] > 1:
                names[member.host_name] -= 1
                self.kill(member)
        for partition in self.partitions:
            self.put(partition)
        last_ms = self.hub.bounds(0).enqueued_last_ms
        self.clock.jump((last_ms - self.clock.now_ms()) / 1000 + PERIOD_S)
        self.hub.maintain()

    def _pass_time(self, seconds: float) -> None:
        for member in self.members:
            self.jump(member.clock, member.name)
        self.scheduler.run(self.scheduler.now + seconds)

    def _leases(self) -> list[Lease | None]:
        blobs = [self.blobs.there(lease_name(ARCHIVE_GROUP, partition)) for partition in self.partitions]
        return [None if body is None else decode_lease(body, partition) for partition, body in enumerate(blobs)]

    def _balanced(self) -> bool:
        """Every lease is held by a living host, and no two hosts differ by more than one.

        The second is not asked where a deleted lease came back with an epoch that it had before: hosts tell from its length alone
        that it has another owner, and its length tells its epoch.
        """
        held = Counter(self.owners())
        counts = [held.pop(member.name, 0) for member in self.members]
        if self.blobs.epochs_come_again:
            return not held
        return not held and max(counts, default=0) - min(counts, default=0) <= 1

    def _archived(self) -> bool:
        ends = [self.hub.bounds(partition).next for partition in self.partitions]
        done = [lease.sequence_number if lease else -1 for lease in self._leases()]
        return done == ends and all(self.blobs.there(manifest_name(hour)) for hour in self._hours())

    def _hours(self) -> set[str]:
        return self.blobs.hours if self.skips else {hour for lines in self.logged for hour, _ in lines}

    def _table(self) -> str:
        leases = [f"{p}: {lease and lease.token} at {lease and lease.offset}" for p, lease in enumerate(self._leases())]
        ends = [self.hub.bounds(partition).next for partition in self.partitions]
        return f"{', '.join(leases)}; the log ends at {ends}; {[member.name for member in self.members]} live"


def simulate(seed: int, *, broken: Broken | None = None, trace: Callable[[str], object] | None = None) -> World:
    """Everything that this seed decides, to its end. Raises Violation."""
    world = World(seed, broken=broken, trace=trace)
    ids = itertools.count()
    orders = itertools.count()
    secrets = SimpleNamespace(token_hex=lambda _bytes: f"{ORDER}{next(orders)}")
    uuid = SimpleNamespace(uuid4=lambda: SimpleNamespace(hex=f"id-{next(ids):029}"))
    with (
        no_collection(),
        simulated_threads(world.scheduler, POLL_S=POLL_S, WAKE_S=LEASE_S),
        patch.object(archiver, "uuid", uuid),
        patch.object(begin, "uuid", uuid),
        patch.object(skip, "secrets", secrets),
        patch.object(check, "ThreadPoolExecutor", InPlace),
        breaking(broken),
    ):
        try:
            world.live()
            world.settle()
        finally:
            for process in (*world.members, *world.people):
                world.scheduler.kill(process)
        world.judge()
    return world


@contextlib.contextmanager
def no_collection() -> Iterator[None]:
    """A world is full of cycles and is thrown away as a whole: looking for garbage in it on the way is a fifth of its time."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
