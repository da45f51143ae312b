"""Penstock takes in the events of very many devices and leaves them as a few large files that are easy to query."""

from penstock.errors import PenstockError
from penstock.events import Event

__all__ = ["Event", "PenstockError"]
__version__ = "0.1.0"
