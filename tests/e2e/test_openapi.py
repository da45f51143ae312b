"""The API against its own description: schemathesis sends what /openapi.json allows and what it does not, to both ports."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.e2e.http_client import request
from tests.e2e.system import PROJECT, SEED, System

# Of each operation that has parameters; together more than REQUESTS_MIN requests.
EXAMPLES = int(os.environ.get("PENSTOCK_EXAMPLES", "150"))
REQUESTS_MIN = 2000


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    system = System(tmp_path_factory.mktemp("openapi"), partitions=4, workers=1, period="1h")
    try:
        yield system.start()
    finally:
        system.close()


class Run:
    """One run of schemathesis, all checks."""

    def __init__(self, folder: Path, document: str, *options: str, examples: int = EXAMPLES) -> None:
        notes = folder / "answers"
        done = subprocess.run(
            [
                *(
                    sys.executable,
                    "-m",
                    "schemathesis.cli",
                    "run",
                    document,
                    "--checks",
                    "all",
                    "--continue-on-failure",
                ),
                *("--seed", str(SEED), "--max-examples", str(examples), "--generation-database", "none", "--no-color"),
                # Any text is an event there, so nothing that is wrong could be made up: tests/e2e/test_event_hubs.py has recorded requests.
                *("--exclude-path-regex", "^/{hub}/"),
                *options,
            ],
            cwd=folder,  # where it keeps what it found
            env={
                **os.environ,
                "PYTHONPATH": str(PROJECT),
                "SCHEMATHESIS_HOOKS": "tests.e2e.api_cases",
                "PENSTOCK_ANSWERS": str(notes),
            },
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
        )
        self.code = done.returncode
        self.text = done.stdout + done.stderr
        assert notes.exists(), self.text[-4000:]
        self.answers = Counter(tuple(line.split()) for line in notes.read_text().splitlines())


def know_something(system: System) -> None:
    """The producer and the group that the description has for examples."""
    body = b'{"deviceId":"d-1"}'
    number = f"gateway-7;epoch=1;sequence=1;sha256={hashlib.sha256(body).hexdigest()}"
    assert request(system.url, "POST", "/v1/events", body, {"Penstock-Producer": number}).status == 200
    group = {"Penstock-Group": "alarms;epoch=1;checkpoint=0"}
    assert request(system.url, "GET", "/v1/partitions/0", headers=group).status == 200


def test_whatever_is_sent_the_answer_is_the_one_that_is_described(system: System, tmp_path: Path) -> None:
    folders = [tmp_path / "listen", tmp_path / "admin"]
    for folder in folders:
        folder.mkdir()
    know_something(system)
    with ThreadPoolExecutor(2) as both:
        urls = (f"{url}/openapi.json" for url in (system.url, system.admin))
        runs = list(both.map(Run, folders, urls))
    assert [run.code for run in runs] == [0, 0], "\n".join(run.text[-6000:] for run in runs if run.code)
    answers = sum((run.answers for run in runs), Counter())
    assert answers.total() >= REQUESTS_MIN
    # Each operation has also done what it is for, so that this answer was looked at too; and none has failed.
    named = {name for name, _ in answers}
    assert {name for name, status in answers if status == "200"} == named
    assert not [status for _, status in answers if status.startswith("5")]
    print(f"\nschemathesis: {answers.total()} requests to {len(named)} operations")
    log = system.up.text()
    assert '"level":"error"' not in log and "Traceback" not in log, log[-4000:]
    system.settle()


def test_a_description_that_is_wrong_is_found(system: System, tmp_path: Path) -> None:
    told = json.loads(system.get("/openapi.json")[1])
    told["components"]["schemas"]["Partition"]["required"].append("colour")
    del told["paths"]["/v1/partitions/{n}"]["get"]["responses"]["404"]
    parameters = told["paths"]["/v1/partitions/{n}/events"]["get"]["parameters"]
    next(one for one in parameters if one["name"] == "limit")["schema"]["maximum"] = 10_001
    (tmp_path / "wrong.json").write_text(json.dumps(told))
    options = ("--url", system.url, "--include-path-regex", "^/v1/partitions/{n}(/events)?$", "--phases", "coverage")
    run = Run(tmp_path, "wrong.json", *options, examples=5)
    assert run.code == 1
    for found in ("Response violates schema", "Undocumented status code", "Schema-valid request rejected"):
        assert found in run.text, run.text
