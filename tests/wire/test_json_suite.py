"""JSONTestSuite, each case as a field of an event: the intake stores what is JSON byte for byte, and rejects what is not."""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

import pytest

from penstock.errors import MalformedBody, NoValidEvent
from penstock.wire.body import ndjson
from penstock.wire.route import Routed, Router, Stamp

CASES = sorted((Path(__file__).parent.parent / "data" / "json_parsing").glob("*.json"))
CLOSING = b',"receivedAt":"T"}\n'
CODES = {"not_json", "not_utf8"}
GOOD = b'{"deviceId":"d-1"}'


def event_of(case: Path) -> bytes:
    return b'{"deviceId":"d-1","field":%b}' % case.read_bytes()


def named(kind: str) -> list[Path]:
    return [case for case in CASES if case.name.startswith(kind)]


def both_ways(body: bytes) -> Routed:
    router = Router(4)
    return router.route(body, Stamp("T"))


def test_the_suite_is_whole() -> None:
    assert (len(CASES), len(named("y_")), len(named("n_")), len(named("i_"))) == (318, 95, 188, 35)


@pytest.mark.parametrize("case", named("y_"), ids=lambda case: case.stem)
def test_json_is_stored_byte_for_byte(case: Path) -> None:
    event = event_of(case)
    one_line = event.replace(b"\n", b" ").replace(b"\r", b" ")
    stored = one_line[:-1] + CLOSING
    for kind, body in (("application/json", event), ("application/json", b"[" + event + b"]"), ("", one_line + b"\n")):
        routed = both_ways(ndjson(body, kind))
        assert routed.rejected == ()
        [group] = routed.groups
        assert (group.partition, group.content) == (zlib.crc32(b"d-1") % 4, stored)


@pytest.mark.parametrize("case", named("n_"), ids=lambda case: case.stem)
def test_what_is_not_json_is_rejected_by_index_and_code(case: Path) -> None:
    event = event_of(case)
    with pytest.raises(MalformedBody):
        ndjson(b"[" + event + b"]", "application/json")
    with pytest.raises(NoValidEvent) as refused:
        routed = both_ways(ndjson(event, "application/json"))
        raise NoValidEvent("as the intake does", rejected=[{"index": r.index, "code": r.code} for r in routed.rejected])
    rejected: Any = refused.value.fields["rejected"]
    assert [(one["index"], one["code"] in CODES) for one in rejected] == [(0, True)]
    if b"\n" not in event:
        routed = both_ways(GOOD + b"\n" + event + b"\n" + GOOD + b"\n")
        assert routed.accepted == 2
        assert [(r.index, r.code in CODES) for r in routed.rejected] == [(1, True)]


@pytest.mark.parametrize("case", named("i_"), ids=lambda case: case.stem)
def test_what_may_be_either_is_judged(case: Path) -> None:
    event = event_of(case)
    routed = both_ways(GOOD + b"\n" + event + b"\n")
    assert routed.accepted + len(routed.rejected) == 2
    if routed.accepted == 2:
        [group] = routed.groups
        assert group.content == GOOD[:-1] + CLOSING + event[:-1] + CLOSING
    else:
        assert routed.rejected[0].code in CODES
