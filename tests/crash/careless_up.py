"""`penstock up` without one of its safety steps, for negative controls: `careless_up.py hub|files up …`."""

from __future__ import annotations

import sys
from typing import Any

import lmdb

from penstock.cli.main import main
from penstock.files import Files


def unsynced_hub() -> None:
    really = lmdb.open

    def carelessly(*arguments: Any, **options: Any) -> lmdb.Environment:
        return really(*arguments, **(options | {"sync": False, "metasync": False}))

    lmdb.open = carelessly  # type: ignore[assignment,misc,unused-ignore]


def unsynced_files() -> None:
    def careless(self: Files, fd: int) -> None: ...

    Files._fsync = careless  # type: ignore[method-assign]


if __name__ == "__main__":
    {"hub": unsynced_hub, "files": unsynced_files}[sys.argv.pop(1)]()
    main()
