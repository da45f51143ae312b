"""Where the brokers of a Kafka topic are, and what opens them, from settings."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from penstock.access import is_connection_string
from penstock.errors import SettingsError
from penstock.hub.kafka_cluster import Address, parse_url
from penstock.hub.kafka_security import EVENT_HUBS_USER, Security, event_hubs
from penstock.settings import Values

_SHORT: Final = "kafka:///"
_TLS: Final = ("ca", "certificate", "certificate-key")


def reached(url: str, values: Values) -> tuple[Address, Security]:
    """The topic that `--hub` names and what its brokers ask for. Raises SettingsError; reads files, touches nothing.

    With a connection string of Event Hubs `kafka:///TOPIC` is enough, and `kafka:///` where that names the event hub too.
    """
    password = _password(values)
    if not is_connection_string(password):
        return parse_url(url), _security(values, password)
    server, hub = event_hubs(password)
    address = parse_url(f"kafka://{server}/{url.removeprefix(_SHORT) or hub}" if url.startswith(_SHORT) else url)
    for what, theirs, ours in (
        ("Endpoint", server, address.servers),
        ("EntityPath", hub or address.topic, address.topic),
    ):
        if theirs != ours:
            raise SettingsError(f"--hub names {ours}, and the {what} of the connection string {theirs}.")
    return address, _security(values, password, connection_string=True)


def _security(values: Values, password: str, *, connection_string: bool = False) -> Security:
    protocol, user, mechanism = (values.text(f"kafka-{name}") for name in ("security", "user", "mechanism"))
    if connection_string:
        protocol = "sasl_ssl" if values.source("kafka-security") == "default" else protocol
        if user not in ("", EVENT_HUBS_USER) or mechanism != "PLAIN":
            raise SettingsError(
                f"A connection string is the password of the user {EVENT_HUBS_USER} with --kafka-mechanism PLAIN, and of no other."
            )
        user = EVENT_HUBS_USER
    files = {name: values.text(name) for name in _TLS}
    made = Security(
        protocol,
        mechanism,
        user,
        password,
        files["ca"],
        files["certificate"],
        files["certificate-key"],
        connection_string,
    )
    _check(made, values)
    return made


def _check(made: Security, values: Values) -> None:
    """Raises SettingsError for what goes together badly, and for files that cannot be read."""
    if made.has_user and not (made.user and made.password):
        lacking = "--kafka-password-file or PENSTOCK_KAFKA_PASSWORD" if made.user else "--kafka-user"
        raise SettingsError(f"--kafka-security {made.protocol} needs {lacking} too.")
    if not made.has_user and (made.user or made.password):
        given = "user" if made.user else "password"
        raise SettingsError(
            f"A {given} for Kafka means nothing with --kafka-security {made.protocol}: brokers ask for it with sasl_ssl."
        )
    for name in _TLS:
        if not made.has_tls and values.source(name) == "flag":
            raise SettingsError(f"--{name} means nothing with --kafka-security {made.protocol}.")
        if made.has_tls and values.text(name):
            _read(values.text(name), f"--{name}")
    if made.has_tls and made.certificate_key and not made.certificate:
        raise SettingsError("--certificate-key means nothing without --certificate.")


def _password(values: Values) -> str:
    """As it is given, without the white space that files and variables get at their ends."""
    path = values.text("kafka-password-file")
    text = _read(path, "--kafka-password-file") if path else values.text("kafka-password")
    if path and not text.strip():
        raise SettingsError(f"--kafka-password-file {path} is empty.")
    if not text.strip().isprintable():
        raise SettingsError(
            "The password for Kafka holds characters that no password has: it must be one line of text."
        )
    return text.strip()


def _read(path: str, option: str) -> str:
    try:
        return Path(path).read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is no text"
        raise SettingsError(f"{option} {path} cannot be read: {why}.") from error
