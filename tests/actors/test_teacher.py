"""The teacher of an actor: where its scores stand, and what a refusal does. Neither Ray nor an engine is started."""

from __future__ import annotations

import asyncio
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from fakes import group, prompt

from actors.engine import _read_scores
from actors.settings import TeacherEngines
from actors.teacher import Teacher
from rlsys.errors import AuxiliaryEngineLostError, RolloutError
from rlsys.types import RolloutFailure, TrajectoryGroup


@dataclass(frozen=True)
class SimpleScore:
    logprob: float
    rank: int


class Handle:
    """The handle of an engine that answers at once: the log-probability of token t is -t / 10."""

    def __init__(self, outcome: Any = None) -> None:
        self.rows: list[tuple[list[int], int | None]] = []
        self._outcome = outcome

    @property
    def score(self) -> Handle:
        return self

    def remote(self, token_ids: list[int], tokens: int | None, caller: str) -> Handle:
        assert caller == "0.0"
        self.rows.append((token_ids, tokens))
        return self

    def future(self) -> Future[Any]:
        future: Future[Any] = Future()
        ids = np.array(self.rows[-1][0][1:], dtype=np.int32)[:, None]
        if isinstance(self._outcome, Exception) and not isinstance(self._outcome, RolloutError):
            future.set_exception(self._outcome)
        else:
            future.set_result(self._outcome or (ids, (-ids / 10).astype(np.float32)))
        return future


def scored(*handles: Handle, tokens: int | None = None) -> TrajectoryGroup | RolloutFailure:
    return asyncio.run(Teacher(TeacherEngines(handles, tokens), "0.0").score_group(group(prompt("a"), 1)))


def test_every_token_that_the_policy_chose_has_a_score_of_the_tokens_before() -> None:
    handle = Handle()
    found = scored(handle)
    assert isinstance(found, TrajectoryGroup)
    assert [row for row, _ in handle.rows] == [each.token_ids.tolist() for each in group(prompt("a"), 1).trajectories]
    for each in found.trajectories:
        assert each.teacher is not None and not each.teacher.mask[0]
        assert np.array_equal(each.teacher.mask[1:], each.loss_mask[1:])
        assert np.array_equal(each.teacher.ids[1:, 0], each.token_ids[1:])
        assert np.allclose(each.teacher.logprobs[1:, 0], -each.token_ids[1:] / 10)
        assert each.teacher.ids.dtype == np.int32 and each.teacher.logprobs.dtype == np.float32


def test_engines_take_the_rows_in_turn() -> None:
    handles = Handle(), Handle()
    scored(*handles, tokens=4)
    counts = [len(handle.rows) for handle in handles]
    assert max(counts) - min(counts) <= 1 and sum(counts) == len(group(prompt("a"), 1).trajectories)
    assert {tokens for handle in handles for _, tokens in handle.rows} == {4}


def test_a_refused_row_fails_its_group_alone() -> None:
    found = scored(Handle(RolloutError("row to score was refused: too long")))
    assert isinstance(found, RolloutFailure)
    assert found.reason == "teacher: row to score was refused: too long"
    assert found.tokens == sum(each.completion_length for each in group(prompt("a"), 1).trajectories)


def test_a_lost_teacher_is_an_error() -> None:
    with pytest.raises(AuxiliaryEngineLostError, match="teacher engine 0 died"):
        scored(Handle(AuxiliaryEngineLostError("teacher engine 0 died")))


def test_a_failure_has_nothing_to_score() -> None:
    failure, handle = RolloutFailure(prompt=prompt("a"), reason="refused"), Handle()
    assert asyncio.run(Teacher(TeacherEngines([handle], None), "0.0").score_group(failure)) is failure
    assert not handle.rows


@pytest.mark.parametrize(
    ("tokens", "ids", "logprobs"),
    [(None, [[7], [2]], [[-3.0], [-0.1]]), (2, [[5, 6], [2, 9]], [[-0.5, -1.0], [-0.1, -4.0]])],
)
def test_scores_are_read_from_the_outputs_of_an_engine(tokens: int | None, ids: Any, logprobs: Any) -> None:
    # As vLLM gives them: the row's own token, and the most probable ones by rank.
    places = [
        None,
        {7: SimpleScore(-3.0, 9), 5: SimpleScore(-0.5, 1), 6: SimpleScore(-1.0, 2)},
        {2: SimpleScore(-0.1, 1), 9: SimpleScore(-4.0, 2)},
    ]
    output = type("Output", (), {"prompt_logprobs": places})()
    found = _read_scores(output, [1, 7, 2], tokens)
    assert found[0].tolist() == ids
    assert np.allclose(found[1], logprobs)


def test_the_own_token_may_be_as_probable_as_the_last_of_the_best() -> None:
    place = {7: SimpleScore(-1.0, 2), 5: SimpleScore(-0.5, 1), 6: SimpleScore(-1.0, 2)}
    output = type("Output", (), {"prompt_logprobs": [None, place]})()
    ids, logprobs = _read_scores(output, [1, 7], 2)
    assert ids.tolist() == [[7, 5]] and np.allclose(logprobs, [[-1.0, -0.5]])
