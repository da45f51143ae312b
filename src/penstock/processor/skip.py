"""The only way on for a partition that stands still because what its group would read next is gone, or cannot be read.

No host takes it by itself: a person orders it, with a reason. In this order, so that a crash leaves nothing that is not said, and
the same order given again goes on where it ended:

1. see that the partition stands still, and that nothing would be passed over that is there (`forced`: all the same);
2. write down what is passed over, create-only: of the archive in its ledger (archive/skip.py), of other groups in
   `_skips/{group}/{partition}/{offset:020}.json`;
3. move the lease there by compare-and-set, and free it. Its owner finds that it was taken and drops the pump that stood still; whoever
   takes it next begins behind the gap, in a new epoch.

A lease is read again when its owner has renewed it meanwhile. That is no second chance for a zombie: where the checkpoint goes was
written down before, for ever, and it never goes back.
"""

from __future__ import annotations

import secrets
import threading
from collections.abc import Callable
from typing import Final, NamedTuple

import msgspec

from penstock.blobs import BlobStore, Exists
from penstock.clock import Clock, timestamp
from penstock.errors import BlobNotFound, LostRace, SettingsError, StoreError, StoreUnavailable
from penstock.hub import Hub
from penstock.processor.lease import Lease, decode_lease, encode_lease, lease_name

EARLIEST: Final = "earliest"
TRIES: Final = 20


class Order(NamedTuple):
    """`to`: an offset, or `earliest`, the first from which the group can go on. `by`: who gave it."""

    partition: int
    to: str
    reason: str
    by: str
    forced: bool = False


class Skip(msgspec.Struct, frozen=True):
    """What a group passed over: `[offset, offset_next)` of a partition (docs/formats.md)."""

    hub: str
    group: str
    partition: int
    offset: str
    offset_next: str
    reason: str
    by: str
    at: str
    id: str


class Skipped(msgspec.Struct, frozen=True):
    """What was done: the group goes on at `offset_next`. `records`: the blobs that say so."""

    group: str
    partition: int
    offset: str
    offset_next: str
    reason: str
    by: str
    records: list[str]


def gone(group: str, partition: int, *, at: int, first: int) -> str:
    """For people: a group would read at offset `at`, and the log begins at `first`."""
    return (
        f"Offsets {at} to {first - 1} of partition {partition}, which {group} would read next, were deleted; what lies from {first} on is "
        f"kept. The partition stands still until `penstock leases skip --group '{group}' --partition {partition} --to {EARLIEST} "
        "--reason TEXT` says why it goes on there."
    )


def skip_name(group: str, partition: int, offset: int) -> str:
    return f"_skips/{group}/{partition}/{offset:020}.json"


def skip(store: BlobStore, hub: Hub, group: str, order: Order, *, clock: Clock, watch_s: float) -> Skipped:
    """For any group but the archive's. Raises SettingsError where nothing was touched, StoreError, HubError."""
    lease = standing(store, group, order.partition, clock=clock, watch_s=watch_s)
    if lease is None:
        raise SettingsError(
            f"The group {group} has no lease of partition {order.partition}: it begins at the first event that is kept, and has "
            "nothing to skip."
        )
    at, records = int(lease.offset), []
    to = destination(hub, order, at=at, earliest=lambda _first: at)
    while at < to:
        name = skip_name(group, order.partition, at)
        made = Skip(
            hub=hub.id,
            group=group,
            partition=order.partition,
            offset=str(at),
            offset_next=str(to),
            reason=order.reason,
            by=order.by,
            at=timestamp(clock.now_ms()),
            id=secrets.token_hex(16),
        )
        answer = store.create(name, msgspec.json.encode(made), id=made.id)
        stands = _decoded(answer.blob.body, name) if isinstance(answer, Exists) else made
        records.append(name)
        at = int(stands.offset_next)
    move(store, group, order.partition, offset=str(at), sequence_number=at << hub.place_bits)
    return Skipped(group, order.partition, lease.offset, str(at), order.reason, order.by, records)


def standing(store: BlobStore, group: str, partition: int, *, clock: Clock, watch_s: float) -> Lease | None:
    """The lease, if it has stood still for `watch_s`; None if there is none. Raises SettingsError if it moves."""
    before = _read(store, group, partition)
    clock.wait(threading.Event(), watch_s)
    lease = _read(store, group, partition)
    if lease is not None and before is not None and lease[0].offset != before[0].offset:
        raise SettingsError(
            f"The checkpoint of partition {partition} moves, from {before[0].offset} to {lease[0].offset} while it was looked at: "
            f"{lease[0].owner or 'its host'} reads on by itself. Nothing was skipped."
        )
    return lease[0] if lease else None


def destination(hub: Hub, order: Order, *, at: int, earliest: Callable[[int], int]) -> int:
    """The offset to go on from, for one who would read at offset `at`. Raises SettingsError.

    `earliest` says where one may go on if the log begins at that offset.
    """
    bounds = hub.bounds(order.partition)
    first, end = bounds.first >> hub.place_bits, bounds.next >> hub.place_bits
    goal = max(first, earliest(first))
    to = goal if order.to == EARLIEST else int(order.to)
    if at >= first and not order.forced:
        raise SettingsError(
            f"Nothing of partition {order.partition} is gone: its checkpoint is {at}, and the log begins at {first}. Nothing was skipped. "
            "What is in the log and cannot be read (frame_damaged) is passed over with --force and the offset behind it."
        )
    if to != goal and not order.forced:
        what = "events between are in the log" if to > goal else "what lies between is gone"
        raise SettingsError(
            f"Partition {order.partition} can go on at offset {goal}, and not at {to}: {what}. Nothing was skipped."
            + (" --force leaves them out all the same." if to > goal else "")
        )
    if not at < to <= end:
        raise SettingsError(
            f"Partition {order.partition} is at offset {at} and ends at {end}: --to {to} is no place ahead of it. Nothing was skipped."
        )
    for frame in hub.read(order.partition, str(to), bytes_max=1).frames[:1]:
        if frame.first < to << hub.place_bits:
            raise SettingsError(
                f"Offset {to} lies inside of the frame from {frame.first} to {frame.next}: name one of these. Nothing was skipped."
            )
    return to


def move(store: BlobStore, group: str, partition: int, *, offset: str, sequence_number: int) -> None:
    """Free the lease at this checkpoint, if there is one and it is not as far yet. What is below must be done or written down."""
    instance = secrets.token_hex(8)
    for number in range(1, TRIES + 1):
        found = _read(store, group, partition)
        if found is None or int(found[0].offset) >= int(offset):
            return
        token = f"{instance}-{number}"
        lease = msgspec.structs.replace(found[0], owner="", token=token, offset=offset, sequence_number=sequence_number)
        try:
            store.replace(lease_name(group, partition), encode_lease(lease), etag=found[1], id=f'"{token}"')
        except (LostRace, BlobNotFound):
            continue  # renewed meanwhile, or deleted
        return
    raise StoreUnavailable(
        f"The lease of partition {partition} was written by others {TRIES} times while it was to be moved: give the order again."
    )


def _read(store: BlobStore, group: str, partition: int) -> tuple[Lease, str] | None:
    try:
        blob = store.get(lease_name(group, partition))
    except BlobNotFound:
        return None
    return decode_lease(blob.body, partition), blob.etag


def _decoded(body: bytes, name: str) -> Skip:
    try:
        return msgspec.json.decode(body, type=Skip)
    except (msgspec.MsgspecError, ValueError) as error:
        raise StoreError(f"{name} cannot be read: {error}", blob=name) from error
