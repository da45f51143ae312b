"""How a command reaches the API that it is about, and with which key.

A key that was given is used wherever it was given for. Without one, DATA/key is taken for what runs on the data folder and for
loopback addresses, and never sent to another machine.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from penstock.cli.options import url_beats_data
from penstock.errors import PenstockError, SettingsError, Unauthenticated

if TYPE_CHECKING:
    from penstock.access import Access
    from penstock.server.parts import Run
    from penstock.settings import Values

_TIMEOUT_S = 30.0
_EVERYWHERE = {"0.0.0.0": "127.0.0.1", "[::]": "[::1]"}


def api(values: Values) -> Access:
    """Where to send: what was asked for, or what runs on the data folder, or the usual address."""
    if not url_beats_data(values):
        run = running(values)
        if run is not None and run.listen:
            return access(values, here(run.listen, run.certificate))
        if values.source("data") != "default":
            raise SettingsError(f"No API runs on {values.text('data')}: start `penstock up`, or name it with --url.")
    return access(values, values.text("url").rstrip("/"))


def admin(values: Values) -> Access:
    """Where the admin port of what runs on the data folder is, or what `--url` says."""
    if url_beats_data(values):
        return access(values, values.text("url").rstrip("/"))
    run = running(values)
    if run is None or not run.admin:
        raise SettingsError(f"Nothing runs on {values.text('data')}: start `penstock up`, or name it with --url.")
    return access(values, f"http://{run.admin}")


def access(values: Values, url: str) -> Access:
    """An address or a connection string with the key and the certificates that are for it. Raises SettingsError."""
    from penstock.access import Access, address, is_loopback

    run, parts = running(values), address(url)
    where = f"{parts.scheme}://{parts.netloc}"
    this = here(run.listen, run.certificate) if run is not None else ""
    local = is_loopback(parts.hostname or "") or where == this
    return Access(
        url,
        key=values.text("key") or (key_in(values) if local else ""),
        ca=values.text("ca"),
        certificate=values.text("certificate"),
        certificate_key=values.text("certificate-key"),
        pinned=run.certificate if run is not None and where == this else "",
    )


def running(values: Values) -> Run | None:
    """The API that runs on the data folder."""
    from penstock.server.parts import read_runs

    return next((run for run in read_runs(Path(values.text("data")) / "run") if run.listen), None)


def here(listen: str, certificate: str) -> str:
    """The address by which this machine reaches what listens on it."""
    host, _, port = listen.rpartition(":")
    return f"{'https' if certificate else 'http'}://{_EVERYWHERE.get(host, host)}:{port}"


def key_in(values: Values) -> str:
    """What lies in DATA/key; empty where that is not, or not for the eyes of this user."""
    from penstock.server.keys import key_path

    try:
        return key_path(Path(values.text("data"))).read_text("ascii").strip()
    except (OSError, ValueError):
        return ""


def fetch(api: Access, path: str, *, method: str = "GET", body: bytes = b"") -> bytes:
    """The body of a 200. Raises PenstockError with a sentence for anything else."""
    return fetch_all(api, path, method=method, body=body)[0]


def fetch_all(
    api: Access, path: str, *, method: str = "GET", body: bytes = b"", accept: str = ""
) -> tuple[bytes, Mapping[str, str]]:
    """The same with the headers of the answer, their names in lower case."""
    import http.client

    url = f"{api.where}{api.base}{path}"
    connection = api.connection(timeout_s=_TIMEOUT_S)
    try:
        sent = body if method in ("POST", "PUT") else None
        headers = {**api.headers(), **({"Accept": accept} if accept else {})}
        connection.request(method, api.base + path, sent, headers)
        with connection.getresponse() as answer:
            received = answer.read()
    except (OSError, http.client.HTTPException) as error:
        raise PenstockError(f"{url} gives no answer: {error or type(error).__name__}.") from error
    finally:
        connection.close()
    if answer.status == Unauthenticated.status:
        raise PenstockError(
            f"{url} answers 401: it takes no request without a valid key. Name one with --key or PENSTOCK_KEY."
        )
    if answer.status != 200:
        raise PenstockError(f"{url} answers {answer.status}: {received[:500].decode(errors='replace')}")
    return received, {name.lower(): value for name, value in answer.getheaders()}
