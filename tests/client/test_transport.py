"""One connection to a real server in this process."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

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
