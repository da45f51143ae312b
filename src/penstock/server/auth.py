"""Who asks, and whether he may."""

from __future__ import annotations

from collections.abc import Callable

from penstock.errors import Forbidden
from penstock.server.message import Grant, Request, Right

Guard = Callable[[Request], Grant]
"""Tells who asks. Raises Unauthenticated."""

ANYONE = Grant(Right.SEND | Right.LISTEN | Right.MANAGE)


def no_guard(_request: Request) -> Grant:
    """For installations that take events from anyone."""
    return ANYONE


def check(grant: Grant, right: Right) -> None:
    """Raises Forbidden. `right` may name several; one of them is enough."""
    if right and not right & grant.rights:
        names = " or ".join(one.name.lower() for one in right if one.name)
        raise Forbidden(f"The key lacks the right to {names}.", right=names)
