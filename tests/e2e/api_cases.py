"""What schemathesis must know of the API beside /openapi.json. Read by its command (`SCHEMATHESIS_HOOKS`), not by pytest.

The document cannot say that a header has the sha256 of the body, that a body is zipped as a header says, that an offset must be one of
the log: a case that is meant to be right is made so here. And a batch that holds something wrong is refused *event by event*:
that is a refusal too.
"""

from __future__ import annotations

import gzip
import hashlib
import itertools
import json
import os
import re
from pathlib import Path
from typing import Any

import requests
import schemathesis
import zstandard
from schemathesis import Case, CheckContext, HookContext, Response

NDJSON, JSON = "application/x-ndjson", "application/json"
ZIP = {"gzip": gzip.compress, "zstd": zstandard.compress, "identity": bytes}
CASES = itertools.count(1)


@schemathesis.serializer(NDJSON)
def lines(_context: object, value: object) -> bytes:
    return value if isinstance(value, bytes) else str(value).encode("utf-8", "surrogatepass")


@schemathesis.deserializer(NDJSON, "application/vnd.penstock.frames", "text/html")
def text(_context: object, response: Response) -> str:
    return response.content.decode("latin-1")


@schemathesis.hook
def before_call(_context: HookContext, case: Case, kwargs: dict[str, Any]) -> None:
    """What is sent is changed and not the case: the checks go by what it was meant to be."""
    if case.meta is not None and case.meta.generation.mode.is_positive:
        kwargs["auth"] = lambda request: made_right(request, case)


def made_right(request: requests.PreparedRequest, case: Case) -> requests.PreparedRequest:
    """`requests` lets one change a request last of all."""
    headers = {name.lower(): str(value) for name, value in case.headers.items()}
    # Some cases that are called right have a text in a header that is not what its pattern says: they go without.
    if takes_events(case):
        body = batch(case, headers)
        request.prepare_body(body, None)
        number = re.search(";epoch=.*sha256=", headers.get("penstock-producer", ""))
        sent = f"case-{next(CASES)}{number[0]}{hashlib.sha256(body).hexdigest()}" if number else None
        request.prepare_headers(with_header(request, "Penstock-Producer", sent))
        if "idempotency-key" in headers:  # not with a number, and not one that other bytes have had
            request.prepare_headers(with_header(request, "Idempotency-Key", None if sent else f"case-{next(CASES)}"))
    if "penstock-group" in headers:
        # A group of its own, that no other case has shut out, and no further than the log may be.
        epoch = re.search(";epoch=[0-9]+;", headers["penstock-group"])
        sent = f"case-{next(CASES)}{epoch[0]}checkpoint=0" if epoch else None
        request.prepare_headers(with_header(request, "Penstock-Group", sent))
    if str(case.query.get("from", "")).isdigit():
        request.prepare_url(str(request.url).partition("?")[0], {**case.query, "from": "0"})
    return request


def with_header(request: requests.PreparedRequest, name: str, value: str | None) -> dict[str, str]:
    headers = {known: text for known, text in request.headers.items() if known.lower() != name.lower()}
    return headers if value is None else {**headers, name: value}


def batch(case: Case, headers: dict[str, str]) -> bytes:
    """The case's body, with the device where the case's path and headers say that it is, and zipped as they say."""
    field = headers.get("penstock-device-field", "deviceId")
    if case.media_type == NDJSON:
        events: Any = [{"deviceId": "d-1", "text": str(case.body)}]
    else:
        events = case.body if isinstance(case.body, list) else [case.body]
    if "device" in case.path_parameters:
        events = [{name: value for name, value in event.items() if name != field} for event in events]
    else:
        events = [{**event, field: event["deviceId"]} for event in events]
    encoded = [json.dumps(event) for event in events]
    text = "\n".join(encoded) if case.media_type == NDJSON else f"[{','.join(encoded)}]"
    return ZIP[headers.get("content-encoding", "identity")](text.encode())


@schemathesis.hook
def after_call(_context: HookContext, case: Case, response: Response) -> None:
    """Every answer is noted down for the test that started this."""
    with Path(os.environ["PENSTOCK_ANSWERS"]).open("a") as notes:
        notes.write(f"{case.operation.definition.raw['operationId']} {response.status_code}\n")


@schemathesis.hook
def filter_failure(_context: HookContext, failure: Exception, case: Case, response: Response) -> bool:
    """An event that is no event is named in `rejected`, while the others of its batch are stored."""
    return not (type(failure).__name__ == "AcceptedNegativeData" and takes_events(case) and rejected(response))


def takes_events(case: Case) -> bool:
    return case.path.endswith("/events") and case.method == "POST"


def rejected(response: Response) -> list[dict[str, object]]:
    found = json.loads(response.content).get("rejected", [])
    assert isinstance(found, list)
    return found


@schemathesis.check
def every_event_is_accounted_for(_context: CheckContext, response: Response, case: Case) -> None:
    """Of a batch that was made right nothing is rejected; of any, each event is accepted or rejected, once."""
    if not takes_events(case) or response.status_code != 200:
        return
    answer = json.loads(response.content)
    assert answer.keys() == {"batch", "accepted", "duplicate", "rejected"}
    indices = [one["index"] for one in answer["rejected"]]
    assert answer["accepted"] >= 1 and len(set(indices)) == len(indices)
    if case.meta is not None and case.meta.generation.mode.is_positive:
        assert not indices, answer["rejected"]


@schemathesis.check
def refusals_are_explained(_context: CheckContext, response: Response, _case: Case) -> None:
    """Each error has a place on the page of errors, and says in a sentence what it is."""
    if response.status_code < 400 or response.request.method == "HEAD":
        return
    problem = json.loads(response.content)
    origin = response.request.url.split("/", 3)[:3]
    page = explained("/".join(origin))
    assert f'id="{problem["code"]}"' in page and problem["detail"].endswith((".", "…")), problem


PAGES: dict[str, str] = {}


def explained(origin: str) -> str:
    if origin not in PAGES:
        PAGES[origin] = requests.get(f"{origin}/docs/errors", timeout=10).text
    return PAGES[origin]
