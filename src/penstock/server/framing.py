"""What a body is to the intake: lines of one event each, however it was written.

A framing is a function from what was posted to lines. `own` is that of the API's paths; eventhubs.py has those of Event Hubs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

import msgspec

from penstock.server.message import Reply, Request
from penstock.wire import cloudevents
from penstock.wire.body import CLOUDEVENT, device_field, ndjson
from penstock.wire.route import Rejected


class Posted(msgspec.Struct, frozen=True, gc=False):
    """`body` is unzipped. `field` names the device: the installation's, or the batch's own if `field_given`. `device` is the path's."""

    headers: Mapping[bytes, bytes]
    body: bytes
    field: str
    field_given: bool
    device: str | None
    partitions: int
    events_max: int
    event_bytes_max: int


class Framed(msgspec.Struct, frozen=True, gc=False):
    """NDJSON, the field that names the device in it, and the device of events without that field, if they have one.

    `whole`: nothing is stored unless every event can be. `rejected`: what the framing itself rejects, a line of its own all the same.
    """

    lines: bytes
    field: str
    device: str | None
    whole: bool = False
    rejected: tuple[Rejected, ...] = ()


Framing = Callable[[Posted], Framed]
"""Raises what `unzip` and `ndjson` raise, and NotFound for a partition that there is not. May be called in an executor."""


def own(posted: Posted) -> Framed:
    """NDJSON, JSON and CloudEvents, by the Content-Type; or one CloudEvent, by its headers."""
    content_type = posted.headers.get(b"content-type", b"").decode("latin-1")
    if cloudevents.is_binary(posted.headers, content_type):
        lines = cloudevents.line_of(posted.headers, content_type, posted.body, event_bytes_max=posted.event_bytes_max)
        content_type = CLOUDEVENT
    else:
        lines = ndjson(posted.body, content_type, events_max=posted.events_max)
    field = posted.field
    if posted.device is None and not posted.field_given:
        field = device_field(lines, content_type, field)
    return Framed(lines, field, posted.device)


class Intake(Protocol):
    """What takes batches in."""

    def post(self, request: Request, device: str | None, reply: Reply, framing: Framing = own) -> None:
        """Store the events of this request; `device` is the path's. Replies when they are durable, or refused."""
        ...
