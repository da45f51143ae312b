"""An installation without an embedded hub: one API and one archiver host around a Kafka topic and a cloud's store."""

from __future__ import annotations

import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.e2e.system import Process, System, wait_for
from tests.emulators import Emulator
from tests.kafka_broker import Brokers

ONE_COPY = ("--replicas", "1", "--in-sync-replicas", "1")


class TopicSystem(System):
    """`penstock api` and `penstock host`; used as the System of `penstock up` is.

    `places` is what commands need to find it, beside its URL. `store` downloads what lies in the cloud.
    """

    def __init__(self, folder: Path, kafka: Brokers, azurite: Emulator, **options: Any) -> None:
        self._azurite = azurite
        self.places = ("--hub", kafka.fresh_url(), "--store", azurite.fresh_url())
        more = (*self.places, *ONE_COPY, *options.pop("options", ()))
        environment: Mapping[str, str] = {**azurite.environment, **options.pop("environment", {})}
        super().__init__(folder, command="api", options=more, environment=environment, **options)
        self._host: Process | None = None

    @property
    def store(self) -> Path:
        return self._azurite.download(self.places[3], self.folder / "copy")

    def start(self, *, ready: bool = True, admin: bool = False) -> TopicSystem:
        super().start(ready=ready, admin=admin)
        places = (*self.places, "--data", str(self.folder / "host"), "--name", "host", "--lease", "2s")
        self._host = host = self.process("host", *places, log="host.log")
        wait_for("the host has a lease", lambda: "lease taken" in host.text() or host.ended)
        assert not host.ended, host.text()
        return self

    def stop(self) -> int:
        assert self._host is not None
        self._host.signal(signal.SIGTERM)
        return max(super().stop(), self._host.wait())

    def kill(self) -> None:
        super().kill()
        assert self._host is not None
        self._host.kill()

    def settle(self) -> None:
        for command in ("flush", "verify"):
            self.check(command, *self.places[2:])
