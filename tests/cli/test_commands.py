"""What every command has: help, exit codes, and no damage by wrong use."""

from __future__ import annotations

import gzip
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import msgspec
import pytest
from click.testing import CliRunner

from penstock.cli.main import penstock
from penstock.client.records import Contents, Dead, State, batch_text, open_lines
from penstock.errors import SettingsError
from penstock.events import Frame, FrameKind, Source
from penstock.wire import frame


@pytest.mark.parametrize("name", [None, *sorted(penstock.commands)])
def test_help(name: str | None) -> None:
    done = CliRunner().invoke(penstock, [name, "--help"] if name else ["--help"])
    assert (done.exit_code, done.output.startswith("Usage: ")) == (0, True)


@pytest.mark.parametrize("name", ["simulate", "status", "leases", "why", "units", "audit", "verify", "flush"])
def test_reports_take_json(name: str) -> None:
    assert any("--json" in option.opts for option in penstock.commands[name].params if isinstance(option, click.Option))


def test_a_command_starts_without_what_only_others_need(tmp_path: Path) -> None:
    """Most are started more often than `up`, and by people who wait for the answer."""
    servers = ("asyncio", "uvloop", "http.client", "obstore", "confluent_kafka", "penstock.server.app")
    for name, without in (
        ("--help", ("lmdb", *servers)),
        ("status", ("penstock.cli.dead", "penstock.cli.keys", *servers)),
        ("audit", ("penstock.cli.dead", "penstock.cli.keys", *servers)),
    ):
        code = (
            "import sys, contextlib; from penstock.cli.main import penstock\n"
            f"with contextlib.suppress(Exception): penstock([{name!r}], standalone_mode=False)\n"
            f"sys.exit(str([name for name in {without!r} if name in sys.modules]))"
        )
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False
        )
        assert done.stderr.strip() == "[]", name


def test_wrong_use_is_exit_2_and_touches_nothing(shell: Any) -> None:
    for arguments, says in (
        (("up", "--nope"), "No such option"),
        (("up", "--listen", "0.0.0.0:8480", "--anonymous"), "loopback addresses only"),
        (("api", "--listen", "[::]:0", "--anonymous"), "loopback addresses only"),
        (("up", "--tls-key", "key.pem"), "nothing without --tls-cert"),
        (("up", "--tls-cert", "nope.pem"), "cannot be used"),
        (("key", "create", "--right", "send"), "no installation in data"),
        (("token",), "one of --kid, --name and --connection-string"),
        (("status", "--url", "Endpoint=sb://127.0.0.1:1/;SharedAccessKey=x"), "no SharedAccessKeyName"),
        (("up", "--period", "7s"), "divide 24h"),
        (("up", "--store", "ftp://bucket"), "must be a folder"),
        (("up", "--config", "nope.toml"), "not there"),
        (("host",), "There is no hub"),
        (("status",), "There is no hub"),
        (("audit",), "There is no hub"),
        (("leases",), "There is no hub"),
        (("leases", "--group", "alarms", "--url", "http://127.0.0.1:9"), "tells of the group $archive only"),
        (("why", "0", "2026-11-22T14"), "There is no hub"),
        (("why", "--", "-1", "2026-11-22T14"), "-1 is not in the range"),
        (("why", "0", "2026-11-22T25"), "neither the name of an hour"),
        (("why", "0", "9999-12-31T23"), "no hub has events of that time"),
        (("flush",), "Nothing runs"),
        (("units",), "Nothing runs"),
        (("units", "many"), "not a number of throughput units"),
        (("up", "--throughput-units", "1.5"), "whole number"),
        (("send", "nope.ndjson"), "There is no file"),
        (("send", "--device-field", "a b", "nope.ndjson"), "cannot name a field"),
        (("simulate", "--rate", "0"), "between 1 and"),
        (("simulate", "--data", "nope"), "No API runs on"),
        (("status", "--url", "http://127.0.0.1:abc"), "is not an address"),
        (("status", "--url", "http://[::1"), "is not an address"),
        (("dump", "nope"), "There is nothing"),
    ):
        done = shell.run(*arguments)
        assert (done.returncode, says in done.stderr.decode()) == (2, True), done
    assert list(shell.folder.iterdir()) == []


def test_send_takes_no_file_twice_and_not_any_number(shell: Any) -> None:
    for n in range(501):
        (shell.folder / f"{n}").touch()
    for files, says in ((["1", "./1"], b"given twice"), ([str(n) for n in range(501)], b"at most 500 can be at once")):
        done = shell.run("send", *files)
        assert done.returncode == 2 and says in done.stderr and not (shell.folder / "spool").exists()


def test_send_without_a_spool_or_an_api_says_so(shell: Any) -> None:
    (shell.folder / "file").write_bytes(b'{"deviceId":"d"}\n')
    done = shell.run("send", "file", "--spool", "file/spool", "--url", "http://127.0.0.1:9")
    assert done.returncode == 1 and b"The spool in file/spool cannot be opened" in done.stderr
    assert b"Traceback" not in done.stderr
    done = shell.run("send", "file", "--url", "http://127.0.0.1:9", "--timeout", "100ms")
    assert done.returncode == 1 and done.stderr.count(b"gives no answer") == 2
    assert b"1 wait in the spool in spool. The same command goes on from here." in done.stderr


def test_dump_shows_frames_and_files(tmp_path: Path) -> None:
    lines = b'{"deviceId":"d"}\n' * 5
    plain = Frame(
        FrameKind.PLAIN,
        3,
        7,
        5,
        1_795_356_000_000,
        len(lines),
        frame.crc32(lines),
        lines,
        1,
        frame.pack_sources([Source("p", 1, 1, 5)]),
    )
    (tmp_path / "frames").write_bytes(frame.encode(plain) * 2)
    (tmp_path / "hour.json.gz").write_bytes(gzip.compress(lines))
    (tmp_path / "cut").write_bytes(frame.encode(plain)[:-1])
    (tmp_path / "no").write_bytes(b"neither")
    done = CliRunner().invoke(penstock, ["dump", str(tmp_path / "frames")])
    assert (done.exit_code, done.output.count('"first": 7'), done.output.count("deviceId")) == (0, 2, 6)
    done = CliRunner().invoke(penstock, ["dump", str(tmp_path / "hour.json.gz"), "--lines", "1"])
    assert (done.exit_code, '"events": 5' in done.output, done.output.count("deviceId")) == (0, True, 1)
    for damaged in ("cut", "no"):
        assert CliRunner().invoke(penstock, ["dump", str(tmp_path / damaged)]).exit_code == 1
    with pytest.raises(SettingsError):
        CliRunner().invoke(penstock, ["dump", str(tmp_path / "nope")], catch_exceptions=False)


def test_dump_shows_spool_files(tmp_path: Path) -> None:
    events = [b'{"deviceId":"d","n":1.50}', b'{"deviceId":"d","t":"\xff"}']
    batch = batch_text(Contents(events, {"file": 2}), sealed_at_ms=5, device_field="deviceId")
    lane = tmp_path / "0" / "0"
    lane.mkdir(parents=True)
    (lane / "000000000001-2.batch").write_bytes(batch)
    (lane / "000000000002-2.batch").write_bytes(batch[:-1])
    (lane / "000000000003.open").write_bytes(open_lines(events) + b"0000")
    (lane / "000000000004.open").write_bytes(open_lines(events).replace(b"1.50", b"1.51"))
    (lane / "state.json").write_bytes(msgspec.json.encode(State("c-1")))
    (tmp_path / "c-1.ndjson").write_bytes(msgspec.json.encode(Dead.of(events[1], "not_utf8", "why")) + b"\n")
    for path, code, says in (
        (lane / "000000000001-2.batch", 0, ('"events": 2', '"taken": {', '"device_field": "deviceId"', "1.50")),
        (lane / "000000000002-2.batch", 1, ('"events": 2', '"sealed_at_ms": 5')),
        (lane / "000000000003.open", 0, ('"events": 2', '"damaged": 0', '"unfinished_bytes": 4', "1.50")),
        (lane / "000000000004.open", 1, ('"events": 1', '"damaged": 1', "1.51")),
        (lane / "state.json", 0, ('"lane of a spool"', '"producer": "c-1"')),
        (tmp_path / "c-1.ndjson", 0, ('"dead letters"', '"not_utf8": 1', '"event_base64"')),
    ):
        done = CliRunner().invoke(penstock, ["dump", str(path)])
        assert (done.exit_code, [text for text in says if text not in done.output]) == (code, []), done.output
