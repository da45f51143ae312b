"""The intake on a real loop, with a hub that can be held and can fail: one answer for each batch, and never before the commit."""

from __future__ import annotations

import asyncio
import gzip
import hashlib
import json
import threading
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import uvloop
import zstandard
from msgspec.structs import replace

from penstock.errors import HubBroken, HubUnavailable, StorageFull
from penstock.events import Appended, Batch
from penstock.hub import Refused
from penstock.hub.embedded import EmbeddedHub, create
from penstock.server import ingest as ingest_module
from penstock.server.auth import ANYONE
from penstock.server.ingest import Ingest
from penstock.server.message import Request, Response
from penstock.testing import FakeClock, MemoryHub, MemoryLog
from penstock.wire.body import unzip
from penstock.wire.frame import content, sources_of
from penstock.wire.route import Router

PATIENCE_S = 20.0
EVENT = b'{"deviceId":"d-1","temperature":21.40}'
STAMPED = b'{"deviceId":"d-1","temperature":21.40,"receivedAt":"2026-11-22T14:00:00.000Z"}'


class Log(MemoryLog):
    def exception(self, event: str, **fields: Any) -> None:
        self.lines.append(("exception", event, fields))


class HeldHub(MemoryHub):
    """A hub whose commits can be held back, and fail in the ways given, in order; then it is well again."""

    def __init__(self, *faults: BaseException) -> None:
        super().__init__(4, clock=FakeClock(1_795_356_000_000))
        self.faults = list(faults)
        self.commits: list[int] = []
        self.may_go_on = threading.Event()
        self.may_go_on.set()
        self.begun = threading.Event()

    def append(self, batches: Sequence[Batch]) -> Sequence[Appended | Refused]:
        self.commits.append(len(batches))
        self.begun.set()
        assert self.may_go_on.wait(PATIENCE_S)
        if self.faults:
            raise self.faults.pop(0)
        return super().append(batches)

    def lines(self) -> list[bytes]:
        found = []
        for partition in range(self.partitions()):
            for frame in self.read(partition, "0", bytes_max=1 << 30).frames:
                found += content(frame).split(b"\n")[:-1]
        return found


class Intake:
    """An Ingest on the running loop; `post` gives a future of the answer."""

    def __init__(self, hub: MemoryHub | EmbeddedHub, **settings: Any) -> None:
        self.hub, self.log, self.broken = hub, Log(), 0
        self.replies = self.posts = 0
        given: dict[str, Any] = {
            "device_field": "deviceId",
            "unzipped_bytes_max": 1 << 24,
            "waiting_max": 4096,
            "wait_s_max": 1.0,
        } | settings
        self.clock = FakeClock(1_795_356_000_000)
        self.ingest = Ingest(hub, Router(4), self.clock, self.log, broken=self.break_down, **given)
        self.loop = asyncio.get_running_loop()
        self.ingest.start(self.loop)

    def break_down(self) -> None:
        self.broken += 1

    def post(
        self, body: bytes = EVENT, device: str | None = None, *, key: str = "", **headers: bytes
    ) -> asyncio.Future[Response]:
        future: asyncio.Future[Response] = self.loop.create_future()

        def reply(response: Response) -> None:
            self.replies += 1
            future.set_result(response)

        self.posts += 1
        named = {name.replace("_", "-").encode(): value for name, value in headers.items()}
        path = b"/v1/events" if device is None else b"/v1/devices/%b/events" % device.encode()
        request = Request(b"POST", path, b"", named, body)
        request.grant = ANYONE._replace(key=key, name=key)
        self.ingest.post(request, device, reply)
        return future


def run(
    act: Callable[[Intake], Awaitable[None]], hub: MemoryHub | EmbeddedHub | None = None, **settings: Any
) -> Intake:
    async def whole() -> Intake:
        intake = Intake(hub or HeldHub(), **settings)
        try:
            await asyncio.wait_for(act(intake), PATIENCE_S)
        finally:
            if isinstance(intake.hub, HeldHub):
                intake.hub.may_go_on.set()
            await intake.loop.run_in_executor(None, intake.ingest.close)
        assert intake.replies == intake.posts
        return intake

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(whole())


def producer(body: bytes = EVENT, *, name: bytes = b"p-1", epoch: int = 1, sequence: int = 1) -> bytes:
    return b"%b;epoch=%d;sequence=%d;sha256=%b" % (name, epoch, sequence, hashlib.sha256(body).hexdigest().encode())


def answer(response: Response) -> dict[str, Any]:
    decoded: dict[str, Any] = json.loads(response.body)
    return decoded


def refused(response: Response, status: int, code: str) -> dict[str, Any]:
    found = answer(response)
    assert (response.status, found["status"], found["code"]) == (status, status, code)
    assert response.content_type == b"application/problem+json"
    return found


def test_a_batch_is_stored_and_answered() -> None:
    async def act(intake: Intake) -> None:
        response = await intake.post(EVENT + b"\n" + b"x\n" + EVENT + b"\n{}\n")
        assert (response.status, response.content_type) == (200, b"application/json")
        found = answer(response)
        assert found.pop("batch").startswith("w-")
        assert [(r["index"], r["code"]) for r in found.pop("rejected")] == [(1, "not_json"), (3, "no_device")]
        assert found == {"accepted": 2, "duplicate": False}
        assert intake.hub.lines() == [STAMPED, STAMPED]  # type: ignore[union-attr]

    run(act)


def test_every_answer_names_another_batch() -> None:
    async def act(intake: Intake) -> None:
        responses = await asyncio.gather(
            *(intake.post(EVENT) for _ in range(50)), intake.post(EVENT + b" " * (1 << 19))
        )
        assert len({answer(response)["batch"] for response in responses}) == 51

    run(act)


def test_the_producers_numbers() -> None:
    other = EVENT + b" "

    async def act(intake: Intake) -> None:
        first = answer(await intake.post(penstock_producer=producer(sequence=7)))
        assert first == {"batch": "p-1:1:7", "accepted": 1, "duplicate": False, "rejected": []}
        again = answer(await intake.post(penstock_producer=producer(sequence=7)))
        assert again == first | {"duplicate": True}
        reused = refused(await intake.post(other, penstock_producer=producer(other, sequence=7)), 422, "number_reused")
        assert (reused["last_epoch"], reused["last_sequence"], reused["retryable"]) == (1, 7, False)
        refused(await intake.post(penstock_producer=producer(sequence=6)), 422, "number_too_old")
        assert (await intake.post(penstock_producer=producer(epoch=2, sequence=1))).status == 200
        fenced = refused(await intake.post(penstock_producer=producer(sequence=8)), 409, "producer_fenced")
        assert fenced["last_epoch"] == 2
        assert len(intake.hub.lines()) == 2  # type: ignore[union-attr]

    run(act)


def test_two_copies_at_once_are_one_store_and_one_duplicate() -> None:
    async def act(intake: Intake) -> None:
        responses = await asyncio.gather(*(intake.post(penstock_producer=producer()) for _ in range(2)))
        assert [answer(response)["duplicate"] for response in responses] == [False, True]
        assert intake.hub.commits == [2]  # type: ignore[union-attr]

    run(act)


GOOD = producer()
HEX = GOOD[-64:]
MALFORMED = {
    "empty": b"",
    "only the id": b"p-1",
    "no id": GOOD[3:],
    "an empty id": b" " + GOOD[3:],
    "an id with a space": b"p 1" + GOOD[3:],
    "an id with a slash": b"p/1" + GOOD[3:],
    "an id that is not ASCII": "ä".encode() + GOOD[3:],
    "an id that is too long": b"p" * 65 + GOOD[3:],
    "no epoch": b"p;sequence=1;sha256=" + HEX,
    "no sequence": b"p;epoch=1;sha256=" + HEX,
    "no sha256": b"p;epoch=1;sequence=1",
    "sequence 0": b"p;epoch=1;sequence=0;sha256=" + HEX,
    "a negative epoch": b"p;epoch=-1;sequence=1;sha256=" + HEX,
    "a signed sequence": b"p;epoch=1;sequence=+1;sha256=" + HEX,
    "a spaced sequence": b"p;epoch=1;sequence=1 0;sha256=" + HEX,
    "an underlined sequence": b"p;epoch=1;sequence=1_0;sha256=" + HEX,
    "an epoch of 33 bits": b"p;epoch=4294967296;sequence=1;sha256=" + HEX,
    "a sequence of 64 bits": b"p;epoch=1;sequence=9223372036854775808;sha256=" + HEX,
    "a very long sequence": b"p;epoch=1;sequence=" + b"1" * 5000 + b";sha256=" + HEX,
    "an empty sequence": b"p;epoch=1;sequence=;sha256=" + HEX,
    "a sequence of other digits": b"p;epoch=1;sequence=" + "٣".encode() + b";sha256=" + HEX,
    "an empty after": b"p;epoch=1;sequence=1;after=;sha256=" + HEX,
    "an after that is a word": b"p;epoch=1;sequence=1;after=x;sha256=" + HEX,
    "a short sha256": GOOD[:-2],
    "a long sha256": GOOD + b"00",
    "a sha256 with spaces": b"p;epoch=1;sequence=1;sha256=" + b" ".join([HEX[:32], HEX[32:]]),
    "a short sha256 with spaces": b"p;epoch=1;sequence=1;sha256=" + HEX[:30] + b"    " + HEX[34:],
    "a sha256 that is not hexadecimal": GOOD[:-1] + b"g",
    "a sha256 that is not ASCII": GOOD[:-1] + b"\xff",
    "epoch twice": b"p;epoch=1;epoch=1;sequence=1;sha256=" + HEX,
    "something unknown": GOOD + b";x=1",
    "something without a value": GOOD + b";x",
    "a semicolon at the end": GOOD + b";",
    "commas": GOOD.replace(b";", b","),
    "two headers": GOOD + b", " + GOOD,
    "a capital name": GOOD.replace(b"epoch", b"Epoch"),
    "a space before =": GOOD.replace(b"epoch=", b"epoch ="),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_producer_headers_that_are_malformed(name: str) -> None:
    async def act(intake: Intake) -> None:
        refused(await intake.post(penstock_producer=MALFORMED[name]), 400, "bad_header")
        assert intake.hub.commits == []  # type: ignore[union-attr]

    run(act)


@pytest.mark.parametrize(
    "header",
    [
        GOOD,
        GOOD.replace(b";", b" ; "),
        GOOD.replace(HEX, HEX.upper()),
        b"p-1;sha256=%b;after=0;sequence=1;epoch=0" % HEX,
        b"%b;epoch=4294967295;sequence=9223372036854775807;after=9223372036854775807;sha256=%b" % (b"A.z_0-" * 10, HEX),
    ],
)
def test_producer_headers_that_are_right(header: bytes) -> None:
    async def act(intake: Intake) -> None:
        assert (await intake.post(penstock_producer=header)).status == 200

    run(act)


def test_an_idempotency_key_is_a_number() -> None:
    other = EVENT + b" "

    async def act(intake: Intake) -> None:
        first = answer(await intake.post(idempotency_key=b"8e03978e-40d5"))
        name = hashlib.sha256(b"\0\0/v1/events\x008e03978e-40d5").hexdigest()[:32]
        assert first == {"batch": f"idempotency:{name}:0:1", "accepted": 1, "duplicate": False, "rejected": []}
        again = answer(await intake.post(idempotency_key=b"8e03978e-40d5"))
        assert again == first | {"duplicate": True}
        reused = refused(await intake.post(other, idempotency_key=b"8e03978e-40d5"), 422, "number_reused")
        assert "Idempotency-Key" in reused["detail"]
        assert len(intake.hub.lines()) == 1  # type: ignore[union-attr]

    run(act)


def test_the_same_idempotency_key_of_others_is_another() -> None:
    """Of another device of the path, and of another who asks: with the same body too."""

    async def act(intake: Intake) -> None:
        for device in (None, "d-1", "d-2"):
            for key in ("", "k-1", "k-2"):
                posted = await intake.post(b"{}" if device else EVENT, device, key=key, idempotency_key=b"1")
                assert answer(posted)["duplicate"] is False
        assert len(intake.hub.lines()) == 9  # type: ignore[union-attr]

    run(act)


@pytest.mark.parametrize(
    "headers",
    [
        {"idempotency_key": b""},
        {"idempotency_key": b"x" * 256},
        {"idempotency_key": b"two words"},
        {"idempotency_key": b"\x7f"},
        {"idempotency_key": "\u00e9".encode()},
        {"idempotency_key": b"x", "penstock_producer": producer()},
        {"idempotency_key": b"", "penstock_producer": producer()},
    ],
)
def test_idempotency_keys_that_cannot_be(headers: dict[str, bytes]) -> None:
    async def act(intake: Intake) -> None:
        refused(await intake.post(**headers), 400, "bad_header")
        assert intake.hub.lines() == []  # type: ignore[union-attr]
        assert (await intake.post(idempotency_key=b"~" * 255)).status == 200

    run(act)


def test_another_body_than_announced() -> None:
    async def act(intake: Intake) -> None:
        found = refused(await intake.post(EVENT + b"\n", penstock_producer=producer()), 400, "body_mismatch")
        assert found["retryable"]
        # The sum is of the bytes as sent, not of what they unzip to.
        zipped = gzip.compress(EVENT)
        refused(await intake.post(zipped, penstock_producer=producer(), content_encoding=b"gzip"), 400, "body_mismatch")
        response = await intake.post(zipped, penstock_producer=producer(zipped), content_encoding=b"gzip")
        assert response.status == 200
        assert intake.hub.lines() == [STAMPED]  # type: ignore[union-attr]

    run(act)


def test_event_properties() -> None:
    async def act(intake: Intake) -> None:
        body = EVENT + b'\n{"deviceId":"d-1","properties":1}\n{"deviceId":"d-1","receivedAt":1}\n'
        response = await intake.post(body, penstock_property_site=b"A", penstock_property_raum='ä"'.encode())
        assert [r["code"] for r in answer(response)["rejected"]] == ["reserved_field", "reserved_field"]
        [line] = intake.hub.lines()  # type: ignore[union-attr]
        assert json.loads(line)["properties"] == {"site": "A", "raum": 'ä"'}
        assert line.startswith(STAMPED[:-1] + b',"properties":{')
        assert (await intake.post(b'{"deviceId":"d-1","properties":1}')).status == 200

    run(act)


def test_properties_that_cannot_be_taken() -> None:
    async def act(intake: Intake) -> None:
        refused(await intake.post(penstock_property_a=b"\xff"), 400, "bad_header")
        refused(await intake.post(penstock_property_a=b"\x01" * 11_000), 400, "bad_header")
        assert (await intake.post(penstock_property_a=b"x" * 60_000)).status == 200

    run(act)


@pytest.mark.parametrize("name", [b"", b"a b", b'a"', b"receivedAt", b"properties", b"a" * 65, "ä".encode(), b"1"])
def test_device_fields_that_cannot_be(name: bytes) -> None:
    async def act(intake: Intake) -> None:
        refused(await intake.post(penstock_device_field=name), 400, "bad_header")

    run(act)


def test_the_device_field_of_a_batch_and_of_the_server() -> None:
    event = b'{"address":"d-1","other":"d-2","deviceId":5}'

    async def act(intake: Intake) -> None:
        assert (await intake.post(event, penstock_device_field=b"address")).status == 200
        assert (await intake.post(event)).status == 200
        refused(await intake.post(event, penstock_device_field=b"deviceId"), 400, "no_valid_event")
        fields = [
            source.device_field
            for partition in range(4)
            for frame in intake.hub.read(partition, "0", bytes_max=1 << 20).frames
            for source in sources_of(frame)
        ]
        assert sorted(fields) == ["address", "other"]

    run(act, device_field="other")


def test_the_device_of_the_path() -> None:
    async def act(intake: Intake) -> None:
        response = await intake.post(b'{"t":1}\n{}\n' + EVENT + b'\n{"deviceId":"d-2"}', "d-1")
        assert [(r["index"], r["code"]) for r in answer(response)["rejected"]] == [(3, "bad_device")]
        received = b'"receivedAt":"2026-11-22T14:00:00.000Z"}'
        assert intake.hub.lines() == [  # type: ignore[union-attr]
            b'{"t":1,"deviceId":"d-1",' + received,
            b'{"deviceId":"d-1",' + received,
            STAMPED,
        ]
        refused(await intake.post(b'{"t":1}', "not a device"), 400, "no_valid_event")

    run(act)


def test_what_cannot_be_read() -> None:
    zipped = gzip.compress(EVENT)
    many = b"[" + b",".join([EVENT] * 10_001) + b"]"

    async def act(intake: Intake) -> None:
        given: list[tuple[bytes, dict[str, Any], int, str]] = [
            (b"", {}, 400, "empty_batch"),
            (b" \n", {}, 400, "empty_batch"),
            (gzip.compress(b""), {"content_encoding": b"gzip"}, 400, "empty_batch"),
            (zipped[:-1], {"content_encoding": b"gzip"}, 400, "malformed_gzip"),
            (EVENT, {"content_encoding": b"br"}, 415, "unsupported_encoding"),
            (EVENT, {"content_encoding": b"\xff"}, 415, "unsupported_encoding"),
            (EVENT, {"content_type": b"text/plain"}, 415, "unsupported_type"),
            (EVENT, {"content_type": b"\xff"}, 415, "unsupported_type"),
            (b"[" + EVENT, {"content_type": b"application/json"}, 400, "malformed_body"),
            (b"[]", {"content_type": b"application/json"}, 400, "empty_batch"),
            (b"x", {"content_type": b"application/json"}, 400, "no_valid_event"),
            (b"[1]", {"content_type": b"application/json"}, 400, "no_valid_event"),
            (b"x", {}, 400, "no_valid_event"),
            (many, {"content_type": b"application/json"}, 413, "batch_too_large"),
            (gzip.compress(bytes(20 << 20)), {"content_encoding": b"gzip"}, 413, "batch_too_large"),
            (b"[" * 1_000_000, {"content_type": b"application/json"}, 400, "malformed_body"),
            (b'{"a":' * 200_000, {"content_type": b"application/json"}, 400, "no_valid_event"),
            (b'{"a":' * 50_000, {}, 400, "no_valid_event"),
        ]
        for body, headers, status, code in given:
            found = refused(await intake.post(body, **headers), status, code)
            assert ("rejected" in found) == (code == "no_valid_event")
            assert not found["retryable"]
        assert (await intake.post(zipped, content_encoding=b" GZIP ")).status == 200
        assert intake.hub.commits == [1]  # type: ignore[union-attr]

    run(act)


class EarlyIngest(Ingest):
    """Answers as soon as the commit is asked for."""

    def _turn(self, seen: int) -> None:
        early, self._waiting = self._waiting, []
        for waiting in early:
            waiting.reply(Response(200, b"{}"))
            self._waiting.append(replace(waiting, reply=lambda _: None))
        super()._turn(len(self._waiting))


@pytest.mark.parametrize("kind", [Ingest, pytest.param(EarlyIngest, id="negative control")])
def test_nothing_is_answered_before_the_commit_is_back(monkeypatch: pytest.MonkeyPatch, kind: type[Ingest]) -> None:
    monkeypatch.setitem(globals(), "Ingest", kind)
    hub = HeldHub()
    hub.may_go_on.clear()

    async def act(intake: Intake) -> None:
        first = intake.post()
        assert await intake.loop.run_in_executor(None, hub.begun.wait, PATIENCE_S)
        second = intake.post()
        for _ in range(100):
            await asyncio.sleep(0)
        early = first.done() or second.done()
        hub.may_go_on.set()
        assert [(await each).status for each in (first, second)] == [200, 200]
        assert early == (kind is EarlyIngest)
        assert early or hub.commits == [1, 1]

    run(act, hub)


def test_posts_that_come_together_share_a_commit() -> None:
    hub = HeldHub()
    hub.may_go_on.clear()

    async def act(intake: Intake) -> None:
        first = [intake.post() for _ in range(50)]
        assert await intake.loop.run_in_executor(None, hub.begun.wait, PATIENCE_S)
        following = [intake.post() for _ in range(70)]
        hub.may_go_on.set()
        assert {(await each).status for each in first + following} == {200}
        assert hub.commits == [50, 70]

    run(act, hub)


def test_a_queue_that_is_full() -> None:
    hub = HeldHub()
    hub.may_go_on.clear()
    big = b"\n".join([EVENT] * 9000)

    async def act(intake: Intake) -> None:
        waiting = [intake.post()]
        assert await intake.loop.run_in_executor(None, hub.begun.wait, PATIENCE_S)
        waiting += [intake.post(), intake.post(big)]
        for body in (EVENT, big):
            busy = await intake.post(body)
            found = refused(busy, 503, "hub_busy")
            assert found["retryable"]
            [(name, after_s)] = busy.headers
            assert (name, int(after_s) >= 1) == (b"Retry-After", True)
        hub.may_go_on.set()
        assert {(await each).status for each in waiting} == {200}
        assert (await intake.post()).status == 200
        assert len(hub.lines()) == 9003

    run(act, hub, waiting_max=3)


def test_too_many_bytes_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ingest_module, "WAITING_BYTES_MAX", 200)
    hub = HeldHub()
    hub.may_go_on.clear()

    async def act(intake: Intake) -> None:
        waiting = [intake.post(EVENT + b"\n" + EVENT), intake.post(EVENT + b"\n" + EVENT)]
        refused(await intake.post(), 503, "hub_busy")
        hub.may_go_on.set()
        assert {(await each).status for each in waiting} == {200}
        assert (await intake.post()).status == 200

    run(act, hub)


@pytest.mark.parametrize("wait_s_max", [1.0, 10.0])
def test_who_would_wait_too_long_is_refused_at_once(monkeypatch: pytest.MonkeyPatch, wait_s_max: float) -> None:
    """A disk that hangs: what waits already stays, what comes later is told so. With a longer bound nobody is refused: the control."""
    monkeypatch.setattr(ingest_module, "GROUP_BATCHES", 1)
    hub = HeldHub()
    hub.may_go_on.clear()

    async def act(intake: Intake) -> None:
        waiting = [intake.post()]
        assert await intake.loop.run_in_executor(None, hub.begun.wait, PATIENCE_S)
        waiting += [intake.post() for _ in range(5)]
        assert len(intake.ingest._backlog) == 3
        intake.clock.advance(1.5)
        late = intake.post()
        if wait_s_max == 1.0:
            found = await late
            assert refused(found, 503, "hub_busy")["retryable"]
            assert found.headers == ((b"Retry-After", b"2"),)
        else:
            waiting.append(late)
        hub.may_go_on.set()
        assert {(await each).status for each in waiting} == {200}
        assert (await intake.post()).status == 200
        assert len(hub.lines()) == len(waiting) + 1

    run(act, hub, wait_s_max=wait_s_max)


def test_a_bug_in_the_preparation_is_answered_and_logged(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> bytes:
        raise KeyError("secret")

    monkeypatch.setattr(ingest_module, "unzip", broken)

    async def act(intake: Intake) -> None:
        refused(await intake.post(), 500, "internal_error")
        assert [level for level, _, _ in intake.log.lines] == ["exception"]

    run(act)


FAULTS: dict[str, tuple[BaseException, str, str]] = {
    "storage full": (StorageFull("full"), "storage_full", "10"),
    "with a time": (HubUnavailable("away", retry_after_s=2.5), "hub_unavailable", "3"),
    "broken": (HubBroken("broken"), "hub_unavailable", "10"),
    "a bug": (ZeroDivisionError("a bug"), "hub_unavailable", "10"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_commit_that_fails_is_answered_to_every_batch_of_it(name: str) -> None:
    fault, code, after_s = FAULTS[name]
    hub = HeldHub(fault)

    async def act(intake: Intake) -> None:
        sent = [intake.post(penstock_producer=producer(sequence=1 + n)) for n in range(5)] + [intake.post()]
        for each in sent:
            response = await each
            assert refused(response, 503, code)["retryable"]
            assert response.headers == ((b"Retry-After", after_s.encode()),)
        assert hub.commits == [6]
        assert hub.lines() == []
        # The loop goes on, and what was not confirmed can be sent again.
        responses = await asyncio.gather(*(intake.post(penstock_producer=producer(sequence=1 + n)) for n in range(5)))
        assert [answer(response)["duplicate"] for response in responses] == [False] * 5

    intake = run(act, hub)
    assert intake.broken == (name == "broken")
    logged = [level for level, _, _ in intake.log.lines]
    assert logged == {"broken": ["error"], "a bug": ["exception"]}.get(name, [])


@pytest.mark.parametrize(("fault", "statuses"), [("with a time", {503}), ("storage full", {200})])
def test_who_came_while_the_hub_did_not_answer_does_not_wait_for_it_again(fault: str, statuses: set[int]) -> None:
    """Brokers that are away have taken their time once. That a disk is full was said at once, and is asked again."""
    hub = HeldHub(FAULTS[fault][0])
    hub.may_go_on.clear()

    async def act(intake: Intake) -> None:
        first = intake.post()
        assert await intake.loop.run_in_executor(None, hub.begun.wait, PATIENCE_S)
        following = [intake.post() for _ in range(7)]
        hub.may_go_on.set()
        assert (await first).status == 503
        assert {(await each).status for each in following} == statuses
        assert (await intake.post()).status == 200
        assert hub.commits == ([1, 7, 1] if 200 in statuses else [1, 1])

    run(act, hub)


def test_an_answered_batch_that_was_stored_before_a_crash_is_a_duplicate() -> None:
    """The commit succeeded, and then the hub failed before it said so: 503, and the copy finds it stored."""
    hub = HeldHub()

    async def act(intake: Intake) -> None:
        MemoryHub.append(hub, [Batch("p-1", 1, 1, 1, (), True, hashlib.sha256(EVENT).digest())])
        assert answer(await intake.post(penstock_producer=producer()))["duplicate"] is True

    run(act, hub)


def test_large_bodies_are_prepared_elsewhere_with_the_same_result() -> None:
    event = b'{"deviceId":"d-%d","x":"' + b"y" * 900 + b'"}'
    body = b"\n".join(event % (n % 7) for n in range(400))
    assert len(body) > ingest_module.BIG_BODY_BYTES

    async def act(intake: Intake) -> None:
        large, small, wrong = intake.post(body), intake.post(), intake.post(b"x" * len(body))
        assert answer(await large)["accepted"] == 400
        assert (await small).status == 200
        refused(await wrong, 400, "no_valid_event")
        assert len(intake.hub.lines()) == 401  # type: ignore[union-attr]

    run(act)


ROW = b'{"deviceId":"d-1","x":"' + b"y" * 100 + b'"}\n'


def test_bodies_that_are_large_unzipped_count_as_that_while_they_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """More of them are refused, and nobody else: a few bombs must not make a worker refuse all others."""
    monkeypatch.setattr(ingest_module, "ELSEWHERE_BYTES_MAX", 8 << 20)
    monkeypatch.setattr(ingest_module, "WAITING_BYTES_MAX", 4 << 20)
    body = gzip.compress(ROW * 9000 * 3)
    assert len(body) < ingest_module.BIG_BODY_BYTES

    async def act(intake: Intake) -> None:
        large = [intake.post(body, content_encoding=b"gzip") for _ in range(2)]
        refused(await intake.post(body, content_encoding=b"gzip"), 503, "hub_busy")
        assert (await intake.post()).status == 200
        for each in large:
            refused(await each, 413, "batch_too_large")  # of more than 10,000 events
        assert (await intake.post()).status == 200

    run(act)


@pytest.mark.parametrize("share", [2, 1])
def test_bombs_of_one_key_leave_room_for_large_batches_of_others(monkeypatch: pytest.MonkeyPatch, share: int) -> None:
    """As long as the share of a key is not the whole."""
    monkeypatch.setattr(ingest_module, "ELSEWHERE_SHARE", share)
    bomb = gzip.compress(b"\n" * (1 << 24))
    large = gzip.compress(b"".join(b'{"deviceId":"d-1","x":"%0300d"}\n' % n for n in range(8000)))

    async def act(intake: Intake) -> None:
        bombs = [intake.post(bomb, key="greedy", content_encoding=b"gzip") for _ in range(10)]
        others = [intake.post(large, key=key, content_encoding=b"gzip") for key in ("a", "b", "c")]
        statuses = [(await each).status for each in others]
        assert statuses == ([200] * 3 if share == 2 else [503] * 3)
        assert {(await each).status for each in bombs} == {400, 503}
        # What was held is given back.
        assert (await intake.post(large, key="greedy", content_encoding=b"gzip")).status == 200

    run(act)


def test_a_zstd_body_that_does_not_say_its_size_is_prepared_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    threads: list[str] = []

    def noted(body: bytes, *given: Any, **named: Any) -> bytes:
        threads.append(threading.current_thread().name)
        return unzip(body, *given, **named)

    monkeypatch.setattr(ingest_module, "unzip", noted)
    known = zstandard.ZstdCompressor().compress(ROW)
    unknown = zstandard.ZstdCompressor(write_content_size=False).compress(ROW)

    async def act(intake: Intake) -> None:
        for body in (known, unknown):
            assert (await intake.post(body, content_encoding=b"zstd")).status == 200

    run(act)
    assert [name.startswith("big-body") for name in threads] == [False, True]


def test_properties_that_make_a_small_batch_large(monkeypatch: pytest.MonkeyPatch) -> None:
    body = gzip.compress(b'{"deviceId":"a"}\n' * 10_000)

    async def act(intake: Intake) -> None:
        named = {"content_encoding": b"gzip", "penstock_property_a": b"x" * 5000}
        refused(await intake.post(body, **named), 413, "batch_too_large")
        assert (await intake.post(EVENT, penstock_property_a=b"x" * 5000)).status == 200

    run(act)


def test_a_bug_in_the_preparation_elsewhere_is_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(ingest_module, "unzip", fail)

    async def act(intake: Intake) -> None:
        refused(await intake.post(EVENT * 20_000), 500, "internal_error")
        assert intake.log.lines[0][0] == "exception"

    run(act)


def test_into_the_embedded_hub(tmp_path: Path) -> None:
    clock = FakeClock(1_795_356_000_000)
    create(tmp_path / "hub", partitions=4, period_s=3600, bytes_max=64 << 20, clock=clock)
    with EmbeddedHub(tmp_path / "hub", bytes_max=64 << 20, clock=clock) as hub:

        async def act(intake: Intake) -> None:
            bodies = [
                b"\n".join(b'{"deviceId":"d-%d","n":%d}' % (n % 9, n + 40 * k) for n in range(40)) for k in range(30)
            ]
            sent = [
                intake.post(body, penstock_producer=producer(body, sequence=k + 1)) for k, body in enumerate(bodies)
            ]
            assert [answer(await each)["accepted"] for each in sent] == [40] * 30
            again = [
                intake.post(body, penstock_producer=producer(body, sequence=k + 26))
                for k, body in enumerate(bodies[25:])
            ]
            assert [answer(await each)["duplicate"] for each in again] == [True] * 5

        run(act, hub)
        by_device: dict[str, list[int]] = {}
        for partition in range(4):
            for frame in hub.read(partition, "0", bytes_max=1 << 30).frames:
                for line in content(frame).split(b"\n")[:-1]:
                    event = json.loads(line)
                    by_device.setdefault(event["deviceId"], []).append(event["n"])
        assert sum(map(len, by_device.values())) == 1200
        assert all(numbers == sorted(numbers) for numbers in by_device.values())
