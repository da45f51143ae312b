"""The main job as a user does it: start, send, flush, look at the files, check, stop, start again."""

from __future__ import annotations

import gzip
import json
import random
import re
from collections.abc import Callable
from pathlib import Path

import duckdb
import pytest

from tests.e2e.oracle import Batch, archived, problems, unstamp
from tests.e2e.system import SEED, System, wait_for

DATA = Path(__file__).parents[1] / "data"
FLIGHTS = DATA / "flights-sample.ndjson.gz"

Make = Callable[..., System]


def flights() -> list[bytes]:
    return gzip.decompress(FLIGHTS.read_bytes()).splitlines()


def status_documents(count: int, seed: int = SEED) -> list[bytes]:
    """Large, nested events like the status document of a web server, about 5.5 KB, the device in `address`."""
    chosen = random.Random(seed)
    return [_status_document(chosen, number) for number in range(count)]


def _status_document(chosen: random.Random, number: int) -> bytes:
    def zone(name: str) -> dict[str, object]:
        codes = {f"{first}xx": chosen.randrange(10**6) for first in range(1, 6)}
        traffic = {"requests": chosen.randrange(10**9), "received": chosen.randrange(10**15)}
        return {name: {"processing": chosen.randrange(9), "responses": codes, "ratio": chosen.random(), **traffic}}

    peers = [
        {"id": i, "server": f"10.0.0.{i}:8080", "state": chosen.choice(["up", "down", "draining"])} | zone("traffic")
        for i in range(12)
    ]
    document = {
        "version": 8,
        "nginx_version": "1.27.0 “größer”",
        "address": f"192.0.2.{number % 7}",
        "generation": number,
        "timestamp": 1_700_000_000_000 + number,
        "connections": {"accepted": 18446744073709551616 + number, "dropped": 0, "exact": [1e400, -0.0]},
        "server_zones": zone("hg.example.org") | zone("trac.example.org") | zone("lxr.example.org"),
        "upstreams": {"backend": {"peers": peers, "keepalive": None, "zombies": []}},
    }
    text = json.dumps(document, ensure_ascii=number % 2 == 0, separators=(", ", ":"))
    return text.replace("Infinity", "1e400").encode()


def store_lines(system: System) -> list[bytes]:
    return [line for _, line in archived(system.store)]


def test_events_in_hour_files_out(make_system: Make) -> None:
    system = make_system(anonymous=False).start()
    large = status_documents(500)
    (system.folder / "large.ndjson").write_bytes(b"\n".join(large) + b"\n")
    some, files = flights(), str(FLIGHTS)

    sent = system.run("send", "--url", system.url, files)
    assert (sent.returncode, sent.stderr) == (0, b"")
    assert sent.stdout.startswith(b"5,000 events accepted"), sent.stdout
    assert b"0 rejected, 0 duplicates" in sent.stdout
    sent = system.run("send", "--data", str(system.data), "--device-field", "address", "large.ndjson")
    assert (sent.returncode, sent.stderr) == (0, b"")
    assert sent.stdout.startswith(b"500 events accepted")
    system.settle()

    assert problems(system.store, 16, [[Batch(some)], [Batch(large)]], ("deviceId", "address")) == []
    pattern = f"{system.store}/[0-9]*/*.json.gz"
    wide = "maximum_object_size=1000000, union_by_name=true"
    columns = "count(*), min(receivedAt) is not null, count(distinct deviceId)"
    rows = duckdb.execute(f"select {columns} from read_json('{pattern}', {wide})").fetchall()
    assert rows == [(5500, True, len({json.loads(event)["deviceId"] for event in some}))]

    report = json.loads(system.check("audit", "--json").stdout)
    assert (report["ok"], report["problems"]) == (True, [])
    assert (report["totals"]["accepted"], report["totals"]["archived"], report["totals"]["pending"]) == (5500, 5500, 0)
    report = json.loads(system.check("verify", "--json").stdout)
    assert (report["ok"], report["totals"]["archived"]) == (True, 5500)
    status = json.loads(system.check("status", "--json").stdout)
    assert (status["ok"], status["totals"]) == (True, {"accepted": 5500, "archived": 5500, "lag_events": 0})
    assert system.stop() == 0


def test_the_oracle_sees_every_kind_of_difference(system: System) -> None:
    """The negative control of everything that stands on it."""
    lines = [b'{"deviceId":"d-%d","n":%d}' % (n % 3, n) for n in range(30)]
    assert system.run("send", "--url", system.url, "--batch", "10", "-", stdin=b"\n".join(lines)).returncode == 0
    system.settle()
    assert problems(system.store, 16, [[Batch(lines)]]) == []
    more = [*lines, b'{"deviceId":"d-1","n":30}']
    swapped = [lines[3], *lines[1:3], lines[0], *lines[4:]]
    changed = [*lines[:-1], lines[-1].replace(b"29", b"29.0")]
    for sent, kinds in (
        ([Batch(more)], ["missing"]),
        ([Batch([*lines, lines[5]])], ["missing"]),
        ([Batch(lines[:-1])], ["not sent"]),
        ([Batch([line for line in lines if b'"d-1"' not in line])], ["not sent"]),
        ([Batch(swapped)], ["out of order"]),
        ([Batch(changed)], ["missing", "not sent"]),
        (
            [Batch(lines[:10]), Batch([lines[10], b'{"deviceId":"d-1","n":30}'], confirmed=False), Batch(lines[11:])],
            ["missing"],
        ),
        ([Batch(lines), Batch([b'{"deviceId":"d-1","n":31}'], confirmed=False)], []),
    ):
        found = problems(system.store, 16, [sent])
        assert len(found) == len(kinds), found
        assert all(kind in text for kind, text in zip(kinds, found, strict=True)), found
    # A copy: the same file once more, under a name that sorts behind it.
    file = next(system.store.glob("[0-9]*/*.json.gz"))
    (file.parent / "9999-12-31T00-00-00.json.gz").write_bytes(file.read_bytes())
    assert ["copies too many" in text for text in problems(system.store, 16, [[Batch(lines)]])] == [True]
    assert system.run("verify", "--data", str(system.data)).returncode == 1
    assert "in partition" in problems(system.store, 17, [[Batch(lines)]])[0]


def test_rejected_lines_are_named(make_either: Make) -> None:
    system = make_either().start()
    good = [b'{"deviceId":"d-1","n":%d}' % n for n in range(4)]
    lines = [good[0], b"not json", good[1], b'{"n":1}', b"", good[2], b'{"deviceId":"d-1","receivedAt":1}', good[3]]
    (system.folder / "mixed.ndjson").write_bytes(b"\r\n".join(lines))
    sent = system.run("send", "--url", system.url, "mixed.ndjson")
    assert sent.returncode == 1
    assert sent.stdout.startswith(b"4 events accepted")
    assert b"3 rejected" in sent.stdout
    named = re.findall(rb"^mixed\.ndjson:(\d+): rejected: (\w+):", sent.stderr, re.MULTILINE)
    assert sorted(named) == [(b"2", b"not_json"), (b"4", b"no_device"), (b"7", b"reserved_field")]
    system.settle()
    assert problems(system.store, 16, [[Batch(good)]]) == []


@pytest.mark.parametrize("zipped", [False, True])
def test_standard_input(system: System, zipped: bool) -> None:
    lines = flights()[:1000]
    stdin = b"\n".join(lines)
    sent = system.run("send", "--url", system.url, "-", stdin=gzip.compress(stdin) if zipped else stdin)
    assert (sent.returncode, sent.stderr) == (0, b"")
    assert sent.stdout.startswith(b"1,000 events accepted")
    system.settle()
    assert problems(system.store, 16, [[Batch(lines)]]) == []


def test_an_hour_gets_its_manifest(make_system: Make) -> None:
    system = make_system(period="1s", partitions=4).start()
    lines = flights()[:500]
    assert system.run("send", "--url", system.url, "-", stdin=b"\n".join(lines)).returncode == 0
    manifests = wait_for("the manifest of the hour", lambda: sorted(system.store.glob("_hours/*.json")))
    hours = [json.loads(path.read_bytes()) for path in manifests]
    assert sum(hour["events"] for hour in hours) == len(lines)
    for hour in hours:
        for file in hour["files"]:
            content = gzip.decompress((system.store / file["file"]).read_bytes())
            assert (file["events"], file["raw_bytes"]) == (content.count(b"\n"), len(content))
    system.settle()
    assert problems(system.store, 4, [[Batch(lines)]]) == []


def test_it_starts_again_on_its_data(make_either: Make) -> None:
    system = make_either(anonymous=False).start()
    parts = [flights()[:1000], flights()[1000:2000]]
    for part in parts:
        assert system.run("send", "--url", system.url, "-", stdin=b"\n".join(part)).returncode == 0
        assert system.stop() == 0
        system.start()
    system.settle()
    assert problems(system.store, 16, [[Batch(part) for part in parts]]) == []


def _everything(folder: Path) -> dict[str, tuple[int, float]]:
    """Each file with size and time of change, but for what the running system goes on writing."""
    return {
        str(path.relative_to(folder)): (path.stat().st_size, path.stat().st_mtime)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_a_second_up_on_the_same_data_is_refused(system: System) -> None:
    wait_for("each lease says why", lambda: len(list(system.store.glob("_moves/*/[0-9]*.json"))) == 16)
    before = _names(system.data)
    second = system.run(*system.up_arguments(), deadline_s=20)
    assert second.returncode == 2
    assert str(system.up.pid).encode() in second.stderr
    assert second.stdout == b""
    assert _names(system.data) == before
    assert system.get("/health/ready")[0] == 200


def _names(folder: Path) -> list[str]:
    return [name for name in _everything(folder) if not Path(name).name.startswith(".")]


def test_other_partitions_or_period_are_refused(make_system: Make) -> None:
    system = make_system().start()
    lines = flights()[:100]
    assert system.run("send", "--url", system.url, "-", stdin=b"\n".join(lines)).returncode == 0
    system.settle()
    assert system.stop() == 0
    kept = {name: value for name, value in _everything(system.data).items() if name not in ("lock", "hub/lock.mdb")}
    for other in (("--partitions", "8"), ("--period", "20s")):
        refused = system.run(*system.up_arguments(*other), deadline_s=20)
        assert refused.returncode == 2, refused
        assert other[1].rstrip("s").encode() in refused.stderr
        after = _everything(system.data)
        assert {name: after[name] for name in after if name not in ("lock", "hub/lock.mdb")} == kept
    system.start()
    assert problems(system.store, 16, [[Batch(lines)]]) == []


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("up", "--partitions", "0"), b"--partitions"),
        (("up", "--period", "7s"), b"--period"),
        (("up", "--listen", "0.0.0.0:0", "--anonymous"), b"loopback addresses only"),
        (("up", "--no-such"), b"--no-such"),
        (("send", "missing.ndjson"), b"missing.ndjson"),
        (("flush",), b"Nothing runs on"),
        (("audit",), b"data"),
        (("status",), b"data"),
    ],
)
def test_wrong_use_is_exit_2_and_touches_nothing(make_system: Make, arguments: tuple[str, ...], says: bytes) -> None:
    system = make_system()
    data = system.folder / "nothing-here"
    option = [] if arguments[0] == "send" else ["--data", str(data)]
    done = system.run(arguments[0], *option, *arguments[1:], deadline_s=20)
    assert done.returncode == 2, done
    assert says in done.stderr
    assert not data.exists()
    assert list(system.folder.iterdir()) == []


def test_the_stamp_is_all_that_is_added(make_either: Make) -> None:
    """Number text, key order, white space, escapes: an event keeps its bytes."""
    system = make_either().start()
    odd = [
        b'{"deviceId":"d:1","a":1.0,"A":1E+2,"b":18446744073709551616,"c":-0,"d":0.10}',
        b'{ "z" : [ 1 ,2,  3 ] ,\t"deviceId" : "d:1" }',
        b'{"deviceId":"d:1","t":"\\u00e9\\ud83d\\ude00\\/ \xc3\xa9"}',
        b'{"deviceId":"d:1","same":1,"same":2}',
    ]
    assert system.run("send", "--url", system.url, "-", stdin=b"\n".join(odd)).returncode == 0
    system.settle()
    assert [unstamp(line)[0] for line in store_lines(system)] == odd
