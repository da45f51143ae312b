"""How a client reaches an API, and what opens it: addresses and connection strings, keys, certificates.

    http://HOST:PORT · https://HOST[:PORT][/PATH]
    Endpoint=sb://HOST[:PORT]/;SharedAccessKeyName=NAME;SharedAccessKey=KEY[;EntityPath=…]

A connection string has the form of Azure Event Hubs. `sb://` stands for https, and for http where the host is this very machine;
`Endpoint=http://…` and `https://…` say it themselves. With a connection string each request carries a shared access signature (sas.py)
that is made here, and anew when half of its time is over; so the machine's clock must be right to a few minutes. With a key it need not.
"""

from __future__ import annotations

import http.client
import ipaddress
import os
import ssl
from collections.abc import Mapping
from typing import Final, NamedTuple
from urllib.parse import SplitResult, urlsplit

from penstock import sas
from penstock.clock import Clock, SystemClock
from penstock.errors import SettingsError

TOKEN_S: Final = 3600
URL: Final = "http://127.0.0.1:8480"


class ConnectionString(NamedTuple):
    """An address, and the key that signs for it."""

    url: str
    name: str
    key: str


class Access:
    """An API's address and what opens it. Thread-safe. `where` is the address without a path, and names it to people.

    `ca` is a file of certificates that the server's is checked against, instead of the system's; `certificate` and `certificate_key`
    are shown to servers that ask for one. `pinned` is the server's very own certificate, whatever name that has. Raises SettingsError.
    """

    def __init__(
        self,
        url: str,
        *,
        key: str = "",
        ca: str = "",
        certificate: str = "",
        certificate_key: str = "",
        pinned: str = "",
        clock: Clock | None = None,
    ) -> None:
        self._signing = connection_string(url) if is_connection_string(url) else None
        parts = address(url)
        self.where = f"{parts.scheme}://{parts.netloc}"
        self._host, self._port = parts.hostname or "", parts.port
        self.base = parts.path.rstrip("/")
        self._bearer = "" if self._signing else _checked(key)
        self._clock: Clock = clock or SystemClock()
        self._token = (0, "")
        self._tls = _context(ca, certificate, certificate_key, pinned) if parts.scheme == "https" else None

    @classmethod
    def from_environment(
        cls,
        url: str | Access | None = None,
        *,
        key: str | None = None,
        ca: str | None = None,
        certificate: str | None = None,
        certificate_key: str | None = None,
    ) -> Access:
        """What is not given comes from PENSTOCK_URL, _KEY, _CA, _CERTIFICATE and _CERTIFICATE_KEY. An Access is what it is."""
        if isinstance(url, Access):
            return url

        def given(value: str | None, variable: str, default: str = "") -> str:
            return value or os.environ.get(variable) or default

        return cls(
            given(url, "PENSTOCK_URL", URL),
            key=given(key, "PENSTOCK_KEY"),
            ca=given(ca, "PENSTOCK_CA"),
            certificate=given(certificate, "PENSTOCK_CERTIFICATE"),
            certificate_key=given(certificate_key, "PENSTOCK_CERTIFICATE_KEY"),
        )

    def headers(self) -> Mapping[str, str]:
        """What a request carries to be let in; nothing without a key."""
        if self._signing is None:
            return {"Authorization": f"Bearer {self._bearer}"} if self._bearer else {}
        now_s = self._clock.now_ms() // 1000
        renew_s, token = self._token
        if not renew_s - TOKEN_S // 2 <= now_s < renew_s:  # also where the clock was set back
            name, key = self._signing.name, self._signing.key
            token = sas.token(f"{self.where}/", name=name, key=key, expires_s=now_s + TOKEN_S)
            self._token = now_s + TOKEN_S // 2, token
        return {"Authorization": token}

    def connection(self, *, timeout_s: float) -> http.client.HTTPConnection:
        """A connection that opens when it is used."""
        if self._tls is None:
            return http.client.HTTPConnection(self._host, self._port, timeout=timeout_s)
        return http.client.HTTPSConnection(self._host, self._port, timeout=timeout_s, context=self._tls)


def opened(api: str | Access) -> Access:
    """An address without a key as an Access."""
    return api if isinstance(api, Access) else Access(api)


def is_connection_string(text: str) -> bool:
    return "endpoint=" in text.lower().replace(" ", "") and "://" not in text.partition("=")[0]


def connection_string(text: str) -> ConnectionString:
    """Raises SettingsError, which never repeats what may hold a key."""
    fields = connection_string_fields(text)
    scheme, _, rest = fields["endpoint"].partition("://")
    if scheme.lower() == "sb":
        # As https first, for which an address has to make sense at all.
        scheme = "http" if is_loopback(address(f"https://{rest}").hostname or "") else "https"
    return ConnectionString(f"{scheme}://{rest}", fields["sharedaccesskeyname"], fields["sharedaccesskey"])


def connection_string_fields(text: str) -> dict[str, str]:
    """What is in a connection string, by names in lower case; those that every one must have are there. Raises SettingsError likewise."""
    fields: dict[str, str] = {}
    for part in filter(None, (part.strip() for part in text.split(";"))):
        name, _, value = part.partition("=")
        fields[name.strip().lower()] = value.strip()
    lacking = [
        name for name in ("Endpoint", "SharedAccessKeyName", "SharedAccessKey") if not fields.get(name.lower(), "")
    ]
    if lacking:
        raise SettingsError(f"The connection string has no {' and no '.join(lacking)}.")
    return fields


def address(url: str) -> SplitResult:
    """Where an API is, by its address or a connection string. Raises SettingsError for what is neither."""
    if is_connection_string(url):
        url = connection_string(url).url
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise SettingsError(f"{url} is not an address of the form http://HOST:PORT: {error}.") from None
    if parts.scheme not in ("http", "https") or not parts.hostname or "@" in parts.netloc or port == 0:
        raise SettingsError(f"{url} is not an address of the form http://HOST:PORT.")
    return parts


def is_loopback(host: str) -> bool:
    """Whether a host is this very machine by its name."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def _checked(key: str) -> str:
    """A key without white space around it, as a file has it."""
    key = key.strip()
    if not key.isascii() or not key.isprintable() or " " in key:
        raise SettingsError("The key is not of the form KID.SECRET: it holds characters that no key has.")
    return key


def _context(ca: str, certificate: str, certificate_key: str, pinned: str) -> ssl.SSLContext:
    try:
        context = ssl.create_default_context(cafile=ca or pinned or None)
        if pinned and not ca:
            context.check_hostname = False
            context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
        if certificate:
            context.load_cert_chain(certificate, certificate_key or None)
    except (OSError, ValueError) as error:
        named = ", ".join(filter(None, (ca or pinned, certificate, certificate_key)))
        raise SettingsError(f"The certificates in {named} cannot be used: {error}.") from error
    return context
