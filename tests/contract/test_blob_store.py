"""What every BlobStore has to do. A new store is added to `STORES` and to nothing else.

Azurite stands for Azure, moto for S3. moto looks at If-Match and writes later (two of 16 win now and then), so no race of
replaces is run on it.
"""

from __future__ import annotations

import contextlib
import errno
import io
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from penstock.blobs import BlobStore, Created, Exists
from penstock.blobs.disk import DiskBlobs
from penstock.errors import BlobNotFound, LostRace, StoreError, StoreUnavailable
from penstock.files import Files
from penstock.testing import MemoryBlobs

STORES: dict[str, Callable[[pytest.FixtureRequest], BlobStore]] = {
    "azurite": lambda request: request.getfixturevalue("azurite").open(),
    "disk": lambda request: DiskBlobs(request.getfixturevalue("tmp_path") / "store", Files()),
    "memory": lambda request: MemoryBlobs(),
    "moto": lambda request: request.getfixturevalue("moto").open(),
}
ATOMIC = sorted(STORES.keys() - {"moto"})


@pytest.fixture(params=sorted(STORES))
def store(request: pytest.FixtureRequest) -> BlobStore:
    return STORES[request.param](request)


@pytest.fixture(params=ATOMIC)
def atomic_store(request: pytest.FixtureRequest) -> BlobStore:
    return STORES[request.param](request)


def body(id: str) -> bytes:
    return b'{"id": "%s"}' % id.encode()


def test_create_is_create_only(store: BlobStore) -> None:
    first = store.create("_ledger/0/1.json", body("a"), id="a")
    assert isinstance(first, Created)
    second = store.create("_ledger/0/1.json", body("b"), id="b")
    assert isinstance(second, Exists)
    assert second.blob == store.get("_ledger/0/1.json")
    assert second.blob.body == body("a")
    assert second.blob.etag == first.etag


def test_replace_needs_the_etag_that_stands(store: BlobStore) -> None:
    made = store.create("x/a", body("a"), id="a")
    assert isinstance(made, Created)
    etag = store.replace("x/a", body("b"), etag=made.etag, id="b")
    assert store.get("x/a").etag == etag != made.etag
    with pytest.raises(LostRace):
        store.replace("x/a", body("c"), etag=made.etag, id="c")
    assert store.get("x/a").body == body("b")
    with pytest.raises(BlobNotFound):
        store.replace("x/none", body("c"), etag=etag, id="c")


def test_put_replaces_and_streams(store: BlobStore) -> None:
    big = bytes(range(256)) * 10_000
    store.put("0/2026-11-22T14.json.gz", io.BytesIO(b"old"))
    store.put("0/2026-11-22T14.json.gz", io.BytesIO(big))
    parts = list(store.stream("0/2026-11-22T14.json.gz"))
    assert b"".join(parts) == big
    assert max(map(len, parts)) <= 1 << 20
    assert store.size("0/2026-11-22T14.json.gz") == len(big)


def test_files_of_several_parts_and_of_none(store: BlobStore) -> None:
    unit = bytes(range(256)) * 4096
    for size in (0, 1, 8 << 20, (8 << 20) + 1, 20 << 20):
        content = (unit * 20)[:size]
        store.put("0/a", io.BytesIO(content))
        parts = list(store.stream("0/a"))
        assert b"".join(parts) == content
        assert max(map(len, parts), default=0) <= 1 << 20
        assert store.size("0/a") == size
        assert store.get("0/a").body == content


def test_a_source_that_breaks_leaves_what_was_there(store: BlobStore) -> None:
    class Breaking(io.BytesIO):
        def read(self, size: int | None = -1, /) -> bytes:
            if size is None or size < 0 or self.tell() > 17 << 20:
                raise OSError(errno.EIO, "made to fail")
            return super().read(size)

    store.put("0/a", io.BytesIO(b"old"))
    with pytest.raises((StoreUnavailable, OSError)):
        store.put("0/a", Breaking(bytes(40 << 20)))
    assert store.get("0/a").body == b"old"
    assert [blob.name for blob in store.list("")] == ["0/a"]
    with pytest.raises((StoreUnavailable, OSError)):
        store.put("0/b", Breaking(bytes(40 << 20)))
    assert [blob.name for blob in store.list("")] == ["0/a"]


def test_more_blobs_than_a_page(store: BlobStore) -> None:
    names = sorted(f"p/{number:04}" for number in range(1050))
    with ThreadPoolExecutor(8) as writers:
        list(writers.map(lambda name: store.put(name, io.BytesIO(b"x")), names))
    assert [blob.name for blob in store.list("p/")] == names


def test_what_is_not_there(store: BlobStore) -> None:
    for look in (store.get, store.size, lambda name: next(iter(store.stream(name)))):
        with pytest.raises(BlobNotFound):
            look("no/such")
    store.delete("no/such")
    assert [blob.name for blob in store.list("no/")] == []


def test_list_is_sorted_and_by_prefix(store: BlobStore) -> None:
    names = ["10/b", "1/b", "1/a", "1.x", "1/a.b/c", "_ledger/1/5"]
    for name in names:
        store.create(name, body("a"), id="a")
    kept = sorted(names)
    assert [blob.name for blob in store.list("")] == kept
    assert [blob.name for blob in store.list("1/")] == [name for name in kept if name.startswith("1/")]
    assert [blob.name for blob in store.list("1/a")] == ["1/a", "1/a.b/c"]
    assert [blob.name for blob in store.list("_ledger/1/")] == ["_ledger/1/5"]


def test_a_listing_has_sizes_and_marks_that_change_with_every_write(store: BlobStore) -> None:
    def listed() -> dict[str, tuple[int, str]]:
        return {blob.name: (blob.size, blob.mark) for blob in store.list("l/")}

    marks = set()
    store.create("l/other", body("o"), id="o")
    made = store.create("l/a", body("0"), id="0")
    assert isinstance(made, Created)
    etag, other = made.etag, listed()["l/other"]
    for number in range(1, 20):
        size, mark = listed()["l/a"]
        assert size == store.size("l/a")
        assert mark == store.get("l/a").mark
        marks.add(mark)
        etag = store.replace("l/a", body(str(number)), etag=etag, id=str(number))
    assert len(marks | {listed()["l/a"][1]}) == 20
    assert listed()["l/other"] == other


def test_delete(store: BlobStore) -> None:
    store.create("x/a", body("a"), id="a")
    store.delete("x/a")
    store.delete("x/a")
    assert [blob.name for blob in store.list("x/")] == []
    assert isinstance(store.create("x/a", body("b"), id="b"), Created)


@pytest.mark.parametrize("name", ["", "/a", "a/", "a//b", "../a", "a/../b", ".lock", "a/.b", "a b", "ä", "a\n", "a\0"])
def test_names_that_are_none(store: BlobStore, name: str) -> None:
    with pytest.raises(StoreError):
        store.get(name)
    with pytest.raises(StoreError):
        store.create(name, body("a"), id="a")
    with pytest.raises(StoreError):
        store.put(name, io.BytesIO(b""))
    with pytest.raises(StoreError):
        store.delete(name)


def race(act: Callable[[int], bool], racers: int = 16) -> int:
    """How many of the racers won."""
    line = threading.Barrier(racers)
    won: list[bool] = []

    def run(number: int) -> None:
        line.wait()
        won.append(act(number))

    threads = [threading.Thread(target=run, args=(number,)) for number in range(racers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == racers
    return sum(won)


def create_race(store: BlobStore, name: str) -> int:
    def act(number: int) -> bool:
        return isinstance(store.create(name, body(f"id-{number:02}"), id=f"id-{number:02}"), Created)

    return race(act)


def replace_race(store: BlobStore, name: str) -> int:
    made = store.create(name, body("first"), id="first")
    assert isinstance(made, Created)

    def act(number: int) -> bool:
        with contextlib.suppress(LostRace):
            etag = store.replace(name, body(f"id-{number:02}"), etag=made.etag, id=f"id-{number:02}")
            assert etag != made.etag
            return True
        return False

    return race(act)


def test_of_racing_creates_one_wins(store: BlobStore) -> None:
    assert [create_race(store, f"r/{turn}") for turn in range(10)] == [1] * 10


def test_of_racing_replaces_one_wins(atomic_store: BlobStore) -> None:
    assert [replace_race(atomic_store, f"r/{turn}") for turn in range(10)] == [1] * 10


class NoLock(Files):
    """The negative control: everybody is let in."""

    @contextlib.contextmanager
    def lock(self, path: Path) -> Iterator[None]:
        yield


class Overwriting(Files):
    """The negative control: looks, then writes."""

    def create(self, path: Path, body: bytes) -> bool:
        if path.exists():
            return False
        self.replace(path, body)
        return True


def test_control_without_the_lock_several_replaces_win(tmp_path: Path) -> None:
    store = DiskBlobs(tmp_path, NoLock())
    assert any(replace_race(store, f"r/{turn}") > 1 for turn in range(200))


def test_control_without_the_link_several_creates_win(tmp_path: Path) -> None:
    store = DiskBlobs(tmp_path, Overwriting())
    assert any(create_race(store, f"r/{turn}") > 1 for turn in range(200))
