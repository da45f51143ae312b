"""Routes and reads, without a socket."""

from __future__ import annotations

import msgspec
import pytest

from penstock.clock import parse_timestamp, timestamp
from penstock.errors import HubBroken, ReaderFenced, StorageFull
from penstock.events import FrameKind
from penstock.server.app import Router, Where, routes
from penstock.server.app import answer as run
from penstock.server.message import Reply, Request, Response
from penstock.server.read import FRAMES, Reads
from penstock.testing import FakeClock, MemoryHub, MemoryLog
from penstock.wire.frame import HEADER_BYTES, decode


class Groups:
    """Notes who was heard, and refuses epochs under `newest`."""

    def __init__(self) -> None:
        self.heard_of: list[tuple[str, int, int, int]] = []
        self.newest = 0

    def heard(self, group: str, partition: int, epoch: int, checkpoint: int) -> None:
        if epoch < self.newest:
            raise ReaderFenced("Fenced.", last_epoch=self.newest)
        self.heard_of.append((group, partition, epoch, checkpoint))

    def forget(self, group: str) -> bool:
        return any(group == name for name, *_ in self.heard_of)


class Intake:
    def __init__(self) -> None:
        self.posts: list[tuple[bytes, str | None]] = []

    def post(self, request: Request, device: str | None, reply: Reply) -> None:
        self.posts.append((request.body, device))
        reply(Response(200, b"{}"))


def line(number: int) -> bytes:
    return b'{"deviceId":"d-1","n":%d}' % number


class Api:
    """The routes over a hub in memory; what blocks runs at once."""

    def __init__(self, where: Where = Where.LISTEN) -> None:
        self.clock = FakeClock()
        self.hub = MemoryHub(partitions=3, clock=self.clock)
        self.intake = Intake()
        self.full = False
        self.log = MemoryLog()
        self.groups = Groups()
        self.reads = Reads(
            self.hub,
            groups=self.groups,
            status=lambda: {"ok": True, "totals": 1},
            producer=lambda name, _owner: {"producer": name} if name.startswith("known") else None,
            check=self._check,
        )
        every = routes(self.intake, self.reads, self._run)
        self.router = Router(route for route in every if where in route.where)

    def _check(self) -> None:
        if self.full:
            raise StorageFull("Full.")

    def _run(self, work):
        return lambda request, names, reply: reply(run(work, self.log, request, names))

    def ask(self, method: str, target: str, *, body: bytes = b"", group: str = "", **headers: str) -> Response:
        path, _, query = target.encode().partition(b"?")
        given = {name.encode(): value.encode() for name, value in headers.items()}
        if group:
            given[b"penstock-group"] = group.encode()
        answers: list[Response] = []
        self.router(Request(method.encode(), path, query, given, body), answers.append)
        assert len(answers) == 1
        return answers[0]


@pytest.fixture
def api() -> Api:
    return Api()


@pytest.fixture
def admin() -> Api:
    return Api(Where.ADMIN)


def code(answer: Response) -> str:
    assert answer.content_type == b"application/problem+json"
    return msgspec.json.decode(answer.body)["code"]


# Routes


@pytest.mark.parametrize(
    ("path", "device"),
    [
        ("/v1/events", None),
        ("/v1/devices/d-1/events", "d-1"),
        ("/v1/devices/a%3Ab%40c/events", "a:b@c"),
        ("/v1/devices/a%2Fb/events", "a/b"),
        ("/v1/devices/..%2f..%2fetc/events", "../../etc"),
        ("/v1/devices/../events", ".."),
        ("/v1/devices//events", ""),
        ("/v1/devices/%00/events", "\0"),
        ("/v1/devices/%zz/events", "%zz"),
        ("/v1/devices/%ff/events", "\ufffd"),
        ("/v1/devices/%C3%A9/events", "é"),
    ],
)
def test_posts_go_to_the_intake_with_the_device_of_the_path(api, path, device):
    assert api.ask("POST", path, body=b"x").status == 200
    assert api.intake.posts == [(b"x", device)]


@pytest.mark.parametrize(
    "path",
    ["/", "/v1", "/v1/", "/v1/events/", "//v1/events", "/V1/events", "/v1/devices/d/events/", "/v1/devices/a/b/events",
     "/v1/%65vents", "*", "", "/v1/cut", "/v1/producers/"[:-1]],
)  # fmt: skip
def test_other_paths_are_not_found(api, path):
    answer = api.ask("POST", path)
    assert (answer.status, code(answer)) == (404, "not_found")
    assert not api.intake.posts


@pytest.mark.parametrize(
    ("method", "path", "allow"),
    [
        ("GET", "/v1/events", b"POST"),
        ("HEAD", "/v1/events", b"POST"),
        ("PUT", "/v1/devices/d/events", b"POST"),
        ("POST", "/v1/partitions", b"GET, HEAD"),
        ("DELETE", "/v1/partitions/0", b"GET, HEAD"),
        ("OPTIONS", "/v1/status", b"GET, HEAD"),
        ("POST", "/health/live", b"GET, HEAD"),
    ],
)
def test_other_methods_are_refused_with_those_that_are_allowed(api, method, path, allow):
    answer = api.ask(method, path)
    assert (answer.status, code(answer), dict(answer.headers)) == (405, "method_not_allowed", {b"Allow": allow})


@pytest.mark.parametrize("path", ["/v1/partitions", "/v1/partitions/1", "/v1/partitions/1/events", "/v1/status",
                                  "/v1/partitions/1/offset?at=2026-11-22T14:03:21.123Z",
                                  "/v1/producers/known", "/health/live", "/health/ready"])  # fmt: skip
def test_head_is_get(api, path):
    assert api.ask("HEAD", path) == api.ask("GET", path)
    assert api.ask("GET", path).status == 200


def test_the_admin_listener_takes_no_events_and_cuts(admin):
    for method, path in (("POST", "/v1/events"), ("GET", "/v1/partitions"), ("GET", "/v1/producers/known")):
        assert admin.ask(method, path).status == 404
    for path in ("/health/live", "/health/ready", "/v1/status"):
        assert admin.ask("GET", path).status == 200
    admin.hub.put(1, [line(0), line(1)])
    answer = admin.ask("POST", "/v1/cut")
    assert msgspec.json.decode(answer.body) == {"next": ["0", "2", "0"]}
    kinds = [frame.kind for frame in admin.hub.read(1, "0", bytes_max=1 << 20).frames]
    assert kinds[-1] is FrameKind.CUT_MARKER


def test_a_refusal_names_the_trace_of_its_request(api):
    trace = "4bf92f3577b34da6a3ce929d0e0e4736"
    header = {"traceparent": f"00-{trace}-00f067aa0ba902b7-01"}
    for method, target in (("GET", "/nothing"), ("DELETE", "/v1/events"), ("GET", "/v1/partitions/9")):
        assert msgspec.json.decode(api.ask(method, target, **header).body)["trace_id"] == trace
        assert "trace_id" not in msgspec.json.decode(api.ask(method, target).body)
    assert api.ask("POST", "/v1/events", **header).body == b"{}"


# Reads


def test_status_producers_and_health(api):
    assert msgspec.json.decode(api.ask("GET", "/v1/status").body)["ok"] is True
    assert msgspec.json.decode(api.ask("GET", "/v1/producers/known%20one").body) == {"producer": "known one"}
    assert code(api.ask("GET", "/v1/producers/other")) == "not_found"
    assert api.ask("GET", "/health/ready").status == 200
    api.full = True
    ready = api.ask("GET", "/health/ready")
    assert (ready.status, code(ready), ready.headers) == (503, "storage_full", ((b"Retry-After", b"1"),))
    assert api.ask("GET", "/health/live").status == 200


def test_partitions(api):
    api.hub.put(2, [line(0), line(1)])
    api.clock.advance(1.5)
    every = msgspec.json.decode(api.ask("GET", "/v1/partitions").body)
    assert (every["hub"], every["period_s"], len(every["partitions"])) == (api.hub.id, 3600, 3)
    one = msgspec.json.decode(api.ask("GET", "/v1/partitions/2").body)
    assert one == every["partitions"][2]
    assert (one["partition"], one["first"], one["next"]) == (2, 0, 2)
    assert one["bytes"] > 0
    assert one["enqueued_first"].endswith("Z")


@pytest.mark.parametrize("name", ["3", "99999999999999999999", "-1", "x", "", "1.0", "%31x", "²", "+1", "0x1"])
@pytest.mark.parametrize("below", ["", "/events", "/offset"])
def test_other_partitions_are_not_found(api, name, below):
    assert code(api.ask("GET", f"/v1/partitions/{name}{below}")) == "not_found"


def headers(answer: Response) -> dict[bytes, bytes]:
    return dict(answer.headers)


def test_events_as_lines(api):
    for number in range(0, 10, 2):
        api.hub.put(0, [line(number), line(number + 1)])
    answer = api.ask("GET", "/v1/partitions/0/events")
    assert answer.content_type == b"application/x-ndjson"
    assert answer.body == b"".join(line(number) + b"\n" for number in range(10))
    offsets = {b"Penstock-Next-Offset": b"10", b"Penstock-End-Offset": b"10"}
    assert headers(answer) == {b"Penstock-Hub": api.hub.id.encode(), **offsets}


@pytest.mark.parametrize("limit", [1, 2, 3, 7, 10, 11])
def test_pages_of_any_size_give_every_event_once(api, limit):
    for number in range(0, 10, 2):
        api.hub.put(0, [line(number), line(number + 1)])
    api.hub.cut()
    got, start = b"", "start"
    while True:
        answer = api.ask("GET", f"/v1/partitions/0/events?from={start}&limit={limit}")
        assert answer.body.count(b"\n") <= limit
        if not answer.body:
            break
        got += answer.body
        start = headers(answer)[b"Penstock-Next-Offset"].decode()
    assert got == b"".join(line(number) + b"\n" for number in range(10))
    assert start == "10"


def test_an_answer_of_many_large_events_is_bounded_and_goes_on(api):
    large = [b'{"deviceId":"d","x":"%s"}' % (b"x" * 200_000) for _ in range(4)]
    for _ in range(10):
        api.hub.put(0, large)
    total, start = 0, "0"
    while start != "40":
        answer = api.ask("GET", f"/v1/partitions/0/events?from={start}&limit=10000")
        assert 0 < len(answer.body) <= 4 << 20
        total += answer.body.count(b"\n")
        start = headers(answer)[b"Penstock-Next-Offset"].decode()
    assert total == 40


@pytest.mark.parametrize("limit", [1, 1000])
def test_events_as_frames(api, limit):
    api.hub.put(0, [line(0), line(1)])
    api.hub.put(0, [line(2)] * 500)
    got: list[object] = []
    start = "0"
    while start != "502":
        answer = api.ask("GET", f"/v1/partitions/0/events?from={start}&limit={limit}", accept=FRAMES.decode())
        assert answer.content_type == FRAMES
        got += split(answer.body)
        start = headers(answer)[b"Penstock-Next-Offset"].decode()
    assert got == list(api.hub.read(0, "0", bytes_max=1 << 20).frames)


def split(data: bytes) -> list[object]:
    frames = []
    while data:
        size = int.from_bytes(data[4:8], "little") + int.from_bytes(data[40:44], "little")
        assert size >= HEADER_BYTES
        frames.append(decode(data[:size]))
        data = data[size:]
    return frames


def test_events_from_the_end_and_of_an_empty_partition(api):
    api.hub.put(0, [line(0)])
    for target in ("/v1/partitions/0/events?from=end", "/v1/partitions/1/events"):
        answer = api.ask("GET", target)
        assert (answer.status, answer.body) == (200, b"")
        assert headers(answer)[b"Penstock-Next-Offset"] == headers(answer)[b"Penstock-End-Offset"]


def test_events_that_are_trimmed_or_not_there_yet(api):
    api.hub.put(0, [line(0)])
    api.hub.put(0, [line(1)])
    api.hub.trim(0, before="1")
    gone = api.ask("GET", "/v1/partitions/0/events?from=0")
    assert (gone.status, code(gone), msgspec.json.decode(gone.body)["first"]) == (410, "offset_trimmed", "1")
    assert api.ask("GET", "/v1/partitions/0/events?from=start").body == line(1) + b"\n"
    beyond = api.ask("GET", "/v1/partitions/0/events?from=3")
    assert (beyond.status, code(beyond)) == (400, "offset_beyond_end")


@pytest.mark.parametrize("size", [1, 1000, 4 << 20])
def test_frames_by_bytes_are_one_read_of_the_hub(api, size):
    for _ in range(4):
        api.hub.put(0, [line(0)] * 30)
    api.hub.cut()
    answer = api.ask("GET", f"/v1/partitions/0/events?from=35&bytes={size}", accept=FRAMES.decode())
    read = api.hub.read(0, "35", bytes_max=size)
    assert split(answer.body) == list(read.frames)
    assert headers(answer)[b"Penstock-Next-Offset"].decode() == read.next_offset


@pytest.mark.parametrize(
    ("at", "offset"),
    [
        ("1970-01-01T00:00:00Z", "0"),
        ("2026-11-22T14:00:00.000Z", "0"),
        ("2026-11-22T14:00:00.001Z", "1"),
        ("2026-11-22T15:00:00.0005%2B01:00", "1"),
        ("2026-11-22T14:00:10Z", "1"),
        ("2026-11-22T14:00:10.001Z", "2"),
        ("9999-12-31T23:59:59Z", "2"),
    ],
)
def test_where_a_time_lies(at, offset):
    api = Api()
    api.clock = api.hub._clock = FakeClock(parse_timestamp("2026-11-22T14:00:00Z"))
    assert timestamp(api.clock.now_ms()) == "2026-11-22T14:00:00.000Z"
    api.hub.put(0, [line(0)])
    api.clock.advance(10)
    api.hub.put(0, [line(1)])
    answer = api.ask("GET", f"/v1/partitions/0/offset?at={at}")
    assert msgspec.json.decode(answer.body) == {"partition": 0, "offset": offset}


@pytest.mark.parametrize(
    "at", ["", "x", "2026-11-22", "2026-11-22T14:00:00", "1795356000", "2026-13-01T00:00:00Z", "%00"]
)
def test_what_is_no_time(api, at):
    answer = api.ask("GET", f"/v1/partitions/0/offset?at={at}")
    assert (answer.status, code(answer), msgspec.json.decode(answer.body)["parameter"]) == (400, "bad_parameter", "at")


# Groups


@pytest.mark.parametrize("path", ["/v1/partitions/1/events", "/v1/partitions/1"])
def test_who_reads_is_heard_before_anything_is_given(api, path):
    assert api.ask("GET", path, group="alarms;epoch=3;checkpoint=0").status == 200
    assert api.ask("GET", path, group="$archive; epoch=4 ;checkpoint=1234").status == 200
    assert api.ask("GET", path).status == 200
    assert api.groups.heard_of == [("alarms", 1, 3, 0), ("$archive", 1, 4, 1234)]
    api.groups.newest = 5
    answer = api.ask("GET", path, group="alarms;epoch=4;checkpoint=0")
    assert (answer.status, code(answer), msgspec.json.decode(answer.body)["last_epoch"]) == (409, "reader_fenced", 5)


@pytest.mark.parametrize(
    "group",
    [
        *(
            "alarms",
            "alarms;epoch=1",
            "alarms;epoch=x;checkpoint=1",
            "a;checkpoint=1;epoch=1",
            "a;epoch=1;checkpoint=1;",
        ),
        *(f"{name};epoch=1;checkpoint=1" for name in ("", "a/b", ".", "é", "$", "a" * 65)),
        *("a;epoch=-1;checkpoint=1", "a;epoch=1;checkpoint=1234567890123456789"),
    ],
)
def test_a_header_that_names_no_group(api, group):
    answer = api.ask("GET", "/v1/partitions/1/events", group=group)
    assert (answer.status, code(answer)) == (400, "bad_header")
    assert api.groups.heard_of == []


def test_a_group_is_forgotten_on_request(admin):
    assert code(admin.ask("DELETE", "/v1/groups/alarms")) == "not_found"
    admin.groups.heard("alarms", 0, 1, 0)
    assert admin.ask("DELETE", "/v1/groups/alarms").status == 200
    assert Api().ask("DELETE", "/v1/groups/alarms").status == 404


@pytest.mark.parametrize("query", ["from=-1", "from=x", "from=", "from=1.5", "from=²", "limit=0", "limit=10001", "limit=x",
                                   "limit=", "from=" + "9" * 30, "limit=-1"])  # fmt: skip
def test_parameters_that_make_no_sense(api, query):
    answer = api.ask("GET", f"/v1/partitions/0/events?{query}")
    assert (answer.status, code(answer)) == (400, "bad_parameter")
    assert msgspec.json.decode(answer.body)["parameter"] == query.partition("=")[0]


def test_a_read_that_fails_is_answered(api):
    def fail(*_: object) -> None:
        raise failure

    api.hub.bounds = fail
    failure: Exception = HubBroken("Broken.")
    assert code(api.ask("GET", "/v1/partitions/0")) == "hub_broken"
    assert not api.log.lines
    failure = KeyError("x")
    assert code(api.ask("GET", "/v1/partitions/0", traceparent=f"00-{'a' * 32}-{'b' * 16}-01")) == "internal_error"
    assert [(level, about["trace_id"]) for level, _, about in api.log.lines] == [("error", "a" * 32)]
