"""The HTTP contract, row by row, against one installation that runs. What is accepted is in its store in the end, and nothing else."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import json
import re
import signal
import socket
import struct
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import quote, unquote

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.events import Slice
from penstock.wire import frame
from tests.e2e.http_client import Answer, Connection, head, request
from tests.e2e.oracle import Batch, problems, unstamp
from tests.e2e.system import System, rss_anon_kib, wait_for
from tests.e2e.topic_system import TopicSystem

PARTITIONS = 4
NDJSON = {"Content-Type": "application/x-ndjson"}
JSON = {"Content-Type": "application/json"}
GZIP = {**NDJSON, "Content-Encoding": "gzip"}
ZSTD = {**NDJSON, "Content-Encoding": "zstd"}
DEVICE_FIELDS = ("deviceId", "address", "deviceid", "subject", "source")
TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
BODY_MAX, BATCH_MAX, EVENT_MAX, EVENTS_MAX, HEADER_MAX = 1 << 20, 16 << 20, 256 << 10, 10_000, 16 << 10
WORKER_GROWTH_KIB_MAX = 160 << 10


class Rig:
    """The installation, and what it has accepted."""

    def __init__(self, system: System) -> None:
        self.system = system
        self.sent: list[Batch] = []
        self.memory_kib = {pid: rss_anon_kib(pid) for pid in system.parts("api").values()}

    def post(
        self, body: bytes, headers: Mapping[str, str] = NDJSON, path: str = "/v1/events", method: str = "POST"
    ) -> Answer:
        return request(self.system.url, method, path, body, headers)

    def get(self, path: str, headers: Mapping[str, str] | None = None, *, method: str = "GET") -> Answer:
        return request(self.system.url, method, path, headers=headers)

    def accept(
        self,
        lines: Sequence[bytes],
        headers: Mapping[str, str] = NDJSON,
        *,
        body: bytes | None = None,
        path: str = "/v1/events",
        stored: Sequence[bytes] | None = None,
    ) -> Answer:
        """Post what must be accepted whole; `stored` is what must lie there for it, if that is not `lines`."""
        answer = self.post(b"\n".join(lines) if body is None else body, headers, path)
        self.accepted(answer, len(lines))
        self.sent.append(Batch(lines if stored is None else stored))
        return answer

    def accepted(self, answer: Answer, events: int, rejected: int = 0) -> None:
        assert answer.status == 200, answer
        assert answer.headers["content-type"] == "application/json"
        assert answer.json.keys() == {"batch", "accepted", "duplicate", "rejected"}
        assert (answer.json["accepted"], len(answer.json["rejected"])) == (events, rejected)

    @contextlib.contextmanager
    def nothing_stored(self) -> Iterator[None]:
        before = self.system.ends()
        yield
        assert self.system.ends() == before


@pytest.fixture(scope="module", params=["embedded", "topic"])
def rig(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    """What is asked of it holds for every hub."""
    folder = tmp_path_factory.mktemp("contract")
    system: System
    if request.param == "embedded":
        system = System(folder, partitions=PARTITIONS)
    else:
        brokers, azurite = request.getfixturevalue("kafka"), request.getfixturevalue("azurite")
        system = TopicSystem(folder, brokers, azurite, partitions=PARTITIONS, period="24h")
    try:
        rig = Rig(system.start())
        if request.param == "topic":
            wait_for("each partition has the marker of its first day", lambda: all(system.ends()))
        yield rig
        system.settle()
        assert problems(system.store, PARTITIONS, [rig.sent], DEVICE_FIELDS) == []
        assert system.run_file()["parts"] and all(part["restarts"] == 0 for part in system.run_file()["parts"])
        assert system.stop() == 0
        log = system.up.text()
        assert '"level":"error"' not in log, log
    finally:
        system.close()


# Only this one knows producers, and numbers events without gaps (docs/kafka.md).
embedded_only = pytest.mark.parametrize("rig", ["embedded"], indirect=True)


def refused(answer: Answer | None, status: int, code: str, *, retryable: bool = False, **fields: object) -> None:
    """An RFC 9457 problem, exactly."""
    assert answer is not None, f"no answer instead of {status} {code}"
    assert (answer.status, answer.json.get("code")) == (status, code), answer
    assert answer.headers["content-type"] == "application/problem+json"
    problem = answer.json
    assert problem.keys() >= {"type", "title", "status", "code", "detail", "retryable"}
    assert (problem["status"], problem["retryable"]) == (status, retryable)
    assert problem["title"] and problem["detail"]
    assert {name: problem[name] for name in fields} == fields
    assert ("retry-after" in answer.headers) == (status in (429, 503)), answer.headers
    if status in (429, 503):
        assert int(answer.headers["retry-after"]) >= 1


def events(count: int, name: str, size: int = 0) -> list[bytes]:
    return [b'{"deviceId":"%b-%d","n":%d%b}' % (name.encode(), n % 7, n, b" " * size) for n in range(count)]


def numbered(body: bytes, producer: str, sequence: int, epoch: int = 1, sha256: str = "") -> dict[str, str]:
    sha256 = sha256 or hashlib.sha256(body).hexdigest()
    return {**NDJSON, "Penstock-Producer": f"{producer};epoch={epoch};sequence={sequence};sha256={sha256}"}


def keyed(key: str) -> dict[str, str]:
    return {**NDJSON, "Idempotency-Key": key.encode().decode("latin-1")}


# What is taken


@pytest.mark.parametrize(
    "kind", ["application/x-ndjson", "application/x-ndjson; charset=utf-8", "Application/X-NDJSON", ""]
)
def test_ndjson(rig: Rig, kind: str) -> None:
    rig.accept(events(3, "ndjson"), {"Content-Type": kind} if kind else {})


@pytest.mark.parametrize("end", [b"", b"\n", b"\r\n", b"\n\n\n", b" \t\r\n"])
def test_line_ends_and_blank_lines_are_no_events(rig: Rig, end: bytes) -> None:
    lines = events(2, "ends")
    rig.accept(lines, body=end + lines[0] + b" \r\n \n" + lines[1] + end)


def test_json_array_and_object(rig: Rig) -> None:
    lines = events(3, "array")
    rig.accept(lines, JSON, body=b" [" + b" ,\n".join(lines) + b"]\n")
    rig.accept(lines[:1], JSON)
    pretty = b'{\n  "deviceId": "array-1",\r\n  "list": [\n1,\n2]\n}'
    rig.accept([pretty], JSON, stored=[pretty.replace(b"\n", b" ").replace(b"\r", b" ")])
    rig.accept(
        [pretty, lines[0]],
        JSON,
        body=b"[%b,%b]" % (pretty, lines[0]),
        stored=[pretty.translate(bytes.maketrans(b"\r\n", b"  ")), lines[0]],
    )


def test_gzip_zstd_and_chunked(rig: Rig) -> None:
    lines = events(300, "zipped")
    body = b"\n".join(lines)
    rig.accept(lines, GZIP, body=gzip.compress(body))
    rig.accept(lines, {**GZIP, "Content-Encoding": "GZip"}, body=gzip.compress(body))
    rig.accept(lines, ZSTD, body=zstandard.compress(body))
    streamed = zstandard.ZstdCompressor().compressobj()
    rig.accept(lines, ZSTD, body=streamed.compress(body) + streamed.flush())
    rig.accept(lines, {**NDJSON, "Content-Encoding": "identity"})
    for size in (1, 7, 4096):
        zipped = gzip.compress(b"\n".join(lines[:20]))
        chunks = [zipped[i : i + size] for i in range(0, len(zipped), size)]
        body = b"".join(b"%x\r\n%b\r\n" % (len(chunk), chunk) for chunk in chunks) + b"0\r\n\r\n"
        rig.accept(lines[:20], {**GZIP, "Transfer-Encoding": "chunked"}, body=body)


def test_the_device_of_the_path(rig: Rig) -> None:
    path = "/v1/devices/path-1/events"
    bare = [b'{"n":1}', b'{"n":2,"nested":{"deviceId":"other"}}']
    stored = [b'{"n":1,"deviceId":"path-1"}', b'{"n":2,"nested":{"deviceId":"other"},"deviceId":"path-1"}']
    rig.accept(bare, path=path, stored=stored)
    rig.accept([b"{}", b"{ }"], path=path, stored=[b'{"deviceId":"path-1"}', b'{ "deviceId":"path-1"}'])
    rig.accept([b'{"deviceId":"path-1","n":3}'], path=path)
    rig.accept([b'{"n":4}'], path="/v1/devices/path%2D1/events", stored=[b'{"n":4,"deviceId":"path-1"}'])
    answer = rig.post(b'{"n":5}\n{"deviceId":"path-2"}\n', path=path)
    rig.accepted(answer, 1, 1)
    assert (answer.json["rejected"][0]["index"], answer.json["rejected"][0]["code"]) == (1, "bad_device")
    rig.sent.append(Batch([b'{"n":5,"deviceId":"path-1"}']))
    with rig.nothing_stored():
        for bad in ("..", "%2e%2e", "a%2Fb", "%00", "-a", "a%20b", "%C3%A9", "x" * 129):
            answer = rig.post(b'{"n":1}', path=f"/v1/devices/{bad}/events")
            refused(answer, 400, "no_valid_event")
            assert [one["code"] for one in answer.json["rejected"]] == ["bad_device"]
        refused(rig.post(b'{"n":1}', path="/v1/devices/a/b/events"), 404, "not_found")


def test_another_device_field(rig: Rig) -> None:
    lines = [b'{"address":"field-1","n":1}', b'{"address":"field-2","n":2}']
    rig.accept(lines, {**NDJSON, "Penstock-Device-Field": "address"})
    with rig.nothing_stored():
        answer = rig.post(lines[0])
        refused(answer, 400, "no_valid_event")
        assert [one["code"] for one in answer.json["rejected"]] == ["no_device"]
        for bad in ("", "receivedAt", "a b", "é", "x" * 65):
            refused(rig.post(lines[0], {**NDJSON, "Penstock-Device-Field": bad}), 400, "bad_header")


def test_properties_go_into_the_stamp(rig: Rig) -> None:
    headers = {**NDJSON, "Penstock-Property-Site": "A", "penstock-property-Line": 'é "3" \\'.encode().decode("latin-1")}
    rig.accept([b'{"deviceId":"prop-1","n":1}'], headers)
    partition = zlib.crc32(b"prop-1") % PARTITIONS
    line = rig.get(f"/v1/partitions/{partition}/events?from=start&limit=10000").body.splitlines()[-1]
    event, properties = unstamp(line)
    assert event == b'{"deviceId":"prop-1","n":1}'
    assert {name.lower(): value for name, value in json.loads(properties).items()} == {"site": "A", "line": 'é "3" \\'}
    stamped = json.loads(line)
    assert list(stamped)[-2:] == ["receivedAt", "properties"]
    with rig.nothing_stored():
        answer = rig.post(b'{"deviceId":"prop-1","properties":1}', headers)
        refused(answer, 400, "no_valid_event")
        assert answer.json["rejected"][0]["code"] == "reserved_field"
    rig.accept([b'{"deviceId":"prop-1","properties":1}'])


def test_cloudevents(rig: Rig) -> None:
    """The samples of the CloudEvents specification's JSON event format, 1.0.2, with sources and subjects that are device ids."""

    def event(number: int, device: str) -> bytes:
        return (
            b'{ "specversion" : "1.0", "type" : "com.example.someevent", "id" : "A234-%d", "time" : "2018-04-05T17:31:00Z",'
            b' "comexampleextension1" : "value", "datacontenttype" : "text/xml", "data" : "<much wow=\\"xml\\"/>", %b }'
            % (number, device.encode())
        )

    for devices in (
        ['"source" : "urn:cloud-1"', '"source" : "urn:cloud-2"'],
        ['"source" : "/mycontext", "subject" : "cloud-1"', '"source" : "/mycontext", "subject" : "cloud-2"'],
        ['"source" : "/x", "subject" : "y", "deviceid" : "cloud-3"', '"deviceid" : "cloud-4"'],
        ['"source" : "/x", "deviceid" : null, "deviceId" : "cloud-5"', '"deviceId" : "cloud-6"'],
    ):
        lines = [event(number, device) for number, device in enumerate(devices)]
        body = b"[" + b", ".join(lines) + b"]"
        rig.accept(lines, {"Content-Type": "application/cloudevents-batch+json; charset=UTF-8"}, body=body)
        rig.accept(lines[:1], {"Content-Type": "application/cloudevents+json"})
    # Readers find the device where the archive has it.
    partition = zlib.crc32(b"urn:cloud-1") % PARTITIONS
    answer = rig.get(
        f"/v1/partitions/{partition}/events?from=start&limit=10000", {"Accept": "application/vnd.penstock.frames"}
    )
    end = answer.headers["penstock-next-offset"]
    frames = [frame.decode(one) for one in frame.split(answer.body)]
    assert "urn:cloud-1" in {event.device for event in frame.events(Slice(partition, "0", frames, end, end))}
    mixed = [event(0, '"subject" : "cloud-1"'), event(1, '"source" : "cloud-1"'), event(2, '"subject" : "a/b"')]
    answer = rig.post(b"[%b]" % b",".join(mixed), {"Content-Type": "application/cloudevents-batch+json"})
    rig.accepted(answer, 1, 2)
    assert [one["code"] for one in answer.json["rejected"]] == ["no_device", "bad_device"]
    rig.sent.append(Batch(mixed[:1]))


@embedded_only
def test_a_cloudevent_in_binary_mode(rig: Rig) -> None:
    """As the CloudEvents HTTP protocol binding 1.0.2 prints it in 3.1.4, with a subject that is a device."""
    headers = {
        "ce-specversion": "1.0",
        "ce-type": "com.example.someevent",
        "ce-time": "2018-04-05T03:56:24Z",
        "ce-id": "1234-1234-1234",
        "ce-source": "/mycontext/subcontext",
        "ce-subject": "binary%2D1",
        "Content-Type": "application/json; charset=utf-8",
    }
    event = (
        b'{"specversion":"1.0","type":"com.example.someevent","time":"2018-04-05T03:56:24Z","id":"1234-1234-1234",'
        b'"source":"/mycontext/subcontext","subject":"binary-1","datacontenttype":"application/json; charset=utf-8",%b}'
    )
    rig.accept([event % b'"data":{"x": 21.40}'], headers, body=b'{"x": 21.40}')
    zipped = gzip.compress(b'{"x":1}')
    rig.accept([event % b'"data":{"x":1}'], headers | {"Content-Encoding": "gzip"}, body=zipped)
    # Two events of the same data under one key are two: the headers say what is stored.
    for key_id, other, duplicate in (("7", "a", False), ("7", "a", True), ("7", "b", False)):
        answer = rig.post(b"1", headers | {"ce-id": other, "Idempotency-Key": key_id})
        assert (answer.status, answer.json["duplicate"]) == (200, duplicate)
        if not duplicate:
            rig.sent.append(Batch([(event % b'"data":1').replace(b"1234-1234-1234", other.encode())]))
    with rig.nothing_stored():
        refused(rig.post(b"{", headers), 400, "no_valid_event")
        refused(rig.post(b"1", headers | {"ce-data": "x"}), 400, "bad_header")
        answer = rig.post(b"1", headers | {"ce-subject": "a/b"})
        refused(answer, 400, "no_valid_event")
        assert answer.json["rejected"][0]["code"] == "bad_device"


def test_a_refusal_names_the_trace_of_its_request(rig: Rig) -> None:
    """The header is the example of W3C Trace Context, 3.2.4. One that is none is ignored, and none of them is stored."""
    for value, trace in ((f"00-{TRACE}-00f067aa0ba902b7-01", TRACE), (f"00-{TRACE}-0000000000000000-01", None)):
        headers = {**NDJSON, "traceparent": value}
        with rig.nothing_stored():
            for answer in (
                rig.post(b"x", headers),
                rig.post(b"{}", {**headers, "Content-Length": "2000000"}),
                rig.post(b"{}", {**headers, "Content-Encoding": "br"}),
                rig.post(b"{}", headers, "/nothing"),
                rig.get("/v1/partitions/99", headers),
                rig.get("/v1/events", headers),
            ):
                assert answer.status >= 400
                assert answer.json.get("trace_id") == trace, answer
        rig.accept(events(1, "trace"), headers)


def test_expect_100_continue(rig: Rig) -> None:
    (line,) = events(1, "expect")
    with Connection(rig.system.url) as connection:
        connection.send(
            head("POST", "/v1/events", {**NDJSON, "Content-Length": str(len(line)), "Expect": "100-continue"})
        )
        assert connection.socket.recv(64) == b"HTTP/1.1 100 Continue\r\n\r\n"
        connection.send(line)
        answer = connection.answer()
        assert answer is not None
        rig.accepted(answer, 1)
    rig.sent.append(Batch([line]))
    with rig.nothing_stored(), Connection(rig.system.url) as connection:
        connection.send(head("POST", "/v1/events", {**NDJSON, "Content-Length": "1048577", "Expect": "100-continue"}))
        refused(connection.answer(), 413, "body_too_large", limit_bytes=BODY_MAX)


def test_pipelined_requests_are_answered_in_order(rig: Rig) -> None:
    lines = events(20, "pipe")
    with Connection(rig.system.url) as connection:
        connection.send(
            b"".join(head("POST", "/v1/events", {"Content-Length": str(len(line))}) + line for line in lines)
            + head("GET", "/health/live", {})
        )
        for line in lines:
            answer = connection.answer()
            assert answer is not None
            rig.accepted(answer, 1)
            rig.sent.append(Batch([line]))
        answer = connection.answer("GET")
        assert answer is not None and answer.json == {"ok": True}


# The limits, from both sides


def test_limits_are_reached_and_not_passed(rig: Rig) -> None:
    large = b'{"deviceId":"limit-1","pad":"%b"}'
    fits = large % (b"x" * (EVENT_MAX - len(large) + 2))
    assert len(fits) == EVENT_MAX
    rig.accept([fits])
    body = b"\n".join([fits] * 3)
    rest = large % (b"y" * (BODY_MAX - len(body) - 1 - len(large) + 2))
    assert len(body) + 1 + len(rest) == BODY_MAX
    rig.accept([fits, fits, fits, rest])
    many = events(EVENTS_MAX, "many")
    rig.accept(many, GZIP, body=gzip.compress(b"\n".join(many)))
    wide = events(BATCH_MAX // 2048, "wide", size=2010)
    wide_body = b"\n".join(wide)
    rig.accept(wide, GZIP, body=gzip.compress(wide_body + b"\n" * (BATCH_MAX - len(wide_body))))

    answer = rig.post(fits + b"\n" + fits.replace(b"{", b"{ ", 1) + b"\n" + fits)
    rig.accepted(answer, 2, 1)
    assert [(one["index"], one["code"]) for one in answer.json["rejected"]] == [(1, "event_too_large")]
    rig.sent.append(Batch([fits, fits]))
    with rig.nothing_stored():
        refused(rig.post(body + b"\n" + rest + b"\n"), 413, "body_too_large", limit_bytes=BODY_MAX)
        chunk = b"10000\r\n" + b" " * 65536 + b"\r\n"
        chunked = rig.post(chunk * 17 + b"0\r\n\r\n", {**NDJSON, "Transfer-Encoding": "chunked"})
        refused(chunked, 413, "body_too_large", limit_bytes=BODY_MAX)
        too_many = rig.post(gzip.compress(b"\n".join([*many, many[0]])), GZIP)
        refused(too_many, 413, "batch_too_large", limit_events=EVENTS_MAX)
        too_many = rig.post(gzip.compress(b"[" + b",".join([*many, many[0]]) + b"]"), {**GZIP, **JSON})
        refused(too_many, 413, "batch_too_large", limit_events=EVENTS_MAX)
        for headers, compress in ((GZIP, gzip.compress), (ZSTD, zstandard.compress)):
            body = compress(wide_body + b"\n" * (BATCH_MAX + 1 - len(wide_body)))
            refused(rig.post(body, headers), 413, "batch_too_large", limit_bytes=BATCH_MAX)
        refused(rig.get("/" + "x" * 9000), 414, "uri_too_long")
        refused(rig.get("/health/live", {"X-Pad": "x" * HEADER_MAX}), 431, "header_too_large", limit_bytes=HEADER_MAX)
        many_headers = {f"X-{n}": "y" * 20 for n in range(1000)}
        refused(rig.get("/health/live", many_headers), 431, "header_too_large", limit_bytes=HEADER_MAX)


# What is refused whole


def _bad_json(text: bytes) -> bytes:
    return b'[{"deviceId":"d"},' + text + b"]"


@pytest.mark.parametrize(
    ("body", "headers", "status", "code"),
    [
        (b"", NDJSON, 400, "empty_batch"),
        (b"\n\r\n \n", NDJSON, 400, "empty_batch"),
        (b"", JSON, 400, "empty_batch"),
        (b" \n", JSON, 400, "empty_batch"),
        (b"[]", JSON, 400, "empty_batch"),
        (b" [ \n] ", JSON, 400, "empty_batch"),
        (b"", GZIP, 400, "empty_batch"),
        (gzip.compress(b"", mtime=0), GZIP, 400, "empty_batch"),
        (zstandard.compress(b""), ZSTD, 400, "empty_batch"),
        (_bad_json(b"{"), JSON, 400, "malformed_body"),
        (_bad_json(b"NaN"), JSON, 400, "malformed_body"),
        (_bad_json(b'"\xff"'), JSON, 400, "malformed_body"),
        (b'[{"deviceId":"d"}', JSON, 400, "malformed_body"),
        (b'[{"deviceId":"d"}]]', JSON, 400, "malformed_body"),
        (b'{"deviceId":"d"}\n{"deviceId":"d"}', JSON, 400, "no_valid_event"),
        ("[]".encode("utf-16"), JSON, 400, "no_valid_event"),
        (b"\xef\xbb\xbf[]", JSON, 400, "no_valid_event"),
        (b"[" * 100_000, JSON, 400, "malformed_body"),
        (b'{"deviceId":"d","x":' + b"[" * 100_000, JSON, 400, "no_valid_event"),
        (b"null", JSON, 400, "no_valid_event"),
        (b"1", JSON, 400, "no_valid_event"),
        (b'[1,null,"x",[]]', JSON, 400, "no_valid_event"),
        (b"not json", NDJSON, 400, "no_valid_event"),
        (b'{"deviceId":"d"}', GZIP, 400, "malformed_gzip"),
        (gzip.compress(b'{"deviceId":"d"}', mtime=0), NDJSON, 400, "no_valid_event"),
        (gzip.compress(b'{"deviceId":"d"}', mtime=0) + b"x", GZIP, 400, "malformed_gzip"),
        (gzip.compress(b'{"deviceId":"d"}', mtime=0) + b"\0" * 8, GZIP, 400, "malformed_gzip"),
        (gzip.compress(b'{"deviceId":"d"}', mtime=0) * 2, GZIP, 400, "malformed_gzip"),
        (gzip.compress(b"", mtime=0) * 10_000, GZIP, 400, "malformed_gzip"),
        (gzip.compress(b'{"deviceId":"d"}', mtime=0)[:-8] + b"\0" * 8, GZIP, 400, "malformed_gzip"),
        (b"\x1f\x8b\x08\x08\0\0\0\0\0\x03" + b"name" * 200, GZIP, 400, "malformed_gzip"),
        (zstandard.compress(b'{"deviceId":"d"}') + b"x", ZSTD, 400, "malformed_gzip"),
        (zstandard.compress(b'{"deviceId":"d"}') * 2, ZSTD, 400, "malformed_gzip"),
        (b'{"deviceId":"d"}', ZSTD, 400, "malformed_gzip"),
        (b'{"deviceId":"d"}', {**NDJSON, "Content-Encoding": "br"}, 415, "unsupported_encoding"),
        (b'{"deviceId":"d"}', {**NDJSON, "Content-Encoding": "deflate"}, 415, "unsupported_encoding"),
        (b'{"deviceId":"d"}', {**NDJSON, "Content-Encoding": "gzip, gzip"}, 415, "unsupported_encoding"),
        (b'{"deviceId":"d"}', {"Content-Type": "text/plain"}, 415, "unsupported_type"),
        (b'{"deviceId":"d"}', {"Content-Type": "application/json; charset=utf-16"}, 415, "unsupported_type"),
    ],
)
def test_a_body_that_is_refused(rig: Rig, body: bytes, headers: Mapping[str, str], status: int, code: str) -> None:
    with rig.nothing_stored():
        answer = rig.post(body, headers)
    refused(answer, status, code)
    if code == "no_valid_event":
        assert answer.json["rejected"]
    if status == 415:
        assert answer.json["supported"]
        names = "accept-encoding" if code == "unsupported_encoding" else "accept"
        assert answer.headers[names] == ", ".join(answer.json["supported"])


@pytest.mark.parametrize("headers", [GZIP, ZSTD], ids=["gzip", "zstd"])
def test_a_zipped_body_cut_at_every_length(rig: Rig, headers: Mapping[str, str]) -> None:
    lines = events(20, "cut")
    whole = (gzip.compress if headers is GZIP else zstandard.compress)(b"\n".join(lines))
    with rig.nothing_stored():
        refused(rig.post(b"", headers), 400, "empty_batch")
        for length in range(1, len(whole)):
            refused(rig.post(whole[:length], headers), 400, "malformed_gzip")
    rig.accept(lines, headers, body=whole)


def test_every_bit_of_a_zipped_body(rig: Rig) -> None:
    """A flipped bit is found, or does not matter: time and system in the header, the padding behind the last code."""
    lines = events(3, "flip")
    plain = b"\n".join(lines)
    whole = bytearray(gzip.compress(plain, mtime=0))
    for at in range(len(whole)):
        whole[at] ^= 1 << at % 8
        answer = rig.post(bytes(whole), GZIP)
        if answer.status == 200:
            assert zlib.decompress(whole, wbits=31) == plain, f"a damaged body was accepted at byte {at}"
            rig.sent.append(Batch(lines))
        else:
            refused(answer, 400, "malformed_gzip")
        whole[at] ^= 1 << at % 8


def test_63_forty_thousand_members_take_no_time(rig: Rig) -> None:
    """A library that goes on behind each member by copying the rest took 1.5 s for these 800 KB."""
    took_s = []
    with rig.nothing_stored():
        for _ in range(3):
            began = time.perf_counter()
            refused(rig.post(gzip.compress(b"") * 40_000, GZIP), 400, "malformed_gzip")
            took_s.append(time.perf_counter() - began)
    assert min(took_s) < 0.3, took_s


BOMBS: dict[str, tuple[bytes, Mapping[str, str], int, str]] = {
    "10 MB of zeros": (gzip.compress(bytes(10_000_000)), GZIP, 400, "no_valid_event"),
    "200 MB of zeros": (gzip.compress(bytes(200_000_000)), GZIP, 413, "batch_too_large"),
    "200 MB of zeros, zstd": (zstandard.compress(bytes(200_000_000)), ZSTD, 413, "batch_too_large"),
    "nested": (gzip.compress(gzip.compress(bytes(200_000_000))), GZIP, 400, "no_valid_event"),
    "a bomb in a bomb": (gzip.compress(gzip.compress(gzip.compress(bytes(200_000_000)))), GZIP, 400, "no_valid_event"),
    "16 MiB of line feeds": (gzip.compress(b"\n" * BATCH_MAX), GZIP, 400, "empty_batch"),
    "16 MiB of blank lines": (gzip.compress(b" \n" * (BATCH_MAX // 2)), GZIP, 400, "empty_batch"),
    "5 million events": (gzip.compress(b"{}\n" * (BATCH_MAX // 3)), GZIP, 413, "batch_too_large"),
    "8 million elements": (
        gzip.compress(b"[" + b"0," * (BATCH_MAX // 2 - 2) + b"0]"),
        {**GZIP, **JSON},
        413,
        "batch_too_large",
    ),
    "5 million objects": (
        gzip.compress(b"[" + b"{}," * (BATCH_MAX // 3 - 2) + b"{}]"),
        {**GZIP, **JSON},
        413,
        "batch_too_large",
    ),
    "one event of 3 million keys": (
        gzip.compress(b'{"deviceId":"d"' + b',"":0' * 3_000_000 + b"}"),
        GZIP,
        400,
        "no_valid_event",
    ),
    "60 events of 50,000 keys": (
        gzip.compress((b'{"deviceId":7' + b',"":0' * 50_000 + b"}\n") * 60),
        GZIP,
        400,
        "no_valid_event",
    ),
    "an array of 60 events of 50,000 keys": (
        gzip.compress(b"[" + b",".join([b'{"deviceId":7' + b',"":0' * 50_000 + b"}"] * 60) + b"]"),
        {**GZIP, **JSON},
        400,
        "no_valid_event",
    ),
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_bombs_take_bounded_memory(rig: Rig, bomb: str) -> None:
    """More than a worker had when it was new, whatever it was sent since."""
    body, headers, status, code = BOMBS[bomb]
    workers = rig.system.parts("api").values()
    assert rig.memory_kib.keys() == set(workers), "no worker was started again"
    most = dict(rig.memory_kib)
    with rig.nothing_stored(), ThreadPoolExecutor(4) as senders:
        answers = [senders.submit(rig.post, body, headers) for _ in range(4)]
        watching = threading.Event()
        while not all(answer.done() for answer in answers):
            most = {pid: max(most[pid], rss_anon_kib(pid)) for pid in workers}
            watching.wait(0.002)
        for answer in answers:
            refused(answer.result(), status, code)
    growth = {pid: most[pid] - rig.memory_kib[pid] for pid in workers}
    print(f"{bomb}: {max(growth.values())} KiB more")
    assert max(growth.values()) < WORKER_GROWTH_KIB_MAX, growth


# What does not arrive whole


def test_half_a_body_and_gone(rig: Rig) -> None:
    body = b"\n".join(events(10, "half"))
    with rig.nothing_stored():
        for part in range(0, len(body), 37):
            for how in ("reset", "close", "half-close"):
                with Connection(rig.system.url) as connection:
                    connection.send(head("POST", "/v1/events", {"Content-Length": str(len(body))}) + body[:part])
                    if how == "reset":
                        connection.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    elif how == "half-close":
                        connection.socket.shutdown(socket.SHUT_WR)
                        answer = connection.answer()
                        assert answer is None or answer.status >= 400
        assert rig.get("/health/live").status == 200


def test_slow_requests_end_with_408(make_system: Callable[..., System]) -> None:
    times = ("--header-timeout", "1s", "--body-timeout", "1s", "--idle-timeout", "1s")
    system = make_system(partitions=PARTITIONS, options=times).start()
    zipped = gzip.compress(b'{"deviceId":"d"}')
    with contextlib.ExitStack() as closing:
        half_head, half_body, chunked, too_long, idle = (
            closing.enter_context(Connection(system.url)) for _ in range(5)
        )
        half_head.send(b"POST /v1/events HTTP/1.1\r\nHost: x\r\n")
        half_body.send(head("POST", "/v1/events", {"Content-Length": "1000"}) + b'{"deviceId":"d"}\n')
        chunked.send(head("POST", "/v1/events", {"Transfer-Encoding": "chunked"}) + b'11\r\n{"deviceId":"d"}\n\r\n')
        too_long.send(head("POST", "/v1/events", {**GZIP, "Content-Length": str(len(zipped) + 5)}) + zipped)
        idle.send(head("GET", "/health/live", {}))
        answer = idle.answer("GET")
        assert answer is not None and answer.status == 200
        for connection in (half_head, half_body, chunked, too_long):
            refused(connection.answer(), 408, "request_timeout", retryable=True)
            assert connection.answer() is None, "the connection ends with the answer"
        assert idle.answer() is None, "an idle connection is closed"
    assert sum(system.ends()) == 0


def test_wrong_content_length(rig: Rig) -> None:
    body = gzip.compress(b"\n".join(events(10, "length")))
    with rig.nothing_stored():
        for length in ("-1", "+5", "0x5", "5,5", "1_0", " ", "9" * 30, "99999999999999999999"):
            answer = rig.post(body, {**GZIP, "Content-Length": length})
            assert answer.status in (400, 413), answer
            refused(answer, answer.status, "bad_header" if answer.status == 400 else "body_too_large")
        with Connection(rig.system.url) as connection:
            connection.send(head("POST", "/v1/events", {**GZIP, "Content-Length": str(len(body) - 5)}) + body)
            refused(connection.answer(), 400, "malformed_gzip")
            refused(connection.answer(), 400, "bad_header")
            assert connection.answer() is None
    # Cut between two lines nothing looks wrong; then the number's sha256 tells.
    lines = events(2, "length")
    whole = b"\n".join(lines) + b"\n"
    with rig.nothing_stored(), Connection(rig.system.url) as connection:
        headers = {**numbered(whole, "cut-length", 1), "Content-Length": str(len(lines[0]) + 1)}
        connection.send(head("POST", "/v1/events", headers) + whole)
        refused(connection.answer(), 400, "body_mismatch", retryable=True)


@pytest.mark.parametrize(
    ("raw", "status", "code"),
    [
        (b"POST /v1/events HTTP/1.1\r\nHost: x\r\n\r\n", 411, "length_required"),
        (
            b"POST /v1/events HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\nContent-Length: 3\r\n\r\n{}\n",
            400,
            "bad_header",
        ),
        (
            b"POST /v1/events HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
            400,
            "bad_header",
        ),
        (b"POST /v1/events HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: xchunked\r\n\r\n0\r\n\r\n", 400, "bad_header"),
        (
            b"POST /v1/events HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: identity, chunked\r\n\r\n0\r\n\r\n",
            400,
            "bad_header",
        ),
        (
            b"POST /v1/events HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nZZ\r\n{}\r\n0\r\n\r\n",
            400,
            "bad_header",
        ),
        (
            b"POST /v1/events HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nFFFFFFFFFFFFFFFFF\r\n",
            400,
            "bad_header",
        ),
        (b"POST /v1/events HTTP/1.1\r\nContent-Length: 3\r\n\r\n{}\n", 400, "bad_header"),
        (b"POST /v1/events HTTP/1.1\r\nHost: x\r\nHost: y\r\nContent-Length: 3\r\n\r\n{}\n", 400, "bad_header"),
        (b"POST /v1/events HTTP/1.1\nHost: x\nContent-Length: 3\n\n{}\n", 400, "bad_header"),
        (b"POST /v1/events HTTP/1.1\r\nHost: x\r\n folded: 1\r\nContent-Length: 3\r\n\r\n{}\n", 400, "bad_header"),
        (b"POST /v1/events HTTP/1.1\r\nHost: x\r\nX: a\0b\r\nContent-Length: 3\r\n\r\n{}\n", 400, "bad_header"),
        (b"POST /v1/events HTTP/2.0\r\nHost: x\r\nContent-Length: 3\r\n\r\n{}\n", 400, "bad_header"),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400, "bad_header"),
        (b"CONNECT x:1 HTTP/1.1\r\nHost: x\r\n\r\n", 400, "bad_header"),
        (b"\x16\x03\x01\x02\0\x01\0\x01\xfc\x03\x03", 400, "bad_header"),
    ],
)
def test_what_is_not_http_1_1(rig: Rig, raw: bytes, status: int, code: str) -> None:
    with rig.nothing_stored(), Connection(rig.system.url) as connection:
        connection.send(raw)
        refused(connection.answer(), status, code)


# What is rejected event by event


def test_each_event_code_with_its_index(rig: Rig) -> None:
    good = events(4, "mixed")
    twice = b'{"deviceId":"mixed-1","deviceId":"mixed-1"}'
    bad = [
        (b"{", "not_json"),
        (b'{"deviceId":"mixed-1","x":NaN}', "not_json"),
        (b'{"deviceId":"mixed-1"} {}', "not_json"),
        (b'{"deviceId":"mixed-1","x":' + b"[" * 5000 + b"]" * 5000 + b"}", "not_json"),
        (b'{"deviceId":"mixed-1","x":"\xff"}', "not_utf8"),
        (b'{"deviceId":"mixed-1","x":"\\ud800"}', "not_json"),
        (b'["deviceId"]', "not_an_object"),
        (b'"deviceId"', "not_an_object"),
        (b"17", "not_an_object"),
        (b"{}", "no_device"),
        (b'{"DeviceId":"mixed-1"}', "no_device"),
        (b'{"x":{"deviceId":"mixed-1"}}', "no_device"),
        (b'{"deviceId":17}', "bad_device"),
        (b'{"deviceId":null}', "bad_device"),
        (b'{"deviceId":""}', "bad_device"),
        (b'{"deviceId":".."}', "bad_device"),
        (b'{"deviceId":"a/b"}', "bad_device"),
        (b'{"deviceId":"a\\u0000"}', "bad_device"),
        ('{"deviceId":"é"}'.encode(), "bad_device"),
        (b'{"deviceId":"%b"}' % (b"x" * 129), "bad_device"),
        (twice, "bad_device"),
        (twice.replace(b"deviceId", b"device\\u0049d", 1), "bad_device"),
        (b'{"deviceId":"mixed-1","receivedAt":"2026-11-22T14:03:21.123Z"}', "reserved_field"),
        (b'{"deviceId":"mixed-1","received\\u0041t":1}', "reserved_field"),
        (b'{"deviceId":"mixed-1","pad":"%b"}' % (b"x" * EVENT_MAX), "event_too_large"),
    ]
    lines = [good[0]]
    for line, _ in bad:
        lines += [line, good[len(lines) % 4]]
    for form, headers in (("ndjson", NDJSON), ("json", JSON)):
        if form == "json":
            # An array that is not JSON, or not UTF-8, is refused whole: those are an event's affair in NDJSON only.
            part = [line for line in lines if line in good or dict(bad)[line] not in ("not_json", "not_utf8")]
            body = b"[" + b",".join(part) + b"]"
        else:
            part, body = lines, b"\n".join(lines)
        want = [(i, dict(bad)[line]) for i, line in enumerate(part) if line not in good]
        answer = rig.post(body, headers)
        rig.accepted(answer, len(part) - len(want), len(want))
        assert [(one["index"], one["code"]) for one in answer.json["rejected"]] == want
        assert all(one["detail"] for one in answer.json["rejected"])
        rig.sent.append(Batch([line for line in part if line in good]))
    for line, code in bad:
        with rig.nothing_stored():
            answer = rig.post(line)
            refused(answer, 400, "no_valid_event")
            assert [(one["index"], one["code"]) for one in answer.json["rejected"]] == [(0, code)]


TEXTS: dict[str, tuple[bytes, str]] = {
    "a byte that is none": (b'{"deviceId":"d","x":"\xff"}', "not_utf8"),
    "an overlong slash": (b'{"deviceId":"d","x":"\xc0\xaf"}', "not_utf8"),
    "an overlong quote": (b'{"deviceId":"d","x":"\xe0\x80\xa2"}', "not_utf8"),
    "half a surrogate pair in UTF-8": (b'{"deviceId":"d","x":"\xed\xa0\x80"}', "not_utf8"),
    "beyond Unicode": (b'{"deviceId":"d","x":"\xf5\x80\x80\x80"}', "not_utf8"),
    "a byte order mark": (b'\xef\xbb\xbf{"deviceId":"d"}', "not_json"),
    "UTF-16": ('{"deviceId":"d"}'.encode("utf-16"), "not_utf8"),
    "UTF-16 without a mark": ('{"deviceId":"d"}'.encode("utf-16-be"), "not_json"),
    "UTF-32": ('{"deviceId":"d"}'.encode("utf-32-be"), "not_json"),
}


@pytest.mark.parametrize("text", TEXTS)
def test_67_text_that_is_not_utf_8(rig: Rig, text: str) -> None:
    event, code = TEXTS[text]
    with rig.nothing_stored():
        for headers in (NDJSON, JSON):
            answer = rig.post(event, headers)
            refused(answer, 400, "no_valid_event")
            assert [one["code"] for one in answer.json["rejected"]] == [code]
        refused(rig.post(b"[%b]" % event, JSON), 400, "malformed_body")
    (good,) = events(1, "utf")
    answer = rig.post(b"%b\n%b\n%b\n" % (good, event, good))
    rig.accepted(answer, 2, 1)
    assert [(one["index"], one["code"]) for one in answer.json["rejected"]] == [(1, code)]
    rig.sent.append(Batch([good, good]))


def test_69_doubled_keys_are_kept_but_not_in_the_envelope(rig: Rig) -> None:
    rig.accept([b'{"x":1,"deviceId":"twice-1","x":2,"y":{"deviceId":"a","deviceId":"b"},"x":3}'])
    with rig.nothing_stored():
        for line in (b'{"deviceId":"twice-1","x":1,"deviceId":"twice-2"}', b'{"deviceId":"t","deviceI\\u0064":"t"}'):
            answer = rig.post(line)
            refused(answer, 400, "no_valid_event")
            assert [one["code"] for one in answer.json["rejected"]] == ["bad_device"]


def test_70_numbers_that_are_no_json(rig: Rig) -> None:
    rig.accept([b'{"deviceId":"number-1","x":[1e999,-1E+999,1e-999,-0,-0.0]}'])
    with rig.nothing_stored():
        for number in (b"NaN", b"Infinity", b"-Infinity", b"nan", b"0x10", b"01", b"+1", b".5", b"1.", b"1e"):
            answer = rig.post(b'{"deviceId":"number-1","x":%b}' % number)
            refused(answer, 400, "no_valid_event")
            assert [one["code"] for one in answer.json["rejected"]] == ["not_json"]
            refused(rig.post(b'[{"deviceId":"number-1","x":%b}]' % number, JSON), 400, "malformed_body")


def test_71_large_numbers_keep_their_digits(rig: Rig) -> None:
    for number in (str(1 << 63), str(1 << 64), str(-(1 << 64)), "1" + "0" * 30, "7" * 5000):
        line = b'{"deviceId":"large-1","x":%b,"y":%b.10}' % (number.encode(), number.encode())
        rig.accept([line])
        rig.accept([line, line], JSON, body=b"[%b,%b]" % (line, line))


def test_72_a_million_brackets(rig: Rig) -> None:
    for opening, closing in ((b"[", b"]"), (b'{"a":', b"1}")):
        deep = opening * 1_000_000
        headers, plain = {**GZIP, **JSON}, {**NDJSON, "Content-Encoding": "gzip"}
        with rig.nothing_stored():
            whole = deep + closing * 1_000_000
            for text in (deep, whole):
                answer = rig.post(gzip.compress(b"[" + text + b"]"), headers)
                refused(answer, 400, "malformed_body")
                for depth in (deep, whole, opening * 50_000, opening * 20_000 + closing * 20_000):
                    answer = rig.post(gzip.compress(b'{"deviceId":"d","x":%b}' % depth), plain)
                    refused(answer, 400, "no_valid_event")
                    assert answer.json["rejected"][0]["code"] in ("not_json", "event_too_large")


LARGE = {
    "20,000 keys": b'{"deviceId":"wide-1",%b}' % b",".join([b'"%d":0' % n for n in range(20_000)]),
    "a key of 250 KB": b'{"deviceId":"wide-1","%b":0}' % (b"k" * 250_000),
    "a number of 250 KB": b'{"deviceId":"wide-1","x":0.%b}' % (b"7" * 250_000),
    "an exponent of 250 KB": b'{"deviceId":"wide-1","x":1e-%b}' % (b"9" * 250_000),
    "a string of backslashes": b'{"deviceId":"wide-1","x":"%b"}' % (b"\\\\" * 120_000),
}


@pytest.mark.parametrize("what", LARGE)
def test_73_large_parts_of_an_event_take_no_time(rig: Rig, what: str) -> None:
    """Within the limits they are taken, beyond them refused, and soon. The best of three: others use the processor too."""
    line = LARGE[what]
    took_s = []
    for _ in range(3):
        began = time.perf_counter()
        rig.accept([line])
        took_s.append(time.perf_counter() - began)
    with rig.nothing_stored():
        larger = line[:-1] + b',"pad":"%b"}' % (b"x" * 700_000)
        for _ in range(3):
            began = time.perf_counter()
            refused(rig.post(larger), 400, "no_valid_event")
            took_s.append(time.perf_counter() - began)
    assert max(min(took_s[:3]), min(took_s[3:])) < 0.1, took_s


@settings(max_examples=80, deadline=None)
@given(
    st.one_of(
        st.text(max_size=12),
        st.text("aZ09._:@-/%\\\0\r\n\x1b[31m\u202e\u0130 ", max_size=140),
        st.sampled_from(["", ".", "..", "a" * 128, "a" * 129, "x" * (64 << 10)]),
    )
)
def test_74_device_ids_by_the_allow_list_alone(rig: Rig, device: str) -> None:
    allowed = re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._:@-]{0,127}", device, re.ASCII) is not None
    event = json.dumps({"deviceId": device}).encode()
    bare, path = b'{"x":1}', f"/v1/devices/{quote(device, safe='')}/events"
    if allowed:
        rig.accept([event])
        rig.accept([bare], path=path, stored=[b'{"x":1,"deviceId":"%b"}' % device.encode()])
        return
    answers = [rig.post(event)]
    if len(path) < 8 << 10:
        answers.append(rig.post(bare, path=path))
    for answer in answers:
        refused(answer, 400, "no_valid_event")
        assert [one["code"] for one in answer.json["rejected"]] == ["bad_device"]


def test_75_no_path_leads_out_of_the_store(rig: Rig) -> None:
    with rig.nothing_stored():
        for device in ("../../etc/x", "..%2f..%2fetc%2fx", "%2e%2e", "..", "%00", "a/../../b", "_leases", "C:%5Cx"):
            answer = rig.post(b'{"x":1}', path=f"/v1/devices/{device}/events")
            assert answer.status in (400, 404), answer
            answer = rig.post(json.dumps({"deviceId": unquote(device)}).encode())
            refused(answer, 400, "no_valid_event")
            assert [one["code"] for one in answer.json["rejected"]] == ["bad_device"]
        for path in ("/../etc/passwd", "/v1/partitions/../../x", "/v1/partitions/%2e%2e", "/v1/producers/%2e%2e%2fx"):
            refused(rig.get(path), 404, "not_found")
    there = {path.name for path in rig.system.store.iterdir()}
    assert all(re.fullmatch(r"[0-9]+|_[a-z]+(\.json)?", name) for name in there), there


def test_76_times_of_events_are_data(rig: Rig) -> None:
    times = [
        "0000-00-00T00:00:00Z",
        "9999-12-31T23:59:60.999999999+23:59",
        "-1",
        "yesterday",
        "",
        "2026-11-22T14:03:21",
    ]
    lines = [b'{"deviceId":"time-%d","time":"%b","at":%d}' % (n, at.encode(), -(10**n)) for n, at in enumerate(times)]
    before = rig.system.ends()
    rig.accept(lines)
    grown = {partition for partition, end in enumerate(rig.system.ends()) if end > before[partition]}
    assert grown == {zlib.crc32(b"time-%d" % n) % PARTITIONS for n in range(len(times))}


def test_77_one_bad_event_of_a_thousand(rig: Rig) -> None:
    lines = events(1000, "thousand")
    for bad, code in (
        (b'{"deviceId":"thousand-1"', "not_json"),
        (b'{"device":"x"}', "no_device"),
        (b"7", "not_an_object"),
    ):
        for headers in (NDJSON, GZIP):
            body = b"\n".join([*lines[:417], bad, *lines[418:]])
            answer = rig.post(gzip.compress(body) if headers is GZIP else body, headers)
            rig.accepted(answer, 999, 1)
            assert [(one["index"], one["code"]) for one in answer.json["rejected"]] == [(417, code)]
            rig.sent.append(Batch(lines[:417] + lines[418:]))


# Producers' numbers


@embedded_only
def test_the_producers_table(rig: Rig) -> None:
    bodies = [events(1, f"number{n}")[0] for n in range(12)]

    def send(n: int, sequence: int, epoch: int = 1) -> Answer:
        return rig.post(bodies[n], numbered(bodies[n], "table-1", sequence, epoch))

    def stored(n: int, sequence: int, epoch: int = 1) -> None:
        answer = send(n, sequence, epoch)
        rig.accepted(answer, 1)
        assert (answer.json["batch"], answer.json["duplicate"]) == (f"table-1:{epoch}:{sequence}", False)
        rig.sent.append(Batch([bodies[n]]))

    def duplicate(n: int, sequence: int, epoch: int = 1) -> None:
        answer = send(n, sequence, epoch)
        rig.accepted(answer, 1)
        assert (answer.json["batch"], answer.json["duplicate"]) == (f"table-1:{epoch}:{sequence}", True)

    stored(0, 1)
    with rig.nothing_stored():
        duplicate(0, 1)
        refused(send(1, 1), 422, "number_reused", last_epoch=1, last_sequence=1)
    for n in range(1, 7):
        stored(n, 2 * n)
    with rig.nothing_stored():
        duplicate(6, 12)
        duplicate(2, 4)
        refused(send(0, 1), 422, "number_too_old", last_sequence=12)
        refused(send(7, 5), 422, "number_too_old")
    stored(7, 1, epoch=2)
    with rig.nothing_stored():
        duplicate(6, 12)
        refused(send(8, 13), 409, "producer_fenced", last_epoch=2)
    stored(8, 2, epoch=2)
    known = rig.get("/v1/producers/table-1").json
    assert (known["epoch"], known["sequence"], len(known["kept"])) == (2, 2, 5)
    assert known["kept"][-1]["sha256"] == hashlib.sha256(bodies[8]).hexdigest()


@embedded_only
def test_a_batch_with_rejections_is_a_duplicate_with_the_same_rejections(rig: Rig) -> None:
    good = events(2, "again")
    body = b"\n".join([good[0], b"{}", good[1], b"x"])
    first = rig.post(body, numbered(body, "again-1", 1))
    rig.accepted(first, 2, 2)
    rig.sent.append(Batch(good))
    with rig.nothing_stored():
        second = rig.post(body, numbered(body, "again-1", 1))
    assert second.json == {**first.json, "duplicate": True}


@embedded_only
@pytest.mark.parametrize("how", ["number", "key"])
def test_two_copies_at_the_same_moment_are_one(rig: Rig, how: str) -> None:
    """Sixteen, on connections that the kernel spreads over both workers."""
    lines = events(50, "copies")
    body = b"\n".join(lines)
    headers = numbered(body, "copies-1", 1) if how == "number" else keyed("copies")
    start = threading.Barrier(16)

    def send(_: int) -> Answer:
        start.wait()
        return rig.post(body, headers)

    with ThreadPoolExecutor(16) as senders:
        answers = list(senders.map(send, range(16)))
    for answer in answers:
        rig.accepted(answer, 50)
    assert sorted(answer.json["duplicate"] for answer in answers) == [False] + [True] * 15
    rig.sent.append(Batch(lines))


@embedded_only
@pytest.mark.parametrize("how", ["number", "key", "neither"])
def test_55_a_lost_answer(rig: Rig, how: str) -> None:
    """The client is gone when the answer comes, and sends again. Without a number that is another batch: the control."""
    lines = events(20, "lost")
    body = b"\n".join(lines)
    headers = {"number": numbered(body, "lost-1", 1), "key": keyed("lost"), "neither": NDJSON}[how]
    before = sum(rig.system.ends())
    with Connection(rig.system.url) as connection:
        connection.send(head("POST", "/v1/events", {**headers, "Content-Length": str(len(body))}) + body)
        wait_for("the batch is stored", lambda: sum(rig.system.ends()) == before + len(lines))
        connection.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    rig.sent.append(Batch(lines))
    again = rig.post(body, headers)
    rig.accepted(again, 20)
    assert again.json["duplicate"] == (how != "neither")
    if how == "neither":
        rig.sent.append(Batch(lines))
    assert sum(rig.system.ends()) == before + len(lines) * (1 + (how == "neither"))


@embedded_only
def test_56_a_key_for_another_body(rig: Rig) -> None:
    first, other = events(2, "key")
    answer = rig.accept([first], keyed("key/1"))
    producer, _, _ = answer.json["batch"].rpartition(":0:1")
    with rig.nothing_stored():
        for body in (other, first + b"\n"):
            refused(rig.post(body, keyed("key/1")), 422, "number_reused")
        assert rig.post(first, keyed("key/1")).json == {**answer.json, "duplicate": True}
        for headers in (
            keyed(""),
            keyed("two words"),
            keyed("é"),
            keyed("x" * 256),
            numbered(first, "key-1", 1) | keyed("k"),
        ):
            refused(rig.post(first, headers), 400, "bad_header")
        with Connection(rig.system.url) as connection:
            twice = b"Idempotency-Key: a\r\nIdempotency-Key: a\r\nContent-Length: 2\r\n\r\n{}"
            connection.send(b"POST /v1/events HTTP/1.1\r\nHost: x\r\n" + twice)
            refused(connection.answer(), 400, "bad_header")
    known = rig.get(f"/v1/producers/{producer}").json
    assert (known["producer"], known["epoch"], known["sequence"]) == (producer, 0, 1)
    assert known["kept"][0]["sha256"] == hashlib.sha256(first).hexdigest()
    rig.accept([other], keyed("key/2"))
    # Each device of the path has its own keys: two that count their requests and measure the same are two batches.
    for device in ("key-1", "key-2"):
        bare = b'{"deviceId":"%b"}' % device.encode()
        rig.accept([b"{}"], keyed("1"), path=f"/v1/devices/{device}/events", stored=[bare])


@embedded_only
def test_59_a_retry_at_the_other_worker(rig: Rig) -> None:
    """A batch without a number is named after the worker that took it, which tells to which of them a connection goes."""
    lines = events(1, "other")
    with contextlib.ExitStack() as closing:
        workers: dict[str, Connection] = {}
        for _ in range(100):
            connection = closing.enter_context(Connection(rig.system.url))
            connection.send(head("POST", "/v1/events", {"Content-Length": str(len(lines[0]))}) + lines[0])
            answer = connection.answer()
            assert answer is not None
            rig.accepted(answer, 1)
            rig.sent.append(Batch(lines))
            workers.setdefault(answer.json["batch"].partition(":")[0], connection)
            if len(workers) == 2:
                break
        assert len(workers) == 2
        for headers in (numbered(lines[0], "other-1", 1), keyed("other")):
            duplicates = []
            for connection in workers.values():
                framed = {**headers, "Content-Length": str(len(lines[0]))}
                connection.send(head("POST", "/v1/events", framed) + lines[0])
                answer = connection.answer()
                assert answer is not None
                rig.accepted(answer, 1)
                duplicates.append(answer.json["duplicate"])
            assert duplicates == [False, True]
            rig.sent.append(Batch(lines))


@pytest.mark.parametrize(
    "header",
    [
        "p",
        "p;epoch=1;sequence=1",
        "p;epoch=1;sequence=0;sha256={sha}",
        "p;epoch=-1;sequence=1;sha256={sha}",
        "p;epoch=4294967296;sequence=1;sha256={sha}",
        "p;epoch=1;sequence=99999999999999999999;sha256={sha}",
        "p;epoch=1;sequence=1;sequence=2;sha256={sha}",
        "p;epoch=1;sequence=1;sha256={sha};x=1",
        "p;epoch=1;sequence=1;sha256=00",
        ";epoch=1;sequence=1;sha256={sha}",
        "é;epoch=1;sequence=1;sha256={sha}",
        "p/q;epoch=1;sequence=1;sha256={sha}",
        "x" * 65 + ";epoch=1;sequence=1;sha256={sha}",
    ],
)
def test_a_number_that_is_none(rig: Rig, header: str) -> None:
    (body,) = events(1, "none")
    given = header.replace("{sha}", hashlib.sha256(body).hexdigest())
    with rig.nothing_stored():
        refused(rig.post(body, {**NDJSON, "Penstock-Producer": given}), 400, "bad_header")


def test_another_body_than_announced(rig: Rig) -> None:
    (body,) = events(1, "mismatch")
    with rig.nothing_stored():
        answer = rig.post(body, numbered(body, "mismatch-1", 1, sha256="0" * 64))
        refused(answer, 400, "body_mismatch", retryable=True)
    rig.accept([body], numbered(body, "mismatch-1", 1))


# Routes


@pytest.mark.parametrize(
    ("method", "path", "status", "allow"),
    [
        ("GET", "/", 404, ""),
        ("GET", "/v1", 404, ""),
        ("POST", "/v1/events/", 404, ""),
        ("GET", "/v1/partitions/4", 404, ""),
        ("GET", "/v1/partitions/-1", 404, ""),
        ("GET", "/v1/partitions/x/events", 404, ""),
        ("GET", "/v1/producers/nobody", 404, ""),
        ("POST", "/v1/cut", 404, ""),
        ("GET", "/v1/events", 405, "POST"),
        ("DELETE", "/v1/events", 405, "POST"),
        ("GET", "/v1/devices/d/events", 405, "POST"),
        ("POST", "/v1/partitions", 405, "GET, HEAD"),
        ("DELETE", "/v1/partitions/0", 405, "GET, HEAD"),
        ("POST", "/health/live", 405, "GET, HEAD"),
    ],
)
def test_404_and_405(rig: Rig, method: str, path: str, status: int, allow: str) -> None:
    with rig.nothing_stored():
        answer = rig.post(b"{}", path=path, method=method) if method == "POST" else rig.get(path, method=method)
    refused(answer, status, {404: "not_found", 405: "method_not_allowed"}[status])
    if allow:
        assert answer.headers["allow"] == allow


@embedded_only
def test_partitions_and_their_events(rig: Rig) -> None:
    lines = events(30, "read")
    before = rig.system.ends()
    rig.accept(lines)
    every = rig.get("/v1/partitions")
    assert (every.status, every.headers["content-type"]) == (200, "application/json")
    assert re.fullmatch("[0-9a-f]{32}", every.json["hub"])
    assert (every.json["period_s"], len(every.json["partitions"])) == (10, PARTITIONS)
    found = []
    for partition, one in enumerate(every.json["partitions"]):
        assert rig.get(f"/v1/partitions/{partition}").json == one
        assert (one["partition"], one["first"]) == (partition, 0)
        at = before[partition]
        while at < one["next"]:
            answer = rig.get(f"/v1/partitions/{partition}/events?from={at}&limit=3")
            assert answer.headers["content-type"] == "application/x-ndjson"
            got = answer.body.splitlines()
            assert len(got) == min(3, one["next"] - at)
            found += [(json.loads(line)["n"], unstamp(line)[0]) for line in got]
            assert answer.headers["penstock-next-offset"] == str(at + len(got))
            assert answer.headers["penstock-end-offset"] == str(one["next"])
            at += len(got)
        answer = rig.get(f"/v1/partitions/{partition}/events?from=end")
        assert (answer.status, answer.body, answer.headers["penstock-next-offset"]) == (200, b"", str(one["next"]))
        refused(rig.get(f"/v1/partitions/{partition}/events?from={one['next'] + 1}"), 400, "offset_beyond_end")
        frames = rig.get(f"/v1/partitions/{partition}/events?from=start", {"Accept": "application/vnd.penstock.frames"})
        assert frames.headers["content-type"] == "application/vnd.penstock.frames"
        assert frames.body[:2] == b"PF"
    assert [event for _, event in sorted(found)] == lines
    for bad in ("from=-1", "from=x", "limit=0", "limit=10001", "limit=x"):
        refused(rig.get(f"/v1/partitions/0/events?{bad}"), 400, "bad_parameter")
    assert rig.get("/v1/partitions", method="HEAD").body == b""


@embedded_only
def test_status_and_health_on_both_sides(rig: Rig) -> None:
    system = rig.system
    for url in (system.url, system.admin):
        for path in ("/health/live", "/health/ready"):
            answer = request(url, "GET", path)
            assert (answer.status, answer.json) == (200, {"ok": True})
        status = request(url, "GET", "/v1/status").json
        assert (status["ok"], status["problems"]) == (True, [])
        assert {part["name"] for part in status["parts"]} == {"api-0", "api-1", "archiver"}
        assert [one["next"] for one in status["partitions"]] == system.ends()
        assert status["storage"]["state"] == "ok"
        assert status["counters"].keys() >= {"duplicates", "dedup_window_passed", "lost_batches"}
    with rig.nothing_stored():
        for method, path in (("POST", "/v1/events"), ("GET", "/v1/partitions"), ("POST", "/v1/devices/d/events")):
            refused(request(system.admin, method, path, b'{"deviceId":"d"}'), 404, "not_found")
        cut = request(system.admin, "POST", "/v1/cut")
        assert (cut.status, cut.json) == (200, {"next": [str(end) for end in system.ends()]})
        refused(request(system.admin, "GET", "/v1/cut"), 405, "method_not_allowed")


# Busy, and ending


def test_more_than_the_queue_holds_is_answered_503(make_system: Callable[..., System]) -> None:
    options = ("--queue-batches-max", "1")
    system = make_system(partitions=PARTITIONS, workers=1, options=options).start()
    lines = [b'{"deviceId":"busy-%d"}' % n for n in range(400)]

    def send(line: bytes) -> tuple[bytes, Answer]:
        return line, request(system.url, "POST", "/v1/events", line, NDJSON)

    with ThreadPoolExecutor(32) as senders:
        answers = list(senders.map(send, lines))
    taken = [line for line, answer in answers if answer.status == 200]
    for _, answer in answers:
        if answer.status != 200:
            refused(answer, 503, "hub_busy", retryable=True)
    assert 0 < len(taken) < len(lines)
    system.settle()
    assert problems(system.store, PARTITIONS, [[Batch(taken)]]) == []


def test_sigterm_answers_everything_that_it_accepted(make_system: Callable[..., System]) -> None:
    """Clients post on kept-alive connections while SIGTERM comes: an answer for each request that was taken, and each 200 is stored."""
    system = make_system(partitions=PARTITIONS).start()
    stored: list[list[Batch]] = []
    half = Connection(system.url)
    (late,) = events(1, "late")
    half.send(head("POST", "/v1/events", {"Content-Length": str(len(late))}) + late[:10])
    going = threading.Event()
    cut_off: list[str] = []

    def client(number: int) -> None:
        mine: list[Batch] = []
        stored.append(mine)
        with Connection(system.url) as connection:
            for n in range(100_000):
                line = b'{"deviceId":"drain-%d","n":%d}' % (number, n)
                try:
                    connection.send(head("POST", "/v1/events", {"Content-Length": str(len(line))}) + line)
                    answer = connection.answer()
                except (BrokenPipeError, ConnectionResetError):
                    answer = None
                if answer is None:
                    # The server closed an idle connection while this was on its way: not confirmed, perhaps not even read.
                    cut_off.append(f"{number} {n}")
                    mine.append(Batch([line], confirmed=False))
                    return
                if answer.status == 503:
                    refused(answer, 503, "draining", retryable=True)
                    return
                assert answer.status == 200, answer
                mine.append(Batch([line]))
                if n == 20:
                    going.set()
                if answer.headers.get("connection") == "close":
                    return

    with ThreadPoolExecutor(16) as clients:
        running = [clients.submit(client, number) for number in range(16)]
        assert going.wait(20)
        system.up.signal(signal.SIGTERM)
        wait_for("nobody is accepted any more", lambda: not _accepts(system.url))
        half.send(late[10:])
        answer = half.answer()
        for one in running:
            one.result(timeout=30)
    assert system.up.wait() == 0
    assert cut_off == [], "every request that was sent on an open connection has an answer"
    assert answer is not None
    if answer.status == 200:
        stored.append([Batch([late])])
    else:
        refused(answer, 503, "draining", retryable=True)
    half.close()
    system.start()
    system.settle()
    assert problems(system.store, PARTITIONS, stored) == []


def _accepts(url: str) -> bool:
    try:
        Connection(url).close()
    except OSError:
        return False
    return True
