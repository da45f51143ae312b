"""What every command has: help, exit codes, and no damage by wrong use."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

from penstock.cli.main import penstock
from penstock.errors import SettingsError
from penstock.events import Frame, FrameKind, Source
from penstock.wire import frame


@pytest.mark.parametrize("name", [None, *sorted(penstock.commands)])
def test_help(name: str | None) -> None:
    done = CliRunner().invoke(penstock, [name, "--help"] if name else ["--help"])
    assert (done.exit_code, done.output.startswith("Usage: ")) == (0, True)


@pytest.mark.parametrize("name", ["simulate", "status", "leases", "audit", "verify", "flush"])
def test_reports_take_json(name: str) -> None:
    assert any("--json" in option.opts for option in penstock.commands[name].params if isinstance(option, click.Option))


def test_wrong_use_is_exit_2_and_touches_nothing(shell: Any) -> None:
    for arguments, says in (
        (("up", "--nope"), "No such option"),
        (("up", "--listen", "0.0.0.0:8480"), "there are no keys yet"),
        (("up", "--period", "7s"), "divide 24h"),
        (("up", "--store", "s3://bucket"), "folders"),
        (("up", "--config", "nope.toml"), "not there"),
        (("host",), "There is no hub"),
        (("status",), "There is no hub"),
        (("audit",), "There is no hub"),
        (("leases",), "There is no hub"),
        (("flush",), "Nothing runs"),
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


def test_dump_shows_frames_and_files(tmp_path: Path) -> None:
    lines = b'{"deviceId":"d"}\n' * 5
    plain = Frame(
        FrameKind.PLAIN, 3, 7, 5, 1_795_356_000_000, len(lines), frame.crc32(lines), lines, (Source("p", 1, 1, 5),)
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
