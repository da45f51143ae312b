"""What the API answers in JSON, as types: the answers are made of them, and their schemas in /openapi.json come from them.

Batches and errors are the exceptions: their answers are written byte by byte (ingest.py) and from an error's data
(problems.py). For them the types here say what comes out, and tests hold them to it.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from penstock.wire.route import Rejected


class Problem(msgspec.Struct, frozen=True):
    """An error (RFC 9457). `code` is for programs, `detail` one sentence for people; other members are the error's data.

    `retryable`: the same request can be taken later.
    """

    type: str
    title: str
    status: int
    code: str
    detail: str
    retryable: bool


class Stored(msgspec.Struct, frozen=True):
    """The batch is on disk. `accepted` + the length of `rejected` = the events sent.

    `duplicate`: it was stored before, and `accepted` is what was answered then. `batch` is `<producer>:<epoch>:<sequence>`,
    or an id of the server's for a batch without Penstock-Producer.
    """

    batch: str
    accepted: int
    duplicate: bool
    rejected: Sequence[Rejected]


class Health(msgspec.Struct, frozen=True):
    ok: bool


class Partition(msgspec.Struct, frozen=True):
    """`[first, next)` are the sequence numbers that are in the hub; the times are those of its first and last frame."""

    partition: int
    first: int
    next: int
    bytes: int
    enqueued_first: str | None
    enqueued_last: str | None


class Partitions(msgspec.Struct, frozen=True, omit_defaults=True):
    """`period_s` is the length of an hour file. `place_bits`: a record's sequence number is its offset times 2 to that."""

    hub: str
    period_s: int
    partitions: Sequence[Partition]
    place_bits: int = 0


class Place(msgspec.Struct, frozen=True):
    """A place in a partition, to read from."""

    partition: int
    offset: str


class Range(msgspec.Struct, frozen=True):
    """Sequence numbers `[first, next)` of a partition."""

    partition: int
    first: int
    next: int


class KeptBatch(msgspec.Struct, frozen=True):
    """A batch that is recognised when it comes again, and where its events are."""

    epoch: int
    sequence: int
    sha256: str
    accepted: int
    enqueued_at: str
    ranges: Sequence[Range]


class Producer(msgspec.Struct, frozen=True):
    """The last epoch and sequence of a producer, and the batches that the hub still knows of it."""

    producer: str
    epoch: int
    sequence: int
    seen_at: str
    kept: Sequence[KeptBatch]


class Cut(msgspec.Struct, frozen=True, omit_defaults=True):
    """The offset behind the cut, for each partition. `place_bits` as in Partitions."""

    next: Sequence[str]
    place_bits: int = 0


class Forgotten(msgspec.Struct, frozen=True):
    """The name of the group."""

    forgotten: str
