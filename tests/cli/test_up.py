"""The whole system as processes: events in, hour files out, whatever is killed meanwhile."""

from __future__ import annotations

import gzip
import os
import signal
import socket
from pathlib import Path
from typing import Any

import msgspec
import pytest

from penstock.processor.lease import lease_name


def events(first: int, count: int, devices: int = 20) -> bytes:
    return b"".join(b'{"deviceId":"d-%d","n":%d}\n' % (n % devices, n) for n in range(first, first + count))


def archived(data: Path) -> list[Any]:
    """All events in the hour files, in the order of partition, hour, part."""
    files = sorted((data / "store").glob("[0-9]*/*.json.gz"))
    return [msgspec.json.decode(line) for file in files for line in gzip.decompress(file.read_bytes()).splitlines()]


def check_once_and_in_order(data: Path, count: int) -> None:
    numbers = [event["n"] for event in archived(data)]
    assert sorted(numbers) == list(range(count))
    for device in range(20):
        mine = [event["n"] for event in archived(data) if event["deviceId"] == f"d-{device}"]
        assert mine == sorted(mine)


@pytest.mark.parametrize("more", [0, 1])
def test_workers_have_a_processor_each_where_there_is_just_one_for_each(shell: Any, more: int) -> None:
    cores = os.sched_getaffinity(0)
    process = shell.up("--workers", str(len(cores) + more))
    workers = [part.pid for part in shell.running().parts if part.name.startswith("api")]
    used = [os.sched_getaffinity(pid) for pid in workers]
    assert used == ([cores] * len(workers) if more else [{core} for core in sorted(cores)])
    assert shell.stop(process) == 0


def test_events_go_in_and_lie_in_hour_files(shell: Any) -> None:
    process = shell.up()
    (shell.folder / "a.ndjson").write_bytes(events(0, 3000))
    (shell.folder / "b.ndjson.gz").write_bytes(gzip.compress(events(3000, 2000)))
    sent = shell.run("send", "a.ndjson", "b.ndjson.gz")
    assert sent.returncode == 0, sent
    assert sent.stdout.startswith(b"5,000 events accepted in ")
    assert shell.run("send", "-", stdin=events(5000, 1)).returncode == 0
    flushed = shell.json("flush")
    assert (flushed["ok"], sum(flushed["next"])) == (True, 5001)
    check_once_and_in_order(shell.data, 5001)
    assert shell.json("audit")["totals"]["archived"] == 5001
    assert shell.json("verify")["ok"] is True
    status = shell.json("status")
    assert status["ok"] is True
    assert status["totals"] == {"accepted": 5001, "archived": 5001, "lag_events": 0}
    assert [part["name"] for part in status["parts"]] == ["api-0", "api-1", "archiver"]
    by_url = shell.json("status", "--url", f"http://{shell.running().admin}")
    assert by_url["totals"] == status["totals"]
    leases = shell.json("leases")
    assert [(row["partition"], row["owner"], row["epoch"], row["next"]) for row in leases] == [
        (partition, "up", 1, None) for partition in range(4)
    ]
    assert shell.stop(process) == 0
    assert [row["owner"] for row in shell.json("leases")] == [""] * 4
    assert shell.json("status")["parts"] == []


@pytest.mark.parametrize("victim", ["archiver", "api-0", "tree"])
def test_kill_9_loses_and_doubles_nothing(shell: Any, victim: str) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        listen = f"127.0.0.1:{probe.getsockname()[1]}"
    shell.up(listen=listen)
    (shell.folder / "a.ndjson").write_bytes(events(0, 40_000))
    sending = shell.start("send", "--url", f"http://{listen}", "--batch", "100", "a.ndjson")
    hub = shell.data / "hub" / "data.mdb"
    shell.until(lambda: hub.stat().st_blocks > 600)
    if victim == "tree":
        os.kill(shell.running().pid, signal.SIGKILL)
        shell.until(lambda: shell.run("status", "--json").stdout.count(b'"pid"') == 0)
        shell.up(listen=listen)
    else:
        killed = shell.pid(victim)
        os.kill(killed, signal.SIGKILL)
        shell.until(lambda: shell.pid(victim) not in (0, killed))
    assert sending.wait(60) == 0, shell.log()
    assert shell.json("flush")["ok"] is True
    check_once_and_in_order(shell.data, 40_000)
    assert shell.json("audit", "--deep")["totals"]["archived"] == 40_000
    assert shell.json("verify")["ok"] is True


def test_two_hosts_share_the_partitions_and_one_goes_on_alone(shell: Any) -> None:
    api = shell.start(
        *("api", "--listen", "127.0.0.1:0", "--admin", "127.0.0.1:0", "--workers", "1"),
        *("--partitions", "4", "--period", "10s", "--hub-bytes-max", "1GiB"),
    )
    shell.until(lambda: "Ctrl-C" in shell.out())
    hosts = {name: shell.start("host", "--name", name, "--lease", "2s") for name in ("a", "b")}
    shell.until(lambda: sorted(row["owner"] or "" for row in shell.json("leases")) == ["a", "a", "b", "b"])
    assert shell.run("send", "-", stdin=events(0, 1000)).returncode == 0
    assert shell.json("flush")["ok"] is True
    hosts["a"].kill()
    shell.until(lambda: {row["owner"] for row in shell.json("leases")} == {"b"})
    assert shell.run("send", "-", stdin=events(1000, 1000)).returncode == 0
    assert shell.json("flush")["ok"] is True
    check_once_and_in_order(shell.data, 2000)
    assert shell.json("verify")["ok"] is True
    assert (shell.stop(hosts["b"]), shell.stop(api)) == (0, 0)


def test_a_second_up_is_refused_and_named(shell: Any) -> None:
    process = shell.up()
    second = shell.run("up", "--listen", "127.0.0.1:0", "--admin", "127.0.0.1:0")
    assert second.returncode == 2
    assert f"as process {process.pid}" in second.stderr.decode()
    elsewhere = shell.run("up", "--data", "other", "--listen", shell.running().listen, "--admin", "127.0.0.1:0")
    assert elsewhere.returncode == 2
    assert b"Address already in use" in elsewhere.stderr
    assert not (shell.folder / "other").exists()
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(10) == 0
    for wrong in (("--partitions", "5"), ("--period", "20s")):
        fixed = {"--partitions": "4", "--period": "10s"} | dict([wrong])
        done = shell.run(
            "up", "--listen", "127.0.0.1:0", "--admin", "127.0.0.1:0", *(x for p in fixed.items() for x in p)
        )
        assert (done.returncode, b"fixed at creation" in done.stderr) == (2, True), done


def test_a_store_of_another_hub_is_refused(shell: Any) -> None:
    shell.stop(shell.up())
    at = ("--listen", "127.0.0.1:0", "--admin", "127.0.0.1:0")
    done = shell.run("up", *at, "--data", "other", "--store", str(shell.data / "store"))
    assert (done.returncode, b"belongs to another" in done.stderr) == (2, True), done
    assert not (shell.folder / "other" / "hub" / "data.mdb").exists()


def test_flush_says_why_it_did_not_get_there(shell: Any) -> None:
    shell.up("--archive", "none")
    assert shell.run("send", "-", stdin=events(0, 10)).returncode == 0
    done = shell.run("flush", "--timeout", "1s")
    assert (done.returncode, b"no archiver runs" in done.stderr) == (1, True), done
    assert shell.json("audit")["totals"]["pending"] == 10
    assert not (shell.data / "store" / lease_name("$archive", 0)).exists()
