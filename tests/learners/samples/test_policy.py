"""Samples of the policy term: trained tokens, their advantages, and the scores that they need."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from joint_samples import floats, group, searched, trajectory

from learners.samples.batching import collate
from learners.samples.policy import policy_samples
from learners.samples.types import PackItem, Sample, count_targets
from rlsys.config.objective import ObjectiveConfig
from rlsys.types import Float32Array, TrajectoryGroup


class FakeScorer:
    """Log-probabilities of -1 (old) and -1.5 (reference), values of 0.5; records its calls."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, int]] = []

    def old_logprobs(self, samples: Sequence[Sample]) -> list[Float32Array]:
        return self._scores("old", samples, -1.0)

    def reference_logprobs(self, samples: Sequence[Sample]) -> list[Float32Array]:
        return self._scores("reference", samples, -1.5)

    def values(self, samples: Sequence[Sample]) -> list[Float32Array]:
        return self._scores("values", samples, 0.5)

    def _scores(self, name: str, samples: Sequence[Sample], value: float) -> list[Float32Array]:
        self.calls.append((name, len(samples)))
        return [np.where(sample.targets, value, 0).astype(np.float32) for sample in samples]


def samples_of(
    groups: Sequence[TrajectoryGroup],
    *,
    scorer: FakeScorer | None = None,
    kl_weight: float = 0.0,
    max_tokens: int = 10,
    kl: dict[str, Any] | None = None,
    estimator: str = "dr_grpo",
    **policy: Any,
) -> list[list[Sample]]:
    critic = {"value": {"weight": 1.0}} if estimator == "gae" else {}
    policy = {"estimator": estimator, "tree_std": False, **policy}  # undivided, as figures by hand are
    objective = ObjectiveConfig(policy=policy, kl=kl or {}, **critic)
    scorer = scorer or FakeScorer()
    return policy_samples(groups, objective, max_tokens=max_tokens, kl_weight=kl_weight, scorer=scorer)


def targets(samples: Sequence[Sample]) -> list[tuple[int, float]]:
    """Return (token, advantage) of all targets in a batch of the samples."""
    batch = collate([PackItem(samples=(sample,)) for sample in samples], pad_id=0)
    if batch.policy is None:
        return []
    return list(zip(batch.target_ids.tolist(), batch.policy.advantages.tolist(), strict=True))


def advantages(samples: Sequence[Sample]) -> list[float]:
    return [advantage for _, advantage in targets(samples)]


def ends(*rewards: float) -> TrajectoryGroup:
    """Return a group with completions of one token, 10, 11, ..., after a prompt of two."""
    return group(*(trajectory([1, 2, 10 + n], [0, 0, 1], reward) for n, reward in enumerate(rewards)))


# --- sampled groups ---


def test_samples_have_advantages_and_unjudged_trajectories_are_left_out():
    # judged rewards 1, 0: mean 1/2. The timeout's reward of 9 counts nowhere.
    sampled_group = group(
        trajectory([1, 2, 10], [0, 0, 1], 1.0),
        trajectory([1, 2, 11], [0, 0, 1], 9.0, outcome="timeout"),
        trajectory([1, 2, 12], [0, 0, 1], 0.0),
        trajectory([1, 2, 13], [0, 0, 1], math.nan, outcome="error"),
    )
    nothing = group(trajectory([1, 2, 10], [0, 0, 1], math.nan, outcome="error"))
    samples, none = samples_of([sampled_group, nothing])
    assert targets(samples) == [(10, 0.5), (12, -0.5)]
    assert none == []
    assert samples[0].policy.behavior_logprobs.tolist() == floats(0, 0, -0.2).tolist()


@pytest.mark.parametrize(
    ("estimator", "expected"),
    [
        # Rewards 1, 0, 0: mean 1/3, deviations 2/3, -1/3, -1/3, squares 2/3 over n - 1 = 2: std sqrt(1/3).
        ("dr_grpo", [2 / 3, -1 / 3, -1 / 3]),
        ("grpo", [x / (math.sqrt(1 / 3) + 1e-6) for x in (2 / 3, -1 / 3, -1 / 3)]),
        ("rloo", [1.0, -0.5, -0.5]),
    ],
)
def test_estimators_of_a_group_by_hand(estimator, expected):
    (samples,) = samples_of([ends(1.0, 0.0, 0.0)], estimator=estimator)
    assert advantages(samples) == pytest.approx(expected, rel=1e-6)


def test_baselines_are_per_group_and_whitening_is_per_step():
    # Group means 1/2 and 3: centred 1/2, -1/2, 1, -1, whose mean is 0 and std sqrt(2.5 / 4).
    first, second = samples_of([ends(1.0, 0.0), ends(4.0, 2.0)], estimator="reinforce_pp_baseline")
    std = math.sqrt(2.5 / 4)
    assert advantages([*first, *second]) == pytest.approx([0.5 / std, -0.5 / std, 1 / std, -1 / std], rel=1e-6)
    # Without a baseline: rewards 1, 0, 4, 2, mean 7/4, std sqrt(21/4 - 49/16) = sqrt(35/16).
    first, second = samples_of([ends(1.0, 0.0), ends(4.0, 2.0)], estimator="reinforce_pp")
    std = math.sqrt(35 / 16)
    assert advantages([*first, *second]) == pytest.approx([(x - 1.75) / std for x in (1, 0, 4, 2)], rel=1e-6)


def test_reinforce_pp_discounts_and_whitens_over_tokens():
    # Completions of 2 tokens with reward 1 and of 1 token with reward 0; gamma 1/2: returns 1/2, 1 | 0.
    sampled_group = group(trajectory([1, 2, 10, 11], [0, 0, 1, 1], 1.0), trajectory([1, 2, 12], [0, 0, 1], 0.0))
    (samples,) = samples_of([sampled_group], estimator="reinforce_pp", gamma=0.5)
    std = math.sqrt((1.25 - 0.75) / 3)  # mean 1/2; squares 1/4 + 1 + 0 less 3 * 1/4
    assert advantages(samples) == pytest.approx([0.0, 0.5 / std, -0.5 / std], rel=1e-6, abs=1e-7)


def test_forced_and_foreign_tokens_are_not_trained_and_end_no_return():
    # The last token is from another model: the reward is on the last token of the policy.
    sampled_group = group(
        trajectory([1, 2, 10, 98, 11, 99], [0, 0, 1, 0, 1, 0], 1.0), trajectory([1, 2, 12, 99], [0, 0, 1, 0], 0.0)
    )
    (samples,) = samples_of([sampled_group])
    assert targets(samples) == [(10, 0.5), (11, 0.5), (12, -0.5)]
    (samples,) = samples_of([sampled_group], estimator="reinforce_pp", gamma=0.5)
    # Returns 1/2 at token 10: the foreign token between discounts nothing. Mean 1/2 of (1/2, 1, 0).
    std = math.sqrt((1.25 - 0.75) / 3)
    assert targets(samples) == [
        (10, pytest.approx(0.0, abs=1e-7)),
        (11, pytest.approx(0.5 / std, rel=1e-6)),
        (12, pytest.approx(-0.5 / std, rel=1e-6)),
    ]


def test_a_trajectory_without_policy_tokens_gives_a_sample_without_targets():
    # It was judged, so its reward is part of the baseline.
    (samples,) = samples_of([group(trajectory([1, 2, 99], [0, 0, 0], 1.0), trajectory([1, 2, 10], [0, 0, 1], 0.0))])
    assert (len(samples), targets(samples)) == (2, [(10, -0.5)])


def test_rewards_fall_over_the_overlong_buffer():
    # max_tokens 4, buffer 2, penalty 0.5: lengths 2, 3, 4 lose 0, 1/4, 1/2. Rewards 1 each: mean of 1, 3/4, 1/2.
    sampled_group = group(*(trajectory([1, *([7] * n)], [0, *([1] * n)], 1.0) for n in (2, 3, 4)))
    (samples,) = samples_of([sampled_group], max_tokens=4, overlong_buffer=2, overlong_penalty=0.5)
    assert [sample.policy.advantages[-1] for sample in samples] == [0.25, 0.0, -0.25]
    (samples,) = samples_of([sampled_group], max_tokens=4)
    assert advantages(samples) == [0.0] * 9


# --- KL in the reward ---


def test_kl_in_the_reward_by_hand():
    # k1 of a token: log p_old - log p_ref = -1 + 1.5 = 1/2; weight 1/4: 1/8 a token. Rewards 1 of 2 tokens and
    # 0 of 1: 1 - 1/4 = 3/4 and -1/8, mean 5/16.
    sampled_group = group(trajectory([1, 2, 10, 11], [0, 0, 1, 1], 1.0), trajectory([1, 2, 12], [0, 0, 1], 0.0))
    kl = {"weight": 0.25, "estimator": "k1", "in_reward": True}
    scorer = FakeScorer()
    (samples,) = samples_of([sampled_group], scorer=scorer, kl=kl, kl_weight=0.25)
    assert advantages(samples) == [7 / 16, 7 / 16, -7 / 16]
    assert scorer.calls == [("reference", 2), ("old", 2)]
    # Token by token, before the whitening: (1 - 1/8) - 1/8 and 7/8 | -1/8; mean 1/2, squares 9/16 + 49/64 + 1/64.
    (samples,) = samples_of([sampled_group], estimator="reinforce_pp", kl=kl, kl_weight=0.25)
    std = math.sqrt((9 / 16 + 50 / 64) / 3 - 1 / 4)
    assert advantages(samples) == pytest.approx([0.25 / std, 0.375 / std, -0.625 / std], rel=1e-6)
    # The log-probabilities stay with the sample, so that nothing is scored twice.
    assert samples[0].policy.old_logprobs.tolist() == [0, 0, -1, -1]
    assert samples[0].policy.reference_logprobs.tolist() == [0, 0, -1.5, -1.5]


def test_foreign_tokens_have_no_kl_penalty():
    class Everywhere(FakeScorer):
        """Scores the context too, which a scorer should not do."""

        def _scores(self, name: str, samples: Sequence[Sample], value: float) -> list[Float32Array]:
            return [np.full(sample.length, value, dtype=np.float32) for sample in samples]

    sampled_group = group(trajectory([1, 2, 10, 99], [0, 0, 1, 0], 1.0), trajectory([1, 2, 12], [0, 0, 1], 0.0))
    kl = {"weight": 0.25, "estimator": "k1", "in_reward": True}
    (samples,) = samples_of([sampled_group], scorer=Everywhere(), kl=kl, kl_weight=0.25)
    assert advantages(samples) == [0.5, -0.5]  # both lose 1/8


@pytest.mark.parametrize("in_reward", [False, True])
def test_a_weight_of_zero_needs_no_scores(in_reward):
    # A schedule may begin or end at 0.
    scorer = FakeScorer()
    kl = {"final_weight": 0.1, "in_reward": in_reward}
    (samples,) = samples_of([ends(1.0, 0.0)], scorer=scorer, kl=kl, kl_weight=0.0)
    assert scorer.calls == []
    assert (samples[0].policy.reference_logprobs, samples[0].policy.old_logprobs) == (None, None)
    samples_of([ends(1.0, 0.0)], scorer=scorer, kl=kl, kl_weight=0.1)
    assert [name for name, _ in scorer.calls] == ["reference", "old"][: 1 + in_reward]


# --- critic ---


def test_generalised_advantages_by_hand():
    # Values 1/2 everywhere, gamma 1, lambda 1/2. Sample 1: rewards 0, 1: deltas 0, 1/2: A = 1/4, 1/2.
    # Sample 2: reward 0: A = -1/2. Returns A + V: 3/4, 1 | 0. The foreign token in between passes V and A on.
    sampled_group = group(trajectory([1, 2, 10, 99, 11], [0, 0, 1, 0, 1], 1.0), trajectory([1, 2, 12], [0, 0, 1], 0.0))
    (samples,) = samples_of([sampled_group], estimator="gae", gae_lambda=0.5)
    mean, squares = (0.25 + 0.5 - 0.5) / 3, 0.0625 + 0.25 + 0.25
    std = math.sqrt(squares / 3 - mean**2)
    assert advantages(samples) == pytest.approx([(x - mean) / std for x in (0.25, 0.5, -0.5)], rel=1e-6)
    # Returns come from advantages before whitening.
    assert [sample.policy.returns.tolist() for sample in samples] == [[0, 0, 0.75, 0, 1], [0, 0, 0]]
    assert [sample.policy.values.tolist() for sample in samples] == [[0, 0, 0.5, 0, 0.5], [0, 0, 0.5]]


def test_the_critic_scores_only_sampled_groups():
    scorer = FakeScorer()
    tree = searched(([1], "ok", 1.0), ([2], "wrong", 0.0))
    searched_samples, sampled = samples_of([tree, ends(1.0, 0.0)], estimator="gae", scorer=scorer)
    assert scorer.calls == [("values", 2)]
    assert targets(searched_samples) == [(10, 0.5), (11, 0.5), (20, -0.5), (21, -0.5)]  # without whitening
    assert all(sample.policy.values is None and sample.policy.returns is None for sample in searched_samples)
    assert all(sample.policy.values is not None for sample in sampled)
    # With only searched groups there is nothing to score.
    samples_of([tree], estimator="gae", scorer=scorer)
    assert scorer.calls[1:] == [("values", 0)]


def test_searched_groups_do_not_change_the_whitening_of_sampled_groups():
    tree = searched(([1], "ok", 1.0), ([2], "wrong", 0.0))
    (alone,) = samples_of([ends(1.0, 0.0, 0.0)], estimator="reinforce_pp")
    _, with_tree = samples_of([tree, ends(1.0, 0.0, 0.0)], estimator="reinforce_pp")
    assert targets(with_tree) == targets(alone)


# --- searched groups ---


@pytest.mark.parametrize(
    ("tree_estimator", "expected"),
    [
        # Node 1 (drawn twice, two chains below) holds 2 (right) and 3 (wrong); 4 was right. Rewards 1, 0, 1.
        # sibling_mean: V(1) = 1/2, V(4) = 1, V(0) = (2 * 1/2 + 1) / 3 = 2/3. Draws 2, 1, 1, 1 over a mean of 5/4.
        ("sibling_mean", {1: -1 / 6 * 2, 2: 1 / 2, 3: -1 / 2, 4: 1 / 3}),
        # group: less the mean 2/3; node 1 is of two chains: mean -1/6.
        ("group", {1: -1 / 6 * 2, 2: 1 / 3, 3: -2 / 3, 4: 1 / 3}),
        # treepo: groups of all (3) and of node 1 (2): chain 2: (3 * 1/3 + 2 * 1/2) / 5 = 2/5, chain 3:
        # (-2 - 1) / 5 = -3/5, chain 4: 1/3.
        ("treepo", {1: -1 / 10 * 2, 2: 2 / 5, 3: -3 / 5, 4: 1 / 3}),
        # treerl: R~ = R - mean of the others: 1/2, -1, 1/2; V(1) = -1/4: (2 V) / sqrt 2; leaves 2 V - V(parent).
        ("treerl", {1: -1 / 2 / math.sqrt(2) * 2, 2: 1 + 1 / 4, 3: -2 + 1 / 4, 4: 1.0}),
        # backed_up: rewards 1, -1, 1, mean 1/3; w of node 1: (1 + 1) / 3 and -2/3: q = 2/3, score tanh(2/3).
        ("backed_up", {1: (math.tanh(2 / 3) - 1 / 3) * 2, 2: 2 / 3, 3: -4 / 3, 4: 2 / 3}),
    ],
)
def test_a_node_counts_as_often_as_it_was_drawn(tree_estimator, expected):
    # Where chains are counted the draws are those through a node: 2, 1, 1, 1 as well.
    tree = searched(([1, 2], "ok", 1.0), ([1, 3], "wrong", 0.0), ([4], "ok", 1.0), samples={1: 2})
    (samples,) = samples_of([tree], tree_estimator=tree_estimator)
    by_node = {token // 10: advantage for token, advantage in targets(samples)}
    assert len(targets(samples)) == 8  # two tokens a node, each once
    assert by_node == pytest.approx({node: value / (5 / 4) for node, value in expected.items()}, rel=1e-6)


def test_searched_samples_by_hand():
    # Node 1 holds 2 (right) and 3 (wrong): V(1) = 1/2; node 4 was right: V(4) = 1; V(0) = 3/4.
    group = searched(([1, 2], "ok", 1.0), ([1, 3], "wrong", 0.0), ([4], "ok", 1.0), forced=[2, 4])
    (samples,) = samples_of([group])
    assert [sample.token_ids.tolist() for sample in samples] == [
        [1, 2, 10, 11, 20, 21],
        [1, 2, 10, 11, 30, 31],
        [1, 2, 40, 41],
    ]
    # Only the first sample trains node 1; the first tokens of 2 and 4 were forced.
    assert targets(samples) == [(10, -0.25), (11, -0.25), (21, 0.5), (30, -0.5), (31, -0.5), (41, 0.25)]
    # Denominators count the same targets.
    assert [count_targets(sample.policy_mask) for sample in samples] == [3, 2, 1]
    assert samples[1].policy.behavior_logprobs.tolist() == floats(0, 0, -0.2, -0.3, -0.4, -0.5).tolist()


def test_tree_std_divides_by_the_deviation_of_the_siblings_whatever_the_estimator():
    # As above: V(1) = 1/2 and V(4) = 1 differ by 1/4 from their mean, 2 and 3 by 1/2 from theirs: all become 1 or -1.
    group = searched(([1, 2], "ok", 1.0), ([1, 3], "wrong", 0.0), ([4], "ok", 1.0))
    for estimator in ("grpo", "rloo"):
        (samples,) = samples_of([group], estimator=estimator, tree_std=True)
        by_node = {token // 10: advantage for token, advantage in targets(samples)}
        assert by_node == pytest.approx({1: -1, 2: 1, 3: -1, 4: 1}, rel=1e-4)


def test_a_node_drawn_three_times_weighs_three_times_as_much_within_its_group():
    # V(1) = 1, V(2) = 0, drawn 3 times and once: V(0) = 3/4, A(1) = 1/4, A(2) = -3/4. Two trained tokens each, so the
    # mean of the draws is (3 + 3 + 1 + 1) / 4 = 2: the weights are 3/2 and 1/2, and 3/8 - 3/8 = 0 as for four samples.
    group = searched(([1], "ok", 1.0), ([2], "wrong", 0.0), samples={1: 3})
    (samples,) = samples_of([group])
    assert targets(samples) == [(10, 0.375), (11, 0.375), (20, -0.375), (21, -0.375)]
    # With twice the draws of each node the weights are the same: they sum to the number of tokens.
    (same,) = samples_of([searched(([1], "ok", 1.0), ([2], "wrong", 0.0), samples={1: 6, 2: 2})])
    assert targets(same) == targets(samples)


def test_a_searched_trajectory_with_nothing_to_train_gives_no_sample():
    # The second trajectory ends in a node that the first goes on from; the third was never judged, nor is its node.
    group = searched(([1, 2], "ok", 1.0), ([1], "wrong", 0.0), ([3], "error", math.nan))
    (samples,) = samples_of([group])
    assert [sample.token_ids.tolist() for sample in samples] == [[1, 2, 10, 11, 20, 21]]
    # V(2) = 1, the end at node 1 is 0: V(1) = 1/2, the only child of the prompt.
    assert targets(samples) == [(10, 0.0), (11, 0.0), (20, 0.5), (21, 0.5)]


def test_an_unjudged_trajectory_leaves_its_shared_nodes_to_the_next_one():
    group = searched(([1, 2], "timeout", 9.0), ([1, 3], "ok", 1.0), ([4], "wrong", 0.0))
    (samples,) = samples_of([group])
    assert targets(samples) == [(10, 0.5), (11, 0.5), (30, 0.0), (31, 0.0), (40, -0.5), (41, -0.5)]


def test_tokens_outside_nodes_are_not_trained():
    group = searched(([1], "ok", 1.0), ([2], "wrong", 0.0))
    longer = [
        replace(
            trajectory,
            token_ids=np.append(trajectory.token_ids, 99).astype(np.int32),
            loss_mask=np.append(trajectory.loss_mask, True),
            behavior_logprobs=np.append(trajectory.behavior_logprobs, -1).astype(np.float32),
        )
        for trajectory in group.trajectories
    ]
    (samples,) = samples_of([replace(group, trajectories=tuple(longer))])
    assert targets(samples) == [(10, 0.5), (11, 0.5), (20, -0.5), (21, -0.5)]


def test_a_searched_group_without_trajectories_gives_no_samples():
    assert samples_of([searched()]) == [[]]


@given(data=st.data(), use_std=st.booleans())
def test_every_node_of_a_judged_trajectory_is_trained_exactly_once(data, use_std):
    # Paths to nodes of a random tree; a node may be the end of several trajectories and the middle of others.
    parents = [0, *(data.draw(st.integers(0, number - 1)) for number in range(1, data.draw(st.integers(2, 9))))]

    def path(node: int) -> list[int]:
        return [*path(parents[node]), node] if node else []

    ends = data.draw(st.lists(st.integers(1, len(parents) - 1), min_size=1, max_size=6))
    results = st.tuples(st.sampled_from(["ok", "wrong", "error"]), st.sampled_from([0.0, 0.5, 1.0]))
    chains = [(path(end), *data.draw(results)) for end in ends]
    forced = data.draw(st.lists(st.integers(1, 9)))
    (samples,) = samples_of([searched(*chains, forced=forced)], estimator="grpo" if use_std else "dr_grpo")
    nodes = {node for nodes, outcome, _ in chains if outcome != "error" for node in nodes}
    expected = sorted(
        token for node in nodes for token in (10 * node, 10 * node + 1) if token // 10 not in forced or token % 10
    )
    assert sorted(token for token, _ in targets(samples)) == expected
    assert all(count_targets(sample.policy_mask) for sample in samples)
