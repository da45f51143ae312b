"""Each setting once: precedence, limits, and a document that cannot fall behind."""

from __future__ import annotations

from pathlib import Path

import pytest

from penstock.errors import SettingsError
from penstock.kinds import Address, Kind, parse, text_bytes, text_seconds
from penstock.settings import SETTINGS, Values, document, load

ROOT = Path(__file__).parent.parent


def up(tmp_path: Path, toml: str = "", environ: dict[str, str] | None = None, **flags: str | bool | None) -> Values:
    config = tmp_path / "penstock.toml"
    config.write_text(toml)
    return load("up", {name.replace("_", "-"): value for name, value in flags.items()}, environ or {}, config)


def test_the_document_is_what_the_settings_say() -> None:
    assert (ROOT / "docs" / "settings.md").read_text("utf-8") == document()


def test_every_default_is_within_its_own_limits() -> None:
    for command in {command for setting in SETTINGS for command in setting.commands}:
        load(command, {}, {}, None)


def test_names_are_there_once() -> None:
    assert len({setting.name for setting in SETTINGS}) == len(SETTINGS)
    for setting in SETTINGS:
        options = [one.option for one in SETTINGS if set(one.commands) & set(setting.commands)]
        assert options.count(setting.option) == 1


def test_a_flag_beats_the_environment_that_the_file_that_the_default(tmp_path: Path) -> None:
    environ = {"PENSTOCK_PARTITIONS": "5", "PENSTOCK_PERIOD": "5s"}
    values = up(tmp_path, 'partitions = 4\nperiod = "4s"\nretention = "4s"', environ, partitions="6")
    assert (values.count("partitions"), values.source("partitions")) == (6, "flag")
    assert (values.seconds("period"), values.source("period")) == (5.0, "environment")
    assert (values.seconds("retention"), values.source("retention")) == (4.0, "file")
    assert (values.seconds("lease"), values.source("lease")) == (30.0, "default")


def test_a_flag_without_value() -> None:
    assert load("up", {"anonymous": True}, {}).flag("anonymous")
    assert not load("up", {"anonymous": False}, {}).flag("anonymous")
    assert load("up", {"anonymous": False}, {"PENSTOCK_ANONYMOUS": "yes"}).flag("anonymous")


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("partitions", "0", "between 1 and 1024"),
        ("partitions", "1025", "between 1 and 1024"),
        ("partitions", "4.5", "whole number"),
        ("partitions", "-1", "whole number"),
        ("partitions", "", "whole number"),
        ("period", "7s", "divide 24h"),
        ("period", "1.5s", "divide 24h"),
        ("period", "25h", "between 1s and 24h"),
        ("period", "500ms", "between 1s and 24h"),
        ("retention", "soon", "duration"),
        ("lease", "nan", "duration"),
        ("hub-bytes-max", "1MiB", "between 16MiB and 16TiB"),
        ("hub-bytes-max", "64 GiB", "size"),
        ("listen", "example.org:8480", "must be an IP address"),
        ("listen", "256.0.0.1:8480", "must be an IP address"),
        ("admin", "0.0.0.0:8480", "loopback addresses only"),
        ("admin", "192.168.1.7:8480", "loopback addresses only"),
        ("admin", "[::]:8480", "loopback addresses only"),
        ("listen", "127.0.0.1", "HOST:PORT"),
        ("listen", "127.0.0.1:70000", "HOST:PORT"),
        ("archive", "off", "one of on, none"),
        ("log-level", "loud", "one of debug"),
        ("anonymous", "perhaps", "yes or no"),
    ],
)
def test_a_wrong_value_is_refused_and_named(name: str, text: str, says: str) -> None:
    with pytest.raises(SettingsError, match=says):
        load("up", {name: text}, {})
    with pytest.raises(SettingsError, match="PENSTOCK_"):
        load("up", {}, {"PENSTOCK_" + name.upper().replace("-", "_"): text})


def test_a_hosts_name_is_one_that_a_lease_can_hold() -> None:
    assert load("host", {"name": "host-1.example"}, {}).text("name") == "host-1.example"
    with pytest.raises(SettingsError, match="name"):
        load("host", {"name": "a b"}, {})


@pytest.mark.parametrize("toml", ["partition = 4", "partitions = [4]", "partitions ="])
def test_a_wrong_file_is_refused(tmp_path: Path, toml: str) -> None:
    with pytest.raises(SettingsError, match=r"penstock\.toml"):
        up(tmp_path, toml)


def test_a_file_that_was_named_must_be_there(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="not there"):
        load("up", {}, {}, tmp_path / "nope.toml")


def test_texts_of_people() -> None:
    assert [text_seconds(text) for text in ("250ms", "30s", "10m", "1h", "7d", "2")] == [
        0.25,
        30,
        600,
        3600,
        604_800,
        2,
    ]
    assert [text_bytes(text) for text in ("64KiB", "1MiB", "2GiB", "1TiB", "10MB", "7")] == [
        65_536,
        1 << 20,
        2 << 30,
        1 << 40,
        10_000_000,
        7,
    ]
    assert parse(Kind.ADDRESS, "localhost:80") == Address("127.0.0.1", 80)
    assert str(parse(Kind.ADDRESS, "[::1]:0")) == "[::1]:0"
    hosts = ("127.0.0.2", "[::1]", "0.0.0.0", "[::]", "192.168.1.7")
    addresses = [parse(Kind.ADDRESS, f"{host}:8480") for host in hosts]
    assert [isinstance(one, Address) and one.loopback for one in addresses] == [True, True, False, False, False]
