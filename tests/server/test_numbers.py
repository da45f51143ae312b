"""What an Idempotency-Key stands for: everything that says whose a batch is and what is stored of it, and nothing else."""

from __future__ import annotations

import pytest

from penstock.server.auth import ANYONE
from penstock.server.message import Grant, Request
from penstock.server.numbers import Number, number_of

PATH = b"/telemetry/messages"
MINE = ANYONE._replace(key="kid-1", name="press", publisher="press-1")


def keyed(grant: Grant = MINE, path: bytes = PATH, query: bytes = b"", **headers: bytes) -> Number:
    named = {name.replace("_", "-").encode(): value for name, value in headers.items()}
    request = Request(b"POST", path, query, {b"idempotency-key": b"1"} | named, b'{"t":1}')
    request.grant = grant
    number = number_of(request)
    assert number is not None
    return number


@pytest.mark.parametrize(
    "other",
    [
        keyed(MINE._replace(name="other")),
        keyed(MINE._replace(publisher="press-2")),
        keyed(path=b"/telemetry/partitions/1/messages"),
        keyed(idempotency_key=b"2"),
        keyed(brokerproperties=b'{"PartitionKey":"d-2"}'),
        keyed(penstock_device_field=b"address"),
        keyed(penstock_property_site=b"A"),
        keyed(content_type=b"application/vnd.microsoft.servicebus.json"),
        keyed(content_encoding=b"gzip"),
    ],
    ids=["name", "publisher", "path", "key", "broker", "field", "property", "type", "encoding"],
)
def test_what_is_another_batch_has_another_number(other: Number) -> None:
    assert other.producer != keyed().producer


@pytest.mark.parametrize(
    "again",
    [keyed(MINE._replace(key="kid-2")), keyed(query=b"timeout=60"), keyed(user_agent=b"x"), keyed(traceparent=b"00-x")],
    ids=["the key that replaced it", "query", "client", "trace"],
)
def test_what_is_the_same_batch_sent_again_has_the_same(again: Number) -> None:
    assert again == keyed()
