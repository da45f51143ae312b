"""All attacks at once beside good clients: what those were told is stored, each event once, and nothing else is.

`PENSTOCK_HOSTILE_S` is how long it goes on. What it costs a good client is measured by `make hostile`, and judged by nobody here.
"""

from __future__ import annotations

import os
import random
import threading
from collections.abc import Callable

from bench.attack import KINDS, AttackResult, Plan, damaged
from bench.hostile import asks_for_keys, hostile_lines
from bench.run import Generator
from tests.crash.load import Load
from tests.e2e.oracle import Batch, problems
from tests.e2e.system import System, rss_anon_kib

SECONDS = float(os.environ.get("PENSTOCK_HOSTILE_S", "60"))
PARTITIONS = 4
WORKER_GROWTH_KIB_MAX = 250 << 10


def test_good_clients_lose_nothing_and_hostile_ones_get_nothing_in(make_system: Callable[..., System]) -> None:
    times = ("--header-timeout", "3s", "--body-timeout", "3s", "--idle-timeout", "3s", "--write-timeout", "3s")
    system = make_system(partitions=PARTITIONS, options=times).start()
    workers = system.parts("api")
    before = {pid: rss_anon_kib(pid) for pid in workers.values()}
    most = dict(before)
    port = int(system.url.rpartition(":")[2])
    tokens = asks_for_keys(port)
    load = Load(lambda: system.url, seed=1).start()
    plan = Plan(port, idle=500, slow=100, rate=100.0, tokens=tokens)
    with Generator("bench.attack", plan, AttackResult) as attack:
        attack.await_mark("began")
        ending = threading.Event()
        for _ in range(int(SECONDS / 0.25)):
            ending.wait(0.25)
            most = {pid: max(most[pid], rss_anon_kib(pid)) for pid in most}
            assert system.get("/health/ready")[0] == 200
        attack.stop()
        result = attack.result()
    confirmed = load.confirmed
    load.stop()
    assert (result.idle, result.slow, result.unexpected) == (500, 100, [])
    assert result.reopened >= 100, "the slow ones were ended"
    assert {kind for kind, answers in result.answers.items() if answers} == set(KINDS) - (
        set() if tokens else {"token"}
    )
    assert confirmed > 10 * SECONDS
    assert load.codes <= {"hub_busy"}
    assert system.parts("api") == workers, "no worker has died"
    growth = {pid: most[pid] - before[pid] for pid in most}
    print(f"{confirmed} good batches; attacks: {result.answers}; workers grew by {growth} KiB")
    assert max(growth.values()) < WORKER_GROWTH_KIB_MAX, growth
    system.settle()
    assert problems(system.store, PARTITIONS, load.batches) == []
    assert hostile_lines(system.store) == 0


def test_control_an_event_of_a_hostile_device_would_be_found(make_system: Callable[..., System]) -> None:
    system = make_system(partitions=PARTITIONS, workers=1).start()
    system.run("send", "-", "--url", system.url, stdin=b'{"deviceId":"hostile"}\n{"deviceId":"good-1"}\n')
    system.settle()
    assert hostile_lines(system.store) == 1
    assert problems(system.store, PARTITIONS, [[Batch([b'{"deviceId":"good-1"}'])]]) != []


REASONS = (b";sha256=" + b"0" * 64, b"\r\nContent-Encoding: gzip\r\n", b'"receivedAt":')


def test_damage_leaves_two_reasons_to_refuse_a_request() -> None:
    """So the hostile load cannot make a request that is right to be stored."""
    made = [damaged(random.Random(seed)) for seed in range(2000)]
    whole = [one for one in made if one.endswith(b"}")]
    assert len(whole) > 1000
    assert all(sum(reason in one for reason in REASONS) >= 2 for one in whole)
    assert any(sum(reason in one for reason in REASONS) == 2 for one in whole)
