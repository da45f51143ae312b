"""Who is told to come later and comes at once: how soon he is listened to again."""

from __future__ import annotations

import threading
import time

import pytest

from penstock.server import patience
from penstock.server.message import Reply, Request, Response
from penstock.server.patience import AT_ONCE, REFUSALS_PER_S, REST_S_MOST, Patience

GET = b"GET / HTTP/1.1\r\nHost: h\r\n\r\n"


def test_a_few_refusals_cost_nobody_anything_and_more_are_spread() -> None:
    one = Patience()
    assert max(one.rest_s(100.0) for _ in range(AT_ONCE)) < 1e-9
    rests = [one.rest_s(100.0) for _ in range(10_000)]
    assert rests == sorted(rests) and 0.0 < rests[0] <= 2 / REFUSALS_PER_S
    assert rests[-1] == pytest.approx(REST_S_MOST), "nobody rests for longer than the least that anybody is told"
    assert one.rest_s(100.0 + REST_S_MOST + AT_ONCE / REFUSALS_PER_S) == 0.0


def test_those_who_come_again_as_soon_as_they_are_heard_are_refused_at_the_rate() -> None:
    one, coming, refused = Patience(), [0.0] * 1000, 0
    while min(coming) < 5.0:
        at = coming.index(min(coming))
        coming[at] += one.rest_s(coming[at]) + 0.0001
        refused += 1
    assert refused == pytest.approx(5.0 * REFUSALS_PER_S, rel=0.1)


class Later:
    """A handler that refuses for now, or does not."""

    def __init__(self, status: int) -> None:
        self.status = status
        self.asked = 0

    def __call__(self, _request: Request, reply: Reply) -> None:
        self.asked += 1
        reply(Response(self.status, b"{}"))


@pytest.mark.parametrize("status", [429, 503, 200, 400])
def test_who_was_told_to_come_later_is_not_read_for_a_moment(serve, monkeypatch, status):
    monkeypatch.setattr(patience, "REFUSALS_PER_S", 10.0)
    monkeypatch.setattr(patience, "AT_ONCE", 1)
    handler = Later(status)
    client = serve(handler).client()
    began = time.monotonic()
    for _ in range(4):
        assert client.ask(GET).status == status
    took_s = time.monotonic() - began
    assert (took_s > 0.15) == (status in (429, 503)), took_s


def test_what_came_meanwhile_is_answered_in_the_end(serve, monkeypatch):
    """In one packet, in parts, and by one who has ended his side."""
    monkeypatch.setattr(patience, "REFUSALS_PER_S", 20.0)
    monkeypatch.setattr(patience, "AT_ONCE", 1)
    handler = Later(503)
    server = serve(handler)
    together, ended = server.client(), server.client()
    together.send(GET * 3 + GET[:10])
    ended.send(GET * 3)
    ended.socket.shutdown(1)
    assert [client.answer().status for client in (together, ended) for _ in range(3)] == [503] * 6
    assert ended.ended() == b""
    together.send(GET[10:])
    assert together.answer().status == 503
    assert handler.asked == 7


def test_one_who_waits_is_heard_at_once_beside_many_who_do_not(serve, monkeypatch):
    monkeypatch.setattr(patience, "REFUSALS_PER_S", 50.0)
    monkeypatch.setattr(patience, "AT_ONCE", 5)
    handler = Later(503)
    server = serve(handler)
    ending = threading.Event()

    def hammer() -> None:
        client = server.client()
        while not ending.is_set():
            client.ask(GET)

    others = [threading.Thread(target=hammer) for _ in range(8)]
    for one in others:
        one.start()
    server.until(lambda: handler.asked > 30)
    began = time.monotonic()
    for _ in range(10):
        assert server.client().ask(GET).status == 503
    took_s = time.monotonic() - began
    ending.set()
    for one in others:
        one.join()
    assert took_s < 0.5, took_s


def test_what_came_meanwhile_is_answered_before_the_end_of_a_drain(serve, monkeypatch):
    monkeypatch.setattr(patience, "REFUSALS_PER_S", 0.5)
    monkeypatch.setattr(patience, "AT_ONCE", 1)
    served = serve(Later(503))
    client = served.client()
    while served.server.rest_s() < REST_S_MOST:
        continue
    assert client.ask(GET).status == 503
    client.send(GET)
    served.start_drain(5.0)()
    assert (client.answer().status, client.ended()) == (503, b"")
