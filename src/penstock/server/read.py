"""What the GET requests answer. Everything here may block and runs in a thread of its own, never on the event loop."""

from __future__ import annotations

from collections.abc import Callable
from urllib.parse import parse_qsl

import msgspec

from penstock.clock import timestamp
from penstock.errors import BadParameter, NotFound
from penstock.events import Slice
from penstock.hub import Hub
from penstock.server.message import Request, Response
from penstock.wire import frame

FRAMES = b"application/vnd.penstock.frames"
NDJSON = b"application/x-ndjson"

_EVENTS_DEFAULT = 1_000
_EVENTS_MAX = 10_000
_ANSWER_BYTES_MAX = 4 << 20
_READ_BYTES_MAX = 256 << 10

Names = tuple[str, ...]


def json(body: object) -> Response:
    return Response(200, msgspec.json.encode(body))


class Reads:
    """The readable side of a hub and of the installation around it.

    `status` reports on the installation (`ok` among its members), `producer` on one producer or None, both as what JSON
    can be made of; `check` raises NotConfirmed while batches cannot be stored here.
    """

    def __init__(
        self,
        hub: Hub,
        *,
        status: Callable[[], object],
        producer: Callable[[str], object | None],
        check: Callable[[], None],
    ) -> None:
        self._hub = hub
        self._status = status
        self._producer = producer
        self._check = check

    def status(self, _request: Request, _names: Names) -> Response:
        return json(self._status())

    def ready(self, _request: Request, _names: Names) -> Response:
        self._check()
        return json({"ok": True})

    def producer(self, _request: Request, names: Names) -> Response:
        found = self._producer(names[0])
        if found is None:
            raise NotFound("No producer of this id has sent a batch within the time that the hub remembers.")
        return json(found)

    def partitions(self, _request: Request, _names: Names) -> Response:
        every = [self._bounds(number) for number in range(self._hub.partitions())]
        return json({"hub": self._hub.id, "period_s": self._hub.period_s, "partitions": every})

    def partition(self, _request: Request, names: Names) -> Response:
        return json(self._bounds(self._number(names[0])))

    def cut(self, _request: Request, _names: Names) -> Response:
        return json({"next": list(self._hub.cut())})

    def events(self, request: Request, names: Names) -> Response:
        """Events from `from` on as NDJSON, or whole frames; `Penstock-Next-Offset` is where the next request goes on."""
        partition = self._number(names[0])
        query = dict(parse_qsl(request.query.decode("latin-1"), keep_blank_values=True))
        offset = self._offset(partition, query.get("from", "start"))
        limit = _limit(query.get("limit", str(_EVENTS_DEFAULT)))
        if FRAMES in request.headers.get(b"accept", b"").lower():
            return self._frames(partition, offset, limit)
        return self._lines(partition, offset, limit)

    def _lines(self, partition: int, offset: str, limit: int) -> Response:
        lines: list[bytes] = []
        size = 0
        while True:
            read = self._hub.read(partition, offset, bytes_max=_READ_BYTES_MAX)
            for event in frame.events(read):
                if len(lines) == limit or (lines and size + len(event.body) >= _ANSWER_BYTES_MAX):
                    return _events(NDJSON, b"".join(lines), event.offset, read)
                lines.append(event.body + b"\n")
                size += len(lines[-1])
            if read.next_offset in (offset, read.end_offset):
                return _events(NDJSON, b"".join(lines), read.next_offset, read)
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
                return _events(FRAMES, b"".join(parts), read.next_offset, read)
            offset = read.next_offset

    def _bounds(self, partition: int) -> dict[str, object]:
        bounds = self._hub.bounds(partition)
        return {
            "partition": partition,
            "first": bounds.first,
            "next": bounds.next,
            "bytes": bounds.bytes,
            "enqueued_first": timestamp(bounds.enqueued_first_ms) if bounds.enqueued_first_ms else None,
            "enqueued_last": timestamp(bounds.enqueued_last_ms) if bounds.enqueued_last_ms else None,
        }

    def _number(self, text: str) -> int:
        most = self._hub.partitions()
        number = _whole(text)
        if number is None or number >= most:
            raise NotFound(f"There is no such partition; they are numbered 0 to {most - 1}.")
        return number

    def _offset(self, partition: int, start: str) -> str:
        if start == "start":
            return str(self._hub.bounds(partition).first)
        if start == "end":
            return str(self._hub.bounds(partition).next)
        number = _whole(start)
        if number is None:
            raise BadParameter("The parameter `from` is a sequence number, `start` or `end`.", parameter="from")
        return str(number)


def _limit(text: str) -> int:
    limit = _whole(text)
    if limit is None or not 1 <= limit <= _EVENTS_MAX:
        raise BadParameter(f"The parameter `limit` is a number from 1 to {_EVENTS_MAX}.", parameter="limit")
    return limit


def _whole(text: str) -> int | None:
    return int(text) if text.isascii() and text.isdigit() and len(text) < 20 else None


def _events(content_type: bytes, body: bytes, next_offset: str, read: Slice) -> Response:
    headers = (
        (b"Penstock-Next-Offset", next_offset.encode()),
        (b"Penstock-End-Offset", read.end_offset.encode()),
    )
    return Response(200, body, content_type, headers)
