"""CloudEvents in HTTP's binary mode: what an event becomes."""

from __future__ import annotations

import json

import pytest

from penstock.errors import BadHeader, NoValidEvent, UnsupportedType
from penstock.wire.cloudevents import is_binary, line_of

HEADERS = {b"ce-specversion": b"1.0", b"ce-id": b"1", b"ce-source": b"/s", b"ce-type": b"t", b"host": b"h"}
ATTRIBUTES = '"specversion":"1.0","id":"1","source":"/s","type":"t"'


def line(body: bytes, content_type: str = "application/json", **more: bytes) -> str:
    headers = HEADERS | {b"ce-" + name.replace("_", "-").encode(): value for name, value in more.items()}
    return line_of(headers, content_type, body, event_bytes_max=1000).decode()


def test_it_is_told_by_its_header_and_not_by_that_of_the_other_modes() -> None:
    assert is_binary(HEADERS, "application/json") and is_binary(HEADERS, "") and is_binary(HEADERS, "text/xml")
    assert not is_binary(HEADERS, "Application/CloudEvents+JSON; charset=utf-8")
    assert not is_binary(HEADERS, "application/cloudevents-batch+json")
    assert not is_binary({b"ce-id": b"1"}, "application/json")


@pytest.mark.parametrize(
    ("body", "content_type", "data"),
    [
        (b' {"x":\r\n21.40} ', "application/json", '"data":{"x":  21.40}'),
        (b"[1,2]", "application/vnd.x+json; charset=utf-8", '"data":[1,2]'),
        (b'"text"', "text/json", '"data":"text"'),
        (b"7", "", '"data":7'),
        (b'<x a="1"/>\n', "text/xml", '"data":"<x a=\\"1\\"/>\\n"'),
        ("é".encode(), "Text/Plain", '"data":"é"'),
        (b"<x/>", "application/soap+xml", '"data":"<x/>"'),
        (b"text", "application/octet-stream", '"data_base64":"dGV4dA=="'),
        (b"\xff\0", "image/png", '"data_base64":"/wA="'),
        (b"", "application/json", ""),
    ],
)
def test_the_data_by_its_type(body: bytes, content_type: str, data: str) -> None:
    kind = f',"datacontenttype":{json.dumps(content_type)}' if content_type else ""
    assert line(body, content_type) == "{" + ATTRIBUTES + kind + ("," + data if data else "") + "}\n"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (b"Euro%20%E2%82%AC%20%F0%9F%98%80", "Euro € 😀"),  # the example of the HTTP protocol binding
        (b'"a \\"b\\" %22c%22"', 'a "b" "c"'),
        (b"100%", "100%"),
        (b'"', '"'),
        (b"a\\b", "a\\b"),
        ("é".encode(), "é"),
    ],
)
def test_values_are_unquoted_and_percent_decoded_once(value: bytes, text: str) -> None:
    assert json.loads(line(b"1", subject=value))["subject"] == text


@pytest.mark.parametrize("name", ["data", "datacontenttype", "data_base64", "a_b", "a.b", ""])
def test_names_that_are_no_attributes(name: str) -> None:
    with pytest.raises(BadHeader):
        line(b"1", **{name: b"x"})


def test_what_cannot_be_kept() -> None:
    with pytest.raises(BadHeader):
        line(b"1", subject=b"%ff")
    for body, content_type, code in (
        (b"{", "application/json", "not_json"),
        (b" ", "application/json", "not_json"),
        (b'"\xff"', "application/json", "not_utf8"),
        (b"\xff", "text/plain", "not_utf8"),
        (b"x" * 1001, "image/png", "event_too_large"),
    ):
        with pytest.raises(NoValidEvent) as raised:
            line(body, content_type)
        assert raised.value.fields["rejected"][0]["code"] == code  # type: ignore[index]
    with pytest.raises(UnsupportedType):
        line(b"x", "text/plain; charset=latin1")
