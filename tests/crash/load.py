"""Load that remembers: threads that send batches and repeat each one, with its number, until it is answered."""

from __future__ import annotations

import hashlib
import http.client
import itertools
import json
import random
import threading
from collections.abc import Callable, Mapping
from urllib.parse import urlsplit

from tests.e2e.oracle import Batch

DEVICES_OF_A_LANE = 6
PACE_S = 0.01  # between two batches of a lane: enough to keep commits going, not so much that the oracle takes minutes


class Lane(threading.Thread):
    """One producer with devices of its own; one batch in flight. Without `numbered` the hub cannot recognise a copy."""

    def __init__(
        self,
        name: str,
        url: Callable[[], str],
        seed: int,
        *,
        numbered: bool = True,
        headers: Mapping[str, str],
        pace_s: float = PACE_S,
    ) -> None:
        super().__init__(name=name, daemon=True)
        self.batches: list[Batch] = []
        self.confirmed = 0
        self.repeated = 0
        self.duplicates = 0
        self.unexpected: list[str] = []
        self.codes: set[str] = set()
        self._url = url
        self._random = random.Random(f"{seed} {name}")
        self._numbered = numbered
        self._headers = headers
        self._pace_s = pace_s
        self._events = itertools.count()
        self._ending = threading.Event()
        self._abandon = threading.Event()
        self._connection: http.client.HTTPConnection | None = None

    def run(self) -> None:
        while not self._ending.is_set():
            lines = [self._event() for _ in range(self._random.choice((1, 1, 5, 20, 60)))]
            batch = Batch(lines, confirmed=False)
            self.batches.append(batch)
            self._until_answered(batch)
            self._ending.wait(self._pace_s)
        self._close()

    def stop(self) -> None:
        """Ends when the batch in flight is answered."""
        self._ending.set()

    def abandon(self) -> None:
        """Ends although the batch in flight may not have been answered."""
        self._ending.set()
        self._abandon.set()

    def _event(self) -> bytes:
        number = next(self._events)
        device = f"{self.name}-{self._random.randrange(DEVICES_OF_A_LANE)}"
        padding = "x" * self._random.choice((0, 10, 10, 200))
        return f'{{"deviceId":"{device}","n":{number},"value":{self._random.random()},"pad":"{padding}"}}'.encode()

    def _until_answered(self, batch: Batch) -> None:
        body = b"\n".join(batch.lines) + b"\n"
        headers = {"Content-Type": "application/x-ndjson", **self._headers}
        if self._numbered:
            # `after` is the number before: this lane has nothing else in flight.
            sequence = len(self.batches)
            sha256 = hashlib.sha256(body).hexdigest()
            number = f"{self.name};epoch=1;sequence={sequence};after={sequence - 1};sha256={sha256}"
            headers["Penstock-Producer"] = number
        while not self._abandon.is_set():
            status, answer = self._post(body, headers)
            if status == 200:
                reply = json.loads(answer)
                if (reply["accepted"], reply["rejected"]) != (len(batch.lines), []):
                    self.unexpected.append(answer.decode())
                self.duplicates += reply["duplicate"]
                batch.confirmed = True
                self.confirmed += 1
                return
            if status not in (0, 503):
                self.unexpected.append(f"{status} {answer.decode()}")
                return
            self.repeated += 1
            if status == 503:
                self.codes.add(json.loads(answer)["code"])
            self._abandon.wait(0.02)

    def _post(self, body: bytes, headers: dict[str, str]) -> tuple[int, bytes]:
        """Status 0: no answer, so it may or may not be stored."""
        try:
            if self._connection is None:
                self._connection = http.client.HTTPConnection(urlsplit(self._url()).netloc, timeout=20)
            self._connection.request("POST", "/v1/events", body, headers)
            with self._connection.getresponse() as response:
                answer = response.status, response.read()
            if response.will_close:
                self._close()
        except (OSError, http.client.HTTPException):
            self._close()
            return 0, b""
        return answer

    def _close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None


class Load:
    """Several lanes at once. `url` is asked at each connection: a system that is started again has other ports.

    `headers`: what opens the system, if it has keys.
    """

    def __init__(
        self,
        url: Callable[[], str],
        *,
        lanes: int = 6,
        seed: int,
        numbered: bool = True,
        headers: Mapping[str, str] | None = None,
        pace_s: float = PACE_S,
    ) -> None:
        self.lanes = [
            Lane(f"lane{i}", url, seed, numbered=numbered, headers=headers or {}, pace_s=pace_s) for i in range(lanes)
        ]

    def start(self) -> Load:
        for lane in self.lanes:
            lane.start()
        return self

    @property
    def confirmed(self) -> int:
        return sum(lane.confirmed for lane in self.lanes)

    @property
    def repeated(self) -> int:
        return sum(lane.repeated for lane in self.lanes)

    @property
    def duplicates(self) -> int:
        return sum(lane.duplicates for lane in self.lanes)

    @property
    def codes(self) -> set[str]:
        """Of the answers that were not 200."""
        return {code for lane in self.lanes for code in lane.codes}

    @property
    def batches(self) -> list[list[Batch]]:
        return [lane.batches for lane in self.lanes]

    def is_quiet(self, for_s: float) -> bool:
        """Whether nothing has been answered for so long."""
        before = self.confirmed
        threading.Event().wait(for_s)
        return self.confirmed == before

    def stop(self, deadline_s: float = 60.0) -> None:
        """Returns when every batch is answered."""
        for lane in self.lanes:
            lane.stop()
        self._join(deadline_s)

    def abandon(self) -> None:
        for lane in self.lanes:
            lane.abandon()
        self._join(30.0)

    def _join(self, deadline_s: float) -> None:
        for lane in self.lanes:
            lane.join(deadline_s)
            assert not lane.is_alive(), f"{lane.name} has no answer for its batch"
            assert lane.unexpected == []
