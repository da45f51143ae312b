"""Errors as answers: the one place where an error becomes `application/problem+json` (RFC 9457)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import cast

import msgspec

from penstock.errors import (
    InternalError,
    MethodNotAllowed,
    NotConfirmed,
    PenstockError,
    Unauthenticated,
    UnsupportedEncoding,
    UnsupportedType,
)
from penstock.server.message import Response

_encode = msgspec.json.Encoder(enc_hook=str).encode


def problem(error: PenstockError) -> Response:
    """The answer for an error: its data become members of the problem, and headers where HTTP has one for them."""
    body = {
        "type": f"/docs/errors#{error.code}",
        "title": error.title,
        "status": error.status,
        "code": error.code,
        "detail": error.detail,
        "retryable": error.retryable,
        **error.fields,
    }
    return Response(error.status, _encode(body), b"application/problem+json", _headers(error))


def unexpected(error: BaseException) -> InternalError:
    """The error for what no part of Penstock raises on purpose. The caller logs it; clients learn only its kind."""
    return InternalError(f"The server failed on this request ({type(error).__name__}); its log says where.")


def _headers(error: PenstockError) -> tuple[tuple[bytes, bytes], ...]:
    if isinstance(error, NotConfirmed) or "retry_after_s" in error.fields:
        after_s = cast(float, error.fields.get("retry_after_s", 1))
        return ((b"Retry-After", b"%d" % max(1, math.ceil(after_s))),)
    if isinstance(error, Unauthenticated):
        return ((b"WWW-Authenticate", b"Bearer, SharedAccessSignature"),)
    if isinstance(error, MethodNotAllowed):
        return ((b"Allow", _names(error, "allow")),)
    if isinstance(error, UnsupportedEncoding):
        return ((b"Accept-Encoding", _names(error, "supported")),)
    if isinstance(error, UnsupportedType):
        return ((b"Accept", _names(error, "supported")),)
    return ()


def _names(error: PenstockError, field: str) -> bytes:
    return ", ".join(cast(Sequence[str], error.fields.get(field, ()))).encode()
