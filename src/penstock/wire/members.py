"""Files of gzip members: the CRC of several contents without unzipping them, and a whole file measured in small memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Final

import msgspec
from isal import isal_zlib

ZIPPED_BYTES_AT_ONCE: Final = 65_536
PLAIN_BYTES_AT_ONCE: Final = 262_144


class Measured(msgspec.Struct, frozen=True):
    """What a file holds when it is unzipped."""

    lines: int
    raw_bytes: int
    crc32: int


def crc32_combined(crc: int, following_crc: int, following_bytes: int) -> int:
    """CRC-32 of two contents one after the other, from those of each."""
    combined: int = isal_zlib.crc32_combine(crc, following_crc, following_bytes)
    return combined


def measure(parts: Iterable[bytes]) -> Measured:
    """Unzip a file of gzip members that comes in parts. Raises ValueError, which says what is wrong with it.

    A member must be whole, with a right checksum, and end in a line feed; nothing may stand behind the last one.
    """
    lines = raw_bytes = crc = 0
    unzip = isal_zlib.decompressobj(31)
    within, end = False, b""
    for zipped in _small(parts):
        while zipped:
            within = True
            try:
                plain = unzip.decompress(zipped, PLAIN_BYTES_AT_ONCE)
            except isal_zlib.error as error:
                raise ValueError(f"a gzip member cannot be unzipped: {error}") from error
            # What `plain.count` tells, in 40 % of the time: it looks at each byte, this at each line feed.
            lines += len(plain) - len(plain.replace(b"\n", b""))
            raw_bytes += len(plain)
            crc = isal_zlib.crc32(plain, crc)
            end = plain[-1:] or end
            zipped = unzip.unconsumed_tail
            if unzip.eof:
                if end != b"\n":
                    raise ValueError("a gzip member does not end in a line feed")
                zipped = unzip.unused_data
                unzip = isal_zlib.decompressobj(31)
                within, end = False, b""
    if within:
        raise ValueError("the last gzip member is cut short")
    return Measured(lines, raw_bytes, crc)


def lines_of(parts: Iterable[bytes]) -> Iterator[bytes]:
    """The lines of such a file, each with its line feed; what stands behind the last is one too. Raises ValueError."""
    unzip, rest = isal_zlib.decompressobj(31), b""
    for zipped in _small(parts):
        while zipped:
            try:
                plain = unzip.decompress(zipped, PLAIN_BYTES_AT_ONCE)
            except isal_zlib.error as error:
                raise ValueError(f"a gzip member cannot be unzipped: {error}") from error
            *whole, rest = (rest + plain).split(b"\n")
            yield from [line + b"\n" for line in whole]
            zipped = unzip.unconsumed_tail
            if unzip.eof:
                zipped, unzip = unzip.unused_data, isal_zlib.decompressobj(31)
    if rest:
        yield rest


def _small(parts: Iterable[bytes]) -> Iterator[bytes]:
    """Each end of a member copies what is left of the part behind it, so parts are kept short."""
    for part in parts:
        for at in range(0, len(part), ZIPPED_BYTES_AT_ONCE):
            yield part[at : at + ZIPPED_BYTES_AT_ONCE]
