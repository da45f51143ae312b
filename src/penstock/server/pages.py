"""The API's own pages: /openapi.json, and /docs and /docs/errors for people.

The pages are whole in themselves: nothing is loaded from elsewhere, nothing is run in the browser. /docs shows the OpenAPI
document and knows nothing more than that.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from html import escape
from http import HTTPStatus
from typing import Any, Final, NamedTuple

import msgspec

from penstock import __version__
from penstock.server.catalogue import EVENTS, REJECTED, SAYS, Entry, answered, raised
from penstock.server.message import Response, Right
from penstock.server.openapi import Described, Operation, document
from penstock.server.operations import DOCS, ERRORS, OPENAPI

_CODE = re.compile(r"`([^`]+)`")
_LINK = re.compile(r"\[([^\]]+)\]\(([^)]+)\)")
_EMPHASIS = re.compile(r"\*([^*]+)\*")
_HTML = b"text/html; charset=utf-8"
_NOTHING_ELSE: Final = (
    (b"Content-Security-Policy", b"default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; frame-ancestors 'none'"),
)  # fmt: skip
_STYLE: Final = """
:root { color-scheme: light dark; --text: #1c2128; --soft: #57606a; --ground: #fff; --panel: #f4f6f8; --line: #d5dbe1; --link: #0757b5; }
@media (prefers-color-scheme: dark) {
  :root { --text: #e3e8ee; --soft: #9aa5b1; --ground: #12161b; --panel: #1b2128; --line: #333c46; --link: #7ab7ff; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 60rem; padding: 1rem; background: var(--ground); color: var(--text);
  font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
a { color: var(--link); } h1, h2, h3 { line-height: 1.25; } h2 { margin-top: 2.5rem; } h3 { margin: 1.25rem 0 .25rem; font-size: 1rem; }
code, pre { font: .875rem/1.45 ui-monospace, monospace; } code { background: var(--panel); padding: .05rem .25rem; border-radius: .25rem; }
h2 code { font-size: 1.1rem; }
pre { background: var(--panel); padding: .75rem; border-radius: .375rem; white-space: pre-wrap; margin: .25rem 0 .75rem; }
pre code { background: none; padding: 0; }
section { border-top: 1px solid var(--line); }
p, ul { margin: .5rem 0; } ul { padding-left: 1.25rem; } nav ul { list-style: none; padding: 0; }
nav li { padding: .15rem 0; } dt { margin-top: .5rem; } dd { margin: 0 0 0 1.25rem; } .soft { color: var(--soft); font-size: .875rem; }
.method { font-weight: 700; margin-right: .4rem; } summary { cursor: pointer; padding: .25rem 0; } :target { scroll-margin-top: .5rem; }
section:target { outline: 2px solid var(--link); outline-offset: .5rem; }
"""


class Page(NamedTuple):
    """A route that has the same answer for everyone."""

    method: bytes
    path: bytes
    right: Right
    about: Operation
    answer: Response


def pages(routes: Iterable[Described], *, open_to_anyone: bool) -> list[Page]:
    """The pages that describe these routes and themselves."""
    empty = [
        Page(b"GET", path, Right.NONE, about, Response(200, b""))
        for path, about in ((b"/openapi.json", OPENAPI), (b"/docs", DOCS), (b"/docs/errors", ERRORS))
    ]
    told = document([*routes, *empty], version=__version__, open_to_anyone=open_to_anyone)
    encoded = msgspec.json.encode(told)
    plain = msgspec.json.decode(encoded)
    answers = (
        Response(200, encoded),
        Response(200, docs(plain).encode(), _HTML, _NOTHING_ELSE),
        Response(200, errors().encode(), _HTML, _NOTHING_ELSE),
    )
    return [page._replace(answer=answer) for page, answer in zip(empty, answers, strict=True)]


def docs(told: Mapping[str, Any]) -> str:
    """The OpenAPI document as a page."""
    info = told["info"]
    every = [
        (method.upper(), path, about) for path, methods in told["paths"].items() for method, about in methods.items()
    ]
    index = "".join(
        f'<li><a href="#{about["operationId"]}"><span class="method">{method}</span>{escape(path)}</a> '
        f'<span class="soft">{_inline(about["summary"])}</span></li>'
        for method, path, about in every
    )
    keys = "".join(
        f"<dt><code>{escape(name)}</code></dt><dd>{_inline(scheme['description'])}</dd>"
        for name, scheme in told["components"]["securitySchemes"].items()
    )
    return _page(
        f"{info['title']} {info['version']}",
        f"{_prose(info['description'])}"
        '<p><a href="openapi.json">openapi.json</a> · <a href="docs/errors">errors</a></p>'
        f"<nav><ul>{index}</ul></nav>"
        + "".join(_operation(method, path, about) for method, path, about in every)
        + f"<h2>Keys</h2><dl>{keys}</dl>"
        + "<h2>Shapes</h2>"
        + "".join(_shape(name, schema) for name, schema in told["components"]["schemas"].items()),
    )


def errors() -> str:
    """Every error, each at a place of its code."""
    answers = "".join(_error(entry) for entry in answered())
    events = "".join(
        f'<section id="event-{code}"><h3><code>{code}</code></h3>{_prose(text)}</section>'
        for code, text in EVENTS.items()
    )
    others = "".join(_error(entry) for entry in raised())
    return _page(
        "Errors of Penstock",
        "".join(map(_prose, SAYS))
        + f"<h2>What the API answers</h2>{answers}"
        + f"<h2>Events that are rejected</h2>{_prose(REJECTED)}{events}"
        + f"<h2>What only Python code sees</h2>{others}",
    )


def _page(title: str, body: str) -> str:
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head><body><h1>{escape(title)}</h1>{body}</body></html>\n"
    )


def _error(entry: Entry) -> str:
    facts = [f"status {entry.status}", "retryable" if entry.retryable else "not retryable"]
    facts += [f"stored: {entry.stored}"] * bool(entry.stored) + ["Retry-After"] * entry.retry_after
    return (
        f'<section id="{entry.code}"><h3><code>{entry.code}</code> {escape(entry.title)}</h3>'
        f'<p class="soft">{" · ".join(facts)} · <code>{entry.name}</code> in Python</p>{_prose(entry.text)}</section>'
    )


def _operation(method: str, path: str, about: Mapping[str, Any]) -> str:
    parts = [
        f'<section id="{about["operationId"]}"><h2><span class="method">{method}</span><code>{escape(path)}</code></h2>'
        f"<p><strong>{_inline(about['summary'])}</strong></p>{_prose(about['description'])}"
    ]
    if about["parameters"]:
        parts.append(f"<h3>Parameters</h3><dl>{''.join(map(_parameter, about['parameters']))}</dl>")
    for media_type, body in about.get("requestBody", {}).get("content", {}).items():
        parts.append(f"<h3>Body: {escape(media_type)}</h3>{_example(body['example'])}")
    parts += [_answer(status, answer) for status, answer in about["responses"].items()]
    return "".join((*parts, "</section>"))


def _parameter(parameter: Mapping[str, Any]) -> str:
    needed = "required" if parameter["required"] else "may be left out"
    return (
        f'<dt><code>{escape(parameter["name"])}</code> <span class="soft">{parameter["in"]}, {_kind(parameter["schema"])}, {needed}; '
        f"for instance <code>{escape(str(parameter['example']))}</code></span></dt><dd>{_inline(parameter['description'])}</dd>"
    )


def _answer(status: str, answer: Mapping[str, Any]) -> str:
    shown = "".join(
        f'<p class="soft">{escape(name)}: {_inline(header["description"])}</p>'
        for name, header in answer.get("headers", {}).items()
    )
    for media_type, body in answer.get("content", {}).items():
        shown += f'<p class="soft">{escape(media_type)}: {_kind(body["schema"])}</p>{_example(body.get("example", ""))}'
    is_open = " open" if status.startswith("2") else ""
    phrase = HTTPStatus(int(status)).phrase
    return f"<details{is_open}><summary><strong>{status}</strong> {phrase}</summary>{_prose(answer['description'])}{shown}</details>"


def _example(example: object) -> str:
    if example == "":
        return ""
    if isinstance(example, str):
        return f"<pre>{escape(example)}</pre>"
    return f"<pre>{escape(msgspec.json.format(msgspec.json.encode(example), indent=2).decode())}</pre>"


def _shape(name: str, schema: Mapping[str, Any]) -> str:
    fields = "".join(
        f'<dt><code>{escape(field)}</code> <span class="soft">{_kind(kind)}</span></dt>'
        for field, kind in schema.get("properties", {}).items()
    )
    return f'<section id="{escape(name)}"><h3>{escape(name)}</h3>{_prose(schema.get("description", ""))}<dl>{fields}</dl></section>'


def _kind(schema: Mapping[str, Any]) -> str:
    """A schema in a few words."""
    if "$ref" in schema:
        name = escape(schema["$ref"].rpartition("/")[2])
        return f'<a href="#{name}">{name}</a>'
    several = schema.get("anyOf") or schema.get("oneOf") or schema.get("allOf")
    if several:
        return " or ".join(map(_kind, several))
    if "enum" in schema:
        return " | ".join(escape(str(one)) for one in schema["enum"])
    words = str(schema.get("type", "anything"))
    if words == "array":
        words += f" of {_kind(schema.get('items', {}))}"
    elif "additionalProperties" in schema:
        words += f" of {_kind(schema['additionalProperties'])}"
    if "minimum" in schema and "maximum" in schema:
        words += f" {schema['minimum']} … {schema['maximum']}"
    return words


def _prose(text: str) -> str:
    """Paragraphs, lists of `- `, `code` and *emphasis*: as much of Markdown as descriptions use."""
    return "".join(_blocks(text))


def _blocks(text: str) -> Iterator[str]:
    for block in filter(None, text.split("\n\n")):
        lines = block.split("\n")
        if all(line.startswith("- ") for line in lines):
            yield f"<ul>{''.join(f'<li>{_inline(line[2:])}</li>' for line in lines)}</ul>"
        else:
            yield f"<p>{_inline(' '.join(lines))}</p>"


def _inline(text: str) -> str:
    linked = _LINK.sub(r'<a href="\2">\1</a>', escape(text))
    return _EMPHASIS.sub(r"<em>\1</em>", _CODE.sub(r"<code>\1</code>", linked))
