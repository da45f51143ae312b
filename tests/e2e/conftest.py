"""Installations for the tests, ended with them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.e2e.system import System
from tests.e2e.topic_system import TopicSystem


@pytest.fixture
def make_system(tmp_path: Path) -> Iterator[Callable[..., System]]:
    """Makes installations; takes the arguments of System."""
    with ExitStack() as closing:

        def make(name: str = "one", kind: Callable[..., System] = System, **options: object) -> System:
            folder = tmp_path / name
            folder.mkdir(exist_ok=True)
            system = kind(folder, **options)
            closing.callback(system.close)
            return system

        yield make


@pytest.fixture(params=["embedded", "topic"])
def make_either(request: pytest.FixtureRequest, make_system: Callable[..., System]) -> Callable[..., System]:
    """As `make_system`, for what holds for every hub: installations of `penstock up`, and of an API and a host on a Kafka topic."""
    if request.param == "embedded":
        return make_system
    places = {name: request.getfixturevalue(name) for name in ("kafka", "azurite")}
    return functools.partial(make_system, kind=functools.partial(TopicSystem, **places))


@pytest.fixture
def system(make_system: Callable[..., System]) -> System:
    """One that runs."""
    return make_system().start()
