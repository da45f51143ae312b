"""Who asks, and whether he may.

A key comes as `Authorization: Bearer <kid>.<secret>`, or as a shared access signature made with it (sas.py). Whatever is wrong with it
gets the same answer after the same work: an unknown id is hashed and compared like a known one. Everything is compared as bytes,
in constant time.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Sequence
from hashlib import sha256
from hmac import compare_digest
from pathlib import Path
from typing import Final, NamedTuple

from penstock import sas
from penstock.clock import Clock
from penstock.errors import Forbidden, Unauthenticated
from penstock.server.keys import SAME_NAME_MAX, Key, allows, decode
from penstock.server.message import NOBODY, Grant, Request, Right
from penstock.telemetry.log import Log

SKEW_S: Final = 300

Guard = Callable[[Request], Grant]
"""Tells who asks. Raises Unauthenticated."""

ANYONE = Grant(Right.SEND | Right.LISTEN | Right.MANAGE)


def no_guard(_request: Request) -> Grant:
    """For installations that take events from anyone."""
    return ANYONE


def check(grant: Grant, right: Right) -> None:
    """Raises Forbidden. `right` may name several; one of them is enough."""
    # Of the values: `&` of two flags takes 2 µs, more than all else that is asked of a request.
    if right._value_ and not right._value_ & grant.rights._value_:
        names = " or ".join(one.name.lower() for one in right if one.name)
        raise Forbidden(f"The key lacks the right to {names}.", right=names)


class _Known(NamedTuple):
    """What a key is recognised by, and what it lets one do."""

    digest: bytes
    signing: bytes
    grant: Grant


class _Ring(NamedTuple):
    """The living keys: by id, and for signatures by id and by name."""

    by_kid: dict[bytes, _Known]
    by_name: dict[bytes, Sequence[_Known]]


# Compared with like any other, and nothing is equal to it.
_NOBODYS = _Known(secrets.token_bytes(32), secrets.token_bytes(32), NOBODY)
_NO_TOKEN = sas.Token(b"", b"", 0, b"")


class KeyGuard:
    """The guard over DATA/keys.json. Lives on one thread.

    It looks at the file on every request, and reads it when it is another: what a command has changed holds when that returns. A file
    that is gone or cannot be read changes nothing: the keys that were known are taken, none if there were none; it is logged once.
    """

    def __init__(self, path: Path, clock: Clock, log: Log) -> None:
        self._path = path
        self._clock = clock
        self._log = log
        self._ring = _Ring({}, {})
        self._seen = (0, 0, 0)
        self._failed = ""
        # Kept open, so that no later file can get its number while it is the one that is known.
        self._fd = -1

    def __call__(self, request: Request) -> Grant:
        """Raises Unauthenticated."""
        try:
            if _version(os.stat(self._path)) != self._seen:  # noqa: PTH116 (half the time of Path.stat)
                self._read()
        except OSError as error:
            self._seen = (0, 0, 0)
            self._cannot(error.strerror or str(error))
        scheme, _, credential = request.headers.get(b"authorization", b"").partition(b" ")
        if scheme.lower() == b"sharedaccesssignature":
            grant = self._signed(credential.strip(), request)
        else:
            grant = self._held(credential.strip() if scheme.lower() == b"bearer" else b"")
        if grant is None:
            raise Unauthenticated("No valid key came with the request: `Authorization: Bearer KEY`. Nothing was done.")
        return grant

    def close(self) -> None:
        """Let go of the file; no error if it was."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _held(self, text: bytes) -> Grant | None:
        kid, _, secret = text.partition(b".")
        known = self._ring.by_kid.get(kid, _NOBODYS)
        equal = compare_digest(sha256(secret).digest(), known.digest)
        return known.grant if equal and known is not _NOBODYS else None

    def _signed(self, text: bytes, request: Request) -> Grant | None:
        token = sas.parse(text) or _NO_TOKEN
        living = self._ring.by_name.get(token.name, ())
        found: _Known | None = None
        for known in (*living, *(_NOBODYS,) * (SAME_NAME_MAX - len(living))):
            equal = compare_digest(sas.signature(known.signing, token.resource, token.expires_s), token.signature)
            if equal and known is not _NOBODYS:
                found = known
        if found is None or token.expires_s + SKEW_S < self._clock.now_ms() / 1000:
            return None
        resource = sas.resource(token.resource)
        if resource is None or not resource.covers(request.headers.get(b"host", b""), request.path):
            return None
        return found.grant if resource.device is None else _for_one(found.grant, resource.device)

    def _read(self) -> None:
        fd = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)
        version = _version(os.fstat(fd))
        self.close()
        self._fd, self._seen = fd, version
        try:
            with open(fd, "rb", closefd=False) as file:
                self._ring = _ring(decode(file.read()))
        except ValueError as error:  # msgspec's are ValueErrors; such a file is looked at again when it is another
            self._cannot(str(error))
        else:
            self._failed = ""

    def _cannot(self, why: str) -> None:
        if self._failed != why:
            self._failed = why
            self._log.error(
                "The keys cannot be read: those that were known are taken, and no others.",
                path=str(self._path),
                detail=why,
                known=len(self._ring.by_kid),
            )


def _version(about: os.stat_result) -> tuple[int, int, int]:
    return about.st_ino, about.st_mtime_ns, about.st_size


def _ring(keys: Sequence[Key]) -> _Ring:
    by_kid: dict[bytes, _Known] = {}
    by_name: dict[bytes, Sequence[_Known]] = {}
    for key in keys:
        if key.revoked is not None:
            continue
        grant = Grant(key.right, key.kid, allows(key.devices), key.events_per_s, key.bytes_per_s, key.name)
        known = _Known(bytes.fromhex(key.sha256), key.shared_access_key.encode(), grant)
        by_kid[key.kid.encode()] = known
        for name in {key.kid.encode(), key.name.encode()}:
            by_name[name] = (*by_name.get(name, ()), known)
    return _Ring(by_kid, by_name)


def _for_one(grant: Grant, device: str) -> Grant:
    """What is left of a grant for one publisher: it may send, and for this device, if that is one of the key's at all."""
    own = frozenset((device,) if grant.allows is None or grant.allows(device) else ())
    return grant._replace(rights=grant.rights & Right.SEND, allows=own.__contains__, publisher=device)
