"""What arrives faster than it can be prepared waits here for as long as that makes sense, and is refused where it would not.

To unzip and split a batch takes the loop's thread a millisecond, to refuse it some 30 µs. If each was prepared when it arrived, those
behind it would wait unread in the kernel, where nobody could count or refuse them; at three times the capacity each refusal, and /health,
came half a second late. So a turn of the loop prepares for at most `SLICE_S`; what else arrives in it is queued as it came (zipped), and
between two slices the loop reads, answers and refuses. The bound is in time: what waits, times what each has taken lately with all that
went on meanwhile, and not less than what the first in the queue has waited already (a disk that hangs). So nobody is answered long after
he gave up.
"""

from __future__ import annotations

import asyncio
import functools
import math
from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVarTuple

from penstock.errors import HubBusy
from penstock.server.message import Request, Response
from penstock.server.problems import problem

SLICE_S = 0.004
_LATELY_S = 1.0

More = TypeVarTuple("More")


class Backlog(Generic[*More]):
    """Used on the loop's thread; `bytes` are those of the bodies that wait.

    `work` never raises; `may_go_on` is asked before each, and `go_on` is to be called when it may be true again.
    """

    def __init__(
        self, work: Callable[[Request, *More], None], *, may_go_on: Callable[[], bool], monotonic: Callable[[], float]
    ) -> None:
        self._work = work
        self._may_go_on = may_go_on
        self._monotonic = monotonic
        self._loop: asyncio.AbstractEventLoop | None = None
        self.bytes = 0
        self._queue: deque[tuple[float, Request, tuple[*More]]] = deque()
        self._lately_s = self._lately_done = 0.0
        self._turn_ends = 0.0
        self._in_turn = False
        self._done = 0
        self._since = 0.0

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop

    def __len__(self) -> int:
        return len(self._queue)

    def wait_s(self) -> float:
        """How long what comes now would wait."""
        if not self._queue:
            return 0.0
        each_s = self._lately_s / self._lately_done if self._lately_done else 0.0
        return max(len(self._queue) * each_s, self._monotonic() - self._queue[0][0])

    def put(self, request: Request, *more: *More) -> None:
        """Work on it now, or when its turn comes."""
        now = self._monotonic()
        if not self._in_turn:
            assert self._loop is not None
            self._in_turn = True
            self._loop.call_soon(self._turn)
            self._turn_ends = now + SLICE_S
            if not self._queue:  # there was a rest; else, a pause
                self._since, self._done = now, 0
        if self._queue or now >= self._turn_ends or not self._may_go_on():
            self.bytes += len(request.body)
            self._queue.append((now, request, more))
        else:
            self._done += 1
            self._work(request, *more)

    def go_on(self) -> None:
        if self._queue and not self._in_turn:
            assert self._loop is not None
            self._in_turn = True
            self._loop.call_soon(self._turn)

    def _turn(self) -> None:
        """The next turn of the loop: note what the last took, work for a slice."""
        now = self._monotonic()
        if self._done:
            # Sums that fade alike, so that a pause and the burst behind it make one mean.
            fade = math.exp((self._since - now) / _LATELY_S)
            self._lately_s = self._lately_s * fade + now - self._since
            self._lately_done = self._lately_done * fade + self._done
            self._since, self._done = now, 0
        self._turn_ends = now + SLICE_S
        queue = self._queue
        while queue and now < self._turn_ends and self._may_go_on():
            _, request, more = queue.popleft()
            self.bytes -= len(request.body)
            self._done += 1
            self._work(request, *more)
            now = self._monotonic()
        if queue and self._may_go_on():
            assert self._loop is not None
            self._loop.call_soon(self._turn)
        else:
            self._in_turn = False


def refusal(ahead: int, wait_s: float) -> Response:
    """Of what would wait so long behind so many others. `Retry-After` is that wait, a tenth of a second too long at most."""
    return _refusal(ahead, math.ceil(10 * max(wait_s, 1.0)) / 10)


@functools.lru_cache(maxsize=1)
def _refusal(ahead: int, retry_after_s: float) -> Response:
    """Many are refused in one turn of the loop: made once for all of them, as making it costs a third of a refusal."""
    detail = f"{ahead} batches wait for the disk. Nothing of this one was stored: keep it and send it again later."
    return problem(HubBusy(detail, retry_after_s=retry_after_s))
