"""A hub read over HTTP: the same answers as in its own process, and what a network or a wrong server does to them."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from penstock.errors import (
    FrameDamaged,
    HubBroken,
    HubError,
    HubUnavailable,
    NotFound,
    OffsetBeyondEnd,
    OffsetTrimmed,
    PenstockError,
    ReaderFenced,
    SettingsError,
    WrongHub,
)
from penstock.events import Bounds, Slice
from penstock.hub import groups
from penstock.hub.embedded import EmbeddedHub, create
from penstock.hub.remote import BYTES_MAX, RemoteHub
from penstock.testing import FakeClock, MemoryHub
from penstock.wire.frame import encode
from tests.hub.served import NoGroups, served

LINES = [b'{"deviceId":"d-1","n":%d}' % n for n in range(10)]


@pytest.fixture
def hub() -> MemoryHub:
    made = MemoryHub(2, clock=FakeClock())
    for _ in range(3):
        made.put(0, LINES)
    return made


@contextmanager
def remote(hub: object, **options: object) -> Iterator[RemoteHub]:
    with served(hub) as url, RemoteHub(url, patience_s=0.0, **options) as found:  # type: ignore[arg-type]
        yield found


def test_the_same_answers_as_in_its_own_process(hub: MemoryHub) -> None:
    hub.cut()
    with remote(hub) as far:
        assert (far.id, far.period_s, far.partitions()) == (hub.id, hub.period_s, 2)
        for partition in (0, 1):
            assert far.bounds(partition) == hub.bounds(partition)
            for at_ms in (0, hub.bounds(0).enqueued_first_ms, hub.bounds(0).enqueued_first_ms + 1):
                assert far.locate(partition, at_ms) == hub.locate(partition, at_ms)
        for start in range(31):
            for bytes_max in (1, 700, 1 << 20):
                assert far.read(0, str(start), bytes_max=bytes_max) == hub.read(0, str(start), bytes_max=bytes_max)


def test_what_the_log_says_comes_back_as_the_same_error(hub: MemoryHub) -> None:
    hub.trim(0, before="10")
    with remote(hub) as far:
        with pytest.raises(OffsetTrimmed) as trimmed:
            far.read(0, "0", bytes_max=1)
        assert trimmed.value.fields == {"first": "10"}
        with pytest.raises(OffsetBeyondEnd) as beyond:
            far.read(0, "31", bytes_max=1)
        assert beyond.value.fields == {"end": "30"}
        with pytest.raises(NotFound):
            far.bounds(2)
        hub.read = raising(FrameDamaged("It is damaged.", where="0/10"))  # type: ignore[method-assign]
        with pytest.raises(FrameDamaged) as damaged:
            far.read(0, "10", bytes_max=1)
        assert damaged.value.fields == {"where": "0/10"}


@pytest.mark.parametrize("error", [HubBroken("Its disk failed."), HubError("No."), KeyError("a bug")])
def test_a_server_that_fails_is_asked_again(hub: MemoryHub, error: Exception) -> None:
    """A worker that is broken is started again: that must not end a host of another machine."""
    with remote(hub) as far:
        hub.read = raising(error)  # type: ignore[method-assign]
        with pytest.raises(HubUnavailable):
            far.read(0, "0", bytes_max=1)


def raising(error: Exception) -> Callable[..., Slice]:
    def read(*_: object, **__: object) -> Slice:
        raise error

    return read


def test_damage_on_the_way_is_not_damage_of_the_log(hub: MemoryHub) -> None:
    """Every byte of an answer's body flipped: none is taken for what the log holds, and none stops the partition."""
    whole = b"".join(encode(frame) for frame in hub.read(0, "0", bytes_max=1 << 20).frames)
    with Scripted() as server, RemoteHub(server.url, patience_s=0.0) as far:
        for place in range(len(whole)):
            server.events = whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :]
            with pytest.raises(HubUnavailable):
                far.read(0, "0", bytes_max=1 << 20)
        server.events = whole
        assert far.read(0, "0", bytes_max=1 << 20) == hub.read(0, "0", bytes_max=1 << 20)


@pytest.mark.parametrize(
    ("headers", "why"),
    [
        ({"Penstock-Next-Offset": "20"}, "says otherwise"),
        ({"Penstock-End-Offset": "29"}, "the log ends at 29"),
        ({"Penstock-End-Offset": "x"}, "damaged or contradicts"),
        ({"Content-Type": "text/html"}, "not as a hub of Penstock"),
        ({"Content-Type": "application/x-ndjson"}, "not as a hub of Penstock"),
        ({"Penstock-Hub": None}, "not as a hub of Penstock"),
        ({"Penstock-Next-Offset": None}, "damaged or contradicts"),
        ({"Penstock-End-Offset": None}, "damaged or contradicts"),
    ],
)
def test_answers_that_contradict_themselves(hub: MemoryHub, headers: dict[str, str | None], why: str) -> None:
    with Scripted() as server, RemoteHub(server.url, patience_s=0.0) as far:
        server.events = b"".join(encode(frame) for frame in hub.read(0, "0", bytes_max=1 << 20).frames)
        server.headers |= headers
        with pytest.raises(HubUnavailable, match=why):
            far.read(0, "0", bytes_max=1 << 20)


@pytest.mark.parametrize("offset", ["10", "25"])
def test_frames_of_another_place_are_not_taken(hub: MemoryHub, offset: str) -> None:
    with Scripted() as server, RemoteHub(server.url, patience_s=0.0) as far:
        server.events = b"".join(encode(frame) for frame in hub.read(0, "0", bytes_max=1 << 20).frames[:1])
        server.headers["Penstock-Next-Offset"] = "10"
        for partition, start in ((0, offset), (1, "0")):
            with pytest.raises(HubUnavailable, match="comes behind"):
                far.read(partition, start, bytes_max=1 << 20)


@pytest.mark.parametrize("body", [b" ", b"[]", b"{}", b'{"offset":7}', b'{"offset":"7"', b"\xff"])
def test_json_that_is_not_what_was_asked_for(body: bytes) -> None:
    with Scripted() as server, RemoteHub(server.url, patience_s=0.0) as far:
        server.json = body
        for ask in (lambda: far.locate(0, 0), lambda: far.bounds(0)):
            with pytest.raises(HubUnavailable, match="damaged or contradicts"):
                ask()
        server.json = b'{"partition":0,"first":0,"next":0,"bytes":0,"enqueued_first":"yesterday","enqueued_last":null}'
        with pytest.raises(HubUnavailable, match="damaged or contradicts"):
            far.bounds(0)


def test_an_answer_with_nothing_though_the_log_goes_on_is_not_taken(hub: MemoryHub) -> None:
    """Taken for the end of the log it would be asked for for ever, in silence."""
    with Scripted() as server, RemoteHub(server.url, patience_s=0.0) as far:
        server.headers["Penstock-Next-Offset"] = "10"
        with pytest.raises(HubUnavailable, match="from 10 to 10, and the log ends at 30"):
            far.read(0, "10", bytes_max=1 << 20)


def test_another_hub_at_the_same_address_is_refused(hub: MemoryHub) -> None:
    """Its offsets mean other events: nothing of it may be read with these leases."""
    with Scripted() as server, RemoteHub(server.url, patience_s=0.0) as far:
        server.headers["Penstock-Hub"] = "f" * 32
        with pytest.raises(WrongHub, match="and not 0000") as refused:
            far.read(0, "0", bytes_max=1)
        assert not refused.value.retryable
        assert refused.value.fields == {"found": "f" * 32, "expected": hub.id}
        # Control: it is the identity alone that tells it.
        far._id = ""
        server.events = b"".join(encode(frame) for frame in hub.read(0, "0", bytes_max=1 << 20).frames)
        assert far.read(0, "0", bytes_max=1 << 20).next_offset == "30"


@pytest.mark.parametrize("how", ["reset", "cut short", "too long", "no http"])
def test_a_connection_that_fails(hub: MemoryHub, how: str) -> None:
    with Scripted() as server, RemoteHub(server.url, patience_s=0.0) as far:
        server.fault = how
        with pytest.raises(HubUnavailable, match="gives no answer"):
            far.bounds(0)
        server.fault = ""
        assert far.bounds(0) == Bounds(0, 30, 1, 0, 0)


def test_nobody_there() -> None:
    with socket.create_server(("127.0.0.1", 0)) as kept:
        port = kept.getsockname()[1]
    with pytest.raises(HubUnavailable, match="gives no answer"):
        RemoteHub(f"http://127.0.0.1:{port}", patience_s=0.0)


@pytest.mark.parametrize("url", ["kafka://h:1/t", "http://", "http://h:x", "127.0.0.1:8480", "http://h:99999"])
def test_what_is_no_address(url: str) -> None:
    with pytest.raises(SettingsError, match="is not an address"):
        RemoteHub(url)


def test_a_silent_server_is_not_waited_for(hub: MemoryHub) -> None:
    with Scripted() as server, RemoteHub(server.url, timeout_s=0.05, patience_s=0.0) as far:
        server.fault = "silent"
        with pytest.raises(HubUnavailable, match="timed out"):
            far.bounds(0)


def test_an_answer_that_never_ends_is_not_waited_for() -> None:
    """Each step is in time, the whole is not."""

    class Hasty(FakeClock):
        def monotonic(self) -> float:
            self.advance(40)
            return super().monotonic()

    with Scripted() as server, pytest.raises(HubUnavailable, match="not whole within"):
        RemoteHub(server.url, patience_s=0.0, clock=Hasty())


def test_a_short_outage_is_not_seen(hub: MemoryHub) -> None:
    """The server goes away with all connections, and comes back on its port."""
    with served(hub) as url:
        port = int(url.rpartition(":")[2])
        far = RemoteHub(url, patience_s=20.0)
        before = far.read(0, "0", bytes_max=1 << 20)
    answers: list[Slice] = []
    asking = threading.Thread(target=lambda: answers.append(far.read(0, "0", bytes_max=1 << 20)))
    asking.start()
    with served(hub, port=port):
        asking.join(20)
        assert answers == [before]
        far.close()


def test_a_host_that_stops_waits_for_nobody(hub: MemoryHub) -> None:
    with served(hub) as url:
        far = RemoteHub(url, patience_s=1e6)
    errors: list[PenstockError] = []

    def ask() -> None:
        try:
            far.bounds(0)
        except PenstockError as error:
            errors.append(error)

    asking = threading.Thread(target=ask)
    asking.start()
    far.close()
    asking.join(20)
    assert [type(error) for error in errors] == [HubUnavailable]


def test_it_says_who_reads(hub: MemoryHub) -> None:
    heard = NoGroups()
    with served(hub, heard) as url, RemoteHub(url, patience_s=0.0) as far:
        far.bounds(0)
        far.read(0, "0", bytes_max=1)
        assert heard.heard_of == []
        leases = {0: (3, 20)}
        far.announce("alarms", leases.get)
        far.bounds(0)
        far.bounds(1)
        far.read(0, "20", bytes_max=1)
        far.read(1, "0", bytes_max=1)
        far.locate(0, 0)
    assert heard.heard_of == [("alarms", 0, 3, 20), ("alarms", 1, 0, 0), ("alarms", 0, 3, 20)]


@pytest.mark.parametrize("refused", [True, False], ids=["refused", "control: not refused"])
def test_an_older_epoch_reads_nothing(tmp_path: Path, refused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not refused:
        monkeypatch.setattr(groups, "after", lambda _kept, now: now)
    clock = FakeClock()
    create(tmp_path, partitions=1, period_s=60, bytes_max=64 << 20, clock=clock)
    with (
        EmbeddedHub(tmp_path, bytes_max=64 << 20, clock=clock) as near,
        served(near, near.groups) as url,
        RemoteHub(url, patience_s=0.0) as old,
        RemoteHub(url, patience_s=0.0) as new,
    ):
        old.announce("alarms", lambda _: (1, 0))
        new.announce("alarms", lambda _: (2, 0))
        old.read(0, "0", bytes_max=1)
        new.read(0, "0", bytes_max=1)
        if refused:
            with pytest.raises(ReaderFenced) as fenced:
                old.read(0, "0", bytes_max=1)
            assert fenced.value.fields == {"last_epoch": 2}
        else:
            old.read(0, "0", bytes_max=1)
        new.read(0, "0", bytes_max=1)


def test_an_answer_is_bounded(hub: MemoryHub) -> None:
    large = [b'{"deviceId":"d","x":"%s"}' % (b"x" * 200_000)]
    for _ in range(40):
        hub.put(1, large)
    with remote(hub) as far:
        read = far.read(1, "0", bytes_max=1 << 40)
        assert len(read.frames) > 1
        assert sum(len(frame.body) for frame in read.frames) <= BYTES_MAX


class Scripted:
    """A server that says what it is told, for what no Penstock would say."""

    def __init__(self) -> None:
        self.headers: dict[str, str | None] = {
            "Penstock-Hub": "0" * 32,
            "Penstock-Next-Offset": "30",
            "Penstock-End-Offset": "30",
        }
        self.events = b""
        self.json = b""
        self.fault = ""
        self._listening = socket.create_server(("127.0.0.1", 0))
        self._connections: list[socket.socket] = []
        self.url = f"http://127.0.0.1:{self._listening.getsockname()[1]}"

    def __enter__(self) -> Scripted:
        self._thread = threading.Thread(target=self._accept)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._listening.shutdown(socket.SHUT_RDWR)
        self._listening.close()
        self._thread.join(20)
        for connection in self._connections:
            connection.close()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listening.accept()
            except OSError:
                return
            self._connections.append(connection)
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        try:
            with connection.makefile("rb") as lines:
                while line := lines.readline():
                    for _ in iter(lines.readline, b"\r\n"):
                        pass
                    if self.fault == "silent":
                        continue
                    connection.sendall(self._answer(line.split()[1]))
                    if self.fault:
                        connection.shutdown(socket.SHUT_RDWR)
        except OSError:
            return

    def _answer(self, path: bytes) -> bytes:
        one = b'{"partition":0,"first":0,"next":30,"bytes":1,"enqueued_first":null,"enqueued_last":null}'
        bodies = {b"/v1/partitions": b'{"hub":"%s","period_s":1,"partitions":[%s,%s]}' % (b"0" * 32, one, one)}
        is_events = b"/events" in path
        body = self.events if is_events else self.json or bodies.get(path, one)
        kind = "application/vnd.penstock.frames" if is_events else "application/json"
        length = {"cut short": len(body) + 1, "too long": 1 << 40}.get(self.fault, len(body))
        headers = {"Content-Type": kind, "Content-Length": str(length), **self.headers}
        lines = [f"{name}: {value}" for name, value in headers.items() if value is not None]
        head = "\r\n".join(["HTTP/1.1 200 OK", *lines]).encode() + b"\r\n\r\n"
        if self.fault == "reset":
            return b""
        if self.fault == "no http":
            return b"SMTP ready\r\n"
        return head + body
