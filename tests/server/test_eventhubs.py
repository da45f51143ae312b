"""Event Hubs' paths over a real intake: which device and properties an event gets, and that a batch is stored whole or not at all."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any
from zlib import crc32

import pytest

from penstock.events import Event
from penstock.server import ingest as ingest_module
from penstock.server.app import Router, routes
from penstock.server.auth import ANYONE
from penstock.server.eventhubs import unnamed
from penstock.server.message import Request, Response
from penstock.server.read import Reads
from penstock.wire.frame import events
from tests.server.test_ingest import HeldHub, Intake, refused, run

PARTITIONS = 4
BATCH = b"application/vnd.microsoft.servicebus.json"
Post = Callable[..., Awaitable[Response]]


def device_in(partition: int, name: str = "d") -> str:
    return next(f"{name}-{n}" for n in range(1000) if crc32(f"{name}-{n}".encode()) % PARTITIONS == partition)


def hubs(act: Callable[[Post], Awaitable[None]]) -> HeldHub:
    """Runs `act` with a way to post; the hub afterwards."""
    hub = HeldHub()

    async def whole(intake: Intake) -> None:
        reads = Reads(hub, groups=None, status=dict, producer=lambda *_: None, check=lambda: None)  # type: ignore[arg-type]
        router = Router(routes(intake.ingest, reads, lambda _: lambda *_: None), lambda _: ANYONE._replace(key="k-1"))

        def post(target: str, body: bytes | list[Any], **headers: bytes) -> asyncio.Future[Response]:
            named = {name.replace("_", "-").encode(): value for name, value in headers.items()}
            if isinstance(body, list):
                named[b"content-type"] = BATCH
                body = json.dumps(body).encode()
            future: asyncio.Future[Response] = intake.loop.create_future()
            path, _, query = target.encode().partition(b"?")

            def reply(response: Response) -> None:
                intake.replies += 1
                future.set_result(response)

            intake.posts += 1
            router(Request(b"POST", path, query, named, body), reply)
            return future

        await act(post)

    run(whole, hub)
    return hub


def stored(hub: HeldHub) -> list[Event]:
    return [one for p in range(PARTITIONS) for one in events(hub.read(p, "0", bytes_max=1 << 30))]


def unstamped(event: Event) -> bytes:
    head, _, tail = event.body.partition(b',"receivedAt":"2026-11-22T14:00:00.000Z"')
    return head + tail


def one_of(hub: HeldHub) -> tuple[str, bytes]:
    (event,) = stored(hub)
    return event.device, unstamped(event)


def posted(target: str, body: bytes | list[Any], **headers: bytes) -> HeldHub:
    async def act(post: Post) -> None:
        response = await post(target, body, **headers)
        assert response == Response(201, b"", b"application/xml; charset=utf-8"), response

    return hubs(act)


def rejected(target: str, body: bytes | list[Any], *wanted: tuple[int, str], says: str = "", **headers: bytes) -> None:
    async def act(post: Post) -> None:
        found = refused(await post(target, body, **headers), 400, "no_valid_event")
        assert [(one["index"], one["code"]) for one in found["rejected"]] == list(wanted)
        assert says in found["rejected"][0]["detail"]

    assert hubs(act).lines() == []


# One event


def test_an_event_that_names_its_device() -> None:
    body = b' {"deviceId": "d-1",\r\n "x": 21.40}\n'
    for target in ("/hub/messages", "/any.thing/messages?timeout=60&api-version=2014-01"):
        assert one_of(posted(target, body, brokerproperties=b'{"PartitionKey":"other"}')) == (
            "d-1",
            b'{"deviceId": "d-1",   "x": 21.40}',
        )


def test_the_device_comes_from_the_path_or_the_partition_key() -> None:
    assert one_of(posted("/hub/publishers/p-1/messages", b'{"x":1}')) == ("p-1", b'{"x":1,"deviceId":"p-1"}')
    assert one_of(posted("/hub/publishers/p%2D1/messages", b"{ }")) == ("p-1", b'{ "deviceId":"p-1"}')
    keyed = posted("/hub/messages", b'{"x":1}', brokerproperties=b'{"PartitionKey":"k-1","SessionId":"s"}')
    assert one_of(keyed) == ("k-1", b'{"x":1,"deviceId":"k-1"}')
    field = posted("/hub/messages", b'{"DeviceId":"dev-01"}', penstock_device_field=b"DeviceId")
    assert one_of(field) == ("dev-01", b'{"DeviceId":"dev-01"}')


def test_who_names_no_device_goes_round_the_partitions() -> None:
    async def act(post: Post) -> None:
        for _ in range(2 * PARTITIONS):
            assert (await post("/hub/messages", b'{"x":1}')).status == 201

    hub = hubs(act)
    assert [hub.bounds(p).next for p in range(PARTITIONS)] == [2] * PARTITIONS
    assert {event.device for event in stored(hub)} == {unnamed(p, PARTITIONS) for p in range(PARTITIONS)}


def test_the_devices_of_those_without_a_name_are_the_first_that_fit() -> None:
    for partitions in (1, 4, 16):
        names = [unnamed(p, partitions) for p in range(partitions)]
        assert [crc32(name.encode()) % partitions for name in names] == list(range(partitions))
        for partition, name in enumerate(names):
            smaller = range(int(name.removeprefix("unnamed-")))
            assert all(crc32(b"unnamed-%d" % n) % partitions != partition for n in smaller)


@pytest.mark.parametrize("partition", range(PARTITIONS))
def test_a_partition_takes_its_own_devices(partition: int) -> None:
    target, device = f"/hub/partitions/{partition}/messages", device_in(partition)
    bare = posted(target, b'{"x":1}')
    assert one_of(bare)[0] == unnamed(partition, PARTITIONS)
    assert bare.bounds(partition).next == 1
    assert one_of(posted(target, b'{"deviceId":"%b"}' % device.encode()))[0] == device
    key = b'{"PartitionKey":"%b"}' % device.encode()
    assert one_of(posted(target, b"{}", brokerproperties=key))[0] == device
    elsewhere = device_in((partition + 1) % PARTITIONS)
    says = f"partition {(partition + 1) % PARTITIONS}, and not in {partition}"
    rejected(target, b'{"deviceId":"%b"}' % elsewhere.encode(), (0, "bad_device"), says=says)
    key = b'{"PartitionKey":"%b"}' % elsewhere.encode()
    rejected(target, b"{}", (0, "bad_device"), says=says, brokerproperties=key)
    rejected(target, b'{"deviceId":17}', (0, "bad_device"), says="not a string")


@pytest.mark.parametrize("number", ["4", "-1", "x", "1" * 30, "%D9%A3", "+1", ""])
def test_other_partitions_are_not_found(number: str) -> None:
    async def act(post: Post) -> None:
        for body in (b'{"x":1}', [{"Body": "{}"}]):
            refused(await post(f"/hub/partitions/{number}/messages", body), 404, "not_found")

    assert hubs(act).lines() == []


@pytest.mark.parametrize("hub", ["v1", "health", "docs", "openapi.json", "metrics", ""])
def test_the_api_s_own_words_are_no_hubs(hub: str) -> None:
    async def act(post: Post) -> None:
        for path in ("messages", "partitions/0/messages", "publishers/d-1/messages"):
            refused(await post(f"/{hub}/{path}", b'{"deviceId":"d-1"}'), 404, "not_found")

    assert hubs(act).lines() == []


def test_text_becomes_an_object() -> None:
    key = {"brokerproperties": b'{"PartitionKey":"k-1"}'}
    for text, body in (
        (b"Message1", '{"body":"Message1","deviceId":"k-1"}'),
        (b' "quoted" \n', '{"body":" \\"quoted\\" \\n","deviceId":"k-1"}'),
        (b"17", '{"body":"17","deviceId":"k-1"}'),
        ("é\0{".encode(), '{"body":"é\\u0000{","deviceId":"k-1"}'),
    ):
        assert one_of(posted("/hub/messages", text, **key)) == ("k-1", body.encode())


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b'{"a":1', "not_json"),
        (b'{"a":1}{"a":2}', "not_json"),
        (b'{"a":1}\n{"a":2}', "not_json"),
        (b'{"a":"\n"}', "not_json"),
        (b'{"a":' * 5000, "not_json"),
        (b"\xef\xbb\xbf{}", "not_json"),
        ("{}".encode("utf-16-le"), "not_json"),
        ("{}".encode("utf-16"), "not_utf8"),
        (b'{"a":"\xff"}', "not_utf8"),
        (b"text\xff", "not_utf8"),
        (b"[]", "not_an_object"),
        (b'[{"deviceId":"d-1"}]', "not_an_object"),
        (b'{"a":"%b"}' % (b"x" * (1 << 18)), "event_too_large"),
        (b"x" * (1 + (1 << 18)), "event_too_large"),
        (b'{"receivedAt":1}', "reserved_field"),
        (b'{"deviceId":"d-1","deviceId":"d-1"}', "bad_device"),
        (b'{"deviceId":"a/b"}', "bad_device"),
    ],
)
def test_one_event_that_is_rejected(body: bytes, code: str) -> None:
    rejected("/hub/messages", body, (0, code))
    if code not in ("bad_device",):
        rejected("/hub/publishers/p-1/messages", body, (0, code))
    if "xff" not in repr(body):
        rejected("/hub/messages", [{"Body": "{}"}, {"Body": body.decode()}], (1, code))


@pytest.mark.parametrize("body", [b"", b" \r\n", b"[]", b" [ ] "])
def test_nothing_at_all(body: bytes) -> None:
    async def act(post: Post) -> None:
        kind = BATCH if b"[" in body else b"application/json"
        refused(await post("/hub/messages", body, content_type=kind), 400, "empty_batch")

    assert hubs(act).lines() == []


def test_devices_that_are_none() -> None:
    rejected("/hub/publishers/a%2Fb/messages", b"{}", (0, "bad_device"))
    rejected("/hub/publishers//messages", b"{}", (0, "bad_device"))
    rejected("/hub/publishers/p-1/messages", b'{"deviceId":"p-2"}', (0, "bad_device"))
    key = b'{"PartitionKey":"a/b"}'
    rejected("/hub/messages", b"{}", (0, "bad_device"), says="PartitionKey", brokerproperties=key)


def test_headers_become_properties() -> None:
    names = "authorization host user_agent accept accept_encoding x_ms_retrypolicy connection x_forwarded_for content_language"
    noise = dict.fromkeys([*names.split(), "traceparent", "sec_fetch_mode", "date", "idempotency_key"], b"x")
    hub = posted("/hub/messages", b'{"deviceId":"d-1"}', alert=b"Strong Wind", penstock_property_site=b"A", **noise)
    (event,) = stored(hub)
    assert json.loads(event.properties) == {"alert": "Strong Wind", "site": "A"}
    assert json.loads(event.body)["properties"] == json.loads(event.properties)
    rejected("/hub/messages", b'{"deviceId":"d-1","properties":1}', (0, "reserved_field"), alert=b"x")
    assert one_of(posted("/hub/messages", b'{"deviceId":"d-1","properties":1}', **noise))[0] == "d-1"


@pytest.mark.parametrize(
    "header",
    [b"x", b"[]", b'{"PartitionKey":7}', b'{"CorrelationId","3211"}', b"{}, {}", b"\xff", b'{"PartitionKey":"\xff"}'],
)
def test_broker_properties_that_are_none(header: bytes) -> None:
    async def act(post: Post) -> None:
        refused(await post("/hub/messages", b'{"deviceId":"d-1"}', brokerproperties=header), 400, "bad_header")

    assert hubs(act).lines() == []


# Batches


def test_a_batch_in_which_each_event_has_its_own() -> None:
    hub = posted(
        "/hub/messages",
        [
            {"Body": '{"deviceId":"d-1","x":21.40}', "UserProperties": {"Alert": "Strong Wind", "n": 1.50}},
            {"Body": '{"x":\n2}', "BrokerProperties": {"PartitionKey": "k-1", "CorrelationId": "c"}},
            {"Body": " { } ", "BrokerProperties": {"PartitionKey": "k-2"}, "UserProperties": {}},
            {"Body": '{"x":4}', "BrokerProperties": None, "UserProperties": None},
            {"Body": "Message5"},
            {"Body": ""},
            {"Body": '{"deviceId":"d-1","properties":1}', "Other": 1},
        ],
        brokerproperties=b"ignored",
        alert=b"ignored",
    )
    first = unnamed(0, PARTITIONS)
    assert {(event.device, unstamped(event)) for event in stored(hub)} == {
        ("d-1", b'{"deviceId":"d-1","x":21.40,"properties":{"Alert": "Strong Wind", "n": 1.5}}'),
        ("k-1", b'{"x": 2,"deviceId":"k-1"}'),
        ("k-2", b'{"deviceId":"k-2","properties":{}}'),
        (first, b'{"x":4,"deviceId":"%b"}' % first.encode()),
        (first, b'{"body":"Message5","deviceId":"%b"}' % first.encode()),
        (first, b'{"body":"","deviceId":"%b"}' % first.encode()),
        ("d-1", b'{"deviceId":"d-1","properties":1}'),
    }


def test_a_batch_of_a_publisher() -> None:
    hub = posted(
        "/hub/publishers/p-1/messages",
        [{"Body": '{"x":1}', "BrokerProperties": {"PartitionKey": "k"}}, {"Body": '{"deviceId":"p-1"}'}, {"Body": "m"}],
    )
    assert [event.device for event in stored(hub)] == ["p-1"] * 3


def test_a_batch_for_a_partition() -> None:
    inside, outside = device_in(2), device_in(3)
    batch = [{"Body": f'{{"deviceId":"{inside}"}}'}, {"Body": "m"}]
    assert posted("/hub/partitions/2/messages", batch).bounds(2).next == 2
    rejected("/hub/partitions/2/messages", [*batch, {"Body": f'{{"deviceId":"{outside}"}}'}], (2, "bad_device"))


def test_a_batch_is_stored_whole_or_not_at_all() -> None:
    good = {"Body": '{"deviceId":"d-1"}'}
    rejected(
        "/hub/messages",
        [
            good,
            {"Body": "{"},
            good,
            {"Body": '{"receivedAt":1}'},
            {"Body": "{}", "BrokerProperties": {"PartitionKey": "/"}},
            {"Body": '{"properties":1}', "UserProperties": {"a": "b"}},
            {"Body": '{"deviceId":7}'},
        ],
        (1, "not_json"),
        (3, "reserved_field"),
        (4, "bad_device"),
        (5, "reserved_field"),
        (6, "bad_device"),
    )


@pytest.mark.parametrize(
    "body",
    [
        b"[", b'[{"Body":"{}"}', b'[{"body":"{}"}]', b'[{"Body":{}}]', b'[{"Body":null}]', b'["{}"]', b"[1]", b"[[]]",
        b'[{"Body":"{}"},{}]', b'[{"Body":"{}","UserProperties":[]}]', b'[{"Body":"{}","UserProperties":1}]',
        b'[{"Body":"{}","BrokerProperties":[]}]', b'[{"Body":"{}","BrokerProperties":{"PartitionKey":1}}]',
        b'[{"Body":"\\ud800"}]', b'[{"Body":"\xff"}]', b"[" * 5000,
    ],
)  # fmt: skip
def test_batches_that_are_none(body: bytes) -> None:
    async def act(post: Post) -> None:
        refused(await post("/hub/messages", body, content_type=BATCH + b";charset=utf-8"), 400, "malformed_body")

    assert hubs(act).lines() == []


def test_a_batch_of_too_many_events() -> None:
    async def act(post: Post) -> None:
        many = b"[" + b",".join([b'{"Body":"m"}'] * 10_001) + b"]"
        found = refused(await post("/hub/messages", many, content_type=BATCH), 413, "batch_too_large")
        assert found["limit_events"] == 10_000

    assert hubs(act).lines() == []


def test_a_large_batch_is_written_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    loops: list[bool] = []
    prepare = ingest_module.Ingest._prepare

    def noted(*arguments: Any) -> Any:
        try:
            loops.append(asyncio.get_running_loop() is not None)
        except RuntimeError:
            loops.append(False)
        return prepare(*arguments)

    monkeypatch.setattr(ingest_module.Ingest, "_prepare", noted)
    batch = [{"Body": json.dumps({"deviceId": f"d-{n}"})} for n in range(3000)]
    assert len(stored(posted("/hub/messages", batch))) == 3000
    assert len(stored(posted("/hub/messages", batch[:10]))) == 10
    assert loops == [False, True]


def test_a_batch_sent_again_under_its_key_is_stored_once() -> None:
    async def act(post: Post) -> None:
        for _ in range(2):
            batch = [{"Body": '{"x":1}'}, {"Body": '{"x":2}'}]
            assert (await post("/hub/messages", batch, idempotency_key=b"1")).status == 201
        refused(await post("/hub/messages", [{"Body": "m"}], idempotency_key=b"1"), 422, "number_reused")

    assert len(hubs(act).lines()) == 2
