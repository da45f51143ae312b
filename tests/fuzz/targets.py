"""What is fuzzed. A target takes any bytes, gives them to one part of Penstock, and fails when that breaks its word.

Everywhere: nothing but the part's own errors comes out, and what comes out is bounded. Beyond that each says what must hold.
The first bytes of an input choose among the ways to use the part, so that what follows stays readable in the corpus.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import struct
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Final, NamedTuple, TypeVar
from urllib.parse import quote, unquote_to_bytes

import msgspec
import zstandard
from msgspec.structs import replace

from penstock import sas
from penstock.access import address
from penstock.archive.ledger import Gap, Ledger, Record, owner, record_name
from penstock.client.answers import Again, Settled, reaction
from penstock.client.records import read_batch
from penstock.client.transport import Answer
from penstock.errors import (
    ArchiveError,
    BatchRefused,
    FrameDamaged,
    HubError,
    PenstockError,
    SettingsError,
    SpoolDamaged,
    StoreError,
    Unauthenticated,
)
from penstock.events import FrameKind
from penstock.processor.lease import decode_lease, encode_lease
from penstock.server import trace
from penstock.server.auth import KeyGuard, _ring
from penstock.server.ingest import _properties
from penstock.server.keys import Key
from penstock.server.keys import decode as decode_keys
from penstock.server.keys import encode as encode_keys
from penstock.server.message import Request, Right
from penstock.server.numbers import _numbered, number_of
from penstock.server.parser import Limits, Parser
from penstock.server.read import Reads
from penstock.testing import FakeClock, MemoryBlobs, MemoryHub, MemoryLog
from penstock.wire import frame as frames
from penstock.wire.body import ndjson, unzip, unzipped_bytes
from penstock.wire.problem import rebuilt
from penstock.wire.route import Routed, Router, Stamp

T = TypeVar("T")

UNZIPPED_MAX: Final = 4096
EVENTS_MAX: Final = 12
EVENT_BYTES_MAX: Final = 160
FRAME_BYTES_MAX: Final = 240


class Given:
    """An input, taken from its beginning."""

    def __init__(self, data: bytes) -> None:
        self._data = data

    def byte(self) -> int:
        first, self._data = self._data[:1], self._data[1:]
        return first[0] if first else 0

    def one_of(self, choices: Sequence[T]) -> T:
        return choices[self.byte() % len(choices)]

    def rest(self) -> bytes:
        return self._data


# Bodies


def body(data: bytes) -> None:
    """A framing becomes lines, and lines go to partitions the same way, fast or slow."""
    given = Given(data)
    kind = given.one_of(
        ("application/x-ndjson", "application/json", "application/json; charset=utf-8", "text/plain", "")
    )
    field = given.one_of(("deviceId", "a", "x.y"))
    device = given.one_of((None, "d-1", "x", "not a device"))
    stamp = Stamp("2026-11-22T14:03:21.123Z", given.one_of((b"", b'{"site":"A"}')), device or "", field)
    try:
        lines = ndjson(given.rest(), kind, events_max=EVENTS_MAX)
    except BatchRefused:
        return
    assert len(lines) <= len(given.rest()) + len(given.rest()) // 2 + 2
    slow = routed(lambda: router()._slow(lines, stamp, field, device))
    assert routed(lambda: router().route(lines, stamp, field=field, device=device)) == slow
    if isinstance(slow, Routed):
        check(slow, lines)


def router() -> Router:
    return Router(3, events_max=EVENTS_MAX, event_bytes_max=EVENT_BYTES_MAX, frame_bytes_max=FRAME_BYTES_MAX)


def routed(act: Callable[[], Routed]) -> Routed | str:
    try:
        return act()
    except BatchRefused as error:
        return error.code


def check(result: Routed, lines: bytes) -> None:
    """Every line that is not blank is accounted for, and each that was taken is one JSON object in one line."""
    sent = sum(bool(line.strip(b" \t\r")) for line in lines.split(b"\n"))
    assert result.accepted + len(result.rejected) == sent
    assert sum(group.count for group in result.groups) == result.accepted
    for group in result.groups:
        assert group.content.endswith(b"\n") and group.content.count(b"\n") == group.count
        assert group.count == 1 or len(group.content) <= FRAME_BYTES_MAX
        for line in group.content.splitlines() if b"\r" not in group.content else ():
            event = msgspec.json.decode(line)
            assert isinstance(event, dict) and event["receivedAt"] == "2026-11-22T14:03:21.123Z"


def zipped(data: bytes) -> None:
    """Unzipping is bounded, and gives what the reference gives, or refuses."""
    given = Given(data)
    encoding = given.one_of(("gzip", "zstd", "identity", "br"))
    how = given.byte() % 3
    packed = given.rest()
    if how:  # something that was whole, and has one byte changed or is cut
        at = given.byte() << 8 | given.byte()
        packed = gzip.compress(given.rest(), 1, mtime=0) if encoding == "gzip" else zstd(given.rest(), sized=how == 1)
        if at & 1:
            packed = packed[: at % (len(packed) + 1)]
        elif at:
            at %= len(packed)
            packed = packed[:at] + bytes((packed[at] ^ 0x10,)) + packed[at + 1 :]
    size = unzipped_bytes(packed, bytes_max=UNZIPPED_MAX)
    assert 0 <= size <= UNZIPPED_MAX
    try:
        plain = unzip(packed, encoding, bytes_max=UNZIPPED_MAX)
    except BatchRefused:
        return
    assert len(plain) <= UNZIPPED_MAX
    if encoding == "gzip":
        reference = zlib.decompressobj(31)
        assert reference.decompress(packed) == plain and reference.eof and not reference.unused_data
    elif encoding == "zstd":
        assert zstandard.ZstdDecompressor().decompressobj().decompress(packed) == plain


def zstd(plain: bytes, *, sized: bool) -> bytes:
    if sized:
        return zstandard.ZstdCompressor().compress(plain)
    stream = zstandard.ZstdCompressor(write_content_size=False).compressobj()
    return stream.compress(plain) + stream.flush()


# HTTP

LIMITS: Final = Limits(body_bytes_max=300, header_bytes_max=400, target_bytes_max=100)
_NAMES: Final = ("method", "path", "query", "headers", "body", "keep_alive")


def http(data: bytes) -> None:
    """Requests are the same however the network cuts them, and a connection holds no more than the limits."""
    given = Given(data)
    cuts = [given.byte() for _ in range(3)]
    received = given.rest()
    whole = parsed([received])
    ends = sorted({cut * len(received) // 256 for cut in cuts})
    pieces = [received[begin:end] for begin, end in zip((0, *ends), (*ends, len(received)), strict=True)]
    assert parsed(pieces) == whole
    assert parsed([received[at : at + 1] for at in range(len(received))]) == whole


def parsed(pieces: Sequence[bytes]) -> list[object]:
    """Requests, and whether a fault ended it. Of two faults in one request the one that is named may depend on the cuts."""
    parser = Parser(LIMITS)
    found: list[object] = []
    for piece in pieces:
        if piece:
            parser.feed(piece)
        while parser.ready:
            item = parser.ready.popleft()
            if isinstance(item, BaseException):
                assert isinstance(item, BatchRefused), repr(item)
                return [*found, "refused"]
            assert isinstance(item, Request) and len(item.body) <= LIMITS.body_bytes_max
            assert sum(len(name) + len(value) for name, value in item.headers.items()) <= LIMITS.header_bytes_max
            found.append([getattr(item, name) for name in _NAMES])
    return found


class _Groups:
    """Takes everyone."""

    def heard(self, group: str, partition: int, epoch: int, checkpoint: int) -> None:
        assert len(group) <= 65 and epoch >= 0 and checkpoint >= 0

    def forget(self, group: str) -> bool:
        return bool(group)


def headers(data: bytes) -> None:
    """What clients say in headers, paths and queries is understood, or refused as such."""
    given = Given(data)
    way, text = given.byte(), given.rest()
    way = way - 248 if way in (252, 253) else way % 4
    try:
        if way == 4:
            number = number_of(Request(b"POST", b"/", b"", {b"idempotency-key": text}, b"{}"))
            assert number is not None and (number.epoch, number.sequence, number.after) == (0, 1, None)
        elif way == 5:
            told = trace.fields({b"traceparent": text})
            assert not told or (len(told["trace_id"]) == 32 and told["trace_id"].encode() in text)
        elif way == 0:
            number = _numbered(text)
            again = f"{number.producer};epoch={number.epoch};sequence={number.sequence};sha256={number.sha256.hex()}".encode()
            assert _numbered(again) == replace(number, after=None)
            assert number.after is None or 0 <= number.after < 1 << 63
        elif way == 1:
            name, _, value = text.partition(b":")
            properties = _properties({b"penstock-property-" + name: value, b"accept": value})
            assert msgspec.json.decode(properties) == {name.decode(): value.decode()}
        else:
            first, _, second = text.partition(b"\0")
            path, _, query = first.partition(b"?")
            given_headers = (
                {b"penstock-group": second, b"accept": b"application/vnd.penstock.frames"} if way == 3 else {}
            )
            request = Request(b"GET", path, query, given_headers, b"")
            for act in (reads().events, reads().offset, reads().partition):
                act(request, (path.decode("utf-8", "replace"),))
    except (BatchRefused, HubError):
        return


def reads() -> Reads:
    hub = MemoryHub(partitions=2, clock=FakeClock())
    hub.put(0, [b'{"deviceId":"d-1"}'])
    return Reads(hub, groups=_Groups(), status=dict, producer=lambda _: None, check=lambda: None)


# Frames, leases, ledger

_HEAD: Final = struct.Struct("<2sBBI")


def frame(data: bytes) -> None:
    """A frame is refused as damaged, or is the bytes that it came from; its sources and events likewise."""
    given = Given(data)
    sealed, raw = given.byte() % 2, given.rest()
    if sealed:
        raw = resealed(raw)
    for part in frames.split(raw):
        try:
            found = frames.decode(part)
            assert frames.encode(found) == part
            sources = frames.sources_of(found)
            assert sum(source.count for source in sources) == found.count
            content = frames.content(found)
            assert found.kind is not FrameKind.GZIP or len(content) == found.raw_bytes
        except FrameDamaged:
            return


def resealed(raw: bytes) -> bytes:
    """The same with right checksums and lengths, where there is room for them: else hardly an input would get past them."""
    if len(raw) < frames.HEADER_BYTES:
        return raw
    changed = bytearray(raw)
    _HEAD.pack_into(changed, 0, b"PF", frames.VERSION, raw[3], end := min(len(raw), int.from_bytes(raw[4:8], "little")))
    if end < frames.HEADER_BYTES:
        return bytes(changed)
    struct.pack_into("<I", changed, 40, len(raw) - end)
    struct.pack_into("<I", changed, 48, frames.crc32(bytes(changed[end:])))
    struct.pack_into("<I", changed, 8, frames.crc32(bytes(changed[12:end]), frames.crc32(bytes(changed[:8]))))
    return bytes(changed)


def lease(data: bytes) -> None:
    """A lease is unreadable, or is itself again when it was written and read."""
    try:
        found = decode_lease(data, 0)
    except StoreError:
        return
    assert decode_lease(encode_lease(found), 0) == found


def ledger(data: bytes) -> None:
    """A record is refused, or says of itself what its name says; likewise whose store it is."""
    given = Given(data)
    way, content = given.byte() % 2, given.rest()
    store = MemoryBlobs()
    if way:
        store.create("_hub.json", content, id="")
        with contextlib.suppress(SettingsError):
            assert owner(store) is not None
        return
    store.create(record_name(0, 7), content, id="")
    try:
        found = Ledger(store, "h", 0).read(7)
    except ArchiveError:
        return
    assert isinstance(found, Record | Gap) and found.first == 7 < found.next


# The client


def answer(data: bytes) -> None:
    """Whatever answers, a batch ends only when each of its events is accounted for; and a problem is an error or none."""
    given = Given(data)
    status = given.one_of((200, 400, 413, 422, 429, 503, 401, 302, 0))
    events = given.byte() % 5
    first, _, rest = given.rest().partition(b"\0")
    headers: Mapping[str, str] = {"retry-after": first.decode("latin-1"), "date": first[::-1].decode("latin-1")}
    said = reaction(Answer(status, headers, rest), batch="p:0:1", events=events, now_ms=1_795_000_000_000)
    if isinstance(said, Settled):
        assert said.accepted + len(said.rejected) == events
    if isinstance(said, Again):
        assert said.retry_after_s is None or 1 <= said.retry_after_s <= 900
    error = rebuilt(rest)
    assert error is None or isinstance(error, PenstockError)


def spool(data: bytes) -> None:
    """A batch file is damaged, or is what was sealed."""
    try:
        found = read_batch("1", Path("1"), data)
    except SpoolDamaged:
        return
    assert len(found.body) == found.header.bytes


class Target(NamedTuple):
    run: Callable[[bytes], None]
    bytes_max: int = 4096


# Who comes in


_SECRET: Final = b"an open secret"
_KEY: Final = Key(
    "aaaaaaaaaaaa",
    "press",
    hashlib.sha256(_SECRET).hexdigest(),
    ("send",),
    ("d-*",),
    None,
    None,
    "2026-11-22T14:00:00Z",
    None,
)


def authorization(data: bytes) -> None:
    """Nobody comes in without the secret, and with a token for one path to no other; keys and connection strings are read or refused."""
    given = Given(data)
    way, content = given.byte() % 4, given.rest()
    if way == 0:
        if _granted(content, b"/v1/events"):
            assert _SECRET in content
    elif way == 1:
        resource, _, path = content.partition(b"\n")
        expires_s = FakeClock().now_ms() // 1000
        signed = quote(sas.signature(_KEY.shared_access_key.encode(), resource, expires_s), safe="").encode()
        if _granted(b"SharedAccessSignature sr=%b&sig=%b&se=%d&skn=press" % (resource, signed, expires_s), path):
            found = sas.resource(resource)
            assert found is not None and found.host == "hub"
            under = [unquote_to_bytes(part).decode() for part in path.split(b"/")[1:]]
            assert under[: len(found.path)] == list(found.path)
    elif way == 2:
        with contextlib.suppress(ValueError):
            known = decode_keys(content)
            assert decode_keys(encode_keys(known)) == known
    else:
        with contextlib.suppress(SettingsError):
            assert address(content.decode("latin-1")).hostname


def _granted(header: bytes, path: bytes) -> bool:
    guard = KeyGuard(Path("/nonexistent"), FakeClock(), MemoryLog())
    guard._ring = _ring([_KEY])
    try:
        grant = guard(Request(b"POST", path, b"", {b"host": b"hub:1", b"authorization": header}, b""))
    except Unauthenticated:
        return False
    assert grant.key == _KEY.kid and grant.rights in (Right.SEND, Right.NONE) and grant.allows is not None
    assert not grant.allows("e-1")
    return True


TARGETS: Final[Mapping[str, Target]] = {
    "body": Target(body, 1024),
    "zipped": Target(zipped),
    "http": Target(http, 1024),
    "headers": Target(headers),
    "authorization": Target(authorization),
    "frame": Target(frame),
    "lease": Target(lease),
    "ledger": Target(ledger),
    "answer": Target(answer),
    "spool": Target(spool),
}
