"""Several processes on one hub, killed at any moment, on disks that are full or fail. Each runs WRITER, which answers over a pipe."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from penstock.clock import SystemClock
from penstock.errors import HubBroken
from penstock.hub.embedded import EmbeddedHub, create
from penstock.wire.frame import content, sources_of

PARTITIONS = 4
BYTES_MAX = 256 << 20
SMALL_BYTES_MAX = 4 << 20

# The batch of a number is a function of the number, so it can be sent again by another process. `mode`: `die:N` is killed between the
# commit of N and its answer; `unjudged` does not look at the producers' table.
WRITER = """
import hashlib, os, signal, sys
from pathlib import Path
from penstock.clock import SystemClock
from penstock.errors import PenstockError
from penstock.events import Batch, Group
from penstock.hub import commit
from penstock.hub.embedded import EmbeddedHub

folder, producer, first, count, events, size = Path(sys.argv[1]), sys.argv[2], *map(int, sys.argv[3:7])
modes = sys.argv[7:]
if "unjudged" in modes:
    commit.judge = lambda known, batch: None
hub = EmbeddedHub(folder, bytes_max=256 << 20, clock=SystemClock())

def line(sequence, n):
    filler = hashlib.shake_128(b"%d-%d" % (sequence, n)).hexdigest(size // 2).encode()
    return b'{"deviceId":"%s","s":%d,"n":%d,"x":"%s"}\\n' % (producer.encode(), sequence, n, filler)

def batch(sequence):
    lines = b"".join(line(sequence, n) for n in range(events))
    groups = tuple(Group(partition, events, lines) for partition in range(4) if sequence % 4 != partition)
    return Batch(producer, 1, sequence, 3 * events, groups, True, hashlib.sha256(b"%d" % sequence).digest())

for sequence in range(first, first + count):
    try:
        [answer] = hub.append([batch(sequence)])
    except PenstockError as error:
        print(sequence, error.code, flush=True)
        if "stop" in modes:
            break
        continue
    if f"die:{sequence}" in modes:
        os.kill(os.getpid(), signal.SIGKILL)
    print(sequence, "duplicate" if answer.duplicate else "stored", flush=True)
"""

READER = """
import sys
from pathlib import Path
from penstock.clock import SystemClock
from penstock.hub.embedded import EmbeddedHub
from penstock.wire.frame import events

hub = EmbeddedHub(Path(sys.argv[1]), bytes_max=256 << 20, clock=SystemClock(), read_only=True)
wanted, seen, last = int(sys.argv[2]), [0] * 4, [0] * 4
while min(seen) < wanted:
    for partition in range(4):
        found = hub.read(partition, str(seen[partition]), bytes_max=100_000)
        for frame in found.frames:
            assert frame.enqueued_at_ms >= last[partition]
            last[partition] = frame.enqueued_at_ms
        for event in events(found):
            assert event.sequence_number == seen[partition], (event, seen)
            seen[partition] += 1
        assert found.next_offset == str(seen[partition])
print("dense", *seen)
"""


def argv(script: str, *arguments: object) -> list[str]:
    return [sys.executable, "-c", script, *map(str, arguments)]


def run(script: str, *arguments: object, under: list[str] | None = None) -> list[str]:
    """Everything a process said before it ended, however it ended."""
    done = subprocess.run([*(under or []), *argv(script, *arguments)], capture_output=True, text=True, timeout=120)
    assert done.returncode in (0, -9, 137), done.stderr
    return done.stdout.splitlines()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make(tmp_path / "hub")
    return tmp_path / "hub"


def make(folder: Path, bytes_max: int = BYTES_MAX) -> None:
    create(folder, partitions=PARTITIONS, period_s=3600, bytes_max=bytes_max, clock=SystemClock())


def content_of(folder: Path) -> Counter[tuple[str, int, int, int]]:
    """How often each event is there: (producer, sequence, partition, n). Sequence numbers must be dense."""
    found: Counter[tuple[str, int, int, int]] = Counter()
    with EmbeddedHub(folder, bytes_max=BYTES_MAX, clock=SystemClock(), read_only=True) as hub:
        for partition in range(PARTITIONS):
            offset, end = "0", None
            while offset != end:
                read = hub.read(partition, offset, bytes_max=1 << 20)
                number = int(offset)
                for frame in read.frames:
                    assert frame.first == number
                    lines = content(frame).split(b"\n")[:-1]
                    assert len(lines) == frame.count == sum(source.count for source in sources_of(frame))
                    number = frame.next
                    for line in lines:
                        producer, sequence, n = (
                            line.split(b'"')[3].decode(),
                            *(int(part.split(b",")[0]) for part in line.split(b":")[2:4]),
                        )
                        found[producer, sequence, partition, n] += 1
                offset, end = read.next_offset, read.end_offset
    return found


def whole(found: Counter[tuple[str, int, int, int]], producer: str, sequence: int, events: int) -> bool:
    """Whether a batch is there once and whole (True) or not at all (False)."""
    counts = [found[producer, sequence, p, n] for p in range(PARTITIONS) if p != sequence % 4 for n in range(events)]
    assert len(set(counts)) == 1, f"batch {sequence} is there in part"
    assert counts[0] <= 1, f"batch {sequence} is there {counts[0]} times"
    return counts[0] == 1


def test_three_writers_and_a_reader(folder: Path) -> None:
    count, events = 40, 5
    writers = [
        subprocess.Popen(argv(WRITER, folder, f"w-{n}", 1, count, events, 40), stdout=subprocess.PIPE) for n in range(3)
    ]
    reader = subprocess.Popen(argv(READER, folder, 3 * count * events * 3 // 4), stdout=subprocess.PIPE, text=True)
    for writer in writers:
        said, _ = writer.communicate(timeout=60)
        assert said.split() == [part for n in range(1, count + 1) for part in (b"%d" % n, b"stored")]
    said_by_reader, _ = reader.communicate(timeout=60)
    assert said_by_reader.split() == ["dense", *["450"] * PARTITIONS]
    found = content_of(folder)
    assert all(whole(found, f"w-{n}", sequence, events) for n in range(3) for sequence in range(1, count + 1))
    assert found.total() == 3 * count * events * 3


def killed_again_and_again(folder: Path, rounds: int, *modes: str) -> int:
    """A writer is killed after a few answers, or right between a commit and its answer; the next one sends again what has no answer.

    How many batches were acknowledged.
    """
    acknowledged = 0
    for number in range(rounds):
        first = acknowledged + 1
        if number % 3 == 2:
            said = run(WRITER, folder, "w", first, 100, 3, 400, f"die:{first + 1}", *modes)
            assert len(said) == 1
        else:
            said = []
            with subprocess.Popen(
                argv(WRITER, folder, "w", first, 10_000, 3, 400, *modes), stdout=subprocess.PIPE, text=True
            ) as writer:
                assert writer.stdout is not None
                for line in writer.stdout:
                    said.append(line.strip())
                    if len(said) == 1 + number * 7 % 11:
                        writer.kill()
        for line in said:
            sequence, _, answer = line.partition(" ")
            assert answer in ("stored", "duplicate")
            assert int(sequence) == acknowledged + 1
            acknowledged += 1
    return acknowledged


def test_a_writer_killed_at_any_moment(folder: Path) -> None:
    acknowledged = killed_again_and_again(folder, 18)
    found = content_of(folder)
    assert all(whole(found, "w", sequence, 3) for sequence in range(1, acknowledged + 1))
    there = {sequence for _, sequence, _, _ in found}
    assert there <= set(range(1, acknowledged + 2))
    for sequence in there:
        whole(found, "w", sequence, 3)
    assert run(WRITER, folder, "w", acknowledged + 1, 1, 3, 400) == [
        f"{acknowledged + 1} {'duplicate' if acknowledged + 1 in there else 'stored'}"
    ]


def test_without_judging_the_same_kills_show_duplicates(folder: Path) -> None:
    """The negative control of the test above."""
    acknowledged = killed_again_and_again(folder, 4, "unjudged")
    found = content_of(folder)
    with pytest.raises(AssertionError, match="is there 2 times"):
        assert all(whole(found, "w", sequence, 3) for sequence in range(1, acknowledged + 1))


def test_a_killed_writer_does_not_keep_the_lock(folder: Path) -> None:
    """One that dies while it waits for or holds the write lock must not stop the others."""
    others = [
        subprocess.Popen(argv(WRITER, folder, f"k-{n}", 1, 10_000, 3, 400), stdout=subprocess.PIPE) for n in range(2)
    ]
    for other in others:
        assert other.stdout is not None
        assert other.stdout.readline()
    for other in others:
        other.kill()
        other.communicate()
        assert run(WRITER, folder, f"after-{other.pid}", 1, 2, 3, 400) == ["1 stored", "2 stored"]


@contextmanager
def small_disk(kind: str, size_mib: int) -> Iterator[Path]:
    """A file system of its own, which is soon full. Skips where this machine does not let us make one."""
    if not hasattr(os, "geteuid") or os.geteuid() or shutil.which("mount") is None:
        pytest.skip("a small disk needs root and mount")
    base = Path(tempfile.mkdtemp(prefix="penstock-disk-"))
    point = base / "disk"
    point.mkdir()
    if kind == "tmpfs":
        steps = [["mount", "-t", "tmpfs", "-o", f"size={size_mib}m", "none", str(point)]]
    else:
        image = str(base / "image")
        steps = [
            ["truncate", "-s", f"{size_mib}M", image],
            ["mkfs.ext4", "-q", "-F", "-m", "0", image],
            ["mount", "-o", "loop", image, str(point)],
        ]
    try:
        for step in steps:
            if shutil.which(step[0]) is None or subprocess.run(step, capture_output=True).returncode:
                pytest.skip(f"this machine lets us make no small {kind}: {step[0]} fails")
        yield point
    finally:
        subprocess.run(["umount", "-l", str(point)], capture_output=True)
        shutil.rmtree(base, ignore_errors=True)


@pytest.mark.parametrize("kind", ["tmpfs", "ext4"])
def test_a_full_disk(kind: str) -> None:
    with small_disk(kind, 12) as disk:
        make(disk / "hub")
        ballast = disk / "ballast"
        ballast.write_bytes(bytes(4 << 20))
        said = run(WRITER, disk / "hub", "w", 1, 2000, 20, 2000, "stop")
        acknowledged = len(said) - 1
        assert said == [f"{n} stored" for n in range(1, acknowledged + 1)] + [f"{acknowledged + 1} storage_full"]
        assert acknowledged > 3
        # Whoever goes on is refused, or stored when little is needed; nothing breaks, and nothing of what is refused is there.
        said = run(WRITER, disk / "hub", "w", acknowledged + 1, 5, 20, 2000)
        answers = dict(line.split() for line in said)
        assert set(answers.values()) <= {"storage_full", "stored"}
        assert "storage_full" in answers.values()
        found = content_of(disk / "hub")
        assert all(whole(found, "w", sequence, 20) for sequence in range(1, acknowledged + 1))
        assert all(whole(found, "w", int(n), 20) == (answer == "stored") for n, answer in answers.items())
        ballast.unlink()
        said = run(WRITER, disk / "hub", "w", acknowledged + 6, 3, 20, 2000)
        assert said == [f"{n} stored" for n in range(acknowledged + 6, acknowledged + 9)]


FAULT = "-f -o /dev/null -e trace=fdatasync,fsync,pwrite64,pwritev,writev,write -e inject={call}:error=EIO:when={when}"


@pytest.mark.parametrize(("call", "when"), [("fdatasync", 1), ("fdatasync", 3), ("pwrite64", 2), ("pwrite64", 5)])
def test_a_disk_that_fails(folder: Path, call: str, when: int) -> None:
    """After EIO nothing more is answered by this process, and a new one finds everything that was answered."""
    if shutil.which("strace") is None:
        pytest.skip("strace is not installed")
    under = ["strace", *FAULT.format(call=call, when=when).split()]
    if subprocess.run(["strace", "-f", "-o", "/dev/null", "true"], capture_output=True).returncode:
        pytest.skip("strace may not trace here")
    said = run(WRITER, folder, "w", 1, 8, 3, 400, under=under)
    answers = [line.split()[1] for line in said]
    acknowledged = answers.index("hub_broken")
    assert answers == ["stored"] * acknowledged + ["hub_broken"] * (8 - acknowledged)
    found = content_of(folder)
    assert all(whole(found, "w", sequence, 3) for sequence in range(1, acknowledged + 1))
    there = {sequence for _, sequence, _, _ in found}
    assert there <= set(range(1, acknowledged + 2))
    said = run(WRITER, folder, "w", acknowledged + 1, 3, 3, 400)
    assert [line.split()[1] for line in said][1:] == ["stored"] * 2
    assert said[0].split()[1] == ("duplicate" if acknowledged + 1 in there else "stored")


def test_a_hub_that_grew_beyond_the_limit_of_an_older_process_is_opened_anew(tmp_path: Path) -> None:
    make(tmp_path, SMALL_BYTES_MAX)
    with EmbeddedHub(tmp_path, bytes_max=0, clock=SystemClock(), read_only=True) as older:
        assert run(WRITER, tmp_path, "p", 1, 5, 100, 20_000)[-1] == "5 stored"
        with pytest.raises(HubBroken, match="start it again"):
            older.read(0, "0", bytes_max=1)
    with EmbeddedHub(tmp_path, bytes_max=0, clock=SystemClock(), read_only=True) as newer:
        assert newer.read(0, "0", bytes_max=1).frames
