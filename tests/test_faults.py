"""docs/faults.md names tests: they are there, and no case is left out."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
_ROW = re.compile(r"^\| (\d+) \|.*\| ((?:`test_\w+` ?)+) \|$", re.MULTILINE)


def test_every_case_has_tests_and_they_exist() -> None:
    rows = {
        int(number): re.findall(r"test_\w+", names)
        for number, names in _ROW.findall((ROOT / "docs" / "faults.md").read_text())
    }
    assert sorted(rows) == list(range(28, 87))
    there = {
        name
        for path in ROOT.glob("tests/**/test_*.py")
        for name in re.findall(r"^def (test_\w+)", path.read_text(), re.M)
    }
    assert {number: missing for number, names in rows.items() if (missing := set(names) - there)} == {}
