"""The client's trace id in what a refused request is answered, and in the server's log lines about it (W3C Trace Context, level 1).

`traceparent: <version>-<trace id>-<parent id>-<flags>`, in lower-case hex digits. One that is none is ignored, as that standard says.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from msgspec.structs import replace

from penstock.server.message import Reply, Response

_TRACEPARENT = re.compile(rb"(?!ff)([0-9a-f]{2})-(?!0{32})([0-9a-f]{32})-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}(-.*)?")
_PROBLEM = b"application/problem+json"

Headers = Mapping[bytes, bytes]


def trace_id(headers: Headers) -> str | None:
    """The trace that a request belongs to, as 32 hex digits."""
    found = _TRACEPARENT.fullmatch(headers.get(b"traceparent", b""))
    # Later versions may append fields; this one has none.
    if found is None or (found[1] == b"00" and found[3] is not None):
        return None
    return found[2].decode()


def traced(headers: Headers, response: Response) -> Response:
    """The answer, with the trace id among the members of a problem."""
    trace = trace_id(headers)
    if trace is None or response.content_type != _PROBLEM:
        return response
    return replace(response, body=response.body[:-1] + b',"trace_id":"%b"}' % trace.encode())


def tracing(headers: Headers, reply: Reply) -> Reply:
    """`reply` for a request with a trace."""
    return lambda response: reply(traced(headers, response))


def fields(headers: Headers) -> dict[str, str]:
    """What a log line about a request says of its trace."""
    trace = trace_id(headers)
    return {"trace_id": trace} if trace else {}
