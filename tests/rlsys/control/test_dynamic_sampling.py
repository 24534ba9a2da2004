"""Which groups have a learning signal, and what is counted of those that are replaced."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from fakes import group, prompt, searched_group, trajectory
from hypothesis import given
from hypothesis import strategies as st

from learners.objective.advantages import group_advantages
from rlsys.config.objective import ObjectiveConfig
from rlsys.control.budgets import verifier_limit
from rlsys.control.dynamic_sampling import GroupFilter, has_signal
from rlsys.errors import TooManyFailuresError
from rlsys.overlong import soft_overlong_penalty
from rlsys.types import Demonstration, Outcome, Preference, RolloutFailure, StepPreference, TrajectoryGroup

IDS = np.arange(3, dtype=np.int32)
PAIRS = {
    "pairs": (Preference(chosen_ids=IDS, rejected_ids=IDS, prompt_length=1, common=1),),
    "step_preferences": (
        StepPreference(
            prefix_ids=IDS,
            chosen_ids=IDS,
            rejected_ids=IDS,
            chosen_value=1.0,
            rejected_value=0.0,
            chosen_visits=2,
            rejected_visits=2,
        ),
    ),
    "demonstrations": (Demonstration(token_ids=IDS, loss_mask=IDS > 0),),
}
WITHOUT_POLICY = {"policy": {"weight": 0.0}}


def objective(**terms: Any) -> ObjectiveConfig:
    return ObjectiveConfig.model_validate(terms)


def judged(*verdicts: tuple[float, Outcome], lengths: Sequence[int] = ()) -> TrajectoryGroup:
    """Return a group of rewards with outcomes; completions have 2 tokens, or `lengths`."""
    sizes = lengths or [2] * len(verdicts)
    pairs = zip(verdicts, sizes, strict=True)
    made = [trajectory(0, reward, outcome, length=size) for (reward, outcome), size in pairs]
    return TrajectoryGroup(prompt=prompt("a"), trajectories=tuple(made))


@pytest.mark.parametrize(
    ("group", "expected"),
    [
        (judged((1.0, "ok"), (0.0, "wrong")), True),
        (judged((1.0, "ok"), (1.0, "ok")), False),
        (judged((0.0, "wrong"), (0.0, "wrong")), False),
        (judged((0.1, "ok"), (0.1, "ok"), (0.1, "ok")), False),
        (judged((0.5, "ok"), (1.0, "ok")), True),
        (judged((1.0, "ok"), (0.0, "timeout")), False),  # the timeout's reward is none
        (judged((1.0, "ok"), (0.0, "error"), (0.0, "wrong")), True),
        (judged((0.0, "error"), (0.0, "timeout")), False),
        (searched_group(prompt("a"), 0, (1.0, 0.0)), True),
        (searched_group(prompt("a"), 0, (1.0, 1.0)), False),
        (searched_group(prompt("a"), 0, (1.0,)), False),
        (replace(searched_group(prompt("a")), trajectories=()), False),  # of another model
    ],
)
def test_judged_rewards_that_differ_are_a_signal(group: TrajectoryGroup, expected: bool) -> None:
    assert has_signal(group, objective(), 8) is expected


@given(
    st.lists(st.tuples(st.sampled_from([0.0, 0.1, 1.0]), st.sampled_from(["ok", "wrong", "error"])), min_size=1),
    st.sampled_from(["grpo", "dr_grpo", "rloo"]),
)
def test_without_a_signal_all_advantages_are_zero_and_with_one_some_are_not(
    verdicts: list[tuple[float, Outcome]], estimator: Any
) -> None:
    rewards, valid = np.array([reward for reward, _ in verdicts]), np.array([which != "error" for _, which in verdicts])
    advantages = group_advantages(rewards, valid, estimator=estimator)
    terms = objective(policy={"estimator": estimator})
    assert has_signal(judged(*verdicts), terms, 8) == bool(advantages.any())


@pytest.mark.parametrize(
    ("terms", "source"),
    [
        ({"preference": {"weight": 1.0}}, "pairs"),
        ({"preference": {"weight": 0.0, "final_weight": 1.0}}, "pairs"),
        ({"preference": {"weight": 1.0, "pairs": "steps"}}, "step_preferences"),
        ({"preference": {"weight": 1.0, "source": "file"}}, None),
        ({"sft": {"weight": 1.0}}, "pairs"),
        ({"sft": {"weight": 1.0}, "preference": {"pairs": "steps"}}, "step_preferences"),
        ({"sft": {"weight": 1.0}, "preference": {"source": "file"}}, None),
        ({"sft": {"weight": 1.0, "source": "trees"}}, "demonstrations"),
        ({"sft": {"weight": 1.0, "source": "demonstrations"}}, None),
        ({}, None),
    ],
)
@pytest.mark.parametrize("policy", [{}, WITHOUT_POLICY])
def test_a_level_tree_has_a_signal_where_it_brings_what_a_term_trains(
    terms: dict[str, Any], source: str | None, policy: dict[str, Any]
) -> None:
    tree = searched_group(prompt("a"), 0, (1.0, 1.0))
    sources = [
        name
        for name, made in PAIRS.items()
        if has_signal(replace(tree, **{name: made}), objective(**terms, **policy), 8)
    ]
    assert sources == ([source] if source else [])


def test_rewards_are_no_signal_without_a_policy_term_but_sampled_groups_pass() -> None:
    terms = objective(**WITHOUT_POLICY, preference={"weight": 1.0})
    assert not has_signal(searched_group(prompt("a"), 0, (1.0, 0.0)), terms, 8)
    assert has_signal(group(prompt("a"), 0, (1.0, 1.0)), terms, 8)


def test_every_group_has_a_signal_with_a_teacher() -> None:
    level = judged((1.0, "ok"), (1.0, "ok"))
    assert has_signal(level, objective(distill={"weight": 0.5}), 10)
    over_rows = {"weight": 0.5, "divergence": "top_k", "on_policy_share": 0.0}
    assert not has_signal(level, objective(distill=over_rows), 10)
    assert not has_signal(level, objective(), 10)


def test_equal_rewards_of_lengths_that_shaping_tells_apart() -> None:
    # 8 tokens at most; over the last 4 the reward falls by 0.5: 4 tokens lose 0, 6 lose 0.25, 8 and more 0.5.
    terms = objective(policy={"overlong_buffer": 4, "overlong_penalty": 0.5})
    two: tuple[tuple[float, Outcome], ...] = ((1.0, "ok"), (1.0, "ok"))
    assert has_signal(judged(*two, lengths=(4, 6)), terms, 8)
    assert not has_signal(judged(*two, lengths=(2, 4)), terms, 8)
    assert not has_signal(judged(*two, lengths=(8, 9)), terms, 8)
    assert not has_signal(judged(*two, lengths=(4, 6)), objective(), 8)
    assert not has_signal(judged((1.0, "ok"), (0.75, "ok"), lengths=(6, 4)), terms, 8)  # 1 - 0.25, and 0.75
    assert not has_signal(judged((1.0, "ok"), (1.0, "error"), lengths=(4, 6)), terms, 8)


@given(
    lengths=st.lists(st.integers(1, 12), min_size=2, max_size=4),
    rewards=st.lists(st.sampled_from([0.0, 0.1, 0.7, 1.0]), min_size=4, max_size=4),
    buffer=st.integers(1, 12),
    factor=st.sampled_from([0.0, 0.1, 0.3, 1.0]),
)
def test_shaping_is_the_learners_bit_for_bit(
    lengths: list[int], rewards: list[float], buffer: int, factor: float
) -> None:
    terms = objective(policy={"overlong_buffer": buffer, "overlong_penalty": factor})
    kept = rewards[: len(lengths)]
    penalties = soft_overlong_penalty(np.array(lengths), max_tokens=12, buffer=buffer, factor=factor)
    shaped = {reward + float(penalty) for reward, penalty in zip(kept, penalties, strict=True)}
    shaped_group = judged(*((reward, "ok") for reward in kept), lengths=lengths)
    assert has_signal(shaped_group, terms, 12) == (len(shaped) > 1)


def group_filter(share: float = 0.5) -> GroupFilter:
    return GroupFilter(rounds=1, has_signal=lambda _group: False, verifications=verifier_limit(share))


def test_tokens_of_replaced_groups_and_of_failures_are_counted_until_a_row_has_them() -> None:
    # 2 + 2 tokens sampled, 10 of a tree, 7 of a failure, which is no replaced group.
    counted = group_filter()
    counted.add(group(prompt("a")))
    counted.add(searched_group(prompt("b")))
    counted.add_failure(RolloutFailure(prompt=prompt("c"), reason="scripted", tokens=7))
    assert (counted.groups, counted.tokens, counted.unlogged_tokens) == (2, 14, 21)
    assert (counted.take_unlogged(), counted.take_unlogged()) == (21, 0)
    counted.add(group(prompt("d")))
    assert (counted.tokens, counted.take_unlogged()) == (18, 4)


def test_a_verifier_that_always_fails_cannot_hide_behind_replaced_groups() -> None:
    counted = group_filter(share=0.4)
    counted.add(judged((1.0, "ok"), (1.0, "ok"), (0.0, "error")))
    with pytest.raises(TooManyFailuresError, match=r"3 of 5 verifications failed, more than train\.max_verifier"):
        counted.add(judged((0.0, "error"), (0.0, "timeout")))
