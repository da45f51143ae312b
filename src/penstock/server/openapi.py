"""The API as an OpenAPI 3.1 document, written out by its routes.

    Operation       what a route takes and answers, beside method, path and right, which the route has itself (operations.py)
    document()      routes → the document: paths, schemas, security, and for each route the errors that any request may get

Schemas of answers are those of the types that the answers are made of (answers.py, status.py). An error is listed by its class:
status, code and an example come from there.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any, Final, Literal, NamedTuple, Protocol

import msgspec

from penstock.errors import (
    BadHeader,
    BodyTooLarge,
    Draining,
    ExpectationFailed,
    Forbidden,
    HeaderTooLarge,
    HubBusy,
    InternalError,
    LengthRequired,
    PenstockError,
    RequestTimeout,
    Unauthenticated,
    UriTooLong,
)
from penstock.server.answers import Problem
from penstock.server.catalogue import meaning
from penstock.server.message import Right

PROBLEM: Final = "application/problem+json"
ANY_REQUEST: Final = (
    BadHeader,
    RequestTimeout,
    BodyTooLarge,
    UriTooLong,
    ExpectationFailed,
    HeaderTooLarge,
    InternalError,
    HubBusy,
    Draining,
)
"""What a connection may answer before a route sees the request."""

_SCHEMAS = "#/components/schemas/"

Schema = Mapping[str, Any]
Shape = type | Schema
Kind = type[PenstockError]


class Parameter(NamedTuple):
    """Part of a request beside its body. Those in the path are required."""

    name: str
    place: Literal["path", "query", "header"]
    text: str
    schema: Schema
    example: object
    required: bool = False


class Body(NamedTuple):
    """A body of a request or an answer, in one of the media types that it may have. `example` is its text, or what JSON makes of it."""

    media_type: str
    shape: Shape
    example: object


class Header(NamedTuple):
    name: str
    text: str
    schema: Schema


class Operation(NamedTuple):
    """A route as it is told. `name` is its operationId; `errors` are those that are its own, beside those of any request."""

    name: str
    summary: str
    text: str
    answer: str
    answers: Sequence[Body]
    parameters: Sequence[Parameter] = ()
    bodies: Sequence[Body] = ()
    headers: Sequence[Header] = ()
    errors: Sequence[Kind] = ()
    status: int = 200


class Described(Protocol):
    """A route, as far as this module looks at it."""

    @property
    def method(self) -> bytes: ...
    @property
    def path(self) -> bytes: ...
    @property
    def right(self) -> Right: ...
    @property
    def about(self) -> Operation | None: ...


def document(routes: Iterable[Described], *, version: str, open_to_anyone: bool) -> dict[str, Any]:
    """The OpenAPI document of these routes; those without a description are left out.

    `open_to_anyone`: the installation asks for no key.
    """
    described = [(route, route.about) for route in routes if route.about]
    bodies = [body for _, about in described for body in (*about.bodies, *about.answers)]
    types: list[type] = [Problem, *(body.shape for body in bodies if isinstance(body.shape, type))]
    _, schemas = msgspec.json.schema_components(types, ref_template=_SCHEMAS + "{name}")
    kinds = {kind for route, about in described for kind in _kinds(route, about)}
    paths: dict[str, dict[str, Any]] = {}
    for route, about in described:
        path = paths.setdefault(route.path.decode(), {})
        path[route.method.decode().lower()] = _operation(route, about, open_to_anyone)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Penstock",
            "version": version,
            "summary": "Takes in the events of very many devices.",
            "description": "Events in with POST, answered when they are on disk; everything else is for those who read or look after "
            "the hub. Errors are problems (RFC 9457) with a `code`: /docs/errors says of each what was kept and what to do.",
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "servers": [{"url": "/"}],
        "paths": paths,
        "components": {
            "schemas": schemas,
            "examples": {kind.code: _example(kind) for kind in sorted(kinds, key=_place)},
            "securitySchemes": _SECURITY,
        },
    }


_SECURITY: Final = {
    "key": {"type": "http", "scheme": "bearer", "description": "`Authorization: Bearer <kid>.<secret>`"},
    "sas": {
        "type": "apiKey",
        "in": "header",
        "name": "Authorization",
        "description": "A token as Azure Event Hubs has it: `SharedAccessSignature sr=…&sig=…&se=…&skn=…`",
    },
}


def rights(right: Right) -> list[str]:
    """The names of these rights; one of them is enough."""
    return [one.name.lower() for one in right if one.name]


def _operation(route: Described, about: Operation, open_to_anyone: bool) -> dict[str, Any]:
    needed = rights(route.right)
    text = about.text
    if needed:
        wanted = f"with the right to {' or '.join(needed)}."
        here = (
            f"This installation asks for no key; others want one {wanted}"
            if open_to_anyone
            else f"Needs a key {wanted}"
        )
        text = f"{text}\n\n{here}"
    told: dict[str, Any] = {
        "operationId": about.name,
        "summary": about.summary,
        "description": text.strip(),
        "parameters": [_parameter(parameter) for parameter in about.parameters],
    }
    if about.bodies:
        told["requestBody"] = {"required": True, "content": _content(about.bodies)}
    told["responses"] = {str(about.status): _answer(about), **dict(_errors(_kinds(route, about)))}
    told["security"] = [{scheme: needed} for scheme in _SECURITY] + [{}] * open_to_anyone if needed else []
    return told


def _parameter(parameter: Parameter) -> dict[str, Any]:
    return {
        "name": parameter.name,
        "in": parameter.place,
        "required": parameter.required or parameter.place == "path",
        "description": parameter.text,
        "schema": parameter.schema,
        "example": parameter.example,
    }


def _content(bodies: Iterable[Body]) -> dict[str, Any]:
    return {body.media_type: {"schema": _schema(body.shape), "example": body.example} for body in bodies}


def _schema(shape: Shape) -> Schema:
    return {"$ref": _SCHEMAS + shape.__name__} if isinstance(shape, type) else shape


def _answer(about: Operation) -> dict[str, Any]:
    told: dict[str, Any] = {"description": about.answer}
    if about.headers:
        told["headers"] = {
            header.name: {"description": header.text, "required": True, "schema": header.schema}
            for header in about.headers
        }
    if about.answers:
        told["content"] = _content(about.answers)
    return told


def _kinds(route: Described, about: Operation) -> set[Kind]:
    """The errors that a route may answer."""
    kinds = {*ANY_REQUEST, *about.errors, *((Unauthenticated, Forbidden) if route.right else ())}
    return kinds | {LengthRequired} if route.method in (b"POST", b"PUT") else kinds


def _place(kind: Kind) -> tuple[int, str]:
    return kind.status, kind.code


def _errors(kinds: Iterable[Kind]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The answers of errors, by status."""
    for status, group in groupby(sorted(kinds, key=_place), key=lambda kind: kind.status):
        same = list(group)
        told: dict[str, Any] = {
            "description": "\n".join(f"- [{kind.code}](docs/errors#{kind.code}): {meaning(kind)}" for kind in same),
            "content": {
                PROBLEM: {
                    "schema": {
                        "allOf": [{"$ref": _SCHEMAS + Problem.__name__}],
                        "properties": {"status": {"const": status}, "code": {"enum": [kind.code for kind in same]}},
                    },
                    "examples": {kind.code: {"$ref": f"#/components/examples/{kind.code}"} for kind in same},
                }
            },
        }
        if status in (429, 503):
            told["headers"] = {
                "Retry-After": {
                    "description": "Seconds; nothing is gained by coming earlier.",
                    "required": True,
                    "schema": {"type": "integer", "minimum": 1},
                }
            }
        yield str(status), told


def _example(kind: Kind) -> dict[str, Any]:
    shown = Problem(f"/docs/errors#{kind.code}", kind.title, kind.status, kind.code, meaning(kind), kind.retryable)
    return {"summary": kind.title, "value": shown}
