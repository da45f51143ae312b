"""The connection through raw sockets: framing, limits, deadlines, keep-alive, drain."""

from __future__ import annotations

import socket
import threading

import msgspec
import pytest

from bench.refused import CHUNKED, HOSTILE, TOO_MUCH
from penstock.errors import MalformedBody
from penstock.server.message import Reply, Request, Response
from penstock.server.parser import Limits
from penstock.server.problems import problem as refusal

GET = b"GET /a?b=c HTTP/1.1\r\nHost: h\r\n\r\n"
HEAD = b"HEAD /a HTTP/1.1\r\nHost: h\r\n\r\n"
BODY_MAX = 1 << 20


def post(body: bytes, *headers: bytes) -> bytes:
    lines = (b"POST /p HTTP/1.1", b"Host: h", b"Content-Length: %d" % len(body), *headers)
    return b"\r\n".join(lines) + b"\r\n\r\n" + body


def head_only(*headers: bytes, line: bytes = b"POST /p HTTP/1.1") -> bytes:
    return b"\r\n".join((line, *headers)) + b"\r\n\r\n"


def problem(answer) -> dict[str, object]:
    assert answer.headers[b"content-type"] == b"application/problem+json"
    body = msgspec.json.decode(answer.body)
    assert body["status"] == answer.status
    assert body["type"] == f"/docs/errors#{body['code']}"
    assert body["title"]
    assert body["detail"]
    return body


class Recorder:
    """A handler that counts, and answers only when told to."""

    def __init__(self, *, at_once: bool = False) -> None:
        self.requests: list[Request] = []
        self.replies: list[Reply] = []
        self.at_once = at_once

    def __call__(self, request: Request, reply: Reply) -> None:
        self.requests.append(request)
        if self.at_once:
            reply(Response(200, request.path + request.body))
        else:
            self.replies.append(reply)

    def answer(self, response: Response = Response(200, b"{}")) -> None:  # noqa: B008 - a value
        self.replies.pop(0)(response)


# Requests that are answered


def test_a_get(serve):
    answer = serve().ask(GET)
    assert (answer.status, answer.body) == (200, b"GET|/a|b=c|")
    assert answer.headers[b"content-type"] == b"text/plain"
    assert answer.headers[b"date"].endswith(b"GMT")
    assert b"connection" not in answer.headers


def test_a_body_in_one_piece_and_in_many(serve):
    client = serve().client()
    assert client.ask(post(b"hello")).body == b"POST|/p||hello"
    whole = post(b"0123456789")
    for byte in whole:
        client.send(bytes([byte]))
    assert client.answer().body == b"POST|/p||0123456789"


def test_a_body_of_exactly_the_limit(serve):
    body = bytes(range(256)) * 4096
    assert len(body) == BODY_MAX
    assert serve().ask(post(body)).body.endswith(body)


def test_chunks(serve):
    client = serve().client()
    assert client.ask(CHUNKED + b"3\r\nabc\r\n4;x=y\r\ndefg\r\n0\r\n\r\n").body == b"POST|/v1/events||abcdefg"
    assert client.ask(CHUNKED + b"0\r\n\r\n").body == b"POST|/v1/events||"
    assert client.ask(GET).status == 200


def test_trailers_are_not_headers(serve):
    handler = Recorder(at_once=True)
    answer = serve(handler).ask(CHUNKED + b"1\r\na\r\n0\r\nHost: evil\r\nPenstock-Producer: p\r\n\r\n")
    assert answer.status == 200
    assert handler.requests[0].headers[b"host"] == b"h"
    assert b"penstock-producer" not in handler.requests[0].headers


def test_header_names_are_lower_case_and_repeats_joined(serve):
    handler = Recorder(at_once=True)
    serve(handler).ask(b"GET / HTTP/1.1\r\nHOST: h\r\nX-A: 1\r\nx-a: 2\r\n\r\n")
    assert handler.requests[0].headers == {b"host": b"h", b"x-a": b"1, 2"}


def test_head_has_the_length_and_no_body(serve):
    client = serve().client()
    client.send(HEAD + GET)
    answer = client.answer(head=True)
    assert (answer.status, answer.headers[b"content-length"]) == (200, b"%d" % len(b"HEAD|/a||"))
    assert client.answer().body == b"GET|/a|b=c|"


def test_pipelined_requests_are_handled_one_after_the_other(serve):
    handler = Recorder()
    served = serve(handler)
    client = served.client()
    client.send(post(b"1") + post(b"2") + post(b"3")[:-1])
    for number in (b"1", b"2"):
        served.until(lambda: handler.replies)
        assert [request.body for request in handler.requests[-1:]] == [number]
        assert len(handler.replies) == 1
        served.on_loop(lambda number=number: handler.answer(Response(200, number)))
        assert client.answer().body == number
    client.send(b"3")
    served.until(lambda: handler.replies)
    served.on_loop(handler.answer)
    assert client.answer().status == 200


def test_many_pipelined_requests_that_are_answered_at_once(serve):
    client = serve().client()
    client.send(GET * 3000)
    for _ in range(3000):
        assert client.answer().body == b"GET|/a|b=c|"


def test_bytes_that_arrive_while_a_request_is_handled_wait_unread(serve):
    handler = Recorder()
    served = serve(handler)
    client = served.client()
    client.send(post(b"1"))
    served.until(lambda: handler.replies)
    sender = threading.Thread(target=client.send, args=(post(b"x" * BODY_MAX),))
    sender.start()
    connection = next(iter(served.server.connections))
    served.until(lambda: connection._paused)
    assert len(connection._held) < BODY_MAX
    served.on_loop(handler.answer)
    assert client.answer().status == 200
    served.until(lambda: handler.replies)
    sender.join()
    assert handler.requests[-1].body == b"x" * BODY_MAX
    served.on_loop(handler.answer)
    assert client.answer().status == 200


def test_connection_close_is_honoured(serve):
    client = serve().client()
    answer = client.ask(b"GET / HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n")
    assert (answer.status, answer.headers[b"connection"]) == (200, b"close")
    assert client.ended() == b""


def test_http_1_0_is_answered_and_closed(serve):
    client = serve().client()
    answer = client.ask(b"GET / HTTP/1.0\r\nConnection: keep-alive\r\n\r\n")
    assert (answer.status, answer.headers[b"connection"]) == (200, b"close")
    assert client.ended() == b""


def test_an_absolute_target(serve):
    client = serve().client()
    assert client.ask(b"GET http://h:1/x/y?z HTTP/1.1\r\nHost: h\r\n\r\n").body == b"GET|/x/y|z|"
    assert client.ask(b"GET http://h HTTP/1.1\r\nHost: h\r\n\r\n").body == b"GET|/||"


@pytest.mark.parametrize("pieces", [1, 7])
def test_an_upgrade_is_ignored_and_the_body_kept(serve, pieces):
    client = serve().client()
    data = post(b"hello", b"Connection: Upgrade, HTTP2-Settings", b"Upgrade: h2c", b"HTTP2-Settings: AAAA")
    for at in range(0, len(data), len(data) // pieces + 1):
        client.send(data[at : at + len(data) // pieces + 1])
    assert client.answer().body == b"POST|/p||hello"
    chunked = CHUNKED[:-2] + b"Connection: upgrade\r\nUpgrade: h2c\r\n\r\n"
    assert client.ask(chunked + b"2\r\nab\r\n0\r\n\r\n" + GET).body == b"POST|/v1/events||ab"
    assert client.answer().body == b"GET|/a|b=c|"


UPGRADE = b"Connection: upgrade\r\nUpgrade: h2c\r\n\r\n"


def test_a_fault_behind_an_upgrade_is_told_as_it_is(serve):
    assert problem(serve().ask(CHUNKED[:-2] + UPGRADE + b"zz\r\n"))["code"] == "bad_header"
    assert (
        problem(serve().ask(CHUNKED[:-2] + UPGRADE + b"%x\r\n" % (BODY_MAX + 1) + b"x" * (BODY_MAX + 1)))["code"]
        == "body_too_large"
    )
    assert serve().ask(b"GET /a?b=c HTTP/1.0\r\n" + UPGRADE).body == b"GET|/a|b=c|"


def test_an_upgrade_does_not_keep_a_connection_that_shall_be_closed(serve):
    answer = serve().ask(b"GET /a?b=c HTTP/1.1\r\nHost: h\r\nConnection: close, upgrade\r\nUpgrade: h2c\r\n\r\n")
    assert (answer.status, answer.headers[b"connection"]) == (200, b"close")


def test_a_client_that_ends_its_side_gets_its_answers(serve):
    handler = Recorder()
    served = serve(handler)
    client = served.client()
    client.send(post(b"1") + post(b"2"))
    client.socket.shutdown(socket.SHUT_WR)
    for _ in range(2):
        served.until(lambda: handler.replies)
        served.on_loop(handler.answer)
        assert client.answer().status == 200
    assert client.ended() == b""


# Expect


def test_continue_is_said_before_the_body(serve):
    client = serve().client()
    client.send(head_only(b"Host: h", b"Content-Length: 3", b"Expect: 100-continue"))
    assert client._until(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
    client.send(b"abc")
    answer = client.answer()
    assert (answer.interim, answer.body) == ((100,), b"POST|/p||abc")


def test_continue_is_not_said_when_the_body_is_there(serve):
    answer = serve().ask(post(b"abc", b"Expect: 100-continue"))
    assert (answer.interim, answer.body) == ((), b"POST|/p||abc")


def test_continue_waits_for_the_answer_before(serve):
    handler = Recorder()
    served = serve(handler)
    client = served.client()
    client.send(post(b"1") + head_only(b"Host: h", b"Content-Length: 3", b"Expect: 100-continue"))
    served.until(lambda: handler.replies)
    served.on_loop(lambda: handler.answer(Response(200, b"first")))
    assert client.answer().body == b"first"
    assert client._until(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"


def test_an_expected_body_that_is_too_large_is_refused_unread(serve):
    client = serve().client()
    answer = client.ask(head_only(b"Host: h", b"Content-Length: %d" % (BODY_MAX + 1), b"Expect: 100-continue"))
    assert (answer.status, answer.interim, answer.headers[b"connection"]) == (413, (), b"close")
    assert client.ended() == b""


def test_another_expectation_is_refused_unread(serve):
    handler = Recorder(at_once=True)
    client = serve(handler).client()
    answer = client.ask(head_only(b"Host: h", b"Content-Length: 3", b"Expect: a-miracle"))
    assert (answer.status, problem(answer)["code"], answer.headers[b"connection"]) == (
        417,
        "expectation_failed",
        b"close",
    )
    assert client.ended() == b""
    assert not handler.requests


# Requests that are refused: 400 and the end of the connection, whatever came before or comes behind

HOST = b"Host: h"


@pytest.mark.parametrize("data", [row.data for row in HOSTILE.values()], ids=HOSTILE)
def test_what_is_not_http_is_refused_and_the_connection_ended(serve, data):
    handler = Recorder(at_once=True)
    client = serve(handler).client()
    client.send(GET + data + GET)
    assert client.answer().status == 200
    answer = client.answer()
    assert (answer.status, answer.headers[b"connection"]) == (400, b"close")
    assert (problem(answer)["code"], problem(answer)["retryable"]) == ("bad_header", False)
    assert client.ended() == b""
    assert len(handler.requests) == 1


@pytest.mark.parametrize(("data", "status", "code", "limit"), TOO_MUCH.values(), ids=TOO_MUCH)
def test_what_is_too_large_is_refused_with_the_limit(serve, data, status, code, limit):
    handler = Recorder(at_once=True)
    client = serve(handler).client()
    answer = client.ask(data)
    assert answer.status == status
    assert (problem(answer)["code"], problem(answer)["limit_bytes"]) == (code, limit)
    assert client.ended() == b""
    assert not handler.requests


def test_a_header_that_grows_without_end_is_refused_and_cut(serve):
    client = serve().client()
    client.send(b"GET / HTTP/1.1\r\nX: ")
    for _ in range(25):
        client.send(b"x" * 1000)
    assert client.answer().status == 431
    with pytest.raises((BrokenPipeError, ConnectionResetError)):
        while True:
            client.send(b"x" * 1000)


def test_limits_are_met_exactly(serve):
    served = serve()
    assert served.ask(head_only(HOST, line=b"GET /" + b"x" * 8191 + b" HTTP/1.1")).status == 200
    value = b"x" * (16384 - len(b"hosth") - 4 - len(b"x") - 4)
    assert served.ask(head_only(HOST, b"X: " + value, line=b"GET / HTTP/1.1")).status == 200
    assert served.ask(head_only(HOST, b"X: x" + value, line=b"GET / HTTP/1.1")).status == 431


def test_a_refusal_reaches_a_client_that_sends_everything_first(serve):
    """Without the linger the unread bytes would reset the connection: see the control below."""
    client = serve().client()
    client.send(head_only(HOST, b"Content-Length: 4000000") + b"x" * 4_000_000)
    assert client.answer().status == 413
    assert client.ended() == b""


def test_control_without_the_linger_the_refusal_is_lost(serve, monkeypatch):
    from penstock.server.http import Connection

    def refuse(connection: Connection, error) -> None:
        connection._closing = True
        connection._write(connection._transport, refusal(error), False, b"")
        connection._transport.close()

    monkeypatch.setattr(Connection, "_refuse", refuse)
    client = serve().client()
    with pytest.raises((ConnectionResetError, BrokenPipeError)):
        client.send(head_only(HOST, b"Content-Length: 4000000") + b"x" * 4_000_000)
        client.answer()
        client.ended()
        raise AssertionError("nothing was lost")


@pytest.mark.parametrize("method", [b"POST", b"PUT", b"PATCH"])
def test_a_body_without_a_length_is_refused(serve, method):
    answer = serve().ask(head_only(HOST, line=method + b" / HTTP/1.1"))
    assert (answer.status, problem(answer)["code"]) == (411, "length_required")


# Deadlines


def test_half_a_header_is_answered_408(serve):
    client = serve().client()
    answer = client.ask(b"GET / HTTP/1.1\r\nHost:")
    assert (answer.status, problem(answer)["code"], problem(answer)["retryable"]) == (408, "request_timeout", True)
    assert client.ended() == b""


@pytest.mark.parametrize("start", [post(b"12345")[:-2], CHUNKED, CHUNKED + b"3\r\nab", CHUNKED + b"3\r\nabc\r\n0\r\n"])
def test_half_a_body_is_answered_408_and_not_handled(serve, start):
    handler = Recorder(at_once=True)
    client = serve(handler).client()
    answer = client.ask(start)
    assert (answer.status, problem(answer)["code"]) == (408, "request_timeout")
    assert client.ended() == b""
    assert not handler.requests


DRIPS = {
    "a header": b"GET / HTTP/1.1\r\nX: ",
    "a target": b"GET /",
    "a body": head_only(HOST, b"Content-Length: 100000"),
    "a chunk": CHUNKED + b"10000\r\n",
    "the extension of a chunk": CHUNKED + b"1;x=",
    "a trailer": CHUNKED + b"1\r\nx\r\n0\r\nX: ",
}


@pytest.mark.parametrize("before", [b"", GET + GET], ids=["first", "behind others"])
@pytest.mark.parametrize("start", DRIPS.values(), ids=DRIPS)
def test_a_byte_now_and_then_does_not_move_the_deadline(serve, start, before):
    served = serve()
    client = served.client()
    client.send(before + start)
    for _ in range(before.count(b"GET")):
        assert client.answer().status == 200
    stop = threading.Event()

    def drip() -> None:
        while not stop.wait(0.01):
            try:
                client.send(b"x")
            except OSError:
                return

    dripping = threading.Thread(target=drip)
    dripping.start()
    try:
        assert client.answer().status == 408
    finally:
        stop.set()
        dripping.join()


def test_an_idle_connection_is_closed_in_silence(serve):
    served = serve()
    fresh, used = served.client(), served.client()
    assert used.ask(GET).status == 200
    assert (fresh.ended(), used.ended()) == (b"", b"")


def test_blank_lines_do_not_keep_a_connection(serve):
    client = serve().client()
    client.send(b"\r\n\r\n")
    assert client.ended() == b""


def test_a_handler_may_take_longer_than_any_deadline(serve):
    handler = Recorder()
    served = serve(handler)
    client, idle = served.client(), served.client()
    client.send(post(b"1"))
    assert idle.ended() == b""
    served.until(lambda: handler.replies)
    served.on_loop(handler.answer)
    assert client.answer().status == 200


def test_a_client_that_does_not_read_is_cut_and_costs_bounded_memory(serve):
    handler = Recorder(at_once=True)
    large = Response(200, b"x" * (1 << 20))
    served = serve(lambda request, reply: (handler.requests.append(request), reply(large)))
    deaf, other = served.client(receive_bytes=4096), served.client()
    deaf.send(GET * 500)
    served.until(lambda: len(served.server.connections) == 2)
    assert other.ask(GET).status == 200
    served.until(lambda: not served.server.connections)
    assert len(handler.requests) < 20
    with pytest.raises((ConnectionResetError, EOFError)):
        for _ in range(500):
            deaf.answer()


def test_a_client_that_reads_slowly_gets_everything(serve):
    served = serve(lambda request, reply: reply(Response(200, b"x" * (8 << 20))))
    client = served.client(receive_bytes=65536)
    client.send(GET)
    ticks = threading.Event()
    got = 0
    while got < 8 << 20:
        got += len(client.socket.recv(1 << 18))
        ticks.wait(0.001)


def test_a_client_that_reads_a_little_now_and_then_is_cut(serve):
    """Each byte that the kernel can pass on is some progress; it takes 64 KiB within the deadline to be kept."""
    served = serve(lambda request, reply: reply(Response(200, b"x" * (8 << 20))))
    client = served.client(receive_bytes=4096)
    client.send(GET)
    ticks = threading.Event()
    got = 0
    with pytest.raises(ConnectionResetError):
        while got < 8 << 20:
            got += len(client.socket.recv(500))
            ticks.wait(0.01)
    assert got < 1 << 20


# Clients that vanish


@pytest.mark.parametrize("leave", ["reset", "close"])
@pytest.mark.parametrize("data", [post(b"hello")[:-1], CHUNKED + b"5\r\nhello\r\n", post(b"hello")[:20]])
def test_half_a_request_of_a_client_that_leaves_is_not_handled(serve, data, leave):
    handler = Recorder(at_once=True)
    served = serve(handler)
    client = served.client()
    client.send(data)
    served.until(lambda: served.server.connections)
    client.reset() if leave == "reset" else client.socket.close()
    served.until(lambda: not served.server.connections)
    assert not handler.requests
    assert not served.log.lines


def test_a_client_that_leaves_before_its_answer_is_handled_once(serve):
    handler = Recorder()
    served = serve(handler)
    client = served.client()
    client.send(post(b"hello"))
    served.until(lambda: handler.replies)
    client.reset()
    served.until(lambda: not served.server.connections)
    served.on_loop(handler.answer)
    assert len(handler.requests) == 1
    assert served.ask(b"x\r\n\r\n").status == 400
    assert not served.log.lines


# Faults of the server


def test_an_unexpected_exception_is_logged_once_and_answered_500(serve):
    def broken(request: Request, reply: Reply) -> None:
        if request.path == b"/p":
            raise KeyError("secret")
        reply(Response(200, b"{}"))

    served = serve(broken)
    client = served.client()
    answer = client.ask(post(b"1"))
    assert (answer.status, problem(answer)["code"], problem(answer)["retryable"]) == (500, "internal_error", True)
    assert b"secret" not in answer.body
    assert client.ask(GET).status == 200
    assert [level for level, _, _ in served.log.lines] == ["error"]


def test_an_exception_after_the_answer_does_not_answer_twice(serve):
    def broken(request: Request, reply: Reply) -> None:
        reply(Response(200, b"{}"))
        raise KeyError

    served = serve(broken)
    client = served.client()
    assert (client.ask(GET).status, client.ask(GET).status) == (200, 200)
    assert len(served.log.lines) == 2


def test_an_error_of_a_handler_keeps_the_connection(serve):
    client = serve(lambda request, reply: reply(refusal(MalformedBody("No.", line=3)))).client()
    for _ in range(2):
        answer = client.ask(post(b"1"))
        assert (answer.status, problem(answer)["line"]) == (400, 3)
        assert b"connection" not in answer.headers


def test_too_many_connections_are_refused_and_the_rest_served(serve):
    served = serve(limits=Limits(connections_max=2, sweep_s=0.02, linger_s=0.1, grace_s=0.1))
    first = served.client()
    assert first.ask(GET).status == 200
    second = served.client()
    assert second.ask(GET).status == 200
    answer = served.ask(GET)
    assert (answer.status, answer.headers[b"retry-after"]) == (503, b"1")
    assert first.ask(GET).status == 200
    first.socket.close()
    second.socket.close()
    served.until(lambda: not served.server.connections)
    assert served.ask(GET).status == 200


def test_too_many_connections_of_one_address_are_refused_and_others_served(serve):
    served = serve(limits=Limits(connections_per_address_max=2, sweep_s=0.02, linger_s=0.1, grace_s=0.1))
    mine = [served.client(), served.client()]
    assert [client.ask(GET).status for client in mine] == [200, 200]
    answer = served.ask(GET)
    assert (answer.status, answer.headers[b"retry-after"], problem(answer)["code"]) == (503, b"1", "hub_busy")
    assert served.client(source="127.0.0.2").ask(GET).status == 200
    mine[0].socket.close()
    served.until(lambda: len(served.server.connections) == 2)
    assert served.ask(GET).status == 200


def test_only_a_few_refusals_wait_to_be_read(serve):
    served = serve(limits=Limits(connections_max=2, sweep_s=0.02, linger_s=30.0, grace_s=0.1))
    kept = [served.client(), served.client()]
    assert [client.ask(GET).status for client in kept] == [200, 200]
    refused = served.client()
    assert refused.answer().status == 503
    cut = served.client()
    with pytest.raises((ConnectionResetError, EOFError)):
        cut.answer()
    assert [client.ask(GET).status for client in kept] == [200, 200]


def test_who_comes_to_a_full_house_gets_the_place_of_who_was_idle_longest(serve):
    handler = Recorder()
    served = serve(handler, limits=Limits(connections_max=3, sweep_s=0.02, linger_s=0.1, grace_s=0.1))
    busy, idle, fresh = served.client(), served.client(), served.client()
    for client in (busy, idle, fresh):
        client.send(GET)
        served.until(lambda: handler.replies)
        if client is not busy:
            served.on_loop(handler.answer)
            assert client.answer().status == 200
            then = served.server.now
            served.until(lambda then=then: served.server.now > then)
        else:
            kept = handler.replies.pop()
    served.until(lambda: len(served.server.crowd._idle) == 2)
    late = served.client()
    late.send(GET)
    served.until(lambda: handler.replies)
    served.on_loop(handler.answer)
    assert late.answer().status == 200
    assert idle.ended() == b""
    for client in (busy, fresh):
        client.socket.setblocking(False)
        with pytest.raises(BlockingIOError):
            client.socket.recv(1)
        client.socket.settimeout(10)
    served.on_loop(lambda: kept(Response(200, b"{}")))
    assert busy.answer().status == 200


# Drain


def test_a_drain_answers_what_is_under_way_and_refuses_what_is_new(serve):
    handler = Recorder()
    served = serve(handler)
    busy, half, idle = served.client(), served.client(), served.client()
    busy.send(post(b"1"))
    half.send(post(b"22")[:-1])
    served.until(lambda: handler.replies and len(served.server.connections) == 3)
    served.until(lambda: any(one._parser.arriving == 2 for one in served.server.connections))
    wait = served.start_drain(5.0)
    served.until(lambda: served.server.draining)
    late = idle.ask(post(b"3"))
    assert (late.status, problem(late)["code"], late.headers[b"retry-after"]) == (503, "draining", b"1")
    assert late.headers[b"connection"] == b"close"
    half.send(b"2")
    for client in (busy, half):
        served.until(lambda: handler.replies)
        served.on_loop(handler.answer)
        answer = client.answer()
        assert (answer.status, answer.headers[b"connection"]) == (200, b"close")
        assert client.ended() == b""
    idle.socket.close()
    wait()
    assert [request.body for request in handler.requests] == [b"1", b"22"]


def test_a_drain_closes_idle_connections_and_the_socket(serve):
    served = serve()
    client = served.client()
    assert client.ask(GET).status == 200
    served.start_drain(5.0)()
    assert client.ended() == b""
    with pytest.raises(ConnectionRefusedError):
        served.client()


def test_a_drain_ends_with_its_timeout(serve):
    handler = Recorder()
    served = serve(handler)
    stuck, half = served.client(), served.client()
    stuck.send(post(b"1"))
    half.send(post(b"22")[:-1])
    served.until(lambda: handler.replies and len(served.server.connections) == 2)
    served.until(lambda: any(one._parser.arriving == 2 for one in served.server.connections))
    served.start_drain(0.1)()
    for client in (half, stuck):
        answer = client.answer()
        assert (answer.status, problem(answer)["code"], problem(answer)["retryable"]) == (503, "draining", True)
        assert client.ended() == b""
    served.on_loop(handler.answer)


def drain_with_a_queue(served) -> list[int]:
    """Statuses of clients that connect while the loop is held and the drain is its next act; 0 is a reset."""
    held, go = threading.Event(), threading.Event()
    served.loop.call_soon_threadsafe(lambda: (held.set(), go.wait(10)))
    assert held.wait(10)
    wait = served.start_drain(5.0)
    clients = [served.client() for _ in range(20)]
    for client in clients:
        client.send(GET)
    go.set()
    statuses = []
    for client in clients:
        try:
            statuses.append(client.answer().status)
        except (EOFError, ConnectionResetError):
            statuses.append(0)
        client.socket.close()
    wait()
    return statuses


def test_connections_that_the_kernel_has_queued_are_answered(serve):
    assert set(drain_with_a_queue(serve())) <= {200, 503}


def test_control_without_accepting_them_they_are_reset(serve, monkeypatch):
    from penstock.server.listener import Server

    monkeypatch.setattr(Server, "_accept", lambda *_: None)
    assert 0 in drain_with_a_queue(serve())
