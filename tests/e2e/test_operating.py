"""What an operator sees of leases and hours of a real installation. No expected value depends on when it is looked at."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from tests.e2e.system import System, wait_for

Make = Callable[..., System]

LINES = b"".join(b'{"deviceId":"d-%d","n":%d}\n' % (n % 50, n) for n in range(1000))


def seen(system: System, *command: str) -> Any:
    return json.loads(system.check(command[0], "--json", *command[1:]).stdout)


def send(system: System) -> None:
    assert system.run("send", "--url", system.url, "-", stdin=LINES).returncode == 0


def test_leases_of_an_installation_and_of_its_url(make_system: Make) -> None:
    system = make_system(partitions=4).start()
    send(system)
    system.check("flush")
    rows = seen(system, "leases")
    assert [(row["partition"], row["owner"], row["epoch"], row["lag_events"], row["next"]) for row in rows] == [
        (partition, "up", 1, 0, None) for partition in range(4)
    ]
    assert [(row["moved"]["why"], row["moved"]["from"], row["moved"]["to"]) for row in rows] == [
        ("first", None, "up")
    ] * 4
    assert [int(row["offset"]) for row in rows] == [row["sequence_number"] for row in rows] == system.ends()
    assert "none: balanced" in system.check("leases").stdout.decode()
    by_url = json.loads(system.run("leases", "--json", "--url", system.url).stdout)
    names = ("partition", "owner", "epoch", "offset", "sequence_number", "lag_events")
    assert [[row[name] for name in names] for row in by_url] == [[row[name] for name in names] for row in rows]
    alone = json.loads(system.run("leases", "--json", "--data", "no-hub", "--store", str(system.store)).stdout)
    assert [(row["owner"], row["lag_events"]) for row in alone] == [("up", None)] * 4
    assert system.stop() == 0
    rows = seen(system, "leases")
    assert [(row["owner"], row["moved"]["why"], row["next"]["why"]) for row in rows] == [
        ("", "given_back", "given_back")
    ] * 4


def test_a_host_that_died_is_seen_to_lose_its_leases(make_system: Make) -> None:
    system = make_system(partitions=4, options=("--archive", "none")).start()
    host = ("host", "--data", str(system.data), "--lease", "3s", "--name")
    first = system.process(*host, "a", log="a")
    wait_for("a has all", lambda: [row["owner"] for row in leases_of(system)] == ["a"] * 4)
    # From its stop on it renews nothing, as if it were dead; b waits for the lease time and takes what it does not renew.
    first.freeze()
    row = wait_for("a is overdue", lambda: next((row for row in leases_of(system) if row["next"]), None))
    assert (row["next"]["why"], row["next"]["from"]) == ("expired", "a")
    system.process(*host, "b", log="b")

    def told() -> Any:
        rows = leases_of(system)
        return rows if all(row["owner"] == "b" and row["moved"] for row in rows) else None

    for row in wait_for("b has all, and has noted why", told):
        assert row["epoch"] == 2
        assert (row["moved"]["why"], row["moved"]["from"]) in (("expired", "a"), ("balance", "a"))


def leases_of(system: System) -> Any:
    return seen(system, "leases", "--lease", "3s", "--watch", "0s")


def test_why_an_hour_closed_and_what_its_manifest_waits_for(make_system: Make) -> None:
    system = make_system(partitions=4, period="1s").start()
    send(system)
    manifest = wait_for("the manifest of an hour", lambda: next(iter(sorted(system.store.glob("_hours/*.json"))), None))
    hour = manifest.name.removesuffix(".json")
    for file in json.loads(manifest.read_bytes())["files"][:2]:
        found = seen(system, "why", str(file["partition"]), hour)
        assert (found["state"], found["why"], found["lag_events"]) == ("closed", [], 0)
        assert found["manifest"] | {"why": ""} == {
            "name": f"_hours/{hour}.json",
            "published": True,
            "why": "",
            "missing": [],
        }
        assert [(one["file"], one["closed_by"], one["host"], one["in_store"]) for one in found["files"]] == [
            (file["file"], "time", "up", True)
        ]
        alone = system.run("why", str(file["partition"]), hour, "--data", "no-hub", "--store", str(system.store))
        assert (alone.returncode, b"closed, all its events are in files" in alone.stdout) == (0, True)
    assert seen(system, "why", "0", "2001-01-01T00:00:00Z")["state"] == "empty"
    assert seen(system, "why", "0", "2999-01-01T00:00:00Z")["state"] == "future"
    assert system.run("why", "--data", str(system.data), "4", hour).returncode == 2


def test_why_an_hour_is_open_or_waits(make_system: Make) -> None:
    system = make_system(partitions=1, period="24h", options=("--archive", "none")).start()
    send(system)
    at = json.loads(system.get("/v1/partitions/0")[1])["enqueued_last"]
    found = seen(system, "why", "0", at)
    # At midnight it may be over between the two commands, and then waits for an archiver.
    assert (found["state"], found["lag_events"], found["owner"], found["files"]) in (
        *(("open", 1000, None, []), ("waiting", 1000, None, [])),
    )
    assert len(found["manifest"]["missing"]) == 1
    host = system.process("host", "--data", str(system.data), log="host")
    system.check("flush")
    found = seen(system, "why", "0", at)
    assert [(one["first"], one["next"], one["closed_by"]) for one in found["files"]] == [
        (0, 1000, found["files"][0]["closed_by"])
    ]
    assert found["lag_events"] == 0
    assert host.stop() == 0


def test_an_archive_that_is_switched_on_late_says_what_it_has_not(make_system: Make) -> None:
    system = make_system(partitions=1, period="1s", options=("--archive", "none", "--retention", "2s")).start()
    send(system)
    wait_for("retention", lambda: json.loads(system.get("/v1/partitions/0")[1])["first"] == 1000)
    assert system.stop() == 0
    del system.options[-4:]
    system.start()
    send(system)
    system.settle()
    for command in ("verify", "audit"):
        assert b"partition 0: events 0 to 999 are in no file: events before this" in system.check(command).stdout
    found = seen(system, "verify")
    assert [(gap["first"], gap["next"]) for gap in found["gaps"]] == [(0, 1000)]
    assert (found["totals"]["archived"], found["rows"][0]["files"]) == (1000, 1)
    (record,) = system.store.glob(f"_ledger/0/{0:020}.json")
    dumped = json.loads(system.run("dump", str(record)).stdout)
    assert (dumped["kind"], dumped["content"]["host"], dumped["content"]["next"]) == ("ledger record", "up", 1000)


def test_time_left_is_told_by_command_and_api(make_system: Make) -> None:
    system = make_system(partitions=2, options=("--retention", "3d", "--archive", "none")).start()
    send(system)
    for status in (seen(system, "status"), json.loads(system.get("/v1/status")[1])):
        assert (status["retention"]["after_s"], status["retention"]["unread"]) == (259_200, "deleted")
        left = [one["retention_left_s"] for one in status["partitions"]]
        assert status["retention"]["left_s"] == min(left)
        assert 0 < min(left) <= max(left) <= 259_200
    assert (
        "retention: 3 d; the oldest event that is not archived is deleted in " in system.check("status").stdout.decode()
    )
    assert system.stop() == 0
    status = seen(system, "status")
    assert (status["retention"]["after_s"], status["retention"]["left_s"]) == (None, None)
    assert "retention: nothing is deleted, and nothing comes in" in system.check("status").stdout.decode()
