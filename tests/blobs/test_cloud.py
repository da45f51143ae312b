"""The cloud store under faults of the network and the store: what a call says is what lies there (faults.md, 28 to 36, 50, 51).

`direct` looks past the proxy at what the store holds.
"""

from __future__ import annotations

import io
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import obstore
import pytest
from obstore.exceptions import AlreadyExistsError, PreconditionError

from penstock.blobs import BlobStore, Created, Exists
from penstock.blobs.cloud import PART_BYTES, CloudBlobs
from penstock.blobs.probe import probe
from penstock.errors import BlobNotFound, LostRace, StoreError, StoreUnavailable
from tests.blobs.store_proxy import Fault, Plan, StoreProxy
from tests.emulators import Emulator, make_container

NAME = "_leases/$archive/0.json"


@dataclass
class Line:
    """A client through a proxy, and one beside it, on the same folder."""

    url: str
    proxy: StoreProxy
    client: CloudBlobs
    direct: CloudBlobs


@pytest.fixture
def line(azurite: Emulator) -> Iterator[Line]:
    url = azurite.fresh_url()
    with StoreProxy(azurite.port) as proxy:
        yield Line(url, proxy, azurite.open(url, port=proxy.port), azurite.open(url))


def body(id: str) -> bytes:
    return b'{"id": "%s"}' % id.encode()


def first(fault: Fault, method: str = "PUT") -> Plan:
    """The fault for the first request of a method; all others are done."""
    left = [fault]
    return lambda asked, path: left.pop() if asked == method and left else Fault.NONE


def each(fault: Fault, method: str = "PUT") -> Plan:
    return lambda asked, path: fault if asked == method else Fault.NONE


def held(store: BlobStore, name: str = NAME) -> bytes | None:
    try:
        return store.get(name).body
    except BlobNotFound:
        return None


def outcome(act: Callable[[], object]) -> object:
    try:
        return act()
    except StoreError as error:
        return type(error)


WRITTEN = [Fault.DROP, Fault.DONE_BUSY, Fault.HANG]
LOST = [Fault.BUSY, Fault.RESET, Fault.LATE, Fault.CONFLICT]


@pytest.mark.parametrize("fault", WRITTEN)
def test_30_a_create_that_was_done_is_created_whatever_was_answered(line: Line, fault: Fault) -> None:
    line.proxy.plan = first(fault)
    assert line.client.create(NAME, body("a"), id="a") == Created(line.direct.get(NAME).etag)
    assert held(line.direct) == body("a")


@pytest.mark.parametrize("fault", LOST)
def test_33_a_create_that_was_not_done_is_not_said_to_be(line: Line, fault: Fault) -> None:
    line.proxy.plan = each(fault)
    assert outcome(lambda: line.client.create(NAME, body("a"), id="a")) is StoreUnavailable
    assert held(line.direct) is None


def test_33_a_store_that_is_busy_for_a_moment_is_asked_again(line: Line) -> None:
    line.proxy.plan = first(Fault.BUSY)
    assert isinstance(line.client.create(NAME, body("a"), id="a"), Created)
    line.proxy.plan = first(Fault.BUSY, "GET")
    assert line.client.get(NAME).body == body("a")


def test_31_a_create_that_lands_late_is_another_s_to_whoever_comes_then(line: Line) -> None:
    line.proxy.plan = each(Fault.LATE)
    assert outcome(lambda: line.client.create(NAME, body("a"), id="a")) is StoreUnavailable
    line.proxy.plan = each(Fault.NONE)
    line.proxy.land()
    assert line.client.create(NAME, body("b"), id="b") == Exists(line.direct.get(NAME))
    assert held(line.direct) == body("a")


def test_31_a_create_that_lands_after_another_changes_nothing(line: Line) -> None:
    line.proxy.plan = each(Fault.LATE)
    assert outcome(lambda: line.client.create(NAME, body("a"), id="a")) is StoreUnavailable
    assert isinstance(line.direct.create(NAME, body("b"), id="b"), Created)
    line.proxy.land()
    assert held(line.direct) == body("b")


def test_32_a_conflict_with_nothing_written_is_neither_mine_nor_another_s(line: Line) -> None:
    line.proxy.plan = each(Fault.CONFLICT)
    with pytest.raises(StoreUnavailable, match="did not create"):
        line.client.create(NAME, body("a"), id="a")
    line.proxy.plan = each(Fault.NONE)
    assert isinstance(line.client.create(NAME, body("a"), id="a"), Created)


def test_30_no_answer_at_all_not_even_to_the_question_leaves_it_open(line: Line) -> None:
    line.proxy.plan = lambda method, path: Fault.DROP
    assert outcome(lambda: line.client.create(NAME, body("a"), id="a")) is StoreUnavailable
    assert held(line.direct) == body("a")


def created(line: Line) -> str:
    made = line.direct.create(NAME, body("old"), id="old")
    assert isinstance(made, Created)
    return made.etag


@pytest.mark.parametrize("fault", WRITTEN)
def test_30_a_replace_that_was_done_gives_the_etag_that_stands(line: Line, fault: Fault) -> None:
    etag = created(line)
    line.proxy.plan = first(fault)
    new = line.client.replace(NAME, body("new"), etag=etag, id="new")
    assert (held(line.direct), line.direct.get(NAME).etag) == (body("new"), new)
    line.proxy.plan = each(Fault.NONE)
    assert line.client.replace(NAME, body("newer"), etag=new, id="newer") != new


@pytest.mark.parametrize("fault", LOST)
def test_33_a_replace_that_was_not_done_is_not_said_to_be(line: Line, fault: Fault) -> None:
    etag = created(line)
    line.proxy.plan = each(fault)
    assert outcome(lambda: line.client.replace(NAME, body("new"), etag=etag, id="new")) is StoreUnavailable
    assert (held(line.direct), line.direct.get(NAME).etag) == (body("old"), etag)


def test_31_a_replace_that_lands_late_was_never_denied(line: Line) -> None:
    etag = created(line)
    line.proxy.plan = each(Fault.LATE)
    assert outcome(lambda: line.client.replace(NAME, body("new"), etag=etag, id="new")) is StoreUnavailable
    line.proxy.plan = each(Fault.NONE)
    line.proxy.land()
    assert held(line.direct) == body("new")
    # The holder goes on from the etag that it knows, and learns that it has lost; it never takes the fresh one.
    assert outcome(lambda: line.client.replace(NAME, body("newer"), etag=etag, id="newer")) is LostRace
    assert held(line.direct) == body("new")


def test_28_a_replace_that_lands_after_another_s_changes_nothing(line: Line) -> None:
    etag = created(line)
    line.proxy.plan = each(Fault.LATE)
    assert outcome(lambda: line.client.replace(NAME, body("zombie"), etag=etag, id="zombie")) is StoreUnavailable
    line.direct.replace(NAME, body("other"), etag=etag, id="other")
    line.proxy.land()
    assert held(line.direct) == body("other")


@pytest.mark.parametrize("fault", [Fault.DROP, Fault.DONE_BUSY])
def test_a_replace_that_was_done_and_replaced_since_is_a_lost_race(line: Line, fault: Fault) -> None:
    etag = created(line)

    def another() -> None:
        line.proxy.before_answer = lambda: None
        there = line.direct.get(NAME)
        assert there.body == body("mine")
        line.direct.replace(NAME, body("other"), etag=there.etag, id="other")

    line.proxy.before_answer = another
    line.proxy.plan = first(fault)
    assert outcome(lambda: line.client.replace(NAME, body("mine"), etag=etag, id="mine")) is LostRace
    assert held(line.direct) == body("other")


def test_29_a_replace_of_what_is_gone_says_so_and_makes_nothing(line: Line) -> None:
    etag = created(line)
    line.direct.delete(NAME)
    assert outcome(lambda: line.client.replace(NAME, body("new"), etag=etag, id="new")) is BlobNotFound
    assert held(line.direct) is None


def test_50_an_etag_never_comes_back(line: Line) -> None:
    etags = {created(line)}
    for turn in range(5):
        for id in ("a", "b"):
            (last,) = {line.direct.get(NAME).etag}
            etags.add(line.client.replace(NAME, body(f"{id}-{turn}"), etag=last, id=f"{id}-{turn}"))
    assert len(etags) == 11


def test_51_the_self_test_passes_and_keeps_nothing(line: Line) -> None:
    probe(line.client, name=line.url)
    assert list(line.direct.list("")) == []


class Trusting(CloudBlobs):
    """The negative control: takes what it is told for what was done."""

    def create(self, name: str, body: bytes, *, id: str) -> Created | Exists:
        try:
            return Created(self._etag(obstore.put(self._records, name, body, mode="create")))
        except AlreadyExistsError:
            return Exists(self.get(name))

    def replace(self, name: str, body: bytes, *, etag: str, id: str) -> str:
        try:
            return self._etag(obstore.put(self._records, name, body, mode={"e_tag": etag}))
        except PreconditionError as error:
            raise LostRace("told so") from error


def test_control_without_reading_back_ones_own_write_is_another_s(line: Line) -> None:
    client = Trusting(line.client._place, line.client._records, line.client._files)
    line.proxy.plan = first(Fault.DONE_BUSY)
    assert client.create(NAME, body("a"), id="a") == Exists(line.direct.get(NAME))
    etag = line.direct.get(NAME).etag
    line.proxy.plan = first(Fault.DONE_BUSY)
    assert outcome(lambda: client.replace(NAME, body("b"), etag=etag, id="b")) is LostRace
    assert held(line.direct) == body("b")


@pytest.mark.parametrize("fault", [Fault.DROP, Fault.DONE_BUSY, Fault.BUSY, Fault.RESET])
@pytest.mark.parametrize("size", [10, 2 * PART_BYTES + 1])
def test_30_a_put_is_whole_or_not_there(line: Line, fault: Fault, size: int) -> None:
    new = bytes(size)
    line.direct.put("0/a", io.BytesIO(b"old"))
    line.proxy.plan = first(fault)
    said = outcome(lambda: line.client.put("0/a", io.BytesIO(new)))
    assert said in (None, StoreUnavailable)
    assert b"".join(line.direct.stream("0/a")) in ((new,) if said is None else (b"old", new))
    line.proxy.plan = each(Fault.NONE)
    line.client.put("0/a", io.BytesIO(new))
    assert b"".join(line.direct.stream("0/a")) == new
    assert [blob.name for blob in line.direct.list("")] == ["0/a"]


def test_an_abandoned_file_leaves_nothing_to_be_seen(line: Line) -> None:
    """All parts arrive, and none is put together."""
    lists = "comp=blocklist"
    line.proxy.plan = lambda method, path: Fault.CONFLICT if lists in path else Fault.NONE
    with pytest.raises(StoreUnavailable, match="did not write 0/a"):
        line.client.put("0/a", io.BytesIO(bytes(2 * PART_BYTES)))
    assert any(lists in request for request in line.proxy.requests)
    assert list(line.direct.list("")) == []
    assert outcome(lambda: line.direct.size("0/a")) is BlobNotFound


def test_31_a_file_that_lands_late_is_the_same_file(line: Line) -> None:
    line.proxy.plan = first(Fault.LATE)
    said = outcome(lambda: line.client.put("0/a", io.BytesIO(b"file")))
    line.direct.put("0/a", io.BytesIO(b"file"))
    line.proxy.land()
    assert said in (None, StoreUnavailable)
    assert line.direct.get("0/a").body == b"file"


@pytest.mark.parametrize("fault", [Fault.CUT, Fault.DROP, Fault.BUSY])
def test_34_a_read_that_is_cut_short_is_no_blob(line: Line, fault: Fault) -> None:
    content = bytes(range(256)) * 1000
    line.direct.put("0/a", io.BytesIO(content))
    line.proxy.plan = each(fault, "GET")
    assert outcome(lambda: line.client.get("0/a")) is StoreUnavailable
    assert outcome(lambda: list(line.client.stream("0/a"))) is StoreUnavailable
    line.proxy.plan = first(fault, "GET")
    assert line.client.get("0/a").body == content
    line.proxy.plan = first(fault, "GET")
    assert b"".join(line.client.stream("0/a")) == content


def test_34_half_a_record_is_no_record(line: Line) -> None:
    """Also where the answer says that it is whole: an archiver that takes it for what was stored stops its partition for ever."""
    for content in (b'{"id": "0"}', b"x" * 105, bytes(300_000)):
        line.direct.put("0/a", io.BytesIO(content))
        line.proxy.plan = each(Fault.SHORT, "GET")
        assert outcome(lambda: line.client.get("0/a")) is StoreUnavailable
        line.proxy.plan = each(Fault.NONE, "GET")
        assert line.client.get("0/a").body == content


def test_an_empty_blob_is_read_as_what_it_is(line: Line) -> None:
    line.direct.put("0/a", io.BytesIO(b""))
    assert line.client.get("0/a").body == b""


def test_34_a_part_of_the_wrong_length_is_no_file(line: Line) -> None:
    line.direct.put("0/a", io.BytesIO(bytes(1000)))
    line.proxy.plan = each(Fault.SHORT, "GET")
    assert outcome(lambda: list(line.client.stream("0/a"))) is StoreUnavailable


def test_a_file_that_is_replaced_while_it_is_read_is_no_mixture(line: Line) -> None:
    line.direct.put("0/a", io.BytesIO(b"1" * (PART_BYTES + 10)))
    parts = line.client.stream("0/a")
    assert next(parts)[:1] == b"1"
    line.direct.put("0/a", io.BytesIO(b"2" * (PART_BYTES + 10)))
    with pytest.raises(StoreUnavailable, match="replaced while it was read"):
        list(parts)


class Careless(CloudBlobs):
    """The negative control: looks neither at what came nor of which write it is."""

    def _whole(self, name: str, got: int, size: int) -> None:
        pass

    def _etag(self, answer: Mapping[str, Any]) -> str:
        return "any"


def test_control_without_looking_a_file_is_short_or_a_mixture(line: Line) -> None:
    client = Careless(line.client._place, line.client._records, line.client._files)
    line.direct.put("0/a", io.BytesIO(b"1" * (PART_BYTES + 10)))
    parts = client.stream("0/a")
    begin = next(parts)
    line.direct.put("0/a", io.BytesIO(b"2" * (PART_BYTES + 10)))
    assert set(begin + b"".join(parts)) == set(b"12")
    line.proxy.plan = each(Fault.SHORT, "GET")
    assert len(b"".join(client.stream("0/a"))) == (PART_BYTES + 10) // 2
    assert len(client.get("0/a").body) == (PART_BYTES + 10) // 2


def test_35_a_listing_that_fails_is_no_empty_one(line: Line) -> None:
    line.direct.put("0/a", io.BytesIO(b"a"))
    line.proxy.plan = each(Fault.BUSY, "GET")
    assert outcome(lambda: list(line.client.list("0/"))) is StoreUnavailable


@pytest.mark.parametrize("fault", [Fault.DROP, Fault.DONE_BUSY])
def test_a_delete_that_was_done_is_done(line: Line, fault: Fault) -> None:
    line.direct.put("0/a", io.BytesIO(b"a"))
    line.proxy.plan = first(fault, "POST")  # a batch of one
    assert outcome(lambda: line.client.delete("0/a")) in (None, StoreUnavailable)
    assert held(line.direct, "0/a") is None
    assert line.client.delete("0/a") is None
    assert {request.split()[0] for request in line.proxy.requests} == {"POST"}


def test_a_container_that_is_not_there_is_no_empty_store(azurite: Emulator) -> None:
    store = azurite.open("az://nothing-here")
    for act in (
        lambda: store.create(NAME, body("a"), id="a"),
        lambda: store.get(NAME),
        lambda: list(store.list("")),
        lambda: store.put("0/a", io.BytesIO(b"a")),
        lambda: store.put("0/a", io.BytesIO(bytes(PART_BYTES))),
    ):
        with pytest.raises(StoreUnavailable, match="the container or bucket is not there"):
            act()


def test_36_a_container_that_goes_away_takes_no_lease_for_free(azurite: Emulator) -> None:
    make_container(azurite.port, "going")
    store = azurite.open("az://going")
    made = store.create(NAME, body("a"), id="a")
    assert isinstance(made, Created)
    make_container(azurite.port, "going", method="DELETE")
    for act in (lambda: store.get(NAME), lambda: store.replace(NAME, body("b"), etag=made.etag, id="b")):
        with pytest.raises(StoreUnavailable, match="not there"):
            act()


@pytest.mark.parametrize("kind", ["azurite", "moto"])
def test_nobody_at_the_address_is_said_with_blob_and_store(kind: str, request: pytest.FixtureRequest) -> None:
    emulator: Emulator = request.getfixturevalue(kind)
    store = emulator.open(f"{emulator.url}/x", port=1)
    with pytest.raises(StoreUnavailable) as raised:
        store.get(NAME)
    assert raised.value.detail == f"{emulator.url}/x did not read {NAME}: nothing listens at its address"


SECRET = "c2VjcmV0LXNlY3JldC1zZWNyZXQ="
SIGNATURE = "sv=2021-12-02&ss=b&srt=sco&sp=rwdlac&se=2030-01-01T00:00:00Z&sig=SECRETSECRET%3D"


@pytest.mark.parametrize(
    "secret", [f"AccountKey={SECRET}", f"SharedAccessSignature={SIGNATURE}"], ids=["key", "signature"]
)
@pytest.mark.parametrize("reachable", [True, False])
def test_no_secret_is_in_any_message(
    azurite: Emulator, monkeypatch: pytest.MonkeyPatch, secret: str, reachable: bool
) -> None:
    endpoint = f"http://127.0.0.1:{azurite.port if reachable else 1}/devstoreaccount1"
    text = f"AccountName=devstoreaccount1;BlobEndpoint={endpoint};{secret}"
    monkeypatch.setitem(azurite.environment, "AZURE_STORAGE_CONNECTION_STRING", text)
    store = azurite.open(f"{azurite.url}/x")
    acts: list[Callable[[], object]] = [lambda: store.create(NAME, body("a"), id="a")]
    if reachable:
        acts += [
            lambda: store.get(NAME),
            lambda: list(store.list("")),
            lambda: store.put("0/a", io.BytesIO(bytes(PART_BYTES))),
            lambda: list(store.stream("0/a")),
        ]
    for act in acts:
        with pytest.raises(StoreUnavailable) as raised:
            act()
        said = "".join(traceback.format_exception(raised.value))
        assert "SECRET" not in said
        assert SECRET not in said
        if reachable:
            assert "key or token is not accepted (403" in raised.value.detail


_MEMORY = """
import os, sys
from penstock.blobs.cloud import open_cloud

class Source:
    left = int(sys.argv[2])
    def read(self, size):
        size = min(size, self.left)
        self.left -= size
        return os.urandom(size)

def peak():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) << 10

store = open_cloud(sys.argv[1], os.environ)
store.put("0/small", Source.__new__(type("Small", (Source,), {"left": 1000})))
list(store.stream("0/small"))
before = peak()
store.put("0/large", Source())
sent = peak()
got = sum(map(len, store.stream("0/large")))
print(sent - before, peak() - before, got)
"""


def test_a_large_file_passes_through_small_memory(azurite: Emulator) -> None:
    size = 200_000_000
    done = subprocess.run(
        [sys.executable, "-c", _MEMORY, azurite.fresh_url(), str(size)],
        env={**azurite.environment, "PYTHONPATH": str(Path(__file__).parents[2] / "src")},
        capture_output=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr.decode()
    sent, streamed, got = map(int, done.stdout.split())
    assert got == size
    print(f"grown by {sent / 2**20:.1f} MiB while sending, {streamed / 2**20:.1f} MiB in the end")
    assert max(sent, streamed) < 64 << 20
