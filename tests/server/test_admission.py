"""Bodies that are still arriving: whose is waited for, and how much of them is held."""

from __future__ import annotations

import msgspec
import pytest

from penstock.errors import Unauthenticated
from penstock.server.app import Route, Router, Where
from penstock.server.message import Grant, Request, Response, Right
from penstock.server.parser import Limits

BODY = b"x" * 40_000
PATIENT = Limits(body_s=60.0, linger_s=60.0, sweep_s=0.02, grace_s=0.1)


class Api:
    """A router with a path for events, one for everyone, and a guard that counts how often it is asked."""

    def __init__(self) -> None:
        self.asked = 0
        self.bodies: list[bytes] = []
        self.router = Router(
            [
                Route(b"POST", b"/events", self._take, Where.LISTEN, Right.SEND),
                Route(b"POST", b"/cut", self._take, Where.LISTEN, Right.MANAGE),
                Route(b"GET", b"/open", self._take, Where.LISTEN),
            ],
            self._guard,
        )

    def _guard(self, request: Request) -> Grant:
        self.asked += 1
        if request.headers.get(b"authorization") != b"Bearer good":
            raise Unauthenticated("No valid key.")
        if request.headers.get(b"host") == b"broken":
            raise ZeroDivisionError
        return Grant(Right.SEND)

    def _take(self, request: Request, _names: object, reply) -> None:
        self.bodies.append(request.body)
        reply(Response(200, b"{}"))


@pytest.fixture
def api() -> Api:
    return Api()


@pytest.fixture
def served(serve, api):
    return serve(api.router, PATIENT, admit=api.router.admit)


def post(path: bytes = b"/events", key: bytes = b"good", host: bytes = b"h", more: bytes = b"") -> bytes:
    length = b"Content-Length: %d" % len(BODY)
    return b"POST %b HTTP/1.1\r\nHost: %b\r\nAuthorization: Bearer %b\r\n%b\r\n%b\r\n" % (path, host, key, length, more)


def code(answer) -> tuple[int, str]:
    return answer.status, msgspec.json.decode(answer.body)["code"]


REFUSED = {
    "no key": (post(key=b"bad"), 401, "unauthenticated"),
    "no right": (post(b"/cut"), 403, "forbidden"),
    "no path": (post(b"/none"), 404, "not_found"),
    "no method": (post(b"/open"), 405, "method_not_allowed"),
    "a failure": (post(host=b"broken"), 500, "internal_error"),
}


@pytest.mark.parametrize("part", [0, 1, 30_000])
@pytest.mark.parametrize("name", REFUSED)
def test_who_may_not_send_is_told_before_the_body_is_there(served, api, name, part):
    data, *expected = REFUSED[name]
    client = served.client()
    answer = client.ask(data + BODY[:part])
    assert [*code(answer)] == expected
    assert (answer.headers[b"connection"], client.ended()) == (b"close", b"")
    (connection,) = served.server.connections
    client.send(BODY[part:-1])
    assert (connection._parser.kept_bytes, served.server.arriving_bytes, api.bodies) == (0, 0, [])


def test_control_the_body_of_who_may_is_waited_for(served, api):
    client = served.client()
    client.send(post() + BODY[:-1])
    served.until(lambda: served.server.arriving_bytes == len(BODY) - 1)
    assert client.ask(BODY[-1:]).status == 200
    assert (api.bodies, served.server.arriving_bytes) == ([BODY], 0)


def test_who_is_refused_is_not_told_to_continue(served):
    expects = b"Expect: 100-continue\r\n"
    answer = served.ask(post(key=b"bad", more=expects))
    assert (answer.status, answer.interim) == (401, ())
    client = served.client()
    client.send(post(more=expects))
    assert client._receive() == b"HTTP/1.1 100 Continue\r\n\r\n"


def test_the_guard_is_asked_early_once_and_not_at_all_when_all_is_there(served, api):
    small = post().replace(b"Content-Length: %d" % len(BODY), b"Content-Length: 1") + b"x"
    assert served.ask(small).status == 200
    assert api.asked == 1
    client = served.client()
    client.send(post())
    served.until(lambda: api.asked == 2)
    for part in (BODY[:10], BODY[10:20]):
        before = served.server.arriving_bytes
        client.send(part)
        served.until(lambda before=before: served.server.arriving_bytes == before + 10)
    assert api.asked == 2
    assert client.ask(BODY[20:]).status == 200
    assert api.asked == 3


def test_it_is_asked_for_each_request_of_a_connection(served, api):
    client = served.client()
    client.send(post() + BODY[:-1])
    served.until(lambda: served.server.arriving_bytes)
    # The end of the one and the beginning of the other arrive together: the first is answered, and then the second refused.
    client.send(BODY[-1:] + post(key=b"bad") + b"x")
    assert client.answer().status == 200
    assert code(client.answer()) == (401, "unauthenticated")
    assert (client.ended(), api.bodies) == (b"", [BODY])


def test_what_comes_with_a_get_is_not_held(served, api):
    client = served.client()
    client.send(b"GET /open HTTP/1.1\r\nHost: h\r\nContent-Length: %d\r\n\r\n" % len(BODY) + BODY[:-1])
    served.until(lambda: served.server.connections and served.server.connections[0]._parser.arriving == 2)
    assert served.server.arriving_bytes == 0
    assert client.ask(BODY[-1:]).status == 200
    assert api.bodies == [b""]


def test_bodies_that_arrive_have_room_together(serve, api):
    room = PATIENT._replace(arriving_bytes_max=3 * len(BODY))
    served = serve(api.router, room, admit=api.router.admit)
    held = [served.client() for _ in range(3)]
    for client in held:
        client.send(post() + BODY[:-1])
    served.until(lambda: served.server.arriving_bytes == 3 * (len(BODY) - 1))
    late = served.client()
    answer = late.ask(post() + BODY[:-1])
    assert (code(answer), answer.headers[b"retry-after"]) == ((503, "hub_busy"), b"1")
    assert [client.ask(BODY[-1:]).status for client in held[:2]] == [200, 200]
    held[2].reset()
    served.until(lambda: served.server.arriving_bytes == 0)
    assert served.ask(post() + BODY).status == 200
