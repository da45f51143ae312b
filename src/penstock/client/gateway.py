"""A simulated gateway: posts what its devices say, as a producer, and keeps account of what was answered.

A batch keeps its bytes and its number until an answer settles it, as the client's do; one batch is under way at a time, so each
device's order is kept. Some batches are posted again after their answer; the hub must recognise them. With faults, the gateway
misbehaves before it posts a batch as it should, and some events are wrong: each of these has one right answer too.
"""

from __future__ import annotations

import hashlib
import itertools
import queue
import random
import threading
import zlib
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence

import msgspec

from penstock.client.answers import Again, NewProducer, Paused, Reaction, Refused, Settled, reaction
from penstock.client.misconduct import Misconduct
from penstock.client.transport import Answer, Transport
from penstock.clock import Clock
from penstock.errors import HubUnavailable

Post = Callable[[bytes, Mapping[str, str]], Answer]

BATCH_EVENTS_MAX = 1000
WAITING_MAX = 64
_BACKOFF_S = (0.1, 5.0)
_PROBLEMS_MAX = 3  # of one gateway: a hub that is wrong at all is so at every batch
_COPY_EVERY, _COPY_FIRST = 20, 3
_FAULT_EVERY, _WRONG_EVERY = 5, 4

FAULTS = ("body cut", "answer not awaited", "wrong sha256", "gzip cut", "slow body", "number reused", "no valid event")
WRONG = {
    "not_json": b"temperature=21.4",
    "not_utf8": b'{"deviceId":"sim","place":"\xff"}',
    "not_an_object": b'["deviceId","sim"]',
    "no_device": b'{"temperature":21.4}',
    "bad_device": b'{"deviceId":"no spaces, please"}',
    "reserved_field": b'{"deviceId":"sim","receivedAt":"1970-01-01T00:00:00.000Z"}',
}
_HEADERS = {
    "Content-Type": "application/x-ndjson",
    "Content-Encoding": "gzip",
    "Penstock-Device-Field": "deviceId",
}
_ID_AT = len(b'{"deviceId":"')


def device_of(line: bytes) -> bytes:
    """The device of an event as a fleet makes it."""
    return line[_ID_AT : line.find(b'"', _ID_AT)]


class Account:
    """How many events there are of each device, and a checksum over them in their order."""

    def __init__(self) -> None:
        self.devices: dict[bytes, tuple[int, int]] = {}

    def add(self, lines: Iterable[bytes]) -> None:
        """Events as a fleet makes them, without the brace at the end: before that stands the server's stamp."""
        for line in lines:
            device = device_of(line)
            count, crc = self.devices.get(device, (0, 0))
            self.devices[device] = (count + 1, zlib.crc32(line, crc))


class Tally(msgspec.Struct):
    """What a gateway did, and what it was answered. `given`: events of the fleet; `spoilt`: wrong ones that the gateway added.

    `copies` are events that were posted again after their answer.

    `stored` is the number of the last batch that the hub has, `why` the last answer that settled nothing; `unsettled` are the lines
    of batches that were posted and not answered for: the hub may have them or not.
    """

    producer: str
    given: int = 0
    spoilt: int = 0
    accepted: int = 0
    rejected: int = 0
    duplicates: int = 0
    copies: int = 0
    retries: int = 0
    stored: int = 0
    took_s: array[float] = msgspec.field(default_factory=lambda: array("f"))
    faults: Counter[str] = msgspec.field(default_factory=Counter)
    problems: list[str] = []
    why: str = ""
    account: Account = msgspec.field(default_factory=Account)
    unsettled: list[Sequence[bytes]] = []

    @property
    def sent(self) -> int:
        # Two numbers, because each is for one thread to count.
        return self.given + self.spoilt


class _Batch(msgspec.Struct, frozen=True):
    """A body under its number. `wrong`: place → code of the events that must be rejected."""

    lines: Sequence[bytes]
    wrong: Mapping[int, str]
    body: bytes
    number: str
    echo: str

    def headers(self, body: bytes) -> dict[str, str]:
        """Of this batch's number, with other bytes or its own."""
        return {**_HEADERS, "Penstock-Producer": f"{self.number};sha256={hashlib.sha256(body).hexdigest()}"}


class Gateway:
    """`put` and `close` are for the thread of the schedule, `run` is the gateway's own. `misconduct` is there if there are to be faults.

    `knows_numbers`: the hub recognises a number that was used when it answers. Else it takes what comes under one, and readers judge.
    """

    def __init__(
        self,
        producer: str,
        transport: Transport,
        *,
        misconduct: Misconduct | None,
        knows_numbers: bool = True,
        chance: random.Random,
        clock: Clock,
        stop: threading.Event,
    ) -> None:
        self.tally = Tally(producer)
        self._transport = transport
        self._misconduct = misconduct
        self._knows_numbers = knows_numbers
        self._chance = chance
        self._clock = clock
        self._stop = stop
        self._waiting: queue.SimpleQueue[tuple[list[bytes], bool] | None] = queue.SimpleQueue()
        self._sequence = 0
        self._faults = itertools.cycle(chance.sample(FAULTS, len(FAULTS)))
        self._wrong = itertools.cycle(WRONG.items())

    @property
    def full(self) -> bool:
        return self._waiting.qsize() >= WAITING_MAX

    def put(self, lines: list[bytes], *, reconnect: bool = False) -> None:
        """Events to be posted; on a new connection, if the gateway was out of reach before."""
        self.tally.given += len(lines)
        self._waiting.put((lines, reconnect))

    def close(self) -> None:
        """Nothing more will come."""
        self._waiting.put(None)

    def run(self) -> None:
        """Returns when all is answered, or soon after `stop`. Behind a batch that was not settled nothing is posted: the order is lost."""
        try:
            while (load := self._waiting.get()) is not None:
                lines, reconnect = load
                if reconnect:
                    self._transport.close()
                for at in range(0, len(lines), BATCH_EVENTS_MAX):
                    if not self._stop.is_set() and not self.tally.unsettled:
                        self._deliver(lines[at : at + BATCH_EVENTS_MAX])
        finally:
            self._transport.close()

    def _deliver(self, lines: list[bytes]) -> None:
        wrong: dict[int, str] = {}
        fault = ""
        following = self._sequence + 1
        if self._misconduct and following % _WRONG_EVERY == 0:
            place = self._chance.randrange(len(lines) + 1)
            wrong[place], line = next(self._wrong)
            lines = [*lines[:place], line, *lines[place:]]
            self.tally.spoilt += 1
        if self._misconduct and following % _FAULT_EVERY == 0:
            fault = next(self._faults)
            self.tally.faults[fault] += 1
        if fault == "no valid event":
            self.tally.spoilt += len(WRONG)
            if not self._settle(self._batch([*WRONG.values()], dict(enumerate(WRONG))), self._post):
                return
        batch = self._batch(lines, wrong)
        self._misbehave(fault, batch)
        slow = self._misconduct if fault == "slow body" else None
        settled = self._settle(batch, slow.dawdle if slow else self._post)
        if settled and fault == "number reused":
            self._reuse(batch)
        if settled and self._sequence % _COPY_EVERY == _COPY_FIRST:
            self._copy(batch)

    def _batch(self, lines: Sequence[bytes], wrong: Mapping[int, str]) -> _Batch:
        self._sequence += 1
        producer, sequence = self.tally.producer, self._sequence
        number = f"{producer};epoch=1;sequence={sequence};after={self.tally.stored}"
        return _Batch(lines, wrong, _zipped(lines), number, f"{producer}:1:{sequence}")

    def _misbehave(self, fault: str, batch: _Batch) -> None:
        """What comes before the batch is posted as it should be. None of it may count, or be counted twice."""
        body = batch.body
        if fault in ("body cut", "answer not awaited") and self._misconduct:
            after_bytes = len(body) // 2 if fault == "body cut" else len(body)
            self._misconduct.leave(body, batch.headers(body), after_bytes=after_bytes)
        elif fault == "wrong sha256":
            self._refused(batch, body, "body_mismatch", announced=b"")
        elif fault == "gzip cut":
            self._refused(batch, body[:-4], "malformed_gzip")

    def _settle(self, batch: _Batch, post: Post) -> bool:
        """Post until the batch is answered, and account for it; False if there was no such answer."""
        tally, failed = self.tally, 0
        tally.unsettled.append(batch.lines)
        while not self._stop.is_set():
            answered = self._ask(batch, batch.headers(batch.body), batch.body, post)
            if isinstance(answered, Settled):
                tally.unsettled.pop()
                self._account(batch, answered)
                return True
            if not isinstance(answered, Again | Paused):
                self._say(f"{batch.echo}: the batch is in order, but was answered {_words(answered)}")
                break
            tally.retries += 1
            tally.why = answered.why
            after_s = (isinstance(answered, Again) and answered.retry_after_s) or 0.0
            first, most = _BACKOFF_S
            self._clock.wait(self._stop, after_s + self._chance.random() * min(most, first * 2 ** min(failed, 30)))
            failed += 1
        return False

    def _account(self, batch: _Batch, settled: Settled) -> None:
        tally = self.tally
        rejected = {one.index: one.code for one in settled.rejected}
        if rejected != batch.wrong:
            self._say(f"{batch.echo}: rejected were {rejected}, and should have been {dict(batch.wrong)}")
        tally.accepted += settled.accepted
        tally.rejected += len(rejected)
        tally.duplicates += settled.accepted if settled.duplicate else 0
        tally.stored = self._sequence if settled.stored else tally.stored
        tally.account.add([line[:-1] for place, line in enumerate(batch.lines) if place not in rejected])

    def _copy(self, batch: _Batch) -> None:
        """Post a batch again that was answered."""
        answered = self._ask(batch, batch.headers(batch.body), batch.body, self._post)
        if isinstance(answered, Settled):
            self.tally.copies += answered.accepted
            self.tally.duplicates += answered.accepted if answered.duplicate else 0
        as_it_should = isinstance(answered, Settled) and (answered.duplicate or not self._knows_numbers)
        if not as_it_should and not isinstance(answered, Again):
            self._say(f"{batch.echo}: it was posted again after its answer, and not recognised: {_words(answered)}")

    def _reuse(self, batch: _Batch) -> None:
        """Post other bytes under the number of a batch that was answered."""
        lines = [*batch.lines, batch.lines[0]]
        other = msgspec.structs.replace(batch, lines=lines, body=_zipped(lines))
        if self._knows_numbers:
            self._refused(other, other.body, "number_reused")
            return
        answered = self._ask(other, other.headers(other.body), other.body, self._post)
        if not isinstance(answered, Settled | Again):
            self._say(
                f"{batch.echo}: other bytes under its number are for readers to judge, but were answered {_words(answered)}"
            )

    def _refused(self, batch: _Batch, body: bytes, code: str, *, announced: bytes | None = None) -> None:
        """Post what must not be taken. No answer, or one for later, says nothing."""
        headers = batch.headers(body if announced is None else announced)
        answered = self._ask(batch, headers, body, self._post)
        as_it_should = isinstance(answered, Refused | NewProducer) and answered.code == code
        if not as_it_should and not isinstance(answered, Again):
            self._say(f"{batch.echo}: {code} should have been the answer, and not {_words(answered)}")

    def _ask(self, batch: _Batch, headers: Mapping[str, str], body: bytes, post: Post) -> Reaction:
        try:
            answer = post(body, headers)
        except HubUnavailable as error:
            return Again(error.detail)
        return reaction(answer, batch=batch.echo, events=len(batch.lines), now_ms=self._clock.now_ms())

    def _post(self, body: bytes, headers: Mapping[str, str]) -> Answer:
        began = self._clock.monotonic()
        answer = self._transport.post(body, headers)
        self.tally.took_s.append(self._clock.monotonic() - began)
        return answer

    def _say(self, problem: str) -> None:
        if len(self.tally.problems) < _PROBLEMS_MAX:
            self.tally.problems.append(problem)


def _zipped(lines: Sequence[bytes]) -> bytes:
    return zlib.compress(b"\n".join(lines) + b"\n", 1, 31)


def _words(answered: Reaction) -> str:
    return f"{type(answered).__name__} {msgspec.json.encode(answered).decode()}"
