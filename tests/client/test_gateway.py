"""A simulated gateway against an API in memory: what it counts when that is right, and that it sees each way of being wrong."""

from __future__ import annotations

import gzip
import hashlib
import random
import threading
from collections import Counter
from collections.abc import Callable, Mapping

import msgspec
import pytest

from penstock.client.fleet import Fleet
from penstock.client.gateway import FAULTS, WRONG, Account, Gateway, Tally
from penstock.client.simulate import Schedule
from penstock.client.transport import Answer
from penstock.testing import FakeClock
from tests.client.conftest import MemoryApi, answer, lost_answer, problem, says

DEVICES = 12
ROUNDS = 70


class StrictApi(MemoryApi):
    """Refuses what a hub refuses, and rejects the events that a gateway spoils. Serves as `Misconduct` too."""

    def post(self, body: bytes, headers: Mapping[str, str]) -> Answer:
        if hashlib.sha256(body).hexdigest() not in headers["Penstock-Producer"]:
            return problem(400, "body_mismatch", retryable=True)
        try:
            gzip.decompress(body)
        except EOFError:
            return problem(400, "malformed_gzip", retryable=False)
        return super().post(body, headers)

    def store(self, body: bytes, number: str) -> Answer:
        lines = gzip.decompress(body).splitlines()
        known = {line: code for code, line in WRONG.items()}
        marked = [b"!" if line in known else line for line in lines]
        # The number is of the body as it was sent; the lines that are marked are the ones that the other rejects.
        stored = super().store(gzip.compress(b"\n".join(marked) + b"\n", mtime=0), _again(number, marked))
        reply = msgspec.json.decode(stored.body)
        for rejected in reply.get("rejected", ()):
            rejected["code"] = known[lines[rejected["index"]]]
        return answer(stored.status, reply)

    def leave(self, body: bytes, headers: Mapping[str, str], *, after_bytes: int) -> None:
        if after_bytes == len(body):
            self.post(body, headers)

    def dawdle(self, body: bytes, headers: Mapping[str, str]) -> Answer:
        return self.post(body, headers)


def _again(number: str, lines: list[bytes]) -> str:
    body = gzip.compress(b"\n".join(lines) + b"\n", mtime=0)
    return f"{number.rpartition('=')[0]}={hashlib.sha256(body).hexdigest()}"


def gateway(api: StrictApi, *, faults: bool, knows_numbers: bool = True) -> Gateway:
    return Gateway(
        "sim-run-0",
        api,
        misconduct=api if faults else None,
        knows_numbers=knows_numbers,
        chance=random.Random(7),
        clock=FakeClock(jumps=True),
        stop=threading.Event(),
    )


def send(api: StrictApi, *, faults: bool = False, knows_numbers: bool = True) -> Tally:
    """Rounds of one event of each device."""
    one = gateway(api, faults=faults, knows_numbers=knows_numbers)
    for n in range(ROUNDS):
        one.put([b'{"deviceId":"sim-run-%d","n":%d}' % (device, n) for device in range(DEVICES)], reconnect=n % 9 == 0)
    one.close()
    one.run()
    return one.tally


@pytest.mark.parametrize("faults", [False, True])
def test_all_is_answered_and_accounted_for(faults: bool) -> None:
    api = StrictApi()
    tally = send(api, faults=faults)
    assert tally.problems == []
    assert (tally.accepted, len(api.stored)) == (ROUNDS * DEVICES, ROUNDS * DEVICES)
    assert tally.sent == tally.accepted + tally.rejected
    assert tally.copies >= 3 * DEVICES
    assert tally.duplicates == tally.copies + DEVICES * tally.faults["answer not awaited"]
    assert api.gaps == 0
    assert tally.unsettled == []
    assert tally.stored == max(api.last.values())
    assert bool(tally.rejected) is faults
    assert set(tally.faults) == (set(FAULTS) if faults else set())
    found = Account()
    found.add([line[:-1] for line in api.stored])
    assert found.devices == tally.account.devices


def test_a_lost_answer_is_asked_for_again() -> None:
    tally = send(api := StrictApi(lost_answer, None, lost_answer))
    assert (tally.problems, tally.accepted, len(api.stored)) == ([], ROUNDS * DEVICES, ROUNDS * DEVICES)
    assert tally.retries == 2
    assert tally.duplicates == tally.copies + 2 * DEVICES


def _forgets_numbers(api: MemoryApi, _body: bytes, _number: str) -> None:
    api.numbers.clear()


def _takes_all(api: MemoryApi, body: bytes, number: str) -> Answer:
    producer, sequence = number.split(";")[0], number.split("sequence=")[1].split(";")[0]
    events = len(gzip.decompress(body).splitlines())
    return answer(200, {"batch": f"{producer}:1:{sequence}", "accepted": events, "duplicate": True, "rejected": []})


def test_where_readers_judge_numbers_whatever_comes_under_one_is_to_be_taken() -> None:
    api = StrictApi(*[_forgets_numbers] * 1000)
    tally = send(api, faults=True, knows_numbers=False)
    assert (tally.problems, tally.accepted, tally.duplicates) == ([], ROUNDS * DEVICES, 0)
    assert tally.copies >= 3 * DEVICES
    reused = tally.faults["number reused"]
    assert len(api.stored) > ROUNDS * DEVICES + tally.copies + reused * DEVICES > ROUNDS * DEVICES + tally.copies


@pytest.mark.parametrize(
    ("fault", "faults", "says_so"),
    [
        (_forgets_numbers, False, "not recognised"),
        (_forgets_numbers, True, "number_reused should have been the answer"),
        (_takes_all, True, "rejected were {}"),
        (
            says(problem(400, "malformed_gzip", retryable=False)),
            False,
            "the batch is in order, but was answered Refused",
        ),
    ],
)
def test_a_wrong_answer_is_a_problem(
    fault: Callable[[MemoryApi, bytes, str], Answer | None], faults: bool, says_so: str
) -> None:
    tally = send(StrictApi(*[fault] * 1000), faults=faults)
    assert any(says_so in text for text in tally.problems), tally.problems


def test_what_was_posted_and_not_answered_is_unsettled() -> None:
    api = StrictApi(*[lost_answer] * 3)
    one = gateway(api, faults=False)
    stop = one._stop

    class Stopping(FakeClock):
        def wait(self, event: threading.Event, timeout_s: float) -> bool:
            stop.set()
            return True

    one._clock = Stopping()
    lines = [b'{"deviceId":"sim-run-0","n":0}']
    one.put(lines)
    one.put(lines)
    one.close()
    one.run()
    assert (one.tally.sent, one.tally.accepted, one.tally.unsettled) == (2, 0, [lines])
    assert len(api.stored) == 1


def test_an_account_sees_loss_copies_order_and_bytes() -> None:
    lines = [b'{"deviceId":"sim-run-1","n":%d' % n for n in range(4)]

    def account(*given: bytes) -> dict[bytes, tuple[int, int]]:
        one = Account()
        one.add(given)
        return one.devices

    assert account(*lines) == account(*lines)
    others = [lines[1:], [*lines, lines[3]], [lines[1], lines[0], *lines[2:]], [*lines[:3], lines[3] + b" "]]
    assert all(account(*other) != account(*lines) for other in others)


def test_the_schedule_sends_all_that_the_fleet_says() -> None:
    api = StrictApi()
    clock = FakeClock(jumps=True)
    stop, ended, moments = threading.Event(), threading.Event(), list[float]()
    fleet = Fleet("run", devices=50, gateways=3, rate=400, seconds=5.0, seed=7, began_ms=clock.now_ms())
    gateways = [
        Gateway(f"sim-run-{n}", api, misconduct=None, chance=random.Random(n), clock=FakeClock(jumps=True), stop=stop)
        for n in range(3)
    ]
    schedule = Schedule(fleet, gateways, patience_s=30, clock=clock, ended=ended, stop=stop)
    assert schedule.run(5.0, moments.append) >= 5.0
    assert moments == sorted(moments)
    assert moments[-1] == 5.0
    assert len(api.stored) == sum(gateway.tally.accepted for gateway in gateways) == 2000
    last: Counter[str] = Counter()
    for event in map(msgspec.json.decode, api.stored):
        last[event["deviceId"]] += 1
        assert event["n"] == last[event["deviceId"]]


def test_behind_a_batch_that_was_not_settled_nothing_is_posted() -> None:
    api = StrictApi(None, says(problem(400, "malformed_gzip", retryable=False)))
    tally = send(api)
    assert (tally.sent, tally.accepted, len(api.seen)) == (ROUNDS * DEVICES, DEVICES, 2)
    assert len(tally.unsettled) == 1
