"""What the hub has of a simulated run, counted again: what it gives to readers, its producers' table, the audit of its folder or topic."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeVar

import msgspec

from penstock.cli.reach import fetch, fetch_all
from penstock.errors import PenstockError

if TYPE_CHECKING:
    from penstock.access import Access
    from penstock.cli.wiring import Layout
    from penstock.client.gateway import Account, Tally
    from penstock.settings import Values

Decoded = TypeVar("Decoded")

_PAGE_EVENTS = 10_000
# What the server puts behind each event; before it, an event lies in the hub as it was sent.
_STAMP_BYTES = len(',"receivedAt":"2026-11-22T14:03:21.123Z"}')


class Recount(msgspec.Struct):
    """`found`: events of the run in the hub. `copies`: those that are there again, where it is for readers to leave them out.

    `audited`: the hub's folder is on this machine, or its topic was named, and was audited.
    """

    problems: list[str]
    found: int = 0
    copies: int = 0
    audited: bool = False


class _Partition(msgspec.Struct):
    next: int


class Hub(msgspec.Struct):
    """A hub and where its partitions end."""

    hub: str
    partitions: list[_Partition]
    place_bits: int = 0

    @property
    def knows_numbers(self) -> bool:
        """Whether it recognises what was sent before when it answers. A topic leaves that to readers."""
        return self.place_bits == 0


class _Producer(msgspec.Struct):
    sequence: int


def ends(api: Access) -> Hub:
    """Where the partitions end now."""
    return _decoded(api, "/v1/partitions", Hub)


def recount(
    api: Access, before: Hub, begins: bytes, tallies: Sequence[Tally], where: Layout, values: Values
) -> Recount:
    """Compare what was answered with what the hub has of the events that begin so and came after `before`."""
    result = Recount([])
    try:
        found = _read_back(api, before, begins, result)
        result.found = sum(count for count, _ in found.devices.values())
        result.problems += _differences(tallies, found)
        for tally in tallies if before.knows_numbers else ():
            result.problems += _numbers(api, tally)
        result.audited, problems = _audit(before.hub, where, values)
        result.problems += problems
    except PenstockError as error:
        result.problems.append(f"What the hub has could not be checked: {error.detail}")
    return result


def _read_back(api: Access, before: Hub, begins: bytes, result: Recount) -> Account:
    """What lies in the hub of this run, between the ends that it had before and now."""
    from penstock.cli.recount_topic import Once
    from penstock.client.gateway import Account
    from penstock.hub.remote import FRAMES

    found, after = Account(), ends(api)
    for partition, (first, last) in enumerate(zip(before.partitions, after.partitions, strict=True)):
        at, end = first.next >> before.place_bits, last.next >> before.place_bits
        once, accept = Once(begins, _STAMP_BYTES), "" if before.knows_numbers else FRAMES
        while at < end:
            path = f"/v1/partitions/{partition}/events?from={at}&limit={_PAGE_EVENTS}"
            page, headers = fetch_all(api, path, accept=accept)
            if before.knows_numbers:
                found.add([line[:-_STAMP_BYTES] for line in page.split(b"\n") if line.startswith(begins)])
            else:
                found.add(once.passed(page))
            following = int(headers.get("penstock-next-offset", "0"))
            if following <= at:
                raise PenstockError(f"partition {partition} cannot be read beyond {at}, and ends at {end}")
            at = following
        result.copies += once.copies
    return found


def _differences(tallies: Sequence[Tally], found: Account) -> list[str]:
    """Of each device what was accepted must be there: so many, with these bytes, in this order. More may be where answers are missing."""
    from penstock.client.gateway import device_of

    kinds: dict[str, list[str]] = {"lost": [], "more": [], "other": []}
    differing: Counter[str] = Counter()
    accepted = {device: known for tally in tallies for device, known in tally.account.devices.items()}
    uncertain = {device_of(line) for tally in tallies for lines in tally.unsettled for line in lines}
    for device in accepted.keys() | found.devices.keys():
        want, got = accepted.get(device, (0, 0)), found.devices.get(device, (0, 0))
        if want == got or (device in uncertain and got[0] > want[0]):
            continue
        kind = "lost" if got[0] < want[0] else "more" if got[0] > want[0] else "other"
        kinds[kind].append(device.decode())
        differing[kind] += abs(want[0] - got[0])
    said = {
        "lost": "events were accepted, and are not in the hub",
        "more": "events more are in the hub than were accepted",
        "other": "devices have other bytes in the hub than were accepted, or another order",
    }
    return [
        f"{differing[kind] or len(devices):,} {said[kind]}; such as of {min(devices)}"
        for kind, devices in kinds.items()
        if devices
    ]


def _numbers(api: Access, tally: Tally) -> list[str]:
    if not tally.stored or tally.unsettled:
        return []
    try:
        known = _decoded(api, f"/v1/producers/{tally.producer}", _Producer)
    except PenstockError as error:
        return [error.detail]
    if known.sequence == tally.stored:
        return []
    return [f"{tally.producer}: the hub's last batch is {known.sequence}, the last that it accepted {tally.stored}"]


def _decoded(api: Access, path: str, kind: type[Decoded]) -> Decoded:
    try:
        return msgspec.json.decode(fetch(api, path), type=kind)
    except msgspec.MsgspecError as error:
        raise PenstockError(f"{api.where}{path} does not answer as Penstock does: {error}.") from error


def _audit(hub_id: str, where: Layout, values: Values) -> tuple[bool, list[str]]:
    """The same as `penstock audit`, if the hub that was sent to lies in the data folder, or in the topic that was named."""
    from penstock.archive import check, judged
    from penstock.cli import topic, wiring
    from penstock.clock import SystemClock

    if where.topic:
        store = wiring.open_store(where)
        with topic.opened(where, store, SystemClock()) as in_topic:
            if in_topic.id != hub_id:
                return False, [f"the hub of the API is {hub_id}, and not {in_topic.id} at {where.topic}"]
            found = judged.audit(in_topic, store)
    elif not (where.hub / "data.mdb").exists():
        return False, []
    else:
        with wiring.reading_hub(where, values) as hub:
            if hub.id != hub_id:
                return False, []
            found = check.audit(hub, wiring.open_store(where), archived=values.text("archive") == "on")
    return True, [f"audit: {problem}" for problem in found.problems]
