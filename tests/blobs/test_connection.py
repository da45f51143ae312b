from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from penstock.blobs.connection import Place, connect, is_url, options, parse_url
from penstock.errors import SettingsError

AZ = Place("az", "c", "")


@pytest.mark.parametrize(
    ("url", "place"),
    [
        ("az://container", Place("az", "container", "")),
        ("az://container/", Place("az", "container", "")),
        ("s3://my.bucket-1/a/b", Place("s3", "my.bucket-1", "a/b")),
        ("gs://bucket/a/", Place("gs", "bucket", "a")),
    ],
)
def test_addresses(url: str, place: Place) -> None:
    assert parse_url(url) == place
    assert parse_url(str(place)) == place


@pytest.mark.parametrize(
    "url",
    [
        "http://x/y",
        "az://",
        "az:///x",
        "s3://b/../x",
        "s3://b//x",
        "gs://b/.x",
        "az://user:SECRET@c",
        "az://c/x?sig=SECRET",
        "ftp://x",
    ],
)
def test_what_is_no_address_is_not_repeated(url: str) -> None:
    assert is_url(url)
    with pytest.raises(SettingsError) as raised:
        parse_url(url)
    assert "SECRET" not in raised.value.detail


@pytest.mark.parametrize("store", ["./data", "/var/x", "file:///var/x", "az", "C:store"])
def test_folders(store: str) -> None:
    assert not is_url(store)


def test_a_connection_string() -> None:
    text = "DefaultEndpointsProtocol=https;AccountName=acc;AccountKey=a2V5PT0=;EndpointSuffix=core.windows.net"
    config, plain = options(AZ, {"AZURE_STORAGE_CONNECTION_STRING": text})
    assert config == {"endpoint": "https://acc.blob.core.windows.net", "account_name": "acc", "account_key": "a2V5PT0="}
    assert not plain


def test_a_connection_string_of_an_emulator_and_of_a_signature() -> None:
    text = "AccountName=devstoreaccount1;AccountKey=a2V5;BlobEndpoint=http://127.0.0.1:5/devstoreaccount1;"
    config, plain = options(AZ, {"AZURE_STORAGE_CONNECTION_STRING": text})
    assert (config["endpoint"], plain) == ("http://127.0.0.1:5/devstoreaccount1", True)
    text = "BlobEndpoint=https://acc.blob.core.windows.net/;SharedAccessSignature=sv=1&sig=x%3D"
    config, _ = options(AZ, {"AZURE_STORAGE_CONNECTION_STRING": text})
    assert config == {
        "endpoint": "https://acc.blob.core.windows.net",
        "account_name": "acc",
        "sas_key": "sv=1&sig=x%3D",
    }
    assert options(AZ, {"AZURE_STORAGE_CONNECTION_STRING": "UseDevelopmentStorage=true"})[0] == {"use_emulator": "true"}


@pytest.mark.parametrize("text", ["SECRET", "AccountKey=SECRET"])
def test_a_connection_string_that_is_none_is_not_repeated(text: str) -> None:
    with pytest.raises(SettingsError, match="AZURE_STORAGE_CONNECTION_STRING") as raised:
        options(AZ, {"AZURE_STORAGE_CONNECTION_STRING": text})
    assert "SECRET" not in raised.value.detail


def test_the_names_of_the_command_line_tools() -> None:
    assert options(AZ, {"AZURE_STORAGE_ACCOUNT": "a", "AZURE_STORAGE_KEY": "k"})[0] == {
        "account_name": "a",
        "account_key": "k",
    }
    assert options(AZ, {"AZURE_STORAGE_ACCOUNT": "a", "AZURE_STORAGE_ACCOUNT_NAME": "b"})[0] == {}
    s3 = Place("s3", "b", "")
    config, plain = options(s3, {"AWS_ENDPOINT_URL": "http://h:1"})
    assert (config["endpoint"], plain) == ("http://h:1", True)
    config, plain = options(s3, {"AWS_ENDPOINT_URL": "http://h", "AWS_ENDPOINT_URL_S3": "https://s"})
    assert (config["endpoint"], plain) == ("https://s", False)


def test_a_key_that_cannot_be_read_is_not_repeated() -> None:
    text = "AccountName=a;AccountKey=SECRET-that-is-not-base64!"
    with pytest.raises(SettingsError, match="cannot be opened") as raised:
        connect("az://c", {"AZURE_STORAGE_CONNECTION_STRING": text})
    assert raised.value.__cause__ is None
    assert "SECRET" not in raised.value.detail


def test_a_library_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "obstore", None)
    monkeypatch.delitem(sys.modules, "penstock.blobs.cloud", raising=False)
    with pytest.raises(SettingsError, match=r"pip install 'penstock\[cloud\]'"):
        connect("az://c", {})


def test_folders_need_no_such_library() -> None:
    code = "import sys, penstock.cli.workers, penstock.cli.main; print('obstore' in sys.modules)"
    source = Path(__file__).parents[2] / "src"
    done = subprocess.run(
        [sys.executable, "-c", code], env={"PYTHONPATH": str(source)}, capture_output=True, timeout=60, check=True
    )
    assert done.stdout == b"False\n"
