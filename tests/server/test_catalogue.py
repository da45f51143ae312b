"""docs/errors.md is what errors.py says, and it names whatever a client may be given."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from penstock import errors
from penstock.server.catalogue import EVENTS, Entry, answered, document, raised
from penstock.server.problems import problem
from penstock.wire.problem import rebuilt

ROOT = Path(__file__).parents[2]
SRC = ROOT / "src" / "penstock"


def test_the_document_is_what_the_classes_say() -> None:
    assert (ROOT / "docs" / "errors.md").read_text("utf-8") == document()


def test_every_class_is_in_it_once() -> None:
    names = [entry.name for entry in (*answered(), *raised())]
    classes = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, Exception)]
    assert sorted(names) == sorted(kind.__name__ for kind in classes)
    assert all(f'id="{kind.code}"' in document() for kind in classes)


def test_every_class_says_more_than_its_title() -> None:
    for entry in (*answered(), *raised()):
        assert entry.text.endswith(".") and len(entry.text) > len(entry.title), entry


@pytest.mark.parametrize("entry", answered(), ids=lambda entry: entry.code)
def test_what_is_said_of_an_answer_is_so(entry: Entry) -> None:
    kind = getattr(errors, entry.name)
    answer = problem(kind("No.", **({"retry_after_s": 2} if entry.retry_after else {})))
    body = msgspec.json.decode(answer.body)
    assert (answer.status, body["code"], body["retryable"]) == (entry.status, entry.code, entry.retryable)
    assert (b"Retry-After" in dict(answer.headers)) == entry.retry_after
    error = rebuilt(answer.body)
    assert type(error) is kind
    # Whoever is told that nothing was stored, or that it is not known, has sent something.
    assert bool(entry.stored) == isinstance(error, (errors.BatchRefused, errors.InternalError))


def rejections(path: Path) -> Iterator[str]:
    """The codes that a module rejects events with: what a `_Reject` is made of, and `code` in a rejection that is a dict."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        found: list[ast.expr] = []
        if isinstance(node, ast.Call) and ast.unparse(node.func).lstrip("_") in ("Reject", "Rejected"):
            found = node.args
        elif isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "code":
            found = [node.value]
        for inner in (each for one in found for each in ast.walk(one)):
            if isinstance(inner, ast.Constant) and isinstance(inner.value, str) and inner.value.isidentifier():
                yield inner.value


def test_every_reason_to_reject_an_event_is_in_it() -> None:
    given = {code for path in (SRC / "wire").glob("*.py") for code in rejections(path)}
    assert given >= {"not_json", "bad_device", "reserved_field"}, "the codes are no longer where this test looks"
    assert given <= EVENTS.keys()
    assert all(f"`{code}`" in document() for code in EVENTS)
