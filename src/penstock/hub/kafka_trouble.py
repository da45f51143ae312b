"""What a Kafka client hears of its connections. librdkafka tries again for ever, and whoever asked learns of a time-out only.

What it says, tried with Kafka 4.3 at listeners of each kind: `_AUTHENTICATION` where a user is refused, or SASL at all; `_SSL` where a
certificate is not trusted; `_TRANSPORT` with a text about SSL where the broker refuses ours, or speaks no TLS; and nothing but
`_ALL_BROKERS_DOWN` where it closes the connection, as a listener does that expects TLS or a user and gets neither.
"""

from __future__ import annotations

import re

from confluent_kafka import KafkaError

from penstock.hub.kafka_security import Security

_AROUND = re.compile(r"^\S+://\S+?: |^[^\s:]+:\d+/\S+?: | \(after \d+ms in state [^)]*\)$")
_CODE = re.compile(r"error:[0-9A-F]{8}:")


class Trouble:
    """The last of one cluster. `hear` is called by the client's thread that polls."""

    def __init__(self, servers: str, security: Security) -> None:
        self._servers = servers
        self._security = security
        self._last: KafkaError | None = None
        self._was_in = False
        self.all_are_down = False

    def hear(self, error: KafkaError) -> None:
        self.all_are_down = self.all_are_down or error.code() == KafkaError._ALL_BROKERS_DOWN
        if error.code() != KafkaError._ALL_BROKERS_DOWN or self._last is None:
            self._last = error

    def over(self) -> None:
        """The brokers have answered."""
        self._last, self._was_in, self.all_are_down = None, True, False

    @property
    def is_final(self) -> bool:
        """Whether no time helps, but other settings, here or there."""
        code = self._last.code() if self._last else None
        return code in (KafkaError._AUTHENTICATION, KafkaError._SSL, KafkaError._ALL_BROKERS_DOWN) or self._is_about_tls

    @property
    def _is_about_tls(self) -> bool:
        return self._last is not None and self._last.code() == KafkaError._TRANSPORT and "SSL" in self._last.str()

    def sentence(self) -> str:
        """What was heard, and what to do; empty if nothing was."""
        if self._last is None:
            return ""
        said = _CODE.sub("", _AROUND.sub("", _AROUND.sub("", self._last.str()))).rstrip(".")
        here, called = self._security, self._security.called
        if self._last.code() == KafkaError._AUTHENTICATION:
            return (
                f"The Kafka brokers at {self._servers} refuse {here.who} ({here.protocol}, {here.mechanism}): {said}. "
                f"See to {called('kafka-user')}, the password, {called('kafka-mechanism')} and {called('kafka-security')}."
            )
        if self._last.code() == KafkaError._SSL or self._is_about_tls:
            return (
                f"There is no TLS with the Kafka brokers at {self._servers}: {said}. "
                f"See to {called('ca')}, {called('certificate')} and {called('kafka-security')}."
            )
        if self._last.code() == KafkaError._ALL_BROKERS_DOWN:
            if self._was_in:
                return ""
            return (
                f"The Kafka brokers at {self._servers} close every connection: they expect something else than "
                f"{called('kafka-security')} {here.protocol}."
            )
        return f"The Kafka brokers at {self._servers} cannot be reached: {said}."
