"""The main job with its archive in a cloud's store: the same oracle, over what is downloaded from it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import duckdb

from tests.blobs.store_proxy import Fault, StoreProxy
from tests.e2e.oracle import Batch, problems
from tests.e2e.system import PROJECT, System, wait_for
from tests.emulators import Emulator

Make = Callable[..., System]


def lines(begin: int, end: int) -> list[bytes]:
    return [b'{"deviceId":"d-%d","n":%d,"text":"%032d"}' % (n % 97, n, n * n) for n in range(begin, end)]


def test_events_are_in_the_cloud_exactly_once_also_after_kill(
    make_system: Make, azurite: Emulator, tmp_path: Path
) -> None:
    url = azurite.fresh_url()
    system = make_system(environment={**azurite.environment, "PENSTOCK_STORE": url}).start()
    assert f"hour files in {url}".encode() in wait_for("it says where", lambda: _said(system))
    parts = [lines(0, 3000), lines(3000, 5000)]
    sent = system.run("send", "--url", system.url, "-", stdin=b"\n".join(parts[0]))
    assert (sent.returncode, sent.stderr) == (0, b"")
    wait_for("some file is in the store", lambda: any(name.name[0].isdigit() for name in azurite.open(url).list("")))
    system.kill()
    system.start()
    sent = system.run("send", "--url", system.url, "-", stdin=b"\n".join(parts[1]))
    assert (sent.returncode, sent.stderr) == (0, b"")
    system.settle()

    assert not (system.data / "store").exists()
    folder = azurite.download(url, tmp_path / "copy")
    assert problems(folder, 16, [[Batch(part) for part in parts]]) == []
    rows = duckdb.execute(f"select count(*), count(distinct n) from read_json('{folder}/[0-9]*/*.json.gz')").fetchall()
    assert rows == [(5000, 5000)]
    status = json.loads(system.check("status", "--json").stdout)
    assert (status["ok"], status["totals"]["archived"]) == (True, 5000)
    rows = json.loads(system.check("leases", "--json").stdout)
    assert {row["owner"] for row in rows} == {"up"}
    assert system.stop() == 0
    assert {row["owner"] for row in json.loads(system.check("leases", "--json").stdout)} == {""}


def _said(system: System) -> bytes:
    text = system.up.text().encode()
    return text if b"hour files in" in text else b""


def test_a_host_of_its_own_archives_into_the_cloud(make_system: Make, azurite: Emulator, tmp_path: Path) -> None:
    url = azurite.fresh_url()
    environment = {**azurite.environment, "PENSTOCK_STORE": url}
    system = make_system(environment=environment, options=("--archive", "none"), partitions=4).start()
    system.process("host", "--data", str(system.data), "--name", "apart", log="host.log")
    events = lines(0, 500)
    assert system.run("send", "--url", system.url, "-", stdin=b"\n".join(events)).returncode == 0
    system.check("flush")
    system.check("verify")
    assert problems(azurite.download(url, tmp_path / "copy"), 4, [[Batch(events)]]) == []


def test_a_store_that_does_not_know_conditions_is_refused(make_system: Make, moto: Emulator) -> None:
    with StoreProxy(moto.port) as proxy:
        proxy.unconditional = True
        address = f"http://127.0.0.1:{proxy.port}"
        system = make_system(environment={**moto.environment, "AWS_ENDPOINT_URL": address})
        url = moto.fresh_url()
        done = system.run(*system.up_arguments("--store", url), deadline_s=60)
    assert done.returncode == 2, done
    assert f"The store {url} let 8 of 8 conditional creates of one blob win".encode() in done.stderr
    assert b"it ignores If-None-Match" in done.stderr
    assert not (system.data / "hub" / "data.mdb").exists(), "nothing of the installation was written"


def test_a_store_that_does_not_answer_is_said_at_once(make_system: Make, azurite: Emulator) -> None:
    text = azurite.environment["AZURE_STORAGE_CONNECTION_STRING"].replace(f":{azurite.port}/", ":1/")
    system = make_system(environment={"AZURE_STORAGE_CONNECTION_STRING": text})
    done = system.run(*system.up_arguments("--store", "az://penstock/x"), deadline_s=60)
    assert done.returncode == 1, done
    assert done.stderr == b"penstock: az://penstock/x did not read _hub.json: nothing listens at its address\n"


def test_an_address_that_is_none_touches_nothing(make_system: Make) -> None:
    system = make_system()
    for url in ("http://127.0.0.1/x", "az://", "az://account:key@container", "s3://bucket/../x", "gs://bucket?token=x"):
        for command in ("up", "verify"):
            done = system.run(command, "--data", str(system.data), "--store", url, deadline_s=20)
            assert done.returncode == 2, done
            assert b"The store's address is none" in done.stderr
            assert b"key@" not in done.stderr
    assert list(system.folder.iterdir()) == []


_THREADS = """
import os, sys, time
from penstock.cli import wiring
from penstock.settings import load

def threads():
    return len(os.listdir("/proc/self/task"))

values = load("up", {"data": sys.argv[1], "store": sys.argv[2]}, {})
where = wiring.layout(values)
wiring.make_folders(where)
wiring.prepare(where, values)
until = time.monotonic() + 30
while threads() > 1 and time.monotonic() < until:
    time.sleep(0.01)  # one that has ended may still be in the kernel's list
print(threads())
wiring._prepare(where, values)
print(threads() > 1)
"""


def test_the_supervisor_has_no_thread_of_the_store_s_client(azurite: Emulator, tmp_path: Path) -> None:
    """It forks the parts, and in a child of a process with such threads every call to the store waits for ever."""
    done = subprocess.run(
        [sys.executable, "-c", _THREADS, str(tmp_path / "data"), azurite.fresh_url()],
        env={**azurite.environment, "PYTHONPATH": str(PROJECT / "src")},
        capture_output=True,
        timeout=60,
        check=False,
    )
    # The second line is the negative control: without the process apart there are some.
    assert (done.returncode, done.stdout) == (0, b"1\nTrue\n"), done


def test_a_host_that_starts_while_the_store_is_away_waits_for_it(make_system: Make, azurite: Emulator) -> None:
    url = azurite.fresh_url()
    environment = {**azurite.environment, "PENSTOCK_STORE": url}
    system = make_system(environment=environment, options=("--archive", "none"), partitions=2).start()
    with StoreProxy(azurite.port) as proxy:
        proxy.plan = lambda method, path: Fault.RESET
        through = {
            name: value.replace(f":{azurite.port}/", f":{proxy.port}/") for name, value in azurite.environment.items()
        }
        host = system.process("host", "--data", str(system.data), "--name", "late", log="host.log", environment=through)
        wait_for("it says so", lambda: "tried again for 60 s" in host.text())
        proxy.plan = lambda method, path: Fault.NONE
        wait_for("it has all", lambda: _owners(system) == {"late"})
        assert host.stop() == 0, host.text()


def _owners(system: System) -> set[str]:
    return {row["owner"] for row in json.loads(system.check("leases", "--watch", "0s", "--json").stdout)}
