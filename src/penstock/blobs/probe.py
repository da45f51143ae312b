"""The self-test of a store: does it let two conditional writers win? Leases and ledger stand on the answer.

Some stores and emulators take `If-None-Match` and `If-Match` and do not hold them under concurrency. A race that they lose here
they would lose with a lease; a store that passes may still be wrong, but not often.
"""

from __future__ import annotations

import secrets
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Final

from penstock.blobs import BlobStore, Created
from penstock.errors import LostRace, SettingsError

RACERS: Final = 8
ROUNDS: Final = 4


def probe(store: BlobStore, *, name: str) -> None:
    """Race creates and replaces on a blob of a fresh name below `_probe/`, and delete it. `name` is the store's, for the error.

    Raises SettingsError unless exactly one of each race wins, StoreUnavailable when the store does not answer.
    """
    blob = f"_probe/{secrets.token_hex(8)}.json"
    for _ in range(ROUNDS):
        _race(store, blob, name)


def _race(store: BlobStore, blob: str, name: str) -> None:
    try:
        _exactly_one("creates", name, lambda id: isinstance(store.create(blob, _body(id), id=id), Created))
        etag = store.get(blob).etag
        _exactly_one("replaces", name, lambda id: _replaces(store, blob, etag, id))
    finally:
        store.delete(blob)


def _replaces(store: BlobStore, blob: str, etag: str, id: str) -> bool:
    try:
        store.replace(blob, _body(id), etag=etag, id=id)
    except LostRace:
        return False
    return True


def _body(id: str) -> bytes:
    return b'{"id": "%b"}' % id.encode()


def _exactly_one(what: str, name: str, wins: Callable[[str], bool]) -> None:
    start = threading.Barrier(RACERS)

    def race(id: str) -> bool:
        start.wait()
        return wins(id)

    with ThreadPoolExecutor(RACERS) as racers:
        winners = sum(racers.map(race, [secrets.token_hex(16) for _ in range(RACERS)]))
    if winners != 1:
        raise SettingsError(
            f"The store {name} let {winners} of {RACERS} conditional {what} of one blob win; exactly one may. Leases and the "
            "ledger would not be safe there: choose a store that keeps conditional writes apart. Nothing was written."
        )
