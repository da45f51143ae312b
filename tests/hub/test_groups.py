"""Groups that read over HTTP: what is durable when, who is refused, and that nothing goes back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.errors import OffsetBeyondEnd, ReaderFenced
from penstock.events import Batch, Group
from penstock.hub.embedded import EmbeddedHub, create
from penstock.hub.groups import SEEN_MS, Progress, after
from penstock.testing import FakeClock

START_MS = 1_795_356_000_000


@contextmanager
def opened(folder: Path, clock: FakeClock) -> Iterator[EmbeddedHub]:
    create(folder, partitions=2, period_s=3600, bytes_max=64 << 20, clock=clock)
    with EmbeddedHub(folder, bytes_max=64 << 20, clock=clock) as hub:
        yield hub


def fill(hub: EmbeddedHub, events: int) -> None:
    line = b'{"deviceId":"d"}\n'
    hub.append([Batch("p", 1, 1, 2 * events, tuple(Group(p, events, line * events) for p in (0, 1)))])


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock(START_MS)


@pytest.fixture
def hub(tmp_path: Path, clock: FakeClock) -> Iterator[EmbeddedHub]:
    with opened(tmp_path / "hub", clock) as hub:
        fill(hub, 100)
        yield hub


def known(hub: EmbeddedHub) -> dict[tuple[str, int], tuple[int, int]]:
    return {(r.group, r.partition): (r.progress.epoch, r.progress.checkpoint) for r in hub.groups.all()}


def commits(hub: EmbeddedHub) -> int:
    return int(hub._env.info()["last_txnid"])


def test_a_new_epoch_is_on_disk_before_its_first_answer(tmp_path: Path, clock: FakeClock) -> None:
    with opened(tmp_path / "hub", clock) as hub:
        fill(hub, 100)
        hub.groups.heard("alarms", 1, 3, 40)
    with opened(tmp_path / "hub", clock) as hub:
        assert known(hub) == {("alarms", 1): (3, 40)}
        with pytest.raises(ReaderFenced):
            hub.groups.heard("alarms", 1, 2, 40)


def test_control_an_epoch_that_is_only_noted_is_lost_with_its_process(tmp_path: Path, clock: FakeClock) -> None:
    with opened(tmp_path / "hub", clock) as hub:
        hub.groups.heard("alarms", 1, 1, 0)
        hub.groups._begin = lambda *_: None  # type: ignore[method-assign]
        hub.groups.heard("alarms", 1, 3, 0)
    with opened(tmp_path / "hub", clock) as hub:
        hub.groups.heard("alarms", 1, 2, 0)


def test_an_older_epoch_is_refused_and_changes_nothing(hub: EmbeddedHub) -> None:
    hub.groups.heard("alarms", 0, 3, 40)
    with pytest.raises(ReaderFenced) as fenced:
        hub.groups.heard("alarms", 0, 2, 90)
    assert (fenced.value.status, fenced.value.retryable, fenced.value.fields) == (409, False, {"last_epoch": 3})
    hub.groups.keep()
    assert known(hub) == {("alarms", 0): (3, 40)}
    for group, partition in (("other", 0), ("alarms", 1)):
        hub.groups.heard(group, partition, 1, 0)


def test_requests_make_no_commits(hub: EmbeddedHub, clock: FakeClock) -> None:
    for partition in (0, 1):
        hub.groups.heard("alarms", partition, 1, 0)
    before = commits(hub)
    for checkpoint in range(50):
        for partition in (0, 1):
            hub.groups.heard("alarms", partition, 1, checkpoint)
    assert (commits(hub), known(hub)[("alarms", 0)]) == (before, (1, 0))
    hub.groups.keep()
    assert commits(hub) == before + 1
    assert known(hub) == {("alarms", 0): (1, 49), ("alarms", 1): (1, 49)}
    for _ in range(50):
        hub.groups.heard("alarms", 0, 1, 49)
        hub.groups.keep()
        clock.advance(SEEN_MS / 1000 / 100)
    assert commits(hub) == before + 1


def test_a_group_that_stands_still_is_heard_of_all_the_same(hub: EmbeddedHub, clock: FakeClock) -> None:
    hub.groups.heard("alarms", 0, 1, 7)
    clock.advance(SEEN_MS / 1000)
    hub.groups.heard("alarms", 0, 1, 7)
    hub.groups.keep()
    [reader] = hub.groups.all()
    assert reader.progress == Progress(1, 7, START_MS + SEEN_MS)


def test_a_checkpoint_never_goes_back(hub: EmbeddedHub) -> None:
    hub.groups.heard("alarms", 0, 1, 50)
    hub.groups.heard("alarms", 0, 1, 60)
    hub.groups.heard("alarms", 0, 1, 20)
    hub.groups.keep()
    assert known(hub) == {("alarms", 0): (1, 60)}
    hub.groups.heard("alarms", 0, 2, 30)
    assert known(hub) == {("alarms", 0): (2, 60)}


def test_a_checkpoint_beyond_the_log_is_refused(hub: EmbeddedHub) -> None:
    hub.groups.heard("alarms", 0, 1, 100)
    with pytest.raises(OffsetBeyondEnd) as beyond:
        hub.groups.heard("alarms", 0, 1, 101)
    assert beyond.value.fields == {"end": "100"}


def test_a_host_that_is_about_to_begin_holds_everything_and_is_never_refused(hub: EmbeddedHub) -> None:
    hub.groups.heard("alarms", 0, 0, 0)
    assert known(hub) == {("alarms", 0): (0, 0)}
    hub.groups.heard("alarms", 0, 4, 30)
    hub.groups.heard("alarms", 0, 0, 0)
    hub.groups.keep()
    assert known(hub) == {("alarms", 0): (4, 30)}


def test_forgetting(hub: EmbeddedHub, clock: FakeClock) -> None:
    for group in ("alarms", "alarm", "z"):
        for partition in (0, 1):
            hub.groups.heard(group, partition, 2, 5)
    clock.advance(60)
    hub.groups.heard("z", 1, 2, 6)
    hub.groups.keep()
    at_ms = clock.now_ms() - 1000
    assert [hub.groups.forget(name, not_since_ms=at_ms) for name in ("alarm", "z", "none")] == [True, False, False]
    assert {group for group, _ in known(hub)} == {"alarms", "z"}
    assert hub.groups.forget("z")
    assert known(hub) == {("alarms", 0): (2, 5), ("alarms", 1): (2, 5)}
    hub.groups.heard("z", 0, 1, 0)
    assert known(hub)[("z", 0)] == (1, 0)


def test_an_old_note_does_not_bring_back_an_epoch_of_before(hub: EmbeddedHub) -> None:
    """Another worker had heard it last; meanwhile the group was forgotten and began anew."""
    hub.groups.heard("alarms", 1, 5, 10)
    hub.groups.heard("alarms", 1, 5, 90)
    assert hub.groups.forget("alarms")
    hub.groups._begin("alarms", 1, Progress(1, 20, START_MS))
    hub.groups.keep()
    assert known(hub) == {("alarms", 1): (1, 20)}


def test_an_old_note_does_not_bring_back_what_was_forgotten(hub: EmbeddedHub) -> None:
    hub.groups.heard("alarms", 0, 2, 5)
    hub.groups.heard("alarms", 0, 2, 9)
    hub.groups.forget("alarms")
    hub.groups.keep()
    assert known(hub) == {}


@settings(deadline=None)
@given(words=st.lists(st.builds(Progress, st.integers(0, 4), st.integers(0, 9), st.integers(0, 9)), max_size=20))
def test_whatever_comes_epochs_and_checkpoints_only_grow(words: list[Progress]) -> None:
    kept: Progress | None = None
    for now in words:
        following = after(kept, now)
        if following is None:
            assert kept is not None and 0 < now.epoch < kept.epoch
            continue
        assert following.epoch == max(now.epoch, kept.epoch if kept else 0)
        assert following.checkpoint == max(now.checkpoint, kept.checkpoint if kept else 0)
        kept = following
