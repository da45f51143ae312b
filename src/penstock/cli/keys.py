"""`penstock key` and `penstock token`: who may send, listen and manage."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final
from urllib.parse import quote

import click
import msgspec

from penstock.cli.options import as_json, console, settings, url_beats_data
from penstock.errors import SettingsError
from penstock.kinds import text_bytes, text_seconds

if TYPE_CHECKING:
    from penstock.server.keys import Key, Keys, RightName
    from penstock.settings import Values

_RIGHTS: Final = ("send", "listen", "manage")
_EVERYWHERE = ("0.0.0.0", "[::]")


class KeyRow(msgspec.Struct):
    """A key without anything secret. `devices` are those it may send for, empty: all; quotas are None where there is none."""

    kid: str
    name: str
    rights: Sequence[str]
    devices: Sequence[str]
    events_per_s: int | None
    bytes_per_s: int | None
    created: str
    revoked: str | None


class CreatedKey(KeyRow):
    """A key with what opens: nothing of it is shown again."""

    key: str = ""
    shared_access_key: str = ""
    connection_string: str = ""


@click.group()
def key() -> None:
    """Who may send, listen and manage: make keys, list them, revoke them."""


@key.command()
@click.option(
    "--right",
    "rights",
    multiple=True,
    required=True,
    type=click.Choice(_RIGHTS),
    help="What it is for; may be repeated.",
)
@click.option(
    "--device",
    "devices",
    multiple=True,
    help="A device that it may send for, `d-*` for all that begin so; may be repeated.",
)
@click.option(
    "--name", default="", help="Its name, which two keys may have, one to replace the other. Default: its id."
)
@click.option("--events-per-second", type=click.IntRange(1), help="At most so many events a second.")
@click.option("--bytes-per-second", metavar="SIZE", help="At most so many bytes a second, such as 1MB.")
@as_json
@settings("key-create")
def create(
    values: Values,
    rights: Sequence[RightName],
    devices: Sequence[str],
    name: str,
    events_per_second: int | None,
    bytes_per_second: str | None,
    as_json: bool,
) -> None:
    """Make a key. Its text is printed this once and kept nowhere; every worker takes it when this returns."""
    quota = None if bytes_per_second is None else _size(bytes_per_second)
    made = _keys(values).create(rights, name=name, devices=devices, events_per_s=events_per_second, bytes_per_s=quota)
    endpoint = _endpoint(values)
    signing = made.key.shared_access_key
    string = f"Endpoint={endpoint};SharedAccessKeyName={made.key.name};SharedAccessKey={signing}"
    if as_json:
        row = msgspec.structs.asdict(_row(made.key))
        click.echo(
            msgspec.json.encode(CreatedKey(**row, key=made.text, shared_access_key=signing, connection_string=string))
        )
    else:
        click.echo(made.text)
        click.echo(
            f"Key {made.key.kid} may {_and(made.key.rights)}. It is not shown again. As a connection string:", err=True
        )
        click.echo(string, err=True)
    if devices and set(rights) - {"send"}:
        click.echo("--device says for which devices it may send; what else it may do is not limited to them.", err=True)


@key.command("list")
@as_json
@settings("key-list")
def list_keys(values: Values, as_json: bool) -> None:
    """All keys, revoked ones too. What opens is not among what is shown."""
    from rich.table import Table

    rows = [_row(one) for one in _keys(values).all()]
    if as_json:
        click.echo(msgspec.json.encode(rows))
        return
    table = Table("key", "name", "rights", "devices", "events/s", "bytes/s", "created", "revoked")
    for row in rows:
        quotas = ("" if quota is None else f"{quota:,}" for quota in (row.events_per_s, row.bytes_per_s))
        cells = (row.kid, row.name, " ".join(row.rights), " ".join(row.devices) or "all")
        table.add_row(*cells, *quotas, row.created, row.revoked or "")
    console().print(table)


@key.command()
@click.argument("kid")
@settings("key-revoke")
def revoke(values: Values, kid: str) -> None:
    """Refuse a key from now on: no worker takes it when this returns, nor a token that was signed with it."""
    from penstock.cli.reach import key_in

    revoked = _keys(values).revoke(kid)
    click.echo(f"{revoked.name} ({kid}) is revoked since {revoked.revoked}.")
    if key_in(values).partition(".")[0] == kid:
        click.echo(
            f"It was the one in {Path(values.text('data')) / 'key'}, with which commands on this machine come in: put another there.",
            err=True,
        )


@click.command()
@click.option("--kid", default="", help="The key that signs, by its id.")
@click.option("--name", default="", help="The key that signs, by its name; of two the newer.")
@click.option(
    "--connection-string", default="", help="The key that signs, from a connection string instead of the data folder."
)
@click.option("--uri", default="", help="What it is good for, with all beneath. Default: the whole API.")
@click.option("--device", default="", help="Good for events of this one device, and for nothing else.")
@click.option("--for", "for_", default="1h", show_default=True, metavar="DURATION", help="How long it is good.")
@settings("token")
def token(values: Values, kid: str, name: str, connection_string: str, uri: str, device: str, for_: str) -> None:
    """Print a SAS token in Event Hubs' form, for an Authorization header."""
    from penstock import sas
    from penstock.access import address
    from penstock.access import connection_string as parsed
    from penstock.clock import SystemClock
    from penstock.wire.route import is_device

    if sum(map(bool, (kid, name, connection_string))) != 1:
        raise SettingsError("Which key signs is said by one of --kid, --name and --connection-string.")
    if device and not is_device(device):
        raise SettingsError(f"{device!r} is not a device id.")
    if connection_string:
        whole, name, signing = parsed(connection_string)
    else:
        found = _signer(_keys(values).all(), kid, name)
        whole, name, signing = _endpoint(values), found.name, found.shared_access_key
    parts = address(f"Endpoint={whole};SharedAccessKeyName=-;SharedAccessKey=-")
    uri = uri or f"{parts.scheme}://{parts.netloc}/"
    expires_s = SystemClock().now_ms() // 1000 + int(_duration(for_))
    token = sas.token(sas.publisher(uri, device) if device else uri, name=name, key=signing, expires_s=expires_s)
    named = sas.resource(quote(uri, safe="").encode())
    if named is None or not named.host:
        raise SettingsError(f"--uri {uri!r} names nothing of an API: it is an address, or one with a path.")
    click.echo(token)


def _signer(keys: Sequence[Key], kid: str, name: str) -> Key:
    living = [one for one in keys if one.revoked is None and kid in (one.kid, "") and name in (one.name, "")]
    if not living:
        raise SettingsError(f"There is no key {kid or name}, or it is revoked: `penstock key list` names them.")
    return living[-1]


def _keys(values: Values) -> Keys:
    from penstock.clock import SystemClock
    from penstock.files import Files
    from penstock.server.keys import Keys

    data = Path(values.text("data"))
    if not data.is_dir():
        raise SettingsError(f"There is no installation in {data}: start one with `penstock up --data {data}`.")
    return Keys(data, Files(), SystemClock())


def _endpoint(values: Values) -> str:
    """What a connection string names: what `--url` says, or what runs on the data folder, by a name that others can reach."""
    from penstock.access import address, is_loopback
    from penstock.cli.reach import running

    run = running(values)
    if url_beats_data(values) or run is None:
        parts = address(values.text("url"))
        secure, host = parts.scheme == "https", parts.netloc
    else:
        name, _, port = run.listen.rpartition(":")
        secure, host = bool(run.certificate), f"{socket.gethostname() if name in _EVERYWHERE else name}:{port}"
        parts = address(f"http://{host}")
    # `sb` stands for https, and for http on this very machine (access.py); anything else is said.
    usual = secure != is_loopback(parts.hostname or "")
    return f"{'sb' if usual else 'https' if secure else 'http'}://{host}/"


def _row(key: Key) -> KeyRow:
    return KeyRow(
        key.kid, key.name, key.rights, key.devices, key.events_per_s, key.bytes_per_s, key.created, key.revoked
    )


def _and(words: Sequence[str]) -> str:
    return " and ".join(filter(None, (", ".join(words[:-1]), words[-1])))


def _size(text: str) -> int:
    try:
        if size := text_bytes(text):
            return size
        raise SettingsError("it must be at least one byte")
    except SettingsError as error:
        raise SettingsError(f"--bytes-per-second is wrong ({text!r}): {error.detail}. No key was made.") from error


def _duration(text: str) -> float:
    try:
        return text_seconds(text)
    except SettingsError as error:
        raise SettingsError(f"--for is wrong ({text!r}): {error.detail}.") from error
