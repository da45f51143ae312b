"""`penstock leases skip --force` in front of a living system: what is in the log and not archived is left out, and a record says so."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from typing import Any

from tests.e2e.system import System, wait_for

Make = Callable[..., System]
DEVICES = 40


def send(system: System, batch: int) -> None:
    lines = b"".join(b'{"deviceId":"d-%d","b":%d}\n' % (device, batch) for device in range(DEVICES))
    assert system.run("send", "--url", system.url, "-", stdin=lines).returncode == 0


def skip(system: System, partition: int, to: str, *more: str) -> Any:
    order = ("--partition", str(partition), "--to", to, "--reason", "not  wanted", "--watch", "0s", "--json")
    return system.run("leases", "skip", "--data", str(system.data), *order, *more)


def batches(system: System, partition: int) -> list[int]:
    """In the hour files of a partition, in order."""
    files = sorted(system.store.glob(f"{partition}/*.json.gz"))
    return [json.loads(line)["b"] for file in files for line in gzip.decompress(file.read_bytes()).splitlines()]


def test_forced_skips_beside_a_host_that_lives_and_one_that_stands_still(make_system: Make) -> None:
    system = make_system(partitions=2, period="1h", options=("--archive", "none")).start()
    host = system.process("host", "--data", str(system.data), "--name", "a", "--lease", "3s", log="a")
    send(system, 1)
    system.check("flush")
    done = system.ends()
    send(system, 2)
    skipped = system.ends()
    assert all(before < after for before, after in zip(done, skipped, strict=True))

    for to in ("earliest", str(skipped[0])):
        refused = skip(system, 0, to)
        assert refused.returncode == 2, refused
        assert b"Nothing of partition 0 is gone" in refused.stderr
    beyond = skip(system, 0, str(skipped[0] + 1), "--force")
    assert beyond.returncode == 2, beyond
    assert not list(system.store.glob(f"_ledger/0/{done[0]:020}.json"))

    for partition in (0, 1):
        if partition == 1:
            host.freeze()
        made = skip(system, partition, str(skipped[partition]), "--force")
        assert made.returncode == 0, made
        record = f"_ledger/{partition}/{done[partition]:020}.json"
        told = json.loads(made.stdout)
        assert (told["offset"], told["offset_next"], told["records"]) == (
            str(done[partition]),
            str(skipped[partition]),
            [record],
        )
        gap = json.loads((system.store / record).read_bytes())
        assert (gap["next"], gap["reason"]) == (skipped[partition], "skipped: not wanted")
    host.thaw()
    wait_for("it has found that its leases were taken", lambda: host.log.read_text().count("lease lost") == 2)

    send(system, 3)
    system.settle()
    for partition in (0, 1):
        assert set(batches(system, partition)) == {1, 3}
    report = json.loads(system.check("audit", "--json").stdout)
    assert (report["totals"]["archived"], report["totals"]["logged"]) == (2 * DEVICES, 3 * DEVICES)
    assert [(gap["partition"], gap["first"], gap["next"]) for gap in report["gaps"]] == [
        (partition, done[partition], skipped[partition]) for partition in (0, 1)
    ]
    assert host.stop() == 0
