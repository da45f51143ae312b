"""`REQUIRE_ALL=1` turns every skip into a failure: on the project's own machines nothing may be missing."""

from __future__ import annotations

import os
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest

from tests import emulators, kafka_broker, kafka_doors

REQUIRE_ALL = os.environ.get("REQUIRE_ALL") == "1"
# What takes half a minute and more, the longest first. A module is run by one process; one that begins last would keep the run waiting.
LONGEST = (
    "e2e/test_kafka_chaos.py",
    "sim/test_hosts.py",
    "e2e/test_hostile_run.py",
    "sim/test_interleavings.py",
    "bench/test_bench.py",
    "e2e/test_main_job.py",
    "e2e/test_http_contract.py",
    "crash/test_kill.py",
    "e2e/test_client.py",
    "crash/test_hosts.py",
    "blobs/test_cloud.py",
    "e2e/test_keys.py",
    "cli/test_up.py",
    "e2e/test_simulate.py",
    "e2e/test_kafka_security.py",
    "e2e/test_operating.py",
    "e2e/test_cloud_store.py",
    "e2e/test_quota.py",
    "fuzz/test_fuzz.py",
)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Of a run in several processes; who runs tests in one process wants to see the quick ones first."""
    if hasattr(config, "workerinput"):
        here, place = Path(__file__).parent, {name: number for number, name in enumerate(LONGEST)}
        items.sort(key=lambda item: place.get(item.path.relative_to(here).as_posix(), len(place)))


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
