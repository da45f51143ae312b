"""The requests of Event Hubs' REST documentation, as they stand there, against an installation that runs.

Host, key and the name of the hub are all that is changed. The pages, under https://learn.microsoft.com/en-us/rest/api/eventhub/:
send-event, send-batch-events, send-partition-event, send-event-with-publisher-id, event-hubs-runtime-rest.
"""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Iterator
from typing import Any

import pytest

from penstock.events import Slice
from penstock.wire import frame
from tests.e2e.http_client import Answer, Connection, request
from tests.e2e.oracle import archived
from tests.e2e.system import System

PARTITIONS = 4
AUTHORIZATION = (
    "Authorization: SharedAccessSignature sr=your-namespace.servicebus.windows.net"
    "&sig=tYu8qdH563Pc96Lky0SFs5PhbGnljF7mLYQwCZmk9M0%3d&se=1403736877&skn=RootManageSharedAccessKey"
)
EVENT = '{ "DeviceId":"dev-01", "Temperature":"37.0" }'
KEPT = '{ "DeviceId":"dev-01", "Temperature":"37.0"'


def recorded(path: str, body: str, *headers: str, kind: str = "application/atom+xml;type=entry;charset=utf-8") -> bytes:
    """A request as the pages print them."""
    lines = [
        f"POST {path}?timeout=60&api-version=2014-01 HTTP/1.1",
        AUTHORIZATION,
        f"Content-Type: {kind}",
        "Host: your-namespace.servicebus.windows.net",
        *headers,
        f"Content-Length: {len(body)}",
    ]
    return "\r\n".join([*lines, "", body]).encode()


class Rig:
    """The installation, and the events that must be in it: partition, device, and the event without its stamp."""

    def __init__(self, system: System) -> None:
        self.system = system
        self.ends = system.ends()
        self.stored: list[tuple[int, dict[str, Any]]] = []

    def send(self, sent: bytes) -> Answer:
        with Connection(self.system.url) as connection:
            connection.send(sent)
            answer = connection.answer()
        assert answer is not None
        return answer

    def created(self, sent: bytes) -> list[tuple[int, str, bytes]]:
        """What the request stored, as readers get it: partition, device, line; they are archived so in the end."""
        answer = self.send(sent)
        assert (answer.status, answer.body, answer.headers["content-length"]) == (201, b"", "0"), answer
        found = []
        ends = self.system.ends()
        for partition, (first, end) in enumerate(zip(self.ends, ends, strict=True)):
            if first == end:
                continue
            path = f"/v1/partitions/{partition}/events?from={first}"
            read = request(self.system.url, "GET", path, headers={"Accept": "application/vnd.penstock.frames"})
            frames = [frame.decode(one) for one in frame.split(read.body)]
            for event in frame.events(Slice(partition, str(first), frames, str(end), str(end))):
                found.append((partition, event.device, event.body))
                assert json.loads(event.body)["deviceId"] == event.device
                assert zlib.crc32(event.device.encode()) % PARTITIONS == partition
        self.ends = ends
        self.stored += [(partition, json.loads(line)) for partition, _, line in found]
        return found

    def refused(self, sent: bytes, status: int, code: str) -> dict[str, Any]:
        answer = self.send(sent)
        assert (answer.status, answer.json["code"]) == (status, code), answer
        assert answer.headers["content-type"] == "application/problem+json"
        assert self.system.ends() == self.ends
        problem: dict[str, Any] = answer.json
        return problem


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    system = System(tmp_path_factory.mktemp("hubs"), partitions=PARTITIONS)
    try:
        rig = Rig(system.start())
        yield rig
        system.settle()
        there = [(partition, json.loads(line)) for partition, line in archived(system.store)]
        assert sorted(there, key=repr) == sorted(rig.stored, key=repr)
        assert system.stop() == 0
        assert '"level":"error"' not in system.up.text()
    finally:
        system.close()


def bare(line: bytes) -> tuple[str, dict[str, Any]]:
    """The line before the stamp, and its properties."""
    event, _, _ = line.partition(b',"receivedAt":')
    return event.decode(), json.loads(line).get("properties")


def test_an_event_without_user_properties(rig: Rig) -> None:
    """send-event, first example."""
    ((_, device, line),) = rig.created(recorded("/your-event-hub/messages", EVENT))
    assert device.startswith("unnamed-")
    assert bare(line) == (f'{KEPT} ,"deviceId":"{device}"', None)


def test_an_event_with_user_properties(rig: Rig) -> None:
    """send-event, second example; event-hubs-runtime-rest, custom properties."""
    ((_, _, line),) = rig.created(recorded("/your-event-hub/messages", EVENT, "Alert: Strong Wind"))
    assert bare(line)[1] == {"alert": "Strong Wind"}
    winds = ("WindAlert: Strong Winds", "GeneralAlert: Thunderstorms")
    ((_, _, line),) = rig.created(recorded("/your-event-hub/messages", EVENT, *winds))
    assert bare(line)[1] == {"windalert": "Strong Winds", "generalalert": "Thunderstorms"}


def test_an_event_with_a_partition_key(rig: Rig) -> None:
    """event-hubs-runtime-rest, broker properties."""
    key = "32119834-65f3-48c1-b366-619df2e4c400"
    sent = recorded("/your-event-hub/messages", EVENT, f'BrokerProperties: {{"PartitionKey": "{key}"}}')
    ((_, device, line),) = rig.created(sent)
    assert (device, bare(line)) == (key, (f'{KEPT} ,"deviceId":"{key}"', None))


@pytest.mark.parametrize("word", ["publisher", "publishers"])
def test_an_event_with_a_publisher(rig: Rig, word: str) -> None:
    """send-event-with-publisher-id: the example has the first word, the request URI of the same page the second."""
    ((_, device, line),) = rig.created(recorded(f"/your-event-hub/{word}/dev-01/messages", EVENT))
    assert (device, bare(line)[0]) == ("dev-01", f'{KEPT} ,"deviceId":"dev-01"')


@pytest.mark.parametrize("partition", range(PARTITIONS))
def test_an_event_for_a_partition(rig: Rig, partition: int) -> None:
    """send-partition-event."""
    ((found, device, _),) = rig.created(recorded(f"/your-event-hub/partitions/{partition}/messages", EVENT))
    assert found == partition
    assert device.startswith("unnamed-")


def test_a_device_has_one_partition(rig: Rig) -> None:
    home = zlib.crc32(b"dev-01") % PARTITIONS
    for partition in range(PARTITIONS):
        path = f"/your-event-hub/partitions/{partition}/messages"
        sent = recorded(path, EVENT, "Penstock-Device-Field: deviceId").replace(b'"DeviceId"', b'"deviceId"')
        if partition == home:
            rig.created(sent)
            continue
        (rejected,) = rig.refused(sent, 400, "no_valid_event")["rejected"]
        assert (rejected["index"], rejected["code"]) == (0, "bad_device")
        assert f"partition {home}" in rejected["detail"]
    rig.refused(recorded(f"/your-event-hub/partitions/{PARTITIONS}/messages", EVENT), 404, "not_found")
    rig.refused(recorded("/v1/partitions/0/messages", EVENT), 404, "not_found")


BATCHES = {
    "bodies": '[{"Body":"Message1"},{"Body":"Message2"},{"Body":"Message3"}]',
    "properties": '[{"Body":"Message1", "UserProperties":{"Alert":"Strong Wind"}}, {"Body":"Message2"}, {"Body":"Message3"}]',
}


@pytest.mark.parametrize("batch", BATCHES)
def test_a_batch(rig: Rig, batch: str) -> None:
    """send-batch-events."""
    sent = recorded("/your-event-hub/messages", BATCHES[batch], kind="application/vnd.microsoft.servicebus.json")
    found = rig.created(sent)
    assert len({device for _, device, _ in found}) == 1
    events = [json.loads(line) for _, _, line in found]
    assert [event["body"] for event in events] == ["Message1", "Message2", "Message3"]
    alert = {"Alert": "Strong Wind"} if batch == "properties" else None
    assert [event.get("properties") for event in events] == [alert, None, None]


def test_a_batch_of_bodies_in_base64(rig: Rig) -> None:
    kind = "application/vnd.microsoft.servicebus.json"
    first, text = (
        base64.b64encode(b'{"deviceId":"hub-b64","x":21.40}').decode(),
        base64.b64encode("é".encode()).decode(),
    )
    batch = [{"Body": first, "IsBodyBase64": True}, {"Body": text, "IsBodyBase64": True}, {"Body": first}]
    found = rig.created(recorded("/telemetry/messages", json.dumps(batch), kind=kind))
    bodies = [bare(line)[0] for _, _, line in found]
    assert '{"deviceId":"hub-b64","x":21.40' in bodies
    assert {json.loads(line).get("body") for _, _, line in found} == {None, "é", first}
    for wrong in ("x", "é", "eA", "eA==\n", "=="):
        broken = json.dumps([*batch, {"Body": wrong, "IsBodyBase64": True}])
        rig.refused(recorded("/telemetry/messages", broken, kind=kind), 400, "malformed_body")
    binary = json.dumps([*batch, {"Body": "/w==", "IsBodyBase64": True}])
    (rejected,) = rig.refused(recorded("/telemetry/messages", binary, kind=kind), 400, "no_valid_event")["rejected"]
    assert (rejected["index"], rejected["code"]) == (3, "not_utf8")


def test_a_batch_with_broker_properties_that_are_no_json(rig: Rig) -> None:
    """send-batch-events, an earlier edition of the page: the example lacks a colon."""
    batch = (
        '[{"Body":"Message1", "BrokerProperties":{"CorrelationId","32119834-65f3-48c1-b366-619df2e4c400"}},'
        '{"Body":"Message2"},{"Body":"Message3"}]'
    )
    kind = "application/vnd.microsoft.servicebus.json"
    rig.refused(recorded("/your-event-hub/messages", batch, kind=kind), 400, "malformed_body")
    mended = batch.replace('Id","', 'Id":"')
    assert len(rig.created(recorded("/your-event-hub/messages", mended, kind=kind))) == 3


def test_a_batch_of_devices_is_stored_whole_or_not_at_all(rig: Rig) -> None:
    kind = "application/vnd.microsoft.servicebus.json"
    batch = [
        {"Body": json.dumps({"deviceId": f"hub-{n}", "n": n}), "BrokerProperties": {"PartitionKey": "k"}}
        for n in range(8)
    ]
    found = rig.created(recorded("/telemetry/messages", json.dumps(batch), kind=kind))
    assert {device for _, device, _ in found} == {f"hub-{n}" for n in range(8)}
    batch[5]["Body"] = '{"deviceId":"hub-5"'
    problem = rig.refused(recorded("/telemetry/messages", json.dumps(batch), kind=kind), 400, "no_valid_event")
    assert [(one["index"], one["code"]) for one in problem["rejected"]] == [(5, "not_json")]
