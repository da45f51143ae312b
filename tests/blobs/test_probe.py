from __future__ import annotations

import io
import threading
from pathlib import Path

import pytest

from penstock.blobs import Blob, Created, Exists
from penstock.blobs.disk import DiskBlobs
from penstock.blobs.probe import RACERS, probe
from penstock.errors import BlobNotFound, LostRace, SettingsError, StoreUnavailable
from penstock.files import Files
from penstock.testing import MemoryBlobs


def test_good_stores_pass_and_keep_nothing(tmp_path: Path) -> None:
    for store in (DiskBlobs(tmp_path, Files()), MemoryBlobs()):
        probe(store, name="good")
        assert [blob.name for blob in store.list("")] == []


class TwoCreatesWin(MemoryBlobs):
    """Looks whether the blob is there, waits until all have looked, then writes."""

    def __init__(self) -> None:
        super().__init__()
        self.looked = threading.Barrier(RACERS)

    def create(self, name: str, body: bytes, *, id: str) -> Created | Exists:
        try:
            return Exists(self.get(name))
        except BlobNotFound:
            self.looked.wait()
        super().create(name, body, id=id)
        return Created("etag")


class TwoReplacesWin(MemoryBlobs):
    """Compares before it locks."""

    def __init__(self) -> None:
        super().__init__()
        self.compared = threading.Barrier(RACERS)

    def replace(self, name: str, body: bytes, *, etag: str, id: str) -> str:
        assert self.get(name).etag == etag
        self.compared.wait()
        now: Blob = self.get(name)
        return super().replace(name, body, etag=now.etag, id=id) if now.etag == etag else "etag"


class IgnoresIfMatch(MemoryBlobs):
    """As a store does that does not know the header."""

    def replace(self, name: str, body: bytes, *, etag: str, id: str) -> str:
        return super().replace(name, body, etag=self.get(name).etag, id=id)


class TwoOfManyReplacesWin(MemoryBlobs):
    """The etag is looked at, and what was replaced a moment ago is replaced again: now and then two win."""

    def __init__(self) -> None:
        super().__init__()
        self.again = True

    def replace(self, name: str, body: bytes, *, etag: str, id: str) -> str:
        try:
            return super().replace(name, body, etag=etag, id=id)
        except LostRace:
            with self._lock:
                again, self.again = self.again, False
            if not again:
                raise
            return super().replace(name, body, etag=self.get(name).etag, id=id)


class ReplacesNothing(MemoryBlobs):
    """MinIO before August 2025: If-Match on a blob that is not there makes it."""

    def replace(self, name: str, body: bytes, *, etag: str, id: str) -> str:
        try:
            return super().replace(name, body, etag=etag, id=id)
        except BlobNotFound:
            self.put(name, io.BytesIO(body))
            return "etag"


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        (TwoCreatesWin, f"let {RACERS} of {RACERS} conditional creates of one blob win.*ignores If-None-Match"),
        (TwoReplacesWin, f"let {RACERS} of {RACERS} conditional replaces of one blob win.*ignores If-Match"),
        (IgnoresIfMatch, f"let {RACERS} of {RACERS} conditional replaces of one blob win.*ignores If-Match"),
        (TwoOfManyReplacesWin, f"let 2 of {RACERS} conditional replaces of one blob win.*writes later"),
        (ReplacesNothing, "makes a blob that is not there"),
    ],
)
def test_51_a_store_in_which_two_win_is_refused(bad: type[MemoryBlobs], says: str) -> None:
    store = bad()
    with pytest.raises(SettingsError, match=f"The store bad .*{says}.*docs/stores.md"):
        probe(store, name="bad")
    assert [blob.name for blob in store.list("")] == []


class Answers(MemoryBlobs):
    """The first `left` creates are left open."""

    def __init__(self, left: int) -> None:
        super().__init__()
        self.left = left

    def create(self, name: str, body: bytes, *, id: str) -> Created | Exists:
        with self._lock:
            self.left -= 1
            open = self.left >= 0
        if open:
            raise StoreUnavailable("two requests crossed", blob=name)
        return super().create(name, body, id=id)


def test_undecided_is_not_won() -> None:
    probe(Answers(RACERS - 1), name="good")
    with pytest.raises(StoreUnavailable):
        probe(Answers(1000), name="does not answer")
