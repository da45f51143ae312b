"""What is there twice in a log: each verdict, and every way in which a lane's batches can come into a partition."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import msgspec
import pytest

from penstock.errors import FrameDamaged
from penstock.events import Batch, Frame, Group, Source
from penstock.hub.duplicates import Known, Read, Share, Verdict, identity, judge, pack_owners, pack_shares, shares_of
from penstock.hub.producers import WINDOW_MS
from penstock.wire.draft import drafts
from penstock.wire.frame import decode

Judge = Callable[[Known | None, Source, Share, int], tuple[Verdict, Known | None]]


@functools.cache
def source(sequence: int, count: int, *, epoch: int = 1, sha: bytes = b"") -> Source:
    return Source("p", epoch, sequence, count, sha or b"%d-%d" % (epoch, sequence))


def known(*batches: tuple[int, int, int, int], at_ms: int = 0) -> Known:
    """Batches of (epoch, sequence, whole, reached)."""
    return Known(at_ms, tuple(Read(e, s, b"%d-%d" % (e, s), whole, reached) for e, s, whole, reached in batches))


ROWS: list[tuple[str, Known | None, Source, Share, Verdict]] = [
    ("unknown producer", None, source(1, 3), Share(0, 3), Verdict(0, 3)),
    ("unknown producer, high number", None, source(9, 3), Share(0, 3), Verdict(0, 3)),
    ("next number", known((1, 1, 3, 3)), source(2, 3), Share(0, 3), Verdict(0, 3)),
    ("higher number", known((1, 1, 3, 3)), source(9, 3), Share(0, 3), Verdict(0, 3)),
    ("higher epoch, lower number", known((1, 9, 3, 3)), source(1, 3, epoch=2), Share(0, 3), Verdict(0, 3)),
    ("copy", known((1, 1, 3, 3)), source(1, 3), Share(0, 3), Verdict(3, 0)),
    ("copy of a piece", known((1, 1, 3, 3)), source(1, 1), Share(1, 3), Verdict(1, 0)),
    ("next piece", known((1, 1, 5, 2)), source(1, 3), Share(2, 5), Verdict(0, 3)),
    ("retry of what was cut off", known((1, 1, 5, 2)), source(1, 5), Share(0, 5), Verdict(2, 3)),
    ("copy of an earlier batch", known((1, 1, 3, 3), (1, 2, 3, 3)), source(1, 3), Share(0, 3), Verdict(3, 0)),
    ("copy from the epoch before", known((1, 7, 3, 3), (2, 1, 3, 3)), source(7, 3), Share(0, 3), Verdict(3, 0)),
    ("rest of a batch that was given up", known((1, 1, 5, 2), (1, 2, 3, 3)), source(1, 5), Share(0, 5), Verdict(2, 0, "number_too_old")),
    ("other bytes", known((1, 1, 3, 3)), source(1, 3, sha=b"x"), Share(0, 3), Verdict(0, 0, "number_reused")),
    ("other bytes, earlier number", known((1, 1, 3, 3), (1, 2, 1, 1)), source(1, 3, sha=b"x"), Share(0, 3), Verdict(0, 0, "number_reused")),
    ("the same bytes taken differently", known((1, 1, 3, 3)), source(1, 4), Share(0, 4), Verdict(0, 0, "number_reused")),
    ("older than what is kept", known((1, 5, 3, 3)), source(4, 3), Share(0, 3), Verdict(0, 0, "number_too_old")),
    ("lower epoch", known((2, 1, 3, 3)), source(4, 3), Share(0, 3), Verdict(0, 0, "producer_fenced")),
]  # fmt: skip


@pytest.mark.parametrize(
    ("before", "what", "share", "expected"), [row[1:] for row in ROWS], ids=[row[0] for row in ROWS]
)
def test_a_verdict(before: Known | None, what: Source, share: Share, expected: Verdict) -> None:
    verdict, after = judge(before, what, share, 7)
    assert verdict == expected
    newest = after.batches[-1] if after else None
    if verdict.taken:
        assert newest == Read(what.epoch, what.sequence, what.sha256, share.whole, share.start + what.count)
        assert after is not None and after.seen_at_ms == 7
    else:
        assert after == before


def test_batches_without_a_number_are_always_taken() -> None:
    one = msgspec.structs.replace(source(1, 3), sha256=b"")
    for before in (None, known((1, 1, 3, 3))):
        assert judge(before, one, Share(0, 3), 0) == (Verdict(0, 3), before)


def test_a_producer_is_known_for_the_window_and_no_longer() -> None:
    before = known((1, 1, 3, 3), at_ms=1000)
    assert judge(before, source(1, 3), Share(0, 3), 1000 + WINDOW_MS)[0] == Verdict(3, 0)
    assert judge(before, source(1, 3), Share(0, 3), 1001 + WINDOW_MS)[0] == Verdict(0, 3)


def test_the_last_five_are_kept() -> None:
    state: Known | None = None
    for sequence in range(1, 9):
        _, state = judge(state, source(sequence, 1), Share(0, 1), sequence)
    assert state is not None and [batch.sequence for batch in state.batches] == [4, 5, 6, 7, 8]


def frame_of(batches: list[Batch], shares: list[Share]) -> Frame:
    [draft] = drafts(batches, frame_bytes_max=1 << 20)
    return msgspec.structs.replace(decode(draft.placed(0, 0)), shares=pack_shares(shares), owners=pack_owners(shares))


def test_shares_stand_beside_their_sources() -> None:
    batches = [Batch(name, 1, 1, 2, (Group(0, 2, b"{}\n{}\n"),), True, b"s") for name in ("p", "q")]
    found = list(shares_of(frame_of(batches, [Share(0, 2), Share(3, 5)])))
    assert [(each.producer, share) for each, share in found] == [("p", Share(0, 2)), ("q", Share(3, 5))]
    for wrong in ([], [Share(0, 2)], [Share(0, 2)] * 3, [Share(0, 2), Share(4, 5)], [Share(0, 1), Share(0, 2)]):
        with pytest.raises(FrameDamaged):
            list(shares_of(frame_of(batches, wrong)))


def test_owners_stand_beside_their_sources_where_there_are_any() -> None:
    batches = [Batch("p", 1, 1, 2, (Group(0, 2, b"{}\n{}\n"),), True, b"s") for _ in range(3)]
    shares = [Share(0, 2, owner) for owner in ("press", "", "löwe")]
    frame = frame_of(batches, shares)
    assert frame.owners == b"\x05press\x00\x05l\xc3\xb6we"
    assert [share for _, share in shares_of(frame)] == shares
    assert [identity(each, share) for each, share in shares_of(frame)] == ["p press", "p", "p löwe"]
    assert frame_of(batches, [Share(0, 2)] * 3).owners == b""
    for wrong in (b"\x00", b"\x00\x00\x00\x00", b"\x00\x00\x01", b"\x05press\x00\x06l\xc3\xb6we", b"\x01\xff\x00\x00"):
        with pytest.raises(FrameDamaged, match="owners do not fit"):
            list(shares_of(msgspec.structs.replace(frame, owners=wrong)))


class Piece(NamedTuple):
    """A frame's source on its way into the partition."""

    epoch: int
    sequence: int
    start: int
    end: int


class World(NamedTuple):
    """A lane, what of it is under way, and what a reader has made of the partition so far.

    `sending`: the batch that has no answer yet, and `attempts` at it so far; `late`: frames that nobody waits for any more, which may
    still land, each once, or never.
    """

    epoch: int = 1
    sending: int = 1
    attempts: int = 0
    late: tuple[Piece, ...] = ()
    state: Known | None = None
    taken: tuple[tuple[int, int, int], ...] = ()
    dead: frozenset[tuple[int, int, int]] = frozenset()
    given_up: bool = False


EVENTS = 3
BATCHES = 3
ATTEMPTS = 2
LATE = 2
SPLITS = (((0, 1), (1, 3)), ((0, 2), (2, 3)))


class Wrong(Exception):
    pass


def landed(world: World, piece: Piece, by: Judge) -> World:
    """The reader comes to a frame. Nothing may be taken twice, or out of order."""
    what = source(piece.sequence, piece.end - piece.start, epoch=piece.epoch)
    verdict, state = by(world.state, what, Share(piece.start, EVENTS), 0)
    events = [(piece.epoch, piece.sequence, index) for index in range(piece.start, piece.end)]
    left_out = events[: verdict.left_out]
    taken = events[verdict.left_out : verdict.left_out + verdict.taken]
    dead = events[verdict.left_out + verdict.taken :]
    if (verdict.reason is None) != (not dead):
        raise Wrong(f"{dead} dead for {verdict.reason}")
    every = (*world.taken, *taken)
    if list(every) != sorted(set(every)):
        raise Wrong(f"taken twice or out of order: {every}")
    if not set(left_out) <= set(world.taken):
        raise Wrong(f"left out and never taken: {left_out}")
    return world._replace(state=state, taken=every, dead=world.dead | set(dead))


def following(world: World, by: Judge) -> Iterator[World]:
    for index, piece in enumerate(world.late):
        yield landed(world._replace(late=world.late[:index] + world.late[index + 1 :]), piece, by)
    if world.sending > BATCHES:
        return
    if world.epoch == 1 and world.sending == 2:
        # The lane is made anew, whatever became of its last batch.
        gone = world.attempts > 0
        yield world._replace(epoch=2, sending=1, attempts=0, given_up=world.given_up or gone)
    for split in SPLITS:
        pieces = [Piece(world.epoch, world.sending, *part) for part in split]
        reached = world
        for count in range(len(pieces) + 1):
            if world.attempts < ATTEMPTS:
                # No answer: the first `count` frames are there, and the next may be under way for ever so long.
                lost = reached._replace(attempts=world.attempts + 1)
                yield lost
                if count < len(pieces) and len(lost.late) < LATE:
                    yield lost._replace(late=tuple(sorted((*lost.late, pieces[count]))))
            if count < len(pieces):
                reached = landed(reached, pieces[count], by)
        answered = {(world.epoch, world.sending, index) for index in range(EVENTS)}
        if not answered <= set(reached.taken):
            raise Wrong(f"answered and not taken: {sorted(answered - set(reached.taken))}")
        yield reached._replace(sending=world.sending + 1, attempts=0)


def explored(by: Judge) -> int:
    """Every world that can be; how many there are. Raises Wrong."""
    seen, waiting = {World()}, [World()]
    while waiting:
        for world in following(waiting.pop(), by):
            if world not in seen:
                if world.dead and not world.given_up and not world.dead <= set(world.taken):
                    raise Wrong(f"dead, although nothing was given up: {sorted(world.dead)}")
                seen.add(world)
                waiting.append(world)
    return len(seen)


def test_every_way_into_a_partition() -> None:
    """Crashes after any frame, lost answers, retries cut differently, frames that land late, and a lane that is made anew."""
    count = explored(judge)
    print(f"{count:,} worlds")
    assert count > 10_000


def by_number_alone(state: Known | None, what: Source, share: Share, at_ms: int) -> tuple[Verdict, Known | None]:
    """A batch that was begun counts as read."""
    verdict, after = judge(state, what, share, at_ms)
    if (
        state is not None
        and after is not None
        and verdict.taken
        and state.batches[-1].number == after.batches[-1].number
    ):
        return Verdict(what.count, 0), state
    return verdict, after


def by_frame(state: Known | None, what: Source, share: Share, at_ms: int) -> tuple[Verdict, Known | None]:
    """A frame of which anything is new is taken whole."""
    verdict, after = judge(state, what, share, at_ms)
    return (Verdict(0, what.count), after) if verdict.taken else (verdict, after)


def forgetful(state: Known | None, what: Source, share: Share, at_ms: int) -> tuple[Verdict, Known | None]:
    """Only the newest batch is kept, and what is not kept is taken."""
    verdict, after = judge(state, what, share, at_ms)
    if verdict.reason == "number_too_old" or (
        verdict.left_out and state and state.batches[-1].sequence != what.sequence
    ):
        return Verdict(0, what.count), after
    return verdict, after


def silent(state: Known | None, what: Source, share: Share, at_ms: int) -> tuple[Verdict, Known | None]:
    """What cannot be known is left out instead of called dead."""
    verdict, after = judge(state, what, share, at_ms)
    return (Verdict(what.count, 0), after) if verdict.reason else (verdict, after)


def never(state: Known | None, what: Source, share: Share, at_ms: int) -> tuple[Verdict, Known | None]:
    """No filter."""
    return Verdict(0, what.count), judge(state, what, share, at_ms)[1]


@pytest.mark.parametrize("careless", [by_number_alone, by_frame, forgetful, silent, never])
def test_each_rule_is_needed(careless: Judge) -> None:
    with pytest.raises(Wrong):
        explored(careless)
