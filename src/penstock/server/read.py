"""What the GET requests answer. Everything here may block and runs in a thread of its own, never on the event loop."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Protocol
from urllib.parse import parse_qsl

import msgspec
from msgspec.structs import replace

from penstock.clock import parse_timestamp, timestamp
from penstock.errors import BadHeader, BadParameter, NotFound
from penstock.events import Slice
from penstock.hub import WholeHub
from penstock.server.answers import Cut, Forgotten, Health, Partition, Partitions, Place
from penstock.server.message import Request, Response, Right
from penstock.wire import frame

FRAMES = b"application/vnd.penstock.frames"
NDJSON = b"application/x-ndjson"

_EVENTS_DEFAULT = 1_000
_EVENTS_MAX = 10_000
_ANSWER_BYTES_MAX = 4 << 20
_READ_BYTES_MAX = 256 << 10
_GROUP = re.compile(r"(\$?[A-Za-z0-9][A-Za-z0-9._-]{0,63}) *; *epoch=([0-9]{1,18}) *; *checkpoint=([0-9]{1,18})")

Names = tuple[str, ...]


class Groups(Protocol):
    """What the hub knows of those who read here (penstock.hub.groups)."""

    def heard(self, group: str, partition: int, epoch: int, checkpoint: int) -> None:
        """To be called before the group is given anything. Raises ReaderFenced, OffsetBeyondEnd."""
        ...

    def forget(self, group: str) -> bool:
        """True if it was known."""
        ...


def json(body: object) -> Response:
    return Response(200, msgspec.json.encode(body))


class Reads:
    """The readable side of a hub and of the installation around it.

    `status` reports on the installation (`ok` among its members), `producer` on one producer (that sends with keys of this name, if one is
    given) or None, both as what JSON can be made of; `check` raises NotConfirmed while batches cannot be stored here.
    """

    def __init__(
        self,
        hub: WholeHub,
        *,
        groups: Groups,
        status: Callable[[], object],
        producer: Callable[[str, str], object | None],
        check: Callable[[], None],
    ) -> None:
        self._hub = hub
        self._groups = groups
        self._ours = ((b"Penstock-Hub", hub.id.encode()),)
        self._status = status
        self._producer = producer
        self._check = check

    def status(self, _request: Request, _names: Names) -> Response:
        return json(self._status())

    def ready(self, _request: Request, _names: Names) -> Response:
        self._check()
        return json(Health(True))

    def producer(self, request: Request, names: Names) -> Response:
        # Who may only send hears of his own alone.
        found = self._producer(names[0], "" if Right.LISTEN & request.grant.rights else request.grant.name)
        if found is None:
            raise NotFound("No producer of this id has sent a batch within the time that the hub remembers.")
        return json(found)

    def partitions(self, _request: Request, _names: Names) -> Response:
        every = [self._bounds(number) for number in range(self._hub.partitions())]
        return self._json(Partitions(self._hub.id, self._hub.period_s, every, self._hub.place_bits))

    def partition(self, request: Request, names: Names) -> Response:
        number = self._number(names[0])
        self._note(request, number)
        return self._json(self._bounds(number))

    def offset(self, request: Request, names: Names) -> Response:
        """Where the first frame or marker lies that was enqueued at or after `at`."""
        partition = self._number(names[0])
        try:
            at_ms = parse_timestamp(_query(request).get("at", ""))
        except ValueError as error:
            raise BadParameter(
                "The parameter `at` is a time as in 2026-11-22T14:03:21.123Z; a `+` in it is written %2B.",
                parameter="at",
            ) from error
        return self._json(Place(partition, self._hub.locate(partition, at_ms)))

    def cut(self, _request: Request, _names: Names) -> Response:
        return json(Cut(self._hub.cut(), self._hub.place_bits))

    def forget(self, _request: Request, names: Names) -> Response:
        if not self._groups.forget(names[0]):
            raise NotFound("No group of this name has read here within the retention.")
        return json(Forgotten(names[0]))

    def events(self, request: Request, names: Names) -> Response:
        """Events from `from` on as NDJSON, or whole frames; `Penstock-Next-Offset` is where the next request goes on.

        `limit` bounds the events; of frames `bytes` may bound the bytes instead, and then the answer is one read of the hub.
        """
        partition = self._number(names[0])
        self._note(request, partition)
        query = _query(request)
        offset = self._offset(partition, query.get("from", "start"))
        limit = _most(query, "limit", _EVENTS_DEFAULT, _EVENTS_MAX)
        if FRAMES not in request.headers.get(b"accept", b"").lower():
            return self._lines(partition, offset, limit)
        if "bytes" in query:
            bytes_max = _most(query, "bytes", _ANSWER_BYTES_MAX, _ANSWER_BYTES_MAX)
            read = self._hub.read(partition, offset, bytes_max=bytes_max)
            return self._events(FRAMES, b"".join(map(frame.encode, read.frames)), read.next_offset, read)
        return self._frames(partition, offset, limit)

    def _note(self, request: Request, partition: int) -> None:
        """Who reads and how far it is, before it is given anything."""
        given = request.headers.get(b"penstock-group")
        if given is None:
            return
        match = _GROUP.fullmatch(given.decode("latin-1"))
        if match is None:
            raise BadHeader(
                "The header Penstock-Group is `NAME;epoch=N;checkpoint=N`; a name is at most 64 of A-Z a-z 0-9 . _ -."
            )
        self._groups.heard(match[1], partition, int(match[2]), int(match[3]))

    def _lines(self, partition: int, offset: str, limit: int) -> Response:
        lines: list[bytes] = []
        size = 0
        while True:
            read = self._hub.read(partition, offset, bytes_max=_READ_BYTES_MAX)
            for event in frame.events(read):
                if len(lines) == limit or (lines and size + len(event.body) >= _ANSWER_BYTES_MAX):
                    return self._events(NDJSON, b"".join(lines), event.offset, read)
                lines.append(event.body + b"\n")
                size += len(lines[-1])
            if read.next_offset in (offset, read.end_offset):
                return self._events(NDJSON, b"".join(lines), read.next_offset, read)
            offset = read.next_offset

    def _frames(self, partition: int, offset: str, limit: int) -> Response:
        """Frames are not torn: the answer ends with the first read that reaches the limit."""
        parts: list[bytes] = []
        size = count = 0
        while True:
            read = self._hub.read(partition, offset, bytes_max=_READ_BYTES_MAX)
            for each in read.frames:
                parts.append(frame.encode(each))
                size += len(parts[-1])
                count += each.count
            ended = read.next_offset in (offset, read.end_offset)
            if ended or count >= limit or size >= _ANSWER_BYTES_MAX:
                return self._events(FRAMES, b"".join(parts), read.next_offset, read)
            offset = read.next_offset

    def _events(self, content_type: bytes, body: bytes, next_offset: str, read: Slice) -> Response:
        offsets = (
            (b"Penstock-Next-Offset", next_offset.encode()),
            (b"Penstock-End-Offset", read.end_offset.encode()),
        )
        return Response(200, body, content_type, (*self._ours, *offsets))

    def _json(self, body: object) -> Response:
        return replace(json(body), headers=self._ours)

    def _bounds(self, number: int) -> Partition:
        bounds = self._hub.bounds(number)
        return Partition(
            number,
            bounds.first,
            bounds.next,
            bounds.bytes,
            timestamp(bounds.enqueued_first_ms) if bounds.enqueued_first_ms else None,
            timestamp(bounds.enqueued_last_ms) if bounds.enqueued_last_ms else None,
        )

    def _number(self, text: str) -> int:
        most = self._hub.partitions()
        number = _whole(text)
        if number is None or number >= most:
            raise NotFound(f"There is no such partition; they are numbered 0 to {most - 1}.")
        return number

    def _offset(self, partition: int, start: str) -> str:
        if start == "start":
            return str(self._hub.bounds(partition).first >> self._hub.place_bits)
        if start == "end":
            return str(self._hub.bounds(partition).next >> self._hub.place_bits)
        number = _whole(start)
        if number is None:
            raise BadParameter("The parameter `from` is a sequence number, `start` or `end`.", parameter="from")
        return str(number)


def _query(request: Request) -> Mapping[str, str]:
    return dict(parse_qsl(request.query.decode("latin-1"), keep_blank_values=True))


def _most(query: Mapping[str, str], name: str, default: int, most: int) -> int:
    number = _whole(query.get(name, str(default)))
    if number is None or not 1 <= number <= most:
        raise BadParameter(f"The parameter `{name}` is a number from 1 to {most}.", parameter=name)
    return number


def _whole(text: str) -> int | None:
    return int(text) if text.isascii() and text.isdigit() and len(text) < 20 else None
