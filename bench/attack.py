"""The hostile load, a process of its own: `python -m bench.attack PLAN`.

It holds idle connections and slow ones (a byte a second), and attacks at a rate, until it is told to end. An attack is one of: a row of
bench/refused.py with a good event smuggled behind it; a bomb (gzip, zstd, nested); a request with one damaged place (fuzz); random bytes; a
wrong token with a good event; a connection that is reset in the middle; one that asks much and reads nothing. Nothing of them may be
stored: each event has the device `hostile`, and a damaged request has three reasons to be refused, of which the damage can remove one.
Marks and the end with standard input are as those of bench.load.
"""

from __future__ import annotations

import asyncio
import gzip
import os
import random
import resource
import socket
import struct
import sys
from collections import Counter
from collections.abc import Callable, Coroutine, Sequence

import msgspec
import uvloop
import zstandard

from bench.load import Mark, tell
from bench.refused import DEVICE, REFUSED, WHOLE, head

SOURCES = 20
KINDS = {"refused": 50, "fuzz": 30, "noise": 10, "hang up": 10, "token": 10, "deaf": 3, "bomb": 2}
"""How often each kind comes, of their sum."""

_ANSWER_S = 10.0
_UNEXPECTED_MOST = 5
_SPARE_FILES = 500
_TICKS = 20
_OPENED_PER_S = 500  # so that they are not all ended and opened again in one moment
_OPEN_AT_ONCE = 10
_RESET = struct.pack("ii", 1, 0)
_RESERVED = b'{"deviceId":"%b","receivedAt":1}' % DEVICE


class Plan(msgspec.Struct, frozen=True):
    """`idle` and `slow` connections are held, and opened again when the server ends them; `rate` attacks a second on top. `tokens`: the
    server asks for keys, so that wrong ones are among the attacks."""

    port: int
    idle: int
    slow: int
    rate: float
    tokens: bool
    seed: int = 1


class AttackResult(msgspec.Struct, frozen=True, tag="result"):
    """`idle` and `slow` are what was open when it began, `reopened` how often the server ended one. Answers are counted by kind and status,
    0: none. `unexpected` are answers that no attack may get."""

    idle: int
    slow: int
    reopened: int
    answers: dict[str, dict[int, int]]
    unexpected: list[str]


def bombs() -> list[tuple[bytes, bytes]]:
    """Content-Encoding and body; each is 16 MiB or more when it is unzipped."""
    zeros = bytes(64 << 20)
    events = b'{"deviceId":"%b"}\n' % DEVICE * ((16 << 20) // 22)
    return [
        (b"gzip", gzip.compress(zeros)),
        (b"zstd", zstandard.compress(zeros)),
        (b"gzip", gzip.compress(gzip.compress(zeros))),
        (b"gzip", gzip.compress(b"\n" * (16 << 20))),
        (b"gzip", gzip.compress(events)),
    ]


def damaged(rng: random.Random) -> bytes:
    """A request with one place changed. Wrong are the sha256, the body, which is no gzip, and the event, which has a reserved field."""
    whole = bytearray(
        head(
            b"Penstock-Producer: p;epoch=1;sequence=1;sha256=" + b"0" * 64,
            b"Host: h",
            b"Content-Type: application/x-ndjson",
            b"Accept: */*",
            b"Content-Encoding: gzip",
            b"Content-Length: %d" % len(_RESERVED),
        )
        + _RESERVED
    )
    at = rng.randrange(len(whole))
    change = rng.randrange(4)
    if change == 0:
        whole[at] = rng.randrange(256)
    elif change == 1:
        whole[at:at] = rng.randbytes(rng.randrange(1, 9))
    elif change == 2:
        del whole[at : at + rng.randrange(1, 9)]
    else:
        del whole[at:]
    return bytes(whole)


class Held:
    """An idle connection; with a start, a slow one: its owner has it send a byte now and then. Opened again when the server ends it."""

    def __init__(self, attack: Attack, number: int, start: bytes) -> None:
        self._attack = attack
        self._source = (f"127.0.0.{2 + number % SOURCES}", 0)
        self._start = start
        self._next = start
        self._socket: socket.socket | None = None

    @property
    def is_open(self) -> bool:
        return self._socket is not None

    def open(self) -> None:
        """A plain socket: ten thousand of a loop's own would cost the machine more than the server."""
        made = socket.socket()
        made.setblocking(False)
        made.bind(self._source)
        made.connect_ex(("127.0.0.1", self._attack.plan.port))
        self._socket, self._next = made, self._start
        asyncio.get_running_loop().add_reader(made, self._read)

    def drip(self) -> None:
        if self._socket is None:
            return
        try:
            self._socket.send(self._next)
            self._next = b"x"
        except BlockingIOError:  # not connected yet
            return
        except OSError:
            self._lose()

    def _read(self) -> None:
        assert self._socket is not None
        try:
            if not self._socket.recv(65536):
                self._lose()
        except OSError:
            self._lose()

    def _lose(self) -> None:
        assert self._socket is not None
        loop = asyncio.get_running_loop()
        loop.remove_reader(self._socket)
        self._socket.close()
        self._socket = None
        if not self._attack.ending.is_set():
            self._attack.reopened += 1
            loop.call_later(1.0, self.open)


class Attack:
    """All that is held, and what came of the attacks."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.answers: dict[str, Counter[int]] = {kind: Counter() for kind in KINDS}
        self.unexpected: list[str] = []
        self.reopened = 0
        self.ending = asyncio.Event()
        self._random = random.Random(plan.seed)
        self._bombs = bombs() if plan.rate else []
        self._rows = list(REFUSED.items())
        self._tasks: set[asyncio.Task[None]] = set()
        self._held: list[Held] = []
        self._slow: list[Held] = []

    async def run(self) -> AttackResult:
        asyncio.get_running_loop().add_reader(0, self._stdin)
        plan = self.plan
        room = resource.getrlimit(resource.RLIMIT_NOFILE)[1] - _SPARE_FILES
        starts = (WHOLE[:1], WHOLE[:60], WHOLE[:-2])
        self._slow = [Held(self, number, starts[number % 3]) for number in range(min(plan.slow, room))]
        self._held = [Held(self, number, b"") for number in range(min(plan.idle, room - len(self._slow)))]
        every = [*self._slow, *self._held]
        for at, one in enumerate(every):
            one.open()
            if at % _OPEN_AT_ONCE == 0:
                await asyncio.sleep(_OPEN_AT_ONCE / _OPENED_PER_S)
        await asyncio.sleep(1.0)
        idle, slow = (sum(one.is_open for one in some) for some in (self._held, self._slow))
        tell(Mark("began"))
        self._spawn(self._drip())
        if plan.rate:
            self._spawn(self._attack())
        await self.ending.wait()
        tell(Mark("ended"))
        for task in self._tasks:
            task.cancel()
        answers = {kind: dict(counts) for kind, counts in self.answers.items()}
        return AttackResult(idle, slow, self.reopened, answers, self.unexpected[:_UNEXPECTED_MOST])

    def _spawn(self, work: Coroutine[object, object, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _stdin(self) -> None:
        if not os.read(0, 4096):
            asyncio.get_running_loop().remove_reader(0)
            self.ending.set()

    async def _drip(self) -> None:
        """A byte a second for each slow connection."""
        tick = 0
        while True:
            tick = (tick + 1) % _TICKS
            for held in self._slow[tick::_TICKS]:
                held.drip()
            await asyncio.sleep(1 / _TICKS)

    async def _attack(self) -> None:
        kinds, weights = list(KINDS), list(KINDS.values())
        while True:
            kind = self._random.choices(kinds, weights)[0]
            if kind != "token" or self.plan.tokens:
                self._spawn(self._one(kind))
            await asyncio.sleep(self._random.expovariate(self.plan.rate))

    async def _one(self, kind: str) -> None:
        status, expected, said = 0, None, b""
        try:
            source = (f"127.0.0.{2 + self._random.randrange(SOURCES)}", 0)
            reader, writer = await asyncio.open_connection("127.0.0.1", self.plan.port, local_addr=source)
            try:
                expected = self._send(kind, writer)
                if kind == "deaf":
                    await asyncio.sleep(3.0)
                elif kind == "hang up":
                    _linger(writer)
                else:
                    said = await asyncio.wait_for(reader.read(1 << 20), _ANSWER_S if expected else 1.0)
            finally:
                writer.transport.abort()
        except (OSError, TimeoutError):
            status = 0
        if said[:9] == b"HTTP/1.1 ":
            status = int(said[9:12])
        self.answers[kind][status] += 1
        if status in (200, 500) or (status and expected and status not in (*expected, 503)):
            self.unexpected.append(f"{kind}: {expected} was expected: {said[:300].decode('latin-1')}")

    def _send(self, kind: str, writer: asyncio.StreamWriter) -> Sequence[int] | None:
        """What may be answered; None: anything but 200."""
        rng = self._random
        if kind == "refused":
            _, row = rng.choice(self._rows)
            writer.write(row.data + WHOLE)
            return (row.status,)
        if kind == "bomb":
            encoding, body = rng.choice(self._bombs)
            writer.write(head(b"Host: h", b"Content-Encoding: " + encoding, b"Content-Length: %d" % len(body)) + body)
            return (400, 413)
        if kind == "token":
            token = rng.choice((b"x", b"\xe9", b"x" * 10_000, b"SharedAccessSignature sr=x&sig=y&se=1&skn=z"))
            writer.write(WHOLE.replace(b"Host: h", b"Host: h\r\nAuthorization: Bearer " + token, 1))
            return (401, 403)
        others: dict[str, Callable[[], bytes]] = {
            "fuzz": lambda: damaged(rng),
            "noise": lambda: rng.randbytes(rng.randrange(1, 2000)),
            "hang up": lambda: WHOLE[: rng.randrange(1, len(WHOLE))],
            "deaf": lambda: head(b"Host: h", line=b"GET /nothing HTTP/1.1") * 2000,
        }
        writer.write(others[kind]())
        return None


def _linger(writer: asyncio.StreamWriter) -> None:
    writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)


def main() -> None:
    plan = msgspec.json.decode(sys.argv[1], type=Plan)
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))

    async def run() -> AttackResult:
        return await Attack(plan).run()

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        tell(runner.run(run()))


if __name__ == "__main__":
    main()
