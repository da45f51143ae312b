"""`penstock dead`: what people see, against a real API."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest
from click.testing import CliRunner, Result

from penstock import Client
from penstock.cli.main import penstock
from penstock.client.records import Dead
from penstock.errors import PenstockError, SettingsError

BAD = [b'{"device": "d-2", "t": 2.50}', b'{"device":"d-3"}', b'{"deviceId":"d-4","t":\xff}']


def bury(spool: Path, name: str, *records: Dead) -> None:
    (spool / "dead").mkdir(parents=True, exist_ok=True)
    text = b"".join(msgspec.json.encode(record) + b"\n" for record in records)
    (spool / "dead" / f"{name}.ndjson").write_bytes(text)


@pytest.fixture
def spool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    codes = ("no_device", "no_device", "not_utf8")
    bury(tmp_path / "spool", "c-1", *(Dead.of(event, code, "why") for event, code in zip(BAD, codes, strict=True)))
    return tmp_path / "spool"


def dead(*arguments: str, stdin: bytes = b"") -> Result:
    return CliRunner().invoke(penstock, ["dead", *arguments], input=stdin, catch_exceptions=False)


def events(spool: Path, name: str = "c-1") -> list[bytes]:
    done = dead("show", name, "--raw", "--spool", str(spool))
    assert done.exit_code == 0
    return done.stdout_bytes.splitlines()


def test_list_says_what_there_is_and_when_there_is_none(spool: Path) -> None:
    done = dead("list")
    assert done.exit_code == 0
    assert all(text in done.output for text in ("c-1", "no_device 2, not_utf8 1", "why"))
    [row] = msgspec.json.decode(dead("list", "--json").stdout)
    assert (row["id"], row["events"], row["codes"]) == ("c-1", 3, {"no_device": 2, "not_utf8": 1})
    (spool / "dead" / "c-1.ndjson").write_bytes(b"no\n")
    assert "is damaged" in "".join(dead("list").output.split("\n"))
    (spool / "dead" / "c-1.ndjson").unlink()
    done = dead("list")
    assert (done.exit_code, done.output) == (0, "No rejected events in spool/dead.\n")
    assert dead("list", "--json").stdout == "[]\n"
    with pytest.raises(SettingsError, match="no spool folder nope"):
        dead("list", "--spool", "nope")


def test_show_gives_the_events_and_why(spool: Path) -> None:
    done = dead("show", "c")
    assert done.output.startswith("c-1: 3 events\n1. no_device: why\n   " + BAD[0].decode())
    assert '"t":\\xff}' in done.output
    assert dead("show", "c", "--event", "2").output.count("\n") == 3
    rows = msgspec.json.decode(dead("show", "c", "--json", "--code", "not_utf8").stdout)
    assert [(row["n"], row["code"]) for row in rows] == [(3, "not_utf8")]
    assert events(spool) == BAD
    bury(spool, "d-1", Dead.of(b"{}", "no_device", "why", "flights.ndjson:17"))
    assert "1. no_device: why (flights.ndjson:17)\n" in dead("show", "d").output
    for wrong, says in (
        (("x",), "no dead letters"),
        (("c", "--event", "4"), "no event 4"),
        (("c", "--code", "x"), "no_device"),
    ):
        with pytest.raises(SettingsError, match=says):
            dead("show", *wrong)


def test_what_a_device_sent_does_not_reach_the_terminal(spool: Path) -> None:
    bury(spool, "c-2", Dead.of(b'\x1b[2J"\xc2\x9b', "not_json", "\x1b[31m [bold]x"))
    assert "\x1b" not in dead("show", "c-2").output + dead("list").output
    assert "\\x1b[2J" in dead("show", "c-2").output


def test_fix_changes_fields_of_the_chosen_events(spool: Path) -> None:
    chosen = ("c", "--code", "no_device", "--rename", "device=deviceId", "--set", 'site="A"')
    done = dead("fix", *chosen, "--dry-run")
    better = [b'{"deviceId":"d-2","t":2.50,"site":"A"}', b'{"deviceId":"d-3","site":"A"}', BAD[2]]
    assert done.stdout_bytes.splitlines() == better
    assert events(spool) == BAD
    done = dead("fix", *chosen)
    assert "2 events changed, 0 dropped, 1 as before" in done.output
    assert events(spool) == better
    assert "was no_device: why" in dead("show", "c", "--code", "fixed").output


@pytest.mark.parametrize(
    ("arguments", "kind", "says"),
    [
        (("--rename", "device=deviceId"), PenstockError, r"event 3 \(not_utf8\) cannot be"),
        (("--code", "no_device", "--set", "x=1"), PenstockError, "event 1: it has no deviceId; event 2"),
        (("--set", "x=y"), SettingsError, "is not JSON"),
        (("--set", "x"), SettingsError, "two parts"),
        ((), SettingsError, "Say how"),
        (("--edit", "--drop", "x"), SettingsError, "Say how"),
        (("--code", "nope", "--drop", "x"), SettingsError, "no event with the code"),
        (("--file", "-"), SettingsError, "3 events to be put right in c-1, and 1 lines"),
    ],
)
def test_a_fix_that_is_wrong_changes_nothing(spool: Path, arguments: tuple[str, ...], kind: Any, says: str) -> None:
    with pytest.raises(kind, match=says):
        dead("fix", "c", *arguments)
    assert events(spool) == BAD


def test_fix_takes_lines(spool: Path) -> None:
    right = b'{"deviceId":"d-2","t":2.50}\n\n' + BAD[2] + b"\n"
    done = dead("fix", "c", "--file", "-", stdin=right)
    assert "1 event changed, 1 dropped, 1 as before" in done.output
    assert events(spool) == [b'{"deviceId":"d-2","t":2.50}', BAD[2]]
    dead("fix", "c", "--file", "-", stdin=b"\n\n")
    assert dead("list").output.startswith("No rejected events")


def test_fix_opens_an_editor_and_keeps_what_cannot_be_taken(spool: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = spool / "editor.py"
    monkeypatch.setenv("VISUAL", f"{sys.executable} {script}")
    script.write_text(
        "import sys; p = sys.argv[1]; b = open(p, 'rb').read(); open(p, 'wb').write(b.replace(b'device\"', b'x\"'))"
    )
    with pytest.raises(PenstockError, match=r"no deviceId.*What you wrote is in spool/dead/c-1.edited"):
        dead("fix", "c", "--edit")
    assert events(spool) == BAD
    written = (spool / "dead" / "c-1.edited").read_bytes()
    assert written.splitlines() == [line.replace(b'device"', b'x"') for line in BAD]
    (spool / "right").write_bytes(written.replace(b'"x"', b'"deviceId"'))
    dead("fix", "c", "--file", str(spool / "right"))
    assert not (spool / "dead" / "c-1.edited").exists()
    script.write_text("")
    assert "0 events changed" in dead("fix", "c", "--edit").output


def test_a_spool_that_cannot_be_used_is_told(spool: Path) -> None:
    (spool / "dead" / "lock").mkdir()
    with pytest.raises(PenstockError, match="No event is lost"):
        dead("fix", "c", "--file", "-", stdin=b"\n\n\n")


def test_replay_sends_until_nothing_is_rejected(shell: Any) -> None:
    shell.up()
    url = f"http://{shell.running().listen}"
    with Client(url, key=shell.key, spool=shell.folder / "spool") as client:
        client.send_many([b'{"deviceId":"d-1"}', *BAD])
        client.flush()
    [row] = shell.json("dead", "list")
    assert row["codes"] == {"no_device": 2, "not_utf8": 1}
    done = shell.run("dead", "fix", row["id"], "--code", "no_device", "--rename", "device=deviceId")
    assert done.returncode == 0, done
    done = shell.run("dead", "replay", row["id"])
    assert (done.returncode, done.stdout) == (1, b"3 events sent again: 2 accepted, 1 rejected.\n"), done
    [again] = shell.json("dead", "list")
    assert again["id"] in done.stderr.decode() and again["codes"] == {"not_utf8": 1}
    done = shell.run("dead", "fix", again["id"], "--file", "-", stdin=b'{"deviceId":"d-4","t":2}\n')
    assert done.returncode == 0, done
    done = shell.run("dead", "replay", "--all", "--url", url)
    assert (done.returncode, done.stdout) == (0, b"1 event sent again: 1 accepted, 0 rejected.\n"), done
    assert shell.json("dead", "list") == []
    done = shell.run("dead", "replay", "--all")
    assert (done.returncode, done.stdout) == (0, b"0 events sent again: 0 accepted, 0 rejected.\n"), done
    assert shell.json("status")["totals"]["accepted"] == 4


def test_replay_without_a_hub_loses_nothing(shell: Any) -> None:
    bury(shell.folder / "spool", "c-1", Dead.of(b'{"deviceId":"d-1"}', "no_device", "why"))
    for wrong in ((), ("c-1", "--all"), ("x",)):
        assert shell.run("dead", "replay", *wrong).returncode == 2
    done = shell.run("dead", "replay", "--all", "--url", "http://127.0.0.1:9", "--timeout", "100ms")
    assert (done.returncode, b"they stay in spool" in done.stderr) == (1, True), done
    shell.up()
    done = shell.run("dead", "replay", "--all")
    assert done.returncode == 0, done
    assert shell.json("status")["totals"]["accepted"] == 1


def test_replay_does_not_begin_with_a_damaged_file(spool: Path) -> None:
    (spool / "dead" / "c-2.ndjson").write_bytes(b"no\n")
    with pytest.raises(PenstockError, match=r"Nothing was sent.*c-2.ndjson"):
        dead("replay", "--all")
    assert {path.name for path in spool.iterdir()} == {"dead"}
