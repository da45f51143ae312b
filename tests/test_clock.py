"""Times as text, and back."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.clock import parse_timestamp, timestamp


@given(st.integers(0, 253_402_300_799_999))
def test_there_and_back(at_ms: int) -> None:
    assert parse_timestamp(timestamp(at_ms)) == at_ms


@pytest.mark.parametrize(
    ("text", "at_ms"),
    [
        ("1970-01-01T00:00:00Z", 0),
        ("1970-01-01T01:00:00.5+01:00", 500),
        ("1970-01-01T00:00:00.0001Z", 1),
        ("1969-12-31T23:59:59.999Z", -1),
    ],
)
def test_other_forms_and_parts_of_a_millisecond(text: str, at_ms: int) -> None:
    assert parse_timestamp(text) == at_ms


@pytest.mark.parametrize("text", ["", "now", "1970-01-01", "1970-01-01T00:00:00", "1970-02-30T00:00:00Z"])
def test_what_is_no_time(text: str) -> None:
    with pytest.raises(ValueError):
        parse_timestamp(text)
