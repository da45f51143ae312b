"""What is told of the paths of Event Hubs' REST API (eventhubs.py) in /openapi.json and /docs."""

from __future__ import annotations

from typing import Final

from penstock.errors import (
    BatchTooLarge,
    EmptyBatch,
    ForbiddenDevice,
    HubUnavailable,
    MalformedBody,
    MalformedGzip,
    NotFound,
    NoValidEvent,
    NumberReused,
    StorageFull,
    ThroughputExceeded,
    UnsupportedEncoding,
)
from penstock.server.openapi import Body, Operation, Parameter, Schema

_HUB: Final = Parameter(
    "hub",
    "path",
    "Any name: an installation has one hub. The API's own first segments (`v1`, `docs`, …) are none.",
    {"type": "string", "pattern": "^[A-Za-z][A-Za-z0-9-]{5,49}$"},
    "telemetry",
)
_PUBLISHER: Final = Parameter(
    "device",
    "path",
    "The publisher: the device's id.",
    {"type": "string", "pattern": "^[A-Za-z0-9][A-Za-z0-9._:@-]{0,127}$"},
    "d-1",
)
_PARTITION: Final = Parameter(
    "n", "path", "A partition, from 0.", {"type": "integer", "minimum": 0, "maximum": 1023}, 0
)
_BROKER: Final = Parameter(
    "BrokerProperties",
    "header",
    "JSON. Of it `PartitionKey` counts: the device of an event that does not name its own.",
    {"type": "string"},
    '{"PartitionKey":"d-1"}',
)
_ELEMENT: Final[Schema] = {
    "type": "object",
    "required": ["Body"],
    "properties": {
        "Body": {"type": "string", "description": "The event, a JSON object as text."},
        "IsBodyBase64": {"type": "boolean", "description": "`Body` is the base64 of it."},
        "BrokerProperties": {"type": "object", "properties": {"PartitionKey": {"type": "string"}}},
        "UserProperties": {"type": "object", "description": "They become the event's `properties`."},
    },
}
_EVENT: Final = {"deviceId": "d-1", "temperature": 21.4}
_BODIES: Final = (
    Body("application/json", {"type": "object", "description": "One event, whatever the Content-Type says."}, _EVENT),
    Body(
        "application/vnd.microsoft.servicebus.json",
        {"type": "array", "minItems": 1, "items": _ELEMENT},
        [{"Body": '{"deviceId":"d-1","temperature":21.4}', "UserProperties": {"site": "A"}}],
    ),
)
_TEXT: Final = (
    "As Azure Event Hubs' REST API has it; docs/event-hubs.md says what is understood and what differs. Everything is stored or nothing. "
    "A single event's own headers become its `properties`."
)

SEND: Final = Operation(
    "sendToEventHub",
    "Event Hubs: send an event or a batch",
    _TEXT,
    "On disk. There is no body.",
    (),
    parameters=(_HUB, _BROKER),
    bodies=_BODIES,
    errors=(
        *(MalformedBody, MalformedGzip, EmptyBatch, NoValidEvent, ForbiddenDevice, BatchTooLarge, UnsupportedEncoding),
        *(NumberReused, ThroughputExceeded, StorageFull, HubUnavailable),
    ),
    status=201,
)
SEND_TO_PARTITION: Final = SEND._replace(
    name="sendToEventHubPartition",
    summary="Event Hubs: send to a partition",
    text=f"A device is always in the same partition, so a device of another one is refused. {_TEXT}",
    parameters=(_HUB, _PARTITION, _BROKER),
    errors=(*SEND.errors, NotFound),
)
SEND_AS_PUBLISHER: Final = SEND._replace(
    name="sendToEventHubAsPublisher",
    summary="Event Hubs: send as a publisher",
    text=f"The publisher is the device. {_TEXT}",
    parameters=(_HUB, _PUBLISHER, _BROKER),
)
SEND_AS_ONE: Final = SEND_AS_PUBLISHER._replace(
    name="sendToEventHubAsOnePublisher",
    summary="Event Hubs: send as a publisher, as one example of its documentation writes it",
)
