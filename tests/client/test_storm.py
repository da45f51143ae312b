"""Ten thousand devices whose hub comes back (case 100): they do not come all at once."""

from __future__ import annotations

import heapq
import random
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from penstock.client import sending
from penstock.client.lane import Lane, Numbered
from penstock.client.records import Batch, Header
from penstock.client.sending import Board, Sender
from penstock.client.transport import Answer
from penstock.errors import HubUnavailable
from penstock.testing import FakeClock
from tests.e2e.system import SEED

DEVICES = 10_000
BACK_S = 300.0


class OneBatch(Lane):
    """A lane that holds one batch, on no disk."""

    def __init__(self) -> None:
        header = Header("penstock-batch/1", 1, 2, 2, "0" * 64, 0, "deviceId")
        self.batch: Batch | None = Batch("000000000001", Path(), 2, header, b"{}")

    def head(self) -> Batch | None:
        return self.batch

    def number(self, batch: Batch) -> Numbered:
        return Numbered("p", 1, 1, 0, True)

    def done(self, batch: Batch, *, stored: bool) -> None:
        self.batch = None


class Hub:
    def __init__(self, clock: FakeClock) -> None:
        self.posts: Counter[int] = Counter()
        self._clock = clock

    def post(self, body: bytes, headers: Mapping[str, str]) -> Answer:
        self.posts[int(self._clock.monotonic())] += 1
        if self._clock.monotonic() < BACK_S:
            raise HubUnavailable("refused")
        return Answer(200, {}, b'{"batch":"p:1:1","accepted":1}')

    def close(self) -> None:
        return


def come_back(jitter: Callable[[], float]) -> Counter[int]:
    """The posts in each second. All devices lost the hub in the same moment."""
    clock = FakeClock()
    hub = Hub(clock)
    fleet = [Sender(OneBatch(), hub, Board(None, clock), clock, jitter, {}) for _ in range(DEVICES)]
    turns = [(0.0, place) for place in range(DEVICES)]
    while turns:
        due, place = heapq.heappop(turns)
        clock.advance(due - clock.monotonic())
        wait_s = fleet[place].step()
        if wait_s:
            heapq.heappush(turns, (clock.monotonic() + wait_s, place))
    return hub.posts


@pytest.mark.parametrize("jitter", [True, False], ids=["", "control: no jitter"])
def test_devices_come_back_over_the_longest_wait(jitter: bool) -> None:
    posts = come_back(random.Random(SEED).random if jitter else lambda: 1.0)
    evenly = DEVICES / sending.BACKOFF_S[1]
    back = {second: count for second, count in posts.items() if second >= BACK_S}
    assert sum(back.values()) == DEVICES, "each needs one post"
    print(f"at most {max(back.values())} in a second, evenly it were {evenly:.0f}; {sum(posts.values())} posts in all")
    # Short waits are as likely as long ones, so more come soon than late.
    assert (max(back.values()) < 3 * evenly) == jitter
    assert max(back) <= BACK_S + sending.BACKOFF_S[1]
