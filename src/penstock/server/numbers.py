"""Under which number a batch is sent: what makes one that is sent again stored once (docs/guarantees.md, Producers).

    Penstock-Producer: <id>;epoch=<n>;sequence=<n>;after=<n>;sha256=<hex>     clients with a spool
    Idempotency-Key: <1 to 255 visible ASCII characters>                      anyone else: one key, one batch

A key is a producer of its own that sends one batch. Whose key it is belongs to its name, so nobody meets another's, and so does everything
beside the body that says what is stored: a device that counts its own requests may use the same keys as its neighbour.
"""

from __future__ import annotations

import hashlib

import msgspec

from penstock.errors import BadHeader, BodyMismatch
from penstock.hub.producers import KEYED
from penstock.server.message import Request

_PRODUCER_ID = frozenset(b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789._-")
_VISIBLE = frozenset(range(0x21, 0x7F))
_KEY_BYTES_MAX = 255
_NAME_DIGITS = 32
_SAYS_WHAT = (
    b"penstock-device-field",
    b"penstock-property-",
    b"brokerproperties",
    b"content-type",
    b"content-encoding",
    b"ce-",
)


class Number(msgspec.Struct, frozen=True, gc=False):
    """`sha256` is that of the body as it was sent."""

    producer: str
    epoch: int
    sequence: int
    after: int | None
    sha256: bytes


def number_of(request: Request) -> Number | None:
    """None when the client gave no number. Raises BadHeader, BodyMismatch."""
    producer = request.headers.get(b"penstock-producer")
    key = request.headers.get(b"idempotency-key")
    if producer is None:
        return None if key is None else _keyed(request, key)
    if key is not None:
        raise BadHeader("Penstock-Producer and Idempotency-Key are two numbers for one batch: send one of them.")
    number = _numbered(producer)
    if hashlib.sha256(request.body).digest() != number.sha256:
        raise BodyMismatch("The body that arrived is not the one whose sha256 was sent. Send it again.")
    return number


def _keyed(request: Request, key: bytes) -> Number:
    if not 0 < len(key) <= _KEY_BYTES_MAX or not _VISIBLE.issuperset(key):
        raise BadHeader(
            f"Idempotency-Key must be 1 to {_KEY_BYTES_MAX} visible ASCII characters, such as a UUID. Nothing was stored.",
            header="idempotency-key",
        )
    grant, headers = request.grant, request.headers
    # The name of the API key and not its id: who has got another key in its place sends again what he sent with the first.
    whose = [grant.name.encode(), grant.publisher.encode(), request.path, key]
    whose += [b"%b:%b" % (name, headers[name]) for name in sorted(headers) if name.startswith(_SAYS_WHAT)]
    name = hashlib.sha256(b"\0".join(whose)).hexdigest()[:_NAME_DIGITS]
    return Number(KEYED + name, 0, 1, None, hashlib.sha256(request.body).digest())


def _numbered(header: bytes) -> Number:
    producer, *pairs = (part.strip() for part in header.split(b";"))
    values = dict(pair.partition(b"=")[::2] for pair in pairs)
    try:
        if len(values) != len(pairs) or values.keys() - {b"epoch", b"sequence", b"after", b"sha256"}:
            raise ValueError
        epoch, sequence = _whole(values[b"epoch"], 32), _whole(values[b"sequence"], 63)
        after = _whole(values[b"after"], 63) if b"after" in values else None
        sha256 = bytes.fromhex(values[b"sha256"].decode("ascii"))
        if not 0 < len(producer) <= 64 or not _PRODUCER_ID.issuperset(producer) or not sequence:
            raise ValueError
        if len(values[b"sha256"]) != 64 or len(sha256) != 32:  # fromhex skips white space
            raise ValueError
    except (KeyError, ValueError) as error:
        raise BadHeader(
            "Penstock-Producer must be <id>;epoch=<n>;sequence=<n from 1>;after=<n>;sha256=<64 hex digits>, with an id of at most "
            "64 letters, digits, `.`, `_` and `-`. Nothing was stored."
        ) from error
    return Number(producer.decode("ascii"), epoch, sequence, after, sha256)


def _whole(text: bytes, bits: int) -> int:
    if not text.isdigit() or len(text) > 19 or int(text) >= 1 << bits:
        raise ValueError
    return int(text)
