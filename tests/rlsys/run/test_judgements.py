"""One order and one form of judged completions."""

from __future__ import annotations

from dataclasses import replace
from typing import get_args

import numpy as np
from fakes import group, prompt, trajectory

from rlsys.run.judgements import (
    ENDS,
    by_reward,
    group_facts,
    group_rewards,
    heading,
    judged_of,
    judgement,
    own_logprobs,
)
from rlsys.types import FinishReason, Trajectory, TrajectoryGroup


def row(given: Trajectory, of: TrajectoryGroup) -> str:
    return heading({**group_facts(of), **judgement(given), "logprobs": own_logprobs(given)})


def test_unjudged_items_come_last_in_both_orders_and_equal_ones_keep_theirs() -> None:
    items = [("a", 0.5), ("b", None), ("c", 1.0), ("d", 0.5), ("e", 0.0)]
    names = [[name for name, _ in by_reward(items, order, lambda item: item[1])] for order in ("best", "worst")]
    assert names == [["c", "a", "d", "e", "b"], ["e", "a", "d", "c", "b"]]


def test_a_line_about_an_episode_counts_the_tokens_of_the_policy() -> None:
    asked = replace(
        trajectory(reward=0.5, length=4),
        loss_mask=np.array([0, 0, 0, 1, 0, 0, 1], bool),
        behavior_logprobs=np.array([0, 0, 0, -1, 0, 0, -2], np.float32),
        finish_reason="turns",
        answered=False,
    )
    of = replace(group(prompt("a")), trajectories=(asked, trajectory(reward=1.0), trajectory(0, 9.0, "timeout")))
    line = "right, reward 0.5 (mean of its 2 judged of 3: 0.75), no answer, 2 tokens, ended by its last turn"
    assert row(asked, of) == f"{line}, mean log-probability -1.500"
    judged = replace(of, trajectories=of.trajectories[:2])
    assert "reward 0.5 (mean of its 2: 0.75), " in row(asked, judged)
    assert judged_of({"group_size": 3, "group_reward": 0.75}) == "3", "a row of an older run"
    assert row(of.trajectories[2], of).startswith("timeout, ") and "reward" not in row(of.trajectories[2], of)
    assert group_rewards(of) == [0.5, 1.0]


def test_every_end_has_words() -> None:
    assert set(ENDS) == set(get_args(FinishReason))
