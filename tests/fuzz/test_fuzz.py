"""Every input of the corpus as an ordinary test, and some seconds of fuzzing for each target."""

from __future__ import annotations

import os
import zlib
from pathlib import Path
from typing import Any

import pytest

from penstock import sas
from penstock.client import answers
from penstock.errors import PenstockError
from penstock.server import auth, numbers
from penstock.server.parser import Parser
from penstock.wire import body, frame, route
from tests.fuzz.__main__ import CORPUS, fuzz
from tests.fuzz.targets import TARGETS

SECONDS = int(os.environ.get("PENSTOCK_FUZZ_SECONDS", "10"))
INPUTS = sorted(CORPUS.glob("*/*"))


def test_each_target_has_inputs_to_begin_with() -> None:
    assert {path.parent.name for path in INPUTS} == TARGETS.keys()


@pytest.mark.parametrize("path", INPUTS, ids=lambda path: f"{path.parent.name}-{path.name}")
def test_an_input_of_the_corpus(path: Path) -> None:
    TARGETS[path.parent.name].run(path.read_bytes())


def one_shot(body: bytes, bytes_max: int) -> bytes:
    return zlib.decompressobj(31).decompress(body, bytes_max)


def unbounded(parser: Parser, part: bytes) -> None:
    parser._body = bytes(parser._body) + part


def by_name(self: PenstockError, detail: str, **fields: object) -> None:
    self.detail, self.fields = detail, fields


@pytest.mark.parametrize(
    ("target", "part", "name", "careless"),
    [
        ("body", route, "_adds_up", lambda *_: True),
        ("zipped", body, "_gunzip", one_shot),
        ("http", Parser, "on_body", unbounded),
        ("headers", numbers, "_PRODUCER_ID", frozenset(range(256))),
        ("authorization", sas.Resource, "covers", lambda *_: True),
        ("authorization", auth, "compare_digest", lambda *_: True),
        ("frame", frame, "sources_of", lambda _frame: ()),
        ("answer", PenstockError, "__init__", by_name),
        ("answer", answers, "_settled", lambda *_: answers.Settled(1, False, (), True)),
    ],
)
def test_without_its_care_a_part_fails_on_the_corpus(
    monkeypatch: pytest.MonkeyPatch, target: str, part: Any, name: str, careless: Any
) -> None:
    monkeypatch.setattr(part, name, careless)
    with pytest.raises((AssertionError, TypeError, ValueError)):
        for path in INPUTS:
            if path.parent.name == target:
                TARGETS[target].run(path.read_bytes())


@pytest.mark.timeout(SECONDS + 200)
def test_nothing_new_is_found() -> None:
    """All targets at once: ten seconds each are ten seconds and not ninety."""
    pytest.importorskip("atheris", reason="atheris has no wheel for this Python")
    outcomes = fuzz(list(TARGETS), seconds=SECONDS)
    for outcome in outcomes:
        assert not outcome.code, f"{outcome.target}: {[str(path) for path in outcome.kept]}\n{outcome.text[-4000:]}"
        assert outcome.runs > 100, outcome.text[-4000:]
    print("\n" + ", ".join(f"{outcome.target} {outcome.runs:,}" for outcome in outcomes))
