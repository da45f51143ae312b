"""The load generator, a process of its own: `python -m bench.load PLAN`. As little Python for a request as there can be.

Each connection is one producer with one request under way. It writes one JSON object a line to standard output: `began` when
the warm-up is over, `ended` after `seconds`, and last the result, when every request has its answer. It also ends when its
standard input does, so it never outlives the one who started it.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import msgspec
import uvloop

ANSWERS_WITHIN_S = 30.0
RETRY_AFTER_MOST_S = 1.0
FAILURES_MOST = 5


class Plan(msgspec.Struct, frozen=True):
    """`bodies` is a file: a MessagePack array of request bodies, `events` in each. `numbered` adds Penstock-Producer."""

    port: int
    bodies: str
    events: int
    connections: int
    warm_up_s: float
    seconds: float
    zipped: bool
    numbered: bool
    producer: str


class Mark(msgspec.Struct, frozen=True, tag="mark"):
    """`began` or `ended`."""

    state: str


class Latency(msgspec.Struct, frozen=True):
    """ms from the first sending of a batch to its 200."""

    p50: float
    p99: float
    max: float


class Result(msgspec.Struct, frozen=True, tag="result"):
    """The first group is of the measured window, `sent` and `accepted` (events) and the rest of all that was done.

    `unclear` are requests that ended without an answer from which one knows whether the batch is stored.
    """

    seconds: float
    answers: int
    accepted_in_window: int
    latency_ms: Latency
    cpu_s: float
    sent: int
    accepted: int
    busy: int
    unclear: int
    failures: list[str]


class Load:
    """All lanes and their counts."""

    def __init__(self, plan: Plan, requests: Sequence[tuple[bytes, bytes]]) -> None:
        self.plan = plan
        self.requests = requests
        self.stopping = False
        self.accepted = 0
        self.sent = 0
        self.busy = 0
        self.failures: list[str] = []
        self.latencies: list[float] = []
        self.running: set[Lane] = set()
        self.done = asyncio.Event()
        self._began: tuple[float, float, int] | None = None
        self._window: tuple[float, float, int, list[float]] | None = None

    async def run(self) -> Result:
        loop = asyncio.get_running_loop()
        loop.add_reader(0, self._stdin)
        for number in range(self.plan.connections):
            lane = Lane(self, number)
            self.running.add(lane)
            await loop.create_connection(lambda lane=lane: lane, "127.0.0.1", self.plan.port)  # type: ignore[misc]
        begin = loop.call_later(self.plan.warm_up_s, self._begin)
        end = loop.call_later(self.plan.warm_up_s + self.plan.seconds, self._end)
        await self.done.wait()
        begin.cancel()
        end.cancel()
        unclear = len(self.running)
        self._end()
        assert self._window is not None
        seconds, cpu_s, accepted, latencies = self._window
        return Result(
            seconds,
            len(latencies),
            accepted,
            latency_ms(latencies),
            cpu_s,
            self.sent,
            self.accepted,
            self.busy,
            unclear,
            self.failures,
        )

    def ended(self, lane: Lane, failure: str) -> None:
        """A lane that has nothing under way, or failed."""
        if failure and len(self.failures) < FAILURES_MOST:
            self.failures.append(failure)
        if not failure:
            self.running.discard(lane)
        lane.close()
        if not any(lane.open for lane in self.running):
            self.done.set()

    def _stdin(self) -> None:
        if not os.read(0, 4096):
            asyncio.get_running_loop().remove_reader(0)
            self._end()

    def _begin(self) -> None:
        self.latencies = []
        self._began = (time.perf_counter(), time.process_time(), self.accepted)
        tell(Mark("began"))

    def _end(self) -> None:
        if self.stopping:
            return
        if self._began is None:
            self._begin()
        assert self._began is not None
        at, cpu_s, accepted = self._began
        self._window = (time.perf_counter() - at, time.process_time() - cpu_s, self.accepted - accepted, self.latencies)
        self.latencies = []
        self.stopping = True
        tell(Mark("ended"))
        asyncio.get_running_loop().call_later(ANSWERS_WITHIN_S, self.done.set)


class Lane(asyncio.Protocol):
    """One connection: sends a batch, waits for its answer, sends the next; after a 503 the same again."""

    def __init__(self, load: Load, number: int) -> None:
        self.open = True
        self._load = load
        self._transport: asyncio.Transport | None = None
        self._next = number * len(load.requests) // load.plan.connections
        self._producer = f"{load.plan.producer}-{number}".encode()
        self._numbered = load.plan.numbered
        self._sequence = 0
        self._request = (b"", b"")
        self._received = b""
        self._began = 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._send()

    def connection_lost(self, exc: Exception | None) -> None:
        if self.open:
            self._load.ended(self, f"the connection was lost: {exc}")

    def close(self) -> None:
        self.open = False
        if self._transport is not None:
            self._transport.close()

    def data_received(self, data: bytes) -> None:
        if self._received:
            data = self._received + data
        head_end = whole_head(data)
        if not head_end:
            self._received = data
            return
        self._received = b""
        load = self._load
        if data[9:12] == b"200":
            load.accepted += accepted_in(data, head_end)
            load.latencies.append(time.perf_counter() - self._began)
            self._send()
        elif data[9:12] == b"503":
            load.busy += 1
            asyncio.get_running_loop().call_later(retry_after_s(data, head_end), self._write)
        else:
            load.ended(self, data[:2000].decode("latin-1"))

    def _send(self) -> None:
        load = self._load
        if load.stopping:
            load.ended(self, "")
            return
        head, tail = load.requests[self._next]
        self._next = (self._next + 1) % len(load.requests)
        if self._numbered:
            self._sequence += 1
            head = b"%b%b;epoch=1;sequence=%d;sha256=" % (head, self._producer, self._sequence)
        self._request = (head, tail)
        load.sent += load.plan.events
        self._began = time.perf_counter()
        self._write()

    def _write(self) -> None:
        if self._transport is not None and self.open:
            self._transport.writelines(self._request)


def whole_head(data: bytes) -> int:
    """Where the head of an answer ends; 0 until the answer is whole."""
    head_end = data.find(b"\r\n\r\n")
    length_at = data.find(b"Content-Length: ", 0, head_end) + 16
    if head_end < 0 or len(data) < head_end + 4 + int(data[length_at : data.find(b"\r\n", length_at)]):
        return 0
    return head_end


def accepted_in(answer: bytes, head_end: int) -> int:
    """Events, of a 200."""
    at = answer.find(b'"accepted":', head_end) + 11
    return int(answer[at : answer.find(b",", at)])


def retry_after_s(answer: bytes, head_end: int) -> float:
    at = answer.find(b"Retry-After: ", 0, head_end) + 13
    told_s = float(answer[at : answer.find(b"\r\n", at)]) if at > 12 else RETRY_AFTER_MOST_S
    return min(told_s, RETRY_AFTER_MOST_S)


def prepared(port: int, bodies: Sequence[bytes], *, zipped: bool, numbered: bool) -> list[tuple[bytes, bytes]]:
    """Requests as what stands before the producer's number and what stands behind it."""
    kind = b"application/x-ndjson\r\nContent-Encoding: gzip" if zipped else b"application/json"
    requests = []
    for body in bodies:
        head = b"POST /v1/events HTTP/1.1\r\nHost: 127.0.0.1:%d\r\nContent-Type: %b\r\nContent-Length: %d\r\n" % (
            port,
            kind,
            len(body),
        )
        if numbered:
            digest = hashlib.sha256(body).hexdigest().encode()
            requests.append((head + b"Penstock-Producer: ", digest + b"\r\n\r\n" + body))
        else:
            requests.append((head, b"\r\n" + body))
    return requests


def latency_ms(seconds: Sequence[float]) -> Latency:
    ordered = sorted(seconds)
    return Latency(*(_at(ordered, part) for part in (0.5, 0.99, 1.0)))


def _at(ordered: Sequence[float], part: float) -> float:
    return round(1000 * ordered[min(len(ordered) - 1, int(part * len(ordered)))], 3) if ordered else 0.0


def tell(what: msgspec.Struct) -> None:
    sys.stdout.buffer.write(msgspec.json.encode(what) + b"\n")
    sys.stdout.buffer.flush()


def main() -> None:
    plan = msgspec.json.decode(sys.argv[1], type=Plan)
    bodies = msgspec.msgpack.decode(Path(plan.bodies).read_bytes(), type=list[bytes])

    async def run() -> Result:
        requests = prepared(plan.port, bodies, zipped=plan.zipped, numbered=plan.numbered)
        return await Load(plan, requests).run()

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        tell(runner.run(run()))


if __name__ == "__main__":
    main()
