"""Files fed through a spool to an API in memory, and gone on with after a death at any act on the disk."""

from __future__ import annotations

import contextlib
import itertools
import os
import threading
import zlib
from collections.abc import Iterator, Mapping, Sequence
from io import BufferedReader, BytesIO
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.client import feed as feed_module
from penstock.client import sending
from penstock.client import spool as spool_module
from penstock.client.feed import STDIN, Feed, lines_of
from penstock.client.lane import DEAD, Lane
from penstock.client.sending import Rejected, Stats
from penstock.client.spool import LaneOf
from penstock.client.transport import Answer
from penstock.clock import SystemClock
from penstock.errors import FileChanged, GaveUp, SettingsError
from penstock.files import Files
from tests.client.conftest import MemoryApi, lost_answer, never_arrived, problem, says
from tests.client.power import PowerCut, PowerFiles
from tests.client.test_client import client_of
from tests.e2e.system import wait_for


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sending, "BACKOFF_S", (0.001, 0.01))
    monkeypatch.setattr(sending, "PAUSE_S", (0.001, 0.01))
    monkeypatch.setattr(feed_module, "_LOOK_S", 0.01)


def events(count: int, devices: int = 5) -> list[bytes]:
    return [b'{"deviceId":"d-%d","n":%d}' % (n % devices, n) for n in range(count)]


class Anything:
    """Equal to everything: in the place of what a check compares with, it takes the check away."""

    def __eq__(self, other: object) -> bool:
        return True

    __hash__ = None  # type: ignore[assignment]


class Machine:
    """A folder with a file and a spool, and who feeds it from there: again and again, as after crashes."""

    def __init__(self, folder: Path, lines: Sequence[bytes]) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.file = folder / "file.ndjson"
        self.rejected: list[Rejected] = []
        self.told = False
        self.write(lines)

    def write(self, lines: Sequence[bytes], *, at_s: int = 1_000_000) -> None:
        self.file.write_bytes(b"".join(line + b"\n" for line in lines))
        os.utime(self.file, (at_s, at_s))

    def feed(
        self,
        api: MemoryApi,
        *,
        lanes: int = 1,
        batch: int = 3,
        files: Files | None = None,
        file: str = "",
        until: int | None = None,
        timeout_s: float = 60.0,
    ) -> tuple[Stats, int]:
        """`until`: die behind so many lines."""
        feed = Feed(
            self.folder / "spool",
            lambda: api,
            lanes=lanes,
            device_field="deviceId",
            batch_events=batch,
            timeout_s=timeout_s,
            on_rejected=self.rejected.append,
            clock=SystemClock(),
            files=files or Files(),
            reading=[file or str(self.file)],
        )
        try:
            feed.begin(feed.source(file or str(self.file)))
            for number, line in enumerate(self.file.read_bytes().splitlines(), 1):
                feed.add([line], number)
                if number == until:
                    raise PowerCut
            feed.end()
            feed.finish()
            found = feed.stats(), feed.skipped
            self.told = True
            feed.forget()
            return found
        finally:
            feed.close(10.0)


@pytest.mark.parametrize("lanes", [1, 4])
def test_all_arrive_once_and_in_order_for_each_device(tmp_path: Path, lanes: int) -> None:
    api = MemoryApi()
    stats, skipped = Machine(tmp_path, events(100)).feed(api, lanes=lanes)
    assert (stats.accepted, stats.rejected, stats.waiting_events, skipped) == (100, 0, 0, 0)
    assert sorted(api.stored) == sorted(events(100))
    for device in range(5):
        mine = [line for line in events(100) if b'"d-%d"' % device in line]
        assert [line for line in api.stored if b'"d-%d"' % device in line] == mine
    assert api.gaps == 0


def test_a_file_that_is_given_again_is_sent_again(tmp_path: Path) -> None:
    api, machine = MemoryApi(), Machine(tmp_path, events(10))
    assert [machine.feed(api)[0].accepted for _ in range(2)] == [10, 10]
    assert api.stored == events(10) * 2


def every_cut(folder: Path, *, renames: bool | None, lanes: int) -> Iterator[list[bytes]]:
    """What is stored when the feed dies at its n-th act on the disk and the same is given again. `renames` is None for a kill."""
    for cut_at in itertools.count(1):
        machine, api = Machine(folder / str(cut_at), events(20)), MemoryApi(None, lost_answer, None, lost_answer)
        files = PowerFiles(cut_at)
        try:
            machine.feed(api, lanes=lanes, files=files)
        except PowerCut:
            if renames is not None:
                files.lose(renames=renames)
            if not machine.told:
                machine.feed(api, lanes=lanes)
            yield api.stored
        else:
            assert cut_at > 40
            return


def is_right(stored: list[bytes]) -> bool:
    once = len(stored) == len(set(stored)) == 20
    return once and all(
        [line for line in stored if b'"d-%d"' % device in line] == events(20)[device::5] for device in range(5)
    )


@pytest.mark.parametrize("lanes", [1, 2])
@pytest.mark.parametrize("renames", [None, True, False])
def test_the_same_command_goes_on_wherever_it_died(tmp_path: Path, renames: bool | None, lanes: int) -> None:
    assert all(map(is_right, every_cut(tmp_path, renames=renames, lanes=lanes)))


def test_control_without_what_was_taken_lines_are_stored_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Lane, "taken", {})
    assert not all(map(is_right, every_cut(tmp_path, renames=None, lanes=1)))


@pytest.mark.parametrize("lanes", [1, 2])
def test_when_it_dies_at_the_end_all_is_forgotten_or_nothing(tmp_path: Path, lanes: int) -> None:
    """Everything is answered, and the notes about the file are being dropped: the next time all of it is sent, or none."""
    again = set()
    for cut_at in itertools.count(1):
        machine, api = Machine(tmp_path / str(cut_at), events(20)), MemoryApi()
        try:
            machine.feed(api, lanes=lanes, files=PowerFiles(cut_at))
        except PowerCut:
            if machine.told:
                again.add(machine.feed(api, lanes=lanes)[0].accepted)
        else:
            break
    assert again == {0, 20}


def feed_of(folder: Path, api: MemoryApi, files: Files) -> Feed:
    return Feed(
        folder,
        lambda: api,
        lanes=2,
        device_field="deviceId",
        batch_events=3,
        timeout_s=60.0,
        on_rejected=lambda _: None,
        clock=SystemClock(),
        files=files,
    )


def test_of_several_files_all_are_forgotten_or_none(tmp_path: Path) -> None:
    names = [tmp_path / "one", tmp_path / "two"]
    for name in names:
        name.write_bytes(b"\n".join(events(4)))
    again = set()
    for cut_at in itertools.count(1):
        files = PowerFiles()
        for forgets in (files, Files()):
            api = MemoryApi()
            feed = feed_of(tmp_path / str(cut_at), api, forgets)
            for name in names:
                feed.begin(feed.source(str(name)))
                for number, line in enumerate(events(4), 1):
                    feed.add([line], number)
                feed.end()
            feed.finish()
            if forgets is files:
                files.calls, files._cut_at = 0, cut_at
                with contextlib.suppress(PowerCut):
                    feed.forget()
            feed.close(1.0)
        again.add(len(api.stored))
        if files.calls < cut_at:
            break
    assert again == {0, 8}


def test_a_file_whose_name_is_no_text_is_refused(tmp_path: Path) -> None:
    machine = Machine(tmp_path, events(3))
    name = os.fsdecode(os.fsencode(tmp_path) + b"/\xff.ndjson")
    Path(name).write_bytes(b"{}")
    with pytest.raises(SettingsError, match="Nothing was sent"):
        machine.feed(MemoryApi(), file=name)


def test_lines_that_were_handed_to_no_lane_are_read_again(tmp_path: Path) -> None:
    api, machine = MemoryApi(), Machine(tmp_path, events(50))
    for until in (7, 8, 20, 31):
        with pytest.raises(PowerCut):
            machine.feed(api, lanes=2, until=until)
    machine.feed(api, lanes=2)
    assert sorted(api.stored) == sorted(events(50))


def test_the_number_of_lanes_stays_until_the_file_is_sent(tmp_path: Path) -> None:
    api, machine = MemoryApi(), Machine(tmp_path, events(50))
    with pytest.raises(PowerCut):
        machine.feed(api, lanes=3, until=40)
    machine.feed(api, lanes=1)
    assert sorted(api.stored) == sorted(events(50))
    assert len(list(tmp_path.glob("spool/0/*/state.json"))) == 3


def test_a_file_goes_on_in_the_set_that_knows_its_lines(tmp_path: Path) -> None:
    """It was sent beside another process, which is gone when the same command is given again."""
    api, machine = MemoryApi(), Machine(tmp_path, events(50))
    with client_of(tmp_path / "spool", api), pytest.raises(PowerCut):
        machine.feed(api, until=40)
    _, skipped = machine.feed(api)
    assert skipped > 0 and api.stored == events(50)


def test_a_file_whose_lines_another_process_knows_is_refused(tmp_path: Path) -> None:
    api, machine = MemoryApi(), Machine(tmp_path, events(50))
    with pytest.raises(PowerCut):
        machine.feed(api, until=40)
    with client_of(tmp_path / "spool", api) as client:
        client.flush()
        with pytest.raises(SettingsError, match=r"spool/0, .*Nothing of it was taken"):
            machine.feed(api)
    machine.feed(api)
    assert api.stored == events(50)


def test_files_that_were_begun_in_two_sets_go_on_one_by_one(tmp_path: Path) -> None:
    api, one, two = MemoryApi(), Machine(tmp_path, events(50)), Machine(tmp_path, events(50))
    two.file = tmp_path / "two.ndjson"
    two.write([b'{"deviceId":"e","n":%d}' % n for n in range(50)])
    with client_of(tmp_path / "spool", api), pytest.raises(PowerCut):
        two.feed(api, until=40)
    with pytest.raises(PowerCut):
        one.feed(api, until=40)
    two.feed(api)
    one.feed(api)
    assert len(api.stored) == len(set(api.stored)) == 100


def test_a_file_that_changed_in_between_is_refused(tmp_path: Path) -> None:
    api, machine = MemoryApi(), Machine(tmp_path, events(50))
    with pytest.raises(PowerCut):
        machine.feed(api, until=40)
    machine.write(events(60), at_s=2_000_000)
    with pytest.raises(FileChanged, match=r"file\.ndjson"):
        machine.feed(api)
    assert len(api.stored) <= 40  # what lay in the spool, and nothing of the file as it is now
    machine.write(events(50))
    machine.feed(api)
    assert api.stored == events(50)


def test_what_a_killed_client_left_goes_before_the_file(tmp_path: Path) -> None:
    """An open file is no batch yet, and its devices are those of the file: only sealed before can it keep their order."""
    machine, api, left = (
        Machine(tmp_path, events(9)),
        MemoryApi(),
        [b'{"deviceId":"d-0","left":%d}' % n for n in range(4)],
    )
    spool = tmp_path / "spool"
    lane = Lane(spool / "0" / "0", spool, Files(), device_field="deviceId", now_ms=lambda: 0, new_producer=lambda: "p")
    lane.append(left)
    lane.abandon()
    machine.feed(api)
    assert api.stored == [*left, *events(9)]


def test_a_batch_that_is_sealed_while_the_lane_looks_empty_is_sent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between a look that finds nothing and the question whether more will come, the last batch is made, and nothing more will come."""
    step, looked = sending.Sender.step, threading.Event()

    def slow(self: sending.Sender) -> float | None:
        found = step(self)
        if found is None and not looked.is_set():
            sealing = wait_for("seal-0 runs", lambda: [one for one in threading.enumerate() if one.name == "seal-0"])
            looked.set()  # now the file is read
            sealing[0].join(30)
        return found

    monkeypatch.setattr(sending.Sender, "step", slow)
    machine, api, read = Machine(tmp_path, events(2)), MemoryApi(), Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: (path != machine.file or looked.wait(30)) and read(path))
    machine.feed(api)
    assert looked.is_set() and api.stored == events(2)


def test_what_comes_through_a_pipe_comes_from_the_beginning(tmp_path: Path) -> None:
    api, machine = MemoryApi(), Machine(tmp_path, events(9))
    with pytest.raises(PowerCut):
        machine.feed(api, file=STDIN, until=7)
    taken = len(api.stored)
    machine.feed(api, file=STDIN)
    assert api.stored[-9:] == events(9) and 9 <= len(api.stored) <= taken + 9 + 6
    assert all(b"#" not in path.read_bytes() for path in tmp_path.glob("spool/0/*/state.json"))


def test_rejected_lines_are_named_by_their_place_also_after_a_death(tmp_path: Path) -> None:
    lines = [b'{"deviceId":"a"}', b"!", b'{"deviceId":"b"}', b"!", b"!", b"!"]
    api, machine = MemoryApi(), Machine(tmp_path, lines)
    with pytest.raises(PowerCut):
        machine.feed(api, batch=2, until=5)
    stats, _ = machine.feed(api, batch=2)
    assert [(one.place, one.code) for one in machine.rejected] == [
        (f"{machine.file}:{n}", "not_json") for n in (2, 4, 5, 6)
    ]
    kept = b"".join(path.read_bytes() for path in sorted((tmp_path / "spool" / DEAD).iterdir()))
    assert kept.count(b"file.ndjson:") == 4
    assert stats.waiting_events == 0


def test_halves_of_a_batch_keep_the_places(tmp_path: Path) -> None:
    lines = [*events(5, 1), b"!", *events(3, 1)]
    api, machine = MemoryApi(lines_max=2), Machine(tmp_path, lines)
    stats, _ = machine.feed(api, batch=9)
    assert (stats.accepted, [one.place.rpartition(":")[2] for one in machine.rejected]) == (8, ["6"])
    assert api.gaps == 0


def test_an_event_that_is_too_large_alone_is_rejected_by_name(tmp_path: Path) -> None:
    machine = Machine(tmp_path, events(2))
    stats, _ = machine.feed(MemoryApi(lines_max=0))
    assert (stats.accepted, stats.rejected) == (0, 2)
    assert [one.code for one in machine.rejected] == ["batch_too_large"] * 2


def test_it_gives_up_after_a_time_without_any_progress_and_keeps_what_was_taken(tmp_path: Path) -> None:
    machine = Machine(tmp_path, events(9))
    with pytest.raises(GaveUp, match="refused"):
        machine.feed(MemoryApi(*[never_arrived] * 100_000), timeout_s=0.2)
    api = MemoryApi()
    machine.feed(api)
    assert api.stored == events(9)


def test_time_in_which_there_was_nothing_to_send_is_no_reason_to_give_up(tmp_path: Path) -> None:
    """Standard input may be silent for long; the first failure behind that is not the last."""

    class Later(SystemClock):
        later_s = 0.0

        def monotonic(self) -> float:
            return super().monotonic() + self.later_s

    api, clock = MemoryApi(*[never_arrived] * 50), Later()
    feed = Feed(
        tmp_path,
        lambda: api,
        lanes=1,
        device_field="deviceId",
        batch_events=1,
        timeout_s=60.0,
        on_rejected=lambda _: None,
        clock=clock,
        files=Files(),
    )
    try:
        feed.begin(feed.source(STDIN))
        clock.later_s = 3600.0
        feed.add([b'{"deviceId":"d"}'], 1)
        feed.end()
        feed.finish()
    finally:
        feed.close(1.0)
    assert api.stored == [b'{"deviceId":"d"}']


def test_a_spool_that_cannot_be_written_ends_it(tmp_path: Path) -> None:
    class Full(Files):
        def replace(self, path: Path, body: bytes) -> None:
            if path.suffix == ".batch":
                raise OSError(28, "No space left on device")
            super().replace(path, body)

    api, machine = MemoryApi(), Machine(tmp_path, events(9))
    with pytest.raises(OSError, match="No space left"):
        machine.feed(api, files=Full())
    machine.feed(api)
    assert api.stored == events(9)


def test_little_lies_in_the_spool_while_the_api_is_down(tmp_path: Path) -> None:
    gate = threading.Event()

    class Waiting(MemoryApi):
        def post(self, body: bytes, headers: Mapping[str, str]) -> Answer:
            assert gate.wait(30)
            most.append(sum(1 for _ in tmp_path.glob("spool/0/*/*.batch")))
            return super().post(body, headers)

    most: list[int] = []
    api, machine = Waiting(says(problem(503, "hub_busy", retryable=True))), Machine(tmp_path, events(50))
    opener = threading.Timer(0.3, gate.set)
    opener.start()
    machine.feed(api, batch=1)
    opener.join()
    assert api.stored == events(50) and max(most) <= 2


@pytest.mark.parametrize("read_bytes", [1, 2, 3, 7, 1000])
@pytest.mark.parametrize("end", [b"", b"\n"])
def test_lines_are_cut_wherever_the_reads_end(monkeypatch: pytest.MonkeyPatch, read_bytes: int, end: bytes) -> None:
    monkeypatch.setattr(feed_module, "_READ_BYTES", read_bytes)
    monkeypatch.setattr(feed_module, "RAW_BYTES_MAX", 12)
    given = [b"a", b"", b"bc\r", b"x" * 2000, b"d" * 12, b"e", b"y" * 2000, b"f"]
    found: dict[int, bytes | None] = {}
    for first, lines in lines_of(BufferedReader(BytesIO(b"\n".join(given) + end), 1)):
        found |= {first: None} if lines is None else dict(enumerate(lines, first))
    if read_bytes < 1000:
        assert found == {n: None if len(line) == 2000 else line for n, line in enumerate(given, 1)}
    else:
        assert list(found) == list(range(1, 9))


def test_batches_hold_no_more_than_they_may(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feed_module, "RAW_BYTES_MAX", 100)
    sizes: list[tuple[int, int]] = []

    class Measuring(MemoryApi):
        def store(self, body: bytes, number: str) -> Answer:
            raw = zlib.decompress(body, 31)
            sizes.append((len(raw), raw.count(b"\n")))
            return super().store(body, number)

    api, lines = Measuring(), [b'{"deviceId":"d","x":"%s"}' % (b"x" * (n % 50)) for n in range(40)]
    Machine(tmp_path, lines).feed(api, batch=4)
    assert api.stored == lines
    assert max(raw for raw, _ in sizes) <= 100 and max(count for _, count in sizes) <= 4


def test_a_device_is_always_in_one_lane() -> None:
    lanes = LaneOf("deviceId", 4)
    assert lanes(b'{"deviceId":"d-1","x":{"deviceId":"d-2"}}') == zlib.crc32(b"d-1") % 4
    assert [lanes(line) for line in (b"{", b"[]", b'{"deviceId":3}', b'"\xff"', b"{}")] == [0] * 5


PIECES = [
    b'{"deviceId":"a"}',
    b'{"deviceId":"b","x":{}}',
    b'{"deviceId":"c"',
    b"}",
    b"{}",
    b" ",
    b",",
    b'{"deviceId":3}',
    b"[",
    b'{"a":{}',
]


@given(st.lists(st.lists(st.sampled_from(PIECES), min_size=1, max_size=3).map(b"".join), max_size=6))
def test_many_lines_are_in_the_lanes_that_each_is_in_alone(lines: list[bytes]) -> None:
    lane_of = LaneOf("deviceId", 4)
    assert lane_of.each(lines) == [lane_of(line) for line in lines]


def test_control_lines_that_are_not_looked_at_are_in_others(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [b'{"deviceId":"a"', b"}", b'{"deviceId":"b"}{"deviceId":"c"}', b'{"deviceId":"d"}']
    lane_of = LaneOf("deviceId", 1 << 20)
    assert lane_of.each(lines) == [lane_of(line) for line in lines]
    monkeypatch.setattr(spool_module, "_OPENING", Anything())
    monkeypatch.setattr(spool_module, "_CLOSING", Anything())
    assert lane_of.each(lines) != [lane_of(line) for line in lines]


def test_a_line_that_is_nested_too_deeply_is_for_the_api_to_judge(tmp_path: Path) -> None:
    api = MemoryApi()
    deep = b'{"x":' + b"[" * 50_000 + b"]" * 50_000 + b',"deviceId":"d"}'
    Machine(tmp_path, [deep, *events(2)]).feed(api, lanes=2)
    assert deep in api.stored
