"""What is sent, the same bytes for the same seed, and the codec floor: what unzip and zip of it cost on one core."""

from __future__ import annotations

import gzip
import random
import time
from collections.abc import Sequence

from isal import isal_zlib

EVENT_BYTES = 240
_DAY_MS = 86_400_000
_STATES = ("ok", "ok", "ok", "ok", "idle", "charging", "degraded")


def telemetry(count: int, *, devices: int, seed: int) -> list[bytes]:
    """`count` events of `EVENT_BYTES` (with the line feed), from `devices` devices, each a JSON object in one line."""
    rng = random.Random(seed)
    lines = []
    at_ms = rng.randrange(_DAY_MS)
    for _ in range(count):
        at_ms = (at_ms + rng.randrange(40)) % _DAY_MS
        seconds, ms = divmod(at_ms, 1000)
        minutes, second = divmod(seconds, 60)
        device = rng.randrange(devices)
        line = (
            f'{{"deviceId":"device-{device:06d}","at":"2026-11-22T{minutes // 60:02d}:{minutes % 60:02d}:{second:02d}.{ms:03d}Z",'
            f'"temperature":{rng.gauss(21.4, 4):.2f},"humidity":{rng.gauss(45, 9):.1f},"pressure":{rng.gauss(1013, 6):.2f},'
            f'"lat":{rng.uniform(47, 55):.6f},"lon":{rng.uniform(10, 15):.6f},"vibration":[{rng.random():.5f},{rng.random():.5f}],'
            f'"battery":{rng.uniform(3.2, 4.2):.3f},"rssi":{rng.randrange(-98, -41)},"state":"{rng.choice(_STATES)}"'
        )
        rest = EVENT_BYTES - len(line) - len(',"id":""}\n')
        lines.append(f'{line},"id":"{rng.getrandbits(4 * rest):0{rest}x}"}}\n'.encode())
    return lines


def gzip_bodies(count: int, *, events: int, devices: int, seed: int) -> list[bytes]:
    """`count` distinct request bodies of `events` events each, zipped as a client does."""
    return [
        gzip.compress(b"".join(telemetry(events, devices=devices, seed=seed * 1_000_003 + number)), 6, mtime=0)
        for number in range(count)
    ]


def floor_ns(bodies: Sequence[bytes], *, events: int, seconds: float) -> float:
    """CPU ns for each event of isal's unzip and zip (level 1) of these bodies, one after the other, in this thread."""
    done = 0
    end = time.perf_counter() + seconds
    began_ns = time.thread_time_ns()
    while done == 0 or time.perf_counter() < end:
        isal_zlib.compress(isal_zlib.decompress(bodies[done % len(bodies)], 31), 1, 31)
        done += 1
    return (time.thread_time_ns() - began_ns) / (done * events)
