"""Penstock takes in the events of very many devices and leaves them as a few large files that are easy to query."""

from typing import TYPE_CHECKING

from penstock.errors import PenstockError
from penstock.events import Event

if TYPE_CHECKING:
    from penstock.client.client import Client
    from penstock.hosting import EventProcessorHost
    from penstock.processor import CloseReason
    from penstock.processor.user import Events

__all__ = ["Client", "CloseReason", "Event", "EventProcessorHost", "Events", "PenstockError"]
__version__ = "0.1.0"


def __getattr__(name: str) -> object:
    """Client and host are imported when they are asked for: the commands start faster without them."""
    if name == "Client":
        from penstock.client.client import Client

        return Client
    if name == "EventProcessorHost":
        from penstock.hosting import EventProcessorHost

        return EventProcessorHost
    if name == "Events":
        from penstock.processor.user import Events

        return Events
    if name == "CloseReason":
        from penstock.processor import CloseReason

        return CloseReason
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
