"""Emulators of cloud stores for the tests: Azurite (from npm) and moto, each one process on a free port of this machine."""

from __future__ import annotations

import base64
import contextlib
import fcntl
import hashlib
import hmac
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from unittest import mock

import pytest

from penstock.blobs.cloud import CloudBlobs, open_cloud

AZURITE = "azurite@3.37.0"
ACCOUNT = "devstoreaccount1"
# Every Azurite has this key (https://learn.microsoft.com/azure/storage/common/storage-use-azurite).
KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
_FOLDER = Path(sys.prefix) / "azurite"
_PROGRAM = _FOLDER / "node_modules" / ".bin" / "azurite-blob"
_START_S, _INSTALL_S = 60.0, 300.0
_MOTO = "from moto.server import main; import sys; main(['-H', '127.0.0.1', '-p', sys.argv[1]])"


def connection_string(port: int) -> str:
    return f"AccountName={ACCOUNT};AccountKey={KEY};BlobEndpoint=http://127.0.0.1:{port}/{ACCOUNT}"


class Emulator:
    """One that runs. `environment` is what a client needs; `url` names a container or bucket that is there."""

    def __init__(self, port: int, url: str, environment: Mapping[str, str]) -> None:
        self.port = port
        self.url = url
        self.environment = dict(environment)
        self._count = 0

    def fresh_url(self) -> str:
        """A folder in the container that nobody has used."""
        self._count += 1
        return f"{self.url}/{os.getpid()}/{self._count}"

    def open(self, url: str = "", *, port: int = 0) -> CloudBlobs:
        """A client, at a fresh folder unless `url` is given; through a proxy's `port` if that is given."""
        there, here = f"127.0.0.1:{self.port}/", f"127.0.0.1:{port or self.port}/"
        environment = {name: f"{value}/".replace(there, here).rstrip("/") for name, value in self.environment.items()}
        with mock.patch.dict(os.environ, environment):
            return open_cloud(url or self.fresh_url(), os.environ)

    def download(self, url: str, folder: Path) -> Path:
        """Everything below `url` as files in `folder`."""
        store = self.open(url)
        for blob in store.list(""):
            path = folder / blob.name
            path.parent.mkdir(parents=True, exist_ok=True)
            # Leases change while hosts live: whole in one request.
            small = blob.name.startswith("_")
            path.write_bytes(store.get(blob.name).body if small else b"".join(store.stream(blob.name)))
        return folder


@contextlib.contextmanager
def azurite(folder: Path) -> Iterator[Emulator]:
    """Azurite with its data in `folder`. Skips the test when it is not there and cannot be installed."""
    _install_azurite()
    arguments = [str(_PROGRAM), "--blobHost", "127.0.0.1", "--blobPort", "0", "--location", str(folder)]
    with _running([*arguments, "--silent", "--disableTelemetry"], folder / "azurite.log") as log:
        port = int(_awaited(log, rb"listens on http://127\.0\.0\.1:(\d+)"))
        make_container(port, "penstock")
        yield Emulator(port, "az://penstock", {"AZURE_STORAGE_CONNECTION_STRING": connection_string(port)})


@contextlib.contextmanager
def moto(folder: Path) -> Iterator[Emulator]:
    """moto's S3."""
    pytest.importorskip("moto.server", reason="moto is not installed: pip install 'moto[server]'", exc_type=ImportError)
    with _running([sys.executable, "-W", "ignore", "-c", _MOTO, "0"], folder / "moto.log") as log:
        port = int(_awaited(log, rb"Running on http://127\.0\.0\.1:(\d+)"))
        url = f"http://127.0.0.1:{port}"
        with urllib.request.urlopen(urllib.request.Request(f"{url}/penstock", method="PUT"), timeout=10):
            pass
        names = {
            "AWS_ENDPOINT_URL": url,
            "AWS_REGION": "us-east-1",
            "AWS_ACCESS_KEY_ID": "x",
            "AWS_SECRET_ACCESS_KEY": "y",
        }
        yield Emulator(port, "s3://penstock", names)


def make_container(port: int, name: str, *, method: str = "PUT") -> None:
    """A container of Azurite, with a request signed as
    https://learn.microsoft.com/rest/api/storageservices/authorize-with-shared-key says; `DELETE` takes it away."""
    at = datetime.now(UTC).strftime("%a, %d %b %Y %H:%M:%S GMT")
    headers = {"x-ms-date": at, "x-ms-version": "2021-12-02"}
    lines = [method, *[""] * 11, *(f"{key}:{value}" for key, value in headers.items())]
    resource = f"/{ACCOUNT}/{ACCOUNT}/{name}\nrestype:container"
    text = "\n".join([*lines, resource]).encode()
    signature = base64.b64encode(hmac.digest(base64.b64decode(KEY), text, hashlib.sha256)).decode()
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/{ACCOUNT}/{name}?restype=container",
        method=method,
        headers={**headers, "Authorization": f"SharedKey {ACCOUNT}:{signature}"},
    )
    with urllib.request.urlopen(request, timeout=10):
        pass


def _install_azurite() -> None:
    if _PROGRAM.exists():
        return
    if shutil.which("npm") is None:
        pytest.skip("there is no npm to install Azurite with")
    _FOLDER.mkdir(exist_ok=True)
    with (_FOLDER / "lock").open("wb") as lock:  # another test run may do the same
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not _PROGRAM.exists():
            command = ["npm", "install", "--silent", "--no-audit", "--no-fund", "--prefix", str(_FOLDER), AZURITE]
            done = subprocess.run(command, capture_output=True, timeout=_INSTALL_S, check=False)
            if done.returncode:
                pytest.skip(f"npm cannot install {AZURITE}: {done.stderr.decode(errors='replace')[-500:]}")


@contextlib.contextmanager
def _running(command: list[str], log: Path) -> Iterator[Path]:
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            cwd=log.parent,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        yield log
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(_START_S)


def _awaited(log: Path, pattern: bytes) -> bytes:
    end = time.monotonic() + _START_S
    tick = threading.Event()
    while not (match := re.search(pattern, log.read_bytes())):
        assert time.monotonic() < end, f"not within {_START_S:.0f} s: {log.read_text(errors='replace')}"
        tick.wait(0.05)
    return match[1]
