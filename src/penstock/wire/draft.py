"""Frames before they have a place: what batches that are committed together become, zipped and summed.

One frame for each partition of a commit, not of a batch: zipping, storing, reading and archiving cost by the frame, so the more
batches share a commit the less each event costs. Made before the hub's write lock is taken, since zipping is most of the work.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from penstock.events import Batch, FrameKind, Group
from penstock.wire.frame import PLAIN_BYTES_MAX, crc32, member, member_crc, pack, pack_count, pack_origin


class Draft(msgspec.Struct, frozen=True, gc=False):
    """A frame without its first sequence number and time. `members`: (index of the batch, events), in order."""

    kind: FrameKind
    partition: int
    count: int
    raw_bytes: int
    content_crc: int
    body_crc: int
    sources: bytes
    members: tuple[tuple[int, int], ...]
    body: bytes

    def placed(self, first: int, enqueued_at_ms: int) -> bytes:
        """The bytes of the frame."""
        return pack(
            self.kind,
            self.partition,
            first,
            self.count,
            enqueued_at_ms,
            self.raw_bytes,
            self.content_crc,
            self.body_crc,
            self.sources,
            len(self.members),
            self.body,
        )


def drafts(batches: Sequence[Batch], *, frame_bytes_max: int) -> list[Draft]:
    """The frames of these batches; in each partition the events are in the order of the batches.

    A frame holds at most `frame_bytes_max` of NDJSON and sources, unless a group alone is larger.
    """
    origins = [pack_origin(b.producer, b.epoch, b.sequence, b.sha256, b.properties, b.device_field) for b in batches]
    waiting: dict[int, list[tuple[int, Group]]] = {}
    sizes: dict[int, int] = {}
    made: list[Draft] = []
    for index, batch in enumerate(batches):
        for group in batch.groups:
            partition, size = group.partition, len(group.content) + len(origins[index])
            run = waiting.get(partition)
            if run is None:
                waiting[partition] = [(index, group)]
                sizes[partition] = size
            elif sizes[partition] + size > frame_bytes_max:
                made.append(_draft(partition, run, origins))
                waiting[partition] = [(index, group)]
                sizes[partition] = size
            else:
                run.append((index, group))
                sizes[partition] += size
    made.extend(_draft(partition, run, origins) for partition, run in waiting.items())
    return made


def _draft(partition: int, run: list[tuple[int, Group]], origins: list[bytes]) -> Draft:
    content = b"".join([group.content for _, group in run])
    members = tuple([(index, group.count) for index, group in run])
    sources = b"".join([pack_count(count) + origins[index] for index, count in members])
    count = sum([group.count for _, group in run])
    if len(content) < PLAIN_BYTES_MAX:
        crc = crc32(content)
        return Draft(FrameKind.PLAIN, partition, count, len(content), crc, crc, sources, members, content)
    body = member(content)
    crcs = member_crc(body), crc32(body)
    return Draft(FrameKind.GZIP, partition, count, len(content), *crcs, sources, members, body)
