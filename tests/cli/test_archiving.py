"""`penstock host` as a process: its end."""

from __future__ import annotations

from penstock.clock import SystemClock
from penstock.hub.embedded import create
from tests.cli.conftest import Shell

# A publisher that waits for an answer which never comes.
PROGRAM = """
import threading
from penstock.cli import archiving, main

archiving._publish = lambda *_: threading.Event().wait()
archiving.PUBLISHER_S_MAX = 0.1
main.main()
"""


def test_a_store_that_does_not_answer_the_publisher_keeps_no_host_from_its_end(shell: Shell) -> None:
    create(shell.data / "hub", partitions=1, period_s=10, bytes_max=64 << 20, clock=SystemClock())
    host = shell.start("host", "--data", str(shell.data), "--name", "a", program=("-c", PROGRAM))
    shell.until(lambda: "lease taken" in (shell.folder / "log").read_text())
    assert shell.stop(host) == 0
    assert "The publisher of hour manifests did not end." in shell.log()
    assert "lease given back" in shell.log()
