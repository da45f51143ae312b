"""Throughput units: what is in force, kept in DATA/units.json, and shown and changed through `/v1/throughput-units`."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

import msgspec

from penstock.clock import Clock
from penstock.errors import BadParameter, HubUnavailable, SettingsError
from penstock.files import Files
from penstock.server.buckets import Buckets, size_of
from penstock.server.message import Request, Response
from penstock.server.quota import LIMITS, UNIT_BYTES_PER_S, UNIT_EVENTS_PER_S
from penstock.server.shared import Shared

UNITS_MOST: Final = 1_000_000
STORED_BYTES_PER_UNIT: Final = 84_000_000_000

_FILE, _LOCK, _MEMORY = "units.json", "units.lock", "quota"


class _Wanted(msgspec.Struct):
    """`null` and 0 mean that there is no limit. JSON knows one kind of number: 20 is also written 20.0."""

    throughput_units: float | None


class Throughput(msgspec.Struct, frozen=True):
    """What is in force and what it does. `throughput_units` None: unlimited, and then nothing is counted.

    `events_per_s` and `bytes_per_s` are what units allow, `used_…` what came in on the average of the last five seconds. `refused`: batches
    by what refused them, since the machine was started. `waiting`: clients that were told when to come back.
    """

    throughput_units: int | None
    events_per_s: int | None
    bytes_per_s: int | None
    used_events_per_s: float
    used_bytes_per_s: float
    refused: Mapping[str, int]
    waiting: int


def read_units(data: Path) -> int:
    """What was set for this data folder; 0: unlimited. Raises SettingsError."""
    try:
        return int(msgspec.json.decode((data / _FILE).read_bytes(), type=_Wanted).throughput_units or 0)
    except FileNotFoundError:
        return 0
    except (OSError, msgspec.DecodeError) as error:
        raise SettingsError(
            f"{data / _FILE} cannot be read: {error}. Put it right, or delete it and set the throughput units again."
        ) from error


def write_units(data: Path, files: Files, units: int) -> None:
    """Durable when it returns."""
    files.replace(data / _FILE, msgspec.json.encode(_Wanted(units or None)))


def prepare(data: Path, run: Path, partitions: int, given: int | None) -> None:
    """Before an installation starts: what it is given explicitly is kept, else what was set before is in force. Raises SettingsError."""
    files = Files()
    try:
        if given is not None:
            write_units(data, files, given)
        units = read_units(data)
        shared, buckets = open_buckets(data, run, files, partitions)
        try:
            with _locked(shared, buckets):
                buckets.set_units(units)
        finally:
            shared.close()
    except OSError as error:
        raise SettingsError(
            f"The throughput units cannot be kept in {data}: {error.strerror}. Nothing was started."
        ) from error


def open_buckets(data: Path, run: Path, files: Files, partitions: int) -> tuple[Shared, Buckets]:
    """What the processes of an installation share, made if it is not there. Raises OSError, SettingsError."""
    shared = Shared(files, run / _MEMORY, size_of(partitions))
    buckets = Buckets(shared.memory, partitions)
    try:
        if not buckets.belongs_to(_boot()):
            _begin(shared, buckets, read_units(data))
    except BaseException:
        shared.close()
        raise
    return shared, buckets


def _begin(shared: Shared, buckets: Buckets, units: int) -> None:
    if not shared.acquire():
        raise TimeoutError(errno.ETIMEDOUT, "another process keeps the lock of the throughput units")
    try:
        if not buckets.belongs_to(_boot()):
            buckets.begin(_boot())
            buckets.set_units(units)
    finally:
        shared.release()


def observe(data: Path, run: Path, partitions: int, clock: Clock) -> Throughput:
    """What is in force, from the data folder alone. Makes nothing. Raises SettingsError."""
    try:
        memory = memoryview((run / _MEMORY).read_bytes())
    except OSError:
        memory = memoryview(b"")
    if len(memory) >= size_of(partitions):
        buckets = Buckets(memory, partitions)
        if buckets.belongs_to(_boot()):
            return report(buckets, clock)
    unused = Buckets(memoryview(bytearray(size_of(partitions))), partitions)
    unused.set_units(read_units(data))
    return report(unused, clock)


def report(buckets: Buckets, clock: Clock) -> Throughput:
    units, (events, size) = buckets.units, buckets.use(clock.monotonic())
    return Throughput(
        throughput_units=units or None,
        events_per_s=units * UNIT_EVENTS_PER_S or None,
        bytes_per_s=units * UNIT_BYTES_PER_S or None,
        used_events_per_s=events,
        used_bytes_per_s=size,
        refused=dict(zip(LIMITS, buckets.refused(), strict=True)),
        waiting=buckets.tickets,
    )


class Units:
    """The two requests. They block, and are for any thread."""

    def __init__(self, data: Path, run: Path, files: Files, shared: Shared, buckets: Buckets, clock: Clock) -> None:
        self._data = data
        self._lock = run / _LOCK
        self._files = files
        self._shared = shared
        self._buckets = buckets
        self._clock = clock

    def get(self, _request: Request, _names: tuple[str, ...]) -> Response:
        return Response(200, msgspec.json.encode(report(self._buckets, self._clock)))

    def put(self, request: Request, names: tuple[str, ...]) -> Response:
        """In force in all processes, and kept, when it is answered."""
        units = _wanted(request.body)
        try:
            # Not the lock of the buckets: nobody's events wait for this disk.
            with self._files.lock(self._lock):
                write_units(self._data, self._files, units)
                with _locked(self._shared, self._buckets):
                    self._buckets.set_units(units)
        except OSError as error:
            raise HubUnavailable(
                f"The throughput units could not be set: {error}. Ask for them, and set them again."
            ) from error
        return self.get(request, names)


def _wanted(body: bytes) -> int:
    try:
        units = msgspec.json.decode(body, type=_Wanted).throughput_units or 0
        if 0 <= units <= UNITS_MOST and units == int(units):
            return int(units)
        reason = f"it is no whole number within 0 and {UNITS_MOST:,}"
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        reason = str(error)
    raise BadParameter(
        'The body is `{"throughput_units": N}`, with null or 0 for no limit: ' + reason + ".",
        parameter="throughput_units",
    )


@contextlib.contextmanager
def _locked(shared: Shared, buckets: Buckets) -> Iterator[None]:
    """Raises TimeoutError when another process keeps the lock."""
    if not shared.acquire():
        raise TimeoutError(errno.ETIMEDOUT, "another process keeps the lock of the throughput units")
    try:
        buckets.enter()
        yield
        buckets.leave()
    finally:
        shared.release()


def _boot() -> bytes:
    """Which start of the machine this is: the monotonic clock counts from there."""
    text = Path("/proc/sys/kernel/random/boot_id").read_text()
    return bytes.fromhex(text.strip().replace("-", ""))
