"""What `audit` and `verify` print for people."""

from __future__ import annotations

import pytest

from penstock.archive.report import Rows
from penstock.cli.check import ROWS_SHOWN, _print


def test_the_hours_of_a_year_are_counted_and_not_all_shown(capsys: pytest.CaptureFixture[str]) -> None:
    rows = Rows()
    for number in range(ROWS_SHOWN + 1234):
        rows.at(f"hour-{number:05}", 0).archived = 2
    _print(rows.report([]), False, "good")
    shown = capsys.readouterr().out
    assert (shown.count("hour-"), "hour-01233" in shown, "hour-01234" in shown) == (ROWS_SHOWN, False, True)
    assert "and 1,234 rows of earlier hours: --json has them all" in shown
    assert f"{2 * (ROWS_SHOWN + 1234):,}" in shown
