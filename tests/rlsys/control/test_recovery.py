"""The restart loop of a lost learner, over attempts that fail as scripted."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from rlsys.config.files import parse_config
from rlsys.control.recovery import Recovery
from rlsys.errors import (
    CheckpointError,
    InputError,
    InterruptedRunError,
    LearnerLostError,
    LearnerRaisedError,
    NonFiniteStepsError,
)
from rlsys.run.resume import Start
from rlsys.types import RunState

RESTART = ["withdraw", "restart", "sweep", "forget"]
AGAIN = ["attempt", *RESTART]


def start_at(version: int) -> Start:
    state = RunState(stage=0, step=version, weight_version=version, cursor=0)
    return Start(state, Path("checkpoint") if version else None)


class Script:
    """Everything that a recovery drives; `done` records the order of calls.

    Attributes:
        errors: the end of every attempt; None reaches the end of the run.
        versions: the newest checkpoint after every loss; none when the list is empty.
        signal_at: the call during which a signal arrives.
    """

    def __init__(self, errors: list[Exception | None], **learner: Any) -> None:
        self.errors = errors
        self.versions: list[int] = []
        self.signal_at = ""
        self.problem: Exception | None = None
        self.done: list[str] = []
        self.starts: list[int] = []
        self.said: list[str] = []
        self.signals: list[str] = []
        self.config = parse_config(
            {"run": {"dir": "d"}, "model": {"path": "m"}, "task": {"type": "letter_count"}, "learner": learner}, "test"
        )

    def note(self, name: str) -> None:
        self.done.append(name)
        if name == self.signal_at:
            self.signals.append("SIGTERM")

    async def withdraw(self) -> None:
        self.note("withdraw")

    async def restart(self) -> None:
        self.note("restart")

    def forget(self) -> None:
        self.note("forget")

    def sweep(self) -> None:
        self.note("sweep")

    def newest_start(self) -> Start:
        if self.problem:
            raise self.problem
        return start_at(self.versions.pop(0) if self.versions else 0)

    async def attempt(self, start: Start) -> None:
        self.note("attempt")
        self.starts.append(start.state.weight_version)
        if error := self.errors.pop(0):
            raise error

    def __call__(self) -> list[str]:
        recovery = Recovery(
            config=self.config,
            actors=self,
            learner=self,
            versions=self,
            newest_start=self.newest_start,
            sweep=self.sweep,
            say=self.said.append,
            signals=self.signals,
        )
        asyncio.run(recovery.run(start_at(0), self.attempt))
        return self.done


def test_a_lost_learner_is_restarted_as_often_as_allowed() -> None:
    losses = [LearnerLostError("rank 1 died"), LearnerLostError("rank 0 died")]
    script = Script([*losses, None], max_restarts=2)
    assert script() == [*AGAIN, *AGAIN, "attempt"]
    assert script.said == [
        f"the learner is lost and started again: rank {rank} died; starting from the initial model" for rank in (1, 0)
    ]
    spent = Script([*losses, None], max_restarts=1)
    with pytest.raises(LearnerLostError) as caught:
        spent()
    assert caught.value.message == (
        "the learner was lost 2 times without a checkpoint in between (learner.max_restarts = 1); the first: rank 1 "
        "died; the last: rank 0 died"
    )
    assert spent.done == [*AGAIN, "attempt"]


def test_without_restarts_the_first_loss_is_the_error() -> None:
    script = Script([LearnerLostError("rank 1 died")], max_restarts=0)
    with pytest.raises(LearnerLostError, match="^rank 1 died$"):
        script()
    assert script.done == ["attempt"]


def test_an_attempt_starts_from_the_newest_checkpoint() -> None:
    script = Script([LearnerLostError("rank 1 died"), None])
    script.versions = [40]
    script()
    assert script.starts == [0, 40]
    assert script.said[0].endswith("; resuming from checkpoint (weight version 40)")


def test_steps_that_are_not_finite_take_the_run_back_once() -> None:
    bad = [NonFiniteStepsError("4 steps"), LearnerLostError("rank 1 died"), NonFiniteStepsError("4 more")]
    script = Script([*bad, None], max_restarts=9)
    with pytest.raises(NonFiniteStepsError, match="^4 more; the same happened before the return"):
        script()
    assert script.done == [*AGAIN, *AGAIN, "attempt"]


def test_bad_steps_after_the_last_restart_are_not_said_to_have_been_there_before() -> None:
    script = Script([LearnerLostError("rank 1 died"), NonFiniteStepsError("4 steps")], max_restarts=1)
    with pytest.raises(NonFiniteStepsError, match=r"lost 2 times .*max_restarts = 1\); the first: rank 1 .*4 steps$"):
        script()


def test_a_checkpoint_between_two_losses_resets_the_count() -> None:
    bad = [NonFiniteStepsError("4 steps"), LearnerLostError("rank 1 died"), NonFiniteStepsError("4 more")]
    script = Script([*bad, None], max_restarts=1)
    script.versions = [10, 20, 30]
    assert script() == [*AGAIN, *AGAIN, *AGAIN, "attempt"]


def raised(rank: int, exception: str) -> LearnerRaisedError:
    return LearnerRaisedError(f"learner rank {rank} failed: {exception}", exception)


def test_the_same_exception_twice_in_a_row_ends_the_run() -> None:
    # The draws and the data of a step are the same after a restart, whichever rank reports first.
    script = Script([raised(0, "IndexError: 7"), raised(1, "IndexError: 7"), None], max_restarts=9)
    with pytest.raises(LearnerRaisedError, match="^learner rank 1 failed: IndexError: 7; the same happened before"):
        script()
    assert script.done == [*AGAIN, "attempt"]


def test_other_exceptions_and_deaths_are_tried_again() -> None:
    again = [raised(0, "IndexError: 7"), raised(0, "IndexError: 8"), LearnerLostError("rank 0 died"), raised(0, "a")]
    assert Script([*again, None], max_restarts=9)() == [*AGAIN * 4, "attempt"]
    deaths = [LearnerLostError("rank 0 died"), LearnerLostError("rank 0 died")]
    assert Script([*deaths, None], max_restarts=9)() == [*AGAIN * 2, "attempt"]


def test_an_exception_that_comes_again_after_progress_is_tried_again() -> None:
    script = Script([raised(0, "IndexError: 7"), raised(0, "IndexError: 7"), None], max_restarts=9)
    script.versions = [10, 20]
    assert script() == [*AGAIN * 2, "attempt"]


def test_refused_input_ends_the_run_without_a_restart() -> None:
    script = Script([InputError("token id 302"), None], max_restarts=9)
    with pytest.raises(InputError, match="^token id 302$"):
        script()
    assert script.done == ["attempt"]


def test_other_errors_end_the_run_without_a_restart() -> None:
    script = Script([CheckpointError("no space left")])
    with pytest.raises(CheckpointError, match="^no space left$"):
        script()
    assert script.done == ["attempt"]


def test_without_a_valid_checkpoint_the_error_names_the_loss() -> None:
    script = Script([LearnerLostError("rank 1 died")])
    script.problem = CheckpointError("none of the 2 checkpoints is valid")
    with pytest.raises(CheckpointError, match="none of the 2 .* is valid; a checkpoint is needed because rank 1 died"):
        script()


@pytest.mark.parametrize(("version", "saved"), [(40, "weight version 40 is saved"), (0, "nothing is saved")])
@pytest.mark.parametrize(("signal_at", "done"), [("attempt", ["attempt"]), ("forget", AGAIN)])
def test_a_signal_and_a_lost_learner_are_an_interruption(
    signal_at: str, done: list[str], version: int, saved: str
) -> None:
    script = Script([LearnerLostError("rank 1 died"), None])
    script.signal_at, script.versions = signal_at, [version]
    with pytest.raises(InterruptedRunError) as caught:
        script()
    assert script.done == done
    lost = "the learner was lost as well: rank 1 died"
    assert caught.value.message == f"SIGTERM; {lost}; {saved}, the same command continues"
