"""The spool: what a client took and the hub has not answered for yet, on disk (docs/formats.md, The spool).

{spool}/{set}/lock                              held by the process that uses the set; a second process takes another set
{spool}/{set}/{lane}/state.json                 the lane's producer, the number it gave last and to which batch
{spool}/{set}/{lane}/{n:012}.open               events as they were taken, each line with a CRC
{spool}/{set}/{lane}/{n:012}-{events}.batch     sealed: a line of JSON, and the gzip bytes that are posted
{spool}/dead/, {spool}/quarantine/              what the API will never take; what was damaged
"""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec

from penstock.client.lane import Lane
from penstock.files import Files, Held

_LOCK = "lock"
_OPENING, _CLOSING = b"{}"


class Spool:
    """The lanes of one process in a spool folder, locked for it, and the sets that dead processes left there."""

    def __init__(
        self,
        folder: Path,
        files: Files,
        *,
        lanes: int,
        device_field: str,
        now_ms: Callable[[], int],
        new_producer: Callable[[], str],
    ) -> None:
        self.folder = folder
        self._files = files
        self._make: Callable[[Path], Lane] = lambda path: Lane(
            path, folder, files, device_field=device_field, now_ms=now_ms, new_producer=new_producer
        )
        self._held: list[Held] = []
        files.make_folders(folder)
        self.lanes = self._own(lanes)
        self.left = list(self._adopted())
        self._all = (*self.lanes, *self.left)

    # Lists and no generators: two of these are looked at for each event.

    @property
    def events(self) -> int:
        """Events that are not done, of all lanes."""
        return sum([lane.events for lane in self._all])

    @property
    def bytes(self) -> int:
        """What they take on disk."""
        return sum([lane.bytes for lane in self._all])

    @property
    def unsealed(self) -> int:
        """Ended open files that wait to be sealed, of the lane that has most."""
        return max([lane.unsealed for lane in self.lanes])

    @property
    def quarantined(self) -> int:
        """Files and lines that were found damaged since this process began."""
        return sum([lane.quarantined for lane in self._all])

    def close(self) -> None:
        """What was taken is durable, and another process may use the set."""
        for lane in self.lanes:
            lane.close()
        for held in self._held:
            held.release()

    def abandon(self) -> None:
        """In a child after a fork: let go of the parent's files without a word to the disk."""
        for lane in self.lanes:
            lane.abandon()
        for held in self._held:
            held.release()

    def _own(self, lanes: int) -> list[Lane]:
        """The lanes of the first set that nobody uses. Their number stays as it is until all is sent, for the order of each device,
        and until what is being read from sources is read.
        """
        for number in itertools.count():
            folder = self.folder / str(number)
            self._files.make_folders(folder)
            held = self._files.hold(folder / _LOCK)
            if held is None:
                continue
            self._held.append(held)
            found = [self._make(path) for path in _lane_folders(folder)]
            if any(lane.bytes or lane.taken for lane in found):
                return found
            return [*found[:lanes], *(self._make(folder / str(n)) for n in range(len(found), lanes))]
        raise AssertionError("numbers do not end")

    def _adopted(self) -> Iterator[Lane]:
        """Lanes with something to send whose process is gone."""
        for folder in sorted(path for path in self.folder.iterdir() if path.name.isdigit()):
            held = self._files.hold(folder / _LOCK)
            if held is None:
                continue
            lanes = [lane for path in _lane_folders(folder) if (lane := self._make(path)).bytes]
            if lanes:
                self._held.append(held)
                yield from lanes
            else:
                held.release()


class LaneOf:
    """Event → lane, by its device; lane 0 where that cannot be read: the API will say what is wrong."""

    def __init__(self, device_field: str, lanes: int) -> None:
        named: Any = msgspec.defstruct("Named", [("device", str, "")], rename={"device": device_field}, gc=False)
        self._decoder = msgspec.json.Decoder(named)
        self._lanes = lanes

    def __call__(self, line: bytes) -> int:
        if self._lanes == 1:
            return 0
        try:
            return self._lane(self._decoder.decode(line).device)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            return 0

    def each(self, lines: Sequence[bytes]) -> list[int]:
        """The same of many lines, in half the time.

        For the decoder a line feed is white space. But where each line begins with `{` and ends in `}`, no event spans lines, and
        when there are as many events as lines, each line is one.
        """
        try:
            if self._lanes > 1 and all(line[0] == _OPENING and line[-1] == _CLOSING for line in lines):
                events = self._decoder.decode_lines(b"\n".join(lines))
                if len(events) == len(lines):
                    return [self._lane(event.device) for event in events]
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            pass  # one of them is no event: line by line it shows which
        return [self(line) for line in lines]

    def _lane(self, device: str) -> int:
        return zlib.crc32(device.encode()) % self._lanes


def _lane_folders(folder: Path) -> list[Path]:
    return sorted((path for path in folder.iterdir() if path.name.isdigit()), key=lambda path: int(path.name))
