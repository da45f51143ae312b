"""Penstock takes in the events of very many devices and leaves them as a few large files that are easy to query."""

from typing import TYPE_CHECKING

from penstock.errors import PenstockError
from penstock.events import Event

if TYPE_CHECKING:
    from penstock.client.client import Client

__all__ = ["Client", "Event", "PenstockError"]
__version__ = "0.1.0"


def __getattr__(name: str) -> object:
    """The client is imported when it is asked for: the commands start faster without it."""
    if name == "Client":
        from penstock.client.client import Client

        return Client
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
