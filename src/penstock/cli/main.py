"""`penstock`: the commands, and what their failures mean to the shell.

Exit 0: done. 1: a problem was found. 2: wrong use or settings, nothing was touched. A command's module is imported when the command is
asked for, and whatever else is slow to import inside the command.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator, Mapping
from typing import Final, NoReturn

import click

from penstock import __version__
from penstock.errors import PenstockError, SettingsError

_MODULES: Final = {
    "up": "up",
    "api": "up",
    "host": "up",
    "send": "send",
    "simulate": "simulate",
    "status": "show",
    "leases": "leases",
    "why": "why",
    "units": "units",
    "audit": "check",
    "verify": "check",
    "flush": "flush",
    "dump": "dump",
    "dead": "dead",
    "key": "keys",
    "token": "keys",
}


class _Commands(Mapping[str, click.Command]):
    """All of them by name, each imported when it is asked for."""

    def __getitem__(self, name: str) -> click.Command:
        found = getattr(importlib.import_module(f"penstock.cli.{_MODULES[name]}"), name)
        assert isinstance(found, click.Command)
        return found

    def __iter__(self) -> Iterator[str]:
        return iter(_MODULES)

    def __len__(self) -> int:
        return len(_MODULES)


# Click only reads them.
@click.group(commands=_Commands(), context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="penstock")
def penstock() -> None:
    """Takes in the events of very many devices and leaves them as a few large files that are easy to query."""


def main() -> NoReturn:
    try:
        code = penstock.main(standalone_mode=False) or 0
    except click.ClickException as error:
        error.show()
        code = 2
    except click.Abort:
        code = 1
    except SettingsError as error:
        click.echo(f"penstock: {error.detail}", err=True)
        code = 2
    except PenstockError as error:
        click.echo(f"penstock: {error.detail}", err=True)
        code = 1
    except BrokenPipeError:
        # `penstock … | head`: whoever reads has what he wanted.
        sys.stderr.close()
        code = 1
    sys.exit(code)
