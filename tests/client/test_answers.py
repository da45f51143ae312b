"""The reaction table, row by row."""

from __future__ import annotations

import msgspec
import pytest

from penstock.client.answers import (
    Again,
    NewProducer,
    Paused,
    Reaction,
    Refused,
    Rejection,
    Settled,
    Split,
    reaction,
    retry_after_s,
)
from penstock.client.transport import Answer
from penstock.errors import BatchRefused

NOW_MS = 784_111_767_000  # 1994-11-06T08:49:27Z
HTML = b"<html><body>Please log in</body></html>"


def judged(status: int, body: object, events: int = 3, **headers: str) -> Reaction:
    raw = body if isinstance(body, bytes) else msgspec.json.encode(body)
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return reaction(Answer(status, named, raw), batch="p:1:7", events=events, now_ms=NOW_MS)


def problem(code: str, retryable: bool) -> dict[str, object]:
    return {"code": code, "detail": "why", "retryable": retryable}


def stored(
    accepted: int = 3, batch: str = "p:1:7", rejected: tuple[int, ...] = (), duplicate: bool = False
) -> dict[str, object]:
    listed = [{"index": index, "code": "not_json", "detail": "why"} for index in rejected]
    return {"batch": batch, "accepted": accepted, "duplicate": duplicate, "rejected": listed}


def test_an_answer_that_accounts_for_every_event_settles() -> None:
    assert judged(200, stored()) == Settled(3, False, (), stored=True)
    assert judged(200, stored(duplicate=True)) == Settled(3, True, (), stored=True)
    one = Rejection(1, "not_json", "why")
    assert judged(200, stored(2, rejected=(1,))) == Settled(2, False, (one,), stored=True)
    none = {**problem("no_valid_event", False), "rejected": stored(0, rejected=(0,))["rejected"]}
    assert judged(400, none, events=1) == Settled(0, False, (Rejection(0, "not_json", "why"),), stored=False)


@pytest.mark.parametrize(
    "body",
    [
        HTML,
        b"",
        b"null",
        b"[" * 100_000,
        b"\xff",
        {},
        stored(batch="p:1:6"),
        stored(batch="q:1:7"),
        stored(accepted=2),
        stored(accepted=4),
        stored(accepted=-1, rejected=(0, 1, 2)),
        stored(accepted=0, rejected=(0, 1, 2)),
        stored(accepted=2, rejected=(3,)),
        stored(accepted=2, rejected=(-1,)),
        stored(accepted=1, rejected=(1, 1)),
        {**stored(), "accepted": "3"},
    ],
)
def test_a_200_that_is_not_of_this_batch_keeps_it(body: object) -> None:
    """Case 98."""
    assert isinstance(judged(200, body), Paused)


@pytest.mark.parametrize("status", [408, 425, 429, 500, 502, 503, 504, 507, 520, 599])
@pytest.mark.parametrize("body", [HTML, problem("hub_busy", True), problem("malformed_gzip", False)])
def test_what_time_heals_is_sent_again(status: int, body: object) -> None:
    assert isinstance(judged(status, body), Again)


def test_a_body_that_arrived_damaged_is_sent_again() -> None:
    assert isinstance(judged(400, problem("body_mismatch", True)), Again)


@pytest.mark.parametrize("status", [401, 403])
@pytest.mark.parametrize("body", [HTML, problem("not_found", False), problem("unknown_code", False)])
def test_without_a_key_it_pauses(status: int, body: object) -> None:
    """Case 95."""
    assert isinstance(judged(status, body), Paused)


@pytest.mark.parametrize("status, code", [(404, "not_found"), (405, "method_not_allowed")])
def test_a_wrong_address_is_no_fault_of_the_batch(status: int, code: str) -> None:
    assert isinstance(judged(status, problem(code, False)), Paused)


def test_too_large_is_split() -> None:
    assert judged(413, problem("batch_too_large", False)) == Split("batch_too_large", "why")
    assert isinstance(foreign := judged(413, HTML), Split) and foreign.code == ""


@pytest.mark.parametrize("code", ["number_reused", "number_too_old", "producer_fenced"])
def test_a_taken_number_needs_a_new_producer(code: str) -> None:
    """Case 92."""
    assert judged(409 if code == "producer_fenced" else 422, problem(code, False)) == NewProducer(code, "why")


def test_what_penstock_refuses_for_good_ends_the_batch() -> None:
    """Case 94."""

    def every(error: type[BatchRefused]) -> list[type[BatchRefused]]:
        return [error, *(below for sub in error.__subclasses__() for below in every(sub))]

    special = {"number_reused", "number_too_old", "producer_fenced", "no_valid_event"}
    for error in every(BatchRefused):
        if not error.retryable and error.status not in (401, 403, 404, 405, 413) and error.code not in special:
            assert judged(error.status, problem(error.code, False)) == Refused(error.code, "why")


@pytest.mark.parametrize("status", [204, 206, 301, 302, 304, 307, 400, 404, 405, 407, 418, 451])
@pytest.mark.parametrize(
    "body", [HTML, {"error": "not found"}, problem("some_proxy_code", False), problem("malformed_gzip", True)]
)
def test_what_is_not_penstocks_keeps_the_batch(status: int, body: object) -> None:
    answered = judged(status, body)
    assert isinstance(answered, Paused) or (isinstance(answered, Again) and body == problem("malformed_gzip", True))


@pytest.mark.parametrize(
    "text, seconds",
    [
        ("7", 7.0),
        ("7.5", 7.5),
        (" 30 ", 30.0),
        ("0", 1.0),
        ("-5", 1.0),
        ("1000000000", 900.0),
        ("1e400", 900.0),
        ("Sun, 06 Nov 1994 08:49:37 GMT", 10.0),
        ("Sunday, 06-Nov-94 08:49:37 GMT", 10.0),
        ("Sun Nov  6 08:49:37 1994", 10.0),
        ("Sun, 06 Nov 1993 08:49:37 GMT", 1.0),
        ("Sun, 06 Nov 2094 08:49:37 GMT", 900.0),
        ("nan", None),
        ("soon", None),
        ("", None),
        ("9" * 5000, 900.0),
    ],
)
def test_retry_after_in_all_its_forms(text: str, seconds: float | None) -> None:
    """Case 97."""
    assert retry_after_s({"retry-after": text}, NOW_MS) == seconds


def test_a_date_is_compared_with_the_servers_own() -> None:
    """Cases 93, 97."""
    headers = {"retry-after": "Sun, 06 Nov 1994 08:49:37 GMT", "date": "Sun, 06 Nov 1994 08:49:17 GMT"}
    assert retry_after_s(headers, 0) == 20.0
