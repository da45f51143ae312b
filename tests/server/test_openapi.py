"""The description of the API: every route is in it, it is OpenAPI 3.1, and its pages are whole in themselves.

That it is true is for tests/e2e/test_openapi.py.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from html.parser import HTMLParser
from typing import Any

import jsonschema
import msgspec
import pytest
from openapi_spec_validator import OpenAPIV31SpecValidator

from penstock.errors import Unauthenticated
from penstock.server.app import Route, Router, Where, routes, with_pages
from penstock.server.message import Grant, Request, Response, Right
from tests.server.test_app import Api

PAGES = ("/openapi.json", "/docs", "/docs/errors")


def refuse(_request: Request) -> Grant:
    raise Unauthenticated("No key.")


class NoUnits:
    """For their routes alone."""

    def get(self, _request: Request, _names: tuple[str, ...]) -> Response:
        raise AssertionError

    put = get


class Listener:
    """What one port serves, with its pages."""

    def __init__(self, where: Where, *, keys: bool = False, more: Sequence[Route] = ()) -> None:
        api = Api()
        served = [route for route in routes(api.intake, api.reads, api._run, NoUnits()) if where in route.where]
        served.extend(more)
        self.routes = with_pages(served, where, refuse) if keys else with_pages(served, where)
        self.router = Router(self.routes, refuse) if keys else Router(self.routes)

    def get(self, path: str) -> Response:
        answers: list[Response] = []
        self.router(Request(b"GET", path.encode(), b"", {}, b""), answers.append)
        return answers[0]

    @property
    def document(self) -> dict[str, Any]:
        found: dict[str, Any] = msgspec.json.decode(self.get("/openapi.json").body)
        return found


@pytest.fixture(scope="module", params=[Where.LISTEN, Where.ADMIN], ids=["listen", "admin"])
def listener(request: pytest.FixtureRequest) -> Listener:
    return Listener(request.param)


def test_every_route_is_described(listener: Listener) -> None:
    assert [route.path for route in listener.routes if route.about is None] == []
    paths = listener.document["paths"]
    told = {(method.upper(), path) for path, methods in paths.items() for method in methods}
    assert told == {(route.method.decode(), route.path.decode()) for route in listener.routes}


def test_a_route_without_a_description_is_not_made_up(listener: Listener) -> None:
    bare = Route(b"GET", b"/v1/new", listener.routes[0].action, Where.LISTEN)
    assert "/v1/new" not in Listener(Where.LISTEN, more=(bare,)).document["paths"]
    described = bare._replace(about=listener.routes[0].about)
    assert "/v1/new" in Listener(Where.LISTEN, more=(described,)).document["paths"]


def test_it_is_openapi(listener: Listener) -> None:
    assert listener.document["openapi"].startswith("3.1")
    assert [str(error) for error in OpenAPIV31SpecValidator(listener.document).iter_errors()] == []


def operations(document: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    return [(path, about) for path, methods in document["paths"].items() for about in methods.values()]


def test_names_in_paths_are_parameters_and_operations_have_names_of_their_own(listener: Listener) -> None:
    every = operations(listener.document)
    for path, about in every:
        named = [one["name"] for one in about["parameters"] if one["in"] == "path"]
        assert named == re.findall(r"\{(\w+)\}", path)
    assert max(Counter(about["operationId"] for _, about in every).values()) == 1


def test_examples_are_what_their_schemas_say(listener: Listener) -> None:
    document = listener.document

    def check(example: object, schema: dict[str, Any]) -> None:
        whole = {**schema, "components": document["components"]}
        jsonschema.Draft202012Validator(whole).validate(example)

    for _, about in operations(document):
        for parameter in about["parameters"]:
            if parameter["name"] != "Penstock-Producer":  # with `after`, which may be left out
                check(parameter["example"], parameter["schema"])
        contents = [about.get("requestBody", {}), *about["responses"].values()]
        for media in (media for content in contents for media in content.get("content", {}).values()):
            names = [one["$ref"].rpartition("/")[2] for one in media.get("examples", {}).values()]
            examples = [document["components"]["examples"][name]["value"] for name in names] or [media["example"]]
            for example in examples:
                check(example, media["schema"])


def test_who_may_is_told(listener: Listener) -> None:
    where = Where.LISTEN if "/v1/events" in listener.document["paths"] else Where.ADMIN
    for document, anyone in ((listener.document, True), (Listener(where, keys=True).document, False)):
        for route in listener.routes:
            about = document["paths"][route.path.decode()][route.method.decode().lower()]
            assert bool(about["security"]) == bool(route.right)
            assert ({} in about["security"]) == (anyone and bool(route.right))
            assert ({"401", "403"} <= about["responses"].keys()) == bool(route.right)
            for right in (one for one in Right if one in route.right):
                assert str(right.name).lower() in about["description"]


@pytest.mark.parametrize("path", PAGES)
def test_the_pages_are_open_without_a_key(path: str) -> None:
    for where in (Where.LISTEN, Where.ADMIN):
        guarded = Listener(where, keys=True)
        assert guarded.get("/v1/status").status == 401
        assert guarded.get(path).status == 200


class Page(HTMLParser):
    """Refuses what is not closed; keeps ids, links and whatever could load something."""

    VOID = ("meta", "br")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.ids: list[str] = []
        self.links: list[str] = []
        self.attributes: set[str] = set()
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.tags.add(tag)
        self.attributes |= given.keys()
        self.ids += [value for name, value in attrs if name == "id" and value]
        self.links += [value for name, value in attrs if name == "href" and value]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def page(listener: Listener, path: str) -> Page:
    answer = listener.get(path)
    assert (answer.status, answer.content_type) == (200, b"text/html; charset=utf-8")
    assert b"default-src 'none'" in dict(answer.headers)[b"Content-Security-Policy"]
    return Page(answer.body.decode())


@pytest.mark.parametrize("path", ["/docs", "/docs/errors"])
def test_a_page_is_whole_in_itself(listener: Listener, path: str) -> None:
    text, shown = listener.get(path).body.decode(), page(listener, path)
    assert not shown.tags & {"script", "link", "img", "iframe", "object", "embed", "base", "form"}
    assert not shown.attributes & {"src", "srcset", "onload", "onclick"}
    assert "@import" not in text and "url(" not in text
    assert "prefers-color-scheme: dark" in text and 'name="viewport"' in text
    assert max(Counter(shown.ids).values()) == 1


def test_links_lead_somewhere(listener: Listener) -> None:
    docs, errors = page(listener, "/docs"), page(listener, "/docs/errors")
    for link in {*docs.links, *errors.links}:
        path, _, anchor = link.partition("#")
        assert path in ("", "openapi.json", "docs/errors"), link
        assert not anchor or anchor in (errors if path else docs).ids, link


def test_every_operation_and_every_error_has_its_place(listener: Listener) -> None:
    document = listener.document
    assert {about["operationId"] for _, about in operations(document)} <= set(page(listener, "/docs").ids)
    types = {one["value"]["type"] for one in document["components"]["examples"].values()}
    assert types and {name.removeprefix("/docs/errors#") for name in types} <= set(page(listener, "/docs/errors").ids)


def test_text_is_escaped() -> None:
    text = Listener(Where.LISTEN).get("/docs").body.decode()
    assert "&lt;id&gt;;epoch=" in text and "<id>" not in text
