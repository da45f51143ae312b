"""Dead letters: what a change leaves alone, and the way back into the spool, cut before each act on the disk."""

from __future__ import annotations

import itertools
import shutil
import threading
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.client.client import Client
from penstock.client.dead import Change, Letter, Letters, changed, check, event_of, fixed, replay
from penstock.client.lane import DEAD, Lane
from penstock.client.records import Contents, Dead, State, batch_text
from penstock.errors import FlushTimeout, SettingsError, SpoolDamaged, SpoolError
from penstock.files import Files
from tests.client.conftest import MemoryApi, never_arrived, problem
from tests.client.power import PowerCut, PowerFiles
from tests.client.test_lane import HOW, drain, open_lane

EVENTS = [b'{"deviceId":"d","n":1.50}', b'{"deviceId":"d","n":2}', b'{"deviceId":"d","n":\xff}']


def bury(spool: Path, name: str, events: list[bytes], code: str = "no_device") -> None:
    (spool / DEAD).mkdir(parents=True, exist_ok=True)
    text = b"".join(msgspec.json.encode(Dead.of(event, code, f"why {code}")) + b"\n" for event in events)
    (spool / DEAD / f"{name}.ndjson").write_bytes(text)


def letters_of(spool: Path, files: Files | None = None) -> Letters:
    return Letters(spool, files or Files())


def to_spool(letters: Letters) -> list[Path]:
    return letters.to_spool(letters.all(), device_field="deviceId", now_ms=lambda: 0)


def test_dead_letters_are_read_as_they_were_buried(tmp_path: Path) -> None:
    bury(tmp_path, "c-1-1-000000000001", EVENTS)
    [letter] = letters_of(tmp_path).all()
    assert [event_of(record) for record in letter.records] == EVENTS
    assert (letter.id, dict(letter.codes)) == ("c-1-1-000000000001", {"no_device": 3})


def test_an_id_is_found_by_its_beginning(tmp_path: Path) -> None:
    for name in ("c-1-1-000000000001", "c-1-1-000000000002", "c-1", "d-1"):
        bury(tmp_path, name, EVENTS)
    letters = letters_of(tmp_path)
    assert (letters.find("d").id, letters.find("c-1").id) == ("d-1", "c-1")
    with pytest.raises(SettingsError, match=r"several.*000000000001, c-1-1-000000000002\."):
        letters.find("c-1-")
    with pytest.raises(SettingsError, match="no dead letters 'x'"):
        letters.find("x")


@pytest.mark.parametrize("text", [b"no\n", b"\n", b'{"code":"c"}\n', b'{"code":"c","detail":"","event":" "}\n'])
def test_a_damaged_file_is_named_and_hides_no_other(tmp_path: Path, text: bytes) -> None:
    bury(tmp_path, "a", EVENTS)
    (tmp_path / DEAD / "b.ndjson").write_bytes(text)
    letters = letters_of(tmp_path)
    assert [bool(letter.damaged) for letter in letters.all()] == [False, True]
    with pytest.raises(SpoolDamaged, match=r"b.ndjson, line 1, is damaged.*mend it"):
        letters.find("b")


@pytest.mark.parametrize(
    ("event", "change", "becomes"),
    [
        (b'{"a":1.50,"b":1e2}', Change(rename=(("a", "c"),)), b'{"c":1.50,"b":1e2}'),
        (b'{"a":1.50,"b":1e2,"a":2}', Change(drop=frozenset(("a",))), b'{"b":1e2}'),
        (b'{"a":1, "b":2,"a":3}', Change(put=(("a", "7.0"),)), b'{"a":7.0,"b":2}'),
        (b'{"b":2}', Change(put=(("a", '"x"'),)), b'{"b":2,"a":"x"}'),
        (b"{}", Change(put=(("a", "null"),)), b'{"a":null}'),
        (
            b'{"a":1,"b":2}',
            Change((("a", "c"),), frozenset("b"), (("b", "3"), ("c", "4"))),
            b'{"c":4,"b":3}',
        ),
        (
            b'{"\\u0061":[1, 2.0],"a b":"\\u00e9"}',
            Change(put=(("z", "1"),)),
            b'{"\\u0061":[1, 2.0],"a b":"\\u00e9","z":1}',
        ),
        (b'{"x":' + b"9" * 9999 + b"}", Change(rename=(("x", "y"),)), b'{"y":' + b"9" * 9999 + b"}"),
        (b'{"a":1}', Change(rename=(("x", "y"),)), b'{"a":1}'),
    ],
)
def test_a_change_leaves_the_text_of_the_other_fields(event: bytes, change: Change, becomes: bytes) -> None:
    assert changed(event, change) == becomes


def test_a_name_that_is_there_already_is_not_given_again() -> None:
    with pytest.raises(ValueError, match="both a and b"):
        changed(b'{"a":1,"b":2}', Change(rename=(("a", "b"),)))


@pytest.mark.parametrize(
    "event", [b"[]", b"1", b"{", b'{"a":}', b'{"a":1}x', b'{"a":"\xff"}', b"{" * 100_000, b'{"a":NaN}', b""]
)
def test_what_is_no_object_is_not_changed(event: bytes) -> None:
    with pytest.raises(ValueError, match="no JSON object"):
        changed(event, Change(put=(("z", "1"),)))


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.text(), json_values), st.text(), json_values)
def test_a_field_that_is_put_is_the_only_difference(event: dict[str, Any], name: str, value: Any) -> None:
    becomes = changed(msgspec.json.encode(event), Change(put=((name, msgspec.json.encode(value).decode()),)))
    expected = {**event, name: value}
    assert becomes == msgspec.json.encode(expected)


@pytest.mark.parametrize(
    ("event", "says"),
    [
        (b'{"n":1}', "no deviceId"),
        (b'{"deviceId":1}', "not the name"),
        (b'{"deviceId":""}', "not the name"),
        (b'{"deviceId":"a","deviceId":"a"}', "2 times"),
        (b"[]", "no JSON object"),
    ],
)
def test_an_event_that_would_be_rejected_again_is_told(event: bytes, says: str) -> None:
    check(b'{"deviceId":"d"}', "deviceId")
    with pytest.raises(ValueError, match=says):
        check(event, "deviceId")


def test_all_events_are_put_right_or_none() -> None:
    records = [Dead.of(event, "no_device", "why") for event in (b'{"n":1}', b"\xff", b'{"n":3}')]
    better = fixed(records, {0: b'{"deviceId":"d"}', 2: b""}, "deviceId")
    assert [(record.code, record.detail) for record in better] == [
        ("fixed", "was no_device: why"),
        ("no_device", "why"),
    ]
    assert [event_of(record) for record in better] == [b'{"deviceId":"d"}', b"\xff"]
    assert fixed(better, {1: b'{"deviceId":"e"}'}, "deviceId")[0].detail == "was no_device: why"
    with pytest.raises(SpoolError, match=r"Nothing was changed.*event 2.*event 3"):
        fixed(records, {0: b'{"deviceId":"d"}', 1: b"x", 2: b"{}"}, "deviceId")


def test_what_is_kept_takes_the_place_of_what_was_dead(tmp_path: Path) -> None:
    bury(tmp_path, "a", EVENTS)
    letters = letters_of(tmp_path)
    letters.put_aside(letters.find("a"), b"text")
    letters.keep(letters.find("a"), letters.find("a").records[:1])
    assert [event_of(record) for record in letters.find("a").records] == EVENTS[:1]
    letters.keep(letters.find("a"), [])
    assert list((tmp_path / DEAD).iterdir()) == []


def test_only_one_process_changes_dead_letters(tmp_path: Path) -> None:
    bury(tmp_path, "a", EVENTS)
    with (
        letters_of(tmp_path).held(),
        pytest.raises(SpoolError, match="Nothing was touched"),
        letters_of(tmp_path).held(),
    ):
        raise AssertionError("two are in")
    with letters_of(tmp_path).held():
        pass


# The way back.


def sent(spool: Path) -> list[bytes]:
    """What a hub has after everything was repeated: the replay, and whatever lies in the spool."""
    to_spool(letters_of(spool))
    api = MemoryApi()
    names = (f"q-{n}" for n in itertools.count())
    for path in spool.glob("[0-9]*/0"):
        drain(Lane(path, spool, Files(), device_field="", now_ms=lambda: 0, new_producer=lambda: next(names)), api)
    assert letters_of(spool).all() == []
    return api.stored


def every_cut(folder: Path, how: str) -> list[str]:
    """What is wrong after a replay of two files that is cut before each of its acts, and repeated."""
    found: list[str] = []
    for cut_at in itertools.count(1):
        spool, files = folder / str(cut_at), PowerFiles(cut_at)
        bury(spool, "a", EVENTS[:2])
        bury(spool, "b", EVENTS[2:])
        ended = False
        try:
            to_spool(letters_of(spool, files))
            ended = True
        except PowerCut:
            if how != "kill":
                files.lose(renames=how == "power")
        stored = sent(spool)
        if sorted(stored) != sorted(EVENTS):
            found.append(f"cut at {cut_at}: {stored}")
        if ended:
            assert cut_at > 20
            return found
        shutil.rmtree(spool)
    raise AssertionError


@pytest.mark.parametrize("how", HOW)
def test_no_event_is_lost_or_doubled_whenever_a_replay_dies(tmp_path: Path, how: str) -> None:
    assert every_cut(tmp_path, how) == []


def write(letters: Letters, letter: Letter, lane: Path, number: int) -> Path:
    """The batch, at once in the lane."""
    events = [event_of(record) for record in letter.records]
    path = lane / f"{number:012}-{len(events)}.batch"
    text = batch_text(Contents(events), sealed_at_ms=0, device_field="deviceId")
    letters._files.replace(path, text)
    return path


def test_control_without_the_move_events_are_sent_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def direct(self: Letters, letter: Letter, lane: Path, number: int, *_: object) -> Path:
        path = write(self, letter, lane, number)
        self._files.remove(self.folder / f"{letter.id}.ndjson")
        return path

    monkeypatch.setattr(Letters, "_move", direct)
    assert any(found.count("1.50") == 2 for found in every_cut(tmp_path, "kill"))


def test_control_deleting_first_loses_events(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def deleted_first(self: Letters, letter: Letter, lane: Path, number: int, *_: object) -> Path:
        self._files.remove(self.folder / f"{letter.id}.ndjson")
        return write(self, letter, lane, number)

    monkeypatch.setattr(Letters, "_move", deleted_first)
    assert any("1.50" not in found for found in every_cut(tmp_path, "kill"))


def test_control_a_deletion_that_is_not_durable_doubles_events(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PowerFiles, "remove", Files.discard)
    monkeypatch.setattr(PowerFiles, "move", lambda self, source, target: self._rename(source, target))
    assert every_cut(tmp_path, "power, renames kept") != []


@pytest.mark.parametrize("synced", [True, False])
def test_what_a_power_cut_brings_back_is_not_buried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, synced: bool
) -> None:
    """A batch was buried and is done, its deletion not on the disk yet; then its dead letters go back into the spool."""
    files, api = PowerFiles(), MemoryApi()
    lane = open_lane(tmp_path, files, lambda: "p-0")
    lane.append([b"!bad"])
    lane.rotate()
    drain(lane, api)
    if not synced:
        monkeypatch.setattr(Letters, "_lanes", lambda _self: [])
    held = files.hold(tmp_path / "0" / "lock")
    assert held
    [batch] = to_spool(letters_of(tmp_path, files))
    held.release()
    files.lose()
    assert batch.parent == tmp_path / "1" / "0" and batch.exists()
    drain(open_lane(tmp_path, Files(), lambda: "p-1"), MemoryApi())
    again = [letter.id for letter in letters_of(tmp_path).all()]
    assert again == ([] if synced else ["p-0-1-000000000001"])


def test_dead_letters_wait_for_a_batch_that_would_bury_them_again(tmp_path: Path) -> None:
    """A client was killed behind `bury` and before `done`."""
    lane = open_lane(tmp_path, Files(), lambda: "p")
    lane.append([b"!bad"])
    lane.rotate()
    lane.seal()
    batch = lane.head()
    assert batch
    lane.bury(lane.number(batch), [Dead.of(b"!bad", "not_json", "why")])
    letters = letters_of(tmp_path)
    with pytest.raises(SpoolError, match="not done with the batch"):
        to_spool(letters)
    with pytest.raises(SpoolError, match="not done with the batch"):
        letters.keep(letters.all()[0], [])
    lane.done(batch, stored=False)
    assert len(to_spool(letters)) == 1


def test_a_lane_that_is_in_use_or_not_empty_is_left_alone(tmp_path: Path) -> None:
    bury(tmp_path, "a", EVENTS)
    lane = open_lane(tmp_path, Files(), lambda: "p")
    lane.append([b'{"deviceId":"waits"}'])
    lane.close()
    (tmp_path / "1").mkdir()
    held = Files().hold(tmp_path / "1" / "lock")
    assert held
    [path] = to_spool(letters_of(tmp_path))
    held.release()
    assert path.parent == tmp_path / "2" / "0"


def test_events_go_back_under_a_new_producer(tmp_path: Path) -> None:
    """A copy of the spool has used up the lane's numbers; the hub would answer number_too_old, and the client would drop the batch."""
    bury(tmp_path, "a", EVENTS[:2])
    lane = open_lane(tmp_path, Files(), lambda: "copied")
    taken = {"file": 7}
    Files().replace(tmp_path / "0" / "0" / "state.json", msgspec.json.encode(State("copied", 1, 5, 5, "", taken)))
    assert lane.bytes == 0
    to_spool(letters_of(tmp_path))

    def too_old(_api: MemoryApi, _body: bytes, number: str) -> Any:
        return problem(422, "number_too_old", retryable=False) if number.startswith("copied") else None

    api = MemoryApi(*[too_old] * 5)
    lane = open_lane(tmp_path, Files(), lambda: "p")
    drain(lane, api)
    assert (api.stored, lane.state.taken) == (EVENTS[:2], taken)


def again(spool: Path, api: MemoryApi, timeout_s: float = 30.0) -> Any:
    letters = letters_of(spool)
    return replay(
        letters,
        letters.all(),
        lambda: Client(spool=spool, connect=lambda: api),
        device_field="deviceId",
        now_ms=lambda: 0,
        timeout_s=timeout_s,
    )


def test_a_replay_tells_what_is_rejected_again(tmp_path: Path) -> None:
    bury(tmp_path, "a", [*EVENTS, b"!bad"])
    bury(tmp_path, "b", [b"!worse"])
    api = MemoryApi()
    told = again(tmp_path, api)
    assert (api.stored, told.events) == (EVENTS, 5)
    assert sorted(event_of(record) for records in told.rejected.values() for record in records) == [b"!bad", b"!worse"]
    assert {letter.id for letter in letters_of(tmp_path).all()} == set(told.rejected)


@pytest.mark.parametrize(
    ("places", "kept"),
    [(["f:3", "f:8"], ["f:3", "f:8"]), (["f:3", "g:8"], ["", ""]), (["f:3", ""], ["", ""]), (["f:x", "f:3"], ["", ""])],
)
def test_what_is_rejected_again_has_its_place_if_all_are_of_one_file(
    tmp_path: Path, places: list[str], kept: list[str]
) -> None:
    (tmp_path / DEAD).mkdir()
    records = [Dead.of(event, "c", "why", place) for event, place in zip((b"!1", b"!2"), places, strict=True)]
    (tmp_path / DEAD / "a.ndjson").write_bytes(b"".join(msgspec.json.encode(record) + b"\n" for record in records))
    told = again(tmp_path, MemoryApi())
    assert [record.place for rejected in told.rejected.values() for record in rejected] == kept


def test_a_hub_that_is_away_leaves_the_events_in_the_spool(tmp_path: Path) -> None:
    bury(tmp_path, "a", EVENTS)
    with pytest.raises(FlushTimeout):
        again(tmp_path, MemoryApi(*[never_arrived] * 1000), timeout_s=0.2)
    assert letters_of(tmp_path).all() == []
    bury(tmp_path, "b", [b'{"deviceId":"later"}'])
    with pytest.raises(FlushTimeout):
        again(tmp_path, MemoryApi(*[never_arrived] * 1000), timeout_s=0.2)
    assert [letter.id for letter in letters_of(tmp_path).all()] == ["b"]
    api = MemoryApi()
    again(tmp_path, api)
    assert api.stored == [*EVENTS, b'{"deviceId":"later"}']


def test_a_replay_leaves_no_thread_and_the_spool_to_others(tmp_path: Path) -> None:
    before = threading.active_count()
    bury(tmp_path, "a", EVENTS)
    again(tmp_path, MemoryApi())
    held = Files().hold(tmp_path / "0" / "lock")
    assert held and threading.active_count() == before
    held.release()
