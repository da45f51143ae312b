"""What was sent before the last `GROUP_SYNC_S` survives a power cut, whatever the other lanes do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from penstock.client import client as module
from penstock.client.client import Client
from penstock.files import Files
from penstock.testing import FakeClock
from tests.client.conftest import MemoryApi

FSYNC_S = 0.01
FLOOD, LONE = "d-4", "d-3"  # in lanes 0 and 1


class BusyFiles(Files):
    """Each sync takes time, in which `meanwhile` is called; `synced` says when each file was synced first."""

    def __init__(self, clock: FakeClock) -> None:
        self.synced: dict[Path, float] = {}
        self.meanwhile: Callable[[], None] | None = None
        self._clock = clock

    def _fsync(self, fd: int) -> None:
        self._clock.advance(FSYNC_S)
        self.synced.setdefault(Path(f"/proc/self/fd/{fd}").readlink(), self._clock.monotonic())
        if meanwhile := self.meanwhile:
            self.meanwhile = None  # what it sends is synced too
            meanwhile()
            self.meanwhile = meanwhile


@pytest.mark.parametrize("in_time", [True, False], ids=["", "control: as long as there is something to seal"])
def test_a_lane_is_synced_in_time_while_another_is_flooded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_time: bool
) -> None:
    clock = FakeClock()
    files = BusyFiles(clock)
    with monkeypatch.context() as patched:
        patched.setattr("threading.Thread.start", lambda _thread: None)
        client = Client(
            spool=tmp_path, connect=MemoryApi, clock=clock, files=files, lanes=2, batch_events=2, linger_s=60
        )
    client._threads.clear()
    flood, lone = client._spool.lanes
    sent_at, floods = 0.0, 0

    def meanwhile() -> None:
        nonlocal sent_at, floods
        if floods == 1:
            client.send({"deviceId": LONE})
            sent_at = clock.monotonic()
        if floods < 100 and flood.unsealed < module._UNSEALED_MAX:
            floods += 1
            client.send_many([{"deviceId": FLOOD}] * 2)

    client.send_many([{"deviceId": FLOOD}] * 2)
    files.meanwhile = meanwhile
    if not in_time:
        monkeypatch.setattr(module, "GROUP_SYNC_S", 1e9)
    while lone._open is None or lone._open_path not in files.synced:
        client._seal_once()
    # The acts of a batch that is under way come on top.
    late = files.synced[lone._open_path] - sent_at > 0.05 + 20 * FSYNC_S
    assert late != in_time
    files.meanwhile = None
    client.close()
