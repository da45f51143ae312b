"""A CloudEvent in HTTP's binary mode: attributes are headers, the body is the data. It becomes a line in the JSON event format.

    ce-specversion: 1.0    ce-id: 17    ce-source: /plant/3    ce-type: temperature    Content-Type: application/json

Sources: CloudEvents 1.0.2, HTTP protocol binding, 3.1 (a header's value is unquoted, and percent-encoded UTF-8), and JSON event format,
3.1 (data that is JSON stays JSON, text is a string, anything else goes to `data_base64`). What is text and what is not is told by the
media type alone, so that a reader finds the data of one kind of events in one place.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping
from typing import Final
from urllib.parse import unquote_to_bytes

import msgspec

from penstock.errors import BadHeader, NoValidEvent
from penstock.wire.body import json_line, media_type_of

MARK: Final = b"ce-specversion"
"""The header by which a request is an event in this mode, unless its Content-Type is that of CloudEvents itself."""

_PREFIX = b"ce-"
_ATTRIBUTE = re.compile(rb"[a-z0-9]+")
_NOT_IN_HEADERS = frozenset((b"data", b"datacontenttype"))
_ESCAPED = re.compile(rb"\\(.)", re.DOTALL)
_BLANK = b" \t\r\n"
_encode = msgspec.json.Encoder().encode


def is_binary(headers: Mapping[bytes, bytes], content_type: str) -> bool:
    """Whether this is the binary mode."""
    return MARK in headers and not content_type.lower().startswith("application/cloudevents")


def line_of(headers: Mapping[bytes, bytes], content_type: str, body: bytes, *, event_bytes_max: int) -> bytes:
    """The event in one line, attributes in the order of their headers. Raises BadHeader, NoValidEvent, UnsupportedType (a charset)."""
    fields = [
        b"%b:%b" % (_encode(name[len(_PREFIX) :].decode("latin-1")), _encode(_attribute(name, value)))
        for name, value in headers.items()
        if name.startswith(_PREFIX)
    ]
    if content_type:
        fields.append(b'"datacontenttype":' + _encode(content_type))
    if len(body) > event_bytes_max:
        raise _rejected(
            "event_too_large", f"The data has {len(body)} bytes, the limit of an event is {event_bytes_max}."
        )
    if body:
        fields.append(_data(content_type, body))
    return b"{%b}\n" % b",".join(fields)


def _attribute(name: bytes, value: bytes) -> str:
    attribute = name[len(_PREFIX) :]
    shown = name.decode("latin-1")
    if not _ATTRIBUTE.fullmatch(attribute) or attribute in _NOT_IN_HEADERS:
        raise BadHeader(f"The header {shown} is no attribute of CloudEvents. Nothing was stored.", header=shown)
    if len(value) > 1 and value[:1] == value[-1:] == b'"':
        value = _ESCAPED.sub(rb"\1", value[1:-1])
    try:
        return unquote_to_bytes(value).decode()
    except UnicodeDecodeError as error:
        raise BadHeader(f"The header {shown} is not UTF-8. Nothing was stored.", header=shown) from error


def _data(content_type: str, body: bytes) -> bytes:
    main, _, sub = media_type_of(content_type).partition("/")
    if not main or sub == "json" or sub.endswith("+json"):
        return b'"data":' + json_line(body.strip(_BLANK)).rstrip(b"\n")
    if main == "text" or sub == "xml" or sub.endswith("+xml"):
        try:
            return b'"data":' + _encode(body.decode())
        except UnicodeDecodeError as error:
            raise _rejected("not_utf8", f"The data is not UTF-8 at byte {error.start}.") from error
    return b'"data_base64":"%b"' % base64.b64encode(body)


def _rejected(code: str, detail: str) -> NoValidEvent:
    return NoValidEvent(f"{detail} Nothing was stored.", rejected=[{"index": 0, "code": code, "detail": detail}])
