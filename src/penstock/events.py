"""The values that travel between the parts: small, frozen, without behaviour that needs a clock, a disk or a network."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta

import msgspec

DEVICE_FIELD = "deviceId"
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


class FrameKind(enum.IntEnum):
    """What a frame is; the values stand in the frame's fourth byte (docs/formats.md)."""

    PLAIN = 0
    GZIP = 1
    TIME_MARKER = 2
    CUT_MARKER = 3


class Source(msgspec.Struct, frozen=True, gc=False):
    """Where `count` consecutive events of a frame came from: one batch of one producer."""

    producer: str
    epoch: int
    sequence: int
    count: int
    sha256: bytes = b""
    properties: bytes = b""
    device_field: str = DEVICE_FIELD


class Group(msgspec.Struct, frozen=True, gc=False):
    """The events of one batch that go to one partition: stamped NDJSON, `count` lines that end in a line feed."""

    partition: int
    count: int
    content: bytes


class Batch(msgspec.Struct, frozen=True, gc=False):
    """What a POST becomes before it is committed. `retry_safe`: the client gave the producer number itself.

    `owner` is the name of the key that it came with; empty without keys.
    """

    producer: str
    epoch: int
    sequence: int
    accepted: int
    groups: tuple[Group, ...]
    retry_safe: bool = False
    sha256: bytes = b""
    properties: bytes = b""
    device_field: str = DEVICE_FIELD
    after: int | None = None
    owner: str = ""


class Appended(msgspec.Struct, frozen=True, gc=False):
    """The hub's answer for a batch that is durable: `duplicate` when it already was."""

    accepted: int
    duplicate: bool


class Event(msgspec.Struct, frozen=True, gc=False):
    """One event as a processor sees it. `body` is the stamped line without its line feed; `enqueued_at_ms` is the commit's time."""

    device: str
    body: bytes
    sequence_number: int
    offset: str
    enqueued_at_ms: int
    properties: bytes = b""

    @property
    def enqueued_at(self) -> datetime:
        """The commit's time in UTC."""
        return _EPOCH + timedelta(milliseconds=self.enqueued_at_ms)


class Bounds(msgspec.Struct, frozen=True, gc=False):
    """The state of a partition: sequence numbers `[first, next)` are kept, in `bytes` of disk.

    `enqueued_first_ms` is the time of the oldest frame kept. Nothing that is committed later is enqueued before
    `enqueued_last_ms`.
    """

    first: int
    next: int
    bytes: int
    enqueued_first_ms: int
    enqueued_last_ms: int


class Frame(msgspec.Struct, frozen=True, gc=False):
    """A frame as it lies in the log: `penstock.wire.frame` has `content`, the NDJSON of `body`, and `sources_of` for `sources`.

    `place_bits` are those of its hub. `shares` says which of its batch's events each source holds, where the hub keeps no producers
    (penstock.hub.duplicates), and `owners` with whose key each came, if with any.
    """

    kind: FrameKind
    partition: int
    first: int
    count: int
    enqueued_at_ms: int
    raw_bytes: int
    content_crc: int
    body: bytes
    source_count: int = 0
    sources: bytes = b""
    place_bits: int = 0
    shares: bytes = b""
    owners: bytes = b""

    @property
    def next(self) -> int:
        """The sequence number at which the log goes on."""
        if self.place_bits:
            return ((self.first >> self.place_bits) + 1) << self.place_bits
        return self.first + self.count

    @property
    def is_marker(self) -> bool:
        return self.kind >= FrameKind.TIME_MARKER


class Slice(msgspec.Struct, frozen=True):
    """What one read of a partition returns: whole frames from the one that holds `offset` on.

    The first frame may begin before `offset` when that lies inside a frame; `penstock.wire.frame.events` skips what lies
    before. `next_offset` is where to go on, `end_offset` the end of the log when it was read. Frames may be empty.
    """

    partition: int
    offset: str
    frames: Sequence[Frame]
    next_offset: str
    end_offset: str
