"""Click options made from the settings, and what all commands print with. How one reaches an API is in reach.py."""

from __future__ import annotations

import functools
import logging
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from penstock.kinds import Kind
from penstock.settings import Setting, Values, load, of_command

if TYPE_CHECKING:
    from rich.console import Console

Command = Callable[..., None]
_CONTROL = re.compile(r"[\x00-\x08\x0a-\x1f\x7f-\x9f]")
_RANK = {"default": 0, "file": 1, "environment": 2, "flag": 3}


def settings(command: str) -> Callable[[Command], Command]:
    """Gives a click command all options of its settings and calls it with `values`, checked."""

    def decorate(function: Command) -> Command:
        names = {setting.name.replace("-", "_"): setting.name for setting in of_command(command)}

        @functools.wraps(function)
        def call(config: Path | None, **options: Any) -> None:
            flags = {name: options.pop(variable, None) for variable, name in names.items()}
            function(values=load(command, flags, os.environ, config), **options)

        decorated: Command = click.option(
            "--config", type=click.Path(path_type=Path), help="Settings file. [default: penstock.toml, if it is there]"
        )(call)
        for setting in reversed(tuple(of_command(command))):
            if setting.option:
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


def beats(values: Values, name: str, *others: str) -> bool:
    """Whether a setting is given, and none of `others` in a plainer way."""
    given = _RANK[values.source(name)]
    return given > 0 and all(given >= _RANK[values.source(other)] for other in others)


def console() -> Console:
    """For people. Where no terminal tells its width, tables get what they need."""
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else 400)


def events_text(count: int) -> str:
    return "1 event" if count == 1 else f"{count:,} events"


def shown(text: str) -> str:
    """What devices send must not move the cursor of those who look at it."""
    return _CONTROL.sub(lambda found: f"\\x{ord(found[0]):02x}", text)


class _Echo(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        click.echo(record.getMessage(), err=True)


def echo_client_log() -> None:
    """What holds up the events is said on standard error, and when they are sent again."""
    log = logging.getLogger("penstock.client")
    log.setLevel(logging.INFO)
    log.addHandler(_Echo())
