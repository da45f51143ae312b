"""Power cuts on a device: what the client promised to keep is there after the journal's replay, and is archived once, in order.

With `sync="each"` an event is promised when `send` returns; otherwise when a sync of its file that began later has returned.
The device is stopped before the cut, so that it can promise nothing at the very moment.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest

from penstock import Client
from tests.crash.disk import PowerCutDisk
from tests.crash.sending_device import Options
from tests.e2e.oracle import Batch, problems
from tests.e2e.system import ROUNDS, SEED, System, wait_for

Make = Callable[..., System]
PARTITIONS = 8
DEVICE = Path(__file__).with_name("sending_device.py")
NOBODY = "http://127.0.0.1:1"


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[PowerCutDisk]:
    made = PowerCutDisk(tmp_path / "disk")
    yield made
    made.close()


class Device:
    """The process of sending_device.py, and what it has said until now."""

    def __init__(self, system: System, name: str, url: str, spool: Path, options: Options) -> None:
        self.sent = -1
        self.promised: set[int] = set()
        self.by_seal_thread = 0
        self.failed = ""
        self._name = name
        arguments = (name, url, str(spool), msgspec.json.encode(options).decode())
        log = f"{name}.log"
        self.process = system.process(*arguments, program=(str(DEVICE),), log=log)
        self._said = (system.folder / log).open("rb")
        self._rest = b""

    def listen(self) -> int:
        """Take in what was said; how many events are promised. A line without its end was not said."""
        *lines, self._rest = (self._rest + self._said.read()).split(b"\n")
        for line in lines:
            word, *rest = line.decode().split(" ")
            if word == "sending":
                self.sent = int(rest[0])
            elif word == "durable":
                self.promised.update(map(int, rest[1:]))
                self.by_seal_thread += rest[0] == "penstock-seal"
            else:
                assert word == "failed", self.process.text()
                self.failed = " ".join(rest)
        assert not self.process.ended, self.process.text()
        return len(self.promised)

    def end(self) -> list[Batch]:
        """Kill it. All that it sent, one by one for the oracle: what was not promised is there or not."""
        self.listen()
        self.process.kill()
        self._said.close()
        return [
            Batch([b'{"deviceId":"%b-%d","n":%d}' % (self._name.encode(), n % 5, n)], confirmed=n in self.promised)
            for n in range(self.sent + 1)
        ]


class Cuts:
    """One spool through many cuts, with and without a hub; what lies in it from the rounds before is sent meanwhile."""

    def __init__(self, system: System, disk: PowerCutDisk, chosen: random.Random) -> None:
        self.system = system
        self.spool = disk.folder / "spool"
        self.sent: list[list[Batch]] = []
        self.promises = self.failures = 0
        self._disk = disk
        self._random = chosen

    def one(self, *, each: bool, online: bool, thaw: bool, careless: bool = False) -> None:
        """`thaw`: the device lives on after the cut, until it has seen that its disk is gone."""
        chosen, name = self._random, f"r{len(self.sent)}"
        options = Options(each, chosen.choice((1, 1, 3)), chosen.choice((20, 1000)), careless)
        device = Device(self.system, name, self.system.url if online else NOBODY, self.spool, options)
        goal = chosen.randrange(1, 300 if each else 3000)
        wait_for(
            f"{goal} events are promised, in a group by the thread that syncs for all",
            lambda: device.listen() >= goal and (each or device.by_seal_thread),
        )
        assert not device.failed, device.failed
        # Any moment is as good as another: events are written, synced, sealed, numbered, posted and deleted meanwhile.
        threading.Event().wait(chosen.random() * 0.05)
        device.process.freeze_anywhere()
        self._disk.cut_power()
        if thaw:
            device.process.thaw()
            wait_for("it sees that its disk is gone", lambda: device.listen() and device.failed)
            self.failures += 1
        self.sent.append(device.end())
        self._disk.restore_power()
        self.promises += len(device.promised)

    def wrong(self) -> list[str]:
        """What the oracle finds when all that is left in the spool was sent."""
        with Client(self.system.url, spool=self.spool) as client:
            client.flush(timeout_s=60)
            assert client.stats().waiting_events == 0
        self.system.settle()
        return problems(self.system.store, PARTITIONS, self.sent)


def test_power_of_a_device_is_cut_at_any_moment(disk: PowerCutDisk, make_system: Make) -> None:
    """Cases 87, 88 and 101 of the fault catalogue."""
    rounds = ROUNDS or 6
    chosen = random.Random(SEED)
    print(f"PENSTOCK_SEED={SEED} PENSTOCK_ROUNDS={rounds}")
    system = make_system(period="1s", partitions=PARTITIONS).start()
    cuts = Cuts(system, disk, chosen)
    for left in reversed(range(rounds)):
        # Each and group, with and without a hub, in turn: a short run has all four, and the last leaves something to be sent.
        cuts.one(each=left % 2 == 0, online=left // 2 % 2 == 1, thaw=chosen.random() < 0.3)
    before = sum(system.ends())
    assert cuts.wrong() == []
    events = sum(len(batches) for batches in cuts.sent)
    stored = sum(system.ends())
    print(
        f"{rounds} cuts, {events} events sent, {cuts.promises} promised, {cuts.failures} devices saw the disk go; "
        f"{before} were stored before the last cut, {stored} in the end"
    )
    assert cuts.promises <= stored <= events
    assert before > 0, "the hub has answered for nothing: the cuts met no batch under way"
    assert stored > before, "nothing was left in the spool: the last cuts show nothing"
    assert system.stop() == 0


@pytest.mark.parametrize("each", [True, False], ids=["each", "group"])
def test_control_without_sync_a_cut_on_a_device_is_noticed(disk: PowerCutDisk, make_system: Make, each: bool) -> None:
    system = make_system(period="1s", partitions=PARTITIONS).start()
    cuts = Cuts(system, disk, random.Random(SEED))
    for _ in range(2):
        cuts.one(each=each, online=False, thaw=False, careless=True)
    found = cuts.wrong()
    assert any("missing" in problem for problem in found), found
