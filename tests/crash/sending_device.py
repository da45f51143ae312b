"""A device that sends numbered events without pause, and says what was promised for them: `sending_device.py NAME URL SPOOL OPTIONS`.

Each line on stdout is written out before the next step: `sending N` before `send(N)`; `durable WHO N…` when these would survive
a power cut; `failed WHY` when `send` has raised an OSError, then no more events come. In a `group` round WHO is the thread
whose sync it was, for `each` it is `send`.
"""

from __future__ import annotations

import os
import re
import signal
import sys
import threading
from pathlib import Path

import msgspec

from penstock import Client
from penstock.client import sending
from penstock.files import Appending, Files

_NUMBER = re.compile(rb'"n":(\d+)')
_saying = threading.Lock()


def say(*words: object) -> None:
    text = " ".join(map(str, words)).encode() + b"\n"
    with _saying:
        while text:
            text = text[os.write(1, text) :]


class Telling(Appending):
    """Says which events a sync has made durable: those that were written before it began."""

    def __init__(self, files: Files, path: Path, fd: int) -> None:
        super().__init__(files, path, fd)
        self._numbers: list[int] = []
        self._told = 0

    def write(self, body: bytes) -> None:
        super().write(body)
        self._numbers += map(int, _NUMBER.findall(body))

    def sync(self) -> None:
        count = len(self._numbers)
        super().sync()
        if count > self._told:
            told, self._told = self._told, count
            say("durable", threading.current_thread().name, *self._numbers[told:count])


class TellingFiles(Files):
    def append(self, path: Path) -> Appending:
        return Telling(self, path, self._open_new(path))


class Options(msgspec.Struct, frozen=True):
    each: bool
    lanes: int
    batch_events: int
    careless: bool = False


def careless_sync(self: Files, fd: int) -> None: ...


def main(name: str, url: str, spool: str, options: Options) -> None:
    sending.BACKOFF_S, sending.PAUSE_S = (0.01, 0.1), (0.02, 0.1)
    if options.careless:
        Files._fsync = careless_sync  # type: ignore[method-assign]
    client = Client(
        url,
        spool=spool,
        lanes=options.lanes,
        batch_events=options.batch_events,
        linger_s=0.05,
        sync="each" if options.each else "group",
        files=Files() if options.each else TellingFiles(),
        timeout_s=5,
    )
    number = 0
    try:
        while True:
            say("sending", number)
            client.send({"deviceId": f"{name}-{number % 5}", "n": number})
            if options.each:
                say("durable", "send", number)
            number += 1
    except OSError as error:
        say("failed", error)
        signal.pause()


if __name__ == "__main__":
    main(*sys.argv[1:4], msgspec.json.decode(sys.argv[4], type=Options))
