"""How the embedded hub lies in LMDB: names, keys, and the databases (docs/formats.md, The embedded hub)."""

from __future__ import annotations

import secrets
import struct
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import lmdb
import msgspec

from penstock.errors import SettingsError

if TYPE_CHECKING:
    from lmdb import _Database as Database

KEY = struct.Struct(">QB")
MARKER, EVENTS = 0, 1
META_HUB = b"hub"
META_POSITIONS = b"positions"
META_COUNTERS = b"counters"
META_READERS = b"reader/"
FORMAT = 1


class Meta(msgspec.Struct, frozen=True):
    """Who this hub is: written once."""

    format: int
    hub: str
    partitions: int
    period_s: int
    created: str

    @staticmethod
    def new(partitions: int, period_s: int, created: str) -> Meta:
        return Meta(FORMAT, secrets.token_hex(16), partitions, period_s, created)

    @staticmethod
    def decode(body: bytes | None) -> Meta:
        """Raises SettingsError when this is not a hub, or one of a newer format."""
        try:
            meta = msgspec.json.decode(body or b"", type=Meta)
        except msgspec.DecodeError as error:
            raise SettingsError(f"This is not a Penstock hub: {error}.") from error
        if meta.format != FORMAT:
            raise SettingsError(
                f"The hub is of format {meta.format}, this program knows {FORMAT}. Nothing was touched."
            )
        return meta


def open_environment(folder: Path, bytes_max: int, *, read_only: bool) -> lmdb.Environment:
    """With the settings that the promises stand on: full sync, no writemap. Once a process, after its fork.

    A reader takes the size that the hub has (0 for LMDB), not `bytes_max`: with a smaller map it could not read all of a larger hub.
    It goes through the log from one end, and what the system's cache has no more comes from the disk with its neighbours, which are read
    next; one page at a time is ten times as slow. Writers look for single producers, anywhere, and their log's end is in the cache.
    """
    try:
        return lmdb.open(
            str(folder),
            map_size=0 if read_only else bytes_max,
            max_dbs=2048,
            max_readers=4096,
            readonly=read_only,
            create=not read_only,
            readahead=read_only,
            writemap=False,
            metasync=True,
            sync=True,
        )
    except lmdb.Error as error:
        why = str(error).rstrip(".")
        raise SettingsError(f"The hub in {folder} cannot be opened: {why}. Nothing was touched.") from error


class Databases:
    """The handles of the environment's databases, good for the life of the environment."""

    ACCEPTED: ClassVar[struct.Struct] = struct.Struct(">QH")

    def __init__(self, env: lmdb.Environment, txn: lmdb.Transaction | None, *, partitions: int) -> None:
        def database(name: bytes) -> Database:
            return env.open_db(name, txn=txn, create=txn is not None)

        self.page_bytes: int = env.stat()["psize"]
        self.meta = database(b"meta")
        self.accepted = database(b"accepted")
        self.producers = database(b"producers")
        self.frames = [database(b"p%05d" % partition) for partition in range(partitions)]

    @classmethod
    def create(cls, env: lmdb.Environment, txn: lmdb.Transaction, partitions: int) -> Databases:
        """Makes what is missing, but no partition beside those of a hub that is there."""
        meta = env.open_db(b"meta", txn=txn, create=True)
        found = txn.get(META_HUB, db=meta)
        return cls(env, txn, partitions=Meta.decode(found).partitions if found else partitions)

    @classmethod
    def open(cls, env: lmdb.Environment) -> Databases:
        """Each database in a transaction of its own: a handle that was opened in a read transaction ends with it."""
        meta = env.open_db(b"meta", create=False)
        with env.begin() as txn:
            partitions = Meta.decode(txn.get(META_HUB, db=meta)).partitions
        return cls(env, None, partitions=partitions)

    def used_pages(self, txn: lmdb.Transaction) -> int:
        """Pages that hold data; the others in the file are free for use."""
        return sum(_pages(txn, database) for database in (self.meta, self.accepted, self.producers, *self.frames))

    def bytes_of(self, txn: lmdb.Transaction, database: Database) -> int:
        return _pages(txn, database) * self.page_bytes

    def counters(self, txn: lmdb.Transaction) -> dict[str, int]:
        counters = {"duplicates": 0, "dedup_window_passed": 0, "lost_batches": 0, "trimmed_events": 0}
        return counters | msgspec.json.decode(txn.get(META_COUNTERS, db=self.meta) or b"{}", type=dict[str, int])


def _pages(txn: lmdb.Transaction, database: Database) -> int:
    stat = txn.stat(database)
    pages: int = stat["branch_pages"] + stat["leaf_pages"] + stat["overflow_pages"]
    return pages
