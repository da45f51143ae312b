"""Every interleaving of a small world around the real `judge` and `remember`.

One lane sends batches, one at a time, each under a number that it keeps for it. The network may deliver every request that was ever
sent, at any later moment and as often as it likes, and lose any answer; so it copies, delays and reorders, and a client that crashes
and sends the same again adds nothing. A hub that crashes loses a commit (nothing happened) or keeps it unanswered (the answer is lost).
The lane may be made anew (next epoch), and twice it may come back with an old spool and so use numbers again for other bytes. When it
is refused it does what guarantees.md says: a new producer id, the same bytes.

The kept batches are cut to two, so that few batches are enough to get behind them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from typing import NamedTuple

import pytest

from penstock.errors import ProducerFenced
from penstock.events import Appended, Batch
from penstock.hub import Refused, producers
from penstock.hub.producers import Producer, decode, encode, judge, remember

BATCHES, EPOCHS, IDS, FORGETS = 6, 3, 4, 2
STATES_MAX = 400_000

Judge = Callable[[Producer | None, Batch], Appended | Refused | None]


class Sent(NamedTuple):
    """A request: `what` stands for the bytes of a batch."""

    producer: int
    epoch: int
    sequence: int
    what: int


class State(NamedTuple):
    # the client
    producer: int = 0
    epoch: int = 1
    sequence: int = 0
    in_flight: Sent | None = None
    made: int = 0
    forgets: int = 0
    acknowledged: frozenset[int] = frozenset()
    # the network
    sent: frozenset[Sent] = frozenset()
    # the hub: entries by producer, and the log
    entries: tuple[bytes, ...] = (b"",) * IDS
    log: tuple[Sent, ...] = ()


def batch_of(sent: Sent) -> Batch:
    return Batch(f"p-{sent.producer}", sent.epoch, sent.sequence, 1, (), True, b"%032d" % sent.what)


def client_steps(state: State) -> Iterator[State]:
    if state.in_flight is not None:
        return
    if state.made < BATCHES:
        sent = Sent(state.producer, state.epoch, state.sequence + 1, state.made)
        yield state._replace(sequence=sent.sequence, in_flight=sent, made=state.made + 1, sent=state.sent | {sent})
    if state.epoch < EPOCHS:
        yield state._replace(epoch=state.epoch + 1, sequence=0)
    if state.forgets < FORGETS:
        for back in range(1, state.sequence + 1):
            yield state._replace(sequence=state.sequence - back, forgets=state.forgets + 1)
        if state.epoch > 1:
            for sequence in range(3):
                yield state._replace(epoch=state.epoch - 1, sequence=sequence, forgets=state.forgets + 1)


def answered(state: State, answer: Appended | Refused) -> State:
    """The client has the answer for what it has in flight."""
    sent = state.in_flight
    assert sent is not None
    if isinstance(answer, Appended):
        return state._replace(in_flight=None, acknowledged=state.acknowledged | {sent.what})
    again = Sent(state.producer + 1, 1, 1, sent.what)
    return state._replace(producer=again.producer, epoch=1, sequence=1, in_flight=again, sent=state.sent | {again})


def steps(
    state: State, commit: Callable[[bytes, Sent], tuple[bytes, Appended | Refused, bool]], *, early: bool
) -> Iterator[State]:
    yield from client_steps(state)
    for sent in state.sent:
        entry, answer, is_stored = commit(state.entries[sent.producer], sent)
        after = state
        if is_stored:
            entries = list(state.entries)
            entries[sent.producer] = entry
            after = state._replace(entries=tuple(entries), log=(*state.log, sent))
            yield after  # and the answer is lost
        if sent == state.in_flight:
            yield answered(after, answer)
            if early:
                yield answered(state, answer)  # and then the hub crashed, before the commit


def wrong(state: State) -> str | None:
    """What guarantee the state breaks."""
    stored = [sent.what for sent in state.log]
    if len(set(stored)) < len(stored):
        return "a batch is stored twice"
    if not state.acknowledged <= set(stored):
        return "a batch was acknowledged and is not stored"
    numbers = [sent[:3] for sent in state.log]
    if len(set(numbers)) < len(numbers):
        return "other bytes were stored under a used number"
    return None


def explore(judged: Judge, *, early: bool = False) -> tuple[str | None, int, frozenset[int]]:
    """The first broken guarantee, how many states were looked at, and the largest set of acknowledged batches."""

    @cache
    def commit(entry: bytes, sent: Sent) -> tuple[bytes, Appended | Refused, bool]:
        known, batch = decode(entry) if entry else None, batch_of(sent)
        answer = judged(known, batch)
        if answer is not None:
            return entry, answer, False
        return encode(remember(known, batch, 0, [])), Appended(1, duplicate=False), True

    seen = {State()}
    front = [State()]
    best: frozenset[int] = frozenset()
    while front:
        following = []
        for state in front:
            for after in steps(state, commit, early=early):
                if after in seen:
                    continue
                if (broken := wrong(after)) is not None:
                    return broken, len(seen), best
                seen.add(after)
                best = max(best, after.acknowledged, key=len)
                following.append(after)
        assert len(seen) < STATES_MAX
        front = following
    return None, len(seen), best


@pytest.fixture(autouse=True)
def few_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(producers, "KEPT_BATCHES", 2)


def test_every_batch_is_stored_once_and_none_is_lost() -> None:
    broken, states, best = explore(judge)
    print(f"{states} states")
    assert broken is None
    assert best == frozenset(range(BATCHES))
    assert states > 10_000


def without_sha256(known: Producer | None, batch: Batch) -> Appended | Refused | None:
    for kept in known.kept if known else ():
        if (kept.epoch, kept.sequence) == (batch.epoch, batch.sequence):
            return Appended(kept.accepted, duplicate=True)
    return judge(known, batch)


def without_kept(known: Producer | None, batch: Batch) -> Appended | Refused | None:
    return judge(known and Producer(known.epoch, known.sequence, known.seen_at_ms, ()), batch)


def without_fence(known: Producer | None, batch: Batch) -> Appended | Refused | None:
    answer = judge(known, batch)
    return None if isinstance(answer, ProducerFenced) else answer


def without_last(known: Producer | None, batch: Batch) -> Appended | Refused | None:
    return judge(known and Producer(known.epoch, 0, known.seen_at_ms, known.kept), batch)


def without_any(known: Producer | None, batch: Batch) -> Appended | Refused | None:
    return None


@pytest.mark.parametrize(
    ("judged", "broken"),
    [
        (without_sha256, "a batch was acknowledged and is not stored"),
        (without_kept, "a batch is stored twice"),
        (without_fence, "a batch is stored twice"),
        (without_last, "a batch is stored twice"),
        (without_any, "a batch is stored twice"),
    ],
)
def test_each_rule_is_needed(judged: Judge, broken: str) -> None:
    assert explore(judged)[0] == broken


def test_an_answer_must_not_come_before_the_commit() -> None:
    assert explore(judge, early=True)[0] == "a batch was acknowledged and is not stored"
