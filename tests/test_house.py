"""The house of the architecture, held by machine: who imports whom, one address for each danger, budgets."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import LONGEST

SRC = Path(__file__).parent.parent / "src" / "penstock"
FUNCTION_LINES_MAX = 60
MODULE_LINES_MAX = 400
SMALLER = {"server/http.py": 300}

BASE = {"errors", "events", "clock", "files", "growing", "sas", "access"}
MAY_IMPORT: dict[str, set[str]] = {
    "errors": set(),
    "clock": set(),
    "events": {"errors"},
    "files": {"errors", "clock", "growing"},
    "growing": set(),
    "sas": set(),
    "access": {"errors", "clock", "sas"},
    "kinds": {"errors"},
    "settings": {"errors", "kinds"},
    "wire": BASE,
    "hub": BASE | {"wire"},
    "blobs": BASE | {"wire"},
    "client": BASE,
    "processor": BASE | {"wire", "hub", "blobs"},
    "archive": BASE | {"wire", "hub", "blobs", "processor"},
    "telemetry": BASE,
    "server": BASE | {"wire", "hub", "blobs", "processor", "archive", "telemetry"},
    "testing": BASE | {"wire", "hub", "blobs", "processor"},
    # The composition root of programs that run their own processors, as cli/wiring.py is that of the commands.
    "hosting": BASE | {"wire", "hub", "blobs", "processor", "archive", "telemetry"},
    "cli": BASE
    | {"settings", "kinds", "wire", "hub", "blobs", "processor", "archive", "telemetry", "server", "client", "hosting"},
    "__init__": {"errors", "events", "client", "hosting", "processor"},
    "__main__": {"cli"},
}
# A foreign module and the only places that may know it.
FOREIGN: dict[str, tuple[str, ...]] = {
    "time": ("clock",),
    "fcntl": ("files",),
    "lmdb": ("hub",),
    "confluent_kafka": ("hub",),
    "httptools": ("server",),
    "uvloop": ("server",),
    "asyncio": ("server", "cli"),  # cli/workers hands the worker's loop to the intake
    "isal": ("wire",),
    "zstandard": ("wire",),
    "click": ("cli",),
    "rich": ("cli",),
    "duckdb": (),
    "obstore": ("blobs",),
}
# Calls that are dangerous, and the only module that makes them.
CALLS: dict[str, str] = {
    "os.fsync": "files",
    "os.fdatasync": "files",
    "os.link": "files",
    "os.replace": "files",
    "shutil.move": "files",
    "datetime.now": "clock",
    "datetime.utcnow": "clock",
    "datetime.today": "clock",
    "date.today": "clock",
}
METHODS = {"rename": "files", "hardlink_to": "files", "flock": "files"}
# The loop tops, and the calls of users' code: where everything may be caught, because there it is logged once and decided.
BROAD = {
    ("client/feed.py", "_watched"),
    ("client/sending.py", "run"),
    ("client/sending.py", "settled"),
    ("cli/supervisor.py", "_child"),
    ("processor/host.py", "_run"),
    ("processor/pump.py", "_run"),
    ("processor/pump.py", "_turn"),
    ("processor/pump.py", "_close"),
    ("cli/archiving.py", "_publish"),
    ("server/app.py", "answer"),
    ("server/housekeeping.py", "run"),
    ("server/http.py", "_admit"),
    ("server/topic.py", "mark"),
    ("server/http.py", "_take"),
    ("server/ingest.py", "_prepare_elsewhere"),
    ("server/ingest.py", "_prepare_here"),
    ("server/ingest.py", "_commit_all"),
}
NO_NAMES = {"utils", "helpers", "common", "manager", "util", "helper", "misc"}


def findings(root: Path) -> Iterator[str]:
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        text = path.read_text("utf-8")
        tree = ast.parse(text, name)
        part = name.removesuffix(".py").split("/")[0]
        if path.stem in NO_NAMES:
            yield f"{name}: a module is named after what it does, not `{path.stem}`"
        most = SMALLER.get(name, MODULE_LINES_MAX)
        if (lines := len(text.splitlines())) > most:
            yield f"{name}: {lines} lines, at most {most}"
        yield from imports(name, part, tree)
        yield from dangers(name, part, tree)
        yield from functions(name, tree)


def imports(name: str, part: str, tree: ast.Module) -> Iterator[str]:
    for module in imported(tree):
        top, _, rest = module.partition(".")
        if top == "penstock":
            target = rest.split(".")[0]
            if target and target != part and target not in MAY_IMPORT[part]:
                yield f"{name}: {part} must not import {module}"
        elif top in FOREIGN and part not in FOREIGN[top]:
            yield f"{name}: {top} may be imported only in {', '.join(FOREIGN[top]) or 'a later version'}"


def imported(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            if node.module == "penstock":
                yield from (f"penstock.{alias.name}" for alias in node.names if not alias.name.startswith("__"))
            else:
                yield node.module or ""


def dangers(name: str, part: str, tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Global):
            yield f"{name}:{node.lineno}: no module-level mutable state"
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        short = ".".join(called.split(".")[-2:])
        if short in CALLS and part != CALLS[short]:
            yield f"{name}:{node.lineno}: {short} is called only in {CALLS[short]}.py"
        method = called.rpartition(".")[2]
        if "." in called and method in METHODS and part != METHODS[method]:
            yield f"{name}:{node.lineno}: .{method}() is called only in {METHODS[method]}.py"
        if called == "print" and part != "cli":
            yield f"{name}:{node.lineno}: only cli prints"


def functions(name: str, tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        assert node.end_lineno
        if (lines := node.end_lineno - node.lineno + 1) > FUNCTION_LINES_MAX:
            yield f"{name}:{node.lineno}: {node.name} has {lines} lines, at most {FUNCTION_LINES_MAX}"
        for inner in own(node):
            if isinstance(inner, ast.ExceptHandler) and broad(inner) and (name, node.name) not in BROAD:
                yield f"{name}:{inner.lineno}: everything is caught in {node.name}, which is no loop top"


def own(node: ast.AST) -> Iterator[ast.AST]:
    """What is inside of a function, but not inside of a function in it."""
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            yield child
            yield from own(child)


def broad(handler: ast.ExceptHandler) -> bool:
    caught = {n.id for n in ast.walk(handler.type) if isinstance(n, ast.Name)} if handler.type else {"BaseException"}
    reraises = isinstance(handler.body[-1], ast.Raise) and handler.body[-1].exc is None
    return bool(caught & {"Exception", "BaseException"}) and not reraises


def test_the_house_is_in_order() -> None:
    assert list(findings(SRC)) == []


def test_every_module_is_in_the_map() -> None:
    parts = {path.name.removesuffix(".py") for path in SRC.iterdir() if path.is_dir() or path.suffix == ".py"}
    assert parts - {"__pycache__"} <= set(MAY_IMPORT)


def test_the_longest_modules_of_tests_are_there() -> None:
    tests = Path(__file__).parent
    assert [name for name in LONGEST if not (tests / name).is_file()] == []


def test_the_total(capsys: pytest.CaptureFixture[str]) -> None:
    lines = [len(path.read_text("utf-8").splitlines()) for path in SRC.rglob("*.py")]
    with capsys.disabled():
        print(f"\nthe house: {sum(lines):,} lines in {len(lines)} modules")


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("hub/embedded.py", "from penstock.blobs import Blob"),
        ("hub/embedded.py", "import penstock.server.app"),
        ("client/sender.py", "from penstock.hub import Hub"),
        ("wire/body.py", "from penstock import hub"),
        ("archive/cut.py", "from penstock.settings import load"),
        ("wire/body.py", "import time"),
        ("wire/body.py", "from time import sleep"),
        ("archive/cut.py", "from datetime import datetime\ndatetime.now()"),
        ("blobs/disk.py", "import os\nos.fsync(3)"),
        ("blobs/disk.py", "import os\nos.rename('a', 'b')"),
        ("blobs/disk.py", "from pathlib import Path\nPath('a').rename('b')"),
        ("blobs/disk.py", "import fcntl"),
        ("processor/host.py", "import lmdb"),
        ("wire/frame.py", "import httptools"),
        ("server/app.py", "from isal import igzip"),
        ("server/app.py", "print('x')"),
        ("server/app.py", "def f():\n    try:\n        g()\n    except Exception:\n        pass"),
        ("server/app.py", "def f():\n    try:\n        g()\n    except:\n        pass"),
        ("server/app.py", "def f():\n    try:\n        g()\n    except (OSError, Exception):\n        pass"),
        ("server/app.py", "def f():\n    global x\n    x = 1"),
        ("server/app.py", "def f():\n" + "    x = 1\n" * FUNCTION_LINES_MAX),
        ("server/app.py", "x = 1\n" * (MODULE_LINES_MAX + 1)),
        ("server/http.py", "x = 1\n" * 301),
        ("server/utils.py", "x = 1"),
    ],
)
def test_each_rule_finds_its_breach(tmp_path: Path, path: str, text: str) -> None:
    (tmp_path / path).parent.mkdir(parents=True)
    (tmp_path / path).write_text(text)
    assert len(list(findings(tmp_path))) == 1
