"""Google Cloud Storage: there is no emulator of the API that its client uses, so this is the part of it that decides.

A write is conditional on the generation, which the answers carry; the ETag here is always the same and decides nothing.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from penstock.blobs import Created, Exists
from penstock.blobs.cloud import CloudBlobs, open_cloud
from penstock.blobs.probe import probe
from penstock.errors import BlobNotFound, LostRace


class Bucket(ThreadingHTTPServer):
    """https://cloud.google.com/storage/docs/xml-api/put-object-upload, as far as a condition goes."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Request)
        self.blobs: dict[str, tuple[int, bytes]] = {}
        self.writes = 0
        self.lock = threading.Lock()


class Request(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Bucket

    def do_PUT(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        with self.server.lock:
            generation, _ = self.server.blobs.get(self.path, (0, b""))
            wanted = self.headers["x-goog-if-generation-match"]
            if wanted is not None and int(wanted) != generation:
                return self._answer(412)
            self.server.writes += 1
            self.server.blobs[self.path] = (self.server.writes, body)
            return self._answer(200, self.server.writes)

    def do_GET(self) -> None:
        with self.server.lock:
            generation, body = self.server.blobs.get(self.path, (0, b""))
        if not generation or "Range" not in self.headers:
            return self._answer(200 if generation else 404, generation, body)
        # `bytes=0-N`, which is all that is asked here.
        part = body[: int(self.headers["Range"].rpartition("-")[2]) + 1]
        return self._answer(206 if body else 416, generation, part, f"bytes 0-{len(part) - 1}/{len(body)}")

    def do_DELETE(self) -> None:
        with self.server.lock:
            there = self.server.blobs.pop(self.path, None)
        self._answer(204 if there else 404)

    def log_message(self, format: str, *args: object) -> None:
        pass

    def _answer(self, status: int, generation: int = 0, body: bytes = b"", part: str = "") -> None:
        self.send_response(status)
        if part:
            self.send_header("Content-Range", part)
        self.send_header("ETag", '"same"')
        self.send_header("Last-Modified", "Mon, 23 Nov 2026 18:00:00 GMT")
        self.send_header("x-goog-generation", str(generation))
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[CloudBlobs]:
    with Bucket() as bucket:
        thread = threading.Thread(target=bucket.serve_forever, args=(0.05,))
        thread.start()
        monkeypatch.setenv("GOOGLE_BEARER_TOKEN", "token")
        yield open_cloud("gs://bucket/x", {"GOOGLE_BASE_URL": f"http://127.0.0.1:{bucket.server_address[1]}"})
        bucket.shutdown()
        thread.join(20)


def test_the_generation_decides(store: CloudBlobs) -> None:
    made = store.create("x/a", b"id-1", id="id-1")
    assert made == Created(store.get("x/a").etag)
    assert store.create("x/a", b"id-2", id="id-2") == Exists(store.get("x/a"))
    assert isinstance(made, Created)
    etag = store.replace("x/a", b"id-3", etag=made.etag, id="id-3")
    assert (store.get("x/a").body, store.get("x/a").etag) == (b"id-3", etag)
    with pytest.raises(LostRace):
        store.replace("x/a", b"id-4", etag=made.etag, id="id-4")
    store.delete("x/a")
    with pytest.raises(BlobNotFound):
        store.replace("x/a", b"id-4", etag=etag, id="id-4")


def test_51_the_self_test_passes(store: CloudBlobs) -> None:
    probe(store, name="gs://bucket/x")
