"""Memory that the machine has already used, so that a measurement does not pay for the first use of it.

A virtual machine may give its free memory back to the host (Linux: free page reporting), and each page that is then used again
is the host's fault to mend: 8 to 12 µs for 4 KiB here, more than half of what an event costs, for every page that the log and the hour
files take of the page cache. A server that has run for a while pays nothing: its memory is full, and pages are taken from older files.
Only blocks of many pages are given back. So one page in each half MiB is kept, and the rest stays free and warm.
"""

from __future__ import annotations

import contextlib
import mmap
from collections.abc import Iterator
from pathlib import Path

_PAGE = mmap.PAGESIZE
_KEPT_EVERY = 128 * _PAGE
_WARM_BYTES_MAX = 4 << 30
_MEMINFO = Path("/proc/meminfo")


@contextlib.contextmanager
def warm_memory() -> Iterator[None]:
    """Touch a third of the free memory, at most 4 GiB, and keep 1 page in 128 of it meanwhile. Nothing where there is no Linux."""
    size = min(_available_bytes() // 3, _WARM_BYTES_MAX) // _KEPT_EVERY * _KEPT_EVERY
    if not size:
        yield
        return
    with mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        memory.madvise(mmap.MADV_NOHUGEPAGE)
        for at in range(0, size, _PAGE):
            memory[at] = 1
        for at in range(0, size, _KEPT_EVERY):
            memory.madvise(mmap.MADV_DONTNEED, at + _PAGE, _KEPT_EVERY - _PAGE)
        yield


def _available_bytes() -> int:
    for line in _MEMINFO.read_text().splitlines() if _MEMINFO.exists() else ():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return 0
