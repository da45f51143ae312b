"""The self-test of a store: does it let two conditional writers win? Leases and ledger stand on the answer.

Some stores and emulators take `If-None-Match` and `If-Match` and do not hold them, at all or under concurrency. A race that
they lose here they would lose with a lease; a store that passes may still be wrong, but not often.
"""

from __future__ import annotations

import contextlib
import secrets
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Final

from penstock.blobs import BlobStore, Created
from penstock.errors import BlobNotFound, LostRace, SettingsError, StoreUnavailable

RACERS: Final = 8
ROUNDS: Final = 4
_ADVICE: Final = (
    "Leases and the ledger would not be safe there: choose a store that holds conditional writes (docs/stores.md says which are "
    "known to, and from which version on). Nothing of the installation was written."
)


def probe(store: BlobStore, *, name: str) -> None:
    """Race creates and replaces on blobs of fresh names below `_probe/`, and delete them. `name` is the store's, for the error.

    Raises SettingsError unless exactly one of each race wins and nothing is replaced that is not there, StoreUnavailable
    when the store does not answer.
    """
    for _ in range(ROUNDS):
        # Another name each time: a request of this race that lands late must not meet the next one.
        blob = f"_probe/{secrets.token_hex(8)}.json"
        etag = ""
        try:
            etag = _race(store, blob, name)
        finally:
            # What went wrong first says more than that the blob cannot be deleted either.
            with contextlib.suppress(*(() if etag else (StoreUnavailable,))):
                store.delete(blob)
    _replace_nothing(store, blob, etag, name)


def _race(store: BlobStore, blob: str, name: str) -> str:
    """The last etag."""
    _exactly_one("creates", "If-None-Match", name, lambda id: isinstance(store.create(blob, _body(id), id=id), Created))
    etag = store.get(blob).etag
    _exactly_one("replaces", "If-Match", name, lambda id: _replaces(store, blob, etag, id))
    return store.get(blob).etag


def _replaces(store: BlobStore, blob: str, etag: str, id: str) -> bool:
    try:
        store.replace(blob, _body(id), etag=etag, id=id)
    except LostRace:
        return False
    return True


def _replace_nothing(store: BlobStore, blob: str, etag: str, name: str) -> None:
    id = secrets.token_hex(16)
    with contextlib.suppress(BlobNotFound, LostRace):
        store.replace(blob, _body(id), etag=etag, id=id)
        store.delete(blob)
        raise SettingsError(
            f"The store {name} makes a blob that is not there when it is asked to replace one (If-Match on nothing, as MinIO did "
            f"before August 2025). {_ADVICE}"
        )


def _body(id: str) -> bytes:
    return b'{"id": "%b"}' % id.encode()


def _exactly_one(what: str, header: str, name: str, wins: Callable[[str], bool]) -> None:
    start = threading.Barrier(RACERS)

    def race(id: str) -> bool | StoreUnavailable:
        start.wait()
        try:
            return wins(id)
        except StoreUnavailable as error:  # such as two requests that crossed: undecided is not won
            return error

    with ThreadPoolExecutor(RACERS) as racers:
        outcomes = list(racers.map(race, [secrets.token_hex(16) for _ in range(RACERS)]))
    winners = outcomes.count(True)
    if winners > 1:
        why = f"it ignores {header}" if winners == RACERS else f"it looks at {header} and writes later"
        raise SettingsError(
            f"The store {name} let {winners} of {RACERS} conditional {what} of one blob win, and only one may: {why}. {_ADVICE}"
        )
    if winners == 0:
        raise next(
            (outcome for outcome in outcomes if isinstance(outcome, StoreUnavailable)),
            SettingsError(
                f"The store {name} let none of {RACERS} conditional {what} of one blob win, and one must. {_ADVICE}"
            ),
        )
