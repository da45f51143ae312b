"""What is told of each route in /openapi.json and /docs, and of the pages themselves."""

from __future__ import annotations

from typing import Any, Final

import msgspec

from penstock.errors import (
    BadParameter,
    BatchTooLarge,
    BodyMismatch,
    EmptyBatch,
    ForbiddenDevice,
    FrameDamaged,
    HubBroken,
    HubUnavailable,
    MalformedBody,
    MalformedGzip,
    NotFound,
    NoValidEvent,
    NumberReused,
    NumberTooOld,
    OffsetBeyondEnd,
    OffsetTrimmed,
    ProducerFenced,
    ReaderFenced,
    StorageFull,
    ThroughputExceeded,
    UnsupportedEncoding,
    UnsupportedType,
)
from penstock.server.answers import (
    Cut,
    Forgotten,
    Health,
    KeptBatch,
    Partition,
    Partitions,
    Place,
    Producer,
    Range,
    Stored,
)
from penstock.server.openapi import Body, Header, Operation, Parameter, Schema
from penstock.server.parts import PartState
from penstock.server.quota import LIMITS
from penstock.server.status import GroupStatus, PartitionStatus, RetentionStatus, Status, Storage, Totals
from penstock.server.units import UNITS_MOST, Throughput

_JSON, _NDJSON, _FRAMES = "application/json", "application/x-ndjson", "application/vnd.penstock.frames"
_CLOUDEVENTS: Final = "application/cloudevents-batch+json"
_DEVICE_ID: Final = "^[A-Za-z0-9][A-Za-z0-9._:@-]{0,127}$"
_AT: Final = "2026-11-22T14:03:21.123Z"
_SHA256: Final = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"

_TEXT: Final[Schema] = {"type": "string"}
_OFFSET: Final[Schema] = {"type": "string", "pattern": "^[0-9]{1,19}$"}
_EVENT: Final[Schema] = {
    "type": "object",
    "description": "One event; it is kept as the bytes it came in. `deviceId` may have another name (`Penstock-Device-Field`). "
    "`receivedAt` is the server's.",
    "properties": {"deviceId": {"type": "string", "pattern": _DEVICE_ID}, "receivedAt": False},
    "required": ["deviceId"],
}
_EVENT_OF_DEVICE: Final[Schema] = {
    "type": "object",
    "description": "One event of the path's device, which it need not name; if it does, it must be that one.",
    "properties": {"receivedAt": False},
}
_CLOUD_EVENT: Final[Schema] = {
    "type": "object",
    "description": "A CloudEvent, kept as the bytes it came in. Its device is the first of `deviceId`, `deviceid`, `subject` and `source` "
    "that the first event of the batch has.",
    "properties": {
        "specversion": {"const": "1.0"},
        "deviceId": {"type": "string", "pattern": _DEVICE_ID},
        "receivedAt": False,
    },
    "required": ["specversion", "id", "source", "type", "deviceId"],
}
_LINE: Final = {"deviceId": "d-1", "temperature": 21.4}

_BATCH: Final = (
    Parameter(
        "Penstock-Producer",
        "header",
        "Makes the batch retry-safe: `<id>;epoch=<n>;sequence=<n>;after=<n>;sha256=<hex>`. The same number with the same bytes is "
        "stored once, however often it is sent. `sha256` is of the body as sent; `after`, the last that was answered, may be left out.",
        {"type": "string", "pattern": "^[A-Za-z0-9._-]{1,64};epoch=[0-9]{1,9};sequence=[1-9][0-9]{0,17};sha256=[0-9a-f]{64}$"},
        f"gateway-7;epoch=1;sequence=4711;after=4710;sha256={_SHA256}",
    ),
    Parameter(
        "Idempotency-Key",
        "header",
        "The same for clients that keep no numbers: the same key with the same bytes is stored once within a day, and with other bytes "
        "refused. Not together with `Penstock-Producer`.",
        {"type": "string", "pattern": "^[!-~]{1,255}$"},
        "8e03978e-40d5-43dd-bc93-6894a57f9324",
    ),
    Parameter(
        "traceparent",
        "header",
        "W3C Trace Context: the trace id stands in the answer to a refused request, and in the log.",
        _TEXT,
        "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
    ),
    Parameter(
        "Penstock-Device-Field",
        "header",
        "The field of the events that names their device, if it is not `deviceId`.",
        {"type": "string", "pattern": "^[A-Za-z_][A-Za-z0-9_.-]{0,63}$", "not": {"enum": ["receivedAt", "properties"]}},
        "address",
    ),
    Parameter(
        "Content-Encoding",
        "header",
        "How the body is zipped: one gzip member or one zstd frame.",
        {"type": "string", "enum": ["gzip", "zstd", "identity"]},
        "gzip",
    ),
)  # fmt: skip
_BATCH_TEXT: Final = (
    "The answer comes when the events are on disk. Events that cannot be taken are listed in `rejected`, the others of the batch are "
    "stored. Up to 10,000 events, 1 MiB as sent and 16 MiB unzipped, unless set otherwise. A header `Penstock-Property-<Name>: value` "
    "gives each event of the batch a property; chunked bodies are accepted. A request with a header `ce-specversion` "
    "is one CloudEvent in HTTP's binary mode, whatever its Content-Type."
)
_BATCH_ERRORS: Final = (
    *(MalformedBody, MalformedGzip, EmptyBatch, NoValidEvent, BodyMismatch, ForbiddenDevice, ProducerFenced),
    *(BatchTooLarge, UnsupportedEncoding, UnsupportedType, NumberReused, NumberTooOld, ThroughputExceeded),
    *(StorageFull, HubUnavailable),
)
_STATUS: Final = Status(
    ok=True,
    problems=[],
    at=_AT,
    hub="9f86d081884c7d65",
    period_s=3600,
    totals=Totals(4711, 4600, 111),
    storage=Storage(180_224, 64 << 30, "ok"),
    counters={"batches": 12},
    parts=[PartState("api-0", 4242, _AT)],
    partitions=[
        PartitionStatus(0, 1200, 4711, 180_224, _AT, "up", 1, "4600", 4600, 111, 5_700, 12.5, 604_787.5, "up-1")
    ],
    retention=RetentionStatus(604_800.0, "kept", 604_787.5, None),
    groups=[GroupStatus("alarms", 0, 3, 4700, 11, 0.4)],
)
_STORED: Final[dict[str, Any]] = {
    "batch": "gateway-7:1:4711",
    "accepted": 998,
    "duplicate": False,
    "rejected": [{"index": 3, "code": "no_device", "detail": "The event has no field 'deviceId'."}],
}


def _bodies(event: Schema, example: dict[str, Any]) -> tuple[Body, Body]:
    one_or_more = {"oneOf": [{"type": "array", "minItems": 1, "items": event}, event]}
    line = msgspec.json.encode(example).decode() + "\n"
    return (
        Body(_NDJSON, {"type": "string", "description": "One event in each line."}, line),
        Body(_JSON, one_or_more, [example]),
    )


SEND: Final = Operation(
    "sendEvents",
    "Send a batch of events",
    _BATCH_TEXT,
    "On disk.",
    (Body(_JSON, Stored, _STORED),),
    parameters=_BATCH,
    bodies=(
        *_bodies(_EVENT, _LINE),
        Body(
            _CLOUDEVENTS,
            {"type": "array", "minItems": 1, "items": _CLOUD_EVENT},
            [{"specversion": "1.0", "id": "1", "source": "/site-a", "type": "reading", **_LINE}],
        ),
    ),
    errors=_BATCH_ERRORS,
)
SEND_OF_DEVICE: Final = SEND._replace(
    name="sendEventsOfDevice",
    summary="Send a batch of events of one device",
    text=f"The device is the path's; it is added to events that do not name it. {_BATCH_TEXT}",
    parameters=(
        Parameter("device", "path", "The device's id.", {"type": "string", "pattern": _DEVICE_ID}, "d-1"),
        *_BATCH,
    ),
    bodies=_bodies(_EVENT_OF_DEVICE, {"temperature": 21.4}),
)

_N: Final = Parameter("n", "path", "A partition, from 0.", {"type": "integer", "minimum": 0, "maximum": 1023}, 0)
_READER: Final = Parameter(
    "Penstock-Group",
    "header",
    "Who reads, and how far it is: `NAME;epoch=N;checkpoint=N`. Retention waits for such a group, and a later epoch shuts this one out.",
    {"type": "string", "pattern": "^[A-Za-z0-9][A-Za-z0-9._-]{0,63};epoch=[0-9]{1,18};checkpoint=[0-9]{1,18}$"},
    "alarms;epoch=3;checkpoint=4711",
)
_HUB: Final = Header("Penstock-Hub", "The id of the hub.", _TEXT)
_READ_ERRORS: Final = (NotFound, HubBroken)
_BOUNDS: Final = Partition(0, 1200, 4711, 180_224, "2026-11-21T09:00:00.000Z", _AT)

PARTITIONS: Final = Operation(
    "listPartitions",
    "The hub and its partitions",
    "",
    "What each partition holds.",
    (Body(_JSON, Partitions, Partitions("9f86d081884c7d65", 3600, [_BOUNDS])),),
    headers=(_HUB,),
    errors=(HubBroken,),
)
PARTITION: Final = Operation(
    "getPartition",
    "One partition",
    "",
    "What it holds.",
    (Body(_JSON, Partition, _BOUNDS),),
    parameters=(_N, _READER),
    headers=(_HUB,),
    errors=(*_READ_ERRORS, ReaderFenced, OffsetBeyondEnd),
)
EVENTS: Final = Operation(
    "readEvents",
    "Events of a partition, in order",
    "As NDJSON, each event with the server's stamp; or, with `Accept: application/vnd.penstock.frames`, as the frames that the hub keeps "
    "(docs/formats.md). An answer without events is the end of the log: come again later with `Penstock-Next-Offset`.",
    "Events from `from` on.",
    (
        Body(_NDJSON, _TEXT, f'{{"deviceId":"d-1","temperature":21.4,"receivedAt":"{_AT}"}}\n'),
        Body(_FRAMES, {"type": "string", "format": "binary"}, ""),
    ),
    parameters=(
        _N,
        Parameter(
            "from",
            "query",
            "An offset: `start`, `end`, or what an answer named. Default: `start`.",
            {"type": "string", "pattern": "^(start|end|[0-9]{1,19})$"},
            "4711",
        ),
        Parameter(
            "limit",
            "query",
            "At most so many events; whole frames may be a few more. Default: 1,000.",
            {"type": "integer", "minimum": 1, "maximum": 10_000},
            500,
        ),
        Parameter(
            "bytes",
            "query",
            "Of frames: at most so many bytes instead, as the hub counts them. An answer has one frame at least.",
            {"type": "integer", "minimum": 1, "maximum": 4 << 20},
            262_144,
        ),
        _READER,
    ),
    headers=(
        _HUB,
        Header("Penstock-Next-Offset", "Where the next request goes on.", _OFFSET),
        Header("Penstock-End-Offset", "The end of the log.", _OFFSET),
    ),
    errors=(*_READ_ERRORS, BadParameter, OffsetTrimmed, OffsetBeyondEnd, ReaderFenced, FrameDamaged),
)
OFFSET: Final = Operation(
    "findOffset",
    "Where a time begins in a partition",
    "The first frame or marker that was enqueued at that time or later; the end of the log if there is none.",
    "Where to read from.",
    (Body(_JSON, Place, Place(0, "4711")),),
    parameters=(
        _N,
        Parameter(
            "at", "query", "RFC 3339, with its zone.", {"type": "string", "format": "date-time"}, _AT, required=True
        ),
    ),
    headers=(_HUB,),
    errors=(*_READ_ERRORS, BadParameter),
)
PRODUCER: Final = Operation(
    "getProducer",
    "What the hub knows of a producer",
    "Known for 14 days after its last batch.",
    "Its last number, and the batches that are recognised when they come again.",
    (
        Body(
            _JSON,
            Producer,
            Producer("gateway-7", 1, 4711, _AT, [KeptBatch(1, 4711, _SHA256, 998, _AT, [Range(0, 3713, 4711)])]),
        ),
    ),
    parameters=(Parameter("id", "path", "The producer's id.", {"type": "string", "minLength": 1}, "gateway-7"),),
    errors=_READ_ERRORS,
)
STATUS: Final = Operation(
    "getStatus",
    "The state of the installation",
    "What `penstock status` shows: partitions, lags, leases, storage, processes.",
    "`ok` is false when `problems` names any.",
    (Body(_JSON, Status, _STATUS),),
    errors=(HubBroken,),
)
LIVE: Final = Operation("isLive", "Whether the server answers", "", "It does.", (Body(_JSON, Health, Health(True)),))
READY: Final = Operation(
    "isReady",
    "Whether the server takes events",
    "",
    "It does.",
    (Body(_JSON, Health, Health(True)),),
    errors=(StorageFull, HubBroken),
)
CUT: Final = Operation(
    "cutFiles",
    "Close the open hour files now",
    "Puts a cut marker into every partition that has an open file; later events of the hour go to its next part. `penstock flush` does "
    "this and waits for the archiver.",
    "The marks are on disk.",
    (Body(_JSON, Cut, Cut(["4711", "0"])),),
    errors=(StorageFull, HubUnavailable, HubBroken),
)
FORGET: Final = Operation(
    "forgetGroup",
    "Forget a group that reads over HTTP",
    "Retention no longer waits for it.",
    "It is forgotten.",
    (Body(_JSON, Forgotten, Forgotten("alarms")),),
    parameters=(Parameter("group", "path", "The group's name.", {"type": "string", "minLength": 1}, "alarms"),),
    errors=(NotFound, HubUnavailable, HubBroken),
)
_THROUGHPUT: Final = Body(
    _JSON,
    Throughput,
    Throughput(20, 20_000, 20_000_000, 5_800.0, 1_392_000.0, dict.fromkeys(LIMITS, 0), 0),
)
UNITS: Final = Operation(
    "getThroughputUnits",
    "The throughput units, and what they do",
    "A unit takes 1,000 events or 1 MB a second, whichever comes first.",
    "What is in force.",
    (_THROUGHPUT,),
)
SET_UNITS: Final = UNITS._replace(
    name="setThroughputUnits",
    summary="Set the throughput units",
    text="In force in all processes, and kept over restarts, when it is answered. `null` or 0: no limit.",
    bodies=(
        Body(
            _JSON,
            {
                "type": "object",
                "properties": {"throughput_units": {"type": ["integer", "null"], "minimum": 0, "maximum": UNITS_MOST}},
                "required": ["throughput_units"],
            },
            {"throughput_units": 20},
        ),
    ),
    errors=(BadParameter, HubUnavailable),
)
OPENAPI: Final = Operation(
    "getOpenApi",
    "This description",
    "",
    "An OpenAPI 3.1 document of what this port serves.",
    (Body(_JSON, {"type": "object", "required": ["openapi", "paths"]}, {"openapi": "3.1.0", "paths": {}}),),
)
DOCS: Final = Operation(
    "readDocs", "This description, for people", "", "A page.", (Body("text/html", _TEXT, "<!doctype html>"),)
)
ERRORS: Final = Operation(
    "readErrors",
    "Every error, for people",
    "The `type` of a problem is a place on this page.",
    "A page.",
    (Body("text/html", _TEXT, "<!doctype html>"),),
)
