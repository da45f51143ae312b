"""In what the archive differs from the log: records by their checksums, hour files event by event."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Final

from penstock.archive.ledger import Record
from penstock.blobs import BlobStore
from penstock.errors import BlobNotFound, FrameDamaged
from penstock.events import Frame
from penstock.wire.frame import content, crc32
from penstock.wire.members import lines_of

NAMED_EVENTS: Final = 5
TWICE: Final = "lines that are there twice"
COPIES: Final = "lines that are copies"
DEAD: Final = "lines that are dead letters"
OTHERS: Final = "lines that are not in the log"


def digest_of(line: bytes) -> bytes:
    """What stands for a line, with its line feed: a file may have millions."""
    return hashlib.blake2b(line, digest_size=12).digest()


def differences(
    store: BlobStore, record: Record, events: Sequence[tuple[bytes, int]], left: Mapping[bytes, str]
) -> Iterator[str]:
    """Sentences about a file that is there. `events`: digests and sequence numbers of what must be in it, in order; `left`: what must not,
    though the log has it: digests, and whether they are COPIES or DEAD.

    Of each kind the first few are named: events by their numbers, lines of the file by theirs, from 1.
    """
    try:
        lines = [digest_of(line) for line in lines_of(store.stream(record.file))]
    except (ValueError, BlobNotFound):  # told by `verify`
        return
    there = Counter(lines)
    missing = [number for digest, number in events if not _taken(there, digest)]
    right = dict.fromkeys([digest for digest, _ in events], TWICE)
    found: dict[str, list[int]] = {"events that are missing": missing, TWICE: [], COPIES: [], DEAD: [], OTHERS: []}
    for number, digest in reversed(list(enumerate(lines, 1))):
        if _taken(there, digest):  # what is left; of equal lines the later ones are too many
            found[right.get(digest) or left.get(digest, OTHERS)].append(number)
    for what, numbers in found.items():
        if numbers:
            numbers.sort()
            more = f" and {len(numbers) - NAMED_EVENTS} more" if len(numbers) > NAMED_EVENTS else ""
            yield f"{record.file}: {what}: {', '.join(map(str, numbers[:NAMED_EVENTS]))}{more}"


def _taken(there: Counter[bytes], digest: bytes) -> bool:
    """One less of it, if there is one."""
    if not there[digest]:
        return False
    there[digest] -= 1
    return True


class Ranges:
    """Compares the log's content with the ledger's records while frames pass."""

    def __init__(self, records: list[Record], first: int) -> None:
        self._records = iter([record for record in records if record.first >= first])
        self._record = next(self._records, None)
        self._crc = self._raw_bytes = 0

    def pass_over(self, frame: Frame) -> Iterator[str]:
        try:
            ndjson = content(frame)
        except FrameDamaged as error:
            yield str(error)
            return
        if crc32(ndjson) != frame.content_crc:
            yield f"the frame at {frame.partition}/{frame.first} does not hold what its header says"
        if self._record is None or frame.first < self._record.first:
            return
        self._crc = crc32(ndjson, self._crc)
        self._raw_bytes += len(ndjson)
        if frame.next < self._record.next:
            return
        if (frame.next, self._raw_bytes, self._crc) != (self._record.next, self._record.raw_bytes, self._record.crc32):
            yield f"{self._record.file}: its record is not what the log holds from {self._record.first} on"
        self._record = next(self._records, None)
        self._crc = self._raw_bytes = 0
