"""The independent oracle: what was sent against what lies in the store. Nothing of Penstock's own reading code is used.

every confirmed event is there exactly once, byte for byte; a batch that was never confirmed whole or not at all;
nothing else; the events of a device in the order in which they were sent, in the partition crc32(device) mod n
"""

from __future__ import annotations

import gzip
import json
import re
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

_STAMP = re.compile(
    rb'(.*?),"receivedAt":"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z"(?:,"properties":(\{.*\}))?\}', re.DOTALL
)


@dataclass
class Batch:
    """Lines of one POST, each unique in the whole test where `confirmed` is False."""

    lines: Sequence[bytes]
    confirmed: bool = True


Lane = Sequence[Batch]
"""The batches of one sender in the order in which it sent them, one at a time. A device is in one lane only."""


def archived(store: Path) -> Iterator[tuple[int, bytes]]:
    """Partition and stamped line of every event, partition by partition in the order of the file names."""
    folders = sorted((path for path in store.iterdir() if path.name.isdigit()), key=lambda path: int(path.name))
    for folder in folders:
        for path in sorted(folder.glob("[0-9]*.json.gz")):
            with gzip.open(path, "rb") as file:
                content = file.read()
            assert content.endswith(b"\n"), f"{path} does not end in a line feed"
            for line in content[:-1].split(b"\n"):
                yield int(folder.name), line


def unstamp(line: bytes) -> tuple[bytes, bytes]:
    """The event as it was sent, and the properties of its batch."""
    match = _STAMP.fullmatch(line)
    assert match, f"no stamp: {line[:200]!r}"
    return match[1] + b"}", match[2] or b""


def device_of(line: bytes, field: str = "deviceId") -> str:
    device = json.loads(line)[field]
    assert isinstance(device, str)
    return device


def problems(store: Path, partitions: int, lanes: Iterable[Lane], fields: Sequence[str] = ("deviceId",)) -> list[str]:
    """All differences, at most a few of each kind. `fields`: the device is in the first of these that the event has."""
    found: dict[str, list[bytes]] = {}
    wrong: list[str] = []
    for partition, line in archived(store):
        event, _ = unstamp(line)
        device = _device(event, fields)
        found.setdefault(device, []).append(event)
        if zlib.crc32(device.encode()) % partitions != partition:
            wrong.append(f"{device} is in partition {partition}")
    there = {event for events in found.values() for event in events}
    expected: dict[str, list[bytes]] = {}
    for lane in lanes:
        for batch in lane:
            if batch.confirmed or batch.lines[0] in there:
                for event in batch.lines:
                    expected.setdefault(_device(event, fields), []).append(event)
    return wrong[:5] + list(_differences(expected, found))


def _device(event: bytes, fields: Sequence[str]) -> str:
    content = json.loads(event, parse_int=str)  # of any number of digits
    return str(next(content[field] for field in fields if field in content))


def _differences(expected: Mapping[str, list[bytes]], found: Mapping[str, list[bytes]]) -> Iterator[str]:
    lost: Counter[bytes] = Counter()
    more: Counter[bytes] = Counter()
    unordered = []
    for device in expected.keys() | found.keys():
        want, got = expected.get(device, []), found.get(device, [])
        if want == got:
            continue
        missing, extra = Counter(want) - Counter(got), Counter(got) - Counter(want)
        lost += missing
        more += extra
        if not missing and not extra:
            unordered.append(device)
    sent = {event for events in expected.values() for event in events}
    twice = [event for event in more if event in sent]
    unsent = [event for event in more if event not in sent]
    if lost:
        yield f"{lost.total()} events are missing, such as {next(iter(lost))[:120]!r}"
    if twice:
        yield f"{sum(more[event] for event in twice)} copies too many, such as of {twice[0][:120]!r}"
    if unsent:
        yield f"{sum(more[event] for event in unsent)} events that were not sent, such as {unsent[0][:120]!r}"
    if unordered:
        yield f"{len(unordered)} devices are out of order, such as {unordered[0]}"
