"""What clients do that they should not, on connections of their own: leave in the middle of a request, or take ages over it."""

from __future__ import annotations

import contextlib
import http.client
import threading
from collections.abc import Mapping
from typing import Protocol

from penstock.access import Access, opened
from penstock.client.transport import Answer
from penstock.clock import Clock
from penstock.errors import HubUnavailable

_PARTS = 4
_PAUSE_S = 0.05


class Misconduct(Protocol):
    """The two things that a well-behaved transport cannot do."""

    def leave(self, body: bytes, headers: Mapping[str, str], *, after_bytes: int) -> None:
        """Close after so much of the body; after all of it, the request stands, and nobody waits for its answer."""
        ...

    def dawdle(self, body: bytes, headers: Mapping[str, str]) -> Answer:
        """Post it in small parts with pauses. Raises HubUnavailable."""
        ...


class HttpMisconduct:
    """The same over HTTP."""

    def __init__(self, api: str | Access, *, path: str = "/v1/events", timeout_s: float, clock: Clock) -> None:
        self._access = opened(api)
        self._path = path
        self._timeout_s = timeout_s
        self._clock = clock

    def leave(self, body: bytes, headers: Mapping[str, str], *, after_bytes: int) -> None:
        # Whether it got as far as that does not matter: nobody is there to be told.
        with (
            contextlib.suppress(OSError, http.client.HTTPException),
            contextlib.closing(self._begin(body, headers)) as to,
        ):
            to.send(body[:after_bytes])

    def dawdle(self, body: bytes, headers: Mapping[str, str]) -> Answer:
        never = threading.Event()
        size = len(body) // _PARTS + 1
        try:
            with contextlib.closing(self._begin(body, headers)) as to:
                for at in range(0, len(body), size):
                    self._clock.wait(never, _PAUSE_S)
                    to.send(body[at : at + size])
                with to.getresponse() as response:
                    fields = {name.lower(): value for name, value in response.getheaders()}
                    return Answer(response.status, fields, response.read())
        except (OSError, http.client.HTTPException) as error:
            raise HubUnavailable(f"A slow request got no answer: {error or type(error).__name__}.") from error

    def _begin(self, body: bytes, headers: Mapping[str, str]) -> http.client.HTTPConnection:
        to = self._access.connection(timeout_s=self._timeout_s)
        to.putrequest("POST", self._access.base + self._path)
        for name, value in {**headers, **self._access.headers(), "Content-Length": str(len(body))}.items():
            to.putheader(name, value)
        to.endheaders()
        return to
