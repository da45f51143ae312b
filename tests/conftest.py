"""`REQUIRE_ALL=1` turns every skip into a failure: on the project's own machines nothing may be missing."""

from __future__ import annotations

import os
from collections.abc import Generator, Iterator

import pytest

from tests import emulators, kafka_broker, kafka_doors

REQUIRE_ALL = os.environ.get("REQUIRE_ALL") == "1"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if REQUIRE_ALL and report.skipped and not hasattr(report, "wasxfail"):
        report.outcome = "failed"
        report.longrepr = f"skipped, but REQUIRE_ALL=1: {report.longrepr}"
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    report = yield
    if REQUIRE_ALL and report.outcome == "skipped":
        report.outcome = "failed"
        report.longrepr = f"skipped, but REQUIRE_ALL=1: {report.longrepr}"
    return report


@pytest.fixture(scope="session")
def azurite(tmp_path_factory: pytest.TempPathFactory) -> Iterator[emulators.Emulator]:
    """One Azurite for all tests of a run; each takes a folder of its own in it."""
    with emulators.azurite(tmp_path_factory.mktemp("azurite")) as running:
        yield running


@pytest.fixture(scope="session")
def moto(tmp_path_factory: pytest.TempPathFactory) -> Iterator[emulators.Emulator]:
    """One S3 for all tests of a run."""
    with emulators.moto(tmp_path_factory.mktemp("moto")) as running:
        yield running


@pytest.fixture(scope="session")
def doors(tmp_path_factory: pytest.TempPathFactory) -> kafka_doors.Doors:
    """Of the Kafka broker: the ways in that are not open to everyone."""
    return kafka_doors.Doors(tmp_path_factory.mktemp("doors"))


@pytest.fixture(scope="session")
def kafka(tmp_path_factory: pytest.TempPathFactory, doors: kafka_doors.Doors) -> Iterator[kafka_broker.Brokers]:
    """One Kafka broker for all tests of a run; each takes a topic of its own."""
    with kafka_broker.brokers(tmp_path_factory.mktemp("kafka"), before=doors.hang) as running:
        doors.make_users(running.servers)
        yield running
