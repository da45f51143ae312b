"""Clients of a TLS port that do not shake hands: counted like all others, sent away, and nobody else notices."""

from __future__ import annotations

import contextlib
import resource
import socket
import ssl
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from penstock.server.parser import Limits
from penstock.server.tls import Certificates
from penstock.testing import MemoryLog
from tests.certificates import Authority

GET = b"GET /a HTTP/1.1\r\nHost: h\r\n\r\n"
SLOW = Limits(header_s=60.0, sweep_s=0.02, linger_s=0.1, grace_s=0.1)


class Tls:
    """A certificate, and clients that trust it."""

    def __init__(self, folder: Path) -> None:
        authority = Authority(folder)
        self.certificates = Certificates(authority.issue("server", "127.0.0.1"), None, None, log=MemoryLog())
        self.trusting = ssl.create_default_context(cafile=authority.ca)

    def get(self, served) -> bytes:
        """The first bytes of the answer on a connection of its own, which is then closed."""
        raw = served.client(source="127.0.0.2").socket
        with self.trusting.wrap_socket(raw, server_hostname="127.0.0.1") as connection:
            connection.sendall(GET)
            return connection.recv(12)


@pytest.fixture(scope="module")
def tls(tmp_path_factory: pytest.TempPathFactory) -> Tls:
    return Tls(tmp_path_factory.mktemp("door"))


def end(client) -> bytes:
    with contextlib.suppress(ConnectionResetError):
        return client.ended()
    return b""


def test_who_says_nothing_is_counted_and_others_are_served(serve, tls):
    served = serve(limits=SLOW._replace(connections_per_address_max=3), certificates=tls.certificates)
    mute = [served.client() for _ in range(3)]
    served.until(lambda: len(served.server.connections) == 3)
    assert [end(served.client()) for _ in range(20)] == [b""] * 20
    assert len(served.server.connections) == 3
    assert tls.get(served) == b"HTTP/1.1 200"
    for client in mute:
        client.socket.close()
    served.until(lambda: not served.server.connections)
    assert served.server.crowd._seats_of == {}
    assert served.log.lines == []


def test_a_connection_keeps_the_one_seat_of_its_handshake(serve, tls):
    served = serve(limits=SLOW._replace(connections_per_address_max=1), certificates=tls.certificates)
    raw = served.client().socket
    with tls.trusting.wrap_socket(raw, server_hostname="127.0.0.1") as connection:
        for _ in range(2):
            connection.sendall(GET)
            assert connection.recv(65536).startswith(b"HTTP/1.1 200")
        assert (len(served.server.connections), served.server.crowd._seats_of) == (1, {"127.0.0.1": 1})
        assert end(served.client()) == b""
    served.until(lambda: not served.server.connections)


def test_a_handshake_that_never_ends_or_is_none_gives_its_seat_back(serve, tls):
    served = serve(limits=SLOW._replace(header_s=0.2), certificates=tls.certificates)
    mute, plain = served.client(), served.client()
    plain.send(GET)
    assert (end(mute), b"HTTP" in end(plain)) == (b"", False)
    served.until(lambda: not served.server.connections)
    assert served.server.crowd._seats_of == {}


def test_in_a_full_house_the_mute_make_room(serve, tls):
    served = serve(limits=SLOW._replace(connections_max=4), certificates=tls.certificates)
    mute = [served.client() for _ in range(4)]
    served.until(lambda: len(served.server.crowd._idle) == 4)
    assert tls.get(served) == b"HTTP/1.1 200"
    assert end(mute[0]) == b""
    assert len(served.server.crowd._seats_of) <= 2


def test_a_drain_does_not_wait_for_handshakes_and_answers_who_was_queued(serve, tls):
    served = serve(limits=SLOW, certificates=tls.certificates)
    mute = served.client()
    served.until(lambda: len(served.server.connections) == 1)
    served.start_drain(600.0)()
    assert end(mute) == b""
    with pytest.raises(ConnectionRefusedError):
        served.client()


@pytest.fixture
def files_max() -> Iterator[Callable[[int], None]]:
    """Sets how many descriptors this process may have; as before when the test ends."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    yield lambda most: resource.setrlimit(resource.RLIMIT_NOFILE, (most, before[1]))
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_without_a_descriptor_left_it_goes_on_when_there_is_one(serve, tls, files_max):
    served = serve(limits=SLOW, certificates=tls.certificates)
    client = served.client(source="127.0.0.2")
    served.until(lambda: len(served.server.connections) == 1)
    with socket.socket() as last:
        files_max(last.fileno() + 1)
        last.connect(served.address)  # the kernel takes it, the server cannot
        served.until(lambda: served.server._doors[0]._again is not None)
        client.socket.close()
        with tls.trusting.wrap_socket(last, server_hostname="127.0.0.1") as connection:
            connection.sendall(GET)
            assert connection.recv(12) == b"HTTP/1.1 200"
