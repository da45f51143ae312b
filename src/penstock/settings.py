"""Every setting once: name, type, default, limits, help. Flags, environment, penstock.toml and docs come from it.

A value is looked for in this order: flag, environment (`PENSTOCK_…`), `penstock.toml` in the working folder (or the
file that `--config` names), default. People write durations as `250ms`, `30s`, `10m`, `1h`, `7d` (a bare number is
seconds) and sizes as `64KiB`, `1MiB`, `64GiB`, `10MB` (a bare number is bytes).
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from penstock.errors import SettingsError
from penstock.kinds import DAY_S, Address, Kind, Value, parse, text_seconds


@dataclass(frozen=True)
class Setting:
    """`least` and `most` are inclusive, in the kind's own unit: bytes, seconds, or a number of `unit`."""

    name: str
    kind: Kind
    default: str
    help: str
    commands: tuple[str, ...]
    unit: str = ""
    least: str = ""
    most: str = ""
    choices: tuple[str, ...] = ()
    flag: str = ""

    @property
    def option(self) -> str:
        """Empty where there is none."""
        return "" if self.kind is Kind.SECRET else f"--{self.flag or self.name}"

    @property
    def variable(self) -> str:
        return "PENSTOCK_" + self.name.upper().replace("-", "_")


_API = ("up", "api")
_HOST = ("up", "host")
_SERVE = ("up", "api", "host")
_SKIP = "leases-skip"
_LOOK = ("status", "leases", "why", "audit", "verify", "flush")
_ASK = ("status", "leases", "why", "audit", "flush", "dump")
_DEAD = ("dead", "dead-fix", "dead-replay")
_TOPIC = ("api", "host", _SKIP, *_ASK, "simulate")
_HTTP = ("send", "simulate", "status", "leases", "flush", "units", "dead-replay")
_FAR = tuple(dict.fromkeys((*_HTTP, *_TOPIC)))
_KEYS = ("key-create", "key-list", "key-revoke", "token")
_K = Kind

# fmt: off
SETTINGS: tuple[Setting, ...] = (
    Setting("data", _K.PATH, "./data", "The folder of this installation.",
            (*_SERVE, *_LOOK, _SKIP, "send", "simulate", "units", "dead", "dead-replay", "dump", *_KEYS)),
    Setting("url", _K.TEXT, "http://127.0.0.1:8480",
            "Address of the API, or a connection string; for `flush` and `units` of the admin port. Default: what `up` wrote down "
            "in the data folder.",
            (*_HTTP, "key-create", "token")),
    Setting("hub", _K.TEXT, "",
            "The hub: a Kafka topic, `kafka://HOST:PORT[,HOST:PORT]/TOPIC`, or, for a host, the API that has it, `http://HOST:PORT` or a "
            "connection string. Default: the hub in the data folder.", _TOPIC),
    Setting("kafka-security", _K.CHOICE, "plaintext",
            "How the Kafka brokers are spoken to; with a connection string of Event Hubs it is `sasl_ssl`.",
            _TOPIC, choices=("plaintext", "ssl", "sasl_plaintext", "sasl_ssl")),
    Setting("kafka-mechanism", _K.CHOICE, "PLAIN", "How the brokers are shown the password.",
            _TOPIC, choices=("PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512")),
    Setting("kafka-user", _K.TEXT, "", "Who this is to the brokers, where they ask for a password.", _TOPIC),
    Setting("kafka-password", _K.SECRET, "",
            "The password, or a connection string of Azure Event Hubs. Never on a command line, where all see it.", _TOPIC),
    Setting("kafka-password-file", _K.PATH, "", "The file that it lies in; wins over `kafka-password`.", _TOPIC),
    Setting("replicas", _K.COUNT, "3", "Copies of a Kafka topic that is made; one that is there must have as many.",
            ("api",), "", "1", "32"),
    Setting("in-sync-replicas", _K.COUNT, "2", "Copies that a Kafka topic's brokers must have written before an event is accepted.",
            ("api",), "", "1", "32"),
    Setting("key", _K.TEXT, "",
            "The key that opens the API. Default: DATA/key, for what runs on the data folder and on loopback addresses.",
            (*_HTTP, "host", _SKIP)),
    Setting("ca", _K.PATH, "", "Certificates (PEM) that the API's or a Kafka broker's is checked against. Default: those of the system.",
            _FAR),
    Setting("certificate", _K.PATH, "", "The certificate (PEM) that is shown to an API or a Kafka broker that asks for one.", _FAR),
    Setting("certificate-key", _K.PATH, "", "Its private key, if it lies in another file.", _FAR),
    Setting("listen", _K.ADDRESS, "127.0.0.1:8480", "Where the API listens; port 0 is any free one.", _API),
    Setting("admin", _K.ADDRESS, "127.0.0.1:8481", "Where health, status and flush are served; loopback only.", _API),
    Setting("workers", _K.COUNT, "cores", "API worker processes.", _API, "processes", "1", "64"),
    Setting("partitions", _K.COUNT, "16", "Partitions of the hub; fixed when it is created.", _API, "", "1", "1024"),
    Setting("period", _K.DURATION, "1h",
            "Length of an hour file: whole seconds that divide a day; fixed when the hub is created.",
            _API, "", "1s", "24h"),
    Setting("store", _K.TEXT, "DATA/store",
            "Blob store: a folder, `file:///folder`, `az://container/prefix`, `s3://bucket/prefix` or `gs://bucket/prefix`.",
            (*_SERVE, *_LOOK, _SKIP, "simulate", "dump", *_DEAD)),
    Setting("archive", _K.CHOICE, "on", "`none`: no archiver; where no host has its lease, retention deletes what was not archived.",
            (*_API, "audit", "simulate"), choices=("on", "none")),
    Setting("retention", _K.DURATION, "7d", "How long the hub keeps what is archived.", _API, "", "1s", "3650d"),
    Setting("lease", _K.DURATION, "30s", "A lease that did not change for so long may be taken over.",
            (*_HOST, "leases", "why"), "", "1s", "1h"),
    Setting("watch", _K.DURATION, "1s", "Look at the leases for so long, to see which of them are renewed.",
            ("leases", _SKIP), "", "0s", "1h"),
    Setting("name", _K.TEXT, "", "Name of this host in the leases. Default: host name and random digits.", ("host",)),
    Setting("anonymous", _K.FLAG, "no", "Let everyone in without a key; on loopback addresses only.", _API),
    Setting("tls-cert", _K.PATH, "", "The API's certificate with its chain (PEM); then `--listen` speaks TLS.", _API),
    Setting("tls-key", _K.PATH, "", "Its private key, if it lies in another file.", _API),
    Setting("tls-client-ca", _K.PATH, "", "Certificates (PEM) that clients' are checked against; without one no client comes in.", _API),
    Setting("device-field", _K.TEXT, "deviceId", "The field of an event that names its device.",
            (*_SERVE, "send", "dead-fix", "dead-replay")),
    Setting("hub-bytes-max", _K.SIZE, "64GiB",
            "The hub's size on disk (the file is sparse). At 90 % of it new events are refused.",
            (*_SERVE, *_LOOK, _SKIP, "simulate"), "", "16MiB", "16TiB"),
    Setting("body-bytes-max", _K.SIZE, "1MiB", "A request's body as sent.", _API, "", "1KiB", "64MiB"),
    Setting("batch-bytes-max", _K.SIZE, "16MiB", "A request's body unzipped.", _API, "", "1KiB", "256MiB"),
    Setting("batch-events-max", _K.COUNT, "10000", "Events of a batch.", _API, "events", "1", "1000000"),
    Setting("event-bytes-max", _K.SIZE, "256KiB", "One event.", _API, "", "64", "256KiB"),
    Setting("frame-bytes-max", _K.SIZE, "256KiB", "NDJSON of a frame before zip.", _API, "", "4KiB", "256KiB"),
    Setting("header-bytes-max", _K.SIZE, "16KiB", "A request's headers; its target has 8 KiB of its own.", _API, "", "1KiB", "1MiB"),
    Setting("header-timeout", _K.DURATION, "30s", "From a request's first byte to the end of its headers.",
            _API, "", "10ms", "1h"),
    Setting("idle-timeout", _K.DURATION, "30s", "A connection without a request is closed.", _API, "", "10ms", "1h"),
    Setting("body-timeout", _K.DURATION, "30s", "From the end of the headers to the end of the body.",
            _API, "", "10ms", "1h"),
    Setting("throughput-units", _K.COUNT, "none",
            "What may come in: 1,000 events or 1 MB a second for each; `none`: unlimited. Kept, and changed at run time "
            "by `penstock units`; given at a start, it wins over what was kept.",
            _API, "units", "0", "1000000"),
    Setting("device-events-per-s", _K.COUNT, "none", "What one device may send; `none`: unlimited.", _API, "events", "0", "1000000"),
    Setting("write-timeout", _K.DURATION, "30s", "An answer must be read in this time, or 64 KiB of it in each such time.",
            _API, "", "10ms", "1h"),
    Setting("connections-max", _K.COUNT, "10000",
            "Connections of one worker, and at most 3/4 of its open files. Who comes to a full house gets the place of the one that "
            "has been idle longest, else `hub_busy`.",
            _API, "connections", "1", "1000000"),
    Setting("connections-per-address-max", _K.COUNT, "2000",
            "Connections of one worker from one address (IPv6: /64); more are answered `hub_busy`. 0: as many as there are.",
            _API, "connections", "0", "1000000"),
    Setting("queue-batches-max", _K.COUNT, "4096",
            "Batches of one worker that wait for a commit; more are answered `hub_busy`.",
            _API, "batches", "1", "1000000"),
    Setting("queue-wait-max", _K.DURATION, "1s",
            "A batch that would wait longer before a worker begins with it is answered `hub_busy` at once.",
            _API, "", "10ms", "1h"),
    Setting("file-bytes-max", _K.SIZE, "1GiB", "NDJSON in one hour file; then the next part begins.",
            _HOST, "", "256KiB", "1TiB"),
    Setting("stop-timeout", _K.DURATION, "9s", "On SIGTERM what still runs after so long is killed; half of it is for requests.",
            _API, "", "1s", "2h"),
    Setting("log-level", _K.CHOICE, "info", "The least level that is logged.",
            _SERVE, choices=("debug", "info", "warning", "error")),
    Setting("spool", _K.PATH, "spool", "The folder where events lie until the hub has answered for them.",
            ("send", *_DEAD)),
    Setting("batch", _K.COUNT, "1000", "Events of one request.", ("send",), "events", "1", "10000"),
    Setting("lanes", _K.COUNT, "4", "Requests in flight; a device is always in the same lane.",
            ("send",), "lanes", "1", "64"),
    Setting("send-timeout", _K.DURATION, "10m", "Give up after so long without any progress.",
            ("send",), "", "100ms", "30d", flag="timeout"),
    Setting("devices", _K.COUNT, "1000", "Simulated devices.", ("simulate",), "devices", "1", "1000000"),
    Setting("gateways", _K.COUNT, "16", "What the devices send through: each is a producer with a connection of its own.",
            ("simulate",), "gateways", "1", "64"),
    Setting("rate", _K.COUNT, "5000", "Events of all devices in a second.", ("simulate",), "events", "1", "1000000"),
    Setting("seconds", _K.DURATION, "60", "How long the devices go on.", ("simulate",), "", "100ms", "30d"),
    Setting("faults", _K.FLAG, "no",
            "The gateways misbehave too: requests cut short, slow or wrong, numbers used twice, events that must be rejected.",
            ("simulate",)),
    Setting("seed", _K.COUNT, "1", "The same seed makes the same devices do the same.", ("simulate",), "", "0", "1000000000"),
    Setting("answer-timeout", _K.DURATION, "30s", "Wait so long for answers that do not come.",
            ("simulate",), "", "100ms", "1h", flag="timeout"),
    Setting("dead-timeout", _K.DURATION, "60s", "Wait so long for the hub's answers.",
            ("dead-replay",), "", "0s", "30d", flag="timeout"),
    Setting("flush-timeout", _K.DURATION, "60s", "Wait so long for the archiver.",
            ("flush",), "", "0s", "30d", flag="timeout"),
)
# fmt: on


class Values:
    """The settings of one command, each checked. `given` tells whether a value is more than the default."""

    def __init__(self, values: Mapping[str, Value], sources: Mapping[str, str]) -> None:
        self._values = values
        self._sources = sources

    def text(self, name: str) -> str:
        value = self._values[name]
        assert isinstance(value, str), name
        return value

    def count(self, name: str) -> int:
        """Of a COUNT or SIZE."""
        value = self._values[name]
        assert isinstance(value, int), name
        return value

    def seconds(self, name: str) -> float:
        value = self._values[name]
        assert isinstance(value, float), name
        return value

    def flag(self, name: str) -> bool:
        return self._values[name] is True

    def address(self, name: str) -> Address:
        value = self._values[name]
        assert isinstance(value, Address), name
        return value

    def source(self, name: str) -> str:
        """`flag`, `environment`, `file` or `default`."""
        return self._sources[name]


def load(
    command: str,
    flags: Mapping[str, str | bool | None],
    environ: Mapping[str, str],
    config: Path | None = None,
) -> Values:
    """All settings of `command`. `flags` are texts by setting name; None stands for a flag that was not given.

    Raises SettingsError for a wrong value, a name that penstock.toml cannot have, a config file that is not there.
    """
    from_file = _read_file(config)
    values: dict[str, Value] = {}
    sources: dict[str, str] = {}
    for setting in of_command(command):
        text: str
        flag = flags.get(setting.name)
        if flag is not None and flag is not False:
            text, source, where = str(flag), "flag", setting.option
        elif setting.variable in environ:
            text, source, where = environ[setting.variable], "environment", setting.variable
        elif setting.name in from_file:
            text, source, where = from_file[setting.name], "file", f"{setting.name} in {config or 'penstock.toml'}"
        else:
            text, source, where = setting.default, "default", setting.option
        values[setting.name] = _read(setting, text, where)
        sources[setting.name] = source
    return Values(values, sources)


def of_command(command: str) -> Iterable[Setting]:
    return (setting for setting in SETTINGS if command in setting.commands)


def _read_file(config: Path | None) -> dict[str, str]:
    path = config or Path("penstock.toml")
    if config is None and not path.exists():
        return {}
    import tomllib

    try:
        table = tomllib.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise SettingsError(f"The settings file {path} is not there.") from None
    except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SettingsError(f"The settings file {path} cannot be read: {error}.") from error
    known = {setting.name for setting in SETTINGS}
    texts = {}
    for name, value in table.items():
        if name not in known:
            raise SettingsError(f"{path}: there is no setting `{name}`.")
        if not isinstance(value, str | int | float):
            raise SettingsError(f"{path}: {name} is neither a text nor a number nor true or false.")
        texts[name] = str(value)
    return texts


def _read(setting: Setting, text: str, where: str) -> Value:
    try:
        value = parse(setting.kind, text)
        if setting.least and isinstance(value, int | float):
            least, most = parse(setting.kind, setting.least), parse(setting.kind, setting.most)
            assert isinstance(least, int | float) and isinstance(most, int | float), setting.name
            if not least <= value <= most:
                raise SettingsError(f"it must be between {setting.least} and {setting.most}")
        if setting.choices and text not in setting.choices:
            raise SettingsError(f"it must be one of {', '.join(setting.choices)}")
        if setting.name == "period" and (text_seconds(text) % 1 or DAY_S % text_seconds(text)):
            raise SettingsError("it must be whole seconds that divide 24h")
        if setting.name == "admin" and isinstance(value, Address) and not value.loopback:
            raise SettingsError("the admin port listens on loopback addresses only, for whoever is on this machine")
        if setting.name == "name" and not re.fullmatch(r"[A-Za-z0-9._-]{0,64}", text):
            raise SettingsError("a host's name is at most 64 of A-Z a-z 0-9 . _ -")
    except SettingsError as error:
        raise SettingsError(f"{where} is wrong ({text!r}): {error.detail}.") from error
    return value


def document() -> str:
    """docs/settings.md."""
    lines = [
        "# Settings",
        "",
        "Generated by `python -m penstock.settings > docs/settings.md`; do not edit.",
        "",
        "A value is looked for in this order: flag, environment variable, `penstock.toml` in the working folder",
        "(`--config FILE` names another; its keys are the names below), default. Durations are written `250ms`, `30s`,",
        "`10m`, `1h`, `7d` (a bare number is seconds), sizes `64KiB`, `1MiB`, `64GiB`, `10MB` (a bare number is bytes).",
        "A wrong value ends the command with exit 2 before anything is touched.",
        "",
        "| name | flag | environment | type | default | limits | commands | what |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for setting in SETTINGS:
        limits = f"{setting.least} … {setting.most}" if setting.least else " · ".join(f"`{c}`" for c in setting.choices)
        kind = f"{setting.kind.value}, {setting.unit}" if setting.unit else setting.kind.value
        default = f"`{setting.default}`" if setting.default else ""
        flag = f"`{setting.option}`" if setting.option else ""
        cells = [f"`{setting.name}`", flag, f"`{setting.variable}`", kind, default, limits]
        cells += [" ".join(setting.commands), setting.help]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.stdout.write(document())
