"""Token buckets, and tickets for those that they refuse, in memory that processes share. No clock, no lock: quota.py has both.

A bucket is one number, `paid`: when all that was taken from it will have been paid for at its rate. What a batch costs is in seconds
of that rate, so the bucket need not know it. `paid <= now`: the bucket is full, and equal to one that was never used; it holds
`BURST_S`. A batch that costs more than that is let in when the bucket is full, and leaves a debt.

Who is refused gets a ticket: the time at which it is due, and what it will cost on the buckets that refused it. That stands in
`waiting` of these buckets, so that whoever comes without a ticket queues behind all who have one:

    due = max(paid, now) + waiting + min(cost, BURST_S) - BURST_S

Who comes back with a ticket at its due time, or up to `LATE_S` after it, is let in if `paid <= now + SLACK_S`; and that it is always,
on a bucket that all those tickets are for. Say that a bucket was full for the last time when a claimed ticket j came. Then `paid` is no
more than the time at which j came plus the costs of the tickets behind j, which are what the due times were made of, plus `BURST_S` for
that of j. It came at most `LATE_S` late, and a second if its due time was made a whole one; and if someone without a ticket was let
in to the full bucket, that is `BURST_S` more.
A bucket that is full while tickets are out has lost time to those that did not come: then others are let in as if there were no queue,
so tickets that nobody claims cost those who wait a longer way, and the installation nothing.

Tickets are given on credit (credit.py), so that nobody who lets his run out makes others wait for long.

So in any time a bucket lets in no more than its rate times that time, plus `SLACK_S` of it, plus one batch.

Of keys and devices there may be any number: their buckets have slots in a table of fixed size. A slot whose bucket is full, and waited
for by nobody, is free for another name. Where there is none, two names share a bucket, which lets in no more than one of them alone.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable, Mapping
from typing import Final, NamedTuple

from penstock.server.credit import CELLS, Credit

BURST_S: Final = 1.0
LATE_S: Final = 3.0
SLACK_S: Final = LATE_S + 3 * BURST_S
HORIZON_S: Final = 60.0
MORE: Final = 1.25
"""So much more than was refused a ticket lets in: the next batch of a client is about as large as the last."""
EVENTS, BYTES, FIRST_PARTITION = 0, 1, 2
NAMES: Final = 1 << 14
TICKETS: Final = 1 << 13

_CELL = 8
_VERSION = 3
_UNITS, _OUT, _SWEEP, _CHANGING, _REFUSED, _SECONDS = 4, 5, 6, 7, 8, 16  # cells of the head, behind its identity
KEY_EVENTS, KEY_BYTES, DEVICE_EVENTS = range(3)
"""What a name is of: its last two bits."""
OF_UNITS, OF_PARTITION, OF_KEY, OF_DEVICE = range(4)
"""What a bucket belongs to."""
_RING = 8
_HEAD = _SECONDS + 3 * _RING
_NAME_TRIES, _TICKET_TRIES = 16, 64
_CHARGES_MAX = 4
_KIND_BITS = 3
_NO_CHARGES = memoryview(bytes(2 * _CHARGES_MAX * _CELL)).cast("d")
_SWEEP_S = 1.0
_NOTHING = 1e-9


class Sender(NamedTuple):
    """Whose ticket it is. Who says who he is has one at most. Who does not (`peer` is not 0) is known by what he sends, and others may send
    the same; if he sends something else the next time, he is known by his connection, if he still has that one (`waits`: the holder as
    which he was told there to come back), else only by where he comes from. `crowd`: on whose credit he waits."""

    holder: int
    peer: int = 0
    crowd: int = 0
    waits: int = 0


class Refusal(NamedTuple):
    """Which bucket refuses, and when it is worth coming back. `ticket`: whoever comes then is let in."""

    bucket: int
    due: float
    ticket: bool


class Buckets:
    """One bucket for all events, one for all bytes, one for each partition, and those of names. Every method is for one at a time."""

    def __init__(self, memory: memoryview, partitions: int) -> None:
        self.first_name = FIRST_PARTITION + partitions
        buckets = self.first_name + NAMES
        places = TICKETS + _TICKET_TRIES
        self._partitions = partitions
        self._memory = memory
        cells = iter(
            _cut(memory, (_HEAD, buckets, buckets, NAMES, places, places, places, places * 2 * _CHARGES_MAX, CELLS))
        )
        head = next(cells)
        self._whole, self._real = head.cast("Q"), head.cast("d")
        self._paid, self._waiting = next(cells).cast("d"), next(cells).cast("d")
        self._names = next(cells).cast("Q")
        self._holders, self._peers = next(cells).cast("Q"), next(cells).cast("Q")
        self._due, self._owed = next(cells).cast("d"), next(cells).cast("d")
        self._credits = next(cells).cast("d")
        self._credit = Credit(self._credits)

    @property
    def units(self) -> int:
        """0: unlimited."""
        return self._whole[_UNITS]

    @property
    def tickets(self) -> int:
        """How many are out."""
        return self._whole[_OUT]

    def belongs_to(self, boot: bytes) -> bool:
        """Whether what is here was written since the machine was started; `boot` has 16 bytes."""
        return bytes(self._memory[: 4 * _CELL]) == _identity(boot, self._partitions)

    def begin(self, boot: bytes) -> None:
        """As new. The identity is written last: a process that dies in here leaves nothing that anyone trusts."""
        self._memory[: 4 * _CELL] = bytes(4 * _CELL)
        self._memory[4 * _CELL :] = bytes(len(self._memory) - 4 * _CELL)
        self._memory[: 4 * _CELL] = _identity(boot, self._partitions)

    def set_units(self, units: int) -> None:
        """Another rate makes other debts and other due times: all buckets are full again, and no ticket is out."""
        if units != self.units:
            self._whole[_UNITS] = units
            self._whole[_OUT] = 0
            for cells in (self._paid, self._waiting, self._names, self._holders, self._peers, self._due, self._credits):
                cells.cast("B")[:] = bytes(cells.nbytes)

    def enter(self) -> None:
        """To be called under the lock before anything else, and `leave` after it. A process that died in between has left half a change."""
        if self._whole[_CHANGING]:
            self._recount()
        self._whole[_CHANGING] = 1

    def leave(self) -> None:
        self._whole[_CHANGING] = 0

    def named(self, names: Iterable[tuple[int, float]], costs: dict[int, float], now: float) -> None:
        """Add what names cost to `costs`, by bucket."""
        for name, cost in names:
            bucket = self._slot(name, costs, now)
            costs[bucket] = costs.get(bucket, 0.0) + cost

    def name(self, bucket: int) -> int:
        """The name that has this slot."""
        return self._names[bucket - self.first_name]

    def take(self, now: float, sender: Sender, costs: Mapping[int, float]) -> Refusal | None:
        """Take the costs from all buckets, or from none."""
        once = not sender.peer
        held = self._held_by(sender, now) if self._whole[_OUT] else []
        owed = self._costs(held[0]) if held else []
        claimed = bool(held) and self._due[held[0]] <= now and self._claim(held.pop(0), costs, now)
        if not claimed and (refused := self._refused(now, costs.items())):
            if once and held:
                return Refusal(self._bucket(held[0]), self._due[held[0]], True)
            if once or held or not self._borrow(sender, costs, now):
                return self._queue(now, sender, refused)
        if once and held:  # let in before its time
            self._drop(held[0])
        if claimed or once:
            self._used(now, sender.crowd, owed, costs)
        paid = self._paid
        for bucket, cost in costs.items():
            before = paid[bucket]
            paid[bucket] = (before if before > now else now) + cost
        return None

    def early(self, now: float, sender: Sender) -> Refusal | None:
        """The refusal of a batch of which nothing is known but who sends it; None: it has to be looked at."""
        held = self._held_by(sender, now)
        if not held:
            return self._beyond(now)
        first = held[0]
        if self._due[first] <= now:
            return None
        refused = self._refused(now, self._costs(first))
        if not refused:
            return None
        # Of those who send the same it is one more that waits.
        return (
            self._queue(now, sender, refused) if sender.peer else Refusal(self._bucket(first), self._due[first], True)
        )

    def note(self, now: float, events: int, size: int) -> None:
        """What was let in, for `use`."""
        second = int(now)
        at = _SECONDS + second % _RING * 3
        if self._whole[at] != second:
            self._whole[at], self._real[at + 1], self._real[at + 2] = second, 0.0, 0.0
        self._real[at + 1] += events
        self._real[at + 2] += size

    def use(self, now: float) -> tuple[float, float]:
        """Events and bytes a second, on the average of the last five whole seconds."""
        second, events, size = int(now), 0.0, 0.0
        for at in range(_SECONDS, _HEAD, 3):
            if 1 <= second - self._whole[at] <= 5:
                events += self._real[at + 1]
                size += self._real[at + 2]
        return events / 5, size / 5

    def kind(self, bucket: int) -> int:
        """What the bucket belongs to."""
        if bucket < self.first_name:
            return OF_PARTITION if bucket >= FIRST_PARTITION else OF_UNITS
        return OF_DEVICE if self.name(bucket) & 3 == DEVICE_EVENTS else OF_KEY

    def count_refused(self, bucket: int) -> None:
        self._whole[_REFUSED + self.kind(bucket)] += 1

    def refused(self) -> list[int]:
        """Refused batches, by what their bucket belonged to."""
        return self._whole[_REFUSED : _REFUSED + OF_DEVICE + 1].tolist()

    def sweep(self, now: float) -> None:
        """Once a second: tickets that were not claimed in time are forgotten."""
        if self._whole[_OUT] and now >= self._real[_SWEEP]:
            self._real[_SWEEP] = now + _SWEEP_S
            for ticket, due in enumerate(self._due.tolist()):
                if 0.0 < due < now - LATE_S:
                    self._drop(ticket)

    def _recount(self) -> None:
        """What waits, from the tickets that are whole."""
        self._waiting.cast("B")[:] = bytes(self._waiting.nbytes)
        self._whole[_OUT] = 0
        for ticket, holder in enumerate(self._holders.tolist()):
            if not holder or not self._due[ticket]:
                self._holders[ticket], self._due[ticket] = 0, 0.0
                continue
            self._whole[_OUT] += 1
            for bucket, cost in self._costs(ticket):
                self._waiting[bucket] += cost

    def _refused(self, now: float, costs: Iterable[tuple[int, float]]) -> list[tuple[float, int, float]]:
        """The buckets that do not let this in without a ticket: when each would, which it is, and the cost."""
        found = []
        for bucket, cost in costs:
            paid, waiting = self._paid[bucket], self._waiting[bucket]
            if paid <= now:
                if cost <= BURST_S or waiting < _NOTHING:
                    continue
                paid = now
            elif paid + waiting + cost <= now + BURST_S:
                continue
            found.append((paid + waiting + min(cost, BURST_S) - BURST_S, bucket, cost))
        return found

    def _queue(self, now: float, sender: Sender, refused: list[tuple[float, int, float]]) -> Refusal:
        """A ticket on the buckets that make it wait: the last to let it in, and those that take at least half as long.

        On one that is free much sooner it would keep a place that others could use. Of several that cannot be told apart each is due at a
        whole second, when the one that was told so comes: else one that comes by chance would take the place of another.
        """
        refused.sort(reverse=True)
        due, bucket, cost = refused[0]
        place, soon = None, due <= now + HORIZON_S
        if soon and self._credit.of(sender.crowd, now) > 0.0:
            place = self._place(sender.holder)
        if place is not None or (soon and sender.peer):
            self._credit.spend(sender.crowd, now, cost)
        if place is None:
            return Refusal(bucket, due, False)
        ready, due = due, now + max(1, math.ceil(due - now)) if sender.peer else due
        at = place * 2 * _CHARGES_MAX
        for number in range(_CHARGES_MAX):
            if number < len(refused) and refused[number][0] - now >= (ready - now) / 2:
                _, one, cost = refused[number]
                self._waiting[one] += cost
            else:
                one, cost = 0, 0.0
            self._owed[at + 2 * number], self._owed[at + 2 * number + 1] = one, cost
        self._peers[place], self._due[place], self._holders[place] = sender.peer, due, sender.holder
        self._whole[_OUT] += 1
        return Refusal(bucket, due, True)

    def _claim(self, ticket: int, costs: Mapping[int, float], now: float) -> bool:
        """Give the ticket back. True if it lets these costs in."""
        owed = self._costs(ticket)
        self._drop(ticket)
        return self._is_for(owed, costs, now)

    def _is_for(self, owed: list[tuple[int, float]], costs: Mapping[int, float], now: float) -> bool:
        """The costs are about what was refused, and no bucket is too far behind."""
        return all(costs.get(bucket, 0.0) <= MORE * cost for bucket, cost in owed) and all(
            self._paid[bucket] <= now + SLACK_S for bucket in costs
        )

    def _borrow(self, sender: Sender, costs: Mapping[int, float], now: float) -> bool:
        """Let someone in on a due ticket of his address, once each: it may be his own, and he sends something else this time.

        Whoever holds it can claim it all the same. Both together are more than it was made for, so those who come after them wait longer.
        """
        peers = self._peers.tolist() if self._whole[_OUT] else []
        at, peer = -1, sender.peer
        while peer in peers[at + 1 :]:
            at = peers.index(peer, at + 1)
            owed = self._costs(at)
            if now - LATE_S <= self._due[at] <= now and self._is_for(owed, costs, now):
                self._unwait(owed)
                self._used(now, sender.crowd, owed, costs)
                self._peers[at] = 0
                self._owed[at * 2 * _CHARGES_MAX : (at + 1) * 2 * _CHARGES_MAX] = _NO_CHARGES
                return True
        return False

    def _used(self, now: float, crowd: int, owed: list[tuple[int, float]], costs: Mapping[int, float]) -> None:
        """Someone came to a ticket that was for `owed`, and took `costs`."""
        if owed:
            bucket, cost = owed[0]
            self._credit.put_back(crowd, now, min(cost, costs.get(bucket, 0.0)))

    def _beyond(self, now: float) -> Refusal | None:
        """More waits than tickets are given for: nothing can get in, however small it is."""
        if self.units:
            for bucket in (EVENTS, BYTES):
                paid, waiting = self._paid[bucket], self._waiting[bucket]
                if paid > now and paid + waiting - BURST_S > now + HORIZON_S:
                    return Refusal(bucket, paid + waiting - BURST_S, False)
        return None

    def _held_by(self, sender: Sender, now: float) -> list[int]:
        """The sender's tickets; of those that he has by his connection, the ones that are due."""
        held = self._held(sender.holder, now)
        if sender.waits in (0, sender.holder) or (held and self._due[held[0]] <= now):
            return held
        return [ticket for ticket in self._held(sender.waits, now) if self._due[ticket] <= now] or held

    def _held(self, holder: int, now: float) -> list[int]:
        """The holder's tickets, the first that is due before the others; those that are too late are dropped."""
        first = (holder >> _KIND_BITS) % TICKETS
        window = self._holders[first : first + _TICKET_TRIES].tolist()
        if holder not in window:
            return []
        found = [first + place for place, one in enumerate(window) if one == holder]
        late = [ticket for ticket in found if self._due[ticket] < now - LATE_S]
        for ticket in late:
            self._drop(ticket)
        return sorted((ticket for ticket in found if ticket not in late), key=self._due.__getitem__)

    def _place(self, holder: int) -> int | None:
        first = (holder >> _KIND_BITS) % TICKETS
        window = self._holders[first : first + _TICKET_TRIES].tolist()
        return first + window.index(0) if 0 in window else None

    def _drop(self, ticket: int) -> None:
        self._unwait(self._costs(ticket))
        self._holders[ticket], self._peers[ticket], self._due[ticket] = 0, 0, 0.0
        self._whole[_OUT] -= 1

    def _unwait(self, owed: list[tuple[int, float]]) -> None:
        for bucket, cost in owed:
            self._waiting[bucket] = max(0.0, self._waiting[bucket] - cost)

    def _costs(self, ticket: int) -> list[tuple[int, float]]:
        at = ticket * 2 * _CHARGES_MAX
        owed = self._owed[at : at + 2 * _CHARGES_MAX].tolist()
        return [(int(bucket), cost) for bucket, cost in zip(owed[::2], owed[1::2], strict=True) if cost]

    def _bucket(self, ticket: int) -> int:
        return int(self._owed[ticket * 2 * _CHARGES_MAX])

    def _slot(self, name: int, taken: Mapping[int, float], now: float) -> int:
        """The bucket of a name."""
        first = (name >> _KIND_BITS) % (NAMES - _NAME_TRIES)
        window = self._names[first : first + _NAME_TRIES].tolist()
        if name in window:
            return self.first_name + first + window.index(name)
        begin = self.first_name + first
        paid = self._paid[begin : begin + _NAME_TRIES].tolist()
        for place in range(_NAME_TRIES):
            free = paid[place] <= now and self._waiting[begin + place] < _NOTHING and begin + place not in taken
            if free:
                self._names[first + place] = name
                self._paid[begin + place] = self._waiting[begin + place] = 0.0
                return begin + place
        return begin + paid.index(min(paid))


def size_of(partitions: int) -> int:
    """Bytes of memory for this many partitions."""
    places = TICKETS + _TICKET_TRIES
    return _CELL * (
        _HEAD + 2 * (FIRST_PARTITION + partitions + NAMES) + NAMES + places * (3 + 2 * _CHARGES_MAX) + CELLS
    )


def _identity(boot: bytes, partitions: int) -> bytes:
    return struct.pack("<QQ16s", _VERSION, partitions, boot)


def _cut(memory: memoryview, cells: Iterable[int]) -> Iterable[memoryview]:
    at = 0
    for count in cells:
        yield memory[at * _CELL : (at + count) * _CELL]
        at += count
