"""TLS on the port that everyone reaches: with real certificates, real processes, and the client as users have it."""

from __future__ import annotations

import contextlib
import socket
import ssl
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from penstock import Client
from penstock.access import Access
from penstock.cli.reach import fetch
from penstock.errors import HubUnavailable, PenstockError
from penstock.hub.remote import RemoteHub
from tests.certificates import Authority
from tests.e2e.http_client import head
from tests.e2e.system import System, wait_for

EVENT = b'{"deviceId":"d-1","n":1}'
PATIENCE_S = 20.0


class Secured:
    """An installation with a certificate whose key lies in a file of its own."""

    def __init__(self, folder: Path, *options: str) -> None:
        self.folder = folder
        self.authority = Authority(folder)
        self.key = folder / "server-key.pem"
        self.certificate = self.authority.issue("server", "127.0.0.1", "localhost", key=self.key)
        tls = ("--tls-cert", str(self.certificate), "--tls-key", str(self.key))
        self.system = System(folder, partitions=2, anonymous=False, options=(*tls, *options))

    @property
    def url(self) -> str:
        return self.system.url.replace("http:", "https:")

    @property
    def port(self) -> int:
        return urlsplit(self.url).port or 0

    def start(self) -> Secured:
        self.system.start(admin=True)
        return self

    def connect(self, context: ssl.SSLContext) -> ssl.SSLSocket:
        raw = socket.create_connection(("127.0.0.1", self.port), timeout=PATIENCE_S)
        try:
            return context.wrap_socket(raw, server_hostname="127.0.0.1")
        except BaseException:
            raw.close()
            raise

    def trusting(self) -> ssl.SSLContext:
        return ssl.create_default_context(cafile=self.authority.ca)

    def serial(self) -> int:
        """Of the certificate that a new client is shown."""
        with self.connect(self.trusting()) as connection:
            shown = connection.getpeercert()
            assert shown is not None
            return int(str(shown["serialNumber"]), 16)


@pytest.fixture(scope="module")
def secured(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Secured]:
    made = Secured(tmp_path_factory.mktemp("tls"), "--header-timeout", "500ms")
    with contextlib.closing(made.system):
        yield made.start()


def test_a_client_that_trusts_the_authority_sends(secured: Secured) -> None:
    spool = secured.folder / "spool-1"
    with Client(secured.url, key=secured.system.key, ca=str(secured.authority.ca), spool=spool) as client:
        client.send(EVENT)
        client.flush(PATIENCE_S)
        assert client.stats().accepted == 1


def test_one_that_does_not_keeps_its_events_and_shows_no_key(secured: Secured) -> None:
    """The handshake fails before a request is made."""
    spool = secured.folder / "spool-2"
    with Client(secured.url, key=secured.system.key, spool=spool) as client:
        client.send(EVENT)
        wait_for("the client says why", lambda: "CERTIFICATE_VERIFY_FAILED" in client.stats().why)
        assert (client.stats().accepted, client.stats().waiting_events) == (0, 1)
    other = Authority(secured.folder, "other")
    with pytest.raises(PenstockError, match="CERTIFICATE_VERIFY_FAILED"):
        fetch(Access(secured.url, key=secured.system.key, ca=str(other.ca)), "/v1/status")


def test_commands_on_the_same_machine_know_the_certificate_itself(secured: Secured) -> None:
    system = secured.system
    sent = system.run("send", "--data", "data", "-", stdin=EVENT)
    assert (sent.returncode, sent.stderr) == (0, b""), sent
    made = system.run("key", "create", "--data", "data", "--right", "send", "--json")
    assert f'"Endpoint=https://127.0.0.1:{secured.port}/;'.encode() in made.stdout
    system.settle()


def test_a_hub_is_read_through_it(secured: Secured) -> None:
    access = Access(secured.url, key=secured.system.key, ca=str(secured.authority.ca))
    with RemoteHub(access) as hub:
        assert hub.partitions() == 2
    with pytest.raises(HubUnavailable, match="CERTIFICATE_VERIFY_FAILED"):
        RemoteHub(Access(secured.url, key=secured.system.key), patience_s=0)


def test_plain_http_is_not_answered(secured: Secured) -> None:
    with socket.create_connection(("127.0.0.1", secured.port), timeout=PATIENCE_S) as plain:
        plain.sendall(head("GET", "/health/live", {}))
        assert b"HTTP" not in _until_end(plain)


def test_a_handshake_has_a_deadline(secured: Secured) -> None:
    """Half a second here: who connects and says nothing is sent away, and others are served meanwhile."""
    with socket.create_connection(("127.0.0.1", secured.port), timeout=PATIENCE_S) as silent:
        assert secured.serial()
        assert _until_end(silent) == b""


def test_a_refusal_arrives_whole_though_the_body_still_comes(secured: Secured) -> None:
    with secured.connect(secured.trusting()) as connection:
        connection.sendall(head("POST", "/v1/events", {"Content-Length": str(8 << 20)}) + b"x" * 100_000)
        answer = b""
        while b'"retryable":false' not in answer:
            part = connection.recv(65536)
            assert part, answer
            answer += part
        assert answer.startswith(b"HTTP/1.1 413 ")


def test_a_client_that_ends_its_side_is_let_go(secured: Secured) -> None:
    """TLS knows no half of a connection: nothing is left behind, and nothing is said of it in the log."""
    with secured.connect(secured.trusting()) as connection:
        connection.sendall(head("GET", "/health/live", {}))
        assert connection.recv(65536).startswith(b"HTTP/1.1 200 ")
        with contextlib.suppress(OSError):
            connection.unwrap()
    with secured.connect(secured.trusting()) as connection:
        connection.sendall(head("POST", "/v1/events", {"Content-Length": "10"}))
    assert secured.serial()
    assert "eof_received" not in secured.system.up.text()


def test_a_renewed_certificate_is_shown_without_a_restart(secured: Secured) -> None:
    """Certificate and key are two files, so between the two they do not fit: then the old ones go on."""
    before, workers = secured.serial(), secured.system.parts("api")
    key, new_key = secured.key.read_bytes(), secured.folder / "new-key.pem"
    new = secured.authority.issue("renewed", "127.0.0.1", key=new_key)
    # By another name and a rename, as tools that renew certificates do it.
    new.replace(secured.certificate)
    wait_for("it is said that the two do not fit", lambda: "the old one stays" in secured.system.up.text())
    assert (secured.serial(), secured.key.read_bytes()) == (before, key)
    new_key.replace(secured.key)
    wait_for("every worker has said so", lambda: secured.system.up.text().count("was renewed") == len(workers))
    assert secured.serial() != before
    assert secured.system.parts("api") == workers
    assert secured.system.run("send", "--data", "data", "-", stdin=EVENT).returncode == 0


def test_with_an_authority_for_clients_nobody_comes_in_without_a_certificate(tmp_path: Path) -> None:
    authority = Authority(tmp_path, "clients")
    mutual = Secured(tmp_path, "--tls-client-ca", str(authority.ca))
    with contextlib.closing(mutual.system):
        mutual.start()
        known = str(authority.issue("device"))
        stranger = str(mutual.authority.issue("stranger"))
        ca = str(mutual.authority.ca)
        with Client(mutual.url, key=mutual.system.key, ca=ca, certificate=known, spool=tmp_path / "spool") as client:
            client.send(EVENT)
            client.flush(PATIENCE_S)
        for certificate in ("", stranger):
            with pytest.raises(PenstockError, match="gives no answer"):
                fetch(Access(mutual.url, key=mutual.system.key, ca=ca, certificate=certificate), "/health/live")
        # It takes the place of no key.
        with pytest.raises(PenstockError, match="401"):
            fetch(Access(mutual.url, ca=ca, certificate=known), "/v1/status")
        refused = mutual.system.run("status", "--url", mutual.url)
        assert (refused.returncode, b"gives no answer" in refused.stderr) == (1, True), refused
        shown = mutual.system.run("status", "--url", mutual.url, "--certificate", known)
        assert shown.returncode == 0, shown


def _until_end(connection: socket.socket) -> bytes:
    received = b""
    with contextlib.suppress(ConnectionResetError):
        while part := connection.recv(65536):
            received += part
    return received
