"""The API against its own description: schemathesis sends what /openapi.json allows and what it does not, to both ports."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.e2e.system import PROJECT, SEED, System

# Of each operation that has parameters; together more than REQUESTS_MIN requests.
EXAMPLES = int(os.environ.get("PENSTOCK_EXAMPLES", "150"))
REQUESTS_MIN = 2000
TESTED = re.compile(r"^  ([0-9,]+) generated(?:, ([0-9,]+) passed)?", re.MULTILINE)


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
        # In a folder of its own: it keeps what it found there.
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
                *options,
            ],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": str(PROJECT), "SCHEMATHESIS_HOOKS": "tests.e2e.api_cases"},
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
        )
        self.code = done.returncode
        self.text = done.stdout + done.stderr
        match = TESTED.search(self.text)
        assert match, self.text[-4000:]
        self.requests = int(match[1].replace(",", ""))


def test_whatever_is_sent_the_answer_is_the_one_that_is_described(system: System, tmp_path: Path) -> None:
    folders = [tmp_path / "listen", tmp_path / "admin"]
    for folder in folders:
        folder.mkdir()
    with ThreadPoolExecutor(2) as both:
        urls = (f"{url}/openapi.json" for url in (system.url, system.admin))
        runs = list(both.map(Run, folders, urls))
    assert [run.code for run in runs] == [0, 0], "\n".join(run.text[-6000:] for run in runs if run.code)
    requests = sum(run.requests for run in runs)
    assert requests >= REQUESTS_MIN
    print(f"\nschemathesis: {requests} requests")
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
