"""Supervision of the learner ranks: which error counts, and when a rank counts as hung."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from rlsys.control.learner_group import LearnerGroup
from rlsys.control.watchdog import WatchClock
from rlsys.errors import (
    CheckpointError,
    ConfigError,
    EngineError,
    InputError,
    LearnerLostError,
    LearnerRaisedError,
    NonFiniteLossError,
    ProcessDiedError,
    RaisedError,
    RlsysError,
)


class Rank:
    """A rank whose call ends with a value or error after `after_s`, or never with `after_s` None.

    Attributes:
        grows: whether every answer to `progress` is larger; otherwise it stays at 3.
        stopped: whether `progress` is never answered.
    """

    def __init__(
        self,
        value: Any = None,
        *,
        after_s: float | None = 0.0,
        grows: bool = False,
        stopped: bool = False,
        broken_kill: bool = False,
    ) -> None:
        self.value, self.after_s = value, after_s
        self.grows, self.stopped, self.broken_kill = grows, stopped, broken_kill
        self.steps = 3
        self.killed = False
        self.calls: list[tuple[Any, ...]] = []

    async def call(self, method: str, *arguments: Any) -> Any:
        self.calls.append((method, *arguments))
        await (asyncio.sleep(self.after_s) if self.after_s is not None else asyncio.Event().wait())
        if isinstance(self.value, BaseException):
            raise self.value
        return self.value

    async def progress(self, timeout_s: float) -> int:
        if self.stopped:
            await asyncio.sleep(timeout_s)
            raise EngineError("no answer")
        self.steps += self.grows
        return self.steps

    def kill(self) -> None:
        self.killed = True
        if self.broken_kill:
            raise RuntimeError("Ray is not there")


HANG = {"after_s": None}


def group_of(*ranks: Rank, hang_timeout_s: float = 0.05) -> LearnerGroup:
    clock = WatchClock(interval_s=0.005)
    return LearnerGroup(lambda _attempt: ranks, hang_timeout_s=hang_timeout_s, clock=clock, first_cause_s=0.05)


def train(*ranks: Rank, hang_timeout_s: float = 0.05) -> list[Any]:
    return asyncio.run(group_of(*ranks, hang_timeout_s=hang_timeout_s).call("train", "batch", moving=True))


def test_every_rank_gets_the_call_and_all_answers_come_back_in_order() -> None:
    ranks = [Rank("slow", after_s=0.01), Rank("fast")]
    assert train(*ranks, hang_timeout_s=5.0) == ["slow", "fast"]
    assert [rank.calls for rank in ranks] == [[("train", "batch")]] * 2


def test_a_death_counts_before_the_errors_that_follow_from_it() -> None:
    broken, dead = EngineError("Connection closed by peer"), ProcessDiedError("learner rank 1 died: killed")
    for ranks in ([Rank(broken), Rank(dead)], [Rank(broken), Rank(dead, after_s=0.02)]):
        with pytest.raises(LearnerLostError, match="^learner rank 1 died: killed$"):
            train(*ranks, hang_timeout_s=5.0)


def test_a_death_that_comes_too_late_is_not_waited_for() -> None:
    broken, dead = EngineError("Connection closed by peer"), ProcessDiedError("learner rank 1 died: killed")
    with pytest.raises(LearnerLostError, match="Connection closed by peer"):
        train(Rank(broken), Rank(dead, after_s=5.0, grows=True), hang_timeout_s=5.0)


@pytest.mark.parametrize("kind", [NonFiniteLossError, CheckpointError])
def test_an_error_that_all_ranks_rolled_back_from_stays_what_it_is(kind: type[RlsysError]) -> None:
    with pytest.raises(kind, match="loss nan"):
        train(Rank(kind("loss nan")), Rank(kind("loss nan"), after_s=0.1), hang_timeout_s=5.0)


@pytest.mark.parametrize(
    "other", [Rank({"learner/tokens": 1.0}), Rank(**HANG)], ids=["went on", "hangs"]
)  # fmt: skip
def test_an_error_of_one_rank_alone_is_a_lost_learner(other: Rank) -> None:
    with pytest.raises(LearnerLostError, match="one rank rolled back and another did not: loss nan"):
        train(Rank(NonFiniteLossError("loss nan")), other, hang_timeout_s=0.5)


def test_other_errors_of_rlsys_stay_what_they_are() -> None:
    with pytest.raises(ConfigError, match="no such file"):
        train(Rank(ConfigError("no such file")), Rank({"learner/tokens": 1.0}))


def test_refused_input_counts_before_the_errors_that_follow_from_it() -> None:
    refused = InputError("token id 302")
    for ranks in ([Rank(EngineError("no answer")), Rank(refused)], [Rank(refused), Rank(**HANG)]):
        with pytest.raises(InputError, match="^token id 302$"):
            train(*ranks, hang_timeout_s=5.0)


def test_a_lost_learner_says_whether_a_rank_raised_an_exception() -> None:
    for error, kind in ((RaisedError("rank 0 failed: a"), LearnerRaisedError), (EngineError("b"), LearnerLostError)):
        with pytest.raises(LearnerLostError) as caught:
            train(Rank(error))
        assert (type(caught.value), caught.value.message) == (kind, error.message)


def test_a_rank_without_progress_is_a_lost_learner() -> None:
    with pytest.raises(LearnerLostError, match=r"rank 1 made no progress within learner.hang_timeout_s = 0.05 s"):
        train(Rank(grows=True, **HANG), Rank(**HANG))


def test_a_slow_rank_with_progress_is_not_lost() -> None:
    ranks = [Rank(number, after_s=0.3, grows=True) for number in range(2)]
    assert train(*ranks) == [0, 1]


def test_the_silent_rank_that_does_not_answer_is_blamed() -> None:
    for ranks in ([Rank(**HANG), Rank(stopped=True, **HANG)], [Rank(stopped=True, **HANG), Rank(**HANG)]):
        number = next(number for number, rank in enumerate(ranks) if rank.stopped)
        with pytest.raises(LearnerLostError, match=f"rank {number} made no progress"):
            train(*ranks)


@pytest.mark.parametrize(("stopped", "lost"), [(True, True), (False, False)])
def test_a_call_that_does_not_move_needs_answers_and_no_progress(stopped: bool, lost: bool) -> None:
    rank = Rank("saved", after_s=0.3, stopped=stopped)
    save = group_of(rank).call("save", "folder")
    if not lost:
        assert asyncio.run(save) == ["saved"]
        return
    with pytest.raises(LearnerLostError, match="rank 0 made no progress"):
        asyncio.run(save)


def test_a_driver_that_stood_still_blames_no_rank() -> None:
    now = iter([0.0, *[1000.0 * n for n in range(1, 50)]])
    clock = WatchClock(monotonic=lambda: next(now), interval_s=0.001)
    group = LearnerGroup(lambda _: [Rank("done", after_s=0.02)], hang_timeout_s=1.0, clock=clock)
    assert asyncio.run(group.call("train", moving=True)) == ["done"]


def spawner(attempts: list[list[Rank]]) -> Callable[[int], list[Rank]]:
    return lambda attempt: attempts[attempt]


def test_a_restart_kills_all_ranks_and_starts_new_ones(caplog: pytest.LogCaptureFixture) -> None:
    attempts = [[Rank(broken_kill=True), Rank()], [Rank("new"), Rank("new")]]
    group = LearnerGroup(spawner(attempts), hang_timeout_s=5.0)
    assert group.restarts == 0
    group.restart()
    assert group.restarts == 1
    assert all(rank.killed for rank in attempts[0]) and not any(rank.killed for rank in attempts[1])
    assert "learner rank 0 could not be ended" in caplog.text
    assert asyncio.run(group.call("train")) == ["new", "new"]
