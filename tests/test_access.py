"""Addresses and connection strings, and what a request carries to be let in."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from penstock import sas
from penstock.access import TOKEN_S, Access, connection_string, opened
from penstock.errors import SettingsError
from penstock.testing import FakeClock

STRING = "Endpoint=sb://hub.example.org/;SharedAccessKeyName=press;SharedAccessKey=c2VjcmV0PT0="


@pytest.mark.parametrize(
    ("endpoint", "url"),
    [
        ("sb://hub.example.org/", "https://hub.example.org/"),
        ("sb://hub.example.org:8480/", "https://hub.example.org:8480/"),
        ("sb://127.0.0.1:8480/", "http://127.0.0.1:8480/"),
        ("SB://localhost:8480", "http://localhost:8480"),
        ("sb://[::1]:8480/", "http://[::1]:8480/"),
        ("http://hub.example.org/", "http://hub.example.org/"),
        ("https://127.0.0.1:8480/", "https://127.0.0.1:8480/"),
    ],
)
def test_what_an_endpoint_stands_for(endpoint: str, url: str) -> None:
    assert connection_string(STRING.replace("sb://hub.example.org/", endpoint)).url == url


def test_a_connection_string_may_be_written_as_people_do() -> None:
    assert connection_string(STRING)[1:] == ("press", "c2VjcmV0PT0=")
    loose = " sharedaccesskey = c2VjcmV0PT0= ; SharedAccessKeyName=press;EntityPath=telemetry ;endpoint=sb://hub.example.org/; "
    assert connection_string(loose) == connection_string(STRING)
    assert Access(loose).where == "https://hub.example.org"


@pytest.mark.parametrize("lacking", ["Endpoint", "SharedAccessKeyName", "SharedAccessKey"])
def test_what_a_connection_string_lacks_is_named_and_its_key_is_not(lacking: str) -> None:
    text = re.sub(rf"(^|;){lacking}=[^;]*", "", STRING)
    with pytest.raises(SettingsError, match=f"no {lacking}") as wrong:
        connection_string(text)
    assert "c2VjcmV0" not in wrong.value.detail
    with pytest.raises(SettingsError) as wrong:
        Access(STRING.replace("example.org/", "example.org:port/"))
    assert "c2VjcmV0" not in wrong.value.detail


@pytest.mark.parametrize(
    "url",
    [
        "",
        "Endpoint=sb://h[;SharedAccessKeyName=x;SharedAccessKey=y",
        "hub.example.org",
        "ftp://h",
        "http://",
        "http://h:port",
        "http://h:70000",
        "http://[::1",
        "http://u:p@h",
    ],
)
def test_what_is_no_address(url: str) -> None:
    with pytest.raises(SettingsError, match="is not an address"):
        Access(url)


def test_a_key_is_sent_as_it_lies_in_its_file() -> None:
    assert Access("http://h", key="kid.secret\n").headers() == {"Authorization": "Bearer kid.secret"}
    assert opened("http://h").headers() == {}
    for key in ("two words", "kid.é", "kid.\x00", "a\nb"):
        with pytest.raises(SettingsError, match="no key has") as wrong:
            Access("http://h", key=key)
        assert key not in wrong.value.detail


def test_a_connection_string_brings_its_own_key() -> None:
    assert (
        Access(STRING, key="kid.secret")
        .headers()["Authorization"]
        .startswith("SharedAccessSignature sr=https%3A%2F%2F")
    )


def test_a_token_is_made_anew_when_half_of_its_time_is_over() -> None:
    clock = FakeClock(1_795_356_000_000)
    access = Access(STRING, clock=clock)

    def expiry() -> int:
        token = sas.parse(access.headers()["Authorization"].partition(" ")[2].encode())
        assert token is not None
        key = b"c2VjcmV0PT0="
        assert token.signature == sas.signature(key, token.resource, token.expires_s)
        return token.expires_s - clock.now_ms() // 1000

    assert expiry() == TOKEN_S
    clock.advance(TOKEN_S / 2 - 1)
    assert expiry() == TOKEN_S / 2 + 1
    clock.advance(1)
    assert expiry() == TOKEN_S
    clock.step(-86_400)  # the clock was wrong, and is put right
    assert expiry() == TOKEN_S


def test_what_is_not_given_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PENSTOCK_URL", "http://there:1")
    monkeypatch.setenv("PENSTOCK_KEY", "kid.there")
    assert (Access.from_environment().where, Access.from_environment().headers()) == (
        "http://there:1",
        {"Authorization": "Bearer kid.there"},
    )
    given = Access.from_environment("http://here:1", key="kid.here")
    assert (given.where, given.headers()) == ("http://here:1", {"Authorization": "Bearer kid.here"})
    assert Access.from_environment(given) is given


def test_certificates_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    bad = tmp_path / "bad.pem"
    bad.write_text("no certificate")
    for given in ({"ca": str(bad)}, {"certificate": str(bad)}, {"ca": str(tmp_path / "none.pem")}):
        with pytest.raises(SettingsError, match="cannot be used"):
            Access("https://h", **given)  # type: ignore[arg-type]
