"""Values of the tokens of kept trajectories: those of the loss, and reasons where the policy term trains nothing."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from joint_samples import group, searched, trajectory
from plain_rank import TEMPERATURE, everything, logprob, plain_rank, sampled

from rlsys.interfaces import TokenValues
from rlsys.types import TrainingBatch, TrajectoryGroup

pytestmark = pytest.mark.usefixtures("process_group")

EQUAL = "not trained: all rewards of the group are equal"


def values_of(objective: dict[str, Any], *groups: TrajectoryGroup, **options: Any) -> list[TokenValues | None]:
    """Return the values of all trajectories of a step."""
    rank = plain_rank(objective, **options)
    rank.train(TrainingBatch(groups=groups, kept=places(*groups)), 0, 1)
    return rank.token_values()


def places(*groups: TrajectoryGroup) -> tuple[tuple[int, int], ...]:
    return tuple((g, n) for g, each in enumerate(groups) for n in range(len(each.trajectories)))


def numbers(array: Any) -> list[float | None]:
    return [None if np.isnan(value) else round(float(value), 4) for value in array]


@pytest.mark.parametrize(
    ("budget", "updates", "policy"),
    [(4096, 1, {}), (16, 1, {}), (16, 2, {}), (4096, 1, {"entropy_coef": 0.01})],
    ids=["one pass", "many passes", "two updates", "with entropy"],
)
def test_advantages_and_gaps_are_those_of_plain_torch(budget: int, updates: int, policy: dict[str, Any]) -> None:
    """In two updates too, the gap is that of the policy at the start of the step."""
    groups = sampled(4)
    rank = plain_rank({"policy": policy}, budget=budget, updates=updates)
    module = copy.deepcopy(rank.policy.module)
    kept = ((2, 3), (0, 0), (1, 1), (3, 2))
    rank.train(TrainingBatch(groups=tuple(groups), kept=kept), 0, 1)
    for (g, n), values in zip(kept, rank.token_values(), strict=True):
        row = groups[g].trajectories[n]
        assert values is not None and values.untrained == ""
        # Rewards 0, 1, 0, 1: mean 1/2, std sqrt(4 (1/2)^2 / 3) = 0.57735; (1 - 1/2) / 0.57735 = 0.8660.
        sign = 1 if n % 2 else -1
        assert numbers(values.advantages) == [None, None, *[sign * 0.8660] * (len(row.token_ids) - 2)]
        own = logprob(module, row.token_ids, 2, TEMPERATURE).detach().numpy()
        expected = own - row.behavior_logprobs[2:]
        np.testing.assert_allclose(values.gaps[2:], expected, rtol=1e-5, atol=1e-6)
        assert np.isnan(values.gaps[:2]).all()


def test_tokens_of_an_environment_have_none() -> None:
    rows = (trajectory([1, 2, 5, 6, 7], [0, 0, 1, 0, 1], 1.0), trajectory([1, 2, 8], [0, 0, 1], 0.0))
    first, second = values_of({"policy": {"estimator": "dr_grpo"}}, group(*rows))
    assert numbers(first.advantages) == [None, None, 0.5, None, 0.5] and numbers(second.advantages)[2:] == [-0.5]
    assert np.isnan(first.gaps).tolist() == [True, True, False, True, False]


def test_a_penalty_in_the_reward_is_in_the_advantage() -> None:
    """Lengths 9 and 10 of at most 10 with a buffer of 2: penalties 1/2 and 1, so rewards 1/2 and 0, mean 1/4."""
    rows = [trajectory([1, 2, *range(3, 3 + n)], [0, 0, *[1] * n], 1.0) for n in (9, 10)]
    policy = {"estimator": "dr_grpo", "overlong_buffer": 2, "overlong_penalty": 1.0}
    first, second = values_of({"policy": policy}, group(*rows))
    assert set(numbers(first.advantages)) == {None, 0.25} and set(numbers(second.advantages)) == {None, -0.25}


def test_the_reason_looks_at_the_rewards_with_the_penalty() -> None:
    """Lengths 8, 9, 10 of at most 10: all rewards are 1, with the penalty 1, 1/2 and 0, so the second has the mean."""
    rows = [trajectory([1, 2, *range(3, 3 + n)], [0, 0, *[1] * n], 1.0) for n in (8, 9, 10)]
    policy = {"estimator": "dr_grpo", "overlong_buffer": 2, "overlong_penalty": 1.0}
    values = values_of({"policy": policy}, group(*rows))
    assert [each.untrained for each in values] == ["", "not trained: its advantage is 0", ""]
    assert [each.untrained for each in values_of({"policy": {"estimator": "dr_grpo"}}, group(*rows))] == [EQUAL] * 3
    # Rewards 0.5 and 1 become equal: 1 - 1/2 and 1/2.
    equal = [trajectory([1, 2, *range(3, 3 + n)], [0, 0, *[1] * n], r) for n, r in ((8, 0.5), (9, 1.0))]
    assert [each.untrained for each in values_of({"policy": policy}, group(*equal))] == [EQUAL] * 2


def test_advantages_of_a_critic_are_whitened_over_the_tokens_of_the_step() -> None:
    objective = {"policy": {"estimator": "gae"}, "value": {"weight": 0.5}}
    values = values_of(objective, *sampled(3), updates=2)
    advantages = np.concatenate([each.advantages[~np.isnan(each.advantages)] for each in values])
    assert len(set(advantages.tolist())) > 12, "they differ within a completion"
    assert advantages.mean() == pytest.approx(0, abs=1e-5) and advantages.std() == pytest.approx(1, rel=0.05)


def test_a_node_of_a_tree_has_a_value_in_the_completion_that_trains_it() -> None:
    tree = searched(([1, 2], "ok", 1.0), ([1, 3], "wrong", 0.0), ([1], "wrong", 0.0), forced=[2])
    first, second, third = values_of({"policy": {"tree_std": False}}, tree)
    # The one node below the prompt has no sibling. The chains go on from it to values 1 and 0, and one ends in it with
    # 0: mean 1/3.
    assert numbers(first.advantages) == [None, None, 0.0, 0.0, None, 0.6667]
    assert numbers(second.advantages) == [None, None, None, None, -0.3333, -0.3333]
    assert third.untrained == "not trained: its nodes are trained with another completion of the tree"


def test_each_trajectory_without_values_has_a_reason() -> None:
    alike = [trajectory([1, 2, 5], [0, 0, 1], 1.0), trajectory([1, 2, 6], [0, 0, 1], 1.0)]
    failed = trajectory([1, 2, 7], [0, 0, 1], 0.0, outcome="timeout")
    forced = trajectory([1, 2, 9], [0, 0, 0], 0.0)
    mean = [trajectory([1, 2, 5 + n], [0, 0, 1], reward) for n, reward in enumerate((0.0, 0.5, 1.0))]
    groups = group(*alike), group(mean[0], failed, mean[2]), group(*mean, forced, replace(mean[1])), group(*mean)
    reasons = [each.untrained for each in values_of({}, *groups)]
    assert reasons == [
        EQUAL,
        EQUAL,
        "",
        "not trained: the verifier gave no verdict (timeout)",
        "",
        "",
        "",
        "",
        "not trained: the policy chose none of its tokens",
        "",
        "",
        "not trained: its advantage is 0",
        "",
    ]


def test_equal_rewards_have_values_where_another_part_of_the_loss_trains_them() -> None:
    alike = [trajectory([1, 2, 5], [0, 0, 1], 1.0), trajectory([1, 2, 6], [0, 0, 1], 1.0)]
    values = values_of({"policy": {"entropy_coef": 0.1}}, group(*alike))
    assert [numbers(each.advantages) for each in values] == [[None, None, 0.0]] * 2


def test_without_the_policy_term_there_are_none() -> None:
    objective = {"policy": {"estimator": "gae"}, "value": {"weight": 0.5, "warmup_steps": 1}}
    assert {each.untrained for each in values_of(objective, *sampled(1))} == {
        "the policy term has no weight in this step"
    }


def test_the_next_step_has_its_own_values() -> None:
    rank, batch = plain_rank({}), everything()
    rank.train(replace(batch, kept=((0, 0),)), 0, 1)
    assert len(rank.token_values()) == 1
    rank.train(batch, 1, 2)
    assert rank.token_values() == []


def test_values_cost_no_pass() -> None:
    passes = []
    for kept in ((), places(*sampled(3))):
        rank = plain_rank({}, updates=2)
        rank.train(TrainingBatch(groups=tuple(sampled(3)), kept=kept), 0, 1)
        passes.append(rank.passes)
    assert passes[0] == passes[1] > 0
