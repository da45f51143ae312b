"""Real file systems of a few megabytes that a test can cut the power of, or fill."""

from __future__ import annotations

import fcntl
import os
import struct
import subprocess
from pathlib import Path

import pytest

from tests.e2e.system import wait_for

_EXT4_IOC_SHUTDOWN, _NO_LOG_FLUSH = 0x8004587D, 2


class Disk:
    """A file system mounted at `folder`. Skips the test where this cannot be done."""

    def __init__(self, folder: Path, mount: list[str]) -> None:
        self.folder = folder
        self._mount = mount
        folder.mkdir()
        self._try(*mount, str(folder))

    def close(self) -> None:
        """Unmounts in any case: a mount that is left behind would stand in the way of all later runs."""
        if os.path.ismount(self.folder):
            try:
                wait_for("it can be unmounted", self._unmounted)
            except AssertionError:
                subprocess.run(["umount", "--lazy", str(self.folder)], check=True, capture_output=True)
                raise

    def fill(self, leave_bytes: int, name: str = "ballast") -> Path:
        """A file that takes all space but so much."""
        filler = self.folder / name
        with filler.open("wb", buffering=0) as file:
            while (free := self.free_bytes() - leave_bytes) > 0:
                file.write(bytes(min(free, 1 << 20)))
        return filler

    def free_bytes(self) -> int:
        found = os.statvfs(self.folder)
        return found.f_bavail * found.f_frsize

    def _unmounted(self) -> bool:
        return subprocess.run(["umount", str(self.folder)], capture_output=True, check=False).returncode == 0

    @staticmethod
    def _try(*command: str) -> None:
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
        except OSError as error:
            pytest.skip(f"{command[0]} cannot be run here: {error}")
        if done.returncode:
            pytest.skip(f"{' '.join(command)} cannot be done here (root is needed): {done.stderr.strip()}")


class PowerCutDisk(Disk):
    """ext4 with a journal, in a file."""

    def __init__(self, folder: Path, size: str = "256M") -> None:
        image = folder.with_suffix(".img")
        with image.open("wb") as file:
            file.truncate(int(size[:-1]) << 20)
        self._try("mkfs.ext4", "-q", "-F", str(image))
        super().__init__(folder, ["mount", "-o", "loop", str(image)])

    def cut_power(self) -> None:
        """From now on nothing reaches the disk, not even what is in the journal's memory; reads and writes fail."""
        fd = os.open(self.folder, os.O_RDONLY)
        try:
            fcntl.ioctl(fd, _EXT4_IOC_SHUTDOWN, struct.pack("I", _NO_LOG_FLUSH))
        finally:
            os.close(fd)

    def restore_power(self) -> None:
        """Mount it again: the kernel replays the journal, as after a power cut. Nothing may have a file open here."""
        wait_for("it can be unmounted", self._unmounted)
        subprocess.run([*self._mount, str(self.folder)], check=True, capture_output=True)


class SmallDisk(Disk):
    """A tmpfs of so many MiB."""

    def __init__(self, folder: Path, mib: int) -> None:
        super().__init__(folder, ["mount", "-t", "tmpfs", "-o", f"size={mib}m", "tmpfs"])
