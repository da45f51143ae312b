from __future__ import annotations

import threading
from pathlib import Path

import pytest

from penstock.blobs import Blob, Created, Exists
from penstock.blobs.disk import DiskBlobs
from penstock.blobs.probe import RACERS, probe
from penstock.errors import BlobNotFound, SettingsError
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


@pytest.mark.parametrize(("bad", "what"), [(TwoCreatesWin, "creates"), (TwoReplacesWin, "replaces")])
def test_a_store_in_which_two_win_is_refused(bad: type[MemoryBlobs], what: str) -> None:
    with pytest.raises(SettingsError, match=f"let . of {RACERS} conditional {what}"):
        probe(bad(), name="bad")
