"""The spool: what a client took and the hub has not answered for yet, on disk (docs/formats.md, The spool).

{spool}/{set}/lock                              held by the process that uses the set; a second process takes another set
{spool}/{set}/{lane}/state.json                 the lane's producer, the number it gave last and to which batch
{spool}/{set}/{lane}/{n:012}.open               events as they were taken, each line with a CRC
{spool}/{set}/{lane}/{n:012}-{events}.batch     sealed: a line of JSON, and the gzip bytes that are posted
{spool}/dead/, {spool}/quarantine/              what the API will never take; what was damaged
"""

from __future__ import annotations

import contextlib
import itertools
import os
import zlib
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec

from penstock.client.lane import COMPLETE, Lane, is_done
from penstock.client.records import State, file_of, read_header
from penstock.errors import SpoolDamaged
from penstock.files import Files, Held

_LOCK, _STATE = "lock", "state.json"
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
        reading: Collection[str] = (),
    ) -> None:
        """`reading`: the files whose lines will be put into the lanes. A set that knows how far one of them is taken is the one to use."""
        self.folder = folder
        self._files = files
        self._make: Callable[[Path], Lane] = lambda path: Lane(
            path, folder, files, device_field=device_field, now_ms=now_ms, new_producer=new_producer
        )
        self._held: list[Held] = []
        files.make_folders(folder)
        try:
            self.lanes = self._own(lanes, reading)
            self.left = list(self._adopted())
        except BaseException:
            # Who tries again in this process must find the sets free.
            for held in self._held:
                held.release()
            raise
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
        try:
            for lane in self.lanes:
                lane.close()
        finally:
            for held in self._held:
                held.release()

    def abandon(self) -> None:
        """In a child after a fork: let go of the parent's files without a word to the disk."""
        for lane in self.lanes:
            lane.abandon()
        for held in self._held:
            held.release()

    def begun_elsewhere(self, file: str) -> Path | None:
        """Another set, whoever uses it, that has lines of a file and misses others of it."""
        return next((folder for folder in self._sets() if folder != self._folder and file in _begun(folder)), None)

    def _sets(self) -> list[Path]:
        return sorted(path for path in self.folder.iterdir() if path.name.isdigit())

    def _own(self, lanes: int, reading: Collection[str]) -> list[Lane]:
        """The lanes of the first set that nobody uses. Their number stays as it is until all is sent, for the order of each device,
        and until what is being read from sources is read.
        """
        begun = [folder for folder in self._sets() if _begun(folder).intersection(reading)] if reading else []
        for folder in itertools.chain(begun, (self.folder / str(number) for number in itertools.count())):
            self._files.make_folders(folder)
            held = self._files.hold(folder / _LOCK)
            if held is None:
                continue
            self._held.append(held)
            self._folder = folder
            found = [self._make(path) for path in _lane_folders(folder)]
            if any(lane.bytes or lane.taken for lane in found):
                return found
            return [*found[:lanes], *(self._make(folder / str(n)) for n in range(len(found), lanes))]
        raise AssertionError("numbers do not end")

    def _adopted(self) -> Iterator[Lane]:
        """Lanes with something to send whose process is gone."""
        for folder in self._sets():
            held = self._files.hold(folder / _LOCK)
            if held is None:
                continue
            self._held.append(held)
            lanes = [lane for path in _lane_folders(folder) if (lane := self._make(path)).bytes]
            if lanes:
                yield from lanes
            else:
                self._held.pop().release()


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


def _begun(folder: Path) -> set[str]:
    """The files of which a set has lines and misses others."""
    taken = [_taken(path) for path in _lane_folders(folder)]
    complete = {source for source, line in taken[0].items() if line == COMPLETE} if taken else set[str]()
    return {file_of(source) for lane in taken for source in lane if source not in complete}


def _taken(folder: Path) -> dict[str, int]:
    """What `Lane.taken` would be, without a lock: what another process is just changing may be missing."""
    taken: dict[str, int] = {}
    batch = ""
    with contextlib.suppress(FileNotFoundError, msgspec.MsgspecError):
        state = msgspec.json.decode((folder / _STATE).read_bytes(), type=State)
        taken, batch = state.taken, state.batch
    for name in sorted((entry.name for entry in os.scandir(folder) if entry.name.endswith(".batch")), reverse=True):
        if is_done(name.partition("-")[0], batch):
            break
        with contextlib.suppress(FileNotFoundError, SpoolDamaged):
            return taken | read_header((folder / name).read_bytes()).taken
    return taken


def _lane_folders(folder: Path) -> list[Path]:
    return sorted((path for path in folder.iterdir() if path.name.isdigit()), key=lambda path: int(path.name))
