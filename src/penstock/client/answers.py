"""What an answer means for the batch that was posted: the client's reaction table, a pure function.

    200 that echoes the batch and accounts for every event; 400 `no_valid_event`, likewise     Settled
    no answer, 408, 425, 429, 5xx, and what Penstock calls retryable (`body_mismatch`)          Again, same bytes and number
    413                                                                                         Split
    `number_reused`, `number_too_old`, `producer_fenced`                                        NewProducer, same bytes
    another code that Penstock refuses for good                                                 Refused
    401, 403, and whatever is not Penstock's: a portal's page, 3xx, a proxy's 404               Paused
    404, 405 of Penstock itself: the address is wrong, and no batch is to blame                 Paused

Only what Penstock itself says ends a batch. The rest keeps it, and says why it waits.
"""

from __future__ import annotations

import email.utils
import math
from collections.abc import Mapping
from datetime import UTC, datetime

import msgspec

from penstock.client.transport import Answer
from penstock.errors import BatchRefused

RETRY_AFTER_S = (1.0, 900.0)
_NEW_PRODUCER = frozenset(("number_reused", "number_too_old", "producer_fenced"))
_AGAIN = frozenset((408, 425, 429))
_NOT_THE_BATCH = frozenset((401, 403, 404, 405))


class Rejection(msgspec.Struct, frozen=True):
    """An event that is not stored: its place in the batch from 0, and why."""

    index: int
    code: str = ""
    detail: str = ""


class Settled(msgspec.Struct, frozen=True):
    """Every event is accepted or rejected. `stored`: the hub has the batch, and knows its number."""

    accepted: int
    duplicate: bool
    rejected: tuple[Rejection, ...]
    stored: bool


class Again(msgspec.Struct, frozen=True):
    """Post the same bytes under the same number, after `retry_after_s` if the server named a time."""

    why: str
    retry_after_s: float | None = None


class Paused(msgspec.Struct, frozen=True):
    """The same, but rarely: people have to do something first."""

    why: str


class Split(msgspec.Struct, frozen=True):
    """The batch is too large. `code` is Penstock's own, or empty: then even a single event is kept."""

    code: str
    detail: str


class NewProducer(msgspec.Struct, frozen=True):
    """The number is taken: post the same bytes as another producer."""

    code: str
    detail: str


class Refused(msgspec.Struct, frozen=True):
    """Penstock will never take this batch."""

    code: str
    detail: str


Reaction = Settled | Again | Paused | Split | NewProducer | Refused


class _Reply(msgspec.Struct):
    """A 200, or a problem: only what is looked at."""

    batch: str = ""
    accepted: int = 0
    duplicate: bool = False
    rejected: tuple[Rejection, ...] = ()
    code: str = ""
    detail: str = ""
    retryable: bool | None = None


def _codes(error: type[BatchRefused]) -> set[str]:
    return {error.code}.union(*(_codes(below) for below in error.__subclasses__()))


_KNOWN = frozenset(_codes(BatchRefused))


def reaction(answer: Answer, *, batch: str, events: int, now_ms: int) -> Reaction:
    """`batch` is `<producer>:<epoch>:<sequence>`, `events` how many it holds, `now_ms` the device's own time."""
    status = answer.status
    reply = _reply(answer)
    if reply and (settled := _settled(reply, status, batch, events)):
        return settled
    code = reply.code if reply and reply.code in _KNOWN else ""
    detail = reply.detail if reply and code else ""
    why = f"{status} {code}: {detail}" if code else f"{status}, and it is not one of Penstock's answers for this batch."
    if status == 413:
        return Split(code, detail or why)
    if code in _NEW_PRODUCER:
        return NewProducer(code, detail)
    if status in _AGAIN or 500 <= status <= 599 or (reply and code and reply.retryable):
        return Again(why, retry_after_s(answer.headers, now_ms))
    if status in _NOT_THE_BATCH or not code or status < 400 or not reply or reply.retryable is not False:
        return Paused(why)
    return Refused(code, detail)


def retry_after_s(headers: Mapping[str, str], now_ms: int) -> float | None:
    """Retry-After (RFC 9110, 10.2.3) as seconds within `RETRY_AFTER_S`; None if there is none or it cannot be read.

    A date is compared with the answer's own Date where it has one: the device's clock may be wrong by years.
    """
    text = headers.get("retry-after", "").strip()
    seconds = _number(text)
    if seconds is None:
        until = _date(text)
        if until is None:
            return None
        since = _date(headers.get("date", "")) or datetime.fromtimestamp(now_ms / 1000, UTC)
        seconds = (until - since).total_seconds()
    least, most = RETRY_AFTER_S
    return min(max(seconds, least), most)


def _number(text: str) -> float | None:
    try:
        number = float(text)
    except ValueError:
        return None
    return None if math.isnan(number) else number


def _date(text: str) -> datetime | None:
    try:
        parsed = email.utils.parsedate_to_datetime(text)
    except (ValueError, TypeError, OverflowError):
        return None
    return parsed.replace(tzinfo=UTC) if parsed.tzinfo is None else parsed


def _reply(answer: Answer) -> _Reply | None:
    """None for what is not an object of this API."""
    try:
        return msgspec.json.decode(answer.body, type=_Reply)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None


def _settled(reply: _Reply, status: int, batch: str, events: int) -> Settled | None:
    """Only an answer that accounts for each event of this very batch."""
    stored = status == 200
    if stored and (reply.batch != batch or reply.accepted < 1):
        return None
    if not stored and not (status == 400 and reply.code == "no_valid_event"):
        return None
    accepted = reply.accepted if stored else 0
    places = {rejection.index for rejection in reply.rejected}
    whole = accepted + len(reply.rejected) == events and len(places) == len(reply.rejected)
    if not whole or not all(0 <= index < events for index in places):
        return None
    return Settled(accepted, stored and reply.duplicate, reply.rejected, stored)
