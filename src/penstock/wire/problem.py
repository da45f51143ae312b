"""Errors on their way back: what the API answers as `application/problem+json` (RFC 9457) becomes the class that was raised there."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from penstock.errors import PenstockError

CONTENT_TYPE = "application/problem+json"
_NOT_DATA = frozenset(("type", "title", "status", "code", "detail", "retryable"))


def rebuilt(body: bytes) -> PenstockError | None:
    """The error that a problem tells of, with its data; None for what is no problem, or has a code that this version does not know."""
    try:
        members = msgspec.json.decode(body, type=dict[str, object])
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None
    detail = members.get("detail")
    for kind in tree(PenstockError):
        if kind.code == members.get("code") and isinstance(detail, str):
            return kind(detail, **{name: value for name, value in members.items() if name not in _NOT_DATA})
    return None


def tree(root: type[PenstockError]) -> Iterator[type[PenstockError]]:
    """A class of errors, and all below it."""
    yield root
    for below in root.__subclasses__():
        yield from tree(below)
