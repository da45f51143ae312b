"""Doors of a test broker that are not open to everyone: with passwords, with TLS, and with both. Behind all is the same broker.

`OWNER` and `WORKER` may do everything, and `GUEST`, who has a password too, nothing. The worker comes and goes (SCRAM alone). Over
TLS alone a client shows a certificate, and is nobody else. Behind the door of Event Hubs, where somebody must stand who speaks as it
does (tests/event_hubs.py), is `AZURE`.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Final

from tests.certificates import Authority
from tests.event_hubs import EventHubs
from tests.kafka_broker import Node, free_ports

if TYPE_CHECKING:
    from confluent_kafka.admin import UserScramCredentialAlteration

OWNER: Final = "owner"
WORKER: Final = "worker"
GUEST: Final = "guest"
AZURE: Final = "$ConnectionString"
TOPICS: Final = "penstock-"
PASSWORD: Final = "a \\word, of 'some' kind; {it} is $long"
SCRAM: Final = ("SCRAM-SHA-256", "SCRAM-SHA-512")
_PLAIN = "org.apache.kafka.common.security.plain.PlainLoginModule"
_SCRAM = "org.apache.kafka.common.security.scram.ScramLoginModule"


class Doors:
    """`sasl`, `tls`, `both` and `hubs` are HOST:PORT. `ca` is whom clients are to trust, `client` a certificate with its key."""

    def __init__(self, folder: Path) -> None:
        authority = Authority(folder, "brokers")
        self.ca = str(authority.ca)
        self.client = str(authority.issue("client"))
        self.other_ca = str(Authority(folder, "others").ca)
        self._server = authority.issue("broker", "127.0.0.1")
        self._hubs_port, self._behind_hubs, *ports = free_ports(5)
        self.sasl, self.tls, self.both = (f"127.0.0.1:{port}" for port in ports)
        self.hubs = f"127.0.0.1:{self._hubs_port}"

    def hang(self, node: Node) -> None:
        """Onto a broker that was not started yet."""
        places = {"SASL": self.sasl, "TLS": self.tls, "BOTH": self.both}
        inside = ",".join(f"{name}://{place}" for name, place in places.items())
        plain = f"{_PLAIN} required {_user(OWNER)} {_user(GUEST)} {_user(AZURE, self.connection_string())};"
        protocols = "SASL:SASL_PLAINTEXT,TLS:SSL,BOTH:SASL_SSL,HUBS:SASL_PLAINTEXT"
        behind = f"HUBS://127.0.0.1:{self._behind_hubs}"
        lines = [
            f"listeners={node.setting('listeners')},{inside},{behind}",
            f"advertised.listeners={node.setting('advertised.listeners')},{inside},HUBS://{self.hubs}",
            f"listener.security.protocol.map={node.setting('listener.security.protocol.map')},{protocols}",
            f"sasl.enabled.mechanisms=PLAIN,{','.join(SCRAM)}",
            "authorizer.class.name=org.apache.kafka.metadata.authorizer.StandardAuthorizer",
            f"super.users=User:ANONYMOUS;User:{OWNER};User:{WORKER};User:CN=client",
            *("ssl.keystore.type=PEM", f"ssl.keystore.location={self._server}"),
            *("ssl.truststore.type=PEM", f"ssl.truststore.location={self.ca}"),
            "listener.name.tls.ssl.client.auth=required",
            "listener.name.sasl.connections.max.reauth.ms=3000",  # who may come in no more is out soon
        ]
        lines += [
            "listener.name.hubs.sasl.enabled.mechanisms=PLAIN",
            f"listener.name.hubs.plain.sasl.jaas.config={plain}",
        ]
        for name in ("sasl", "both"):
            lines.append(f"listener.name.{name}.plain.sasl.jaas.config={plain}")
            lines += [f"listener.name.{name}.{each.lower()}.sasl.jaas.config={_SCRAM} required;" for each in SCRAM]
        node.set("\n".join(lines) + "\n")

    def make_users(self, servers: str) -> None:
        """Those with SCRAM; the others stand in the broker's settings."""
        from confluent_kafka.admin import AdminClient

        self._admin = AdminClient({"bootstrap.servers": servers, "log_level": 0})
        for mechanism in SCRAM:
            self.let_in(OWNER, mechanism)
        self.grant(AZURE, TOPICS, "READ", "WRITE", "DESCRIBE", prefixed=True)

    def connection_string(self) -> str:
        """As Azure gives it. Who comes with it may read and write the topics that are there, and neither make nor configure any."""
        return f"Endpoint=sb://{self.hubs}/;SharedAccessKeyName=root;SharedAccessKey=c2VjcmV0IGtleQ=="

    def event_hubs(self) -> EventHubs:
        """What stands at its door while a test runs."""
        return EventHubs(self._hubs_port, self._server, self._behind_hubs)

    def let_in(self, user: str, mechanism: str = SCRAM[0]) -> None:
        from confluent_kafka.admin import ScramCredentialInfo, ScramMechanism, UserScramCredentialUpsertion

        of = ScramMechanism[mechanism.replace("-", "_")]
        self._alter(UserScramCredentialUpsertion(user, ScramCredentialInfo(of, 4096), PASSWORD.encode()))

    def shut_out(self, user: str) -> None:
        """Within 3 s where it is in already."""
        from confluent_kafka.admin import ScramMechanism, UserScramCredentialDeletion

        self._alter(UserScramCredentialDeletion(user, ScramMechanism.SCRAM_SHA_256))

    def grant(self, user: str, topic: str, *rights: str, prefixed: bool = False) -> None:
        """Rights as Kafka calls them, such as READ; `prefixed`: for all topics whose names begin so."""
        from confluent_kafka.admin import (
            AclBinding,
            AclOperation,
            AclPermissionType,
            ResourcePatternType,
            ResourceType,
        )

        kind = ResourcePatternType.PREFIXED if prefixed else ResourcePatternType.LITERAL
        where = (ResourceType.TOPIC, topic, kind, f"User:{user}", "*")
        made = [AclBinding(*where, AclOperation[right], AclPermissionType.ALLOW) for right in rights]
        for done in self._admin.create_acls(made).values():
            done.result(30)

    def _alter(self, change: UserScramCredentialAlteration) -> None:
        for done in self._admin.alter_user_scram_credentials([change]).values():
            done.result(30)


def _user(name: str, password: str = PASSWORD) -> str:
    """In a JAAS line within a properties file: each of them takes one backslash away."""
    quoted = password.replace("\\", "\\\\\\\\")
    return f'user_{name}="{quoted}"'
