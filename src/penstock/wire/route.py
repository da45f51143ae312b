"""From the lines of a batch to groups for partitions: the hot path of the intake.

There are two ways, and they give the same result (a test compares them). The fast way does work for a whole batch at a time: one
validating decode, one pass that cuts lines off and groups them, one join for each group, in which the server's stamp is the separator
(`…}` LF becomes `…,"receivedAt":"…"}` LF). It is right only when every line begins with `{` and ends in `}` (for the decoder a
line feed is white space; but inside an event `}` LF `{` is not JSON, so no event spans lines then), the device field stands
exactly once in each line, and nothing hints at a reserved field or at an escaped key. Whatever it cannot be sure of, it leaves to
the slow way, which looks at one line after the other and knows why it rejects one.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache
from io import BytesIO
from itertools import islice
from operator import attrgetter
from typing import Annotated, Any
from zlib import crc32 as device_crc32

import msgspec

from penstock.errors import BatchTooLarge, EmptyBatch
from penstock.events import DEVICE_FIELD, Group
from penstock.wire.frame import FRAME_BYTES_MAX, fields_of

RESERVED = "receivedAt"
PROPERTIES = "properties"
DEVICES_CACHED_MAX = 1 << 13

DEVICE_BYTES_MAX = 128
_DEVICE = re.compile(rf"[A-Za-z0-9][A-Za-z0-9._:@-]{{0,{DEVICE_BYTES_MAX - 1}}}", re.ASCII)
_IN_DEVICES = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789._:@-\n"
_BEGINS_NO_DEVICE = re.compile(rb"\n(?![A-Za-z0-9])")
_FIELD = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]{0,63}", re.ASCII)
_SUSPICIOUS = re.compile(rb"\\u00[2-7]")
_REST_OF_LINE = re.compile(
    rb"[^ \t\r\n][^\n]*+"
)  # begins with a class, which is looked for three times as fast as a line's begin
_DEVICE_OF = attrgetter("device")
_OPENING = ord("{")
_CLOSING = b"}\n"
_SEARCHED = 29_000
_RAW = msgspec.json.Decoder(msgspec.Raw)
_FIELDS = msgspec.json.Decoder(dict[str, msgspec.Raw])


class Rejected(msgspec.Struct, frozen=True, gc=False):
    """An event that is not stored: its place in the batch from 0, one of the contract's event codes, and a sentence."""

    index: int
    code: str
    detail: str


class Routed(msgspec.Struct, frozen=True, gc=False):
    """A batch split: accepted events in groups by partition, in order in each, of `bytes` in all, and the rejected ones."""

    groups: tuple[Group, ...]
    accepted: int
    bytes: int
    rejected: tuple[Rejected, ...] = ()


Allows = Callable[[str], bool]
"""Whether events of a device may be sent by the one who sends them."""


class _NotSure(Exception):
    """The fast way cannot judge this batch."""


class Stamp:
    """What the server adds to each event of a batch: the closing of its lines, with and without the device."""

    def __init__(self, received_at: str, properties: bytes = b"", device: str = "", field: str = DEVICE_FIELD) -> None:
        self.properties = properties
        tail = f'"{RESERVED}":"{received_at}"'.encode()
        if properties:
            tail += f',"{PROPERTIES}":'.encode() + properties
        self.bare = tail + b"}\n"
        self.closing = b"," + self.bare
        self.device = f'"{field}":"{device}",'.encode()


def is_device(device: str) -> bool:
    """Whether this may be a device id."""
    return _DEVICE.fullmatch(device) is not None


def is_field(name: str) -> bool:
    """Whether this may be the name of a device field."""
    return _FIELD.fullmatch(name) is not None and name not in (RESERVED, PROPERTIES)


class _Partitions(dict[str, int]):
    """device → partition, remembered for the devices seen first.

    Of more devices than these it is computed each time: that costs less than a lookup in memory that no cache of the processor
    holds, and the same for any number of devices.
    """

    def __init__(self, partitions: int) -> None:
        super().__init__()
        self.partitions = partitions

    def __missing__(self, device: str) -> int:
        if _DEVICE.fullmatch(device) is None:
            raise _NotSure
        partition = device_crc32(device.encode()) % self.partitions
        if len(self) < DEVICES_CACHED_MAX:
            self[device] = partition
        return partition

    def of_all(self, devices: Iterable[str]) -> Iterable[int]:
        """The partitions of these devices of at most `DEVICE_BYTES_MAX`; one too many for each line feed in a device."""
        if len(self) < DEVICES_CACHED_MAX:
            return map(self.__getitem__, devices)
        names = "\n".join(("", *devices)).encode()
        if names.translate(None, _IN_DEVICES) or _BEGINS_NO_DEVICE.search(names):
            raise _NotSure
        return [crc % self.partitions for crc in map(device_crc32, names.split(b"\n")[1:])]


class Router:
    """Splits batches for a hub of `partitions` partitions. Not thread-safe in its cache's bound only; results never differ."""

    def __init__(
        self,
        partitions: int,
        *,
        events_max: int = 10_000,
        event_bytes_max: int = 262_144,
        frame_bytes_max: int = FRAME_BYTES_MAX,
    ) -> None:
        self._partition_of = _Partitions(partitions)
        self.events_max = events_max
        self._event_bytes_max = event_bytes_max
        self._frame_bytes_max = frame_bytes_max

    @property
    def event_bytes_max(self) -> int:
        return self._event_bytes_max

    def route(
        self,
        body: bytes,
        stamp: Stamp,
        *,
        field: str = DEVICE_FIELD,
        device: str | None = None,
        allows: Allows | None = None,
    ) -> Routed:
        """Split NDJSON. `device` is the one in the path, if there is one; events of devices that `allows` denies are rejected.

        Raises EmptyBatch and BatchTooLarge (more than `events_max` events); what is wrong with one event is in the result.
        """
        try:
            return self._fast(body, stamp, field, device, allows)
        except _NotSure:
            return self._slow(body, stamp, field, device, allows)

    def _fast(self, body: bytes, stamp: Stamp, field: str, device: str | None, allows: Allows | None = None) -> Routed:
        if not body.endswith(b"\n"):
            body += b"\n"
        occurrences = _count(body, b'"%b"' % field.encode())
        # Where there is no backslash at all, no key is escaped. (Half a surrogate pair is no JSON for the decoder.)
        if occurrences > self.events_max or (b"\\" in body and _SUSPICIOUS.search(body)):
            raise _NotSure
        closing = stamp.closing
        try:
            body.isascii() or body.decode()
            if occurrences == 1 and device is None and allows is None and body.find(b"\n") == len(body) - 1:
                return self._fast_one(body, closing, _decoder(field, bool(stamp.properties)))
            if occurrences:
                groups = self._fast_by_device(
                    body, occurrences, _decoder(field, bool(stamp.properties)), device, allows
                )
            elif device is not None and allows is not None and not allows(device):
                raise _NotSure
            else:
                groups = self._fast_path_device(body, _decoder("", bool(stamp.properties)), device)
                closing = b"," + stamp.device + stamp.bare
        except (IndexError, ValueError, msgspec.DecodeError, RecursionError):
            raise _NotSure from None
        cut: list[Group] = []
        count = size = 0
        for partition, pieces in groups:
            if not pieces:
                continue
            made = self._groups(partition, pieces, closing)
            made_bytes = sum([len(group.content) for group in made])
            if made_bytes > self._event_bytes_max and max(map(len, pieces)) >= self._event_bytes_max:
                raise _NotSure
            count += len(pieces)
            size += made_bytes
            cut.extend(made)
        if not _adds_up(size, body, count, closing):
            raise _NotSure
        return Routed(tuple(cut), count, size)

    def _fast_one(self, body: bytes, closing: bytes, decoder: msgspec.json.Decoder[Any]) -> Routed:
        """One line. What many need is half of the work for one."""
        partition = self._partition_of[decoder.decode(body).device]
        content = body.removesuffix(_CLOSING) + closing
        if body[0] != _OPENING or len(content) > self._event_bytes_max or not _adds_up(len(content), body, 1, closing):
            raise _NotSure
        return Routed((Group(partition, 1, content),), 1, len(content))

    def _fast_by_device(
        self, body: bytes, count: int, decoder: msgspec.json.Decoder[Any], device: str | None, allows: Allows | None
    ) -> Iterable[tuple[int, list[bytes]]]:
        """The lines without their closing, by partition; of some partitions there may be none."""
        events = decoder.decode_lines(body)
        if len(events) != count or (device is not None and {event.device for event in events} != {device}):
            raise _NotSure
        if allows is not None and not all(map(allows, set(map(_DEVICE_OF, events)))):
            raise _NotSure
        every = self._partition_of.partitions
        groups: list[list[bytes]] | defaultdict[int, list[bytes]]
        groups = [[] for _ in range(every)] if count >= every else defaultdict(list)
        partitions = self._partition_of.of_all(map(_DEVICE_OF, events))
        # No list of lines: each takes the place in memory, and so in the processor's cache, of the one before.
        for partition, line in zip(partitions, BytesIO(body), strict=True):
            if line[0] != _OPENING:
                raise _NotSure
            groups[partition].append(line.removesuffix(_CLOSING))
        return sorted(groups.items()) if isinstance(groups, dict) else enumerate(groups)

    def _fast_path_device(
        self, body: bytes, decoder: msgspec.json.Decoder[Any], device: str | None
    ) -> Iterable[tuple[int, list[bytes]]]:
        """No event names its device: all are of the path's. There may be more of them than there is memory for, in lines or in one line."""
        lines = list(islice(BytesIO(body), self.events_max + 1))
        pieces = [line.removesuffix(_CLOSING) for line in lines]
        if device is None or len(lines) > self.events_max or any(piece.rstrip()[-1:] == b"{" for piece in pieces):
            raise _NotSure
        for line in lines:
            decoder.decode(line)
        return [(self._partition_of[device], pieces)]

    def _groups(self, partition: int, pieces: Sequence[bytes], closing: bytes) -> tuple[Group, ...]:
        """The pieces (lines without their closing) of a partition as groups that fit a frame."""
        content = closing.join((*pieces, b""))
        if len(content) <= self._frame_bytes_max or len(pieces) == 1:
            return (Group(partition, len(pieces), content),)
        cut: list[Group] = []
        begin = size = 0
        for index, piece in enumerate(pieces):
            line = len(piece) + len(closing)
            if size and size + line > self._frame_bytes_max:
                cut.append(Group(partition, index - begin, closing.join(pieces[begin:index]) + closing))
                begin, size = index, 0
            size += line
        cut.append(Group(partition, len(pieces) - begin, closing.join(pieces[begin:]) + closing))
        return tuple(cut)

    def _slow(self, body: bytes, stamp: Stamp, field: str, device: str | None, allows: Allows | None = None) -> Routed:
        rejected: list[Rejected] = []
        groups: defaultdict[int, list[bytes]] = defaultdict(list)
        judge = _Judge(field, device, self._event_bytes_max, bool(stamp.properties), allows)
        index = -1
        for index, line in enumerate(_lines(body)):
            if index >= self.events_max:
                raise BatchTooLarge(
                    f"The batch holds more than {self.events_max} events; nothing was stored. Split it and send the parts.",
                    limit_events=self.events_max,
                )
            try:
                found = judge(line)
                piece = line[:-1]
                if found is None:
                    piece = (piece if piece.rstrip()[-1:] == b"{" else piece + b",") + stamp.device[:-1]
                groups[self._partition_of[found or device or ""]].append(piece)
            except _Reject as reject:
                rejected.append(Rejected(index, reject.code, reject.detail))
        if index < 0:
            raise EmptyBatch("The body holds no event. Nothing was stored.")
        cut: list[Group] = []
        for partition, group in sorted(groups.items()):
            cut.extend(self._groups(partition, group, stamp.closing))
        size = sum([len(group.content) for group in cut])
        return Routed(tuple(cut), index + 1 - len(rejected), size, tuple(rejected))


def _adds_up(size: int, body: bytes, count: int, closing: bytes) -> bool:
    """Whether every line lost `_CLOSING` when it got ours: one that does not end in it lost nothing, so the whole is longer."""
    return size == len(body) + count * (len(closing) - len(_CLOSING))


def _count(body: bytes, needle: bytes) -> int:
    """`body.count(needle)`, in parts: from 30,000 bytes on CPython takes a search that suits short needles less."""
    if len(body) <= _SEARCHED:
        return body.count(needle)
    return sum([body.count(needle, at, at + _SEARCHED + len(needle) - 1) for at in range(0, len(body), _SEARCHED)])


@lru_cache(maxsize=64)
def _decoder(field: str, has_properties: bool) -> msgspec.json.Decoder[Any]:
    """A decoder to one attribute `device`, or none without `field`, that checks the rest and fails where a reserved field stands."""
    reserved = [(RESERVED, msgspec.UnsetType, msgspec.UNSET), (PROPERTIES, msgspec.UnsetType, msgspec.UNSET)]
    fields: list[Any] = [("device", Annotated[str, msgspec.Meta(max_length=DEVICE_BYTES_MAX)])] if field else []
    fields += reserved if has_properties else reserved[:1]
    return msgspec.json.Decoder(msgspec.defstruct("Line", fields, rename={"device": field}, gc=False))


def _lines(body: bytes) -> Iterator[bytes]:
    """The lines that are not blank, without the white space behind them. One at a time: a body of short lines is a bomb."""
    end = 0
    for rest in _REST_OF_LINE.finditer(body):
        begin = max(end, body.rfind(b"\n", end, rest.start()) + 1)
        end = rest.end()
        yield body[begin:end].rstrip(b" \t\r")


class _Reject(Exception):
    def __init__(self, code: str, detail: str) -> None:
        super().__init__(code)
        self.code = code
        self.detail = detail


class _Judge:
    """Looks at one line and returns its device, None when it names none and need not, or raises _Reject."""

    def __init__(
        self, field: str, device: str | None, event_bytes_max: int, has_properties: bool, allows: Allows | None
    ) -> None:
        self._field = field
        self._quoted = b'"%b"' % field.encode()
        self._device = device
        self._allows = allows
        self._event_bytes_max = event_bytes_max
        self._reserved = (RESERVED, PROPERTIES) if has_properties else (RESERVED,)

    def __call__(self, line: bytes) -> str | None:
        if len(line) > self._event_bytes_max:
            raise _Reject("event_too_large", f"The event has {len(line)} bytes, the limit is {self._event_bytes_max}.")
        try:
            line.isascii() or line.decode()
        except UnicodeDecodeError as error:
            raise _Reject("not_utf8", f"The event is not UTF-8 at byte {error.start}.") from None
        try:
            _RAW.decode(line)
        except msgspec.DecodeError as error:
            raise _Reject("not_json", f"The event is not JSON: {error}.") from None
        except RecursionError:
            raise _Reject("not_json", "The event is nested too deeply.") from None
        if line.lstrip(b" \t\r")[:1] != b"{":
            raise _Reject("not_an_object", "The event is not a JSON object.")
        fields = _FIELDS.decode(line)
        for name in self._reserved:
            if name in fields:
                raise _Reject("reserved_field", f"The field {name!r} is the server's; rename it.")
        device = self._find_device(line, fields)
        if self._allows is not None and not self._allows(device or self._device or ""):
            raise _Reject("forbidden_device", "The key is not for this device.")
        return device

    def _find_device(self, line: bytes, fields: dict[str, msgspec.Raw]) -> str | None:
        raw = fields.get(self._field)
        if raw is None:
            if self._device is None:
                raise _Reject("no_device", f"The event has no field {self._field!r}.")
            if not is_device(self._device):
                raise _Reject("bad_device", "The device in the path is not a device id.")
            return None
        if line.count(self._quoted) != 1 or b"\\u" in line:
            times = sum(name == self._field for name, _ in fields_of(line))
            if times != 1:
                raise _Reject("bad_device", f"The field {self._field!r} stands {times} times in the event.")
        try:
            device = msgspec.json.decode(raw, type=str)
        except msgspec.DecodeError:
            raise _Reject("bad_device", f"The field {self._field!r} is not a string.") from None
        if not is_device(device):
            raise _Reject("bad_device", f"The field {self._field!r} is not a device id.")
        if self._device is not None and device != self._device:
            raise _Reject("bad_device", f"The field {self._field!r} names another device than the path.")
        return device


Split = Callable[[bytes, Stamp], Routed]
