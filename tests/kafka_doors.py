"""Doors of a test broker that are not open to everyone: with passwords, with TLS, and with both. Behind all is the same broker.

`OWNER` and `WORKER` may do everything, and `GUEST`, who has a password too, nothing. The worker comes and goes (SCRAM alone). Over
TLS alone a client shows a certificate, and is nobody else.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Final

from tests.certificates import Authority
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
    """`sasl`, `tls` and `both` are HOST:PORT. `ca` is whom clients are to trust, `client` a certificate with its key."""

    def __init__(self, folder: Path) -> None:
        authority = Authority(folder, "brokers")
        self.ca = str(authority.ca)
        self.client = str(authority.issue("client"))
        self.other_ca = str(Authority(folder, "others").ca)
        self._server = authority.issue("broker", "127.0.0.1")
        ports = free_ports(3)
        self.sasl, self.tls, self.both = (f"127.0.0.1:{port}" for port in ports)

    def hang(self, node: Node) -> None:
        """Onto a broker that was not started yet."""
        places = {"SASL": self.sasl, "TLS": self.tls, "BOTH": self.both}
        inside = ",".join(f"{name}://{place}" for name, place in places.items())
        plain = f"{_PLAIN} required {_user(OWNER)} {_user(GUEST)} {_user(AZURE, self.connection_string())};"
        protocols = "SASL:SASL_PLAINTEXT,TLS:SSL,BOTH:SASL_SSL"
        lines = [
            f"listeners={node.setting('listeners')},{inside}",
            f"advertised.listeners={node.setting('advertised.listeners')},{inside}",
            f"listener.security.protocol.map={node.setting('listener.security.protocol.map')},{protocols}",
            f"sasl.enabled.mechanisms=PLAIN,{','.join(SCRAM)}",
            "authorizer.class.name=org.apache.kafka.metadata.authorizer.StandardAuthorizer",
            f"super.users=User:ANONYMOUS;User:{OWNER};User:{WORKER};User:CN=client",
            *("ssl.keystore.type=PEM", f"ssl.keystore.location={self._server}"),
            *("ssl.truststore.type=PEM", f"ssl.truststore.location={self.ca}"),
            "listener.name.tls.ssl.client.auth=required",
            "listener.name.sasl.connections.max.reauth.ms=3000",  # who may come in no more is out soon
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
        self._grant(AZURE)

    def connection_string(self) -> str:
        """As Azure gives it. Who comes with it may read and write the topics that are there, and neither make nor configure any."""
        return f"Endpoint=sb://{self.both}/;SharedAccessKeyName=root;SharedAccessKey=c2VjcmV0IGtleQ=="

    def let_in(self, user: str, mechanism: str = SCRAM[0]) -> None:
        from confluent_kafka.admin import ScramCredentialInfo, ScramMechanism, UserScramCredentialUpsertion

        of = ScramMechanism[mechanism.replace("-", "_")]
        self._alter(UserScramCredentialUpsertion(user, ScramCredentialInfo(of, 4096), PASSWORD.encode()))

    def shut_out(self, user: str) -> None:
        """Within 3 s where it is in already."""
        from confluent_kafka.admin import ScramMechanism, UserScramCredentialDeletion

        self._alter(UserScramCredentialDeletion(user, ScramMechanism.SCRAM_SHA_256))

    def _grant(self, user: str) -> None:
        from confluent_kafka.admin import (
            AclBinding,
            AclOperation,
            AclPermissionType,
            ResourcePatternType,
            ResourceType,
        )

        where = (ResourceType.TOPIC, TOPICS, ResourcePatternType.PREFIXED, f"User:{user}", "*")
        rights = (AclOperation.READ, AclOperation.WRITE, AclOperation.DESCRIBE)
        for done in self._admin.create_acls(
            [AclBinding(*where, right, AclPermissionType.ALLOW) for right in rights]
        ).values():
            done.result(30)

    def _alter(self, change: UserScramCredentialAlteration) -> None:
        for done in self._admin.alter_user_scram_credentials([change]).values():
            done.result(30)


def _user(name: str, password: str = PASSWORD) -> str:
    """In a JAAS line within a properties file: each of them takes one backslash away."""
    quoted = password.replace("\\", "\\\\\\\\")
    return f'user_{name}="{quoted}"'
