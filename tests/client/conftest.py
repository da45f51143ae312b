"""An API in memory that keeps the producers' table, loses answers, refuses and lies.

The numbers of cases in the tests are those of the fault catalogue (faults.md).
"""

from __future__ import annotations

import gzip
import hashlib
import itertools
import re
import threading
from collections.abc import Callable, Iterator, Mapping

import msgspec

from penstock.client.transport import Answer
from penstock.errors import HubUnavailable

_NUMBER = re.compile(r"([a-z0-9-]+);epoch=1;sequence=(\d+);after=(\d+);sha256=([0-9a-f]{64})")

Fault = Callable[["MemoryApi", bytes, str], Answer | None]


def answer(status: int, body: object, **headers: str) -> Answer:
    return Answer(status, {name.replace("_", "-"): value for name, value in headers.items()}, msgspec.json.encode(body))


def problem(status: int, code: str, *, retryable: bool, **headers: str) -> Answer:
    return answer(status, {"code": code, "detail": "why", "retryable": retryable}, **headers)


class MemoryApi:
    """Stores what a hub would store. A fault sees the request before it is stored, and may answer instead."""

    def __init__(self, *faults: Fault | None, lines_max: int = 10_000) -> None:
        self.stored: list[bytes] = []
        self.numbers: dict[tuple[str, int], tuple[str, int]] = {}
        self.seen: list[str] = []
        self.last: dict[str, int] = {}
        self.gaps = 0
        self.lines_max = lines_max
        self._faults: Iterator[Fault | None] = itertools.chain(faults, itertools.repeat(None))
        self._lock = threading.Lock()

    def post(self, body: bytes, headers: Mapping[str, str]) -> Answer:
        with self._lock:
            number = headers["Penstock-Producer"]
            self.seen.append(number)
            fault = next(self._faults)
            instead = fault(self, body, number) if fault else None
            return instead or self.store(body, number)

    def store(self, body: bytes, number: str) -> Answer:
        match = _NUMBER.fullmatch(number)
        assert match
        producer, sequence, after, sha256 = match[1], int(match[2]), int(match[3]), match[4]
        assert hashlib.sha256(body).hexdigest() == sha256
        lines = gzip.decompress(body).splitlines()
        if len(lines) > self.lines_max:
            return problem(413, "batch_too_large", retryable=False)
        known = self.numbers.get((producer, sequence))
        if known and known[0] != sha256:
            return problem(422, "number_reused", retryable=False)
        good = [line for line in lines if not line.startswith(b"!")]
        bad = [
            {"index": i, "code": "not_json", "detail": "why"} for i, line in enumerate(lines) if line.startswith(b"!")
        ]
        if not good:
            return answer(400, {"code": "no_valid_event", "detail": "none", "retryable": False, "rejected": bad})
        if not known:
            self.gaps += after != self.last.get(producer, 0)
            self.last[producer] = sequence
            self.numbers[producer, sequence] = (sha256, len(good))
            self.stored += good
        return answer(
            200,
            {
                "batch": f"{producer}:1:{sequence}",
                "accepted": len(good),
                "duplicate": known is not None,
                "rejected": bad,
            },
        )

    def close(self) -> None:
        return


def lost_answer(api: MemoryApi, body: bytes, number: str) -> Answer | None:
    api.store(body, number)
    raise HubUnavailable("the connection broke")


def never_arrived(api: MemoryApi, body: bytes, number: str) -> Answer | None:
    raise HubUnavailable("refused")


def says(reply: Answer) -> Fault:
    return lambda _api, _body, _number: reply
