"""Keys through real HTTP, against one installation with two workers: who comes in, who does not, and that each of them knows at once."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import re
import stat
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from penstock import Client, sas
from penstock.access import Access
from penstock.errors import Unauthenticated
from penstock.hub.remote import RemoteHub
from penstock.server.app import Where, routes
from penstock.server.message import Right
from tests.e2e.http_client import Answer, Connection, head, request
from tests.e2e.system import Process, System, wait_for
from tests.e2e.topic_system import TopicSystem

WORKERS = 2
NDJSON = {"Content-Type": "application/x-ndjson"}
ALL = Right.SEND | Right.LISTEN | Right.MANAGE
OPEN = {"/health/live", "/health/ready"}


class Rig:
    """The installation and a connection to each of its workers."""

    def __init__(self, system: System) -> None:
        self.system = system
        self.host = urlsplit(system.url).netloc
        self.workers: dict[str, Connection] = {}

    def connect(self) -> None:
        """Keep one connection to each worker: an answer's batch names the worker that made it."""
        while len(self.workers) < WORKERS:
            connection = Connection(self.system.url)
            connection.send(head("POST", "/v1/events", {"Content-Length": "18", **NDJSON, **self.system.headers}))
            connection.send(b'{"deviceId":"d-1"}')
            answer = connection.answer()
            assert answer is not None
            worker = answer.json["batch"].partition(":")[0]
            if self.workers.setdefault(worker, connection) is not connection:
                connection.close()

    def in_each_worker(self, authorization: str) -> list[int]:
        statuses = []
        for connection in self.workers.values():
            connection.send(head("GET", "/v1/status", {"Authorization": authorization}))
            answer = connection.answer("GET")
            assert answer is not None
            statuses.append(answer.status)
        return statuses

    def create(self, *options: str, rights: Sequence[str] = ("send",)) -> Any:
        """What `penstock key create --json` says."""
        words = [word for right in rights for word in ("--right", right)]
        done = self.system.run("key", "create", *words, *options, "--json")
        assert done.returncode == 0, done
        return json.loads(done.stdout)

    def revoke(self, kid: str) -> None:
        assert self.system.run("key", "revoke", kid).returncode == 0

    def post(
        self, lines: Sequence[bytes], authorization: str | None, path: str = "/v1/events", host: str = ""
    ) -> Answer:
        headers = dict(NDJSON) | ({} if authorization is None else {"Authorization": authorization})
        body = b"\n".join(lines)
        # The Host header that HTTP clients send, which tokens are checked against.
        with Connection(self.system.url) as connection:
            sent = head("POST", path, {**headers, "Content-Length": str(len(body))})
            connection.send(sent.replace(b"Host: penstock", b"Host: " + (host or self.host).encode()) + body)
            answer = connection.answer()
        assert answer is not None
        return answer

    def token(self, key: Mapping[str, str], uri: str = "", for_s: int = 60, name: str = "") -> str:
        return sas.token(
            uri or f"http://{self.host}/",
            name=name or key["name"],
            key=key["shared_access_key"],
            expires_s=int(time.time()) + for_s,
        )


# Only this one knows whose producers are, numbers events without gaps, and is read over HTTP by whoever recounts (docs/kafka.md).
embedded_only = pytest.mark.parametrize("rig", ["embedded"], indirect=True)


@pytest.fixture(scope="module", params=["embedded", "topic"])
def rig(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    kind: Callable[..., System] = System
    if request.param == "topic":
        places = {name: request.getfixturevalue(name) for name in ("kafka", "azurite")}
        kind = functools.partial(TopicSystem, **places)
    system = kind(tmp_path_factory.mktemp("keys"), partitions=4, workers=WORKERS, anonymous=False)
    with contextlib.closing(system):
        system.start()
        made = Rig(system)
        made.connect()
        yield made
        for connection in made.workers.values():
            connection.close()
        system.settle()


def test_the_body_of_who_has_no_key_is_not_waited_for(rig: Rig) -> None:
    body = b'{"deviceId":"d-1","x":"%b"}' % (b"x" * 100_000)
    for authorization, status in (("Bearer none", 401), (rig.system.headers["Authorization"], 200)):
        headers = {"Content-Length": str(len(body)), "Authorization": authorization}
        with Connection(rig.system.url) as connection:
            connection.send(head("POST", "/v1/events", {**NDJSON, **headers}) + body[:1000])
            if status == 200:
                connection.send(body[1000:])
            answer = connection.answer()
            assert answer is not None and answer.status == status, answer


def test_a_key_is_valid_in_every_worker_when_the_command_returns_and_refused_when_it_is_revoked(rig: Rig) -> None:
    for _ in range(3):
        key = rig.create(rights=["listen"])
        assert rig.in_each_worker(f"Bearer {key['key']}") == [200] * WORKERS
        rig.revoke(key["kid"])
        assert rig.in_each_worker(f"Bearer {key['key']}") == [401] * WORKERS
    assert rig.in_each_worker(f"Bearer {rig.system.key}") == [200] * WORKERS


REASONS: dict[str, Callable[[Rig, Any, Any], str | None]] = {
    "none": lambda rig, key, gone: None,
    "empty": lambda rig, key, gone: "",
    "wrong": lambda rig, key, gone: f"Bearer {key['kid']}.{'A' * 43}",
    "unknown": lambda rig, key, gone: "Bearer aaaaaaaaaaaa." + key["key"].partition(".")[2],
    "revoked": lambda rig, key, gone: f"Bearer {gone['key']}",
    "non-ASCII": lambda rig, key, gone: f"Bearer {key['kid']}.\xe9\xff",
    "twice in one": lambda rig, key, gone: f"Bearer {key['key']}, Bearer {key['key']}",
    "as long as a header may be": lambda rig, key, gone: "Bearer " + "a" * 15_000,
    "token: expired": lambda rig, key, gone: rig.token(key, for_s=-400),
    "token: of a far future": lambda rig, key, gone: rig.token(key, for_s=10**13),
    "token: of a revoked key": lambda rig, key, gone: rig.token(gone),
    "token: another path": lambda rig, key, gone: rig.token(key, f"http://{rig.host}/v1/event"),
    "token: another host": lambda rig, key, gone: rig.token(key, "http://192.0.2.1/"),
    "token: another key's name": lambda rig, key, gone: rig.token(key, name="first"),
    "token: sig tampered": lambda rig, key, gone: re.sub("sig=.", "sig=_", rig.token(key)),
    "token: se tampered": lambda rig, key, gone: rig.token(key).replace("se=1", "se=2"),
    "token: sr tampered": lambda rig, key, gone: rig.token(key).replace("sr=http", "sr=https"),
    "token: non-ASCII": lambda rig, key, gone: rig.token(key) + "\xe9",
}


@pytest.fixture(scope="module")
def pair(rig: Rig) -> tuple[Any, Any]:
    """A key, and one that is revoked."""
    key, gone = rig.create("--name", "press"), rig.create("--name", "gone")
    rig.revoke(gone["kid"])
    return key, gone


@pytest.mark.parametrize("reason", REASONS)
def test_case_85_every_reason_gets_the_same_401(rig: Rig, pair: tuple[Any, Any], reason: str) -> None:
    """Byte for byte, but for the date. Nothing is stored, and the same request with the key is taken."""
    key, gone = pair
    before = rig.system.ends()
    answer = rig.post([b'{"deviceId":"d-1"}'], REASONS[reason](rig, key, gone))
    usual = rig.post([b'{"deviceId":"d-1"}'], "Bearer nobody.nothing")
    assert (answer.status, answer.json["code"]) == (401, "unauthenticated")
    assert answer.body == usual.body
    assert {**answer.headers, "date": ""} == {**usual.headers, "date": ""}
    assert answer.headers["www-authenticate"] == "Bearer, SharedAccessSignature"
    assert rig.system.ends() == before
    assert rig.post([b'{"deviceId":"d-1"}'], f"Bearer {key['key']}").status == 200
    assert rig.post([b'{"deviceId":"d-1"}'], rig.token(key)).status == 200


def test_case_85_a_token_of_a_megabyte_and_a_header_that_stands_twice(rig: Rig) -> None:
    key = f"Bearer {rig.system.key}"
    with Connection(rig.system.url) as connection:
        with contextlib.suppress(OSError):  # it is answered before all of it is sent
            connection.send(head("GET", "/v1/status", {"Authorization": "Bearer " + "a" * (1 << 20)}))
        answer = connection.answer("GET")
    assert answer is not None and answer.status == 431
    with Connection(rig.system.url) as connection:
        connection.send(head("GET", "/v1/status", {"Authorization": key, "authorization": key}))
        answer = connection.answer("GET")
    assert answer is not None and (answer.status, answer.json["header"]) == (400, "authorization")


@embedded_only
def test_case_85_another_device(rig: Rig) -> None:
    key = f"Bearer {rig.create('--device', 'd-*', '--device', 'press')['key']}"
    before = sum(rig.system.ends())
    path = rig.post([b'{"n":1}'], key, "/v1/devices/e-1/events")
    assert (path.status, path.json["code"], path.json["retryable"]) == (403, "forbidden_device", False)
    devices = ["d-1", "e-1", "press", "press-2", "d-", "D-1"]
    mixed = rig.post([b'{"deviceId":"%b"}' % device.encode() for device in devices], key)
    assert (mixed.status, mixed.json["accepted"]) == (200, 3)
    rejected = [(one["index"], one["code"]) for one in mixed.json["rejected"]]
    assert rejected == [(1, "forbidden_device"), (3, "forbidden_device"), (5, "forbidden_device")]
    none = rig.post([b'{"deviceId":"e-1"}'], key)
    assert (none.status, none.json["code"], none.json["rejected"][0]["code"]) == (
        400,
        "no_valid_event",
        "forbidden_device",
    )
    assert rig.post([b'{"n":1}'], key, "/v1/devices/d-7/events").status == 200
    hiding = {**NDJSON, "Authorization": key, "Penstock-Device-Field": "x"}
    for path in ("/v1/events", "/v1/devices/d-1/events"):
        answer = request(rig.system.url, "POST", path, b'{"x":"d-1","deviceId":"e-1"}', hiding)
        assert (answer.status, answer.json["code"]) == (403, "forbidden_device")
    usual = {**NDJSON, "Authorization": key, "Penstock-Device-Field": "deviceId"}
    assert request(rig.system.url, "POST", "/v1/devices/d-7/events", b'{"n":1}', usual).status == 200
    assert sum(rig.system.ends()) == before + 5
    # The same batch with a key without a scope: that is what was in its way.
    assert rig.post([b'{"deviceId":"e-1"}'], f"Bearer {rig.system.key}").status == 200


def test_every_route_asks_for_its_right_on_both_ports(rig: Rig) -> None:
    """All that there are, from the table that serves them: a new one cannot be forgotten."""
    keys = {right: f"Bearer {rig.create(rights=[right])['key']}" for right in ("send", "listen", "manage")}
    able = {"send": Right.SEND, "listen": Right.LISTEN, "manage": ALL}
    seen = 0
    for route in routes(None, _Nothing(), lambda _: lambda *_: None, _Nothing()):  # type: ignore[arg-type]
        path = route.path.decode().replace("{n}", "0").replace("{device}", "d-1").replace("{group}", "no-group")
        path = path.replace("{id}", "nobody")
        for where, url in ((Where.LISTEN, rig.system.url), (Where.ADMIN, rig.system.admin)):
            if where not in route.where:
                continue
            seen += 1
            method = route.method.decode()
            length = {"Content-Length": "0"} if method == "PUT" else {}
            bare = request(url, method, path, headers=length)
            if path in OPEN:
                assert bare.status == 200
                continue
            assert route.right, f"{path} is open"
            assert bare.status == 401, path
            for name, key in keys.items():
                answer = request(url, method, path, headers={"Authorization": key, **length})
                allowed = bool(able[name] & route.right)
                assert (answer.status == 403) is not allowed, (path, name)
                assert allowed or answer.json["code"] == "forbidden", path
                assert answer.status != 401
    assert seen > 14


class _Nothing:
    """In the place of what the routes would call."""

    def __getattr__(self, _name: str) -> None:
        return None


def test_tokens_of_devices(rig: Rig) -> None:
    key = rig.create("--name", "fleet")
    whole = rig.system.run("token", "--name", "fleet", "--device", "dev-1", "--for", "10m")
    assert whole.returncode == 0, whole
    token = whole.stdout.decode().strip()
    wrong = rig.system.run("token", "--name", "fleet", "--uri", "ftp://x/")
    assert (wrong.returncode, b"names nothing of an API" in wrong.stderr) == (2, True), wrong
    answer = rig.post([b'{"deviceId":"dev-1"}', b'{"deviceId":"dev-10"}'], token)
    assert (answer.json["accepted"], [one["index"] for one in answer.json["rejected"]]) == (1, [1])
    assert rig.post([b"{}"], token, "/v1/devices/dev-1/events").status == 200
    assert rig.post([b"{}"], token, "/v1/devices/dev-10/events").json["code"] == "forbidden_device"
    reading = rig.system.run("status", "--url", rig.system.url, "--key", "x" + token)
    assert (reading.returncode, b"characters that no key has" in reading.stderr) == (2, True)
    assert rig.in_each_worker(token) == [401] * WORKERS  # the Host header of those connections is `penstock`
    assert rig.in_each_worker(rig.token(key, "http://penstock/publishers/dev-1")) == [403] * WORKERS
    by_path = rig.token(key, f"sb://{rig.host}/v1/devices/dev-1")
    assert rig.post([b"{}"], by_path, "/v1/devices/dev-1/events").status == 200
    assert rig.post([b"{}"], by_path, "/v1/devices/dev-10/events").status == 401


def test_a_key_is_replaced_by_another_of_its_name(rig: Rig) -> None:
    old = rig.create("--name", "rotated")
    new = rig.create("--name", "rotated")
    third = rig.system.run("key", "create", "--right", "send", "--name", "rotated")
    assert (third.returncode, b"revoke one first" in third.stderr) == (2, True), third
    assert [rig.post([b'{"deviceId":"d-1"}'], rig.token(key)).status for key in (old, new)] == [200, 200]
    rig.revoke(old["kid"])
    assert [rig.post([b'{"deviceId":"d-1"}'], rig.token(key)).status for key in (old, new)] == [401, 200]


def test_what_lies_there_only_its_owner_can_read(rig: Rig) -> None:
    modes = {name: stat.S_IMODE((rig.system.data / name).stat().st_mode) for name in ("key", "keys.json")}
    assert modes == {"key": 0o600, "keys.json": 0o600}
    secret = rig.system.key.partition(".")[2].encode()
    holding = [path.name for path in rig.system.data.rglob("*") if path.is_file() and secret in path.read_bytes()]
    assert holding == ["key"]
    assert secret not in rig.system.up.log.read_bytes()


def test_keys_are_listed_without_what_opens(rig: Rig) -> None:
    made = rig.create("--name", "listed", "--device", "d-*", "--events-per-second", "10", "--bytes-per-second", "1MB")
    done = rig.system.run("key", "list", "--json")
    (row,) = [one for one in json.loads(done.stdout) if one["kid"] == made["kid"]]
    assert (row["name"], row["devices"], row["events_per_s"], row["bytes_per_s"]) == ("listed", ["d-*"], 10, 1_000_000)
    assert made["key"].partition(".")[2].encode() not in done.stdout
    assert made["shared_access_key"].encode() not in done.stdout
    assert b"listed" in rig.system.run("key", "list").stdout


def test_a_key_has_its_own_quota(rig: Rig) -> None:
    bounded = f"Bearer {rig.create('--events-per-second', '20')['key']}"
    batch = [b'{"deviceId":"d-1"}'] * 20
    answers = [rig.post(batch, bounded) for _ in range(8)]
    refused = [answer for answer in answers if answer.status != 200]
    assert len(refused) > 2
    assert {(answer.status, answer.json["code"], answer.json["limit"]) for answer in refused} == {
        (429, "throughput_exceeded", "key")
    }
    assert rig.post(batch, f"Bearer {rig.system.key}").status == 200


def test_a_key_alone_is_what_the_command_prints(rig: Rig) -> None:
    done = rig.system.run("key", "create", "--right", "listen")
    assert re.fullmatch(rb"[a-z0-9]{12}\.[A-Za-z0-9_-]{43}\n", done.stdout)
    answer = request(
        rig.system.url, "GET", "/v1/status", headers={"Authorization": f"Bearer {done.stdout.decode().strip()}"}
    )
    assert answer.status == 200


def test_the_line_that_up_prints_works(rig: Rig) -> None:
    line = next(line for line in rig.system.up.text().splitlines() if line.startswith("  curl "))
    shell = Process(
        ["-c", f"import os; os.execlp('sh', 'sh', '-c', {line.strip() + ' -sS'!r})"], rig.system.folder / "sh"
    )
    assert shell.wait() == 0
    assert json.loads(shell.text())["accepted"] == 1


@embedded_only
def test_commands_find_the_key_or_take_the_one_that_is_named(rig: Rig) -> None:
    system, event = rig.system, b'{"deviceId":"d-1"}\n'
    assert system.run("send", "--url", system.url, "-", stdin=event).returncode == 0
    assert system.run("status", "--url", system.url).returncode == 0
    assert system.run("flush", "--url", system.admin).returncode == 0
    assert system.run("leases", "--url", system.url, "--watch", "0s").returncode == 0
    (system.folder / "elsewhere.toml").write_text('data = "elsewhere"')
    elsewhere = ("--url", system.url, "--config", "elsewhere.toml")
    refused = system.run("status", *elsewhere)
    assert (refused.returncode, b"Name one with --key or PENSTOCK_KEY" in refused.stderr) == (1, True), refused
    assert system.run("status", *elsewhere, "--key", system.key).returncode == 0
    simulated = system.run("simulate", "--seconds", "1", "--rate", "200", "--faults", "--json")
    assert (simulated.returncode, json.loads(simulated.stdout)["ok"]) == (0, True), simulated


@embedded_only
def test_connection_strings_open_what_keys_do(rig: Rig) -> None:
    system = rig.system
    key = rig.create("--name", "device", rights=["send", "listen"])
    string = key["connection_string"]
    assert string.startswith(f"Endpoint=sb://{rig.host}/;SharedAccessKeyName=device;SharedAccessKey=")
    sent = system.run("send", "--url", string, "--spool", "by-string", "-", stdin=b'{"deviceId":"d-1"}\n')
    assert (sent.returncode, sent.stderr) == (0, b""), sent
    with Client(string, spool=system.folder / "spool-string") as client:
        client.send({"deviceId": "d-1"})
        client.flush(20)
    with RemoteHub(string) as hub:
        assert hub.partitions() == 4
    token = system.run("token", "--connection-string", string, "--for", "1m").stdout.decode().strip()
    assert rig.post([b'{"deviceId":"d-1"}'], token).status == 200
    rig.revoke(key["kid"])
    with pytest.raises(Unauthenticated):
        RemoteHub(string, patience_s=0)
    with pytest.raises(Unauthenticated):
        RemoteHub(Access(system.url), patience_s=0)


def test_a_damaged_file_stops_no_worker_and_no_start_is_made_on_it(rig: Rig) -> None:
    system, path = rig.system, rig.system.data / "keys.json"
    whole = path.read_bytes()
    try:
        path.write_bytes(whole[:-40])
        assert rig.in_each_worker(f"Bearer {system.key}") == [200] * WORKERS
        done = system.run("key", "create", "--right", "send")
        assert (done.returncode, b"cannot be read" in done.stderr) == (2, True), done
        wait_for("each worker says so", lambda: system.up.text().count("The keys cannot be read") == WORKERS)
        copy = system.folder / "copy"
        copy.mkdir()
        (copy / "keys.json").write_bytes(whole[:-40])
        at = ("--listen", "127.0.0.1:0", "--admin", "127.0.0.1:0", "--partitions", "1", "--workers", "1")
        refused = system.run("up", "--data", str(copy), *at, deadline_s=20)
        assert (refused.returncode, b"cannot be read" in refused.stderr) == (2, True), refused
        assert (copy / "keys.json").read_bytes() == whole[:-40]
        assert not (copy / "key").exists()
    finally:
        path.write_bytes(whole)
    assert rig.in_each_worker(f"Bearer {system.key}") == [200] * WORKERS


def test_a_start_with_keys_keeps_them_and_one_without_ignores_them(tmp_path: Path) -> None:
    """`--anonymous` on the same data lets everyone in, for as long as it runs; then the keys hold again."""
    keyed = System(tmp_path, partitions=1, workers=1, anonymous=False, options=("--archive", "none"))
    with contextlib.closing(keyed):
        keyed.start()
        before = (keyed.data / "keys.json").read_bytes(), keyed.key
        assert request(keyed.url, "GET", "/v1/status").status == 401
        assert keyed.stop() == 0
        anonymous = System(tmp_path, partitions=1, workers=1, options=("--archive", "none"))
        with contextlib.closing(anonymous):
            anonymous.start()
            assert request(anonymous.url, "GET", "/v1/status").status == 200
            assert anonymous.stop() == 0
        # All of the machine's addresses, which is what keys are for; without TLS it is warned of.
        everywhere = ("--listen", "0.0.0.0:0", "--archive", "none")
        wide = System(tmp_path, partitions=1, workers=1, anonymous=False, options=everywhere)
        with contextlib.closing(wide):
            wide.start()
            assert ((wide.data / "keys.json").read_bytes(), wide.key) == before
            assert request(wide.url, "GET", "/v1/status").status == 401
            assert wide.run("send", "-", stdin=b'{"deviceId":"d-1"}\n').returncode == 0
            assert "travel in the clear" in wide.up.text()


@embedded_only
def test_a_producer_belongs_to_the_name_of_its_key(rig: Rig) -> None:
    """Whoever learns its id can neither fence it nor read of it; who has got another key of the name goes on."""
    mine, other = rig.create("--name", "gateways"), rig.create("--name", "strangers", "--device", "other-1")

    def send(key: Any, number: str, device: str) -> int:
        body = b'{"deviceId":"%b"}' % device.encode()
        numbered = f"gw-of-mine;{number};sha256={hashlib.sha256(body).hexdigest()}"
        headers = {**NDJSON, "Authorization": f"Bearer {key['key']}", "Penstock-Producer": numbered}
        return request(rig.system.url, "POST", "/v1/events", body, headers).status

    def seen(key: Any) -> int:
        headers = {"Authorization": f"Bearer {key['key']}"}
        return request(rig.system.url, "GET", "/v1/producers/gw-of-mine", headers=headers).status

    assert send(mine, "epoch=1;sequence=1", "d-1") == 200
    assert send(other, "epoch=9;sequence=1", "other-1") == 409
    assert send(mine, "epoch=1;sequence=1", "d-1") == 200, "a duplicate, as before"
    assert (seen(mine), seen(other)) == (200, 404)
    rig.revoke(mine["kid"])
    assert send(rig.create("--name", "gateways"), "epoch=1;sequence=2", "d-1") == 200


@embedded_only
def test_keys_of_neighbours_and_of_replaced_keys_do_not_meet(rig: Rig) -> None:
    """The same Idempotency-Key and body: once for each device and header that says what is stored, and again for a key of the same name."""
    key = rig.create("--name", "counting")
    before = sum(rig.system.ends())

    def send(path: str, authorization: str, body: bytes = b'{"t":99}', **headers: str) -> int:
        given = {"Authorization": authorization, "Idempotency-Key": "1"} | {
            name.replace("_", "-"): value for name, value in headers.items()
        }
        return request(rig.system.url, "POST", path, body, given).status

    bearer = f"Bearer {key['key']}"
    for _ in range(2):
        for device in ("d-1", "d-2"):
            assert send("/telemetry/messages", bearer, BrokerProperties=f'{{"PartitionKey":"{device}"}}') == 201
            assert send(f"/v1/devices/{device}/events", bearer, Content_Type="application/json") == 200
            assert send(f"/telemetry/publishers/{device}/messages", bearer) == 201
        for field in ("a", "b"):
            body = b'{"a":"A1","b":"B1"}'
            assert send("/v1/events", bearer, body, Content_Type="application/json", Penstock_Device_Field=field) == 200
        assert sum(rig.system.ends()) - before == 8
        replaced = rig.create("--name", "counting")
        rig.revoke(key["kid"])
        key, bearer = replaced, f"Bearer {replaced['key']}"
