"""The client with its threads, against an API in memory and a spool on disk."""

from __future__ import annotations

import gc
import json
import signal
import subprocess
import sys
import threading
from collections import defaultdict
from pathlib import Path
from typing import Any

import msgspec
import pytest

from penstock.client import sending
from penstock.client.client import Client
from penstock.client.lane import DEAD
from penstock.client.sending import Rejected
from penstock.errors import FlushTimeout, HubUnavailable, SettingsError, SpoolClosed, SpoolFull
from penstock.files import Files
from tests.client.conftest import Fault, MemoryApi, answer, lost_answer, never_arrived, problem, says


def client_of(spool: Path, api: MemoryApi, **options: Any) -> Client:
    return Client(spool=spool, connect=lambda: api, **{"linger_s": 0.02, **options})


def event(n: int, device: str = "d") -> dict[str, object]:
    return {"deviceId": device, "n": n}


def numbers(api: MemoryApi) -> list[int]:
    return [json.loads(line)["n"] for line in api.stored]


def test_what_was_sent_is_stored_and_the_spool_is_empty(tmp_path: Path) -> None:
    api = MemoryApi(never_arrived, lost_answer)
    with client_of(tmp_path, api, batch_events=10) as client:
        for n in range(95):
            client.send(event(n))
        client.flush()
        stats = client.stats()
    assert numbers(api) == list(range(95))
    assert (stats.taken, stats.accepted, stats.waiting_events, stats.waiting_bytes) == (95, 95, 0, 0)
    assert api.gaps == 0


def test_every_form_of_an_event_is_one_line(tmp_path: Path) -> None:
    class Reading(msgspec.Struct):
        deviceId: str
        n: float

    api = MemoryApi()
    with client_of(tmp_path, api) as client:
        client.send_many(
            [{"deviceId": "d", "n": 1}, Reading("d", 2.5), b'{"deviceId":"d","n":1.50}\n', '{"deviceId":"d","n":4}']
        )
        for wrong in (b"", b"\n", b'{"deviceId":\n"d"}'):
            with pytest.raises(ValueError, match="one line"):
                client.send(wrong)
        client.flush()
    assert api.stored == [
        b'{"deviceId":"d","n":1}',
        b'{"deviceId":"d","n":2.5}',
        b'{"deviceId":"d","n":1.50}',
        b'{"deviceId":"d","n":4}',
    ]


def test_lanes_keep_the_order_of_each_device(tmp_path: Path) -> None:
    api = MemoryApi(*[lost_answer, None, never_arrived] * 5)
    with client_of(tmp_path, api, lanes=4, batch_events=5) as client:
        for n in range(200):
            client.send(event(n, f"d-{n % 7}"))
        client.flush()
    seen: dict[str, list[int]] = defaultdict(list)
    for line in api.stored:
        found = json.loads(line)
        seen[found["deviceId"]].append(found["n"])
    assert sum(map(len, seen.values())) == 200
    assert all(of == sorted(of) for of in seen.values())
    assert len({number.partition(";")[0] for number in api.seen}) == 4


def test_flush_says_what_it_waits_for_and_the_next_client_sends_it(tmp_path: Path) -> None:
    down = MemoryApi(*[says(answer(503, {"code": "hub_busy", "detail": "full", "retryable": True}))] * 1000)
    with client_of(tmp_path, down) as client:
        client.send(event(1))
        with pytest.raises(FlushTimeout, match="hub_busy: full"):
            client.flush(timeout_s=0.3)
        assert client.stats().state == "waiting"
    up = MemoryApi()
    with client_of(tmp_path, up) as client:
        client.flush()
    assert numbers(up) == [1]


def test_a_portal_keeps_the_events_and_is_named(tmp_path: Path) -> None:
    """Case 98."""
    page = says(answer(200, "<html>"))
    with client_of(tmp_path, MemoryApi(page)) as client:
        client.send(event(1))
        with pytest.raises(FlushTimeout):
            client.flush(timeout_s=0.2)
        assert client.stats().state == "paused"
        assert client.stats().waiting_events == 1


def test_rejected_events_are_told_and_kept(tmp_path: Path) -> None:
    told: list[Rejected] = []
    api = MemoryApi()
    with client_of(tmp_path, api, on_rejected=told.append) as client:
        client.send_many([event(1), b"!bad", event(2)])
        client.flush()
    assert numbers(api) == [1, 2]
    assert [(one.event, one.code) for one in told] == [(b"!bad", "not_json")]
    [grave] = (tmp_path / DEAD).iterdir()
    assert json.loads(grave.read_bytes())["event"] == "!bad"


def test_a_callback_that_raises_does_not_end_its_lane(tmp_path: Path) -> None:
    def raises(_rejected: Rejected) -> None:
        raise KeyError("a fault of the program's")

    api = MemoryApi()
    with client_of(tmp_path, api, on_rejected=raises) as client:
        for n in range(3):
            client.send_many([event(n), b"!bad"])
            client.flush(timeout_s=10)
    assert numbers(api) == [0, 1, 2]


def test_a_callback_may_close_the_client(tmp_path: Path) -> None:
    told: list[Rejected] = []
    closed = threading.Event()

    def close(rejected: Rejected) -> None:
        told.append(rejected)
        client.close()
        closed.set()

    client = client_of(tmp_path, MemoryApi(), on_rejected=close)
    client.send(b"!bad")
    assert closed.wait(10)
    with client_of(tmp_path, MemoryApi()) as after:
        assert after.stats().waiting_events == 0
    assert len(told) == 1


def test_a_lane_that_fails_in_an_unforeseen_way_says_so_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(_api: MemoryApi, _body: bytes, _number: str) -> None:
        if not mended.is_set():
            raise ValueError("Invalid header value")

    monkeypatch.setattr(sending, "PAUSE_S", (0.01, 0.02))
    mended = threading.Event()
    api = MemoryApi(*[fails] * 10_000)
    with client_of(tmp_path, api) as client:
        client.send(event(1))
        with pytest.raises(FlushTimeout, match="Invalid header value"):
            client.flush(timeout_s=0.3)
        assert client.stats().state == "paused"
        mended.set()
        client.flush(timeout_s=10)
    assert numbers(api) == [1]


def test_an_answer_that_comes_after_close_does_not_touch_the_next_client(tmp_path: Path) -> None:
    asked, gate, api = threading.Event(), threading.Event(), MemoryApi()

    def slow(_api: MemoryApi, _body: bytes, _number: str) -> None:
        asked.set()
        assert gate.wait(30)

    def away(_api: MemoryApi, _body: bytes, _number: str) -> None:
        if not gate.is_set() or first._threads[1].is_alive():
            raise HubUnavailable("away")

    first = client_of(tmp_path, MemoryApi(slow))
    first.send(event(1))
    assert asked.wait(10)
    first.close(timeout_s=0)
    api = MemoryApi(*[away] * 10_000)
    with client_of(tmp_path, api) as second:
        gate.set()
        first._threads[1].join(10)
        second.flush(timeout_s=10)
    assert numbers(api) == [1]


def test_a_client_that_could_not_be_opened_leaves_the_spool_to_the_next(tmp_path: Path) -> None:
    class Sick(Files):
        def replace(self, path: Path, body: bytes) -> None:
            raise OSError(28, "No space left on device")

    with client_of(tmp_path, MemoryApi(*[never_arrived] * 1000)) as client:
        client.send(event(1))
    with pytest.raises(SettingsError):
        Client("htp://hub", spool=tmp_path)
    (tmp_path / "0/0/state.json").unlink()
    with pytest.raises(OSError, match="No space left"):
        client_of(tmp_path, MemoryApi(), files=Sick())
    assert left(tmp_path) == [1]


@pytest.mark.parametrize(
    "fault",
    [says(problem(415, "unsupported_type", retryable=False)), says(problem(400, "malformed_gzip", retryable=False))],
)
def test_a_batch_that_is_refused_for_good_does_not_hold_up_the_next(tmp_path: Path, fault: Fault) -> None:
    """Case 94."""
    api = MemoryApi(fault)
    with client_of(tmp_path, api, batch_events=2) as client:
        for n in range(6):
            client.send(event(n))
        client.flush()
        assert client.stats().rejected == 2
    assert numbers(api) == [2, 3, 4, 5]


def test_a_batch_that_is_too_large_is_split(tmp_path: Path) -> None:
    """Case 96."""
    api = MemoryApi(lines_max=3)
    with client_of(tmp_path, api, batch_events=20) as client:
        for n in range(20):
            client.send(event(n))
        client.flush()
    assert numbers(api) == list(range(20))


def test_a_full_spool_says_so_or_waits(tmp_path: Path) -> None:
    """Case 89."""
    down = MemoryApi(*[never_arrived] * 1000)
    with client_of(tmp_path / "raise", down, spool_bytes_max=2000) as client:
        with pytest.raises(SpoolFull, match="not taken"):
            for n in range(1000):
                client.send(event(n))
        assert 0 < client.stats().taken < 100
    api = MemoryApi(*[never_arrived] * 3)
    with client_of(tmp_path / "block", api, spool_bytes_max=2000, when_full="block", batch_events=5) as client:
        for n in range(200):
            client.send(event(n))
        client.flush()
    assert numbers(api) == list(range(200))


def test_what_never_fits_is_not_waited_for(tmp_path: Path) -> None:
    with client_of(tmp_path, MemoryApi(), spool_bytes_max=1000, when_full="block") as client:
        with pytest.raises(SpoolFull, match="not taken"):
            client.send({"deviceId": "d", "text": "x" * 2000})
        client.send(event(1))


@pytest.mark.parametrize("lanes", [1, 4])
def test_of_many_events_none_is_taken_when_one_is_refused(tmp_path: Path, lanes: int) -> None:
    api = MemoryApi()
    with client_of(tmp_path, api, lanes=lanes, spool_bytes_max=1000) as client:
        with pytest.raises(ValueError, match="one line"):
            client.send_many([event(1, "a"), b"", event(2, "b")])
        with pytest.raises(SpoolFull):
            client.send_many([event(n, f"d-{n}") for n in range(100)])
        client.send_many([])
        assert client.stats().taken == 0
        client.flush()
    assert api.stored == []


def test_a_spool_from_which_the_hub_takes_nothing_for_too_long_is_full(tmp_path: Path) -> None:
    away = True

    def while_away(_api: MemoryApi, _body: bytes, _number: str) -> None:
        if away:
            raise HubUnavailable("away")

    api = MemoryApi(*[while_away] * 10_000)
    with client_of(tmp_path, api, spool_age_s_max=0.3) as client:
        with pytest.raises(SpoolFull, match=r"for the hub to take anything, and may wait .* This event was not taken"):
            while True:
                client.send(event(client.stats().taken))
        away = False
        client.flush()
        client.send(event(client.stats().taken))
        client.flush()
        assert numbers(api) == list(range(client.stats().taken))


def test_a_second_process_takes_a_set_of_its_own_and_what_it_leaves_is_sent(tmp_path: Path) -> None:
    """Case 91."""
    down = MemoryApi(*[never_arrived] * 1000)
    with client_of(tmp_path, down) as first:
        first.send(event(1))
        with client_of(tmp_path, down) as second:
            second.send(event(2))
            assert {path.name for path in tmp_path.iterdir()} == {"0", "1"}
    api = MemoryApi()
    with client_of(tmp_path, api) as client:
        client.flush()
    assert sorted(numbers(api)) == [1, 2]


def test_the_number_of_lanes_stays_until_all_is_sent(tmp_path: Path) -> None:
    with client_of(tmp_path, MemoryApi(*[never_arrived] * 1000), lanes=3) as client:
        client.send_many([event(n, f"d-{n}") for n in range(10)])
    api = MemoryApi()
    with client_of(tmp_path, api) as client:
        client.send(event(10))
        client.flush()
    assert len({number.partition(";")[0] for number in api.seen}) == 3
    with client_of(tmp_path, api) as client:
        client.send(event(11))
        client.flush()
        assert sorted(numbers(api)) == list(range(12))


def test_a_closed_client_takes_nothing(tmp_path: Path) -> None:
    client = client_of(tmp_path, MemoryApi())
    client.close()
    client.close()
    with pytest.raises(SpoolClosed):
        client.send(event(1))


SCRIPT = """
import os, sys, threading
sys.path.insert(0, os.getcwd())
from pathlib import Path
from penstock.client.client import Client
from tests.client.conftest import MemoryApi, never_arrived

def client(**options):
    return Client(spool=Path(sys.argv[1]), connect=lambda: MemoryApi(*[never_arrived] * 100000), **options)
"""
ROOT = Path(__file__).parents[2]
PATHS = f"import sys\nsys.path[:0] = [{str(ROOT / 'src')!r}, {str(Path(msgspec.__file__).parents[1])!r}]\n"


def run(script: str, spool: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "ignore::DeprecationWarning", "-c", SCRIPT + script, str(spool)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=30,
    )


def left(spool: Path) -> list[int]:
    api = MemoryApi()
    with client_of(spool, api) as client:
        client.flush()
    return sorted(numbers(api))


def test_a_kill_right_after_send_loses_nothing(tmp_path: Path) -> None:
    """Case 87."""
    done = run("c = client()\nfor n in range(50): c.send({'deviceId': 'd', 'n': n})\nos.kill(os.getpid(), 9)", tmp_path)
    assert done.returncode == -signal.SIGKILL
    assert left(tmp_path) == list(range(50))


def test_an_interpreter_that_ends_without_close_loses_nothing_and_ends_soon(tmp_path: Path) -> None:
    """Case 102."""
    done = run("c = client()\nc.send({'deviceId': 'd', 'n': 1})", tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert left(tmp_path) == [1]


def test_an_interpreter_ends_although_the_hub_never_answers(tmp_path: Path) -> None:
    """Case 102. The thread that waits for the answer does not hold it up for longer than `close` may take."""
    script = """
posted = threading.Event()

class Silent(MemoryApi):
    def post(self, body, headers):
        posted.set()
        threading.Event().wait()

c = Client(spool=Path(sys.argv[1]), connect=Silent, linger_s=0.01)
c.send({'deviceId': 'd', 'n': 1})
assert posted.wait(20)
"""
    done = run(script, tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert left(tmp_path) == [1]


def test_a_child_after_fork_has_a_set_of_its_own(tmp_path: Path) -> None:
    """Case 102."""
    script = """
c = client()
c.send({'deviceId': 'd', 'n': 1})
if os.fork() == 0:
    c.send({'deviceId': 'd', 'n': 2})
    c.close()
    os._exit(0)
os.wait()
c.send({'deviceId': 'd', 'n': 3})
c.close()
"""
    done = run(script, tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert left(tmp_path) == [1, 2, 3]


def test_a_child_whose_set_has_other_lanes_keeps_the_order_of_each_device(tmp_path: Path) -> None:
    """The set that a dead process left with one lane is free when the child opens its own."""
    script = """
a = client()
c = client(lanes=4)
a.send({'deviceId': 'x', 'n': 100})
a.close()
if os.fork() == 0:
    try:
        for n in range(20): c.send({'deviceId': f'd-{n}', 'n': n})
        c.close()
    except BaseException as error:
        print(repr(error), flush=True)
    os._exit(0)
os.wait()
c.close()
"""
    done = run(script, tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert left(tmp_path) == [*range(20), 100]


def test_a_child_needs_no_lock_that_a_thread_had_at_the_fork(tmp_path: Path) -> None:
    script = """
import signal
c = client(linger_s=100)
c.send({'deviceId': 'd', 'n': 1})
with c._spool.lanes[0]._open._lock:  # as the thread that syncs has it now and then
    signal.alarm(10)
    child = os.fork()
    if child == 0:
        signal.alarm(10)
        c.send({'deviceId': 'd', 'n': 2})
        c.close()
        os._exit(0)
print(os.waitpid(child, 0)[1], flush=True)
os._exit(0)
"""
    done = run(script, tmp_path)
    assert (done.returncode, done.stdout) == (0, "0\n")
    assert left(tmp_path) == [1, 2]


def test_a_signal_handler_may_send(tmp_path: Path) -> None:
    """Case 102."""
    script = """
import signal
c = client()
signal.signal(signal.SIGALRM, lambda *_: c.send({'deviceId': 'd', 'n': -1}))
signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
for n in range(3000): c.send({'deviceId': 'd', 'n': n})
signal.setitimer(signal.ITIMER_REAL, 0)
c.close()
"""
    done = run(script, tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    found = left(tmp_path)
    assert [n for n in found if n >= 0] == list(range(3000))
    assert found[0] == -1


def test_what_a_signal_handler_has_sent_is_taken_though_the_spool_is_full_then(tmp_path: Path) -> None:
    """Else the `send` that it interrupted would raise SpoolFull for an event that is taken."""

    class Interrupted(Files):
        def _write(self, fd: int, body: memoryview) -> int:
            if b'"n":1}' in bytes(body):
                client.send({**event(2), "text": "x" * 900})
            return super()._write(fd, body)

    api = MemoryApi()
    with client_of(tmp_path, api, files=Interrupted(), spool_bytes_max=900, linger_s=60) as client:
        client.send(event(1))
        with pytest.raises(SpoolFull):
            client.send(event(3))
        client.flush()
    assert numbers(api) == [1, 2]


def test_a_signal_handler_may_send_to_a_full_spool_while_stats_are_read(tmp_path: Path) -> None:
    script = """
import signal
c = client(spool_bytes_max=10)
def full(*_):
    try: c.send({'deviceId': 'd', 'n': 1})
    except Exception as error: print(type(error).__name__, flush=True)
signal.signal(signal.SIGUSR1, full)
signal.alarm(10)
with c._board._lock:  # as in stats()
    os.kill(os.getpid(), signal.SIGUSR1)
c.close()
"""
    done = run(script, tmp_path)
    assert (done.returncode, done.stdout) == (0, "SpoolFull\n")


def test_a_client_that_is_closed_leaves_no_thread_and_no_file_open(tmp_path: Path) -> None:
    gc.collect()
    before = threading.active_count(), len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(3):
        with client_of(tmp_path, MemoryApi(), lanes=2) as client:
            client.send(event(1))
    assert (threading.active_count(), len(list(Path("/proc/self/fd").iterdir()))) == before


def test_the_client_imports_only_the_standard_library_and_msgspec() -> None:
    script = """
import sys
from penstock import Client
foreign = {name.partition('.')[0] for name in sys.modules} - sys.stdlib_module_names
foreign -= {'penstock', 'msgspec', '__main__', 'typing_extensions'}  # the last one msgspec takes where it is
print(sorted(name for name in foreign if not name.startswith('_')))
"""
    done = subprocess.run([sys.executable, "-S", "-c", PATHS + script], capture_output=True, text=True, timeout=30)
    assert (done.stdout, done.stderr) == ("[]\n", "")
