"""What an API worker serves, whichever hub it is: built in workers.py over the embedded hub or a Kafka topic."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import NamedTuple

from penstock.hub import WholeHub
from penstock.server.answers import Producer
from penstock.server.read import Groups
from penstock.server.status import Status
from penstock.server.units import Throughput


class Serving(NamedTuple):
    """`producer` and `check` are as for `server.read.Reads`. `keep` is what the worker does for the hub beside intake, until the event
    is set; the hub's storage failed if it calls back."""

    hub: WholeHub
    groups: Groups
    status: Callable[[Throughput], Status]
    producer: Callable[[str, str], Producer | None]
    check: Callable[[], None]
    keep: Callable[[threading.Event, Callable[[], None]], None]
