"""Events sent as to Azure Event Hubs' REST API (docs/event-hubs.md): other paths and bodies for the same intake.

    POST /{hub}/messages    /{hub}/partitions/{n}/messages    /{hub}/publishers/{device}/messages

The formats are those of https://learn.microsoft.com/rest/api/eventhub/ (send event, send batch events, send partition event, send event
with publisher ID). There an event is any text, and its partition may be any; here it is a JSON object of a device, and a device has one
partition. So text becomes an object with a field `body`, and who names no device gets one that lies where he sends.
"""

from __future__ import annotations

import base64
import functools
import itertools
from collections.abc import Callable, Iterator, Mapping
from zlib import crc32

import msgspec

from penstock.errors import BadHeader, EmptyBatch, MalformedBody, NotFound
from penstock.server import eventhubs_told as told
from penstock.server.framing import Framed, Intake, Posted
from penstock.server.message import Reply, Request, Response
from penstock.server.openapi import Operation
from penstock.wire.body import ndjson, one_line, too_many
from penstock.wire.route import DEVICE_BYTES_MAX, PROPERTIES, Rejected, is_device

BATCH = "application/vnd.microsoft.servicebus.json"
NO_HUBS = frozenset((b"", b"v1", b"health", b"docs", b"openapi.json", b"metrics"))
"""First segments of paths that are no hub's name: the API's own."""

_CREATED = Response(201, b"", b"application/xml; charset=utf-8")
_PROPERTY = b"penstock-property-"
# What clients and proxies send beside the user's own properties.
_NO_PROPERTIES = frozenset(
    b"age authorization baggage brokerproperties cache-control connection cookie date dnt expect forwarded from host "
    b"http2-settings idempotency-key keep-alive max-forwards origin pragma prefer priority range referer te traceparent tracestate "
    b"trailer transfer-encoding upgrade upgrade-insecure-requests user-agent via warning x-amzn-trace-id x-cloud-trace-context "
    b"x-correlation-id x-real-ip x-request-id".split()
)
_NO_PROPERTY_PREFIXES = (b"accept", b"content-", b"if-", b"penstock-", b"proxy-", b"sec-", b"x-forwarded-", b"x-ms-")
_BLANK = b" \t\r\n"
_JSON = (b"{", b"[", b"\xef\xbb\xbf")  # a byte order mark is no JSON, and nobody's text
_PLACE = b"{}\n"  # of an event that is rejected: the others keep their index
_FIELDS = msgspec.json.Decoder(dict[str, msgspec.Raw])
_NULL = msgspec.Raw(b"null")

Names = tuple[str, ...]
Action = Callable[[Request, Names, Reply], None]


class _Broker(msgspec.Struct, rename="pascal", gc=False):
    """What counts here of BrokerProperties."""

    partition_key: str | None = None


class _Message(msgspec.Struct, rename="pascal", gc=False):
    """An element of a batch."""

    body: str
    is_body_base64: bool = False
    broker_properties: _Broker | None = None
    user_properties: msgspec.Raw = _NULL


_BROKER = msgspec.json.Decoder(_Broker)
_MESSAGE = msgspec.json.Decoder(_Message)


class EventHubs:
    """The paths of the REST API over an intake."""

    def __init__(self, intake: Intake) -> None:
        self._intake = intake
        self._turns = itertools.count()  # taken by the loop's thread and the executor's: next() is atomic

    def paths(self) -> Iterator[tuple[bytes, Action, Operation]]:
        """Each with its action and what is told of it. The documentation's own example of a publisher writes it in the singular."""
        yield b"/{hub}/messages", lambda request, _, reply: self._post(request, None, None, reply), told.SEND
        yield (
            b"/{hub}/partitions/{n}/messages",
            lambda request, names, reply: self._post(request, None, names[1], reply),
            told.SEND_TO_PARTITION,
        )
        for publishers, about in ((b"publishers", told.SEND_AS_PUBLISHER), (b"publisher", told.SEND_AS_ONE)):
            path = b"/{hub}/%b/{device}/messages" % publishers
            yield path, lambda request, names, reply: self._post(request, names[1], None, reply), about

    def _post(self, request: Request, device: str | None, partition: str | None, reply: Reply) -> None:
        def answered(response: Response) -> None:
            reply(_CREATED if response.status == 200 else response)

        content_type = request.headers.get(b"content-type", b"").decode("latin-1")
        if content_type.partition(";")[0].strip().lower() == BATCH:
            self._intake.post(request, device, answered, functools.partial(self._batch, partition))
        else:
            self._intake.post(_with_properties(request), device, answered, functools.partial(self._single, partition))

    def _single(self, partition: str | None, posted: Posted) -> Framed:
        if not posted.body.strip(_BLANK):
            raise EmptyBatch("The body is empty. Nothing was stored.")
        writer = _Writer(posted, partition, self._turns)
        key = _partition_key(posted.headers)
        try:
            line, fields = _object(posted.body, posted.event_bytes_max)
            device = writer.device(fields, key)
        except _Reject as reject:
            return Framed(_PLACE, posted.field, posted.device, True, (reject.at(0),))
        return Framed(line + b"\n", posted.field, device if posted.device is None else posted.device, True)

    def _batch(self, partition: str | None, posted: Posted) -> Framed:
        elements = ndjson(posted.body, "application/json", events_max=posted.events_max)
        if elements.count(b"\n") > posted.events_max:
            raise too_many(posted.events_max)
        writer = _Writer(posted, partition, self._turns)
        lines: list[bytes] = []
        rejected: list[Rejected] = []
        for index, element in enumerate(elements.split(b"\n")[:-1]):
            message = _message(index, element)
            try:
                lines.append(writer.line(message, _body(index, message)) + b"\n")
            except _Reject as reject:
                rejected.append(reject.at(index))
                lines.append(_PLACE)
        return Framed(b"".join(lines), posted.field, posted.device, True, tuple(rejected))


class _Reject(Exception):
    def __init__(self, code: str, detail: str) -> None:
        super().__init__(code)
        self._code = code
        self._detail = detail

    def at(self, index: int) -> Rejected:
        return Rejected(index, self._code, self._detail)


class _Writer:
    """Of the events of one request. Raises NotFound for a partition that there is not, _Reject for an event."""

    def __init__(self, posted: Posted, partition: str | None, turns: Iterator[int]) -> None:
        self._posted = posted
        self._partition = None if partition is None else _number(partition, posted.partitions)
        self._turns = turns

    def line(self, message: _Message, body: bytes) -> bytes:
        """An element of a batch, with its device and the user's properties."""
        line, fields = _object(body, self._posted.event_bytes_max)
        broker = message.broker_properties
        device = self.device(fields, broker.partition_key if broker else None)
        if device is not None:
            line = _with(line, self._posted.field, b'"%b"' % device.encode())
        properties = bytes(message.user_properties)
        if properties != b"null":
            if PROPERTIES in fields:
                raise _Reject(
                    "reserved_field", f"UserProperties become the field {PROPERTIES!r}, which the event has already."
                )
            line = _with(line, PROPERTIES, properties)
        return line

    def device(self, fields: Mapping[str, msgspec.Raw], key: str | None) -> str | None:
        """What an event is to get as its device; None if it has one, or the path has. `key` is its PartitionKey."""
        posted = self._posted
        if posted.device is not None:
            return None
        named = fields.get(posted.field)
        if named is not None:
            self._check(named)
            return None
        if not key:
            return self._unnamed
        if not is_device(key):
            raise _Reject(
                "bad_device", f"The event has no field {posted.field!r}, and its PartitionKey is not a device id."
            )
        self._check_device(key)
        return key

    @functools.cached_property
    def _unnamed(self) -> str:
        partitions = self._posted.partitions
        return unnamed(next(self._turns) % partitions if self._partition is None else self._partition, partitions)

    def _check(self, named: msgspec.Raw) -> None:
        if self._partition is not None:
            try:
                self._check_device(msgspec.json.decode(named, type=str))
            except msgspec.DecodeError:  # no device at all: so says the intake
                return

    def _check_device(self, device: str) -> None:
        lies_in = crc32(device.encode()) % self._posted.partitions
        if self._partition not in (None, lies_in):
            raise _Reject(
                "bad_device",
                f"The device {device[:DEVICE_BYTES_MAX]!r} lies in partition {lies_in}, and not in {self._partition}: a device is "
                "always in the same one. Send it there, or to a path without a partition.",
            )


@functools.lru_cache(maxsize=4096)
def unnamed(partition: int, partitions: int) -> str:
    """The device of events that name none: the first of `unnamed-0`, `unnamed-1` … that lies in this partition."""
    names = (f"unnamed-{number}" for number in itertools.count())
    return next(name for name in names if crc32(name.encode()) % partitions == partition)


def _object(body: bytes, bytes_max: int) -> tuple[bytes, Mapping[str, msgspec.Raw]]:
    """An event in one line, and its fields. What does not look like JSON is text, and becomes the field `body` of an object."""
    text = body.strip(_BLANK)
    if len(text) > bytes_max:
        raise _Reject("event_too_large", f"The event has {len(text)} bytes, the limit is {bytes_max}.")
    try:
        decoded = body.decode()
        if not text.startswith(_JSON):
            return msgspec.json.encode({"body": decoded}), {}
        fields = _FIELDS.decode(text)
    except UnicodeDecodeError as error:
        raise _Reject("not_utf8", f"The event is not UTF-8 at byte {error.start}.") from None
    except msgspec.ValidationError:
        raise _Reject("not_an_object", "The event is not a JSON object.") from None
    except msgspec.DecodeError as error:
        raise _Reject("not_json", f"The event is not JSON: {error}.") from None
    except RecursionError:
        raise _Reject("not_json", "The event is nested too deeply.") from None
    return one_line(text), fields


def _with(line: bytes, name: str, value: bytes) -> bytes:
    """The object with one more field."""
    begin = line[:-1].rstrip()
    return b'%b%b"%b":%b}' % (begin, b"" if begin == b"{" else b",", name.encode(), value)


def _message(index: int, element: bytes) -> _Message:
    try:
        message = _MESSAGE.decode(element)
    except (msgspec.DecodeError, RecursionError) as error:
        raise _malformed(index, str(error)) from error
    if bytes(message.user_properties)[:1] not in (b"{", b"n"):
        raise _malformed(index, "UserProperties is no object")
    return message


def _body(index: int, message: _Message) -> bytes:
    """The event's own bytes."""
    if not message.is_body_base64:
        return message.body.encode()
    try:
        return base64.b64decode(message.body, validate=True)
    except ValueError as error:  # a letter beyond ASCII too
        raise _malformed(index, "Body is not base64") from error


def _malformed(index: int, why: str) -> MalformedBody:
    return MalformedBody(f'Element {index} is not `{{"Body": "…", …}}`: {why}. Nothing was stored.')


def _partition_key(headers: Mapping[bytes, bytes]) -> str | None:
    try:
        return _BROKER.decode(headers.get(b"brokerproperties", b"{}")).partition_key
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BadHeader(f"BrokerProperties is not a JSON object: {error}.", header="brokerproperties") from error


def _with_properties(request: Request) -> Request:
    """The request with the user's own headers as event properties."""
    own = {
        _PROPERTY + name: value
        for name, value in request.headers.items()
        if name not in _NO_PROPERTIES and not name.startswith(_NO_PROPERTY_PREFIXES)
    }
    if not own:
        return request
    given = Request(
        request.method, request.path, request.query, own | request.headers, request.body, request.keep_alive
    )
    given.grant, given.peer, given.line = request.grant, request.peer, request.line
    return given


def _number(partition: str, partitions: int) -> int:
    if not (partition.isascii() and partition.isdigit() and len(partition) < 20 and int(partition) < partitions):
        raise NotFound(f"There is no such partition; they are numbered 0 to {partitions - 1}.")
    return int(partition)
