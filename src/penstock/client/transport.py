"""One connection to the API. Its only method posts bytes and returns what was answered; what that means is not known here."""

from __future__ import annotations

import http.client
from collections.abc import Mapping
from typing import Protocol

import msgspec

from penstock.access import Access, opened
from penstock.errors import HubUnavailable

ANSWER_BYTES_MAX = 16 << 20
"""Of a page that is no answer of ours there may be any number; ours name each rejected event."""


class Answer(msgspec.Struct, frozen=True):
    """An HTTP answer read to its end. Header names are lower-case."""

    status: int
    headers: Mapping[str, str]
    body: bytes


class Transport(Protocol):
    def post(self, body: bytes, headers: Mapping[str, str]) -> Answer:
        """Raises HubUnavailable when no whole answer came: the request may or may not have been carried out."""
        ...

    def close(self) -> None: ...


class HttpTransport:
    """A kept-alive HTTP/1.1 connection, used by one thread. Opens again by itself. Raises SettingsError for a wrong address."""

    def __init__(self, api: str | Access, *, path: str = "/v1/events", timeout_s: float) -> None:
        self._access = opened(api)
        self._connection = self._access.connection(timeout_s=timeout_s)
        self._path = self._access.base + path
        self._used = False

    def post(self, body: bytes, headers: Mapping[str, str]) -> Answer:
        # A server may close an idle connection just when the next request leaves. So a connection that has been used
        # gets one more try on a new one; that is safe because the batch carries its number.
        if self._used:
            try:
                return self._exchange(body, headers)
            except (OSError, http.client.HTTPException):
                self.close()
        try:
            return self._exchange(body, headers)
        except (OSError, http.client.HTTPException) as error:
            self.close()
            where = f"{self._connection.host}:{self._connection.port}"
            raise HubUnavailable(f"{where} gives no answer: {error or type(error).__name__}.") from error

    def _exchange(self, body: bytes, headers: Mapping[str, str]) -> Answer:
        self._connection.request("POST", self._path, body, {**headers, **self._access.headers()})
        with self._connection.getresponse() as response:
            fields = {name.lower(): value for name, value in response.getheaders()}
            answer = Answer(response.status, fields, response.read(ANSWER_BYTES_MAX))
            if response.length or response.read(1):
                raise http.client.HTTPException("the answer is cut short, or longer than any answer of Penstock")
        self._used = True
        return answer

    def close(self) -> None:
        self._used = False
        self._connection.close()
