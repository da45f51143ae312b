"""What protects the ports of an installation: keys, certificates, and what is said of them at the start."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from penstock.cli.reach import here
from penstock.errors import SettingsError

if TYPE_CHECKING:
    from penstock.clock import Clock
    from penstock.kinds import Address
    from penstock.server.auth import Guard
    from penstock.server.tls import Certificates
    from penstock.settings import Values
    from penstock.telemetry.log import Log

_TLS = ("tls-key", "tls-client-ca")
_EVENT = '{"deviceId":"d-1","temperature":21.4}'


def check(values: Values, log: Log) -> None:
    """Raises SettingsError for what would leave the ports open, or shut to all. Touches nothing."""
    listen = values.address("listen")
    if values.flag("anonymous") and not listen.loopback:
        raise SettingsError(
            f"--anonymous lets in everyone who reaches {listen}: it goes with loopback addresses only, such as 127.0.0.1:8480. "
            "Nothing was started."
        )
    if certificates(values, log) is None and not listen.loopback:
        log.warning("Keys and events travel in the clear: --tls-cert is not given.", listen=str(listen))


def certificates(values: Values, log: Log) -> Certificates | None:
    """What the listener for everyone shows; None where it speaks no TLS. Raises SettingsError."""
    from penstock.server.tls import Certificates

    if not values.text("tls-cert"):
        for name in _TLS:
            if values.text(name):
                raise SettingsError(f"--{name} means nothing without --tls-cert. Nothing was started.")
        return None
    key, client_ca = (Path(values.text(name)) if values.text(name) else None for name in _TLS)
    return Certificates(Path(values.text("tls-cert")), key, client_ca, log=log)


def certificate(values: Values) -> str:
    """The whole path of the API's certificate, empty where it has none."""
    return str(Path(values.text("tls-cert")).resolve()) if values.text("tls-cert") else ""


def make_first_key(values: Values, data: Path, clock: Clock) -> None:
    """So that a new installation can be used at once. Raises SettingsError when its keys cannot be read or written."""
    from penstock.files import Files
    from penstock.server.keys import Keys

    if not values.flag("anonymous"):
        Keys(data, Files(), clock).first()


def make_guard(values: Values, data: Path, clock: Clock, log: Log) -> Guard:
    from penstock.server.auth import KeyGuard, no_guard
    from penstock.server.keys import keys_path

    return no_guard if values.flag("anonymous") else KeyGuard(keys_path(data), clock, log)


def advice(values: Values, data: Path, listen: Address) -> str:
    """Who may send, and a line that does."""
    from penstock.server.keys import key_path

    path = key_path(data)
    if values.flag("anonymous"):
        who, shown = "No keys: whoever is on this machine may send, read and manage.", ""
    elif path.exists():
        who = f"Its key, with all rights, lies in {path}, readable by you alone; `penstock key create` makes others."
        shown = f' -H "Authorization: Bearer $(cat {shlex.quote(str(path))})"'
    else:
        who = f"Its keys are those that `penstock key create` has made; {path} is not there."
        shown = ' -H "Authorization: Bearer $KEY"'
    tls = f" --cacert {shlex.quote(certificate(values))}" if certificate(values) else ""
    tls += " --cert CLIENT.pem" if values.text("tls-client-ca") else ""
    return (
        f"{who}\nTry:\n"
        f"  curl{tls} {here(str(listen), certificate(values))}/v1/events{shown} "
        f"-H 'Content-Type: application/x-ndjson' -d '{_EVENT}'"
    )
