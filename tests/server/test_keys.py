"""DATA/keys.json: what is written, by whom it can be read, and that nothing half done is ever seen."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import stat
import threading
from pathlib import Path

import msgspec
import pytest

from penstock.errors import SettingsError
from penstock.files import Files
from penstock.server.keys import Keys, allows, decode, encode
from penstock.server.message import Right
from penstock.testing import FakeClock, FaultyFiles


@pytest.fixture
def keys(tmp_path: Path) -> Keys:
    return Keys(tmp_path, Files(), FakeClock(1_795_356_000_000))


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_a_key_is_written_as_the_format_says_and_its_secret_is_not(keys: Keys, tmp_path: Path) -> None:
    made = keys.create(["send"], name="press", devices=["d-*", "e-1"], events_per_s=100, bytes_per_s=1 << 20)
    kid, _, secret = made.text.partition(".")
    text = (tmp_path / "keys.json").read_text()
    assert secret not in text
    assert json.loads(text) == {
        "version": 1,
        "keys": [
            {
                "kid": kid,
                "name": "press",
                "sha256": hashlib.sha256(secret.encode()).hexdigest(),
                "rights": ["send"],
                "devices": ["d-*", "e-1"],
                "events_per_s": 100,
                "bytes_per_s": 1 << 20,
                "created": "2026-11-22T14:00:00.000Z",
                "revoked": None,
            }
        ],
    }
    assert len(kid) == 12
    assert len(secret) == 43  # 256 bits in base64url


def test_only_the_owner_may_read_it_from_its_first_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    modes: list[int] = []

    class Watched(Files):
        def _write(self, fd: int, body: memoryview) -> int:
            modes.append(stat.S_IMODE(os.fstat(fd).st_mode))
            return super()._write(fd, body)

    before = os.umask(0)
    try:
        watched = Keys(tmp_path, Watched(), FakeClock())
        assert watched.first()
        watched.create(["send"])
    finally:
        os.umask(before)
    assert set(modes) == {0o600}
    assert [mode(tmp_path / name) for name in ("key", "keys.json")] == [0o600, 0o600]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["key", "keys.json", "keys.lock"]


def test_the_first_key_is_made_once_and_has_all_rights(keys: Keys, tmp_path: Path) -> None:
    assert keys.first()
    (first,) = keys.all()
    text = (tmp_path / "key").read_text()
    assert (first.name, first.rights, first.devices) == ("first", ("send", "listen", "manage"), ())
    assert text == f"{first.kid}.{text.strip().partition('.')[2]}\n"
    assert not keys.first()
    keys.revoke(first.kid)
    assert not keys.first()  # who has revoked it does not get another by a restart
    assert (tmp_path / "key").read_text() == text


def test_a_first_key_that_was_cut_short_is_made_anew(tmp_path: Path) -> None:
    """Its text is written first, so that a crash between the two leaves no key that nobody has."""
    faulty = FaultyFiles()
    assert Keys(tmp_path, faulty, FakeClock()).first()
    calls = len(faulty.calls)
    for number in range(1, calls + 1):
        folder = tmp_path / str(number)
        folder.mkdir()
        try:
            Keys(folder, FaultyFiles({number: errno.EIO}), FakeClock()).first()
        except SettingsError as error:
            assert "cannot be changed" in error.detail
        again = Keys(folder, Files(), FakeClock())
        again.first()
        (known,) = again.all()
        kid, _, secret = (folder / "key").read_text().strip().partition(".")
        assert (kid, hashlib.sha256(secret.encode()).hexdigest()) == (known.kid, known.sha256)


def test_revoking_is_for_good_and_can_be_repeated(keys: Keys) -> None:
    kept, gone = keys.create(["send"]).key, keys.create(["listen"]).key
    assert keys.revoke(gone.kid).revoked == "2026-11-22T14:00:00.000Z"
    assert keys.revoke(gone.kid) == keys.all()[1]
    assert [key.revoked is None for key in keys.all()] == [True, False]
    assert keys.all()[0] == kept
    with pytest.raises(SettingsError, match="no key nobody"):
        keys.revoke("nobody")


def test_two_keys_may_have_one_name_and_a_third_not_until_one_is_revoked(keys: Keys) -> None:
    first, _ = keys.create(["send"], name="press").key, keys.create(["send"], name="press")
    with pytest.raises(SettingsError, match="revoke one first"):
        keys.create(["send"], name="press")
    keys.revoke(first.kid)
    keys.create(["send"], name="press")
    assert [key.name for key in keys.all()] == ["press"] * 3


def test_a_key_without_a_name_is_called_by_its_id_and_no_other_may_be(keys: Keys) -> None:
    made = keys.create(["send"]).key
    assert made.name == made.kid
    with pytest.raises(SettingsError, match="is the id of another key"):
        keys.create(["send"], name=made.kid)


@pytest.mark.parametrize("name", ["a b", "a/b", "ä", "a" * 65, "-a", "a;b"])
def test_names_that_cannot_be(keys: Keys, tmp_path: Path, name: str) -> None:
    with pytest.raises(SettingsError, match="No key was made"):
        keys.create(["send"], name=name)
    assert not (tmp_path / "keys.json").exists()


@pytest.mark.parametrize(
    ("rights", "able"),
    [
        (("send",), Right.SEND),
        (("listen",), Right.LISTEN),
        (("send", "listen"), Right.SEND | Right.LISTEN),
        (("manage",), Right.SEND | Right.LISTEN | Right.MANAGE),
    ],
)
def test_to_manage_includes_the_others(keys: Keys, rights: tuple[str, ...], able: Right) -> None:
    assert keys.create(rights).key.right == able  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("patterns", "device", "allowed"),
    [
        (["d-1"], "d-1", True),
        (["d-1"], "d-10", False),
        (["d-*"], "d-", True),
        (["d-*"], "d-10", True),
        (["d-*"], "e-1", False),
        (["a", "b-*"], "b-2", True),
        (["a", "b-*"], "a2", False),
        (["D-1"], "d-1", False),
        (["a.*"], "a.b", True),
        (["a.*"], "axb", False),
    ],
)
def test_device_patterns(patterns: list[str], device: str, allowed: bool) -> None:
    judge = allows(patterns)
    assert judge is not None
    assert judge(device) is allowed


def test_without_patterns_every_device_is_allowed() -> None:
    assert allows([]) is allows(["*"]) is allows(["d-1", "*"]) is None


@pytest.mark.parametrize("pattern", ["", "*d", "d*-1", "d-**", "d 1", "ä*", "d" * 129, "d\n"])
def test_what_is_no_pattern(keys: Keys, pattern: str) -> None:
    with pytest.raises(SettingsError, match="neither a device id nor the beginning"):
        keys.create(["send"], devices=[pattern])


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        (lambda text: text[:-20], "truncated|malformed"),
        (lambda text: text.replace('"version": 1', '"version": 2'), "version 2"),
        (lambda text: text.replace('"send"', '"all"'), "all"),
        (lambda text: text.replace('"sha256": "', '"sha256": "00'), "sha256"),
        (lambda text: text.replace('"devices": [', '"devices": ["*x"'), "beginning of some"),
        (lambda text: text.replace('"name"', '"title"'), "title|name"),
        (lambda text: "", "truncated"),
        (lambda text: text.replace('"version"', '"x": ' + "[" * 100_000 + ', "version"'), "without end"),
    ],
)
def test_a_file_that_is_not_ours_is_left_alone(keys: Keys, tmp_path: Path, damage, why: str) -> None:
    keys.create(["send"])
    path = tmp_path / "keys.json"
    path.write_text(damaged := damage(path.read_text()))
    for act in (keys.all, keys.first, lambda: keys.create(["send"]), lambda: keys.revoke("x")):
        with pytest.raises(SettingsError, match=why):
            act()
    assert path.read_text() == damaged


def test_a_key_that_stands_there_twice_is_no_file_of_ours(keys: Keys) -> None:
    one = keys.create(["send"]).key
    with pytest.raises(ValueError, match="twice"):
        decode(encode([one, one]))
    with pytest.raises(ValueError):
        decode(encode([msgspec.structs.replace(one, rights=())]))


def test_writers_wait_for_each_other(tmp_path: Path) -> None:
    """Each reads under the lock what the one before has written. Without the lock the last one wins, and keys are lost."""

    def lost(files: type[Files], folder: Path) -> int:
        folder.mkdir()
        keys = Keys(folder, files(), FakeClock())
        threads = [threading.Thread(target=lambda: [keys.create(["send"]) for _ in range(4)]) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return 16 - len(keys.all())

    assert lost(Files, tmp_path / "locked") == 0

    class Careless(Files):
        """Everyone reads before anyone writes."""

        def __init__(self) -> None:
            self.all_have_read = threading.Barrier(4)

        def _flock(self, fd: int, operation: int) -> None: ...

        def read(self, path: Path) -> bytes:
            body = super().read(path) if path.exists() else b'{"version":1,"keys":[]}'
            if threading.current_thread() is not threading.main_thread():
                self.all_have_read.wait(10)
            return body

    assert lost(Careless, tmp_path / "careless") == 12
