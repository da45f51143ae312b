"""Why leases move: what a host notes down when it has taken one, and which moves an observer can see coming.

The six keys of a lease leave no room for a reason. So whoever takes one writes a second small blob, `_moves/{group}/{partition}.json`,
for people. Nothing is ever decided by it, and it stands beside the folder of the leases, not in it, because hosts list that folder.

The note may be missing or old: its write may fail or come late, or its host die before it. It is therefore believed only if
epoch and instance are those of the lease as it is now; otherwise the reason is not known, and is said to be not known.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Final, Literal

import msgspec

from penstock.blobs import BlobStore, Exists
from penstock.clock import Clock, timestamp
from penstock.errors import LostRace, StoreError
from penstock.processor.balance import View, plan
from penstock.processor.lease import Lease
from penstock.processor.pump import Log

PAUSE_S: Final = 60.0

Why = Literal["first", "given_back", "expired", "balance", "own"]


class Move(msgspec.Struct, frozen=True, rename={"from_owner": "from"}):
    """The blob. `from_owner` is empty if nobody is known to have had it before; `token` is the lease's, as it was taken."""

    epoch: int
    from_owner: str
    to: str
    why: Why
    at: str
    token: str

    @property
    def instance(self) -> str:
        """The instance of the host that took the lease."""
        return self.token.rpartition("-")[0]


class Moved(msgspec.Struct, frozen=True, rename={"from_owner": "from"}):
    """Why a lease is where it is. `to` is empty if nobody has it; `from_owner` and `at` are None if they are not known."""

    why: Why
    from_owner: str | None
    to: str
    at: str | None


class Observed(msgspec.Struct, frozen=True):
    """A partition as an observer sees it: its lease has not changed for `age_s`. None: there is none, or it is not `readable`."""

    partition: int
    lease: Lease | None
    age_s: float
    readable: bool = True


class Due(msgspec.Struct, frozen=True, rename={"from_owner": "from"}):
    """A move that comes if nothing else does: after `due_s` in the next round of `to`, or of any host if that is None."""

    why: Why
    from_owner: str | None
    to: str | None
    due_s: float


def move_name(group: str, partition: int) -> str:
    """The name of the note's blob."""
    return f"_moves/{group}/{partition}.json"


def encode_move(move: Move) -> bytes:
    """The bytes of the blob."""
    return msgspec.json.format(msgspec.json.encode(move), indent=0)


def read_move(store: BlobStore, group: str, lease: Lease) -> Move | None:
    """The note of the take-over that the lease stems from; None if there is none that can be believed. Raises StoreUnavailable."""
    try:
        found = _decoded(store.get(move_name(group, lease.partition)).body)
    except StoreError as error:
        if error.retryable:
            raise
        return None
    return found if found and (found.epoch, found.instance) == (lease.epoch, lease.instance) else None


def moved(lease: Lease, noted: Move | None) -> Moved | None:
    """Why the lease is where it is, from its note or, where that is missing, from what the lease says itself."""
    if not lease.owner:
        return Moved("given_back", noted.to if noted else None, "", None)
    if noted:
        return Moved(noted.why, noted.from_owner or None, noted.to, noted.at)
    # The epoch grows with every change of the owner: the first one still has it.
    return Moved("first", None, lease.owner, None) if lease.epoch == 1 else None


class Moves:
    """Notes down what one host takes in one group. To be called from one thread.

    When the store does not take a note, none is tried for `PAUSE_S`: a host that takes many leases must not wait for each of
    their notes while those that it has are to be renewed.
    """

    def __init__(self, store: BlobStore, group: str, *, clock: Clock, log: Log) -> None:
        self._store = store
        self._group = group
        self._clock = clock
        self._log = log
        self._failing = False
        self._again_at = clock.monotonic()

    def note(self, taken: Lease, seen: Lease | None, *, expired: bool) -> None:
        """To be called after a take-over. `taken`: the lease as it was written; `seen`: as it was before, None if there was none;
        `expired`: `seen` had not changed for the lease time. A store that fails is logged once, and changes nothing.
        """
        if self._clock.monotonic() < self._again_at:
            return
        before = seen.owner if seen else ""
        why = _why(seen, taken.owner, expired=expired)
        move = Move(taken.epoch, before, taken.owner, why, timestamp(self._clock.now_ms()), taken.token)
        try:
            self._write(taken.partition, move)
            self._failing = False
        except StoreError as error:
            self._again_at = self._clock.monotonic() + PAUSE_S
            if not self._failing:
                self._log.warning(
                    "the reason of a lease's move is not noted", partition=taken.partition, error=str(error)
                )
            self._failing = True

    def _write(self, partition: int, move: Move) -> None:
        name = move_name(self._group, partition)
        answer = self._store.create(name, encode_move(move), id=_id(move))
        if not isinstance(answer, Exists):
            return
        before = _decoded(answer.blob.body)
        if before is not None and before.epoch > move.epoch:
            return  # this host was slow, and another has taken the lease since
        if move.why == "given_back" and before is not None and before.epoch == move.epoch - 1:
            # A lease that was given back does not say by whom.
            move = msgspec.structs.replace(move, from_owner=before.to)
        try:
            self._store.replace(name, encode_move(move), etag=answer.blob.etag, id=_id(move))
        except LostRace:
            return  # the same


def _why(seen: Lease | None, me: str, *, expired: bool) -> Why:
    if seen is None:
        return "first"
    if not seen.owner:
        return "given_back"
    if seen.owner == me:
        return "own"
    return "expired" if expired else "balance"


def _id(move: Move) -> str:
    return f'"{move.token}"'


def _decoded(body: bytes) -> Move | None:
    try:
        return msgspec.json.decode(body, type=Move)
    except (msgspec.DecodeError, ValueError, RecursionError):
        return None


def forecast(seen: Sequence[Observed], hosts: Collection[str], *, lease_s: float) -> list[Due | None]:
    """The next move of each partition in `seen`, all partitions in order; None where none is due.

    Hosts are those that renew a lease, and `hosts`, which are known to run. As `plan` does, what is free goes first: only
    where nothing is, hosts even out.
    """
    living = {*hosts} | {one.lease.owner for one in seen if one.lease and one.age_s <= lease_s / 2} - {""}
    free = [_free(one, living, lease_s) for one in seen]
    if any(due is not None and not due.due_s for due in free):
        return free
    views = [View(one.partition, one.lease.owner if one.lease else None, free=False) for one in seen]
    due = list(free)
    for host in sorted(living):
        taken = plan(views, host).steal
        if taken is not None and due[taken] is None:
            due[taken] = Due("balance", views[taken].owner, host, 0.0)
    return due


def _free(one: Observed, living: Collection[str], lease_s: float) -> Due | None:
    """The move of a partition that nobody reads, or whose host seems to be gone: it has missed the time to renew, a third."""
    lease = one.lease
    if not one.readable or (lease is not None and lease.owner and one.age_s <= lease_s / 2):
        return None
    owner = lease.owner if lease else ""
    others = {*living} - {owner}
    to = others.pop() if len(others) == 1 else None
    if lease is None:
        return Due("first", None, to, 0.0)
    if not owner:
        return Due("given_back", None, to, 0.0)
    return Due("expired", owner, to, max(0.0, lease_s - one.age_s))
