"""Hour files that were decided and will never be there: beside the record of each lies who ordered that, and why (skip.py).

The order says so before the lease moves on, so who sees a checkpoint behind such a file sees the order too. Its archiver may be alive
all the same and write the file, before the order or after it: a file that is there is not lost, whatever was declared.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

from penstock.archive.ledger import Gap, Ledger, Link, Record
from penstock.blobs import BlobStore
from penstock.errors import ArchiveError, BlobNotFound


def in_store(store: BlobStore, file: str) -> bool:
    """Whether it is there; then it is whole."""
    try:
        store.size(file)
    except BlobNotFound:
        return False
    return True


def declared(ledger: Ledger, records: Iterable[Record]) -> dict[str, Gap]:
    """The files of these records that were declared lost, and why. Raises ArchiveError."""
    found = ((record.file, ledger.lost(record.first)) for record in records)
    return {file: gap for file, gap in found if gap is not None}


def all_declared(ledger: Ledger, links: Collection[Link], problems: list[str]) -> dict[str, Gap]:
    """Those of a whole chain. A listing shows them, so that years of files are one request; what it hides is said to be missing."""
    found: dict[str, Gap] = {}
    shown = ledger.listed_lost() if links else set()
    for record in links:
        if isinstance(record, Record) and record.first in shown:
            try:
                found |= declared(ledger, [record])
            except ArchiveError as error:
                problems.append(str(error))
    return found


def lost_files(store: BlobStore, ledger: Ledger, links: Collection[Link], problems: list[str]) -> dict[str, Gap]:
    """Those of a whole chain that were declared lost and are not there."""
    found = all_declared(ledger, links, problems)
    return {file: gap for file, gap in found.items() if not in_store(store, file)}
