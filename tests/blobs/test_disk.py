from __future__ import annotations

import errno
import fcntl
import io
import shutil
from pathlib import Path

import pytest

from penstock.blobs import Created, Exists
from penstock.blobs.disk import DiskBlobs
from penstock.errors import BlobNotFound, LostRace, StoreUnavailable
from penstock.files import Files
from penstock.testing import FaultyFiles


def prepared(folder: Path) -> Path:
    """A store whose folders exist, so that the calls of an operation begin with its own."""
    DiskBlobs(folder, Files()).create("x/other", b"other", id="other")
    return folder


def calls_of_writable(folder: Path) -> int:
    files = FaultyFiles()
    DiskBlobs(folder, files)._writable("x/a")
    return len(files.calls)


@pytest.mark.parametrize(("step", "call"), [*enumerate(["open_new", "write", "fsync", "link"], 1)])
def test_a_create_that_was_not_done_is_unavailable(tmp_path: Path, step: int, call: str) -> None:
    folder = prepared(tmp_path)
    files = FaultyFiles({calls_of_writable(folder) + step: errno.ENOSPC})
    store = DiskBlobs(folder, files)
    with pytest.raises(StoreUnavailable) as raised:
        store.create("x/a", b"id-1", id="id-1")
    assert files.calls[calls_of_writable(folder) + step - 1] == call
    assert isinstance(raised.value.__cause__, OSError)
    with pytest.raises(BlobNotFound):
        store.get("x/a")
    assert isinstance(store.create("x/a", b"id-2", id="id-2"), Created)


def test_a_create_whose_outcome_is_unknown_is_read_back(tmp_path: Path) -> None:
    folder = prepared(tmp_path)
    before = calls_of_writable(folder)
    files = FaultyFiles({before + 6: errno.EIO})
    assert isinstance(DiskBlobs(folder, files).create("x/a", b"id-1", id="id-1"), Created)
    assert files.calls[before:] == ["open_new", "write", "fsync", "link", "unlink", "fsync", "fsync"]


def test_a_create_that_cannot_be_made_durable_is_unavailable(tmp_path: Path) -> None:
    folder = prepared(tmp_path)
    before = calls_of_writable(folder)
    store = DiskBlobs(folder, FaultyFiles({before + 6: errno.EIO, before + 7: errno.EIO}))
    with pytest.raises(StoreUnavailable):
        store.create("x/a", b"id-1", id="id-1")


class SaysExists(Files):
    """NFS: the answer to the link is lost, the repeated request finds the name taken, by ourselves."""

    def create(self, path: Path, body: bytes) -> bool:
        super().create(path, body)
        return False


def test_exists_may_be_said_of_ones_own_write(tmp_path: Path) -> None:
    store = DiskBlobs(tmp_path, SaysExists())
    assert isinstance(store.create("x/a", b"id-1", id="id-1"), Created)
    assert isinstance(store.create("x/a", b"id-2", id="id-2"), Exists)


@pytest.mark.parametrize("step", range(1, 6))
def test_a_replace_is_done_or_not_and_says_which(tmp_path: Path, step: int) -> None:
    folder = prepared(tmp_path)
    before = calls_of_writable(folder) + 1  # the lock
    plain = DiskBlobs(folder, Files())
    made = plain.create("x/a", b"id-1", id="id-1")
    assert isinstance(made, Created)
    store = DiskBlobs(folder, FaultyFiles({before + step: errno.EIO}))
    try:
        etag = store.replace("x/a", b"id-2", etag=made.etag, id="id-2")
    except StoreUnavailable:
        assert step <= 4
        assert plain.get("x/a").body == b"id-1"
    else:
        assert step == 5
        assert plain.get("x/a").body == b"id-2"
        assert plain.get("x/a").etag == etag


def test_a_deleted_blob_does_not_come_back(tmp_path: Path) -> None:
    store = DiskBlobs(tmp_path, Files())
    made = store.create("x/a", b"id-1", id="id-1")
    assert isinstance(made, Created)
    store.delete("x/a")
    with pytest.raises(BlobNotFound):
        store.replace("x/a", b"id-2", etag=made.etag, id="id-2")
    assert [blob.name for blob in store.list("")] == []


def test_a_put_that_fails_leaves_what_was_there(tmp_path: Path) -> None:
    folder = prepared(tmp_path)
    DiskBlobs(folder, Files()).put("x/a", io.BytesIO(b"old"))
    store = DiskBlobs(folder, FaultyFiles({calls_of_writable(folder) + 2: errno.ENOSPC}))
    with pytest.raises(StoreUnavailable):
        store.put("x/a", io.BytesIO(b"new"))
    assert store.get("x/a").body == b"old"
    assert not [path for path in folder.rglob(".*") if path.name != ".lock"]


def test_a_folder_that_somebody_removed_is_made_again(tmp_path: Path) -> None:
    store = DiskBlobs(tmp_path / "store", Files())
    store.put("0/a", io.BytesIO(b"a"))
    shutil.rmtree(tmp_path / "store")
    with pytest.raises(StoreUnavailable):
        store.put("0/a", io.BytesIO(b"a"))
    store.put("0/a", io.BytesIO(b"a"))
    assert store.get("0/a").body == b"a"


def test_looking_makes_nothing(tmp_path: Path) -> None:
    store = DiskBlobs(tmp_path / "store", Files())
    assert [blob.name for blob in store.list("")] == []
    with pytest.raises(BlobNotFound):
        store.get("a")
    assert not (tmp_path / "store").exists()


def test_work_files_are_not_listed(tmp_path: Path) -> None:
    store = DiskBlobs(tmp_path, Files())
    store.put("0/a", io.BytesIO(b"a"))
    (tmp_path / "0" / ".0123").write_bytes(b"half")
    (tmp_path / ".hidden").mkdir()
    (tmp_path / ".hidden" / "a").write_bytes(b"a")
    assert [blob.name for blob in store.list("")] == ["0/a"]


def test_every_folder_is_synced_into_the_one_above(tmp_path: Path) -> None:
    files = FaultyFiles()
    DiskBlobs(tmp_path / "store", files).create("_ledger/0/1", b"id", id="id")
    created = files.calls.index("open_new")
    assert files.calls[:created] == ["mkdir", "fsync"] * 3


def test_the_etag_changes_with_every_write(tmp_path: Path) -> None:
    store = DiskBlobs(tmp_path, Files())
    made = store.create("x/a", b"id-1", id="id-1")
    assert isinstance(made, Created)
    etag = store.replace("x/a", b"id-2", etag=made.etag, id="id-2")
    with pytest.raises(LostRace):
        store.replace("x/a", b"id-3", etag=made.etag, id="id-3")
    assert store.replace("x/a", b"id-3", etag=etag, id="id-3")


class SyncsUnlocked(Files):
    """Fails when something is synced while the lock of a blob is held: whoever is stopped there keeps the others out."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.synced = 0

    def _fsync(self, fd: int) -> None:
        for path in self.folder.glob(".*.lock"):
            with path.open("rb") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        self.synced += 1
        super()._fsync(fd)


def test_nothing_is_synced_under_the_lock(tmp_path: Path) -> None:
    files = SyncsUnlocked(tmp_path)
    store = DiskBlobs(tmp_path, files)
    created = store.create("a.json", b"one", id="one")
    assert isinstance(created, Created)
    etag = store.replace("a.json", b"two", etag=created.etag, id="two")
    before = files.synced
    with pytest.raises(LostRace):
        store.replace("a.json", b"three", etag=created.etag, id="three")
    store.replace("a.json", b"three", etag=etag, id="three")
    assert files.synced >= before + 2
    # The negative control: the file is synced inside.
    with files.lock(tmp_path / ".a.json.lock"), pytest.raises(BlockingIOError):
        files.replace(tmp_path / "a.json", b"four")


def test_a_lock_that_is_kept_is_an_unavailable_store_for_that_blob_only(tmp_path: Path) -> None:
    store = DiskBlobs(tmp_path, Files())
    etags = {}
    for name in ("a.json", "b.json"):
        created = store.create(name, b"one", id="one")
        assert isinstance(created, Created)
        etags[name] = created.etag
    with Files().lock(tmp_path / ".a.json.lock"):
        with pytest.raises(StoreUnavailable):
            store.replace("a.json", b"two", etag=etags["a.json"], id="two")
        store.replace("b.json", b"two", etag=etags["b.json"], id="two")
    store.replace("a.json", b"two", etag=etags["a.json"], id="two")
    assert not list(tmp_path.glob(".????????????????")), "no work file is left"
