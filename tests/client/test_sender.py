"""The sender against an API in memory."""

from __future__ import annotations

import gzip
import hashlib
import itertools
import re
import threading
import zlib
from collections.abc import Mapping

import msgspec
import pytest

from penstock.client import sender as module
from penstock.client.sender import GaveUp, Place, Rejected, Sender, Summary
from penstock.client.transport import Answer
from penstock.testing import FakeClock
from tests.client.conftest import Fault, MemoryApi, answer, lost_answer, never_arrived, problem, says


def send(
    api: MemoryApi,
    lines: list[bytes],
    *,
    lanes: int = 1,
    batch_events: int = 3,
    timeout_s: float = 600.0,
    clock: FakeClock | None = None,
) -> tuple[Summary, list[Rejected]]:
    rejected: list[Rejected] = []
    names = itertools.count()
    sender = Sender(
        [api] * lanes,
        device_field="deviceId",
        batch_events=batch_events,
        timeout_s=timeout_s,
        clock=clock or FakeClock(jumps=True),
        on_rejected=rejected.append,
        new_producer=lambda: f"p-{next(names)}",
        jitter=lambda: 1.0,
    )
    for number, line in enumerate(lines, 1):
        sender.add(line, Place("file", number))
    return sender.finish(), rejected


def events(count: int, devices: int = 5) -> list[bytes]:
    return [b'{"deviceId":"d-%d","n":%d}' % (n % devices, n) for n in range(count)]


@pytest.mark.parametrize("lanes", [1, 4])
def test_all_arrive_once_and_in_order_for_each_device(lanes: int) -> None:
    api = MemoryApi()
    summary, rejected = send(api, events(100), lanes=lanes)
    assert (summary, rejected) == (Summary(100, 0, 0), [])
    assert sorted(api.stored) == sorted(events(100))
    for device in range(5):
        mine = [line for line in events(100) if b'"d-%d"' % device in line]
        assert [line for line in api.stored if b'"d-%d"' % device in line] == mine
    assert api.gaps == 0


@pytest.mark.parametrize(
    "fault",
    [
        never_arrived,
        says(problem(503, "hub_busy", retryable=True)),
        says(problem(429, "throughput_exceeded", retryable=True)),
        says(problem(408, "request_timeout", retryable=True)),
        says(problem(425, "too_early", retryable=True)),
        says(problem(400, "body_mismatch", retryable=True)),
        says(problem(500, "internal_error", retryable=False)),
        says(problem(401, "unauthenticated", retryable=False)),
        says(Answer(404, {}, b"<html>nginx</html>")),
        says(Answer(302, {"location": "/"}, b"")),
        says(Answer(200, {}, b"<html>log in first</html>")),
        says(answer(200, {"batch": "p-0:1:7", "accepted": 3, "duplicate": False, "rejected": []})),
        says(answer(200, {"batch": "p-0:1:1", "accepted": 2, "duplicate": False, "rejected": []})),
        says(answer(200, {"batch": "p-0:1:1", "accepted": 4, "duplicate": False, "rejected": []})),
        says(answer(400, {"code": "no_valid_event", "detail": "", "rejected": []})),
        says(answer(200, {"batch": "p-0:1:1", "accepted": 1, "rejected": [{"index": 9}, {"index": 1}]})),
        says(answer(200, {"batch": "p-0:1:1", "accepted": 1, "rejected": [{"index": 1}, {"index": 1}]})),
    ],
)
def test_what_settles_nothing_is_repeated_with_the_same_number(fault: Fault) -> None:
    api = MemoryApi(fault, fault)
    summary, rejected = send(api, events(3))
    assert (summary, rejected) == (Summary(3, 0, 0), [])
    assert len(api.seen) == 3
    assert len(set(api.seen)) == 1
    assert api.stored == events(3)


def test_an_answer_that_was_lost_is_a_duplicate_and_stored_once() -> None:
    api = MemoryApi(lost_answer)
    summary, _ = send(api, events(6))
    assert summary == Summary(6, 0, 3)
    assert api.stored == events(6)


def test_control_with_a_new_number_for_each_attempt_it_would_be_stored_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    store = MemoryApi.store
    fresh = itertools.count(1000)

    def renumbered(api: MemoryApi, body: bytes, number: str) -> Answer:
        reply = store(api, body, re.sub(r"sequence=\d+", f"sequence={next(fresh)}", number))
        claimed = msgspec.json.decode(reply.body) | {"batch": number.split(";")[0] + ":1:" + number.split("=")[2][0]}
        return answer(reply.status, claimed)

    monkeypatch.setattr(MemoryApi, "store", renumbered)
    api = MemoryApi(lost_answer)
    send(api, events(3))
    assert api.stored != events(3)


@pytest.mark.parametrize("code", ["number_reused", "number_too_old", "producer_fenced"])
def test_a_number_that_cannot_be_used_makes_a_new_producer(code: str) -> None:
    api = MemoryApi(None, says(problem(409, code, retryable=False)))
    summary, _ = send(api, events(9))
    assert summary == Summary(9, 0, 0)
    assert [number.partition(";")[0] for number in api.seen] == ["p-0", "p-0", "p-1", "p-1"]
    assert api.stored == events(9)


def test_too_large_is_halved_and_keeps_its_order() -> None:
    api = MemoryApi(lines_max=2)
    summary, rejected = send(api, events(9, devices=1), batch_events=9)
    assert (summary, rejected) == (Summary(9, 0, 0), [])
    assert api.stored == events(9, devices=1)
    assert api.gaps == 0


def test_an_event_that_is_too_large_alone_is_rejected_by_name() -> None:
    api = MemoryApi(lines_max=0)
    summary, rejected = send(api, events(2))
    assert summary == Summary(0, 2, 0)
    assert [(one.place.line, one.code) for one in rejected] == [(1, "batch_too_large"), (2, "batch_too_large")]


def test_rejected_events_are_named_by_their_line() -> None:
    api = MemoryApi()
    summary, rejected = send(api, [b'{"deviceId":"a"}', b"!", b'{"deviceId":"b"}', b"!", b"!", b"!"])
    assert summary == Summary(2, 4, 0)
    assert [(one.place, one.code) for one in rejected] == [(Place("file", n), "not_json") for n in (2, 4, 5, 6)]
    assert api.gaps == 0


def test_a_batch_that_is_refused_for_good_is_rejected_and_the_rest_goes_on() -> None:
    api = MemoryApi(says(problem(415, "unsupported_encoding", retryable=False)))
    summary, rejected = send(api, events(6))
    assert summary == Summary(3, 3, 0)
    assert {one.code for one in rejected} == {"unsupported_encoding"}
    assert api.gaps == 0


def test_retry_after_is_waited_for_and_the_backoff_grows() -> None:
    busy = says(problem(503, "hub_busy", retryable=True, retry_after="7"))
    clock = FakeClock(jumps=True)
    send(MemoryApi(busy, never_arrived, never_arrived), events(3), clock=clock)
    assert clock.monotonic() == pytest.approx((7 + 0.2) + 0.4 + 0.8)


def test_it_gives_up_after_a_time_without_any_progress() -> None:
    clock = FakeClock(jumps=True)
    api = MemoryApi(*[never_arrived] * 1000)
    with pytest.raises(GaveUp, match="refused"):
        send(api, events(3), timeout_s=60.0, clock=clock)
    assert 30.0 < clock.monotonic() <= 60.0


def test_batches_stay_below_the_limits_of_a_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_ZIPPED_BYTES_MAX", 400)
    monkeypatch.setattr(module, "RAW_BYTES_MAX", 4000)
    sizes: list[tuple[int, int]] = []

    class Measuring(MemoryApi):
        def store(self, body: bytes, number: str) -> Answer:
            sizes.append((len(body), len(gzip.decompress(body))))
            return super().store(body, number)

    api = Measuring()
    lines = [b'{"deviceId":"d","x":"%s"}' % hashlib.sha256(b"%d" % n).hexdigest().encode() for n in range(500)]
    summary, _ = send(api, lines, batch_events=500)
    assert summary == Summary(500, 0, 0)
    assert api.stored == lines
    assert max(zipped for zipped, _ in sizes) <= 400
    assert max(raw for _, raw in sizes) <= 4000


def test_memory_is_bounded_while_the_api_is_down() -> None:
    gate = threading.Event()

    class Waiting(MemoryApi):
        def post(self, body: bytes, headers: Mapping[str, str]) -> Answer:
            gate.wait(30)
            return super().post(body, headers)

    api, added = Waiting(), 0
    names = itertools.count()
    sender = Sender(
        [api],
        device_field="deviceId",
        batch_events=1,
        timeout_s=60,
        clock=FakeClock(jumps=True),
        on_rejected=lambda _: None,
        new_producer=lambda: f"p-{next(names)}",
        jitter=lambda: 1.0,
    )

    def fill() -> None:
        nonlocal added
        for line in events(50):
            sender.add(line, Place("file", 1))
            added += 1

    filler = threading.Thread(target=fill)
    filler.start()
    filler.join(0.5)
    assert added <= 5
    gate.set()
    filler.join(30)
    assert sender.finish() == Summary(50, 0, 0)


def test_a_device_is_always_in_one_lane() -> None:
    lanes = module._Lanes("deviceId", 4)
    assert lanes(b'{"deviceId":"d-1","x":{"deviceId":"d-2"}}') == zlib.crc32(b"d-1") % 4
    assert [lanes(line) for line in (b"{", b"[]", b'{"deviceId":3}', b'"\xff"', b"{}")] == [0] * 5


def test_a_line_that_is_nested_too_deeply_is_for_the_api_to_judge() -> None:
    api = MemoryApi()
    deep = b'{"x":' + b"[" * 50_000 + b"]" * 50_000 + b',"deviceId":"d"}'
    send(api, [deep, *events(2)], lanes=2)
    assert deep in api.stored
