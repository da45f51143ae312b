"""A lane that is killed, or loses its power, before each of its acts, and goes on: every event is stored once, in order."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from penstock.client import lane as lane_module
from penstock.client.lane import DEAD, QUARANTINE, Lane
from penstock.client.records import Batch, State, open_lines, read_open
from penstock.client.sending import Board, Sender
from penstock.client.transport import Answer
from penstock.files import Files
from penstock.testing import FakeClock
from tests.client.conftest import MemoryApi, lost_answer, problem
from tests.client.power import PowerCut, PowerFiles

test_lane = sys.modules[__name__]
HOW = ["kill", "power", "power, renames kept"]
EVENTS = [b'{"deviceId":"d","n":%d}' % n for n in range(11)]


def open_lane(spool: Path, files: Files, names: Callable[[], str]) -> Lane:
    return Lane(spool / "0" / "0", spool, files, device_field="deviceId", now_ms=lambda: 0, new_producer=names)


def sender_of(lane: Lane, api: MemoryApi) -> Sender:
    clock = FakeClock(jumps=True)
    return Sender(lane, api, Board(None, clock), clock, lambda: 1.0, {})


def drain(lane: Lane, api: MemoryApi) -> None:
    while lane.seal():
        continue
    sender = sender_of(lane, api)
    for _ in range(100):
        if sender.step() is None:
            return
    raise AssertionError("the lane does not get empty")


class Run:
    """Sends `EVENTS` in batches of three through a lane, and dies at the n-th act on the disk."""

    def __init__(self, spool: Path, api: MemoryApi) -> None:
        self.spool = spool
        self.api = api
        self.synced: list[bytes] = []
        self.names = (f"p-{n}" for n in itertools.count())

    def until(self, files: PowerFiles) -> bool:
        """True if it got to the end."""
        try:
            lane = open_lane(self.spool, files, lambda: next(self.names))
            for at in range(0, len(EVENTS), 3):
                batch = EVENTS[at : at + 3]
                for event in batch:
                    lane.append([event])
                    lane.sync()
                    self.synced.append(event)
                lane.rotate()
                if at in (3, 9):  # so that a batch is done while another waits behind it
                    drain(lane, self.api)
        except PowerCut:
            return False
        return True

    def go_on(self) -> None:
        lane = open_lane(self.spool, Files(), lambda: next(self.names))
        drain(lane, self.api)
        assert (lane.events, lane.bytes) == (0, 0)


def wrong(run: Run) -> list[str]:
    stored = run.api.stored
    found = []
    if len(set(stored)) != len(stored):
        found.append(f"stored twice: {stored}")
    if missing := set(run.synced) - set(stored):
        found.append(f"lost: {missing}")
    if sorted(stored, key=EVENTS.index) != stored:
        found.append(f"out of order: {stored}")
    return found


def every_cut(folder: Path, how: str, *, lines_max: int = 10_000, taken: Sequence[int] = ()) -> list[str]:
    """`taken` are numbers of the first producer under which the hub has other bytes."""
    found: list[str] = []
    for cut_at in itertools.count(1):
        api = MemoryApi(None, lost_answer, None, lost_answer, lines_max=lines_max)
        api.numbers |= {("p-0", number): ("0" * 64, 1) for number in taken}
        run = Run(folder / str(cut_at), api)
        files = PowerFiles(cut_at)
        ended = run.until(files)
        if how != "kill":
            files.lose(renames=how == "power")
        run.go_on()
        found += [f"cut at {cut_at}: {one}" for one in wrong(run)]
        if ended:
            assert cut_at > 50
            return found
    raise AssertionError


@pytest.mark.parametrize("lines_max", [10_000, 2])
@pytest.mark.parametrize("how", HOW)
def test_every_event_is_stored_once_whenever_it_dies(tmp_path: Path, how: str, lines_max: int) -> None:
    """Cases 87, 88, 101; with `lines_max` also 96."""
    assert every_cut(tmp_path, how, lines_max=lines_max) == []


@pytest.mark.parametrize("how", HOW)
def test_every_event_is_stored_once_when_the_number_is_anothers(tmp_path: Path, how: str) -> None:
    assert every_cut(tmp_path, how, taken=[2]) == []


def test_an_open_file_whose_batch_is_in_quarantine_comes_back_last(tmp_path: Path) -> None:
    """The deletion of the open file was lost, and its batch is damaged: the events are there once more."""
    lane = open_lane(tmp_path, Files(), lambda: "p")
    for events in (EVENTS[:2], EVENTS[2:4]):
        lane.append(events)
        lane.rotate()
        kept = next(tmp_path.glob("0/0/*.open")).read_bytes()
        lane.seal()
        if events == EVENTS[:2]:
            first = kept
    next(tmp_path.glob("0/0/000000000001-*.batch")).unlink()
    (tmp_path / "0/0/000000000001.open").write_bytes(first)
    api = MemoryApi()
    for _ in range(2):
        drain(open_lane(tmp_path, Files(), lambda: "p"), api)
    assert api.stored == [*EVENTS[2:4], *EVENTS[:2]]


def dead_of(spool: Path) -> list[str]:
    return [
        json.loads(line)["event"] for grave in spool.glob(f"{DEAD}/*.ndjson") for line in grave.read_text().splitlines()
    ]


@pytest.mark.parametrize("buries_first", [True, False])
def test_a_rejected_event_is_in_the_dead_letters_once_whenever_it_dies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, buries_first: bool
) -> None:
    bad = [b"!bad-%d" % n for n in range(11)]
    monkeypatch.setattr(test_lane, "EVENTS", [line for pair in zip(EVENTS, bad, strict=True) for line in pair][:11])
    if not buries_first:
        done, bury = Lane.done, Lane.bury
        kept: list[tuple[Any, ...]] = []
        monkeypatch.setattr(Lane, "bury", lambda *given: kept.append(given))

        def done_first(self: Lane, batch: Batch, *, stored: bool) -> None:
            done(self, batch, stored=stored)
            while kept:
                bury(*kept.pop())

        monkeypatch.setattr(Lane, "done", done_first)
    lost = 0
    for cut_at in itertools.count(1):
        run = Run(tmp_path / str(cut_at), MemoryApi(None, lost_answer))
        ended = run.until(PowerFiles(cut_at))
        run.go_on()
        dead = dead_of(run.spool)
        assert len(dead) == len(set(dead))
        lost += len({line.decode() for line in run.synced if line.startswith(b"!")} - set(dead))
        if ended:
            break
    assert (lost == 0) == buries_first


def test_without_a_durable_number_events_are_stored_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def save(self: Lane, state: State) -> None:
        self.state = state

    monkeypatch.setattr(Lane, "_save", save)
    assert any("twice" in one for one in every_cut(tmp_path, "kill"))


def test_without_looking_at_what_is_done_events_are_stored_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lane_module, "is_done", lambda _stem, _numbered: False)
    assert any("twice" in one for one in every_cut(tmp_path, "power, renames kept"))


def test_an_open_file_cut_at_every_byte_keeps_the_events_before() -> None:
    """Case 87."""
    text = open_lines(EVENTS)
    for cut in range(len(text) + 1):
        lines, damaged = read_open(text[:cut])
        assert lines == EVENTS[: text[:cut].count(b"\n")]
        assert damaged == []


def test_an_open_file_with_a_wrong_byte_loses_no_other_event(tmp_path: Path) -> None:
    """Case 90."""
    text = open_lines(EVENTS)
    for at in range(0, len(text), 3):
        lines, damaged = read_open(text[:at] + bytes([text[at] ^ 1]) + text[at + 1 :])
        assert set(lines) <= set(EVENTS) and len(lines) >= len(EVENTS) - 2
        assert damaged


def test_a_damaged_batch_goes_to_quarantine_and_the_next_is_sent(tmp_path: Path) -> None:
    """Case 90."""
    whole = b""
    for cut in itertools.count():
        spool, api = tmp_path / str(cut), MemoryApi()
        lane = open_lane(spool, Files(), lambda: "p")
        for events in (EVENTS[:2], EVENTS[2:4]):
            lane.append(events)
            lane.rotate()
            lane.seal()
        path = next(spool.glob("0/0/000000000001-*.batch"))
        whole = path.read_bytes()
        if cut >= len(whole):
            return
        path.write_bytes(whole[:cut])
        lane = open_lane(spool, Files(), lambda: "p")
        drain(lane, api)
        assert api.stored == EVENTS[2:4]
        [kept] = (spool / QUARANTINE).iterdir()
        assert kept.read_bytes() == whole[:cut]
        assert lane.quarantined == 1


def test_a_copy_of_a_spool_stores_nothing_twice(tmp_path: Path) -> None:
    """Case 92. Both go on from the same state: what is in both is recognised, what only one has is stored."""
    api, names = MemoryApi(), (f"p-{n}" for n in itertools.count())
    lane = open_lane(tmp_path / "a", Files(), lambda: next(names))
    for events in (EVENTS[:2], EVENTS[2:4]):
        lane.append(events)
        lane.rotate()
        lane.seal()
    lane.number(lane.head() or pytest.fail("no batch"))
    copy = tmp_path / "b"
    os.system(f"cp -r {tmp_path / 'a'} {copy}")
    lanes = [open_lane(folder, Files(), lambda: next(names)) for folder in (tmp_path / "a", copy)]
    for lane, own in zip(lanes, (EVENTS[4:7], EVENTS[7:]), strict=True):
        lane.append(own)
        lane.rotate()
        drain(lane, api)
    assert sorted(api.stored, key=EVENTS.index) == EVENTS
    assert lanes[1].state.producer != lanes[0].state.producer


class Forgetful(MemoryApi):
    """Knows the last five numbers of a producer, as the hub does."""

    def store(self, body: bytes, number: str) -> Answer:
        producer, _, rest = number.partition(";epoch=1;sequence=")
        if int(rest.partition(";")[0]) <= self.last.get(producer, 0) - 5:
            return problem(422, "number_too_old", retryable=False)
        return super().store(body, number)


def test_what_a_copy_took_and_could_not_send_before_it_was_restarted_is_not_lost(tmp_path: Path) -> None:
    """Machines are cloned from one whose client has run. One clone sends; the other is away from the network, and restarted there."""
    api, names = Forgetful(), (f"p-{n}" for n in itertools.count())
    open_lane(tmp_path / "a", Files(), lambda: next(names))
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    lane = open_lane(tmp_path / "a", Files(), lambda: next(names))
    for event in EVENTS[:8]:
        lane.append([event])
        lane.rotate()
        drain(lane, api)
    lane = open_lane(tmp_path / "b", Files(), lambda: next(names))
    lane.append(EVENTS[8:])
    lane.rotate()
    lane.seal()
    drain(open_lane(tmp_path / "b", Files(), lambda: next(names)), api)
    assert sorted([*api.stored, *(text.encode() for text in dead_of(tmp_path / "b"))], key=EVENTS.index) == EVENTS


def test_a_number_that_was_split_is_not_said_to_be_stored_after_a_death(tmp_path: Path) -> None:
    """The hub would count a loss, because `after` is not the last that it has."""
    api = MemoryApi(lines_max=2)
    lane = open_lane(tmp_path, Files(), lambda: "p")
    lane.append(EVENTS[:4])
    lane.rotate()
    lane.seal()
    sender_of(lane, api).step()
    drain(open_lane(tmp_path, Files(), lambda: "p"), api)
    assert (api.stored, api.gaps) == (EVENTS[:4], 0)


def test_rejected_events_are_buried_once(tmp_path: Path) -> None:
    api = MemoryApi(lost_answer)
    lane = open_lane(tmp_path, Files(), lambda: "p")
    lane.append([EVENTS[0], b"!bad", EVENTS[1]])
    lane.rotate()
    drain(lane, api)
    assert api.stored == EVENTS[:2]
    [grave] = (tmp_path / DEAD).iterdir()
    [record] = grave.read_text().splitlines()
    assert json.loads(record)["code"] == "not_json"
