"""A load that comes when it comes, whatever the answers take: `python -m bench.paced PLAN`, a process of its own.

Batches are due at random times (exponential gaps, the same for a seed) at a rate, whether those before were answered or not. A due
batch goes out on a connection that has nothing under way; if there is none it waits, and that waiting counts: latencies are from the
time when a batch was due to its 200. A refused batch is sent again after `Retry-After` if `again`, as a good client does, else its
number goes to the next batch: if the refusal had stored it after all, that would be answered `number_reused`, a failure. Then every other
connection rests for as long as it was told, and the rest goes on at once: how long a refusal takes is of those that heed the last.
Marks, the result on standard output, and the end with standard input are as those of bench.load.
"""

from __future__ import annotations

import asyncio
import os
import random
import resource
import sys
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import msgspec
import uvloop

from bench.load import (
    ANSWERS_WITHIN_S,
    FAILURES_MOST,
    Latency,
    Mark,
    accepted_in,
    latency_ms,
    prepared,
    retry_after_s,
    tell,
    whole_head,
)

_TICK_S = 0.002


class Paced(msgspec.Struct, frozen=True):
    """`rate` is batches a second. `bodies`, `events` and `zipped` are those of bench.load; every batch has a number.

    An address may hold a few thousand connections: each of `sources` addresses (127.0.0.2 …) has its share.
    """

    port: int
    bodies: str
    events: int
    connections: int
    rate: float
    warm_up_s: float
    seconds: float
    zipped: bool
    again: bool
    producer: str
    sources: int = 1
    seed: int = 1


class PacedResult(msgspec.Struct, frozen=True, tag="result"):
    """The first group is of the window: batches due, events accepted, batches refused; latencies of 200s from when they were due, of
    refusals from when they were sent, of sending itself (what the generator or a lack of connections added), and of the generator's own
    loop: how late it wakes, which it adds to any of them. The rest is of all."""

    seconds: float
    due: int
    accepted_in_window: int
    refused_in_window: int
    latency_ms: Latency
    refusal_ms: Latency
    lag_ms: Latency
    own_ms: Latency
    cpu_s: float
    sent: int
    accepted: int
    busy: int
    failures: list[str]


class Windowed:
    """What is counted in the window; `kept` false: outside of it."""

    def __init__(self) -> None:
        self.kept = False
        self.due = self.accepted = self.refused = 0
        self.latencies: list[float] = []
        self.refusals: list[float] = []
        self.lags: list[float] = []
        self.own: list[float] = []


class Load:
    """The batches that are due, the connections that are free, and the counts. `sent` and `accepted` are events."""

    def __init__(self, plan: Paced, requests: Sequence[tuple[bytes, bytes]]) -> None:
        self.plan = plan
        self.requests = requests
        self.window = Windowed()
        self.sent = self.accepted = self.busy = 0
        self.failures: list[str] = []
        self.free: deque[Lane] = deque()
        self.waiting: deque[float] = deque()
        self._random = random.Random(plan.seed)
        self._next = 0
        self._under_way = 0
        self._ending = asyncio.Event()

    async def run(self) -> PacedResult:
        loop = asyncio.get_running_loop()
        loop.add_reader(0, self._stdin)
        for number in range(self.plan.connections):
            await Lane(self, number).connect()
        pace = asyncio.create_task(self._pace())
        await self._for(self.plan.warm_up_s)
        self.window.kept = True
        began, began_cpu_s = time.perf_counter(), time.process_time()
        tell(Mark("began"))
        await self._for(self.plan.seconds)
        seconds, cpu_s = time.perf_counter() - began, time.process_time() - began_cpu_s
        self.window.kept = False
        tell(Mark("ended"))
        pace.cancel()
        if not self.plan.again:  # of too much, what has not been sent by now never is
            self.waiting.clear()
        until = time.perf_counter() + ANSWERS_WITHIN_S
        while (self._under_way or self.waiting) and not self.failures and time.perf_counter() < until:
            await asyncio.sleep(0.01)
        if self._under_way and not self.failures:
            self.failures.append(f"{self._under_way} batches have no answer")
        window = self.window
        return PacedResult(
            seconds,
            window.due,
            window.accepted,
            window.refused,
            latency_ms(window.latencies),
            latency_ms(window.refusals),
            latency_ms(window.lags),
            latency_ms(window.own),
            cpu_s,
            self.sent,
            self.accepted,
            self.busy,
            self.failures[:FAILURES_MOST],
        )

    async def _for(self, seconds: float) -> None:
        try:
            await asyncio.wait_for(self._ending.wait(), seconds)
        except TimeoutError:
            return

    async def _pace(self) -> None:
        due = time.perf_counter()
        while True:
            now = time.perf_counter()
            while due <= now:
                self.window.due += self.window.kept
                self._dispatch(due)
                due += self._random.expovariate(self.plan.rate)
            asleep = time.perf_counter()
            await asyncio.sleep(_TICK_S)
            if self.window.kept:
                self.window.own.append(time.perf_counter() - asleep - _TICK_S)

    def _dispatch(self, due: float) -> None:
        if self.free:
            self.free.popleft().begin(due)
        else:
            self.waiting.append(due)

    def request(self) -> tuple[bytes, bytes]:
        self._under_way += 1
        self.sent += self.plan.events
        self._next = (self._next + 1) % len(self.requests)
        return self.requests[self._next]

    def done(self, lane: Lane) -> None:
        self._under_way -= 1
        self._free(lane)

    def _free(self, lane: Lane) -> None:
        if self.waiting:
            lane.begin(self.waiting.popleft())
        else:
            self.free.append(lane)

    def refused(self, lane: Lane, rest_s: float) -> None:
        """The batch is given up; the lane is free when it has rested."""
        if rest_s:
            self._under_way -= 1
            asyncio.get_running_loop().call_later(rest_s, self._free, lane)
        else:
            self.done(lane)

    def _stdin(self) -> None:
        if not os.read(0, 4096):
            asyncio.get_running_loop().remove_reader(0)
            self._ending.set()


class Lane(asyncio.Protocol):
    """One connection and its producer."""

    def __init__(self, load: Load, number: int) -> None:
        self._load = load
        self._producer = f"{load.plan.producer}-{number}".encode()
        self._heeds = load.plan.again or number % 2 == 0
        self._source = f"127.0.0.{2 + number % load.plan.sources}"
        self._transport: asyncio.Transport | None = None
        self._sequence = 1
        self._request = (b"", b"")
        self._received = b""
        self._due = self._sent_at = 0.0

    async def connect(self) -> None:
        loop = asyncio.get_running_loop()
        await loop.create_connection(lambda: self, "127.0.0.1", self._load.plan.port, local_addr=(self._source, 0))

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._load.free.append(self)

    def connection_lost(self, exc: Exception | None) -> None:
        """A connection that was closed while it was idle is no failure: another is made."""
        load = self._load
        if self not in load.free:
            load.failures.append(f"a connection was lost before its answer: {exc}")
            return
        load.free.remove(self)
        self._again = asyncio.ensure_future(self.connect())

    def begin(self, due: float) -> None:
        load = self._load
        self._due = due
        head, tail = load.request()
        self._request = (b"%b%b;epoch=1;sequence=%d;sha256=" % (head, self._producer, self._sequence), tail)
        if load.window.kept:
            load.window.lags.append(time.perf_counter() - due)
        self._write()

    def _write(self) -> None:
        self._sent_at = time.perf_counter()
        if self._transport is not None:
            self._transport.writelines(self._request)

    def data_received(self, data: bytes) -> None:
        data = self._received + data
        head_end = whole_head(data)
        if not head_end:
            self._received = data
            return
        self._received = b""
        load, window, now = self._load, self._load.window, time.perf_counter()
        if data[9:12] == b"200":
            accepted = accepted_in(data, head_end)
            load.accepted += accepted
            self._sequence += 1
            if window.kept:
                window.accepted += accepted
                window.latencies.append(now - self._due)
            load.done(self)
        elif data[9:12] == b"503":
            load.busy += 1
            if window.kept:
                window.refused += 1
                if self._heeds:
                    window.refusals.append(now - self._sent_at)
            wait_s = retry_after_s(data, head_end) if self._heeds else 0.0
            if load.plan.again:
                asyncio.get_running_loop().call_later(wait_s, self._write)
            else:
                load.sent -= load.plan.events
                load.refused(self, wait_s)
        else:
            load.failures.append(data[:2000].decode("latin-1"))


def main() -> None:
    plan = msgspec.json.decode(sys.argv[1], type=Paced)
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    bodies = msgspec.msgpack.decode(Path(plan.bodies).read_bytes(), type=list[bytes])

    async def run() -> PacedResult:
        requests = prepared(plan.port, bodies, zipped=plan.zipped, numbered=True)
        return await Load(plan, requests).run()

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        tell(runner.run(run()))


if __name__ == "__main__":
    main()
