"""The server's side of TLS: certificates that are renewed on disk are shown to the next client, without a restart."""

from __future__ import annotations

import ssl
from pathlib import Path

from penstock.errors import SettingsError
from penstock.telemetry.log import Log

_Seen = tuple[tuple[int, int, int], ...]


class Certificates:
    """A certificate with its key, which may lie in one file, and what clients' certificates are checked against, if they need one.

    `context` is for the listener. Raises SettingsError for files that cannot be used together.
    """

    def __init__(self, certificate: Path, key: Path | None, client_ca: Path | None, *, log: Log) -> None:
        self._certificate = certificate
        self._key = key
        self._log = log
        self._failed = ""
        try:
            self._seen = self._looked()
            self.context = self._loaded(self._made())
            if client_ca is not None:
                self.context.load_verify_locations(client_ca)
                self.context.verify_mode = ssl.CERT_REQUIRED
        except (OSError, ValueError) as error:
            files = ", ".join(str(path) for path in (certificate, key, client_ca) if path is not None)
            raise SettingsError(f"The certificates in {files} cannot be used: {error}. Nothing was started.") from error

    def renew(self) -> None:
        """Take the files if they are others. Where they do not fit (yet), the old ones stay, which is logged once."""
        try:
            seen = self._looked()
            if seen == self._seen:
                return
            # First into another context: one that has failed halfway would have a certificate and no key.
            self._loaded(self._made())
            self._loaded(self.context)
        except (OSError, ValueError) as error:
            if self._failed != str(error):
                self._failed = str(error)
                self._log.error("The renewed certificate cannot be used: the old one stays.", detail=str(error))
            return
        self._seen, self._failed = seen, ""
        self._log.info("The certificate was renewed.", path=str(self._certificate))

    def _looked(self) -> _Seen:
        every = [path.stat() for path in (self._certificate, self._key) if path is not None]
        return tuple((about.st_ino, about.st_mtime_ns, about.st_size) for about in every)

    def _made(self) -> ssl.SSLContext:
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.set_alpn_protocols(["http/1.1"])
        return context

    def _loaded(self, context: ssl.SSLContext) -> ssl.SSLContext:
        # Without a password of its own, a key that needs one would ask the terminal for it.
        context.load_cert_chain(self._certificate, self._key, password=lambda: b"")
        return context
