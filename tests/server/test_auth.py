"""The guard: who is let in, what he may, and that nobody learns why he is not."""

from __future__ import annotations

import hmac
import os
import shutil
from base64 import b64encode
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock import sas
from penstock.errors import Unauthenticated
from penstock.files import Files
from penstock.server import auth
from penstock.server.auth import KeyGuard
from penstock.server.keys import Keys, NewKey
from penstock.server.message import Grant, Request, Response, Right
from penstock.server.problems import problem
from penstock.testing import FakeClock, MemoryLog

HOST = "hub.example.org:8480"


class Door:
    """A guard over keys in a folder, and requests to it."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "keys.json"
        self.clock = FakeClock(1_795_356_000_000)
        self.log = MemoryLog()
        self.keys = Keys(folder, Files(), self.clock)
        self.guard = KeyGuard(self.path, self.clock, self.log)

    @property
    def now_s(self) -> int:
        return self.clock.now_ms() // 1000

    def ask(self, authorization: bytes | str | None, path: str = "/v1/events", host: str | None = HOST) -> Grant:
        headers = {} if host is None else {b"host": host.encode()}
        if authorization is not None:
            given = authorization if isinstance(authorization, bytes) else authorization.encode()
            headers[b"authorization"] = given
        return self.guard(Request(b"POST", path.encode(), b"", headers, b""))

    def refusal(self, authorization: bytes | str | None, **request: Any) -> Response:
        with pytest.raises(Unauthenticated) as refused:
            self.ask(authorization, **request)
        return problem(refused.value)

    def token(self, key: NewKey, uri: str = f"http://{HOST}/", for_s: int = 60, name: str = "") -> str:
        signing = key.key.shared_access_key
        return sas.token(uri, name=name or key.key.name, key=signing, expires_s=self.now_s + for_s)


@pytest.fixture
def door(tmp_path: Path) -> Door:
    return Door(tmp_path)


def test_a_key_opens_and_tells_what_it_is_for(door: Door) -> None:
    made = door.keys.create(["send"], devices=["d-*"], events_per_s=10, bytes_per_s=2000)
    grant = door.ask(f"Bearer {made.text}")
    assert (grant.rights, grant.key, grant.events_per_s, grant.bytes_per_s) == (Right.SEND, made.key.kid, 10, 2000)
    assert grant.allows is not None
    assert (grant.allows("d-1"), grant.allows("e-1")) == (True, False)
    assert door.ask(f"bearer   {made.text} ") == grant
    every = door.ask(f"Bearer {door.keys.create(['manage']).text}")
    assert every == Grant(Right.SEND | Right.LISTEN | Right.MANAGE, every.key, name=every.key)


WRONG: dict[str, Callable[[NewKey, Door], bytes | str | None]] = {
    "none": lambda key, door: None,
    "empty": lambda key, door: "",
    "empty bearer": lambda key, door: "Bearer ",
    "another scheme": lambda key, door: f"Basic {key.text}",
    "no scheme": lambda key, door: key.text,
    "wrong secret": lambda key, door: f"Bearer {key.key.kid}.{'A' * 43}",
    "secret of one letter more": lambda key, door: f"Bearer {key.text}A",
    "secret of one letter less": lambda key, door: f"Bearer {key.text[:-1]}",
    "its hash": lambda key, door: f"Bearer {key.key.kid}.{key.key.sha256}",
    "unknown id": lambda key, door: "Bearer aaaaaaaaaaaa." + key.text.partition(".")[2],
    "name in place of the id": lambda key, door: "Bearer press." + key.text.partition(".")[2],
    "no dot": lambda key, door: "Bearer " + key.text.replace(".", ""),
    "two keys": lambda key, door: f"Bearer {key.text}, Bearer {key.text}",
    "twice the same scheme": lambda key, door: f"Bearer Bearer {key.text}",
    "non-ASCII": lambda key, door: f"Bearer {key.key.kid}.é",
    "not UTF-8": lambda key, door: b"Bearer \xff\xfe.\x80",
    "NUL": lambda key, door: b"Bearer \x00",
    "long": lambda key, door: "Bearer " + "a" * 16_000,
    "revoked": lambda key, door: f"Bearer {_revoked(door).text}",
    "token: empty": lambda key, door: "SharedAccessSignature ",
    "token: expired": lambda key, door: door.token(key, for_s=-301),
    "token: an expiry that no clock shows": lambda key, door: door.token(key, for_s=10**13),
    "token: other host": lambda key, door: door.token(key, "http://other.example.org/"),
    "token: other path": lambda key, door: door.token(key, f"http://{HOST}/v1/partitions"),
    "token: other scheme": lambda key, door: door.token(key, f"ftp://{HOST}/"),
    "token: unknown name": lambda key, door: door.token(key, name="nobody"),
    "token: of a revoked key": lambda key, door: door.token(_revoked(door)),
    "token: signed with the hash": lambda key, door: sas.token(
        f"http://{HOST}/", name="press", key=key.key.sha256, expires_s=door.now_s + 60
    ),
    "token: non-ASCII": lambda key, door: door.token(key) + "é",
    "token: not UTF-8": lambda key, door: door.token(key).replace("skn=press", "skn=%ff%fe"),
    "token: a resource that is not UTF-8": lambda key, door: _signed(key, door, b"http%3a%2f%2f%ff"),
    "token: no resource": lambda key, door: _signed(key, door, b""),
    "token: publisher with more behind": lambda key, door: door.token(key, f"http://{HOST}/publishers/d-1/v1/events"),
}


def _revoked(door: Door) -> NewKey:
    other = door.keys.create(["send"], name="other")
    door.keys.revoke(other.key.kid)
    return other


def _signed(key: NewKey, door: Door, resource: bytes) -> bytes:
    expiry = door.now_s + 60
    signature = sas.signature(key.key.shared_access_key.encode(), resource, expiry)
    return b"SharedAccessSignature sr=%b&sig=%b&se=%d&skn=press" % (
        resource,
        quote(signature, safe="").encode(),
        expiry,
    )


@pytest.mark.parametrize("reason", WRONG)
def test_every_reason_gets_the_same_answer(door: Door, reason: str) -> None:
    """faults.md, case 85."""
    key = door.keys.create(["send"], name="press")
    answer = door.refusal(WRONG[reason](key, door))
    assert answer == door.refusal(None)
    assert answer.status == 401
    assert (b"WWW-Authenticate", b"Bearer, SharedAccessSignature") in answer.headers
    assert door.ask(f"Bearer {key.text}").rights == Right.SEND
    assert door.ask(door.token(key)).rights == Right.SEND


@given(
    st.one_of(
        st.binary(max_size=200), st.text(max_size=60).map(lambda text: f"Bearer {text}".encode("utf-8", "replace"))
    )
)
def test_no_header_whatever_makes_it_fail(header: bytes) -> None:
    door = Door(Path("/nonexistent"))
    for prefix in (b"", b"Bearer ", b"SharedAccessSignature ", b"SharedAccessSignature sr=%FF&sig=a&se=1&skn="):
        door.refusal(prefix + header)


def test_an_unknown_id_is_hashed_and_compared_like_a_known_one(door: Door, monkeypatch: pytest.MonkeyPatch) -> None:
    key = door.keys.create(["send"], name="press")
    calls: list[tuple[str, int]] = []

    def hashed(data: bytes) -> Any:
        calls.append(("sha256", len(data)))
        return sha256(data)

    def compared(one: bytes, other: bytes) -> bool:
        assert isinstance(one, bytes), "text that is not ASCII would raise TypeError"
        calls.append(("compare", len(one)))
        return hmac.compare_digest(one, other)

    monkeypatch.setattr(auth, "sha256", hashed)
    monkeypatch.setattr(auth, "compare_digest", compared)
    work = {}
    for reason in ("wrong secret", "unknown id"):
        header = WRONG[reason](key, door)
        calls.clear()
        door.refusal(header)
        work[reason] = list(calls)
    assert work["wrong secret"] == work["unknown id"] == [("sha256", 43), ("compare", 32)]
    for reason in ("token: expired", "token: unknown name", "token: empty"):
        header = WRONG[reason](key, door)
        calls.clear()
        door.refusal(header)
        assert calls == [("compare", 44)] * 2, reason


def test_a_key_is_valid_and_a_revoked_one_refused_at_once(door: Door) -> None:
    """By looking at the file on each request: without that look the old keys go on."""
    made = door.keys.create(["send"])
    assert door.ask(f"Bearer {made.text}")
    later = door.keys.create(["listen"])
    assert door.ask(f"Bearer {later.text}").rights == Right.LISTEN
    door.keys.revoke(made.key.kid)
    door.refusal(f"Bearer {made.text}")
    assert door.ask(f"Bearer {later.text}")


def test_without_the_look_at_the_file_a_revoked_key_goes_on(door: Door, monkeypatch: pytest.MonkeyPatch) -> None:
    made = door.keys.create(["send"])
    door.ask(f"Bearer {made.text}")
    monkeypatch.setattr(auth, "_version", lambda _about: door.guard._seen)
    door.keys.revoke(made.key.kid)
    assert door.ask(f"Bearer {made.text}").rights == Right.SEND


def test_a_file_of_the_same_size_and_time_is_another(door: Door) -> None:
    """Replaced twice within one tick of the file system's clock: its number is not given away while the guard has it open."""
    made = door.keys.create(["send"])
    other = door.keys.create(["send"])
    assert door.ask(f"Bearer {made.text}")
    about = door.path.stat()
    for key in (made, other):
        text = door.path.read_text().replace(key.key.sha256, "0" * 64)
        Files().replace(door.path, text.encode())
        os.utime(door.path, ns=(about.st_atime_ns, about.st_mtime_ns))
        assert door.path.stat().st_size == about.st_size
        door.refusal(f"Bearer {key.text}")


@pytest.mark.parametrize("damage", ["cut", "gone", "folder", "deep"])
def test_a_file_that_cannot_be_read_leaves_the_keys_that_were_known(door: Door, damage: str) -> None:
    made = door.keys.create(["send"])
    whole = door.path.read_bytes()
    assert door.ask(f"Bearer {made.text}")
    _damage(door.path, damage, whole)
    for _ in range(3):
        assert door.ask(f"Bearer {made.text}").key == made.key.kid
        door.refusal("Bearer a.b")
    assert [line[0] for line in door.log.lines] == ["error"]
    # A worker that starts now knows none.
    late = Door(door.path.parent)
    late.refusal(f"Bearer {made.text}")
    if door.path.is_dir():
        door.path.rmdir()
    Files().replace(door.path, whole)
    assert late.ask(f"Bearer {made.text}")
    assert door.ask(f"Bearer {made.text}")
    door.keys.revoke(made.key.kid)
    door.refusal(f"Bearer {made.text}")
    _damage(door.path, "cut", whole)
    door.refusal(f"Bearer {made.text}")
    assert len(door.log.lines) == 2, "what is wrong again is said again"


def _damage(path: Path, damage: str, whole: bytes) -> None:
    path.unlink()
    if damage == "cut":
        path.write_bytes(whole[:-30])
    elif damage == "folder":
        path.mkdir()
    elif damage == "deep":
        path.write_bytes(b'{"version":1,"keys":[],"x":' + b"[" * 100_000)


def test_a_guard_without_keys_lets_nobody_in(door: Door, tmp_path: Path) -> None:
    door.refusal("Bearer a.b")
    shutil.rmtree(tmp_path)
    door.refusal("Bearer a.b")
    assert len(door.log.lines) == 1


# Shared access signatures


def test_a_token_as_event_hubs_makes_it(door: Door) -> None:
    """Word for word as in Microsoft's documentation for Python, without any code of ours."""
    key = door.keys.create(["send"], name="RootManageSharedAccessKey")
    uri = quote(f"sb://{HOST}/telemetry", safe="")
    expiry = str(door.now_s + 3600)
    signed = hmac.new(key.key.shared_access_key.encode("utf-8"), f"{uri}\n{expiry}".encode(), "sha256")
    signature = quote(b64encode(signed.digest()), safe="")
    token = f"SharedAccessSignature sr={uri}&sig={signature}&se={expiry}&skn={key.key.name}"
    assert door.ask(token, "/telemetry/messages") == door.ask(f"Bearer {key.text}")
    door.refusal(token, path="/v1/events")
    # Clients in other languages encode in lower case, and order the fields as they like.
    assert quote("/", safe="").lower() == "%2f"
    lower = uri.replace("%2F", "%2f").replace("%3A", "%3a")
    signed = hmac.new(key.key.shared_access_key.encode(), f"{lower}\n{expiry}".encode(), "sha256")
    signature = quote(b64encode(signed.digest()), safe="")
    token = f"sharedaccesssignature skn={key.key.name}&se={expiry}&sig={signature}&sr={lower}"
    assert door.ask(token, "/telemetry/messages")


@pytest.mark.parametrize(
    ("uri", "path", "covered"),
    [
        ("/", "/v1/events", True),
        ("", "/v1/events", True),
        ("/v1", "/v1/events", True),
        ("/v1/events", "/v1/events", True),
        ("/v1/events/", "/v1/events", True),
        ("/v1/events?api-version=2014-01", "/v1/events", True),
        ("/v1/event", "/v1/events", False),
        ("/v1/devices/dev-1", "/v1/devices/dev-1/events", True),
        ("/v1/devices/dev-1", "/v1/devices/dev-10/events", False),
        ("/v1/devices/dev-1", "/v1/devices/dev-1", True),
        ("/v1/devices/dev-1", "/v1/devices/DEV-1/events", False),
        ("/v1/devices/a%3Ab", "/v1/devices/a:b/events", True),
        ("/v1/devices/a:b", "/v1/devices/a%3ab/events", True),
        ("/v1/devices/dev-1", "/v1/devices/dev-1%2Fevents", False),
        ("/v1/devices/dev-1/events", "/v1/devices/dev-1", False),
        ("/v1/devices/dev-1", "/v1/devices/%ff/events", False),
        ("/v1/devices/dev-1", "//v1/devices/dev-1", False),
    ],
)
def test_a_token_is_good_for_what_lies_beneath_by_whole_segments(
    door: Door, uri: str, path: str, covered: bool
) -> None:
    token = door.token(door.keys.create(["send"], name="press"), f"http://{HOST}{uri}")
    if covered:
        assert door.ask(token, path).rights == Right.SEND
    else:
        door.refusal(token, path=path)


@pytest.mark.parametrize(
    ("uri", "host", "good"),
    [
        ("https://Hub.Example.org/", "hub.example.org:8480", True),
        ("sb://hub.example.org:1/", "HUB.example.org", True),
        ("amqps://hub.example.org/", "hub.example.org", True),
        ("hub.example.org/v1", "hub.example.org", True),
        ("http://[::1]:8480/", "[::1]:8480", True),
        ("http://localhost:8480/", "127.0.0.1:8480", True),
        ("http://hub.example.org.evil.net/", "hub.example.org", False),
        ("http://hub.example.org/", "hub.example.org.evil.net", False),
        ("http://u@hub.example.org/", "hub.example.org", False),
        ("http://localhost/", "hub.example.org", False),
        ("http://hub.example.org/", None, False),
    ],
)
def test_a_token_is_good_for_its_host(door: Door, uri: str, host: str | None, good: bool) -> None:
    token = door.token(door.keys.create(["send"], name="press"), uri)
    if good:
        assert door.ask(token, host=host).rights == Right.SEND
    else:
        door.refusal(token, host=host)


def test_clocks_may_differ_by_five_minutes(door: Door) -> None:
    key = door.keys.create(["send"], name="press")
    token = door.token(key, for_s=10)
    door.clock.advance(10 + 300)
    assert door.ask(token)
    door.clock.advance(1)
    door.refusal(token)


def test_every_part_of_a_token_is_signed_or_checked(door: Door) -> None:
    """Any character that is changed, but for the case of an escape and the like, makes it invalid."""
    key = door.keys.create(["send"], name="press")
    door.keys.create(["send"], name="another")
    token = door.token(key)
    head = len("SharedAccessSignature ")
    for at in range(head, len(token)):
        for other in "A1%&=":
            if token[at] != other:
                door.refusal(token[:at] + other + token[at + 1 :])
    for changed in (
        token.replace("skn=press", "skn=another"),
        token.replace("se=", "se=0"),
        token.replace("se=", "se=+"),
        token + "&",
        token + "&se=9999999999",
        token.replace("&se", "&x=1&se"),
        token.replace("sr=http", "sr=https"),
    ):
        door.refusal(changed)


def test_keys_are_changed_by_having_two_of_one_name(door: Door) -> None:
    old = door.keys.create(["send"], name="press")
    by_old = door.token(old)
    new = door.keys.create(["send"], name="press")
    by_new = door.token(new)
    assert (door.ask(by_old).key, door.ask(by_new).key) == (old.key.kid, new.key.kid)
    door.keys.revoke(old.key.kid)
    door.refusal(by_old)
    assert door.ask(by_new).key == new.key.kid
    assert door.ask(door.token(new, name=new.key.kid)).key == new.key.kid


@pytest.mark.parametrize("tail", ["", "/messages", "/"])
def test_a_publishers_token_is_for_its_device_and_for_sending(door: Door, tail: str) -> None:
    key = door.keys.create(["manage"], name="press")
    token = door.token(key, f"sb://{HOST}/telemetry/publishers/dev-1{tail}")
    grant = door.ask(token, "/telemetry/publishers/dev-1/messages")
    assert (grant.rights, grant.key) == (Right.SEND, key.key.kid)
    assert grant.allows is not None
    assert [device for device in ("dev-1", "dev-10", "dev-", "") if grant.allows(device)] == ["dev-1"]
    door.refusal(token, path="/v1/events")
    anywhere = door.token(key, f"http://{HOST}/publishers/dev-1{tail}")
    assert door.ask(anywhere, "/v1/events").allows("dev-1")  # type: ignore[misc]


def test_a_publisher_beyond_the_scope_of_its_key_may_send_nothing(door: Door) -> None:
    key = door.keys.create(["send", "listen"], name="press", devices=["d-*"])
    allows = {}
    for device in ("d-1", "e-1"):
        grant = door.ask(door.token(key, sas.publisher(f"http://{HOST}", device)))
        assert grant.allows is not None
        assert grant.rights == Right.SEND
        allows[device] = grant.allows(device)
    assert allows == {"d-1": True, "e-1": False}
    only_listens = door.keys.create(["listen"], name="reader")
    assert door.ask(door.token(only_listens, sas.publisher(f"http://{HOST}", "d-1"))).rights == Right.NONE


def test_a_device_of_the_name_publishers_is_a_device(door: Door) -> None:
    key = door.keys.create(["send"], name="press")
    token = door.token(key, f"http://{HOST}/v1/devices/publishers/events")
    assert door.ask(token, "/v1/devices/publishers/events").allows is None
    door.refusal(token, path="/v1/devices/events/events")


def test_what_signs_is_not_what_opens(door: Door) -> None:
    """Who steals keys.json can sign; the bearer key he does not have, and neither is made from the other's text."""
    key = door.keys.create(["send"], name="press")
    secret = key.text.partition(".")[2]
    digest = sha256(secret.encode()).digest()
    assert key.key.shared_access_key == b64encode(hmac.digest(digest, b"penstock-sas", "sha256")).decode()
    door.refusal(f"Bearer {key.key.kid}.{key.key.shared_access_key}")
    by_secret = sas.token(f"http://{HOST}/", name="press", key=secret, expires_s=door.now_s + 60)
    door.refusal(by_secret)
