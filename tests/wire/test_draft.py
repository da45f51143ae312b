"""What the batches of a commit become: whole, in order, in frames that are bounded and read back as what they were made of."""

from __future__ import annotations

import zlib

from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.events import Batch, FrameKind, Group
from penstock.wire.draft import drafts
from penstock.wire.frame import content, decode, sources_of

groups = st.builds(
    lambda partition, count, size: (partition, count, size),
    st.integers(0, 2),
    st.integers(1, 4),
    st.sampled_from([5, 5, 300, 2000]),
)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.lists(groups, min_size=1, max_size=4), max_size=8), st.sampled_from([100, 3000, 20_000]))
def test_frames_of_a_commit(sent: list[list[tuple[int, int, int]]], frame_bytes_max: int) -> None:
    batches, expected = [], {partition: [] for partition in range(3)}  # type: ignore[var-annotated]
    for index, of in enumerate(sent):
        made = []
        for partition, count, size in of:
            lines = [b'{"b":%d,"n":%d,"x":"%s"}\n' % (index, n, b"x" * size) for n in range(count)]
            made.append(Group(partition, count, b"".join(lines)))
            expected[partition] += [(index, line) for line in lines]
        batches.append(
            Batch(f"p-{index}", 1, index + 1, 0, tuple(made), True, bytes([index]) * 32, b'{"a":1}', "address")
        )
    found = {partition: [] for partition in range(3)}  # type: ignore[var-annotated]
    for draft in drafts(batches, frame_bytes_max=frame_bytes_max):
        frame = decode(draft.placed(7, 11))
        ndjson = content(frame)
        assert (frame.partition, frame.first, frame.enqueued_at_ms, frame.count) == (
            draft.partition,
            7,
            11,
            draft.count,
        )
        assert (frame.raw_bytes, frame.content_crc) == (len(ndjson), zlib.crc32(ndjson))
        assert frame.kind is (FrameKind.GZIP if len(ndjson) >= 4096 else FrameKind.PLAIN)
        assert len(ndjson) <= frame_bytes_max or len(draft.members) == 1
        following = iter(ndjson.splitlines(keepends=True))
        for (index, count), source in zip(draft.members, sources_of(frame), strict=True):
            assert (source.producer, source.sequence, source.count) == (f"p-{index}", index + 1, count)
            assert (source.sha256, source.properties, source.device_field) == (
                bytes([index]) * 32,
                b'{"a":1}',
                "address",
            )
            found[draft.partition] += [(index, next(following)) for _ in range(count)]
        assert next(following, None) is None
    assert found == expected


def test_a_commit_is_one_frame_for_each_partition() -> None:
    batches = [Batch(f"p-{n}", 1, 1, 2, (Group(0, 1, b"{}\n"), Group(1, 1, b"{}\n"))) for n in range(300)]
    made = drafts(batches, frame_bytes_max=262_144)
    assert [(draft.partition, draft.count) for draft in made] == [(0, 300), (1, 300)]
    assert drafts([], frame_bytes_max=1) == []
