"""What only the embedded hub has: settings fixed at creation, counts, limits, damage, and several processes."""

from __future__ import annotations

import hashlib
import os
import random
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lmdb
import msgspec
import pytest

from penstock.errors import FrameDamaged, HubBroken, HubError, HubUnavailable, NotFound, SettingsError, StorageFull
from penstock.events import Appended, Batch, Frame, Group
from penstock.hub import commit as commit_module
from penstock.hub import embedded, expiry
from penstock.hub.embedded import EmbeddedHub, create
from penstock.hub.layout import EVENTS, KEY, META_POSITIONS
from penstock.hub.producers import KEYED
from penstock.testing import FakeClock
from penstock.wire.frame import content, encode, sources_of

PERIOD_S = 60
START_MS = 1_795_356_000_000
BYTES_MAX = 64 << 20
DAY_S = 24 * 3600


def group(partition: int, lines: list[bytes]) -> Group:
    return Group(partition, len(lines), b"".join(line + b"\n" for line in lines))


def batch(
    sequence: int, of: dict[int, list[bytes]], *, producer: str = "p", retry_safe: bool = True, after: int | None = None
) -> Batch:
    groups = tuple(group(partition, lines) for partition, lines in of.items())
    accepted = sum(g.count for g in groups)
    return Batch(
        producer, 1, sequence, accepted, groups, retry_safe, hashlib.sha256(repr(of).encode()).digest(), after=after
    )


def batch_of(sequence: int, groups: tuple[Group, ...]) -> Batch:
    return Batch("p", 1, sequence, sum(group.count for group in groups), groups)


def incompressible(sequence: int, count: int, size: int = 1000) -> list[bytes]:
    return [
        b'{"deviceId":"d-1","n":"%d-%d","x":"%s"}'
        % (sequence, n, hashlib.shake_128(b"%d-%d" % (sequence, n)).hexdigest(size // 2).encode())
        for n in range(count)
    ]


Open = Callable[..., EmbeddedHub]


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock(START_MS)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "hub"


@pytest.fixture
def reopen(folder: Path, clock: FakeClock) -> Iterator[Open]:
    """Opens the hub of the test, making it when it is not there; one at a time is open."""
    opened: list[EmbeddedHub] = []

    def open_it(*, partitions: int = 2, bytes_max: int = BYTES_MAX, read_only: bool = False) -> EmbeddedHub:
        while opened:
            opened.pop().close()
        create(folder, partitions=partitions, period_s=PERIOD_S, bytes_max=bytes_max, clock=clock)
        opened.append(EmbeddedHub(folder, bytes_max=bytes_max, clock=clock, read_only=read_only))
        return opened[0]

    yield open_it
    while opened:
        opened.pop().close()


def test_a_second_open_in_one_process_is_refused(reopen: Open, folder: Path, clock: FakeClock) -> None:
    reopen()
    with pytest.raises(SettingsError, match=r"is already open in this process\. Nothing was touched\.$"):
        EmbeddedHub(folder, bytes_max=BYTES_MAX, clock=clock)


def read_all(hub: EmbeddedHub, partition: int) -> list[Frame]:
    offset = str(hub.bounds(partition).first)
    frames: list[Frame] = []
    while True:
        found = hub.read(partition, offset, bytes_max=1 << 20)
        frames += [frame for frame in found.frames if frame not in frames[-1:]]
        if offset == found.end_offset:
            return frames
        offset = found.next_offset


def stored(hub: EmbeddedHub, partition: int) -> list[bytes]:
    return [line for frame in read_all(hub, partition) for line in content(frame).split(b"\n") if line]


def test_what_was_appended_is_there_after_reopening(reopen: Open) -> None:
    hub = reopen()
    identity = hub.id
    hub.append([batch(1, {0: [b"{}"], 1: incompressible(1, 300)})])
    hub.cut()
    before = [read_all(hub, partition) for partition in range(2)]
    hub = reopen()
    assert hub.id == identity
    assert [read_all(hub, partition) for partition in range(2)] == before
    assert hub.append([batch(1, {0: [b"{}"], 1: incompressible(1, 300)})]) == [Appended(301, True)]


@pytest.mark.parametrize(("partitions", "period_s"), [(3, PERIOD_S), (1, PERIOD_S), (2, 3600)])
def test_other_partitions_or_another_period_are_refused(
    reopen: Open, folder: Path, clock: FakeClock, partitions: int, period_s: int
) -> None:
    reopen().append([batch(1, {0: [b"{}"]})])
    reopen().close()
    with pytest.raises(SettingsError, match="2 partitions and a period of 60 s"):
        create(folder, partitions=partitions, period_s=period_s, bytes_max=BYTES_MAX, clock=clock)
    assert stored(reopen(), 0) == [b"{}"]


def test_folders_without_a_hub(tmp_path: Path, clock: FakeClock) -> None:
    with pytest.raises(SettingsError):
        EmbeddedHub(tmp_path / "nothing", bytes_max=BYTES_MAX, clock=clock, read_only=True)
    with pytest.raises(SettingsError):
        EmbeddedHub(tmp_path, bytes_max=BYTES_MAX, clock=clock)
    (tmp_path / "junk").mkdir()
    (tmp_path / "junk" / "data.mdb").write_bytes(b"not a database" * 10_000)
    for act in (
        lambda: EmbeddedHub(tmp_path / "junk", bytes_max=BYTES_MAX, clock=clock),
        lambda: create(tmp_path / "junk", partitions=1, period_s=1, bytes_max=BYTES_MAX, clock=clock),
    ):
        with pytest.raises(SettingsError):
            act()


def test_a_newer_format_is_refused(reopen: Open, folder: Path, clock: FakeClock) -> None:
    reopen().close()
    with lmdb.open(str(folder), max_dbs=10) as env:
        meta = env.open_db(b"meta")
        with env.begin(write=True, db=meta) as txn:
            txn.put(b"hub", txn.get(b"hub").replace(b'"format":1', b'"format":2'))
    with pytest.raises(SettingsError, match="format 2"):
        EmbeddedHub(folder, bytes_max=BYTES_MAX, clock=clock)
    with pytest.raises(SettingsError, match="format 2"):
        create(folder, partitions=2, period_s=PERIOD_S, bytes_max=BYTES_MAX, clock=clock)


def test_open_for_reading_only(reopen: Open) -> None:
    reopen().append([batch(1, {0: [b"{}"]})])
    hub = reopen(read_only=True)
    assert stored(hub, 0) == [b"{}"]
    for write in (lambda: hub.append([batch(2, {0: [b"{}"]})]), hub.cut, lambda: hub.trim(0, before="1")):
        with pytest.raises(HubUnavailable):
            write()
    assert stored(hub, 0) == [b"{}"]


@pytest.mark.parametrize("partition", [-1, 2, 99])
def test_partitions_that_there_are_not(reopen: Open, partition: int) -> None:
    hub = reopen()
    for ask in (
        lambda: hub.read(partition, "0", bytes_max=1),
        lambda: hub.bounds(partition),
        lambda: hub.locate(partition, 0),
        lambda: hub.trim(partition, before="0"),
    ):
        with pytest.raises(NotFound):
            ask()


@pytest.mark.parametrize("offset", ["", "-1", "x", "1.0", "٣", "1" * 20, " 1", "+1", "1\n"])
def test_what_is_no_offset(reopen: Open, offset: str) -> None:
    with pytest.raises(HubError):
        reopen().read(0, offset, bytes_max=1)


def test_short_batches_of_a_commit_share_a_frame(reopen: Open) -> None:
    hub = reopen()
    hub.append([batch(n, {0: [b'{"n":%d}' % n] * n}, producer=f"p-{n}") for n in range(1, 6)])
    [frame] = read_all(hub, 0)
    assert (frame.first, frame.count) == (0, 15)
    assert [(source.producer, source.count) for source in sources_of(frame)] == [(f"p-{n}", n) for n in range(1, 6)]
    assert hub.producer("p-3").kept[0].ranges == [(0, 3, 6)]


def test_a_commit_with_refusals_keeps_its_ranges_right(reopen: Open) -> None:
    hub = reopen()
    hub.append([batch(1, {0: [b'{"n":0}'] * 4}, producer="p-2")])
    sent = [batch(1, {0: [b'{"n":%d}' % n] * n, 1: [b'{"m":%d}' % n]}, producer=f"p-{n}") for n in range(1, 5)]
    assert [type(answer).__name__ for answer in hub.append(sent)] == [
        "Appended",
        "NumberReused",
        "Appended",
        "Appended",
    ]
    lines = stored(hub, 0), stored(hub, 1)
    for n in (1, 3, 4):
        for partition, first, following in hub.producer(f"p-{n}").kept[0].ranges:
            assert lines[partition][first:following] == ([b'{"n":%d}' % n] * n if partition == 0 else [b'{"m":%d}' % n])
    assert len(lines[0]) == 4 + 1 + 3 + 4


def test_frames_hold_no_more_than_their_limit(reopen: Open) -> None:
    hub = reopen()
    sent = [batch(n, {0: incompressible(n, 60)}, producer=f"p-{n}") for n in range(12)]
    hub.append(sent)
    frames = read_all(hub, 0)
    assert len(frames) > 1
    assert all(frame.raw_bytes <= 262_144 for frame in frames)
    assert stored(hub, 0) == [line for n in range(12) for line in incompressible(n, 60)]


def test_counts(reopen: Open, clock: FakeClock) -> None:
    hub = reopen()
    hub.append([batch(1, {0: [b"{}"] * 3}), batch(1, {0: [b"{}"] * 3}), batch(9, {1: [b"{}"]}, producer="q")])
    hub.append([batch(2, {0: [b"{}"]}, after=1), batch(3, {0: [b"{}"]}, after=1)])
    counts = {"duplicates": 1, "dedup_window_passed": 1, "lost_batches": 1, "trimmed_events": 0}
    assert hub.counters() == counts
    assert sorted(hub.accepted()) == [(START_MS, 0, 5), (START_MS, 1, 1)]
    clock.advance(PERIOD_S)
    hub.maintain()
    hub.append([batch(4, {0: [b"{}"] * 7})])
    later = START_MS + PERIOD_S * 1000
    assert sorted(hub.accepted()) == [(START_MS, 0, 5), (START_MS, 1, 1), (later, 0, 7)]
    hub.trim(0, before="5")
    assert hub.counters() == counts | {"trimmed_events": 5}
    assert sorted(hub.accepted()) == [(START_MS, 1, 1), (later, 0, 7)]
    hub.trim(0, before="12")
    hub.trim(1, before="1")
    assert hub.counters()["trimmed_events"] == 13
    assert hub.bounds(0).first == hub.bounds(0).next == 12


def test_a_long_log_is_trimmed_in_parts(reopen: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("penstock.hub.embedded.DELETES_AT_ONCE", 7)
    hub = reopen()
    for n in range(1, 31):
        hub.append([batch(n, {0: [b"{}"] * 2})])
    hub.trim(0, before="43")
    assert hub.bounds(0).first == 42
    hub.trim(0, before="60")
    assert hub.bounds(0).first == 60
    assert hub.counters()["trimmed_events"] == 60


def test_producers_are_forgotten_after_fourteen_days_and_not_before(reopen: Open, clock: FakeClock) -> None:
    hub = reopen()
    hub.append([batch(1, {0: [b"{}"]}, producer=f"p-{n}") for n in range(20)])
    clock.advance(10 * DAY_S)
    hub.append([batch(2, {0: [b"{}"]}, producer="p-3")])
    clock.advance(4 * DAY_S)
    hub.maintain()
    assert hub.producer("p-0").sequence == 1
    clock.advance(0.001)
    hub.maintain()
    assert hub.producer("p-3").sequence == 2
    for name in ("p-0", "p-19", "", "x" * 600):
        with pytest.raises(NotFound):
            hub.producer(name)


def test_idempotency_keys_are_forgotten_after_a_day_and_not_before(reopen: Open, clock: FakeClock) -> None:
    hub = reopen()
    keyed = batch(1, {0: [b"{}"]}, producer=KEYED + "0" * 32)
    hub.append([keyed, batch(1, {0: [b"{}"]}, producer="p-1")])
    clock.advance(DAY_S)
    hub.maintain()
    [again] = hub.append([keyed])
    assert isinstance(again, Appended) and again.duplicate
    clock.advance(0.001)
    hub.maintain()
    with pytest.raises(NotFound):
        hub.producer(keyed.producer)
    assert hub.producer("p-1").sequence == 1


@pytest.mark.parametrize("keeps_pace", [True, False])
def test_the_table_does_not_grow_under_a_steady_load_of_keys(
    reopen: Open, clock: FakeClock, monkeypatch: pytest.MonkeyPatch, keeps_pace: bool
) -> None:
    """Three times as many keys as are looked at in any case, for three days: it holds those of a day, and of one walk through it."""
    monkeypatch.setattr(expiry, "AT_ONCE", 20)
    if not keeps_pace:
        monkeypatch.setattr(expiry, "WALK_S", float("inf"))
    hub, each_hour, most = reopen(), 60, 0
    for hour in range(72):
        keys = [hashlib.sha256(b"%d-%d" % (hour, n)).hexdigest()[:32] for n in range(each_hour)]
        hub.append([batch(1, {0: [b"{}"]}, producer=KEYED + key) for key in keys])
        clock.advance(3600)
        hub.maintain()
        with hub._env.begin() as txn:
            most = max(most, txn.stat(hub._databases.producers)["entries"])
        assert hub.producer(KEYED + keys[0])
    assert (most <= 1.3 * 24 * each_hour) == keeps_pace, most


def test_how_much_of_the_table_is_looked_at() -> None:
    assert [expiry.looks(entries, 1.0) for entries in (0, 5, 1000, 999_999)] == [0, 5, 1000, 1000]
    assert expiry.looks(86_400_000, 1.0) == 4000, "four looks for each of 1,000 keys a second"
    assert expiry.looks(10_000_000, expiry.WALK_S) == expiry.looks(10_000_000, 1e9) == 10_000_000


def test_a_walk_that_takes_too_long_is_made_up_for(
    reopen: Open, clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(expiry, "AT_ONCE", 10)
    hub = reopen()
    hub.append([batch(1, {0: [b"{}"]}, producer=f"p-{n:03d}") for n in range(200)])
    clock.advance(15 * DAY_S)
    look = hub._expiry._look

    def slow(count: int) -> None:
        look(count)
        clock.advance(expiry.SECONDS_MOST)

    monkeypatch.setattr(hub._expiry, "_look", slow)
    left = []
    for _ in range(40):
        hub.maintain()
        with hub._env.begin() as txn:
            left.append(txn.stat(hub._databases.producers)["entries"])
    assert left[0] == 180, "for a moment only, though all of it is due"
    assert left[-1] == 0, "and no new day was needed for the rest"


def test_how_long_the_write_lock_is_held_can_be_seen(
    reopen: Open, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reopen().close()
    clock = FakeClock(START_MS)
    clock.advance(5)
    held = memoryview(bytearray(8))
    seen: list[int] = []
    finish = commit_module.Commit.finish

    def watched(self: commit_module.Commit) -> None:
        seen.append(int.from_bytes(held, "little"))
        finish(self)

    monkeypatch.setattr(commit_module.Commit, "finish", watched)
    with EmbeddedHub(folder, bytes_max=BYTES_MAX, clock=clock, held=held) as hub:
        hub.append([batch(1, {0: [b"{}"]})])
    assert seen == [5000]
    assert bytes(held) == bytes(8)


def test_a_failure_in_the_middle_of_a_commit_stores_nothing(reopen: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = reopen()
    hub.append([batch(1, {0: [b"{}"]})])

    def fail(self: commit_module.Commit) -> None:
        raise ZeroDivisionError

    with monkeypatch.context() as patched:
        patched.setattr(commit_module.Commit, "finish", fail)
        with pytest.raises(ZeroDivisionError):
            hub.append([batch(2, {0: [b"{}"], 1: [b"{}"]}), batch(3, {0: [b"{}"]})])
    assert (hub.bounds(0).next, hub.bounds(1).next) == (1, 0)
    assert hub.producer("p").sequence == 1
    assert hub.append([batch(2, {0: [b"{}"], 1: [b"{}"]})]) == [Appended(2, False)]


def test_without_judging_a_copy_is_stored_twice(reopen: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative control of the producers' table."""
    hub = reopen()
    monkeypatch.setattr(commit_module, "judge", lambda known, batch: None)
    hub.append([batch(1, {0: [b"{}"]}), batch(1, {0: [b"{}"]})])
    assert stored(hub, 0) == [b"{}", b"{}"]


def test_a_full_map_refuses_and_goes_on_after_a_trim(reopen: Open) -> None:
    hub = reopen(bytes_max=2 << 20)
    sent = 0
    with pytest.raises(StorageFull) as full:
        while sent < 1000:
            hub.append([batch(sent + 1, {sent % 2: incompressible(sent + 1, 20)})])
            sent += 1
    assert full.value.retryable
    assert 20 < sent < 1000
    before = [stored(hub, partition) for partition in range(2)]
    assert sum(map(len, before)) == sent * 20
    with pytest.raises(StorageFull):
        hub.append([batch(sent + 1, {0: incompressible(sent + 1, 20), 1: incompressible(sent + 1, 20)})])
    assert [stored(hub, partition) for partition in range(2)] == before
    assert hub.producer("p").sequence == sent
    hub.trim(0, before=hub.bounds(0).next.__str__())
    assert hub.usage().used < hub.usage().limit * 0.7
    assert stored(hub, 1) == before[1]
    for _ in range(3):
        sent += 1
        assert hub.append([batch(sent, {0: incompressible(sent, 20)})]) == [Appended(20, False)]
    assert stored(hub, 0) == [line for n in range(sent - 2, sent + 1) for line in incompressible(n, 20)]


def test_a_batch_larger_than_what_is_free_is_refused_whole(reopen: Open) -> None:
    hub = reopen(bytes_max=1 << 20)
    hub.append([batch(1, {0: [b"{}"]})])
    with pytest.raises(StorageFull):
        hub.append([batch(2, {0: [b"{}"], 1: incompressible(2, 3000)})])
    assert (hub.bounds(0).next, hub.bounds(1).next) == (1, 0)
    assert hub.append([batch(2, {0: [b"{}"]})]) == [Appended(1, False)]


def test_a_full_hub_stays_within_its_limit_for_ever(reopen: Open) -> None:
    """Retention frees pages, intake takes them; the file must not need more than its map."""
    hub = reopen(bytes_max=2 << 20)
    for n in range(1, 400):
        hub.append([batch(n, {0: incompressible(n, 20), 1: incompressible(n, 1)})])
        if n > 30:
            hub.trim(0, before=str((n - 30) * 20))
            hub.trim(1, before=str(n - 30))
    assert stored(hub, 0)[-20:] == incompressible(399, 20)


def damage(folder: Path, found: bytes, at: int = 0) -> None:
    """Flip a bit of the one place in the file where `found` stands."""
    file = folder / "data.mdb"
    whole = bytearray(file.read_bytes())
    assert whole.count(found) == 1
    whole[whole.index(found) + at] ^= 4
    file.write_bytes(whole)


LENGTHS = [3, 40, 200]  # a plain frame, and two zipped ones, of which the last lies in overflow pages


@pytest.mark.parametrize("place", ["header", "count", "first", "sources", "body", "end"])
@pytest.mark.parametrize("length", LENGTHS)
def test_a_damaged_frame_is_named_and_nothing_is_silently_less(
    reopen: Open, folder: Path, place: str, length: int
) -> None:
    hub = reopen()
    for n in range(1, 8):
        hub.append([batch(n, {0: incompressible(n, length), 1: incompressible(n + 100, 2)})])
    frames, other = read_all(hub, 0), stored(hub, 1)
    hub.close()
    victim = encode(frames[4])
    header_bytes = int.from_bytes(victim[4:8], "little")
    at = {"header": 4, "count": 32, "first": 16, "sources": 60, "body": header_bytes + 20, "end": len(victim) - 1}[
        place
    ]
    damage(folder, victim, at)
    hub = reopen()
    assert stored(hub, 1) == other
    first = 4 * length
    for start in (0, length, 2 * length + 1):
        found = hub.read(0, str(start), bytes_max=1 << 30)
        assert list(found.frames) == frames[start // length : 4]
        assert found.next_offset == str(first)
    for start in (first, first + 1, first + length - 1):
        with pytest.raises(FrameDamaged, match=rf"0/{first}\b"):
            hub.read(0, str(start), bytes_max=1 << 20)
    assert list(hub.read(0, str(5 * length), bytes_max=1 << 30).frames) == frames[5:]


@pytest.mark.parametrize("lost", [0, 3, 6])
def test_a_frame_that_is_gone_from_the_middle_or_the_end_is_noticed(reopen: Open, folder: Path, lost: int) -> None:
    hub = reopen()
    for n in range(1, 8):
        hub.append([batch(n, {0: [b"{}"] * 10})])
    hub.close()
    with lmdb.open(str(folder), max_dbs=10) as env:
        frames = env.open_db(b"p00000")
        with env.begin(write=True, db=frames) as txn:
            assert txn.delete(KEY.pack(lost * 10, EVENTS))
    hub = reopen()
    if lost:
        assert hub.read(0, "0", bytes_max=1 << 20).next_offset == str(lost * 10)
        with pytest.raises(FrameDamaged):
            hub.read(0, str(lost * 10), bytes_max=1 << 20)
    with pytest.raises(HubError):
        hub.read(0, str(lost * 10 + 5), bytes_max=1 << 20)


READER = """
import sys
from penstock.clock import SystemClock
from penstock.hub.embedded import EmbeddedHub
from pathlib import Path
hub = EmbeddedHub(Path(sys.argv[1]), bytes_max=64 << 20, clock=SystemClock(), read_only=True)
"""


def test_dead_readers_do_not_keep_pages(reopen: Open, folder: Path) -> None:
    hub = reopen()
    script = READER + "txn = hub._env.begin()\nprint(txn.id(), flush=True)\nsys.stdin.read()\n"
    with subprocess.Popen(
        [sys.executable, "-c", script, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as reader:
        assert reader.stdout is not None
        assert reader.stdout.readline()
        for n in range(1, 6):
            hub.append([batch(n, {0: [b"{}"]})])
        assert hub.usage().reader_lag >= 5
        reader.kill()
    hub.maintain()
    assert hub.usage().reader_lag <= 1


@pytest.mark.parametrize("looks_again", [True, False])
def test_a_producer_that_sends_while_it_expires_is_kept(
    reopen: Open, clock: FakeClock, monkeypatch: pytest.MonkeyPatch, looks_again: bool
) -> None:
    """Between the look at the table and the deletion a batch may be committed: its number must be known afterwards."""
    hub = reopen()
    hub.append([batch(1, {0: [b"{}"]})])
    clock.advance(15 * DAY_S)
    transaction, decode = hub._writer.transaction, expiry.decode

    def late() -> Any:
        monkeypatch.setattr(hub._writer, "transaction", transaction)
        hub.append([batch(2, {0: [b"{}"]})])
        if not looks_again:
            old = {"seen_at_ms": 0}
            monkeypatch.setattr(expiry, "decode", lambda entry: msgspec.structs.replace(decode(entry), **old))
        return transaction()

    monkeypatch.setattr(hub._writer, "transaction", late)
    hub._expiry.walk()
    [again] = hub.append([batch(2, {0: [b"{}"]})])
    assert isinstance(again, Appended)
    assert again.duplicate == looks_again


def test_positions_that_lie_before_the_end_of_the_log_store_nothing(reopen: Open) -> None:
    """LMDB refuses the frame then, and says so by a value that is easily overlooked."""
    hub = reopen()
    hub.append([batch(1, {0: [b"{}"] * 3})])
    with hub._env.begin(write=True) as txn:
        positions = commit_module.Positions(bytearray(txn.get(META_POSITIONS, db=hub._databases.meta)))
        positions.set(0, 0, *positions.period(0))
        txn.put(META_POSITIONS, bytes(positions.record), db=hub._databases.meta)
    with pytest.raises(HubBroken, match="restore"):
        hub.append([batch(2, {0: [b"{}"], 1: [b"{}"]})])
    assert hub.bounds(1).next == 0


def test_what_was_read_stays_what_it_was_when_its_pages_are_used_again(reopen: Open) -> None:
    hub = reopen(bytes_max=4 << 20)
    for sequence in range(1, 11):
        hub.append([batch(sequence, {0: incompressible(sequence, LENGTHS[sequence % 3])})])
    read = hub.read(0, "0", bytes_max=1 << 20)
    before = [bytes(encode(frame)) for frame in read.frames]
    assert len(before) == 10
    hub.trim(0, before=read.next_offset)
    for sequence in range(11, 41):
        hub.append([batch(sequence, {0: incompressible(sequence, 200)})])
        hub.trim(0, before=str(hub.bounds(0).next))
    assert [bytes(encode(frame)) for frame in read.frames] == before


@pytest.mark.parametrize("read_only", [True, False])
def test_a_reader_gets_the_neighbours_of_what_it_reads_from_the_disk(
    reopen: Open, folder: Path, read_only: bool
) -> None:
    hub = reopen()
    groups = tuple(Group(0, 1, random.Random(n).randbytes(200_000).replace(b"\n", b" ") + b"\n") for n in range(40))
    hub.append([batch_of(1, groups)])
    hub = reopen(read_only=read_only)
    log = os.open(folder / "data.mdb", os.O_RDONLY)
    os.posix_fadvise(log, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(log)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_majflt
    assert len(hub.read(0, "0", bytes_max=16 << 20).frames) == 40
    waits = resource.getrusage(resource.RUSAGE_SELF).ru_majflt - before
    if waits == 0:
        pytest.skip("this file system keeps everything in memory")
    pages = 40 * 200_000 // resource.getpagesize()
    assert (waits < pages / 4) == read_only


def resident_file_bytes() -> int:
    return int(Path("/proc/self/statm").read_bytes().split()[2]) * resource.getpagesize()


@pytest.mark.parametrize("bounded", [True, False])
def test_what_is_resident_does_not_grow_with_what_is_read(
    reopen: Open, monkeypatch: pytest.MonkeyPatch, bounded: bool
) -> None:
    monkeypatch.setattr(embedded, "RESIDENT_BYTES_MAX", (8 if bounded else 1024) << 20)
    hub = reopen(bytes_max=256 << 20)
    for sequence in range(1, 11):
        noise = random.Random(sequence).randbytes(8 << 20).replace(b"\n", b" ")
        groups = [Group(0, 1, noise[at : at + 200_000] + b"\n") for at in range(0, len(noise), 200_000)]
        hub.append([batch_of(sequence, tuple(groups))])
    before = most = resident_file_bytes()
    offset, read = "0", 0
    while read < 64 << 20:
        found = hub.read(0, offset, bytes_max=1 << 20)
        offset, read = found.next_offset, read + sum(len(frame.body) for frame in found.frames)
        most = max(most, resident_file_bytes())
    assert (most < before + (16 << 20)) == bounded
