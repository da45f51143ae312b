"""What may come in: throughput units, the quotas of keys, and those of devices.

A unit is 1,000 events or 1,000,000 bytes a second, whichever comes first; bytes are those of the NDJSON that the hub will hold, so with
the server's stamp and before zip. When units are set, a partition takes 1,000 events a second at most. A batch is charged on
everything that limits it, or on nothing: when it is known what is in it, and before it is queued for the commit. How, stands in
buckets.py; what all workers know together lies in the memory of DATA/run/quota.

Who comes back is known by his key and his producer, and where he gives none by his key and what he sends, by his connection, or by where
he sends from.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from operator import attrgetter
from typing import Any, Final

import msgspec

from penstock.clock import Clock
from penstock.errors import ThroughputExceeded
from penstock.events import Batch, Group
from penstock.server.buckets import (
    BYTES,
    DEVICE_EVENTS,
    EVENTS,
    FIRST_PARTITION,
    KEY_BYTES,
    KEY_EVENTS,
    OF_DEVICE,
    OF_PARTITION,
    OF_UNITS,
    Buckets,
    Refusal,
    Sender,
)
from penstock.server.crowd import subscriber
from penstock.server.message import Grant, Request
from penstock.server.shared import Shared
from penstock.telemetry.log import Log

UNIT_EVENTS_PER_S: Final = 1_000
UNIT_BYTES_PER_S: Final = 1_000_000
PARTITION_EVENTS_PER_S: Final = 1_000
LIMITS: Final = ("throughput_units", "partition", "key", "device")
"""What `limit` of a refusal may be, in the order of what a bucket belongs to."""

_BLIND_S = 1.0
_GZIP_HEAD_BYTES, _SEEN_BYTES = 10, 256
_DEVICE_OF = attrgetter("device")


class Quota:
    """The limits as one process enforces them. `device_events_per_s`: of each device; 0: unlimited. Thread-safe."""

    def __init__(
        self, shared: Shared, buckets: Buckets, clock: Clock, log: Log, *, device_events_per_s: int = 0
    ) -> None:
        self._shared = shared
        self._buckets = buckets
        self._clock = clock
        self._log = log
        self._device_events_per_s = device_events_per_s
        self._blind_until = 0.0

    def check(self, request: Request) -> None:
        """Before anything is unzipped: raises ThroughputExceeded for a client that comes back before its time."""
        buckets = self._buckets
        if not buckets.tickets:
            return
        now = self._clock.monotonic()
        sender = _sender(request)
        if not self._enter(now):
            return
        try:
            refusal = buckets.early(now, sender)
            if refusal is not None:
                buckets.count_refused(refusal.bucket)
        finally:
            self._leave()
        if refusal is not None:
            _note(request, sender, refusal)
            raise self._exceeded(refusal, now, {})

    def charge(self, request: Request, batch: Batch, size: int) -> None:
        """Charge a batch of `size` bytes. Raises ThroughputExceeded: nothing was charged."""
        units, grant = self._buckets.units, request.grant
        if not units and not self._device_events_per_s and grant.events_per_s is None and grant.bytes_per_s is None:
            return
        costs: dict[int, float] = {}
        if units:
            costs[EVENTS] = batch.accepted / (units * UNIT_EVENTS_PER_S)
            costs[BYTES] = size / (units * UNIT_BYTES_PER_S)
            for group in batch.groups:
                bucket = FIRST_PARTITION + group.partition
                costs[bucket] = costs.get(bucket, 0.0) + group.count / PARTITION_EVENTS_PER_S
        names = _key_names(grant, batch.accepted, size)
        devices = self._device_names(batch)
        now = self._clock.monotonic()
        sender = _sender(request)
        if not self._enter(now):
            return
        try:
            buckets = self._buckets
            buckets.sweep(now)
            buckets.named((*names, *((name, cost) for name, (_, cost) in devices.items())), costs, now)
            refusal = buckets.take(now, sender, costs)
            if refusal is None:
                buckets.note(now, batch.accepted, size)
            else:
                buckets.count_refused(refusal.bucket)
        finally:
            self._leave()
        _note(request, sender, refusal)
        if refusal is not None:
            raise self._exceeded(refusal, now, devices)

    def _device_names(self, batch: Batch) -> Mapping[int, tuple[str, float]]:
        rate = self._device_events_per_s
        if not rate:
            return {}
        return {
            _name(b"d" + device.encode(), DEVICE_EVENTS): (device, count / rate)
            for device, count in _devices(batch.groups, batch.device_field).items()
        }

    def _enter(self, now: float) -> bool:
        """False while another process keeps the lock: that is rather a time without limits than one without events."""
        if now < self._blind_until:
            return False
        if not self._shared.acquire():
            self._blind_until = now + _BLIND_S
            self._log.warning(
                "The limits of throughput are not enforced: another process keeps their lock.", s=_BLIND_S
            )
            return False
        self._buckets.enter()
        return True

    def _leave(self) -> None:
        self._buckets.leave()
        self._shared.release()

    def _exceeded(self, refusal: Refusal, now: float, devices: Mapping[int, tuple[str, float]]) -> ThroughputExceeded:
        buckets, bucket = self._buckets, refusal.bucket
        kind = buckets.kind(bucket)
        fields: dict[str, object] = {}
        if kind == OF_UNITS:
            most = f"{buckets.units * UNIT_EVENTS_PER_S:,} events and {buckets.units * UNIT_BYTES_PER_S:,} bytes"
            whose = f"throughput units: {buckets.units}, which take {most} a second"
        elif kind == OF_PARTITION:
            fields = {"partition": bucket - FIRST_PARTITION}
            whose = f"partition {bucket - FIRST_PARTITION} takes {PARTITION_EVENTS_PER_S:,} events a second"
        elif kind == OF_DEVICE:
            whose = f"a device may send {self._device_events_per_s:,} events a second"
            if (device := devices.get(buckets.name(bucket))) is not None:
                fields = {"device": device[0]}
                whose += f", and {device[0]} has sent more"
        else:
            whose = "the key's quota is used up"
        wait_s = refusal.due - now
        return ThroughputExceeded(
            f"Too much at once: {whose}. Nothing of the batch was stored: keep it and send the same again in {wait_s:.1f} s.",
            limit=LIMITS[kind],
            **fields,
            retry_after_s=math.ceil(wait_s * 1000 - 0.001) / 1000,
        )


def _key_names(grant: Grant, events: int, size: int) -> Iterable[tuple[int, float]]:
    if grant.events_per_s is not None:
        yield _name(b"k" + grant.key.encode(), KEY_EVENTS), events / grant.events_per_s
    if grant.bytes_per_s is not None:
        yield _name(b"k" + grant.key.encode(), KEY_BYTES), size / grant.bytes_per_s


def _name(text: bytes, kind: int) -> int:
    """A number for a name, the same in all processes. Its last two bits are the kind, so that two never share one."""
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") & ~7 | 4 | kind


def account(request: Request) -> str:
    """Who answers for a request, when it comes to a fair share: its key, without one its address."""
    return request.grant.key or subscriber(request.peer)


def _sender(request: Request) -> Sender:
    numbered = request.headers.get(b"penstock-producer")
    key = request.grant.key.encode()
    crowd = _name(b"c" + account(request).encode(), 0)
    if numbered is not None:
        return Sender(_name(b"%b\0p%b" % (key, numbered.partition(b";")[0]), 0), crowd=crowd)
    # Not the first bytes: gzip has the time there, and who zips again before he sends again is still the same.
    body, size = request.body, len(request.body)
    ends = body[_GZIP_HEAD_BYTES:_SEEN_BYTES], body[max(_GZIP_HEAD_BYTES, size - _SEEN_BYTES) :]
    holder = _name(b"%b\0b%b\0%d\0%b\0%b" % (key, request.path, size, *ends), 0)
    peer, line = _name(b"%b\0a%b" % (key, request.peer.encode()), 0), request.line
    return Sender(holder, peer, crowd, line.waits if line is not None and line.whose == peer else 0)


def _note(request: Request, sender: Sender, refusal: Refusal | None) -> None:
    """For the next request of the connection, if it comes with the same key: a proxy's may come with another."""
    if request.line is not None:
        request.line.whose = sender.peer
        request.line.waits = sender.holder if refusal is not None and refusal.ticket else 0


def _devices(groups: Iterable[Group], field: str) -> Counter[str]:
    """Events by device."""
    decode_lines = _decoder(field).decode_lines
    return Counter(device for group in groups for device in map(_DEVICE_OF, decode_lines(group.content)))


@functools.lru_cache(maxsize=64)
def _decoder(field: str) -> msgspec.json.Decoder[Any]:
    return msgspec.json.Decoder(msgspec.defstruct("Line", [("device", str)], rename={"device": field}, gc=False))
