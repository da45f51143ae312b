"""Shared access signatures in the form of Azure Event Hubs: made by clients, checked by the server.

    SharedAccessSignature sr=<URL-encoded URI>&sig=<URL-encoded Base64 of HMAC-SHA256>&se=<expiry, Unix seconds>&skn=<name of the key>

What is signed is `sr` as it stands in the token, a line feed, and `se`; the key is the text of the SharedAccessKey
(https://learn.microsoft.com/azure/event-hubs/authenticate-shared-access-signature).

A token is good for the URI that it names and whatever lies beneath it, by whole segments of the path: `…/dev-1` says nothing of
`…/dev-10`. One for `…/publishers/dev-1` is good for what `…` covers, and lets events of that one device in.
"""

from __future__ import annotations

import hmac
from base64 import b64encode
from typing import NamedTuple
from urllib.parse import quote, unquote_to_bytes

SCHEME = "SharedAccessSignature"
_FIELDS = frozenset((b"sr", b"sig", b"se", b"skn"))
_SCHEMES = frozenset(("http", "https", "sb", "amqp", "amqps"))
_LOOPBACK = frozenset(("localhost", "127.0.0.1", "::1"))
_EXPIRY_DIGITS_MAX = 12
_PUBLISHERS = "publishers"
_PUBLISHERS_AT_MOST = 1
_MESSAGES = "messages"


class Token(NamedTuple):
    """A token taken apart. `resource` is as it stands there, still encoded; `signature` is Base64 text, decoded from the URL."""

    resource: bytes
    signature: bytes
    expires_s: int
    name: bytes


class Resource(NamedTuple):
    """What a token is for: a host without its port, the segments of a path, and the one publisher, if it is for one."""

    host: str
    path: tuple[str, ...]
    device: str | None

    def covers(self, host: bytes, path: bytes) -> bool:
        """Whether a request with this Host header and this raw path lies beneath. All names of this very machine are alike."""
        try:
            asked = tuple(unquote_to_bytes(segment).decode() for segment in path.split(b"/")[1:])
        except UnicodeDecodeError:
            return False
        name = _host(host.decode("latin-1"))
        same = name == self.host or {name, self.host} <= _LOOPBACK
        return same and asked[: len(self.path)] == self.path


def signature(key: bytes, resource: bytes, expires_s: int) -> bytes:
    """Base64 of the HMAC over an encoded resource and an expiry."""
    return b64encode(hmac.digest(key, b"%b\n%d" % (resource, expires_s), "sha256"))


def token(uri: str, *, name: str, key: str, expires_s: int) -> str:
    """The value of an Authorization header, `SharedAccessSignature …`. `key` is the text of the SharedAccessKey."""
    resource = quote(uri, safe="")
    signed = quote(signature(key.encode(), resource.encode(), expires_s), safe="")
    return f"{SCHEME} sr={resource}&sig={signed}&se={expires_s}&skn={quote(name, safe='')}"


def publisher(uri: str, device: str) -> str:
    """The URI of one device's tokens."""
    return f"{uri.rstrip('/')}/{_PUBLISHERS}/{quote(device, safe='')}"


def derived_key(secret_sha256: bytes) -> str:
    """The SharedAccessKey of a key of which only the SHA-256 of the secret is kept."""
    return b64encode(hmac.digest(secret_sha256, b"penstock-sas", "sha256")).decode()


def parse(text: bytes) -> Token | None:
    """What stands behind `SharedAccessSignature`: four fields in any order, each once. None for anything else."""
    fields: dict[bytes, bytes] = {}
    for part in text.split(b"&"):
        name, _, value = part.partition(b"=")
        if name not in _FIELDS or name in fields:
            return None
        fields[name] = value
    expiry = fields.get(b"se", b"")
    if len(fields) != len(_FIELDS) or not expiry.isdigit() or len(expiry) > _EXPIRY_DIGITS_MAX:
        return None
    if expiry[:1] == b"0":  # it would be signed as another text than it is sent
        return None
    return Token(fields[b"sr"], unquote_to_bytes(fields[b"sig"]), int(expiry), unquote_to_bytes(fields[b"skn"]))


def resource(encoded: bytes) -> Resource | None:
    """What an encoded `sr` names; None if that is no URI of an API. The scheme may be left out, as many samples do."""
    try:
        text = unquote_to_bytes(encoded).decode()
        scheme, found, rest = text.partition("://")
        authority, _, path = (rest if found else text).partition("?")[0].partition("/")
        segments = tuple(unquote_to_bytes(segment).decode() for segment in path.split("/") if segment)
    except UnicodeDecodeError:
        return None
    if found and scheme.lower() not in _SCHEMES:
        return None
    host = _host(authority)
    at = segments.index(_PUBLISHERS) if _PUBLISHERS in segments[: _PUBLISHERS_AT_MOST + 1] else -1
    if at < 0 or len(segments) == at + 1:
        return Resource(host, segments, None)
    if segments[at + 2 :] not in ((), (_MESSAGES,)):
        return None
    return Resource(host, segments[:at], segments[at + 1])


def _host(authority: str) -> str:
    """Without the port, in lower case."""
    if authority.startswith("["):
        return authority[1:].partition("]")[0].lower()
    return authority.partition(":")[0].lower()
