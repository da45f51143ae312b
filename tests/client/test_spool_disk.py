"""The disk below the spool is full or broken (case 89): `send` says so, and what it took is sent when the disk is well again."""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from penstock.client import sending
from penstock.client.client import Client
from penstock.client.transport import Answer
from penstock.errors import SpoolFull
from penstock.files import Appending, Files
from tests.client.conftest import MemoryApi, never_arrived
from tests.client.test_client import client_of, event, numbers
from tests.crash.disk import SmallDisk
from tests.e2e.system import wait_for


def full() -> OSError:
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class SickFiles(Files):
    """A disk that takes `bytes_left`, the last write of them in part. With `no_batches` it takes events, but no batch of them."""

    def __init__(self) -> None:
        self.bytes_left = 1 << 40
        self.no_batches = False

    def _open_new(self, path: Path, mode: int = 0o666) -> int:
        if path.name.startswith(".") and self.no_batches:
            raise full()
        return super()._open_new(path, mode)

    def _write(self, fd: int, body: memoryview) -> int:
        if not self.bytes_left:
            raise full()
        written = super()._write(fd, body[: self.bytes_left])
        self.bytes_left -= written
        return written


def send_until_refused(client: Client, count: Iterator[int], times: int = 1) -> tuple[list[int], OSError | SpoolFull]:
    """What was taken until so many events were refused, and the last refusal."""
    taken: list[int] = []
    for n in itertools.islice(count, 100_000):
        try:
            client.send({**event(n), "padding": "x" * (n % 97)})
            taken.append(n)
        except (OSError, SpoolFull) as error:
            times -= 1
            if not times:
                return taken, error
    raise AssertionError("nothing is refused")


@pytest.mark.parametrize("bytes_left", range(3000, 3090, 7))
def test_an_event_that_was_written_half_spoils_no_other(tmp_path: Path, bytes_left: int) -> None:
    api, files, count = MemoryApi(), SickFiles(), itertools.count()
    with client_of(tmp_path, api, files=files, linger_s=60) as client:
        files.bytes_left = bytes_left
        taken, error = send_until_refused(client, count, times=3)
        assert isinstance(error, OSError) and error.errno == errno.ENOSPC
        files.bytes_left = 1 << 40
        for n in itertools.islice(count, 5):
            client.send(event(n))
            taken.append(n)
        client.flush()
        assert (client.stats().quarantined, client.stats().waiting_bytes) == (0, 0)
    assert numbers(api) == taken


def test_control_behind_a_half_event_the_next_is_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write(self: Appending, body: bytes) -> None:
        self._files._write_all(self._fd, body)
        self._written += len(body)

    monkeypatch.setattr(Appending, "write", write)
    with pytest.raises(AssertionError):
        test_an_event_that_was_written_half_spoils_no_other(tmp_path, 3000)


def test_a_spool_in_which_no_batch_can_be_made_says_so(tmp_path: Path) -> None:
    """Not only when the open file fails: without batches the spool would wait for them, and `send` with it."""
    api, files, count = MemoryApi(), SickFiles(), itertools.count()
    with client_of(tmp_path, api, files=files, batch_events=5, linger_s=60) as client:
        files.no_batches = True
        taken, error = send_until_refused(client, count)
        assert isinstance(error, OSError) and error.errno == errno.ENOSPC
        assert "This event was not taken" in str(error) and str(tmp_path) in str(error)
        assert client.stats().state == "waiting"
        assert "cannot be written" in client.stats().why
        files.no_batches = False
        client.flush()
        client.send(event(next(count)))
        client.flush()
        assert client.stats().state == "idle"
    assert numbers(api) == [*taken, taken[-1] + 2]


def test_a_sync_that_failed_is_not_trusted_when_the_next_succeeds(tmp_path: Path) -> None:
    """The system forgets what it could not write, and says so once. So the events are written anew, as a batch."""
    failed: list[Path] = []

    class Forgetful(Files):
        def _fsync(self, fd: int) -> None:
            path = Path(f"/proc/self/fd/{fd}").readlink()
            if path.suffix == ".open" and not failed:
                failed.append(path)
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            super()._fsync(fd)

    down = MemoryApi(*[never_arrived] * 100_000)
    with client_of(tmp_path, down, files=Forgetful(), linger_s=600) as client:
        client.send(event(0))
        wait_for("its batch is made", lambda: failed and list(tmp_path.glob("0/0/*.batch")))
        wait_for("the open file is gone", lambda: not failed[0].exists())
        client.send(event(1))
    api = MemoryApi()
    with client_of(tmp_path, api) as client:
        client.flush()
    assert numbers(api) == [0, 1]


def test_an_event_behind_which_a_batch_cannot_be_ended_is_taken_and_send_says_so(tmp_path: Path) -> None:
    class NoSync(Files):
        sick = False

        def _fsync(self, fd: int) -> None:
            if self.sick:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            super()._fsync(fd)

    api, files, taken = MemoryApi(), NoSync(), []
    with client_of(tmp_path, api, files=files, batch_events=3, linger_s=60) as client:
        files.sick = True
        for n in range(5):
            with contextlib.suppress(OSError):
                client.send(event(n))
                taken.append(n)
        files.sick = False
        client.flush()
    assert numbers(api) == taken


def test_a_batch_that_could_not_be_split_at_once_is_counted_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class NoSecondHalf(Files):
        left = 3

        def replace(self, path: Path, body: bytes) -> None:
            if "b-" in path.name and self.left:
                self.left -= 1
                raise full()
            super().replace(path, body)

    monkeypatch.setattr(sending, "BACKOFF_S", (0.001, 0.01))
    api = MemoryApi(lines_max=1)
    with client_of(tmp_path, api, files=NoSecondHalf()) as client:
        client.send_many([event(n) for n in range(4)])
        client.flush()
        assert (client.stats().waiting_events, client.stats().waiting_bytes) == (0, 0)
    assert numbers(api) == list(range(4))


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[SmallDisk]:
    made = SmallDisk(tmp_path / "disk", 1)
    yield made
    made.close()


@pytest.mark.parametrize("sync", ["group", "each"])
def test_a_real_disk_is_full_and_gets_room(tmp_path: Path, disk: SmallDisk, sync: str) -> None:
    count = itertools.count()
    spool = disk.folder / "spool"
    with client_of(spool, MemoryApi(*[never_arrived] * 100_000), sync=sync, batch_events=100) as client:
        client.send(event(next(count)))
        ballast = disk.fill(leave_bytes=200 << 10)
        taken, error = send_until_refused(client, count, times=30)
        assert isinstance(error, SpoolFull)
        assert "left on its disk" in str(error) and "This event was not taken" in str(error)
        ballast.unlink()
        more = list(itertools.islice(count, 50))
        for n in more:
            client.send(event(n))
        wait_for("all is in batches", lambda: not list(spool.glob("*/*/*.open")))
    api = MemoryApi()
    with client_of(spool, api) as client:
        client.flush()
        assert client.stats().quarantined == 0
    assert numbers(api) == [0, *taken, *more]


@pytest.mark.parametrize("restart", [False, True])
def test_a_disk_that_the_spool_has_filled_is_emptied_by_sending(
    tmp_path: Path, disk: SmallDisk, monkeypatch: pytest.MonkeyPatch, restart: bool
) -> None:
    """With new events taking what room there is; and nobody has to delete anything."""
    monkeypatch.setattr(sending, "BACKOFF_S", (0.01, 0.1))
    hub_is_there, count, spool = threading.Event(), itertools.count(), disk.folder / "spool"

    def away(api: MemoryApi, body: bytes, number: str) -> Answer | None:
        return None if hub_is_there.is_set() else never_arrived(api, body, number)

    api = MemoryApi(*[away] * 100_000)
    client = client_of(spool, api, batch_events=100)
    taken, _ = send_until_refused(client, count, times=200)
    assert disk.free_bytes() < 128 << 10
    if restart:
        client.close()
        client = client_of(spool, api, batch_events=100)
    hub_is_there.set()
    for n in itertools.islice(count, 2000):
        with contextlib.suppress(SpoolFull):
            client.send(event(n))
            taken.append(n)
    wait_for("new events are taken again", lambda: not client.stats().why)
    client.flush()
    assert (client.stats().waiting_events, client.stats().quarantined) == (0, 0)
    client.close()
    assert numbers(api) == taken


@pytest.mark.parametrize("looks", [True, False], ids=["", "control: it takes all"])
def test_events_leave_room_for_a_number(disk: SmallDisk, monkeypatch: pytest.MonkeyPatch, looks: bool) -> None:
    """A batch must have its number on disk before it is posted: events that take all the room would never leave again."""
    if not looks:
        monkeypatch.setattr(Client, "_full", lambda _client, _size: "")
    api = MemoryApi(*[never_arrived] * 100_000)
    with client_of(disk.folder / "spool", api, batch_events=100_000, linger_s=600) as client:
        send_until_refused(client, itertools.count(), times=200)
        with contextlib.nullcontext() if looks else pytest.raises(OSError, match="No space left"):
            Files().replace(disk.folder / "state.json", bytes(4096))
