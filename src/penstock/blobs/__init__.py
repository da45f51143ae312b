"""The blob store: a few operations that every cloud has, with the outcomes that matter told apart.

Whoever implements this resolves unknown outcomes itself, by reading back and comparing `id` (guarantees.md, L3): a call
returns what is true, or raises StoreUnavailable, and then the caller must not go on from it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import BinaryIO, Protocol

import msgspec


class Blob(msgspec.Struct, frozen=True):
    """A small blob whole: its bytes, the etag to replace it by, and the mark that a listing has of this very write."""

    body: bytes
    etag: str
    mark: str


class Listed(msgspec.Struct, frozen=True, gc=False):
    """A blob in a listing: bytes, and a mark that changes with every write. Marks are compared with marks only; they are no etags."""

    name: str
    size: int
    mark: str


class Created(msgspec.Struct, frozen=True):
    """The blob was not there, and is now what was given."""

    etag: str


class Exists(msgspec.Struct, frozen=True):
    """Another blob of this name was there before; this is it."""

    blob: Blob


class BlobStore(Protocol):
    """Thread-safe. Names are relative paths of `[A-Za-z0-9._$-]` parts joined by `/`."""

    def create(self, name: str, body: bytes, *, id: str) -> Created | Exists:
        """Create-only, durable when it returns.

        `id` is a part of `body` that no other write has, nor contains: it tells one's own write after an unknown outcome.
        """
        ...

    def replace(self, name: str, body: bytes, *, etag: str, id: str) -> str:
        """Replace if the etag is still `etag`; the new etag. Raises LostRace, BlobNotFound."""
        ...

    def put(self, name: str, body: BinaryIO) -> None:
        """Whole or nothing, durable, replaces. Only for content that is a pure function of its ledger record."""
        ...

    def get(self, name: str) -> Blob:
        """Raises BlobNotFound."""
        ...

    def size(self, name: str) -> int:
        """Bytes of the blob. Raises BlobNotFound."""
        ...

    def stream(self, name: str) -> Iterator[bytes]:
        """The blob in parts of at most 1 MiB. Raises BlobNotFound before the first part."""
        ...

    def list(self, prefix: str) -> Iterator[Listed]:
        """The blobs whose names begin with `prefix`, sorted by name. A hint, maybe an old one: never decide by it."""
        ...

    def delete(self, name: str) -> None:
        """Absent afterwards; no error if it was."""
        ...
