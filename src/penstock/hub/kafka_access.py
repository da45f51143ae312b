"""Where the brokers of a Kafka topic are, and what opens them: from the settings of a command, or from the arguments of a program."""

from __future__ import annotations

from pathlib import Path
from typing import Final, Protocol

from penstock.access import is_connection_string
from penstock.errors import SettingsError
from penstock.hub.kafka_cluster import Address, parse_url
from penstock.hub.kafka_security import EVENT_HUBS_USER, MECHANISMS, PROTOCOLS, Called, Security, as_flag, event_hubs

_SHORT: Final = "kafka:///"
_TLS: Final = ("ca", "certificate", "certificate-key")


class Given(Protocol):
    """Settings by their names, as docs/settings.md has them."""

    def text(self, name: str) -> str:
        """Empty where it is nothing."""
        ...

    def source(self, name: str) -> str:
        """`flag` where it was said for this very thing, `environment` or `file` where others may be meant too, else `default`."""
        ...


def reached(url: str, given: Given, called: Called = as_flag) -> tuple[Address, Security]:
    """The topic at `url` and what its brokers ask for. `called`: as people write a setting, for errors.

    With a connection string of Event Hubs `kafka:///TOPIC` is enough, and `kafka:///` where that names the event hub too.
    Raises SettingsError; reads files, touches nothing.
    """
    password = _password(given, called)
    if not is_connection_string(password):
        return parse_url(url), _security(given, called, password)
    server, hub = event_hubs(password)
    address = parse_url(f"kafka://{server}/{url.removeprefix(_SHORT) or hub}" if url.startswith(_SHORT) else url)
    for what, theirs, ours in (
        ("Endpoint", server, address.servers),
        ("EntityPath", hub or address.topic, address.topic),
    ):
        if theirs != ours:
            raise SettingsError(f"{called('hub')} names {ours}, and the {what} of the connection string {theirs}.")
    return address, _security(given, called, password, connection_string=True)


def _security(given: Given, called: Called, password: str, *, connection_string: bool = False) -> Security:
    protocol, user, mechanism = (given.text(f"kafka-{name}") for name in ("security", "user", "mechanism"))
    if connection_string:
        protocol = "sasl_ssl" if given.source("kafka-security") == "default" else protocol
        if user not in ("", EVENT_HUBS_USER) or mechanism != "PLAIN":
            raise SettingsError(
                f"A connection string is the password of the user {EVENT_HUBS_USER} with {called('kafka-mechanism')} PLAIN, and of no "
                "other."
            )
        user = EVENT_HUBS_USER
    files = {name: given.text(name) for name in _TLS}
    made = Security(
        protocol,
        mechanism,
        user,
        password,
        files["ca"],
        files["certificate"],
        files["certificate-key"],
        connection_string,
        called,
    )
    _check(made, given)
    return made


def _check(made: Security, given: Given) -> None:
    """Raises SettingsError for what goes together badly, and for files that cannot be read."""
    for name, text, choices in (
        ("kafka-security", made.protocol, PROTOCOLS),
        ("kafka-mechanism", made.mechanism, MECHANISMS),
    ):
        if text not in choices:
            raise SettingsError(f"{made.called(name)} must be one of {', '.join(choices)}, not {text!r}.")
    protocol = f"{made.called('kafka-security')} {made.protocol}"
    if made.has_user and not (made.user and made.password):
        lacking = ("kafka-password-file", "kafka-password") if made.user else ("kafka-user",)
        raise SettingsError(f"{protocol} needs {' or '.join(map(made.called, lacking))} too.")
    if not made.has_user and (made.user or made.password):
        what = "user" if made.user else "password"
        raise SettingsError(f"A {what} for Kafka means nothing with {protocol}: brokers ask for it with sasl_ssl.")
    for name in _TLS:
        if not made.has_tls and given.source(name) == "flag":
            raise SettingsError(f"{made.called(name)} means nothing with {protocol}.")
        if made.has_tls and given.text(name):
            _read(given.text(name), made.called(name))
    if made.has_tls and made.certificate_key and not made.certificate:
        raise SettingsError(f"{made.called('certificate-key')} means nothing without {made.called('certificate')}.")


def _password(given: Given, called: Called) -> str:
    """As it is given, without the white space that files and variables get at their ends."""
    option = called("kafka-password-file")
    path = given.text("kafka-password-file")
    if given.source("kafka-password") == "flag" and given.source("kafka-password-file") != "flag":
        path = ""  # a program's argument, which the environment does not overrule
    text = _read(path, option) if path else given.text("kafka-password")
    if path and not text.strip():
        raise SettingsError(f"{option} {path} is empty.")
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
