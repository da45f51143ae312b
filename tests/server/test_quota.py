"""The limits in front of the intake, and the memory that processes share for them."""

from __future__ import annotations

import asyncio
import gzip
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest

from penstock.clock import SystemClock
from penstock.errors import BadParameter, HubUnavailable, SettingsError, ThroughputExceeded
from penstock.events import Batch, Group
from penstock.files import Files
from penstock.server.app import Router, Where, routes
from penstock.server.auth import ANYONE
from penstock.server.buckets import size_of
from penstock.server.message import Grant, Line, Request, Response, Right
from penstock.server.quota import Quota
from penstock.server.shared import Shared
from penstock.server.units import Units, observe, open_buckets, prepare, read_units
from penstock.testing import FakeClock, MemoryLog
from tests.server.test_app import Api
from tests.server.test_ingest import EVENT, Intake, producer, refused
from tests.server.test_ingest import run as run_intake

PARTITIONS = 4


class Installation:
    """A data folder with its limits, as one process sees them."""

    def __init__(self, data: Path, units: int | None = None, **limits: Any) -> None:
        self.data, self.run = data, data / "run"
        self.run.mkdir(exist_ok=True)
        prepare(self.data, self.run, PARTITIONS, units)
        self.shared, self.buckets = open_buckets(self.data, self.run, Files(), PARTITIONS)
        self.clock, self.log = FakeClock(), MemoryLog()
        self.clock.advance(1000)
        self.quota = Quota(self.shared, self.buckets, self.clock, self.log, **limits)
        self.units = Units(self.data, self.run, Files(), self.shared, self.buckets, self.clock)

    def charge(
        self, events: int, *, size: int = 100, partition: int = 0, who: bytes = b"p-1", grant: Grant = ANYONE
    ) -> None:
        self.charge_lines({"d": events}, partition=partition, size=size, who=who, grant=grant)

    def charge_lines(
        self,
        devices: dict[str, int],
        *,
        size: int = 100,
        partition: int = 0,
        who: bytes = b"p-1",
        grant: Grant = ANYONE,
    ) -> None:
        lines = b"".join(b'{"deviceId":"%b","n":1}\n' % device.encode() * count for device, count in devices.items())
        events = sum(devices.values())
        batch = Batch("p", 1, 1, events, (Group(partition, events, lines),))
        self.quota.charge(request(who, grant), batch, size)

    def put(self, body: bytes) -> Any:
        asked = Request(b"PUT", b"/v1/throughput-units", b"", {}, body)
        return msgspec.json.decode(self.units.put(asked, ()).body)


def request(who: bytes, grant: Grant = ANYONE) -> Request:
    made = Request(b"POST", b"/v1/events", b"", {b"penstock-producer": who + b";epoch=1"}, b"x")
    made.grant = grant
    return made


def over(act: Any, *arguments: Any, **options: Any) -> dict[str, Any]:
    with pytest.raises(ThroughputExceeded) as raised:
        act(*arguments, **options)
    return raised.value.fields


def test_units_limit_events_and_bytes_and_a_partition(tmp_path: Path) -> None:
    one = Installation(tmp_path, 2)
    one.charge(1000)
    assert over(one.charge, 1, who=b"p-2") == {"limit": "partition", "partition": 0, "retry_after_s": 0.001}
    one.charge(1000, partition=1)
    assert over(one.charge, 500, partition=2, who=b"p-3") == {"limit": "throughput_units", "retry_after_s": 0.25}
    one.clock.advance(10)
    one.charge(1, size=2_000_000)
    assert over(one.charge, 1, size=500_000, who=b"p-4") == {"limit": "throughput_units", "retry_after_s": 0.25}
    found = msgspec.json.decode(one.units.get(request(b""), ()).body)
    assert found["refused"] == {"throughput_units": 2, "partition": 1, "key": 0, "device": 0}
    one.clock.advance(1)
    assert msgspec.json.decode(one.units.get(request(b""), ()).body)["used_bytes_per_s"] == 400_000


def test_a_key_has_its_quota_and_others_theirs(tmp_path: Path) -> None:
    one = Installation(tmp_path)
    first, second = ANYONE._replace(key="k1", events_per_s=100.0), ANYONE._replace(key="k2", bytes_per_s=1000.0)
    one.charge(100, grant=first)
    fields = over(one.charge, 50, grant=first)
    assert fields == {"limit": "key", "retry_after_s": 0.5}
    one.charge(100_000, size=1000, grant=second)
    assert over(one.charge, 1, size=500, grant=second)["limit"] == "key"
    one.charge(100_000)
    with pytest.raises(ThroughputExceeded):
        one.quota.check(request(b"p-1", first))
    one.quota.check(request(b"p-1", ANYONE._replace(key="k3")))
    one.clock.advance(0.5)
    one.quota.check(request(b"p-1", first))
    one.charge(50, grant=first)


def test_a_device_has_its_quota_and_the_batch_is_refused_as_a_whole(tmp_path: Path) -> None:
    one = Installation(tmp_path, device_events_per_s=10)
    one.charge_lines({"d-1": 10, "d-2": 1})
    fields = over(one.charge_lines, {"d-3": 5, "d-1": 5})
    assert fields == {"limit": "device", "device": "d-1", "retry_after_s": 0.5}
    one.charge_lines({"d-3": 10}, who=b"p-2")
    one.charge_lines({"d-2": 9}, who=b"p-2")


def test_without_limits_nothing_is_counted(tmp_path: Path) -> None:
    one = Installation(tmp_path)
    for _ in range(100):
        one.charge(10_000)
    one.quota.check(request(b"p-1"))
    assert one.buckets.use(1001.0) == (0.0, 0.0) and not one.log.lines


def test_who_is_over_learns_it_over_http_before_anything_is_unzipped(tmp_path: Path) -> None:
    one = Installation(tmp_path, 1)
    body = EVENT + b"\n"

    async def act(intake: Intake) -> None:
        many = body * 1000
        assert (await intake.post(many, penstock_producer=producer(many))).status == 200
        response = await intake.post(body, penstock_producer=producer(body, sequence=2))
        found = refused(response, 429, "throughput_exceeded")
        assert dict(response.headers)[b"Retry-After"] == b"1"
        assert (found["retryable"], found["limit"]) == (True, "partition")
        # Nothing but the producer is looked at: this body could not even be read.
        for _ in range(2):
            wrong = {"content_encoding": b"gzip", "penstock_producer": producer(b"x", sequence=2)}
            refused(await intake.post(b"x", **wrong), 429, "throughput_exceeded")
        refused(await intake.post(b"x", content_encoding=b"gzip"), 400, "malformed_gzip")
        one.clock.advance(1)
        assert (await intake.post(body, penstock_producer=producer(body, sequence=2))).status == 200
        assert len(intake.hub.lines()) == 1001  # type: ignore[union-attr]

    run_intake(act, quota=one.quota)


def test_a_big_body_is_refused_like_a_small_one(tmp_path: Path) -> None:
    one = Installation(tmp_path, 1)
    body = b"".join(b'{"deviceId":"d-%d","text":"%b"}\n' % (n, b"x" * 1000) for n in range(3000))

    async def act(intake: Intake) -> None:
        assert (await intake.post(body)).status == 200
        answers = await asyncio.gather(*(intake.post(body) for _ in range(3)))
        assert [answer.status for answer in answers] == [429] * 3
        # All three sent the same, so they are told apart by nothing; each has a time of its own all the same.
        assert len({dict(answer.headers)[b"Retry-After"] for answer in answers}) == 3

    run_intake(act, quota=one.quota)


def test_who_names_no_producer_is_known_by_what_it_sends_however_often_it_is_zipped(tmp_path: Path) -> None:
    one = Installation(tmp_path, 1)

    async def act(intake: Intake) -> None:
        def zipped(n: int, at: int) -> bytes:
            body = b"".join(b'{"deviceId":"d-%d","temperature":21.40}\n' % n for _ in range(500))
            return gzip.compress(body, mtime=at)

        async def post(n: int, at: int) -> int:
            return (await intake.post(zipped(n, at), content_encoding=b"gzip")).status

        assert [await post(n, 1) for n in (1, 1, 1, 2)] == [200, 200, 429, 429]
        one.clock.advance(0.6)
        assert await post(3, 2) == 429  # there would be room, but not for one that has not waited
        one.clock.advance(0.4)
        assert [await post(n, 2) for n in (2, 1)] == [200, 200]

    run_intake(act, quota=one.quota)


def test_a_place_belongs_to_the_connection_only_with_the_key_that_it_was_given_to(tmp_path: Path) -> None:
    """A proxy may send the requests of several keys over one connection."""
    one, line = Installation(tmp_path, 1), Line()
    batch = Batch("p", 1, 1, 500, (Group(0, 500, b'{"deviceId":"d"}\n' * 500),))

    def post(body: bytes, key: str) -> None:
        made = Request(b"POST", b"/v1/events", b"", {}, body)
        made.grant, made.peer, made.line = ANYONE._replace(key=key), "192.0.2.1", line
        one.quota.charge(made, batch, 100)

    one.charge(1000)
    assert over(one.charge, 500, who=b"p-2")["retry_after_s"] == 0.5
    assert over(post, b"a", "k1")["retry_after_s"] == 1.0
    one.clock.advance(0.6)
    one.charge(500, who=b"p-2")
    one.clock.advance(0.4)
    told = line.whose, line.waits
    over(post, b"b", "k2")
    line.whose, line.waits = told
    post(b"c", "k1")
    assert line.waits == 0


CHARGES = """
import sys
from pathlib import Path
from tests.server.test_quota import Installation, ThroughputExceeded
one = Installation(Path(sys.argv[1]))
print("ready", flush=True)
sys.stdin.readline()
taken = 0
for _ in range(400):
    try:
        one.charge(10, who=sys.argv[2].encode())
        taken += 1
    except ThroughputExceeded:
        pass
print(taken, flush=True)
"""

HOLDS = """
import os, signal, sys
from pathlib import Path
from tests.server.test_quota import Installation
one = Installation(Path(sys.argv[1]))
assert one.shared.acquire()
one.buckets.enter()
print("ready", flush=True)
sys.stdin.readline()
"""


def child(program: str, *arguments: str) -> subprocess.Popen[str]:
    started = subprocess.Popen(
        [sys.executable, "-c", program, *arguments],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(("src", "."))},
        cwd=Path(__file__).parents[2],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert started.stdout is not None and started.stdout.readline() == "ready\n"
    return started


def test_several_processes_take_from_the_same_buckets(tmp_path: Path) -> None:
    one = Installation(tmp_path, 1)
    children = [child(CHARGES, str(tmp_path), f"p-{n}") for n in range(3)]
    for started in children:
        assert started.stdin is not None
        started.stdin.write("go\n")
        started.stdin.flush()
    taken = [int(started.communicate(timeout=60)[0]) for started in children]
    assert sum(taken) == 100, taken  # time stands still: a second's worth, to the event
    assert one.buckets.tickets == sum(taken_by < 400 for taken_by in taken)


def test_who_dies_with_the_lock_loses_it_and_who_stops_with_it_stops_nobody(tmp_path: Path) -> None:
    one = Installation(tmp_path, 1)
    one.charge(1000)
    assert over(one.charge, 10)["limit"] == "partition"
    holder = child(HOLDS, str(tmp_path))
    holder.send_signal(signal.SIGSTOP)
    try:
        one.charge(1000)  # nobody can tell whether it is too much: it is let in
        one.charge(1000)
        assert one.log.count("The limits of throughput are not enforced: another process keeps their lock.") == 1
        with pytest.raises(HubUnavailable):
            one.put(b'{"throughput_units": 5}')
    finally:
        holder.kill()
        holder.communicate()
    one.clock.advance(1.0)
    one.charge(1000)
    assert over(one.charge, 10, who=b"p-2")["limit"] == "partition"
    assert one.log.count("The limits of throughput are not enforced: another process keeps their lock.") == 1


def test_units_are_kept_and_in_force_everywhere_at_once(tmp_path: Path) -> None:
    one = Installation(tmp_path)
    other_shared, other = open_buckets(tmp_path, one.run, Files(), PARTITIONS)
    found = one.put(b'{"throughput_units": 20}')
    assert (found["throughput_units"], found["events_per_s"], found["bytes_per_s"]) == (20, 20_000, 20_000_000)
    assert (other.units, read_units(tmp_path)) == (20, 20)
    assert one.put(b'{"throughput_units": null}')["throughput_units"] is None
    assert (other.units, read_units(tmp_path)) == (0, 0)
    one.put(b'{"throughput_units": 0}')
    assert other.units == 0
    assert one.put(b'{"throughput_units": 7.0}')["throughput_units"] == 7  # the same number in JSON
    prepare(tmp_path, one.run, PARTITIONS, None)
    assert other.units == 7
    prepare(tmp_path, one.run, PARTITIONS, 8)
    assert (other.units, read_units(tmp_path)) == (8, 8)
    # After a power cut there is no memory, or one of another boot.
    (one.run / "quota").unlink()
    assert open_buckets(tmp_path, one.run, Files(), PARTITIONS)[1].units == 8
    (one.run / "quota").write_bytes(b"\xff" * size_of(PARTITIONS))
    assert open_buckets(tmp_path, one.run, Files(), PARTITIONS)[1].units == 8
    other_shared.close()


@pytest.mark.parametrize(
    "body",
    [b"", b"5", b"{}", b'{"throughput_units": -1}', b'{"throughput_units": 1.5}', b'{"throughput_units": "5"}', b"\xff",
     b'{"throughput_units": 1000001}', b'{"throughput_units": 99999999999999999999}', b"[" * 100_000],
)  # fmt: skip
def test_what_is_no_number_of_units_changes_nothing(tmp_path: Path, body: bytes) -> None:
    one = Installation(tmp_path, 3)
    with pytest.raises(BadParameter):
        one.put(body)
    assert (one.buckets.units, read_units(tmp_path)) == (3, 3)


def test_who_may_see_units_may_not_set_them_and_nobody_on_the_open_port(tmp_path: Path) -> None:
    one, api = Installation(tmp_path), Api()

    def ask(where: Where, rights: Right, method: bytes) -> int:
        every = routes(api.intake, api.reads, lambda work: lambda r, names, reply: reply(work(r, names)), one.units)
        answers: list[Response] = []
        router = Router((route for route in every if where in route.where), lambda _request: Grant(rights))
        router(Request(method, b"/v1/throughput-units", b"", {}, b'{"throughput_units": 4}'), answers.append)
        return answers[0].status

    assert [ask(Where.ADMIN, Right.LISTEN, method) for method in (b"GET", b"PUT")] == [200, 403]
    assert [ask(Where.ADMIN, Right.SEND, method) for method in (b"GET", b"PUT")] == [403, 403]
    assert [ask(Where.LISTEN, Right.MANAGE, method) for method in (b"GET", b"PUT")] == [404, 404]
    assert one.buckets.units == 0
    assert ask(Where.ADMIN, Right.MANAGE, b"PUT") == 200
    assert one.buckets.units == 4


def test_units_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    (tmp_path / "units.json").write_bytes(b"{")
    with pytest.raises(SettingsError, match=r"units\.json cannot be read"):
        Installation(tmp_path)
    assert Installation(tmp_path, 4).buckets.units == 4


def test_room_that_the_disk_does_not_have_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_self: Files, _path: Path, _size: int) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Files, "share", full)
    with pytest.raises(SettingsError, match=r"cannot be kept in .*: No space left"):
        Installation(tmp_path)


def test_what_is_in_force_can_be_seen_without_any_process(tmp_path: Path) -> None:
    clock = SystemClock()
    assert observe(tmp_path, tmp_path / "run", PARTITIONS, clock).throughput_units is None
    assert list(tmp_path.iterdir()) == []
    one = Installation(tmp_path, 6)
    over(lambda: [one.charge(1000) for _ in range(2)])
    seen = observe(tmp_path, one.run, PARTITIONS, clock)
    assert (seen.throughput_units, seen.refused["partition"], seen.waiting) == (6, 1, 1)
    (one.run / "quota").unlink()
    assert observe(tmp_path, one.run, PARTITIONS, clock).throughput_units == 6


def test_the_lock_is_among_threads_too(tmp_path: Path) -> None:
    shared = Shared(Files(), tmp_path / "memory", 100)
    assert shared.acquire()
    assert not shared.acquire()
    shared.release()
    assert shared.acquire()
    assert len(shared.memory) == 100
    shared.release()
    shared.close()
