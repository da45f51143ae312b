"""Which key a command takes, and to whom it is never sent."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from penstock.cli import reach
from penstock.files import Files
from penstock.server.parts import Run, write_run
from penstock.settings import Values, load

OURS = "Bearer kid.ours"


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """An installation that runs on an address of this machine."""
    (tmp_path / "run").mkdir()
    (tmp_path / "key").write_text("kid.ours\n")
    run(tmp_path)
    return tmp_path


def run(data: Path, listen: str = "192.0.2.7:8480", certificate: str = "") -> None:
    files = Files()
    write_run(data / "run", files, Run(os.getpid(), listen, "127.0.0.1:8481", [], None, certificate))


def values(data: Path, **given: str) -> Values:
    return load("status", given, {"PENSTOCK_DATA": str(data)})


@pytest.mark.parametrize(
    ("url", "sent"),
    [
        ("http://192.0.2.7:8480", OURS),
        ("http://127.0.0.1:9999", OURS),
        ("http://localhost:9999", OURS),
        ("http://[::1]:9999", OURS),
        ("http://192.0.2.7:8481", None),
        ("http://192.0.2.8:8480", None),
        ("https://192.0.2.7:8480", None),
        ("http://hub.example.org:8480", None),
        ("http://localhost.example.org", None),
        ("http://127.0.0.1.example.org:8480", None),
        ("http://hub.example.org/?http://127.0.0.1", None),
    ],
)
def test_the_key_of_the_data_folder_stays_on_this_machine(data: Path, url: str, sent: str | None) -> None:
    assert reach.api(values(data, url=url)).headers().get("Authorization") == sent


def test_a_key_that_is_named_is_sent_to_whom_it_is_named_for(data: Path) -> None:
    asked = values(data, url="http://hub.example.org:8480", key="kid.theirs")
    assert reach.api(asked).headers() == {"Authorization": "Bearer kid.theirs"}
    assert reach.api(values(data, key="kid.theirs")).headers() == {"Authorization": "Bearer kid.theirs"}


def test_what_runs_on_the_data_folder_is_found_with_its_key(data: Path) -> None:
    found = reach.api(values(data))
    assert (found.where, found.headers()) == ("http://192.0.2.7:8480", {"Authorization": OURS})
    found = reach.admin(values(data))
    assert (found.where, found.headers()) == ("http://127.0.0.1:8481", {"Authorization": OURS})


@pytest.mark.parametrize(
    ("listen", "certificate", "where"),
    [
        ("0.0.0.0:8480", "", "http://127.0.0.1:8480"),
        ("[::]:8480", "", "http://[::1]:8480"),
        ("[::1]:8480", "", "http://[::1]:8480"),
        ("0.0.0.0:8480", "cert.pem", "https://127.0.0.1:8480"),
    ],
)
def test_what_listens_everywhere_is_reached_here(listen: str, certificate: str, where: str) -> None:
    assert reach.here(listen, certificate) == where


@pytest.mark.parametrize("missing", ["gone", "folder", "not ASCII"])
def test_without_a_file_no_key_is_sent(data: Path, missing: str) -> None:
    (data / "key").unlink()
    if missing == "folder":
        (data / "key").mkdir()
    elif missing == "not ASCII":
        (data / "key").write_bytes(b"\xff")
    assert reach.api(values(data)).headers() == {}
