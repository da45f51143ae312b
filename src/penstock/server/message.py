"""A request and its answer, as handlers see them."""

from __future__ import annotations

import enum
from collections.abc import Callable
from typing import NamedTuple

import msgspec


class Right(enum.Flag):
    """What a key is for."""

    NONE = 0
    SEND = enum.auto()
    LISTEN = enum.auto()
    MANAGE = enum.auto()


class Grant(NamedTuple):
    """Who asks. `key` is the id of his key, empty without one, and `name` its name, which the key that replaces it has too; `allows` tells
    for which devices he may send, None: for all. `publisher` is the one device of a token that was made for it.

    `events_per_s` and `bytes_per_s` are the quotas of the key, above 0; None: unlimited.
    """

    rights: Right
    key: str = ""
    allows: Callable[[str], bool] | None = None
    events_per_s: float | None = None
    bytes_per_s: float | None = None
    name: str = ""
    publisher: str = ""


NOBODY = Grant(Right.NONE)


class Line:
    """What a connection knows of its last request: whose it was, and under which name it was told a time to come back (quota.py), or 0."""

    __slots__ = ("waits", "whose")

    def __init__(self) -> None:
        self.whose = self.waits = 0


class Request(msgspec.Struct, eq=False, gc=False):
    """A request that has arrived whole. `path` and `query` are raw; header names are lower case, repeats joined by `, `.

    `grant` is what its sender may, set before the action of its route is called; `peer` the address it came from, where that is known;
    `line` is its connection's, where it came over one.
    """

    method: bytes
    path: bytes
    query: bytes
    headers: dict[bytes, bytes]
    body: bytes
    keep_alive: bool = True
    grant: Grant = NOBODY
    peer: str = ""
    line: Line | None = None


class Response(msgspec.Struct, frozen=True, gc=False):
    """An answer. Length, date and connection headers are the connection's affair."""

    status: int
    body: bytes
    content_type: bytes = b"application/json"
    headers: tuple[tuple[bytes, bytes], ...] = ()


Reply = Callable[[Response], None]
"""Takes the one answer to a request, on the loop's thread. The client may be gone by then."""

Handler = Callable[[Request, Reply], None]
"""Replies at once or later, exactly once. Never raises for what a client did."""

Admit = Callable[[Request], None]
"""Asked when the body of a request is still to come: raises the PenstockError that it would be refused with whatever its body is."""


def admit_all(_request: Request) -> None:
    """For handlers that look at a request when it is whole."""
