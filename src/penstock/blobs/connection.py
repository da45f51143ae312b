"""Where a cloud store is and how to sign in there: a URL and the platforms' usual environment variables, as plain options.

obstore reads most variables itself; here is what it does not know: connection strings, the names of the Azure CLI, and that an
endpoint that is written with http:// is meant so. No message repeats a value: any of them may be a secret.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final, NamedTuple

from penstock.blobs import BlobStore
from penstock.errors import SettingsError

AZURE, S3, GCS = "az", "s3", "gs"
_PART: Final = r"[A-Za-z0-9_$-][A-Za-z0-9._$-]*"
_URL: Final = re.compile(rf"(az|s3|gs)://({_PART})(?:/({_PART}(?:/{_PART})*))?/?")
_ENDPOINT: Final = {AZURE: "endpoint", S3: "endpoint", GCS: "base_url"}
_ENDPOINT_NAMES: Final = {
    AZURE: ("AZURE_STORAGE_ENDPOINT", "AZURE_ENDPOINT"),
    S3: ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT"),
    GCS: ("GOOGLE_BASE_URL",),
}


class Place(NamedTuple):
    """A container or bucket, and the folder in it under which all blobs lie (may be empty)."""

    scheme: str
    container: str
    prefix: str

    def __str__(self) -> str:
        return f"{self.scheme}://{self.container}" + (f"/{self.prefix}" if self.prefix else "")


def is_url(store: str) -> bool:
    """Whether it names a cloud store, well or badly, and not a folder."""
    return "://" in store and not store.startswith("file:///")


def parse_url(url: str) -> Place:
    """`az://container[/prefix]`, `s3://bucket[/prefix]`, `gs://bucket[/prefix]`. Raises SettingsError."""
    match = _URL.fullmatch(url)
    if not match:
        raise SettingsError(
            "The store's address is none: it must be a folder, file:///folder, az://container/prefix, s3://bucket/prefix or "
            "gs://bucket/prefix, with letters, digits and . _ - $ in its parts. Keys and tokens do not belong into it: they come "
            "from the environment (docs/stores.md). Nothing was touched."
        )
    return Place(match[1], match[2], match[3] or "")


def connect(url: str, environ: Mapping[str, str]) -> BlobStore:
    """The store at an address; asks it nothing yet. Raises SettingsError when that is not enough to find it and sign in."""
    try:
        from penstock.blobs.cloud import open_cloud
    except ModuleNotFoundError as error:
        raise SettingsError(
            f"The store {parse_url(url)} needs a library that is not installed: pip install 'penstock[cloud]'. "
            "Nothing was touched."
        ) from error
    return open_cloud(url, environ)


def options(place: Place, environ: Mapping[str, str]) -> tuple[dict[str, str], bool]:
    """What obstore has to be told beside what it finds in the environment, and whether plain http is meant.

    Raises SettingsError for a connection string that cannot be read.
    """
    config = _azure(environ) if place.scheme == AZURE else {}
    if place.scheme == S3:
        # Only the probe deletes, one blob at a time, and not every store knows the request for many.
        config["disable_bulk_delete"] = "true"
    key, names = _ENDPOINT[place.scheme], _ENDPOINT_NAMES[place.scheme]
    endpoint = config.get(key) or next((environ[name] for name in names if environ.get(name)), "")
    if endpoint:
        config[key] = endpoint
    return config, endpoint.startswith("http://")


def _azure(environ: Mapping[str, str]) -> dict[str, str]:
    if text := environ.get("AZURE_STORAGE_CONNECTION_STRING"):
        return _connection_string(text)
    config = {}
    # The Azure CLI's names for what obstore calls AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY.
    for theirs, key, ours in (
        ("AZURE_STORAGE_ACCOUNT", "account_name", "AZURE_STORAGE_ACCOUNT_NAME"),
        ("AZURE_STORAGE_KEY", "account_key", "AZURE_STORAGE_ACCOUNT_KEY"),
    ):
        if theirs in environ and ours not in environ:
            config[key] = environ[theirs]
    return config


def _connection_string(text: str) -> dict[str, str]:
    """https://learn.microsoft.com/azure/storage/common/storage-configure-connection-string"""
    fields: dict[str, str] = {}
    for field in filter(None, (part.strip() for part in text.split(";"))):
        name, equals, value = field.partition("=")
        if not equals:
            raise SettingsError("AZURE_STORAGE_CONNECTION_STRING is not of the form Name=Value;Name=Value.")
        fields[name.lower()] = value
    if fields.get("usedevelopmentstorage", "").lower() == "true":
        return {"use_emulator": "true"}
    name = fields.get("accountname", "")
    protocol = fields.get("defaultendpointsprotocol", "https")
    suffix = fields.get("endpointsuffix", "core.windows.net")
    endpoint = fields.get("blobendpoint") or (f"{protocol}://{name}.blob.{suffix}" if name else "")
    if not endpoint:
        raise SettingsError("AZURE_STORAGE_CONNECTION_STRING has neither AccountName nor BlobEndpoint.")
    config = {"endpoint": endpoint.rstrip("/"), "account_name": name or _host_account(endpoint)}
    if "accountkey" in fields:
        config["account_key"] = fields["accountkey"]
    elif "sharedaccesssignature" in fields:
        config["sas_key"] = fields["sharedaccesssignature"]
    return config


def _host_account(endpoint: str) -> str:
    """The account in `https://account.blob.core.windows.net`: obstore wants a name even where a SAS signs."""
    return endpoint.partition("://")[2].partition(".")[0]
