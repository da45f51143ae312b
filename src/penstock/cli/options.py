"""Click options made from the settings, and how a command finds the installation that it is about."""

from __future__ import annotations

import functools
import logging
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from penstock.errors import PenstockError, SettingsError
from penstock.settings import Kind, Setting, Values, load, of_command

if TYPE_CHECKING:
    from rich.console import Console

Command = Callable[..., None]
_RANK = {"default": 0, "file": 1, "environment": 2, "flag": 3}


def settings(command: str) -> Callable[[Command], Command]:
    """Gives a click command all options of its settings and calls it with `values`, checked."""

    def decorate(function: Command) -> Command:
        names = {setting.name.replace("-", "_"): setting.name for setting in of_command(command)}

        @functools.wraps(function)
        def call(config: Path | None, **options: Any) -> None:
            flags = {name: options.pop(variable) for variable, name in names.items()}
            function(values=load(command, flags, os.environ, config), **options)

        decorated: Command = click.option(
            "--config", type=click.Path(path_type=Path), help="Settings file. [default: penstock.toml, if it is there]"
        )(call)
        for setting in reversed(tuple(of_command(command))):
            decorated = _option(setting)(decorated)
        return decorated

    return decorate


def _option(setting: Setting) -> Callable[[Command], Command]:
    variable = setting.name.replace("-", "_")
    if setting.kind is Kind.FLAG:
        return click.option(setting.option, variable, is_flag=True, default=False, help=setting.help)
    limits = f"; {setting.least} … {setting.most}" if setting.least else ""
    limits = "; " + ", ".join(setting.choices) if setting.choices else limits
    help_text = f"{setting.help} [default: {setting.default}{limits}]" if setting.default else setting.help
    return click.option(setting.option, variable, default=None, metavar=setting.kind.value.upper(), help=help_text)


as_json = click.option("--json", "as_json", is_flag=True, help="Print JSON for programs.")


def url_beats_data(values: Values) -> bool:
    """A flag beats the environment, that the file; of two alike `--data` beats `--url`."""
    return _RANK[values.source("url")] > _RANK[values.source("data")]


def api_url(values: Values) -> str:
    """Where to send: what was asked for, or what runs on the data folder, or the usual address."""
    if not url_beats_data(values):
        address = _running(values, "listen")
        if address:
            return f"http://{address}"
        if values.source("data") != "default":
            raise SettingsError(f"No API runs on {values.text('data')}: start `penstock up`, or name it with --url.")
    return values.text("url").rstrip("/")


def admin_url(values: Values) -> str:
    """Where the admin port of what runs on the data folder is, or what `--url` says."""
    if url_beats_data(values):
        return values.text("url").rstrip("/")
    address = _running(values, "admin")
    if not address:
        raise SettingsError(f"Nothing runs on {values.text('data')}: start `penstock up`, or name it with --url.")
    return f"http://{address}"


def _running(values: Values, which: str) -> str:
    from penstock.server.parts import read_runs

    found = [getattr(run, which) for run in read_runs(Path(values.text("data")) / "run")]
    return next((address for address in found if address), "")


def console() -> Console:
    """For people. Where no terminal tells its width, tables get what they need."""
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else 400)


def fetch(url: str, *, method: str = "GET", body: bytes = b"") -> bytes:
    """The body of a 200. Raises PenstockError with a sentence for anything else."""
    return fetch_all(url, method=method, body=body)[0]


def fetch_all(url: str, *, method: str = "GET", body: bytes = b"") -> tuple[bytes, Mapping[str, str]]:
    """The same with the headers of the answer."""
    import http.client
    import urllib.error
    import urllib.request

    if not url.startswith(("http://", "https://")):
        raise SettingsError(f"{url} is not an address of the form http://HOST:PORT.")
    try:
        request = urllib.request.Request(url, method=method, data=body if method in ("POST", "PUT") else None)
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.read(), answer.headers
    except urllib.error.HTTPError as error:
        with error:
            raise PenstockError(f"{url} answers {error.code}: {error.read(500).decode(errors='replace')}") from error
    except (ValueError, http.client.InvalidURL) as error:
        raise SettingsError(f"{url} is not an address of the form http://HOST:PORT: {error}.") from error
    except (OSError, http.client.HTTPException) as error:
        raise PenstockError(f"{url} gives no answer: {getattr(error, 'reason', error)}.") from error


class _Echo(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        click.echo(record.getMessage(), err=True)


def echo_client_log() -> None:
    """What holds up the events is said on standard error, and when they are sent again."""
    log = logging.getLogger("penstock.client")
    log.setLevel(logging.INFO)
    log.addHandler(_Echo())
