"""Installations for the tests, ended with them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.e2e.system import System


@pytest.fixture
def make_system(tmp_path: Path) -> Iterator[Callable[..., System]]:
    """Makes installations; takes the arguments of System."""
    with ExitStack() as closing:

        def make(name: str = "one", **options: object) -> System:
            folder = tmp_path / name
            folder.mkdir(exist_ok=True)
            system = System(folder, **options)  # type: ignore[arg-type]
            closing.callback(system.close)
            return system

        yield make


@pytest.fixture
def system(make_system: Callable[..., System]) -> System:
    """One that runs."""
    return make_system().start()
