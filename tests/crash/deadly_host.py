"""`penstock host` that is killed just before its k-th act on a file: `deadly_host.py K host …`.

Acts are those of files.py, counted from the first that touches a ledger or a partition's folder: what a host does to
take its leases happens at each of its starts.
"""

from __future__ import annotations

import functools
import os
import re
import signal
import sys
import threading
from collections.abc import Callable
from typing import Any

from penstock.cli.main import main
from penstock.files import Files

ACTS = ("_mkdir", "_open_new", "_write", "_fsync", "_link", "_link_open", "_rename", "_unlink", "_flock")
ARCHIVE = re.compile(r"/store/(_ledger|\d)")


class Fate:
    def __init__(self, last: int) -> None:
        self._left = last
        self._begun = False
        self._lock = threading.Lock()

    def before(self, arguments: tuple[Any, ...]) -> None:
        with self._lock:
            self._begun = self._begun or any(ARCHIVE.search(str(argument)) for argument in arguments)
            self._left -= self._begun
            if self._left == 0:
                os.kill(os.getpid(), signal.SIGKILL)


def deadly(act: Callable[..., Any], fate: Fate) -> Callable[..., Any]:
    @functools.wraps(act)
    def fated(*arguments: Any) -> Any:
        fate.before(arguments)
        return act(*arguments)

    return fated


if __name__ == "__main__":
    fate = Fate(int(sys.argv.pop(1)))
    for name in ACTS:
        setattr(Files, name, deadly(getattr(Files, name), fate))
    main()
