"""What opens the brokers of a Kafka cluster: the protocol, and who this process is to them. Nothing of it is shown to anybody.

A password that is a connection string of Azure Event Hubs says everything by itself. Its Kafka endpoint takes the whole string as the
password of the user `$ConnectionString` (https://learn.microsoft.com/azure/event-hubs/azure-event-hubs-apache-kafka-overview), listens on
port 9093, and wants of its clients what `_EVENT_HUBS` says (https://learn.microsoft.com/azure/event-hubs/apache-kafka-configurations).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from penstock.access import connection_string_fields
from penstock.errors import SettingsError

PROTOCOLS: Final = ("plaintext", "ssl", "sasl_plaintext", "sasl_ssl")
MECHANISMS: Final = ("PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512")
EVENT_HUBS_USER: Final = "$ConnectionString"
EVENT_HUBS_PORT: Final = 9093
_EVENT_HUBS: Final = {
    "socket.keepalive.enable": True,
    "connections.max.idle.ms": 180_000,  # Azure drops connections that were idle for 240 s, without a word
    "metadata.max.age.ms": 180_000,
    "topic.metadata.refresh.interval.ms": 180_000,
}

Option = str | int | float | bool
Called = Callable[[str], str]


def as_flag(setting: str) -> str:
    """What those who give commands call a setting."""
    return "PENSTOCK_KAFKA_PASSWORD" if setting == "kafka-password" else f"--{setting}"


def as_argument(setting: str) -> str:
    """What those who write programs call it."""
    return setting.replace("-", "_")


@dataclass(frozen=True)
class Security:
    """`protocol` is one of PROTOCOLS. The files are PEM; without `ca` the system's authorities are trusted, without `certificate_key`
    the key is in the same file. `event_hubs`: the brokers are Azure's, which tell less and decide more than others. `called`: what people
    call the settings that all this is from."""

    protocol: str = "plaintext"
    mechanism: str = "PLAIN"
    user: str = ""
    password: str = field(default="", repr=False)
    ca: str = ""
    certificate: str = ""
    certificate_key: str = ""
    event_hubs: bool = False
    called: Called = field(default=as_flag, repr=False, compare=False)

    @property
    def has_user(self) -> bool:
        return self.protocol.startswith("sasl_")

    @property
    def has_tls(self) -> bool:
        return self.protocol.endswith("ssl")

    @property
    def who(self) -> str:
        """For people."""
        if self.has_user:
            return f"the user {self.user}"
        return (
            "whoever shows this certificate"
            if self.has_tls and self.certificate
            else "this process, which says no name"
        )

    def options(self) -> dict[str, Option]:
        """As librdkafka calls them."""
        found: dict[str, Option] = {"security.protocol": self.protocol}
        if self.has_user:
            found |= {"sasl.mechanism": self.mechanism, "sasl.username": self.user, "sasl.password": self.password}
        if self.has_tls:
            if self.ca:
                found["ssl.ca.location"] = self.ca
            if self.certificate:
                found["ssl.certificate.location"] = self.certificate
                found["ssl.key.location"] = self.certificate_key or self.certificate
        return found | (_EVENT_HUBS if self.event_hubs else {})


class EventHubs(NamedTuple):
    """Of a connection string: the Kafka endpoint of its namespace as HOST:PORT, and its event hub, empty where it is for all of them."""

    server: str
    topic: str


def event_hubs(connection_string: str) -> EventHubs:
    """Raises SettingsError, which never repeats what may hold a key."""
    fields = connection_string_fields(connection_string)
    scheme, _, rest = fields["endpoint"].partition("://")
    host, colon, port = rest.rstrip("/").lower().partition(":")
    if scheme.lower() != "sb" or not host or (colon and not port.isdigit()):
        raise SettingsError("The Endpoint of the connection string is not of the form sb://HOST/.")
    return EventHubs(f"{host}:{port or EVENT_HUBS_PORT}", fields.get("entitypath", ""))
