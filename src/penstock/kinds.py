"""The kinds of settings, and how people write their values: durations as `250ms`, `30s`, `7d`, sizes as `64KiB`, `10MB`."""

from __future__ import annotations

import enum
import ipaddress
import os
import re
from typing import NamedTuple

from penstock.errors import SettingsError

DAY_S = 86_400
KIB, MIB, GIB, TIB = 1 << 10, 1 << 20, 1 << 30, 1 << 40


class Kind(enum.Enum):
    """How the text of a setting is read."""

    TEXT = "text"
    PATH = "path"
    ADDRESS = "address"
    CHOICE = "choice"
    COUNT = "count"
    SIZE = "size"
    DURATION = "duration"
    FLAG = "flag"
    SECRET = "secret"
    """A text that no command line has, since everybody on the machine sees those: from the environment or penstock.toml."""


class Address(NamedTuple):
    """Where a socket listens. Port 0 lets the system choose."""

    host: str
    port: int

    @property
    def loopback(self) -> bool:
        """Whether only this very machine can reach it."""
        return ipaddress.ip_address(self.host).is_loopback

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


Value = str | int | float | bool | Address


def parse(kind: Kind, text: str) -> Value:
    """The value of a text. Raises SettingsError with half a sentence."""
    match kind:
        case Kind.COUNT:
            if text == "cores":
                return os.cpu_count() or 1
            if text == "none":
                return 0
            if not re.fullmatch(r"[0-9]{1,18}", text):
                raise SettingsError("it must be a whole number")
            return int(text)
        case Kind.SIZE:
            return text_bytes(text)
        case Kind.DURATION:
            return text_seconds(text)
        case Kind.ADDRESS:
            return _address(text)
        case Kind.FLAG:
            if text.lower() in ("1", "true", "yes", "on"):
                return True
            if text.lower() in ("", "0", "false", "no", "off"):
                return False
            raise SettingsError("it must be yes or no")
        case _:
            return text


def text_seconds(text: str) -> float:
    """`250ms`, `30s`, `10m`, `1h`, `7d`; a bare number is seconds."""
    match = re.fullmatch(r"([0-9]{1,12}(?:\.[0-9]{1,9})?)(ms|s|m|h|d|)", text)
    if not match:
        raise SettingsError("it must be a duration such as 250ms, 30s, 10m, 1h or 7d")
    scale = {"ms": 0.001, "": 1.0, "s": 1.0, "m": 60.0, "h": 3600.0, "d": float(DAY_S)}
    return float(match[1]) * scale[match[2]]


def text_bytes(text: str) -> int:
    """`64KiB`, `1MiB`, `64GiB`, `1TiB`, `10kB`, `10MB`, `1GB`; a bare number is bytes."""
    match = re.fullmatch(r"([0-9]{1,18})(B|kB|KB|MB|GB|TB|KiB|MiB|GiB|TiB|)", text)
    if not match:
        raise SettingsError("it must be a size such as 64KiB, 1MiB or 64GiB")
    scale = {"": 1, "B": 1, "kB": 10**3, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
    scale |= {"KiB": KIB, "MiB": MIB, "GiB": GIB, "TiB": TIB}
    return int(match[1]) * scale[match[2]]


def _address(text: str) -> Address:
    match = re.fullmatch(r"(?:\[([0-9a-fA-F:]+)\]|([A-Za-z0-9._-]+)):([0-9]{1,5})", text)
    if not match or int(match[3]) > 65_535:
        raise SettingsError("it must be HOST:PORT")
    host = "127.0.0.1" if match[2] == "localhost" else match[1] or match[2]
    try:
        return Address(str(ipaddress.ip_address(host)), int(match[3]))
    except ValueError:
        raise SettingsError("its host must be an IP address, 0.0.0.0 for all of this machine, or localhost") from None
