"""The fast way, the slow way, and a way of the tests' own with the standard library's json must agree on every body."""

from __future__ import annotations

import gzip
import json
import re
import subprocess
import sys
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from penstock.errors import BatchTooLarge, EmptyBatch
from penstock.events import Group
from penstock.wire import route
from penstock.wire.route import Allows, Routed, Router, Stamp, is_device, is_field

DATA = Path(__file__).parent.parent / "data"
RECEIVED = "2026-11-22T14:03:21.123Z"
WHITE = b" \t\r"

KEYS = [
    b'"deviceId"', b'"device\\u0049d"', b'"\\u0064eviceId"', b'"x"', b'"receivedAt"', b'"received\\u0041t"', b'"properties"',
    b'"address"', b'"deviceId "', b'""', b'"DeviceId"', b'"\xc3\xa4"', b'"\\ud800"', b'"a\\"deviceId\\""',
]  # fmt: skip
VALUES = [
    b'"d-1"', b'"d-2"', b'"d-3"', b'"\\u0064-1"', b'"d\\u002d1"', b'"not a device"', b'""', b'"deviceId"', b'"receivedAt"', b"1",
    b"21.40", b"-0.0", b"1e999", b"1E+2", b"123456789012345678901234567890", b"01", b"NaN", b"Infinity", b"nul", b"null", b"true",
    b'{"deviceId":"d-9"}', b'{"receivedAt":1}', b'[1,{"deviceId":"q"}]', b"[]", b"{}", b"[{}\r]", b'"\\ud800"', b'"\\udc00\\ud800"',
    b'"\\ud83d\\ude00"', b'"\\ud83dx"', b'"\\\\ud800"', b'"\xc3\xa4"', b'"\xff"', b'"\xed\xa0\x80"', b'"\x00"', b'"\\q"', b'"\\/"',
    b'"d-1\\nd-2"', b'"' + b"l" * 70 + b'"', b'"}"', b'"}\\n{"', b"\xef\xbb\xbf1",
]  # fmt: skip
ODD_LINES = [
    b"", b" ", b"\r", b"{}", b"{ }", b"{", b"}", b"[1]", b'"x"', b"1", b"null", b"\xff", b"\xef\xbb\xbf{}", b"]}", b",",
    b'{"deviceId":"d-1"}{"deviceId":"d-2"}', b'{"deviceId":"d-1"} {"deviceId":"d-2"}', b'{"deviceId":"d-1","x":{}',
    b'{"deviceId":"d-1","x":[', b'{"y":1}', b'{"deviceId":"d-1","deviceId":"d-1"}', b'{"deviceId":"d-1","device\\u0049d":"d-1"}',
    b'{"deviceId":"d-1","deviceId"\r:"d-1"}', b'{"deviceId"\t: "d-1"}', b"{\x0b}", b'{"deviceId":"d-1"}\x0c', b'{"a":1}}', b'{"x":{}}',
    b'{"deviceId":"d-1","receivedAt":null}', b'{"deviceId":"d-1","x":{"receivedAt":1}}', b'{"deviceId":"d-1","receivedAt"\r:1}',
]  # fmt: skip

white = st.sampled_from([b"", b"", b"", b"", b" ", b"\t", b"\r"])
fields = st.one_of(
    st.tuples(st.just(b'"deviceId"'), st.sampled_from(VALUES[:3])),
    st.tuples(st.just(b'"x"'), st.sampled_from(VALUES)),
    st.tuples(st.sampled_from(KEYS), st.sampled_from(VALUES)),
)


@st.composite
def objects(draw: st.DrawFn) -> bytes:
    drawn = draw(st.lists(fields, max_size=4))
    inner = b",".join(
        draw(white) + key + draw(white) + b":" + draw(white) + value + draw(white) for key, value in drawn
    )
    return draw(white) + b"{" + inner + b"}" + draw(white)


plain_lines = st.builds(
    lambda device, value: b'{"deviceId":"%b","x":%b}' % (device, value),
    st.sampled_from([b"d-1", b"d-2", b"d-3", b"d-4"]),
    st.sampled_from([b"1", b'"}"', b"{}", b'{"y":[]}', b'"\\u00e4"', b'"\xc3\xa4"', b"1e999", b'"' + b"l" * 90 + b'"']),
)
undeviced_lines = st.sampled_from([b'{"x":1}', b'{"x":{}}', b'{"y":"\xc3\xa4"}', b"{}", b'{"address":"d-1"}'])


@st.composite
def bodies(draw: st.DrawFn) -> bytes:
    """Mostly what the fast way takes, with a few lines that are not."""
    lines = draw(st.lists(draw(st.sampled_from([plain_lines, plain_lines, undeviced_lines])), max_size=12))
    for odd in draw(st.lists(st.one_of(objects(), st.sampled_from(ODD_LINES)), max_size=3)):
        lines.insert(draw(st.integers(0, len(lines))), odd)
    ends = st.sampled_from([b"\n", b"\n", b"\n", b"\n", b"\r\n", b"\n\n", b" \n"])
    body = b"".join(line + draw(ends) for line in lines)
    return body[:-1] if draw(st.booleans()) else body


class Judged(NamedTuple):
    code: str | None
    device: str = ""
    line: bytes = b""


def oracle(
    line: bytes,
    *,
    field: str,
    device: str | None,
    properties: bytes,
    event_bytes_max: int,
    allows: Allows | None = None,
) -> Judged:
    """What becomes of a line, by the contract and the standard library."""
    judged = judge(line, field=field, device=device, properties=properties, event_bytes_max=event_bytes_max)
    if judged.code is None and allows is not None and not allows(judged.device):
        return Judged("forbidden_device")
    return judged


def judge(line: bytes, *, field: str, device: str | None, properties: bytes, event_bytes_max: int) -> Judged:
    """The same for one who may send for every device."""
    line = line.rstrip(WHITE)
    if len(line) > event_bytes_max:
        return Judged("event_too_large")
    try:
        text = line.decode()
    except UnicodeDecodeError:
        return Judged("not_utf8")
    try:
        pairs = json.loads(text, parse_constant=int, parse_int=str, parse_float=str, object_pairs_hook=tuple)
        plain = json.loads(text, parse_int=str, parse_float=str)
    except ValueError:
        return Judged("not_json")
    try:
        json.dumps([plain, pairs], ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return Judged("not_json")
    if not isinstance(plain, dict):
        return Judged("not_an_object")
    if "receivedAt" in plain or (properties and "properties" in plain):
        return Judged("reserved_field")
    named = [value for key, value in pairs if key == field]
    if not named:
        if device is None:
            return Judged("no_device")
        return Judged(None, device, line) if is_device(device) else Judged("bad_device")
    # Numbers are strings here too, so what stands in the text decides.
    is_text = isinstance(named[0], str) and json.loads(text)[field] == named[0]
    if len(named) > 1 or not is_text or not is_device(named[0]) or (device is not None and named[0] != device):
        return Judged("bad_device")
    return Judged(None, named[0], line)


def stamped(judged: Judged, *, field: str, device: str | None, properties: bytes) -> bytes:
    inner = judged.line[:-1]
    tail = b'"receivedAt":"%b"' % RECEIVED.encode() + (b',"properties":' + properties if properties else b"") + b"}\n"
    if device is not None and field not in json.loads(judged.line):
        tail = b'"%b":"%b",' % (field.encode(), device.encode()) + tail
    return inner + (b"" if inner.rstrip(WHITE).endswith(b"{") else b",") + tail


def check(
    router: Router,
    body: bytes,
    *,
    field: str,
    device: str | None,
    properties: bytes,
    limits: dict[str, int],
    allows: Allows | None = None,
) -> bool:
    """Both ways, and the result against the oracle. True when the fast way was sure."""
    given_stamp = Stamp(RECEIVED, properties, device or "", field)
    fast = fast_way(router, body, given_stamp, field, device, allows)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(route, "DEVICES_CACHED_MAX", 0)
        assert fast_way(router, body, given_stamp, field, device, allows) == fast
    lines = [line for line in body.split(b"\n") if line.strip(WHITE)]
    if not lines or len(lines) > limits["events_max"]:
        with pytest.raises(BatchTooLarge if lines else EmptyBatch):
            router._slow(body, given_stamp, field, device, allows)
        assert fast is None
        return False
    slow = router._slow(body, given_stamp, field, device, allows)
    if fast is not None:
        assert fast == slow
    assert router.route(body, given_stamp, field=field, device=device, allows=allows) == slow
    bound = limits["event_bytes_max"]
    judged = [
        oracle(line, field=field, device=device, properties=properties, event_bytes_max=bound, allows=allows)
        for line in lines
    ]
    assert [(r.index, r.code) for r in slow.rejected] == [(i, j.code) for i, j in enumerate(judged) if j.code]
    assert slow.accepted + len(slow.rejected) == len(lines)
    expected: dict[int, list[bytes]] = {}
    for one in judged:
        if one.code is None:
            partition = zlib.crc32(one.device.encode()) % 3
            expected.setdefault(partition, []).append(stamped(one, field=field, device=device, properties=properties))
    check_groups(slow.groups, expected, limits["frame_bytes_max"])
    return fast is not None


def fast_way(
    router: Router, body: bytes, stamp: Stamp, field: str, device: str | None, allows: Allows | None
) -> Routed | None:
    try:
        return router._fast(body, stamp, field, device, allows)
    except route._NotSure:
        return None


def check_groups(groups: Sequence[Group], expected: dict[int, list[bytes]], frame_bytes_max: int) -> None:
    found: dict[int, list[bytes]] = {}
    for group in groups:
        content = group.content
        lines = [line + b"\n" for line in content.split(b"\n")[:-1]]
        assert group.count == len(lines)
        assert len(content) <= frame_bytes_max or group.count == 1
        for line in lines:
            json.loads(line)
        found.setdefault(group.partition, []).extend(lines)
    assert found == expected


@settings(max_examples=1500, deadline=None)
@given(
    body=bodies(),
    field=st.sampled_from(["deviceId", "deviceId", "deviceId", "address"]),
    device=st.sampled_from([None, None, None, "d-1", "d-2", "not a device"]),
    properties=st.sampled_from([b"", b"", b'{"site":"A"}']),
    limits=st.fixed_dictionaries(
        {
            "events_max": st.sampled_from([10_000, 10_000, 8]),
            "event_bytes_max": st.sampled_from([262_144, 262_144, 80]),
            "frame_bytes_max": st.sampled_from([262_144, 200]),
        }
    ),
    allowed=st.sampled_from([None, None, {"d-1"}, {"d-1", "d-2"}, {"d-1", "d-2", "d-3", "d-4"}, set()]),
)
@example(
    body=b'{"deviceId":"a","x":{"y":1}\n}\n{"deviceId":"b"}{"deviceId":"c"}\n',
    field="deviceId",
    device=None,
    properties=b"",
    limits={"events_max": 9, "event_bytes_max": 900, "frame_bytes_max": 900},
    allowed=None,
)
def test_fast_slow_and_oracle_agree(
    body: bytes,
    field: str,
    device: str | None,
    properties: bytes,
    limits: dict[str, int],
    allowed: set[str] | None,
) -> None:
    allows = None if allowed is None else allowed.__contains__
    check(Router(3, **limits), body, field=field, device=device, properties=properties, limits=limits, allows=allows)


LIMITS = {"events_max": 10_000, "event_bytes_max": 262_144, "frame_bytes_max": 262_144}
SPANNING = b'{"deviceId":"a","x":{"y":1}\n }\n{"deviceId":"b"}{"deviceId":"c"}\n'


class Anything:
    """Equal to everything: in the place of what a check compares with, it takes the check away."""

    def __eq__(self, other: object) -> bool:
        return True

    def __ne__(self, other: object) -> bool:
        return False

    __hash__ = None  # type: ignore[assignment]


def test_without_the_check_of_first_bytes_the_oracle_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {"field": "deviceId", "device": None, "properties": b"", "limits": LIMITS}
    check(Router(3), SPANNING, **given)
    monkeypatch.setattr(route, "_OPENING", Anything())
    with pytest.raises(AssertionError):
        check(Router(3), SPANNING, **given)


@pytest.mark.parametrize("device", [None, "d"])
@pytest.mark.parametrize("end", [b" ", b"\r", b"\n"])
def test_without_the_check_of_sizes_the_oracle_fails(
    monkeypatch: pytest.MonkeyPatch, device: str | None, end: bytes
) -> None:
    body = b'{"x":1}\n{"x":2}%b\n' % end
    body = body if device else body.replace(b"{", b'{"deviceId":"d",')
    given: dict[str, Any] = {"field": "deviceId", "device": device, "properties": b"", "limits": LIMITS}
    assert not check(Router(3), body, **given)
    monkeypatch.setattr(route, "_adds_up", lambda *_: True)
    if end != b"\n":  # an empty line is found by other checks too
        with pytest.raises(AssertionError):
            check(Router(3), body, **given)


def test_without_the_check_of_escapes_the_oracle_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    body = b'{"deviceId":"d-1","device\\u0049d":"d-1"}\n'
    given: dict[str, Any] = {"field": "deviceId", "device": None, "properties": b"", "limits": LIMITS}
    check(Router(3), body, **given)
    monkeypatch.setattr(route, "_SUSPICIOUS", re.compile(rb"(?!)"))
    with pytest.raises(AssertionError):
        check(Router(3), body, **given)


@pytest.mark.parametrize(("device", "line"), [(None, b'{"deviceId":"d-2","x":1}'), ("d-2", b'{"x":1}')])
def test_devices_that_are_not_allowed_are_left_to_the_slow_way(device: str | None, line: bytes) -> None:
    given: dict[str, Any] = {"field": "deviceId", "device": device, "properties": b"", "limits": LIMITS}
    body = (line + b"\n") * 50
    assert check(Router(3), body, **given, allows={"d-2"}.__contains__)
    assert not check(Router(3), body, **given, allows={"d-1"}.__contains__)
    rejected = Router(3).route(body, Stamp(RECEIVED, b"", device or ""), device=device, allows={"d-1"}.__contains__)
    assert ({one.code for one in rejected.rejected}, rejected.accepted) == ({"forbidden_device"}, 0)


@pytest.mark.parametrize("device", [None, "d-1"])
@pytest.mark.parametrize("properties", [b"", b'{"site":"A"}'])
def test_the_usual_bodies_take_the_fast_way(device: str | None, properties: bytes) -> None:
    given: dict[str, Any] = {"field": "deviceId", "device": device, "properties": properties, "limits": LIMITS}
    assert check(Router(3), b'{"deviceId":"d-1","x":1}\n' * 50, **given)
    assert check(Router(3), b'{"deviceId":"d-1","x":"\xc3\xa4 \\n \\u00e4"}', **given)
    if device:
        assert check(Router(3), b'{"x":1}\n' * 50, **given)


def test_real_events() -> None:
    body = gzip.decompress((DATA / "flights-sample.ndjson.gz").read_bytes())
    router = Router(3, frame_bytes_max=100_000)
    limits = LIMITS | {"frame_bytes_max": 100_000}
    assert check(router, body, field="deviceId", device=None, properties=b"", limits=limits)


def test_large_events_and_groups_that_are_split() -> None:
    lines = [b'{"deviceId":"d-%d","x":"%b"}' % (n % 5, b"y" * (n * 700)) for n in range(200)]
    lines.append(b'{"deviceId":"d-1","x":"%b"}' % (b"y" * (262_144 - 25)))
    assert len(lines[-1]) == 262_144
    given: dict[str, Any] = {"field": "deviceId", "device": None, "properties": b"", "limits": LIMITS}
    assert check(Router(3), b"\n".join(lines), **given)
    lines.append(lines[-1] + b" ")
    assert not check(Router(3), b"\n".join(lines), **given)
    lines.append(lines[-1].replace(b"d-1", b"d-12"))
    assert not check(Router(3), b"\n".join(lines), **given)
    assert Router(3).route(lines[-1], Stamp(RECEIVED)).rejected[0].code == "event_too_large"


@pytest.mark.parametrize("end", [b" ", b"\r", b"\t \r"])
def test_without_the_check_of_sizes_the_oracle_fails_for_one_line(monkeypatch: pytest.MonkeyPatch, end: bytes) -> None:
    given: dict[str, Any] = {"field": "deviceId", "device": None, "properties": b"", "limits": LIMITS}
    body = b'{"deviceId":"d","x":1}%b\n' % end
    assert not check(Router(3), body, **given)
    monkeypatch.setattr(route, "_adds_up", lambda *_: True)
    with pytest.raises(AssertionError):
        check(Router(3), body, **given)


@pytest.mark.parametrize("more", [-40, -1, 0, 1, 2])
def test_one_line_alone_has_the_same_bound_as_among_others(more: int) -> None:
    given: dict[str, Any] = {"field": "deviceId", "device": None, "properties": b"", "limits": LIMITS}
    line = b'{"deviceId":"d","x":"%b"}' % (b"y" * (262_144 - 23 + more))
    assert len(line) == 262_144 + more
    small = b'{"deviceId":"d"}'
    for body in (line, line + b"\n", line + b"\n" + small, small + b"\n" + line + b"\n"):
        check(Router(3), body, **given)
        rejected = Router(3).route(body, Stamp(RECEIVED)).rejected
        assert [one.code for one in rejected] == ["event_too_large"] * (more > 0)


@pytest.mark.parametrize("body", [b'{"deviceId":"d",\n"x":1}\n', b'{\n"deviceId":"d"}', b'{"deviceId":"d"\n}\n'])
def test_an_object_over_several_lines_is_no_event(body: bytes) -> None:
    """It would be stored with its line feeds, and no line of the file would be JSON."""
    given: dict[str, Any] = {"field": "deviceId", "device": None, "properties": b"", "limits": LIMITS}
    assert not check(Router(3), body, **given)
    assert Router(3).route(body, Stamp(RECEIVED)).accepted == 0


@pytest.mark.parametrize("line", [b' {"deviceId":"d"}', b'\t{"deviceId":"d"}', b'[{"deviceId":"d"}]', b'"deviceId"'])
def test_one_line_that_begins_otherwise(line: bytes) -> None:
    given: dict[str, Any] = {"field": "deviceId", "device": None, "properties": b"", "limits": LIMITS}
    assert not check(Router(3), line + b"\n", **given)


def test_the_number_of_events_is_bounded() -> None:
    line = b'{"deviceId":"d-1"}\n'
    router = Router(3, events_max=5)
    assert router.route(line * 5, Stamp(RECEIVED)).accepted == 5
    assert router.route((line + b"\n") * 5, Stamp(RECEIVED)).accepted == 5
    for body in (line * 6, line * 6 + b"x", (b"x\n") * 6):
        with pytest.raises(BatchTooLarge) as refused:
            router.route(body, Stamp(RECEIVED))
        assert refused.value.fields == {"limit_events": 5}


@pytest.mark.parametrize("depth", [100, 900, 990, 994, 995, 996, 997, 998, 1000, 10_000, 100_000])
@pytest.mark.parametrize("pair", [(b"[", b"]"), (b'{"a":', b"}")], ids=["arrays", "objects"])
def test_deep_nesting_is_judged(depth: int, pair: tuple[bytes, bytes]) -> None:
    """How deep the decoder goes depends on the stack of the caller, but there is always an answer."""
    event = b'{"deviceId":"d-1","x":' + pair[0] * depth + b"1" + pair[1] * depth + b"}"
    for body in (event, event[:-1], event + b"\n{}"):
        routed = Router(3, event_bytes_max=1 << 20).route(body, Stamp(RECEIVED))
        assert routed.accepted + len(routed.rejected) == 1 + body.endswith(b"{}")
        if depth >= 1000 or not body.endswith(b"}"):
            assert routed.rejected[0].code == "not_json"


@pytest.mark.parametrize("name", ["receivedAt", "properties", "", "1a", "a b", 'a"b', "a\\b", "a" * 65, "ä", "a\n"])
def test_names_that_cannot_be_device_fields(name: str) -> None:
    assert not is_field(name)


@pytest.mark.parametrize("name", ["deviceId", "address", "_a", "a.b-c_d", "a" * 64])
def test_names_of_device_fields(name: str) -> None:
    assert is_field(name)


@pytest.mark.parametrize("device", ["d-1", "A", "0", "a.b_c:d@e-f", "a" * 128])
def test_device_ids(device: str) -> None:
    assert is_device(device)


@pytest.mark.parametrize("device", ["", "-a", ".a", "a b", "a/b", "ä", "a" * 129, "a\n", "a\x00"])
def test_what_is_no_device_id(device: str) -> None:
    assert not is_device(device)


def test_the_cache_of_devices_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(route, "DEVICES_CACHED_MAX", 10)
    router = Router(3)
    for n in range(100):
        routed = router.route(b'{"deviceId":"d-%d"}' % n, Stamp(RECEIVED))
        assert routed.groups[0].partition == zlib.crc32(b"d-%d" % n) % 3
        assert len(router._partition_of) <= 10


BOMBS = {
    "line feeds": 'b"\\n" * (16 << 20)',
    "short lines": 'b"11\\n" * (5 << 20)',
    "spaces": 'b" " * (16 << 20)',
    "lines of spaces": 'b"  \\n" * (5 << 20)',
    "braces": 'b"{}\\n" * (5 << 20)',
    "braces in one line": 'b"{}" * (8 << 20)',
    "objects in few lines": """(b'{"x":1}' * 400 + b"\\n") * 6000""",
}
CODES = {
    "line feeds": "empty_batch",
    "spaces": "empty_batch",
    "lines of spaces": "empty_batch",
    "braces in one line": "event_too_large",
    "objects in few lines": "not_json",
}


@pytest.mark.parametrize("device", [None, "d"])
@pytest.mark.parametrize("bomb", BOMBS)
def test_bodies_of_many_lines_take_no_memory(bomb: str, device: str | None) -> None:
    script = f"""
import resource
from penstock.errors import PenstockError
from penstock.wire.route import Router, Stamp
body = {BOMBS[bomb]}
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    code = Router(4).route(body, Stamp("T", device="d"), device={device!r}).rejected[0].code
except PenstockError as error:
    code = error.code
print(code, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    code, grown_mib = done.stdout.split()
    assert code == CODES.get(bomb, "batch_too_large")
    assert int(grown_mib) < 40
