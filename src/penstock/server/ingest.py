"""The intake: a POST becomes a batch, batches that wait become one commit, the commit answers them all.

Group commit without a timer: a commit starts when a turn of the event loop has brought nothing new, or enough; while one is under way
the next gathers, and when that is large the rest waits as it came (backlog.py). The loop's thread unzips, checks, and splits (big bodies go
to an executor); the commit, which mostly waits for the disk, has its own thread. Nothing is answered with 200 before the commit returned.
"""

from __future__ import annotations

import asyncio
import itertools
import queue
import secrets
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

import msgspec

from penstock.clock import Clock, timestamp
from penstock.errors import (
    BadHeader,
    BatchTooLarge,
    EmptyBatch,
    ForbiddenDevice,
    HubBroken,
    HubUnavailable,
    NotConfirmed,
    NoValidEvent,
    PenstockError,
)
from penstock.events import Appended, Batch
from penstock.hub import Refused, WholeHub
from penstock.server import trace
from penstock.server.backlog import Backlog, refusal
from penstock.server.framing import Framed, Framing, Posted, own
from penstock.server.message import Reply, Request, Response
from penstock.server.numbers import Number, number_of
from penstock.server.problems import problem, unexpected
from penstock.server.quota import Quota, account
from penstock.wire.body import unzip, unzipped_bytes
from penstock.wire.route import DEVICE_BYTES_MAX, Allows, Rejected, Router, Stamp, is_field

BIG_BODY_BYTES = 256 << 10
BIG_BATCH_BYTES = 2 << 20
BIG_FRAMED_BYTES = 64 << 10  # of bodies that are written anew, event by event
GROUP_BATCHES = 512
GROUP_BYTES = 4 << 20
WAITING_BYTES_MAX = 32 << 20
ELSEWHERE_BYTES_MAX = 96 << 20  # of large ones: one is unzipped, the others wait zipped, and only their like for them
ELSEWHERE_SHARE = 2  # of these bytes an account has one half at most, so that there is room for another's
STORAGE_RETRY_S = 10.0
PROPERTIES_BYTES_MAX = (1 << 16) - 1  # what a frame's header has room for

_PROPERTY = b"penstock-property-"
_encode = msgspec.json.Encoder().encode


class Log(Protocol):
    def info(self, event: str, **fields: object) -> object: ...
    def error(self, event: str, **fields: object) -> object: ...
    def exception(self, event: str, **fields: object) -> object: ...


class _Waiting(msgspec.Struct, frozen=True, gc=False):
    """A batch on its way to the disk, and whom to tell."""

    batch: Batch
    rejected: tuple[Rejected, ...]
    raw_bytes: int
    reply: Reply


class Ingest:
    """The intake of one worker process. `post` and everything it calls back run on the loop's thread."""

    def __init__(
        self,
        hub: WholeHub,
        router: Router,
        clock: Clock,
        log: Log,
        *,
        device_field: str,
        unzipped_bytes_max: int,
        waiting_max: int,
        wait_s_max: float,
        broken: Callable[[], None],
        quota: Quota | None = None,
    ) -> None:
        self._hub = hub
        self._router = router
        self._clock = clock
        self._log = log
        self._device_field = device_field
        self._unzipped_bytes_max = unzipped_bytes_max
        self._waiting_max = waiting_max
        self._wait_s_max = wait_s_max
        self._broken = broken
        self._quota = quota
        self._worker = f"w-{secrets.token_hex(8)}"
        self._numbers = itertools.count(1)  # taken by the loop's thread and the executor's: next() is atomic
        self._stamp = (-1, Stamp(""))
        self._waiting: list[_Waiting] = []
        self._ready_bytes = 0  # of those that wait
        self._waiting_bytes = 0  # of those and of those under way
        self._under_way = 0
        self._elsewhere = self._elsewhere_bytes = 0
        self._elsewhere_of: dict[str, int] = {}  # bytes by account
        self._turning = False
        self._backlog = Backlog(self._prepare_here, may_go_on=self._has_room, monotonic=clock.monotonic)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="big-body")
        self._commits: queue.SimpleQueue[list[_Waiting] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._commit_all, name="commit", daemon=True)

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """Call on the loop's thread before the first post."""
        self._loop = loop
        self._backlog.start(loop)
        self._thread.start()

    def close(self) -> None:
        """After the last answer: ends the threads."""
        self._pool.shutdown()
        self._commits.put(None)
        self._thread.join()

    def post(self, request: Request, device: str | None, reply: Reply, framing: Framing = own) -> None:
        """Take a batch; `device` is the one in the path. Replies when it is on disk, or with what is wrong."""
        wait_s = self._backlog.wait_s()
        waiting_bytes = self._waiting_bytes + self._backlog.bytes
        if wait_s > self._wait_s_max or self._ahead() >= self._waiting_max or waiting_bytes > WAITING_BYTES_MAX:
            reply(self._busy(wait_s))
            return
        if self._quota is not None:
            try:
                self._quota.check(request)
            except PenstockError as error:
                reply(problem(error))
                return
        size = unzipped_bytes(request.body, bytes_max=self._unzipped_bytes_max)
        bytes_max = BIG_BATCH_BYTES if framing is own else BIG_FRAMED_BYTES
        if len(request.body) > BIG_BODY_BYTES or size > bytes_max:
            # It would hold up the loop. What it will take is counted now, and counted right when it is known.
            whose = account(request)
            share = self._elsewhere_of.get(whose, 0)
            if self._elsewhere_bytes > ELSEWHERE_BYTES_MAX or share > ELSEWHERE_BYTES_MAX // ELSEWHERE_SHARE:
                reply(self._busy(wait_s))
                return
            self._elsewhere += 1
            self._elsewhere_bytes += size
            self._elsewhere_of[whose] = share + size
            self._pool.submit(self._prepare_elsewhere, request, device, reply, framing, size)
        else:
            self._backlog.put(request, device, reply, framing)

    def _ahead(self) -> int:
        """Batches that have no answer yet."""
        return self._elsewhere + len(self._backlog) + len(self._waiting) + self._under_way

    def _has_room(self) -> bool:
        """Whether more is to be prepared: for the commit that is under way and for two behind it there is enough."""
        return not self._under_way or (len(self._waiting) < 2 * GROUP_BATCHES and self._ready_bytes < 2 * GROUP_BYTES)

    def _busy(self, wait_s: float) -> Response:
        return refusal(self._ahead(), wait_s)

    def _prepare_here(self, request: Request, device: str | None, reply: Reply, framing: Framing) -> None:
        try:
            prepared = self._prepare(request, device, reply, framing)
        except PenstockError as error:
            reply(problem(error))
        except Exception as error:  # on the loop's thread, where perhaps nobody waits for it any more but the client
            self._log.exception("a batch could not be prepared", **trace.fields(request.headers))
            reply(problem(unexpected(error)))
        else:
            self._enqueue(prepared)

    def _prepare_elsewhere(
        self, request: Request, device: str | None, reply: Reply, framing: Framing, size: int
    ) -> None:
        """In the executor. An error does not leave it: its traceback would keep the unzipped batch until the next full collection."""
        assert self._loop is not None
        prepared: _Waiting | Response
        try:
            prepared = self._prepare(request, device, reply, framing)
        except PenstockError as error:
            prepared = problem(error)
        except Exception as error:
            self._log.exception("a batch could not be prepared", **trace.fields(request.headers))
            prepared = problem(unexpected(error))
        self._loop.call_soon_threadsafe(self._prepared_elsewhere, account(request), size, prepared, reply)

    def _prepared_elsewhere(self, whose: str, size: int, prepared: _Waiting | Response, reply: Reply) -> None:
        self._elsewhere -= 1
        self._elsewhere_bytes -= size
        self._elsewhere_of[whose] -= size
        if not self._elsewhere_of[whose]:
            del self._elsewhere_of[whose]
        if isinstance(prepared, Response):
            reply(prepared)
        else:
            self._enqueue(prepared)

    def _prepare(self, request: Request, device: str | None, reply: Reply, framing: Framing) -> _Waiting:
        """Everything that can be done before the commit."""
        if not request.body:
            raise EmptyBatch("The body is empty. Nothing was stored.")
        properties = _properties(request.headers)
        given = number_of(request)
        number = given or Number(self._worker, 0, next(self._numbers), None, b"")
        framed = self._framed(request, device, framing)
        lines, field, device = framed.lines, framed.field, framed.device
        allows = request.grant.allows
        if allows is not None:
            self._check_devices(allows, field, device)
        if properties and len(lines) + (1 + lines.count(b"\n")) * len(properties) > self._unzipped_bytes_max:
            raise BatchTooLarge(
                f"With its event properties in each event the batch is larger than {self._unzipped_bytes_max} bytes; nothing was stored. "
                "Split it and send the parts.",
                limit_bytes=self._unzipped_bytes_max,
            )
        stamp = self._stamp_for(properties, device, field)
        routed = self._router.route(lines, stamp, field=field, device=device, allows=allows)
        rejected = routed.rejected
        if framed.rejected:
            rejected = _merged(framed.rejected, rejected)
        if rejected and (framed.whole or not routed.accepted):
            which = "Every event" if len(rejected) == routed.accepted + len(routed.rejected) else "An event"
            raise NoValidEvent(f"{which} of the batch was rejected. Nothing was stored.", rejected=rejected)
        batch = Batch(
            number.producer,
            number.epoch,
            number.sequence,
            routed.accepted,
            routed.groups,
            given is not None,
            number.sha256,
            properties,
            field,
            number.after,
            request.grant.name,
        )
        if self._quota is not None:
            self._quota.charge(request, batch, routed.bytes)
        return _Waiting(batch, rejected, routed.bytes, reply)

    def _framed(self, request: Request, device: str | None, framing: Framing) -> Framed:
        headers = request.headers
        field = headers.get(b"penstock-device-field")
        encoding = headers.get(b"content-encoding", b"").decode("latin-1").strip().lower()
        return framing(
            Posted(
                headers,
                unzip(request.body, encoding, bytes_max=self._unzipped_bytes_max),
                self._field(field),
                field is not None,
                device,
                self._hub.partitions(),
                self._router.events_max,
                self._router.event_bytes_max,
            )
        )

    def _check_devices(self, allows: Allows, field: str, device: str | None) -> None:
        if device is not None and not allows(device):
            raise ForbiddenDevice(f"The key is not for the device {device[:DEVICE_BYTES_MAX]!r}. Nothing was stored.")
        if field != self._device_field:
            # An allowed device could be named there, and any other where whoever reads the event looks for it.
            raise ForbiddenDevice(
                f"The key is for some devices, so they are named in {self._device_field!r}. Nothing was stored."
            )

    def _field(self, given: bytes | None) -> str:
        if given is None:
            return self._device_field
        field = given.decode("latin-1")
        if not is_field(field):
            raise BadHeader("Penstock-Device-Field is not the name of a field: letters, digits, `_`, `-` and `.`.")
        return field

    def _stamp_for(self, properties: bytes, device: str | None, field: str) -> Stamp:
        now_ms = self._clock.now_ms()
        if properties or device is not None:
            return Stamp(timestamp(now_ms), properties, device or "", field)
        stamp = self._stamp
        if stamp[0] != now_ms:
            stamp = self._stamp = (now_ms, Stamp(timestamp(now_ms)))
        return stamp[1]

    def _enqueue(self, waiting: _Waiting) -> None:
        assert self._loop is not None
        self._waiting.append(waiting)
        self._ready_bytes += waiting.raw_bytes
        self._waiting_bytes += waiting.raw_bytes
        if not self._turning and not self._under_way:
            self._turning = True
            self._loop.call_soon(self._turn, len(self._waiting))

    def _turn(self, seen: int) -> None:
        """Start a commit unless the last turn brought something, so that more may come to share the sync."""
        assert self._loop is not None
        count = len(self._waiting)
        if count != seen and count < GROUP_BATCHES and self._ready_bytes < GROUP_BYTES:
            self._loop.call_soon(self._turn, count)
            return
        self._turning = False
        self._under_way = count
        self._ready_bytes = 0
        self._commits.put(self._waiting)
        self._waiting = []

    def _commit_all(self) -> None:
        """The commit thread."""
        assert self._loop is not None
        while (group := self._commits.get()) is not None:
            answers: Sequence[Appended | Refused] | NotConfirmed
            try:
                answers = self._hub.append([waiting.batch for waiting in group])
            except NotConfirmed as error:
                error.fields.setdefault("retry_after_s", STORAGE_RETRY_S)
                answers = error
            except HubBroken as error:
                self._log.error("the hub failed; this process will be started again", reason=str(error))
                answers = HubUnavailable(error.detail, retry_after_s=STORAGE_RETRY_S)
                self._loop.call_soon_threadsafe(self._broken)
            except Exception:
                self._log.exception("a commit failed", batches=len(group))
                answers = HubUnavailable("The commit failed; send the batch again.", retry_after_s=STORAGE_RETRY_S)
            self._loop.call_soon_threadsafe(self._answer, group, answers)

    def _answer(self, group: list[_Waiting], answers: Sequence[Appended | Refused] | NotConfirmed) -> None:
        assert self._loop is not None
        self._under_way = 0
        if isinstance(answers, HubUnavailable):
            # What came meanwhile would wait as long for the same answer.
            group, self._waiting, self._ready_bytes = [*group, *self._waiting], [], 0
        self._waiting_bytes -= sum(waiting.raw_bytes for waiting in group)
        self._backlog.go_on()
        if self._waiting and not self._turning:
            self._turning = True
            self._loop.call_soon(self._turn, len(self._waiting))
        if isinstance(answers, NotConfirmed):
            refusal = problem(answers)
            for waiting in group:
                waiting.reply(refusal)
            return
        for waiting, answer in zip(group, answers, strict=True):
            if isinstance(answer, Appended):
                waiting.reply(_stored(waiting, answer))
            else:
                waiting.reply(problem(answer))


def _stored(waiting: _Waiting, answer: Appended) -> Response:
    batch = waiting.batch
    rejected = _encode(waiting.rejected) if waiting.rejected else b"[]"
    return Response(
        200,
        b'{"batch":"%b:%d:%d","accepted":%d,"duplicate":%b,"rejected":%b}'
        % (
            batch.producer.encode(),
            batch.epoch,
            batch.sequence,
            answer.accepted,
            b"true" if answer.duplicate else b"false",
            rejected,
        ),
    )


def _merged(first: Sequence[Rejected], others: Sequence[Rejected]) -> tuple[Rejected, ...]:
    """In the order of the events; of two verdicts on one the first counts."""
    by_index = {one.index: one for one in (*others, *first)}
    return tuple(by_index[index] for index in sorted(by_index))


def _properties(headers: dict[bytes, bytes]) -> bytes:
    """The event properties as a JSON object, or nothing."""
    if _PROPERTY not in b"\n".join(headers):
        return b""
    found = {}
    for name, value in headers.items():
        if name.startswith(_PROPERTY):
            try:
                found[name[len(_PROPERTY) :].decode("ascii")] = value.decode()
            except UnicodeDecodeError as error:
                raise BadHeader(f"The header {name.decode('latin-1')} is not UTF-8.") from error
    encoded = _encode(found) if found else b""
    if len(encoded) > PROPERTIES_BYTES_MAX:
        raise BadHeader(f"The event properties have {len(encoded)} bytes as JSON, the limit is {PROPERTIES_BYTES_MAX}.")
    return encoded
