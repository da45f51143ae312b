"""The client's trace id: which headers hold one, and that every refusal and log line about a request names it."""

from __future__ import annotations

import json

import pytest

from penstock.errors import NotFound
from penstock.server.message import Reply, Request, Response
from penstock.server.problems import problem
from penstock.server.trace import fields, trace_id, traced, tracing
from tests.server.conftest import Serve

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
GOOD = f"00-{TRACE}-{PARENT}-01"
HEADER = f"traceparent: {GOOD}\r\n".encode()


@pytest.mark.parametrize(
    "value", [GOOD, GOOD[:-2] + "00", "01" + GOOD[2:], "fe" + GOOD[2:] + "-what-comes-later", "cc" + GOOD[2:] + "-"]
)
def test_headers_with_a_trace(value: str) -> None:
    assert trace_id({b"traceparent": value.encode()}) == TRACE
    assert fields({b"traceparent": value.encode()}) == {"trace_id": TRACE}


@pytest.mark.parametrize(
    "value",
    [
        "", TRACE, "ff" + GOOD[2:], GOOD + "-", GOOD + "-more", GOOD + "00", "01" + GOOD[2:] + "0", GOOD[:-1], GOOD.upper(),
        f"00-{'0' * 32}-{PARENT}-01", f"00-{TRACE}-{'0' * 16}-01", f"00-{TRACE}-{PARENT}-0g", f"0-{TRACE}-{PARENT}-01",
        f"{GOOD}, {GOOD}", GOOD.replace("-", "_"), " " + GOOD, GOOD + "\n", f"00-{TRACE[:-1]}-{PARENT}-01", "é" + GOOD[1:],
    ],
)  # fmt: skip
def test_headers_that_are_ignored(value: str) -> None:
    headers = {b"traceparent": value.encode()}
    assert trace_id(headers) is None
    assert fields(headers) == {}
    refusal = problem(NotFound("No."))
    assert traced(headers, refusal) == refusal
    assert trace_id({}) is None


def test_a_problem_gets_the_trace_and_other_answers_do_not() -> None:
    headers = {b"traceparent": GOOD.encode()}
    refusal = problem(NotFound("No."))
    assert json.loads(traced(headers, refusal).body) == {**json.loads(refusal.body), "trace_id": TRACE}
    answers: list[Response] = []
    for response in (Response(200, b"{}"), Response(201, b"")):
        tracing(headers, answers.append)(response)
        assert answers.pop() == response


def test_what_fails_and_what_is_refused_while_it_arrives(serve: Serve) -> None:
    def fail(_request: Request, _reply: Reply) -> None:
        raise ZeroDivisionError

    served = serve(fail)
    failed = served.ask(b"GET / HTTP/1.1\r\nHost: x\r\n" + HEADER + b"\r\n")
    assert (failed.status, json.loads(failed.body)["trace_id"]) == (500, TRACE)
    assert [about.get("trace_id") for level, _, about in served.log.lines if level == "error"] == [TRACE]
    large = served.ask(b"POST / HTTP/1.1\r\nHost: x\r\n" + HEADER + b"Content-Length: 2000000\r\n\r\n")
    assert (large.status, json.loads(large.body)["trace_id"]) == (413, TRACE)
    # A refusal is of the request that it refuses, not of the one before on the connection.
    client = served.client()
    client.ask(b"GET / HTTP/1.1\r\nHost: x\r\n" + HEADER + b"\r\n")
    second = client.ask(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 2000000\r\n\r\n")
    assert (second.status, "trace_id" in json.loads(second.body)) == (413, False)
