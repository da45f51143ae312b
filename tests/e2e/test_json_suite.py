"""JSONTestSuite as a field of an event, through HTTP: `y_` is stored byte for byte, `n_` is rejected, `i_` may be either."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.http_client import Answer, request
from tests.e2e.oracle import archived, unstamp
from tests.e2e.system import System

SUITE = Path(__file__).parents[1] / "data" / "json_parsing"
CASES = sorted(SUITE.glob("*.json"))
# In NDJSON a case that holds a line feed would be several lines.
CODES = {"not_json", "not_utf8"}


def event(case: Path) -> bytes:
    return b'{"deviceId":"%b","x":%b}' % (case.stem.encode()[:2], case.read_bytes())


def one_line(raw: bytes) -> bytes:
    return raw.translate(bytes.maketrans(b"\r\n", b"  "))


class Rig:
    def __init__(self, system: System) -> None:
        self.system = system
        self.stored: list[bytes] = []

    def post(self, body: bytes, kind: str) -> Answer:
        return request(self.system.url, "POST", "/v1/events", body, {"Content-Type": kind})


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    system = System(tmp_path_factory.mktemp("suite"), partitions=1, workers=1)
    try:
        rig = Rig(system.start())
        yield rig
        system.settle()
        # One partition and one sender: the store holds what was accepted in the order of the answers.
        assert [unstamp(line)[0] for _, line in archived(system.store)] == rig.stored
        assert system.stop() == 0
    finally:
        system.close()


def test_the_suite_is_whole() -> None:
    assert {letter: sum(case.name.startswith(letter) for case in CASES) for letter in "yni"} == {
        "y": 95,
        "n": 188,
        "i": 35,
    }


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.stem)
def test_a_case(rig: Rig, case: Path) -> None:
    line, kind = event(case), case.name[0]
    before = b'{"deviceId":"y_","before":"%b"}' % case.stem.encode()
    as_object = rig.post(line, "application/json")
    taken = as_object.status == 200
    assert kind == "i" or taken == (kind == "y"), as_object
    if taken:
        assert (as_object.json["accepted"], as_object.json["rejected"]) == (1, [])
        rig.stored.append(one_line(line))
    else:
        assert (as_object.status, as_object.json["code"]) == (400, "no_valid_event"), as_object
        (rejected,) = as_object.json["rejected"]
        assert rejected["index"] == 0 and rejected["code"] in CODES
    if b"\n" in line:
        return
    # Between two good events of a batch; a carriage return at a line's end would be white space behind the event.
    batch = rig.post(b"\n".join((before, line, before)), "application/x-ndjson")
    assert batch.status == 200, batch
    assert (batch.json["accepted"], len(batch.json["rejected"])) == ((3, 0) if taken else (2, 1))
    if not taken:
        assert (batch.json["rejected"][0]["index"], batch.json["rejected"][0]["code"]) == (1, rejected["code"])
    rig.stored += [before, line, before] if taken else [before, before]


def test_all_cases_of_one_line_in_one_batch(rig: Rig) -> None:
    lines = [event(case) for case in CASES if case.name[0] in "yn" and b"\n" not in event(case)]
    bad = [index for index, line in enumerate(lines) if line.startswith(b'{"deviceId":"n_"')]
    answer = rig.post(b"\n".join(lines), "application/x-ndjson")
    assert answer.status == 200
    assert [one["index"] for one in answer.json["rejected"]] == bad
    assert {one["code"] for one in answer.json["rejected"]} <= CODES
    assert answer.json["accepted"] == len(lines) - len(bad)
    rig.stored += [line for index, line in enumerate(lines) if index not in bad]
