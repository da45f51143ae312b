from __future__ import annotations

import ctypes
import errno
import fcntl
import io
import mmap
import os
import random
import subprocess
import sys
import threading
from pathlib import Path
from typing import BinaryIO

import pytest

from penstock.files import PART_BYTES, Files
from penstock.growing import BLOCK_BYTES
from penstock.testing import FaultyFiles


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_create_is_create_only(tmp_path: Path) -> None:
    files = Files()
    assert files.create(tmp_path / "a", b"one")
    assert not files.create(tmp_path / "a", b"two")
    assert files.read(tmp_path / "a") == b"one"
    assert names(tmp_path) == ["a"]


def test_replace_put_and_remove(tmp_path: Path) -> None:
    files = Files()
    files.replace(tmp_path / "a", b"one")
    files.replace(tmp_path / "a", b"two")
    assert files.read(tmp_path / "a") == b"two"
    big = b"x" * (2 * PART_BYTES + 1)
    files.put(tmp_path / "a", io.BytesIO(big))
    assert files.read(tmp_path / "a") == big
    files.remove(tmp_path / "a")
    files.remove(tmp_path / "a")
    assert names(tmp_path) == []


def test_short_writes_are_gone_on_with(tmp_path: Path) -> None:
    files = FaultyFiles(write_bytes_max=3)
    files.replace(tmp_path / "a", b"0123456789")
    assert files.read(tmp_path / "a") == b"0123456789"
    assert files.calls.count("write") == 4


class OneWrite(Files):
    """The negative control: takes the first short write for the whole."""

    def _write_all(self, fd: int, body: bytes) -> None:
        self._write(fd, memoryview(body))


def test_control_a_single_write_loses_bytes(tmp_path: Path) -> None:
    class Broken(FaultyFiles, OneWrite):
        pass

    files = Broken(write_bytes_max=3)
    files.replace(tmp_path / "a", b"0123456789")
    assert files.read(tmp_path / "a") == b"012"


def test_each_act_syncs_the_content_before_the_name_and_the_folder_after_it(tmp_path: Path) -> None:
    files = FaultyFiles()
    files.create(tmp_path / "a", b"one")
    assert files.calls == ["open_new", "write", "fsync", "link", "unlink", "fsync"]
    files.calls.clear()
    files.replace(tmp_path / "a", b"two")
    assert files.calls == ["open_new", "write", "fsync", "rename", "fsync"]
    files.calls.clear()
    files.create(tmp_path / "a", b"three")
    assert files.calls[-1] == "fsync", "what another has linked is durable before it is answered"
    files.calls.clear()
    files.remove(tmp_path / "a")
    assert files.calls == ["unlink", "fsync"]
    files.calls.clear()
    files.make_folders(tmp_path / "b" / "c")
    assert files.calls == ["mkdir", "fsync", "mkdir", "fsync"]
    files.replace(tmp_path / "a", b"four")
    files.calls.clear()
    files.move(tmp_path / "a", tmp_path / "b" / "a")
    assert files.calls == ["rename", "fsync", "fsync"]
    assert (names(tmp_path), files.read(tmp_path / "b" / "a")) == (["b"], b"four")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
@pytest.mark.parametrize("act", ["create", "replace", "put", "put a work file"])
def test_a_failure_at_any_step_leaves_old_or_new_and_nothing_else(tmp_path: Path, act: str, number: int) -> None:
    steps = 0
    while True:
        steps += 1
        folder = tmp_path / str(steps)
        folder.mkdir()
        files = FaultyFiles({steps: number})
        path = folder / "a"
        if act != "create":
            path.write_bytes(b"old")
        try:
            match act:
                case "create":
                    files.create(path, b"new")
                case "replace":
                    files.replace(path, b"new")
                case "put":
                    files.put(path, io.BytesIO(b"new"))
                case _:
                    with files.work_file(tmp_path) as work:
                        files.put(path, written(work, b"new"))
        except OSError as error:
            assert error.errno == number
        else:
            if len(files.calls) < steps:
                break
        work_left = files.calls[steps - 1] == "unlink"  # it could not be deleted
        assert [name for name in names(folder) if name.startswith(".")] == [] or work_left
        seen = path.read_bytes() if path.exists() else None
        assert seen in ((None, b"new") if act == "create" else (b"old", b"new"))
    assert steps > (5 if act != "put a work file" else 4)


def written(file: BinaryIO, content: bytes) -> BinaryIO:
    file.write(content)
    file.seek(0)
    return file


def test_a_work_file_gets_the_name_instead_of_being_copied(tmp_path: Path) -> None:
    files = FaultyFiles()
    (tmp_path / "a").write_bytes(b"old")
    with written(files.work_file(tmp_path), b"new") as work:
        inode = os.fstat(work.fileno()).st_ino
        files.put(tmp_path / "a", work)
    assert (tmp_path / "a").read_bytes() == b"new"
    assert (tmp_path / "a").stat().st_ino == inode
    assert files.calls == ["write_at", "fsync", "link_open", "rename", "fsync"], (
        "the content is on the disk before the name"
    )
    assert names(tmp_path) == ["a"]


def test_what_cannot_get_the_name_is_copied(tmp_path: Path) -> None:
    class NoLinks(FaultyFiles):
        def _link_open(self, fd: int, target: Path) -> None:
            raise OSError(errno.EXDEV, "another file system")

    with written(NoLinks().work_file(tmp_path), b"0123456789") as work:
        NoLinks().put(tmp_path / "a", work)
        work.seek(4)
        NoLinks().put(tmp_path / "b", work)
        Files().put(tmp_path / "c", work)
    found = [(tmp_path / name).read_bytes() for name in ("a", "b", "c")]
    assert found == [b"0123456789", b"456789", b""], "from where it stands"
    assert names(tmp_path) == ["a", "b", "c"]


class ShortWrites(Files):
    def _write_at(self, fd: int, body: memoryview, at: int) -> int:
        return super()._write_at(fd, body[: BLOCK_BYTES // 2], at)


@pytest.mark.parametrize("direct", [True, False])
@pytest.mark.parametrize("rest", [0, 1, 4096, BLOCK_BYTES - 1])
def test_a_work_file_has_what_was_written(
    tmp_path: Path, rest: int, direct: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not direct:
        monkeypatch.delattr(os, "O_DIRECT")
    files = ShortWrites()
    parts = random.Random(rest).choices([b"", b"a" * 9, bytes(range(256)) * 16, b"c" * (BLOCK_BYTES + 5)], k=40)
    size = sum(map(len, parts))
    content = b"".join(parts) + b"d" * (-size % BLOCK_BYTES + rest)
    with files.work_file(tmp_path) as work:
        work.writelines(parts[:7])
        for part in parts[7:]:
            assert work.write(part) == len(part)
        work.write(content[size:])
        assert work.seek(0, io.SEEK_END) == len(content)
        work.write(b"behind")
        work.seek(0)
        files.put(tmp_path / "a", work)
    assert (tmp_path / "a").read_bytes() == content + b"behind"


def resident_bytes(fd: int) -> int:
    """Of a file, in the system's cache."""
    libc = ctypes.CDLL(None, use_errno=True)
    with mmap.mmap(fd, 0) as mapped:
        pages = (ctypes.c_ubyte * (len(mapped) // mmap.PAGESIZE + 1))()
        begin = ctypes.c_char.from_buffer(mapped)
        assert libc.mincore(ctypes.c_void_p(ctypes.addressof(begin)), ctypes.c_size_t(len(mapped)), pages) == 0
        del begin
    return sum(page & 1 for page in pages) * mmap.PAGESIZE


def test_a_work_file_goes_past_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Files().work_file(tmp_path) as work:
        work.write(bytes(16 * BLOCK_BYTES + 1))
        work.seek(0)
        assert os.fstat(work.fileno()).st_size == 16 * BLOCK_BYTES + 1
        assert resident_bytes(work.fileno()) <= BLOCK_BYTES
    monkeypatch.delattr(os, "O_DIRECT")
    with Files().work_file(tmp_path) as work:
        work.write(bytes(16 * BLOCK_BYTES))
        assert resident_bytes(work.fileno()) == 16 * BLOCK_BYTES


def test_a_file_system_that_wants_other_blocks_gets_what_it_wants(tmp_path: Path) -> None:
    class Picky(Files):
        def _write_at(self, fd: int, body: memoryview, at: int) -> int:
            if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT:
                raise OSError(errno.EINVAL, "Invalid argument")
            return super()._write_at(fd, body, at)

    with written(Picky().work_file(tmp_path), b"x" * (2 * BLOCK_BYTES + 3)) as work:
        assert work.read() == b"x" * (2 * BLOCK_BYTES + 3)


@pytest.mark.parametrize("size", [BLOCK_BYTES, BLOCK_BYTES // 2])
def test_a_disk_that_fails_while_a_work_file_grows_is_heard_of(tmp_path: Path, size: int) -> None:
    files = FaultyFiles({1: errno.EIO})
    with files.work_file(tmp_path) as work, pytest.raises(OSError, match="Input/output error"):
        work.write(bytes(size))
        work.flush()


def test_a_sweep_leaves_a_work_file_that_is_about_to_get_its_name(tmp_path: Path) -> None:
    class Sweeping(Files):
        def _rename(self, source: Path, target: Path) -> None:
            Files().sweep(tmp_path)
            super()._rename(source, target)

    with written(Files().work_file(tmp_path), b"new") as work:
        Sweeping().put(tmp_path / "a", work)
    assert (tmp_path / "a").read_bytes() == b"new"


def test_control_without_the_lock_the_sweep_takes_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Sweeping(Files):
        def _rename(self, source: Path, target: Path) -> None:
            monkeypatch.undo()
            Files().sweep(tmp_path)
            super()._rename(source, target)

    monkeypatch.setattr("penstock.files.fcntl.flock", lambda fd, operation: None)
    with written(Files().work_file(tmp_path), b"new") as work, pytest.raises(FileNotFoundError):
        Sweeping().put(tmp_path / "a", work)


def test_control_writing_in_place_leaves_half_a_file(tmp_path: Path) -> None:
    class InPlace(FaultyFiles):
        def replace(self, path: Path, body: bytes) -> None:
            with path.open("wb") as file:
                self._write_all(file.fileno(), body)

    (tmp_path / "a").write_bytes(b"old!")
    with pytest.raises(OSError):
        InPlace({1: errno.ENOSPC}).replace(tmp_path / "a", b"new!")
    assert (tmp_path / "a").read_bytes() == b"ne"


def test_a_lock_keeps_threads_out(tmp_path: Path) -> None:
    files = Files()
    inside = 0
    most = 0

    def work() -> None:
        nonlocal inside, most
        for _ in range(50):
            with files.lock(tmp_path / ".lock"):
                inside += 1
                most = max(most, inside)
                inside -= 1

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1


def test_hold_names_its_holder_and_ends_with_it(tmp_path: Path) -> None:
    files = Files()
    path = tmp_path / "up.lock"
    program = (
        "import sys; from pathlib import Path; from penstock.files import Files\n"
        f"held = Files().hold(Path({str(path)!r}))\n"
        "print('held' if held else 'refused', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"held\n"
        assert files.hold(path) is None
        assert int(files.read(path)) == other.pid
        other.kill()
    held = files.hold(path)
    assert held is not None
    assert files.hold(path) is None
    held.release()
    held.release()
    again = files.hold(path)
    assert again is not None
    again.release()


def test_a_work_file_has_no_name(tmp_path: Path) -> None:
    with Files().work_file(tmp_path) as work:
        work.write(b"x")
        assert all(name.startswith(".") for name in names(tmp_path))
    assert names(tmp_path) == []


def test_sweep_deletes_what_the_dead_left_and_nothing_that_is_being_written(tmp_path: Path) -> None:
    (tmp_path / ".0123456789abcdef").write_bytes(b"left by a killed process")
    (tmp_path / ".lock").touch()
    seen: list[list[str]] = []

    class Source(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            Files().sweep(tmp_path)
            seen.append(names(tmp_path))
            return super().read(size)

    Files().put(tmp_path / "a", Source(b"content"))
    assert (tmp_path / "a").read_bytes() == b"content"
    assert len(seen[0]) == 2 and ".0123456789abcdef" not in seen[0]
    assert names(tmp_path) == [".lock", "a"]
