"""Every error of the tree as an answer."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec
import pytest

from penstock import errors
from penstock.server.problems import problem, unexpected
from penstock.wire.problem import rebuilt


def tree(root: type[errors.PenstockError]) -> Iterator[type[errors.PenstockError]]:
    yield root
    for below in root.__subclasses__():
        if below.__module__ == errors.__name__:
            yield from tree(below)


@pytest.mark.parametrize("kind", list(tree(errors.PenstockError)), ids=lambda kind: kind.__name__)
def test_an_error_becomes_its_problem(kind):
    answer = problem(kind("What happened.", limit_bytes=7))
    assert answer.content_type == b"application/problem+json"
    assert answer.status == kind.status
    assert msgspec.json.decode(answer.body) == {
        "type": f"/docs/errors#{kind.code}",
        "title": kind.title,
        "status": kind.status,
        "code": kind.code,
        "detail": "What happened.",
        "retryable": kind.retryable,
        "limit_bytes": 7,
    }


@pytest.mark.parametrize("kind", list(tree(errors.PenstockError)), ids=lambda kind: kind.__name__)
def test_a_problem_becomes_its_error_again(kind):
    error = rebuilt(problem(kind("What happened.", first="10", n=7)).body)
    assert (type(error), error.detail, error.fields) == (kind, "What happened.", {"first": "10", "n": 7})


@pytest.mark.parametrize(
    "body",
    [b"", b"<html>", b"[]", b"{}", b'{"code":"new","detail":"x"}', b'{"code":"hub_error"}', b'{"code":7,"detail":"x"}'],
)
def test_what_is_no_problem_of_ours_becomes_no_error(body):
    assert rebuilt(body) is None


@pytest.mark.parametrize(("after_s", "header"), [(0.0, b"1"), (0.2, b"1"), (1.0, b"1"), (1.1, b"2"), (30, b"30")])
def test_retry_after_is_whole_seconds_and_never_too_early(after_s, header):
    assert dict(problem(errors.HubBusy("Busy.", retry_after_s=after_s)).headers) == {b"Retry-After": header}


@pytest.mark.parametrize("kind", list(tree(errors.NotConfirmed)))
def test_whoever_may_send_again_is_told_when(kind):
    assert dict(problem(kind("No.")).headers) == {b"Retry-After": b"1"}


def test_what_is_supported_stands_in_the_headers():
    encoding = errors.UnsupportedEncoding("No.", supported=["gzip", "zstd"])
    assert dict(problem(encoding).headers) == {b"Accept-Encoding": b"gzip, zstd"}
    kind = errors.UnsupportedType("No.", supported=["application/json"])
    assert dict(problem(kind).headers) == {b"Accept": b"application/json"}
    method = errors.MethodNotAllowed("No.", allow=["GET", "HEAD"])
    assert dict(problem(method).headers) == {b"Allow": b"GET, HEAD"}


def test_an_unexpected_error_tells_clients_nothing_of_the_inside():
    answer = problem(unexpected(ValueError("a secret")))
    assert answer.status == 500
    assert b"a secret" not in answer.body
    assert msgspec.json.decode(answer.body)["retryable"] is True
