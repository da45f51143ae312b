"""`penstock`: the commands, and what their failures mean to the shell.

Exit 0: done. 1: a problem was found. 2: wrong use or settings, nothing was touched. Whatever is slow to import is imported
inside the commands.
"""

from __future__ import annotations

import sys
from typing import NoReturn

import click

from penstock import __version__
from penstock.cli.check import audit, verify
from penstock.cli.dead import dead
from penstock.cli.dump import dump
from penstock.cli.flush import flush
from penstock.cli.keys import key, token
from penstock.cli.leases import leases
from penstock.cli.send import send
from penstock.cli.show import status
from penstock.cli.simulate import simulate
from penstock.cli.units import units
from penstock.cli.up import api, host, up
from penstock.cli.why import why
from penstock.errors import PenstockError, SettingsError


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="penstock")
def penstock() -> None:
    """Takes in the events of very many devices and leaves them as a few large files that are easy to query."""


for command in (
    up,
    api,
    host,
    send,
    simulate,
    status,
    leases,
    why,
    units,
    audit,
    verify,
    flush,
    dump,
    dead,
    key,
    token,
):
    penstock.add_command(command)


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
