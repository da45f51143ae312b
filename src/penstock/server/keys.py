"""DATA/keys.json: who may do what. Its format is in docs/formats.md, what keys are for in docs/security.md.

Of a secret only its SHA-256 is kept: it has 256 random bits, so nobody finds it by trying, and no slow hash is needed. Writers take a
lock and replace the file as a whole; a worker that sees another file than the one it knows reads it again (auth.py).
"""

from __future__ import annotations

import hashlib
import re
import secrets
import string
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Final, Literal, NamedTuple

import msgspec

from penstock.clock import Clock, timestamp
from penstock.errors import SettingsError
from penstock.files import Files
from penstock.sas import derived_key
from penstock.server.message import Right

VERSION: Final = 1
PRIVATE: Final = 0o600
FIRST: Final = "first"
SAME_NAME_MAX: Final = 2
_KID = string.ascii_lowercase + string.digits
_KID_LENGTH = 12
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_PATTERN = re.compile(r"[A-Za-z0-9._:@-]{0,128}\*|[A-Za-z0-9._:@-]{1,128}")

RightName = Literal["send", "listen", "manage"]


class Key(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A key. `devices` are those it may send for, `*` at an end for whatever follows; empty: all. Times are RFC 3339.

    `events_per_s` and `bytes_per_s` are what may be sent with it; None: as much as the installation takes.
    """

    kid: Annotated[str, msgspec.Meta(pattern="^[a-z0-9]{12}$")]
    name: str
    sha256: Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]
    rights: Annotated[tuple[RightName, ...], msgspec.Meta(min_length=1)]
    devices: tuple[str, ...]
    events_per_s: Annotated[int, msgspec.Meta(ge=1)] | None
    bytes_per_s: Annotated[int, msgspec.Meta(ge=1)] | None
    created: str
    revoked: str | None

    @property
    def right(self) -> Right:
        """Who may manage may do the rest too."""
        rights = Right.NONE
        for name in self.rights:
            rights |= Right[name.upper()]
        return rights | Right.SEND | Right.LISTEN if Right.MANAGE in rights else rights

    @property
    def shared_access_key(self) -> str:
        """What signs SAS tokens in the name of this key. Whoever can read the hash can make it, and the bearer key he cannot."""
        return derived_key(bytes.fromhex(self.sha256))


class NewKey(NamedTuple):
    """A key and its text, `<kid>.<secret>`, which is nowhere else."""

    key: Key
    text: str


class _Document(msgspec.Struct, frozen=True):
    version: int
    keys: tuple[Key, ...]


def decode(body: bytes) -> tuple[Key, ...]:
    """The keys of a file. Raises ValueError for what is none of this version."""
    try:
        document = msgspec.json.decode(body, type=_Document)
    except RecursionError:
        raise ValueError("it is nested without end") from None
    if document.version != VERSION:
        raise ValueError(f"it has version {document.version}, and this Penstock knows {VERSION}")
    if len({key.kid for key in document.keys}) != len(document.keys):
        raise ValueError("a key stands there twice")
    for key in document.keys:
        allows(key.devices)
    return document.keys


def encode(keys: Sequence[Key]) -> bytes:
    return msgspec.json.format(msgspec.json.encode(_Document(VERSION, tuple(keys)))) + b"\n"


def allows(patterns: Sequence[str]) -> Callable[[str], bool] | None:
    """Whether a device is among the patterns; None without any, for then all are. Raises ValueError for what is no pattern.

    A `*` stands only at an end, so a pattern is one name or one beginning, and no device takes long to be judged.
    """
    for pattern in patterns:
        if not _PATTERN.fullmatch(pattern):
            raise ValueError(f"{pattern!r} is neither a device id nor the beginning of some and `*`")
    if not patterns or "*" in patterns:
        return None
    names = frozenset(pattern for pattern in patterns if not pattern.endswith("*"))
    begins = tuple(pattern[:-1] for pattern in patterns if pattern.endswith("*"))
    return lambda device: device in names or device.startswith(begins)


class Keys:
    """The keys of a data folder, for commands. Raises SettingsError where a wish or the file is wrong; the file is as it was then."""

    def __init__(self, data: Path, files: Files, clock: Clock) -> None:
        self._data = data
        self._path = keys_path(data)
        self._files = files
        self._clock = clock

    def all(self) -> tuple[Key, ...]:
        """In the order in which they were made, revoked ones too."""
        try:
            return decode(self._files.read(self._path))
        except FileNotFoundError:
            return ()
        except (OSError, ValueError) as error:
            raise SettingsError(f"The keys in {self._path} cannot be read: {error}. Nothing was changed.") from error

    def create(
        self,
        rights: Sequence[RightName],
        *,
        name: str = "",
        devices: Sequence[str] = (),
        events_per_s: int | None = None,
        bytes_per_s: int | None = None,
    ) -> NewKey:
        """One more key; without a name it is called by its id. Every worker knows it when this returns."""
        if name and not _NAME.fullmatch(name):
            raise SettingsError(f"The name of a key is at most 64 of A-Z a-z 0-9 . _ -, not {name!r}. No key was made.")
        try:
            allows(devices)
        except ValueError as error:
            raise SettingsError(f"{error}. No key was made.") from error
        with self._changing() as known:
            living = [key for key in known if key.revoked is None]
            if sum(key.name == name for key in living) >= SAME_NAME_MAX:
                raise SettingsError(
                    f"There are {SAME_NAME_MAX} keys of the name {name} already, one to be replaced by the other: "
                    "revoke one first. No key was made."
                )
            if any(name == key.kid for key in known):
                raise SettingsError(f"{name} is the id of another key. No key was made.")
            taken = {key.kid for key in known} | {key.name for key in known}
            made = self._made(taken, rights, name, devices, events_per_s, bytes_per_s)
            self._write((*known, made.key))
        return made

    def revoke(self, kid: str) -> Key:
        """From now on no worker takes it. No error if it was revoked before."""
        with self._changing() as known:
            at = next((number for number, key in enumerate(known) if key.kid == kid), None)
            if at is None:
                raise SettingsError(f"There is no key {kid}: `penstock key list` names them. Nothing was changed.")
            if known[at].revoked is not None:
                return known[at]
            revoked = msgspec.structs.replace(known[at], revoked=timestamp(self._clock.now_ms()))
            self._write((*known[:at], revoked, *known[at + 1 :]))
        return revoked

    def first(self) -> bool:
        """Where no key is, make one with all rights and put its text into DATA/key; whether that was so."""
        with self._changing() as known:
            if known:
                return False
            made = self._made(set(), ("send", "listen", "manage"), FIRST, (), None, None)
            # Its text first: of a key without a text nobody would have anything, and one without a key is replaced the next time.
            self._files.replace(key_path(self._data), f"{made.text}\n".encode(), mode=PRIVATE)
            self._write((made.key,))
        return True

    @contextmanager
    def _changing(self) -> Iterator[tuple[Key, ...]]:
        try:
            with self._files.lock(self._path.with_suffix(".lock")):
                yield self.all()
        except OSError as error:
            raise SettingsError(f"The keys in {self._path} cannot be changed: {error}.") from error

    def _write(self, keys: Sequence[Key]) -> None:
        self._files.replace(self._path, encode(keys), mode=PRIVATE)

    def _made(
        self,
        taken: set[str],
        rights: Sequence[RightName],
        name: str,
        devices: Sequence[str],
        events_per_s: int | None,
        bytes_per_s: int | None,
    ) -> NewKey:
        kid = _new_kid()
        while kid in taken:
            kid = _new_kid()
        secret = secrets.token_urlsafe(32)
        key = Key(
            kid,
            name or kid,
            hashlib.sha256(secret.encode()).hexdigest(),
            tuple(dict.fromkeys(rights)),
            tuple(dict.fromkeys(devices)),
            events_per_s,
            bytes_per_s,
            timestamp(self._clock.now_ms()),
            None,
        )
        return NewKey(key, f"{kid}.{secret}")


def keys_path(data: Path) -> Path:
    return data / "keys.json"


def key_path(data: Path) -> Path:
    """Where the text of the first key lies."""
    return data / "key"


def _new_kid() -> str:
    return "".join(secrets.choice(_KID) for _ in range(_KID_LENGTH))
