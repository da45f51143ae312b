"""The hub of another process, read through its API: `GET /v1/partitions…` (docs/hosts.md, Over HTTP).

What is read is checked as if it lay on a bad disk: the hub's identity, every frame's checksums, that frames and offsets follow
from one another. Anything that is wrong with the answer and not with the log is HubUnavailable: to ask again may help. What
the log itself says (OffsetTrimmed, OffsetBeyondEnd, FrameDamaged, ReaderFenced) is raised as the same class as in its own process.
"""

from __future__ import annotations

import contextlib
import http.client
import threading
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Final, NamedTuple, NoReturn, Self, TypeVar
from urllib.parse import quote, urlencode

import msgspec

from penstock.access import Access, opened
from penstock.clock import Clock, SystemClock, parse_timestamp, timestamp
from penstock.errors import FrameDamaged, HubUnavailable, NotFound, PenstockError, SettingsError, WrongHub
from penstock.events import Bounds, Frame, Slice
from penstock.wire import frame, problem

TIMEOUT_S: Final = 10.0
WHOLE_S: Final = 30.0
PATIENCE_S: Final = 4.0
"""A restart of the API takes less, and a host that is told to stop waits a little longer."""
RETRY_S: Final = 0.25
BYTES_MAX: Final = 4 << 20
ANSWER_BYTES_MAX: Final = 16 << 20
"""The API's answer to a read of BYTES_MAX is at most one frame longer."""
FRAMES: Final = "application/vnd.penstock.frames"
JSON: Final = "application/json"
_PART_BYTES = 1 << 20

Position = Callable[[int], tuple[int, int] | None]
"""Epoch and checkpoint of the lease that a host has of a partition; None if it has none."""

T = TypeVar("T")


class _Answer(NamedTuple):
    status: int
    headers: Mapping[str, str]
    body: bytes


class _Partition(msgspec.Struct, frozen=True):
    partition: int
    first: int
    next: int
    bytes: int
    enqueued_first: str | None
    enqueued_last: str | None


class _Partitions(msgspec.Struct, frozen=True):
    hub: str
    period_s: int
    partitions: list[_Partition]
    place_bits: int = 0


class _Offset(msgspec.Struct, frozen=True):
    offset: str


class RemoteHub:
    """The reading half of a hub. Thread-safe; as many connections as threads read at once, kept alive.

    Asks at once: raises HubUnavailable when nobody answers, SettingsError when `api` is no address. A request that fails is made again
    for `patience_s`, so that a short outage is not seen; `timeout_s` is for each step of one.
    """

    def __init__(
        self,
        api: str | Access,
        *,
        timeout_s: float = TIMEOUT_S,
        patience_s: float = PATIENCE_S,
        clock: Clock | None = None,
    ) -> None:
        self._access = opened(api)
        self._timeout_s = timeout_s
        self._where, self._base = self._access.where, self._access.base
        self._clock = clock or SystemClock()
        self._patience_s = patience_s
        self._closed = threading.Event()
        self._idle: list[http.client.HTTPConnection] = []
        self._lock = threading.Lock()
        self._group: tuple[str, Position] | None = None
        self._id = ""
        with contextlib.ExitStack() as failed:
            failed.callback(self.close)
            about = self._get("/v1/partitions", JSON, {}, lambda a: msgspec.json.decode(a.body, type=_Partitions))
            if about.place_bits:
                raise SettingsError(
                    f"The hub of {self._where} is a Kafka topic: give its address, kafka://HOST:PORT/TOPIC, instead."
                )
            failed.pop_all()
        self._id, self._period_s, self._count = about.hub, about.period_s, len(about.partitions)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Nobody waits for an answer any longer."""
        self._closed.set()
        with self._lock:
            idle, self._idle = self._idle, []
        for connection in idle:
            connection.close()

    def announce(self, group: str, position: Position) -> None:
        """From now on the hub is told who reads and how far it is: its retention waits, and it refuses what an older epoch asks."""
        self._group = (group, position)

    @property
    def id(self) -> str:
        return self._id

    @property
    def period_s(self) -> int:
        return self._period_s

    @property
    def place_bits(self) -> int:
        return 0

    def partitions(self) -> int:
        return self._count

    def read(self, partition: int, offset: str, *, bytes_max: int) -> Slice:
        query = urlencode({"from": offset, "bytes": min(max(bytes_max, 1), BYTES_MAX)})
        headers = {"Accept": FRAMES, **self._reader(partition, asks=False)}

        def understood(answer: _Answer) -> Slice:
            frames = [frame.decode(part) for part in frame.split(answer.body)]
            end = answer.headers["penstock-end-offset"]
            following = _checked(partition, int(offset), frames, int(end))
            if answer.headers["penstock-next-offset"] != following:
                raise ValueError(f"it goes to {following}, and says otherwise")
            return Slice(partition, offset, frames, following, end)

        return self._get(f"/v1/partitions/{partition}/events?{query}", FRAMES, headers, understood)

    def bounds(self, partition: int) -> Bounds:
        def understood(answer: _Answer) -> Bounds:
            found = msgspec.json.decode(answer.body, type=_Partition)
            times = (found.enqueued_first, found.enqueued_last)
            first_ms, last_ms = (parse_timestamp(at) if at else 0 for at in times)
            return Bounds(found.first, found.next, found.bytes, first_ms, last_ms)

        return self._get(f"/v1/partitions/{partition}", JSON, self._reader(partition, asks=True), understood)

    def locate(self, partition: int, at_ms: int) -> str:
        def understood(answer: _Answer) -> str:
            return msgspec.json.decode(answer.body, type=_Offset).offset

        return self._get(f"/v1/partitions/{partition}/offset?at={quote(timestamp(at_ms))}", JSON, {}, understood)

    def _reader(self, partition: int, *, asks: bool) -> Mapping[str, str]:
        """Who reads. `asks` where to begin: then it may have no lease yet, and says so by epoch 0."""
        if self._group is None:
            return {}
        group, position = self._group
        found = position(partition) or ((0, 0) if asks else None)
        return {"Penstock-Group": f"{group};epoch={found[0]};checkpoint={found[1]}"} if found else {}

    def _get(self, path: str, kind: str, headers: Mapping[str, str], understood: Callable[[_Answer], T]) -> T:
        """What `understood` makes of the answer. Raises what the API says is wrong, or HubUnavailable when patience has ended."""
        until = self._clock.monotonic() + self._patience_s
        while True:
            try:
                answer = self._checked_answer(path, kind, headers)
                try:
                    return understood(answer)
                except (
                    FrameDamaged,
                    ValueError,
                    KeyError,
                    RecursionError,
                ) as error:  # msgspec's errors are ValueErrors
                    raise HubUnavailable(
                        f"The answer of {self._where} to {path} is damaged or contradicts itself: {error}."
                    ) from error
            except HubUnavailable:
                if self._closed.is_set() or self._clock.monotonic() >= until:
                    raise
            self._clock.wait(self._closed, RETRY_S)

    def _checked_answer(self, path: str, kind: str, headers: Mapping[str, str]) -> _Answer:
        """A 200 of this very hub."""
        answer = self._exchange(self._base + path, headers)
        is_ours = answer.headers.get("content-type") == kind and "penstock-hub" in answer.headers
        if answer.status != 200 or not is_ours:
            raise self._error(answer)
        found = answer.headers["penstock-hub"]
        if self._id and found != self._id:
            raise WrongHub(
                f"Hub {found} answers at {self._where} and not {self._id}, of which this host has leases. "
                "Nothing of it was read. Start the host again under another group or with another store.",
                found=found,
                expected=self._id,
            )
        return answer

    def _exchange(self, path: str, headers: Mapping[str, str]) -> _Answer:
        # A server closes idle connections, maybe just when the next request leaves. So one that was used gets one more try, on a
        # new one: whoever reads twice has read once.
        with self._lock:
            connection = self._idle.pop() if self._idle else None
        if connection is not None:
            try:
                return self._ask(connection, path, headers)
            except TimeoutError as error:
                self._unanswered(error)
            except (OSError, http.client.HTTPException):
                pass
        try:
            return self._ask(self._access.connection(timeout_s=self._timeout_s), path, headers)
        except (OSError, http.client.HTTPException) as error:
            self._unanswered(error)

    def _ask(self, connection: http.client.HTTPConnection, path: str, headers: Mapping[str, str]) -> _Answer:
        until = self._clock.monotonic() + WHOLE_S
        with contextlib.ExitStack() as failed:
            failed.callback(connection.close)
            connection.request("GET", path, headers={**headers, **self._access.headers()})
            with connection.getresponse() as response:
                fields = {name.lower(): value for name, value in response.getheaders()}
                parts, size = [], 0
                while part := response.read1(_PART_BYTES):
                    parts.append(part)
                    size += len(part)
                    if size > ANSWER_BYTES_MAX:
                        raise http.client.HTTPException("the answer is longer than any answer of Penstock")
                    if self._clock.monotonic() > until:
                        raise TimeoutError(f"the answer was not whole within {WHOLE_S:.0f} s")
                if response.length:
                    raise http.client.HTTPException("the answer is cut short")
            failed.pop_all()
        with self._lock:
            if self._closed.is_set():
                connection.close()
            else:
                self._idle.append(connection)
        return _Answer(response.status, fields, b"".join(parts))

    def _error(self, answer: _Answer) -> PenstockError:
        """What the answer means to one who reads: what the log says, or that it cannot be asked now."""
        is_problem = answer.headers.get("content-type") == problem.CONTENT_TYPE
        error = problem.rebuilt(answer.body) if is_problem else None
        if error is None:
            return HubUnavailable(f"{self._where} answers {answer.status}, and not as a hub of Penstock does.")
        if isinstance(error, NotFound) and not self._id:
            return SettingsError(
                f"{self._where}{self._base} is not the API that events are read from (it answers 404): is it the admin port?"
            )
        if isinstance(error, FrameDamaged) or (error.status < 500 and not error.retryable):
            return error
        # A worker that failed is started again, and others answer meanwhile.
        return HubUnavailable(f"{self._where} answers {answer.status} {error.code}: {error.detail}")

    def _unanswered(self, error: Exception) -> NoReturn:
        raise HubUnavailable(f"{self._where} gives no answer: {error or type(error).__name__}.") from error


def _checked(partition: int, start: int, frames: list[Frame], end: int) -> str:
    """The offset behind frames that must be a whole piece of the log at `start`. Raises ValueError."""
    reached = start
    for number, read in enumerate(frames):
        goes_on = read.first == reached or (number == 0 and read.first < start < read.next)
        if read.partition != partition or not goes_on:
            raise ValueError(f"frame {read.partition}/{read.first} comes behind {partition}/{reached}")
        reached = max(start, read.next)
    if reached > end or reached == start < end:
        raise ValueError(f"it goes from {start} to {reached}, and the log ends at {end}")
    return str(reached)
