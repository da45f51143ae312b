"""One connection to a real server in this process."""

from __future__ import annotations

import contextlib
import shutil
import socket
import ssl
import subprocess
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from penstock.client import transport as transport_module
from penstock.client.answers import Again, Paused, Reaction, Settled, reaction
from penstock.client.transport import HttpTransport
from penstock.errors import HubUnavailable, SettingsError


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("X-Path", self.path)
        self.send_header("X-Connection", str(self.client_address[1]))
        self.end_headers()
        self.wfile.write(body)
        if body == b"close":
            self.close_connection = True

    def log_message(self, format: str, *args: object) -> None:
        return


@pytest.fixture
def url() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


def test_the_connection_is_kept(url: str) -> None:
    transport = HttpTransport(url + "/base/", timeout_s=5)
    first, second = transport.post(b"1", {"A": "b"}), transport.post(b"2", {})
    assert (first.status, first.body, second.body) == (200, b"1", b"2")
    assert first.headers["x-connection"] == second.headers["x-connection"]
    assert first.headers["x-path"] == "/base/v1/events"
    transport.close()


def test_an_answer_without_end_is_none(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport_module, "ANSWER_BYTES_MAX", 1000)
    transport = HttpTransport(url, timeout_s=5)
    assert len(transport.post(b"1" * 1000, {}).body) == 1000
    with pytest.raises(HubUnavailable, match="longer than any answer"):
        transport.post(b"1" * 1001, {})
    transport.close()


def test_a_connection_that_the_server_closed_is_opened_again(url: str) -> None:
    transport = HttpTransport(url, timeout_s=5)
    assert transport.post(b"close", {}).body == b"close"
    assert transport.post(b"2", {}).body == b"2"
    transport.close()


def test_no_answer_is_not_confirmed(url: str) -> None:
    transport = HttpTransport("http://127.0.0.1:1", timeout_s=5)
    with pytest.raises(HubUnavailable, match=r"127\.0\.0\.1:1 gives no answer"):
        transport.post(b"", {})


@pytest.mark.parametrize("wrong", ["ftp://x", "127.0.0.1:80", "http://", "http://x:port"])
def test_what_is_no_address_is_refused(wrong: str) -> None:
    with pytest.raises(SettingsError, match="address"):
        HttpTransport(wrong, timeout_s=5)


# Case 99: what networks do. None of it settles a batch, so the same bytes are posted again under the same number.

BODY = b'{"batch":"p:1:1","accepted":1,"duplicate":false,"rejected":[]}'
WHOLE = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%b" % (len(BODY), BODY)
LAST_CHUNK = b"0\r\n\r\n"
CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n%x\r\n%b\r\n" % (len(BODY), BODY) + LAST_CHUNK


@contextlib.contextmanager
def server_that(says: bytes, *, hangs_up: bool, context: ssl.SSLContext | None = None) -> Iterator[str]:
    """Reads each request, answers these bytes, and hangs up or stays silent."""

    def serve(listening: socket.socket) -> None:
        with contextlib.suppress(OSError), contextlib.ExitStack() as kept:
            while True:
                client = kept.enter_context(listening.accept()[0])
                with contextlib.suppress(OSError):
                    client = kept.enter_context(context.wrap_socket(client, server_side=True)) if context else client
                    while not client.recv(65536).endswith(b"the batch"):
                        continue
                    client.sendall(says)
                    if hangs_up:
                        client.close()

    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=serve, args=(listening,))
        thread.start()
        try:
            yield f"127.0.0.1:{listening.getsockname()[1]}"
        finally:
            listening.shutdown(socket.SHUT_RDWR)
            thread.join()


def answered(address: str, timeout_s: float) -> Reaction:
    transport = HttpTransport(f"http://{address}", timeout_s=timeout_s)
    try:
        answer = transport.post(b"the batch", {})
    except HubUnavailable as error:
        return Again(error.detail)
    finally:
        transport.close()
    return reaction(answer, batch="p:1:1", events=1, now_ms=0)


@pytest.mark.parametrize("whole", [WHOLE, CHUNKED.removesuffix(LAST_CHUNK)], ids=["length", "chunked"])
def test_an_answer_that_is_cut_anywhere_settles_nothing(whole: bytes) -> None:
    """In its head a cut looks like an answer without a body, which is not one of Penstock's for this batch."""
    for size in range(len(whole)):
        with server_that(whole[:size], hangs_up=True) as address:
            found = answered(address, 5)
            assert isinstance(found, Again if size > whole.index(b"\r\n\r\n") + 4 else Again | Paused), size


@pytest.mark.parametrize("size", [0, 12, 40, len(WHOLE) - 1])
def test_a_connection_that_is_half_open_settles_nothing(size: int) -> None:
    with server_that(WHOLE[:size], hangs_up=False) as address:
        found = answered(address, 0.1)
        assert isinstance(found, Again) and "timed out" in found.why


@pytest.mark.parametrize("whole", [WHOLE, CHUNKED])
@pytest.mark.parametrize("hangs_up", [True, False])
def test_control_the_whole_answer_settles(whole: bytes, hangs_up: bool) -> None:
    with server_that(whole, hangs_up=hangs_up) as address:
        assert isinstance(answered(address, 5), Settled)


def test_a_name_that_nobody_knows_is_tried_again() -> None:
    transport = HttpTransport("http://hub.invalid", timeout_s=5)
    for _ in range(2):
        with pytest.raises(HubUnavailable, match=r"hub\.invalid:80 gives no answer"):
            transport.post(b"the batch", {})


def certificate(folder: Path, until: str) -> Path:
    """Of 127.0.0.1, signed by itself, with its key."""
    if not shutil.which("openssl"):
        pytest.skip("openssl is not here")
    (folder / "ca.cnf").write_text(
        "[ca]\ndefault_ca=d\n[d]\ndatabase=index\nnew_certs_dir=.\ndefault_md=sha256\npolicy=p\nrand_serial=yes\n"
        "[p]\ncommonName=supplied\n[e]\nsubjectAltName=IP:127.0.0.1\n[req]\ndistinguished_name=n\n[n]\n"
    )
    (folder / "index").touch()
    new_key = "-newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -keyout key.pem -subj /CN=hub"
    dates = f"-startdate 20200101000000Z -enddate {until}"
    for command in (
        f"req -new -config ca.cnf {new_key} -out request.pem",
        f"ca -batch -selfsign -config ca.cnf -keyfile key.pem -in request.pem {dates} -extensions e -notext -out hub.pem",
    ):
        subprocess.run(["openssl", *command.split()], cwd=folder, check=True, capture_output=True, timeout=60)
    return folder / "hub.pem"


@pytest.mark.parametrize("until", ["20200102000000Z", "20990101000000Z"], ids=["expired", "control: valid"])
def test_a_certificate_that_has_expired(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, until: str) -> None:
    trusted = certificate(tmp_path, until)
    monkeypatch.setenv("SSL_CERT_FILE", str(trusted))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(trusted, tmp_path / "key.pem")
    with server_that(WHOLE, hangs_up=True, context=context) as address:
        transport = HttpTransport(f"https://{address}", timeout_s=5)
        if "2020" in until:
            with pytest.raises(HubUnavailable, match="certificate has expired"):
                transport.post(b"the batch", {})
        else:
            assert transport.post(b"the batch", {}).status == 200
        transport.close()
