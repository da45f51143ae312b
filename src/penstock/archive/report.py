"""What `verify` and `audit` report: the problems, and a row of counts for each hour and partition."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, TypeAlias

import msgspec

from penstock.archive.ledger import Gap, Record


class Row(msgspec.Struct):
    """Events of one hour and partition. `accepted` and `logged` are null where nothing is left to compare with.

    `lost`: events that by somebody's order are in no file. `copies` and `dead` are of the events `logged`: those that it has twice, and
    dead letters; null where the hub takes no copies.
    """

    hour: str
    partition: int
    accepted: int | None = None
    logged: int | None = None
    archived: int = 0
    pending: int = 0
    files: int = 0
    raw_bytes: int = 0
    copies: int | None = None
    dead: int | None = None
    lost: int = 0


class Totals(msgspec.Struct):
    """Sums over all rows."""

    accepted: int = 0
    logged: int = 0
    archived: int = 0
    pending: int = 0
    files: int = 0
    raw_bytes: int = 0
    copies: int = 0
    dead: int = 0
    lost: int = 0


class Report(msgspec.Struct):
    """What a check found: `ok` if and only if there is no problem. `pending`: in no file yet, which is no problem.

    `gaps`: events of which the ledger says that they are in no file, and why; `lost`: files that were decided and declared lost. No
    problems either, but to be seen. `notes`: what could not be compared, and why.
    """

    ok: bool
    problems: list[str]
    rows: list[Row]
    totals: Totals
    gaps: list[Gap]
    lost: dict[str, Gap] = {}
    notes: list[str] = []


Place: TypeAlias = Literal["archived", "pending", "lost"]


class Rows:
    """Rows by hour and partition, made when they are first asked for."""

    def __init__(self) -> None:
        self._rows: dict[tuple[str, int], Row] = {}

    def at(self, hour: str, partition: int) -> Row:
        return self._rows.setdefault((hour, partition), Row(hour, partition))

    def add(self, record: Record, place: Place = "archived") -> None:
        row = self.at(record.hour, record.partition)
        setattr(row, place, getattr(row, place) + record.events)
        if place == "archived":
            row.files += 1
            row.raw_bytes += record.raw_bytes

    def report(
        self,
        problems: list[str],
        gaps: Sequence[Gap] = (),
        lost: Mapping[str, Gap] | None = None,
        notes: Sequence[str] = (),
    ) -> Report:
        rows = [row for _, row in sorted(self._rows.items())]
        totals = Totals(**{name: sum(getattr(row, name) or 0 for row in rows) for name in Totals.__struct_fields__})
        named = dict(sorted((lost or {}).items()))
        return Report(not problems, list(dict.fromkeys(problems)), rows, totals, list(gaps), named, list(notes))
