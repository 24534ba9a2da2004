"""Advantages of tree nodes against hand-made numbers, and what must hold on every tree."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from learners.advantages import group_advantages
from learners.tree_advantages import NodeAdvantage, tree_advantages
from rlsys.types import Outcome, Step, Trajectory

reward_lists = st.lists(st.integers(-8, 8).map(lambda n: n / 4), min_size=2, max_size=16)


def sibling_means(trajectories: Sequence[Trajectory], *, use_std: bool) -> dict[int, float]:
    found = tree_advantages(trajectories, estimator="sibling_mean", use_std=use_std)
    return {node: entry.advantage for node, entry in found.items()}


def chain(
    nodes: Sequence[int],
    reward: float,
    outcome: Outcome = "ok",
    samples: Mapping[int, int] | None = None,
    backtracks: Sequence[int] = (),
) -> Trajectory:
    """A trajectory through nodes of one token each."""
    return Trajectory(
        token_ids=np.arange(1 + len(nodes), dtype=np.int32),
        loss_mask=np.arange(1 + len(nodes)) > 0,
        behavior_logprobs=np.zeros(1 + len(nodes), dtype=np.float32),
        versions=(),
        finish_reason="stop",
        reward=reward,
        outcome=outcome,
        answered=True,
        steps=tuple(
            Step(
                node=node,
                parent=parent,
                start=place,
                stop=place + 1,
                type="thinking",
                samples=(samples or {}).get(node, 1),
                visits=0,
                value=None,
                backtrack=node in backtracks,
            )
            for place, (parent, node) in enumerate(itertools.pairwise((0, *nodes)), start=1)
        ),
    )


def test_a_tree_by_hand():
    # 0 -> 1 (drawn 3 times) -> 3 (right), 4 (wrong, drawn twice);  0 -> 2 -> 5 (right)
    # V(1) = (1 * 1 + 2 * 0) / 3 = 1/3;  V(2) = V(5) = 1;  V(0) = (3 * 1/3 + 1 * 1) / 4 = 1/2
    tree = [chain(nodes, reward, samples={1: 3, 4: 2}) for nodes, reward in (((1, 3), 1), ((1, 4), 0), ((2, 5), 1))]
    expected = {1: 1 / 3 - 1 / 2, 2: 1 / 2, 3: 2 / 3, 4: -1 / 3, 5: 0.0}
    assert sibling_means(tree, use_std=False) == pytest.approx(expected, rel=1e-12)
    # below 0: sqrt((3 (1/6)^2 + (1/2)^2) / 4) = sqrt(1/12); below 1: sqrt(((2/3)^2 + 2 (1/3)^2) / 3) = sqrt(2/9)
    top, bottom = math.sqrt(1 / 12) + 1e-6, math.sqrt(2 / 9) + 1e-6
    divided = {1: -1 / 6 / top, 2: 1 / 2 / top, 3: 2 / 3 / bottom, 4: -1 / 3 / bottom, 5: 0.0}
    found = sibling_means(tree, use_std=True)
    assert found == pytest.approx(divided, rel=1e-12)
    assert found[5] == 0.0


def test_a_node_counts_as_often_as_it_was_drawn():
    tree = [chain((1, 3), 1, samples={1: 3}), chain((2,), 0, samples={2: 2})]
    # V(0) = (3 * 1 + 2 * 0) / 5
    found = tree_advantages(tree, estimator="sibling_mean", use_std=False)
    assert found == {1: NodeAdvantage(1 - 3 / 5, 3.0), 2: NodeAdvantage(-3 / 5, 2.0), 3: NodeAdvantage(0.0, 1.0)}


def test_an_unknown_estimator_is_refused():
    with pytest.raises(ValueError, match="unknown estimator"):
        tree_advantages([], estimator="median", use_std=False)


def test_a_mean_of_means_is_not_a_mean_of_leaves():
    # node 1 has three right leaves, node 2 one wrong one: V(0) = 1/2, where a mean over the leaves is 3/4
    tree = [chain((1, 3), 1), chain((1, 4), 1), chain((1, 5), 1), chain((2, 6), 0)]
    found = sibling_means(tree, use_std=False)
    assert (found[1], found[2]) == (0.5, -0.5)


def test_the_end_of_a_trajectory_is_one_more_child_of_its_last_node():
    # 1 ends wrong and goes on to 2, drawn twice and right: V(1) = (2 * 1 + 0) / 3
    tree = [chain((1,), 0), chain((1, 2), 1, samples={2: 2}), chain((3,), 0)]
    found = sibling_means(tree, use_std=False)
    assert found == pytest.approx({1: 1 / 3, 2: 1 / 3, 3: -1 / 3}, rel=1e-12)


def test_backtracking_is_no_merit_of_the_thought_it_starts_from():
    # 0 -> 1 -> 2 (wrong), 3 (backtracking) -> 4 (right), 5 (wrong);  0 -> 6 (right).
    # V(3) = 1/2 counts for nothing above it: V(1) = V(2) = 0, V(0) = 1/2; 3 has no sibling of its kind.
    tree = [chain(nodes, reward, backtracks=[3]) for nodes, reward in (((1, 2), 0), ((1, 3, 4), 1), ((1, 3, 5), 0))]
    found = sibling_means([*tree, chain((6,), 1)], use_std=False)
    assert found == {1: -0.5, 2: 0.0, 3: 0.0, 4: 0.5, 5: -0.5, 6: 0.5}
    # Two backtracking children are compared with each other: V = 1/2 and 0, mean 1/4.
    tree = [*tree, chain((1, 7), 0, backtracks=[7])]
    found = sibling_means([*tree, chain((6,), 1)], use_std=False)
    assert (found[3], found[7], found[1]) == (0.25, -0.25, -0.5)
    # Without any other child below 1 they are all that is known of it.
    only = [chain((1, 3), 1, backtracks=[3]), chain((6,), 0)]
    assert sibling_means(only, use_std=False) == {1: 0.5, 3: 0.0, 6: -0.5}


def test_what_was_not_judged_counts_nowhere():
    tree = [chain((1, 2), 1), chain((1, 3), 0)]
    spoiled = [*tree, chain((1, 4), math.nan, "error"), chain((5,), 99.0, "timeout")]
    assert sibling_means(spoiled, use_std=True) == sibling_means(tree, use_std=True)
    assert sibling_means(spoiled[2:], use_std=True) == {}
    assert sibling_means([], use_std=True) == {}


@pytest.mark.parametrize("use_std", [True, False])
def test_equal_siblings_and_only_children_are_exactly_zero(use_std):
    # three times 0.1 has a mean above 0.1, and 0.1 weighted 3 to 7 one below it
    tree = [chain((1, 2), 0.1), chain((1, 3), 0.1), chain((1, 4), 0.1), chain((5,), 0.1, samples={5: 7})]
    assert sibling_means(tree, use_std=use_std) == dict.fromkeys(range(1, 6), 0.0)


def test_a_reward_that_is_not_finite_is_refused():
    with pytest.raises(ValueError, match="finite rewards"):
        sibling_means([chain((1,), math.inf)], use_std=True)


@dataclass
class RandomTree:
    trajectories: list[Trajectory]
    parents: list[int]
    samples: dict[int, int]


@st.composite
def trees(draw: st.DrawFn) -> RandomTree:
    """Up to 12 nodes; trajectories end at all leaves and at some inner nodes."""
    parents = [-1, *(draw(st.integers(0, number - 1)) for number in range(1, draw(st.integers(2, 13))))]
    samples = {node: draw(st.integers(1, 4)) for node in range(1, len(parents))}
    leaves = set(range(1, len(parents))) - set(parents)
    ends = [*leaves, *draw(st.lists(st.integers(1, len(parents) - 1), max_size=3))]

    def path(node: int) -> list[int]:
        return [*path(parents[node]), node] if node else []

    rewards = [draw(st.integers(-4, 4)) / 4 for _ in ends]
    found = [chain(path(end), reward, samples=samples) for end, reward in zip(ends, rewards, strict=True)]
    return RandomTree(found, parents, samples)


@given(tree=trees(), use_std=st.booleans())
def test_weighted_advantages_of_every_sibling_set_sum_to_zero(tree, use_std):
    found = sibling_means(tree.trajectories, use_std=use_std)
    assert set(found) == set(tree.samples)
    ends = {trajectory.steps[-1].node for trajectory in tree.trajectories}
    sums: dict[int, float] = defaultdict(float)
    for node, advantage in found.items():
        sums[tree.parents[node]] += tree.samples[node] * advantage
    # where a trajectory ends at the parent itself, that end is a sibling without tokens
    assert all(abs(total) < 1e-9 for parent, total in sums.items() if parent not in ends)


@given(tree=trees(), use_std=st.booleans(), data=st.data())
def test_the_order_of_trajectories_changes_nothing(tree, use_std, data):
    shuffled = data.draw(st.permutations(tree.trajectories))
    assert sibling_means(shuffled, use_std=use_std) == sibling_means(tree.trajectories, use_std=use_std)


@given(rewards=reward_lists)
def test_a_tree_of_leaves_alone_is_a_group(rewards):
    leaves = [chain((number,), reward) for number, reward in enumerate(rewards, start=1)]
    found = sibling_means(leaves, use_std=False)
    group = group_advantages(np.array(rewards), np.ones(len(rewards), dtype=bool), estimator="dr_grpo")
    assert list(found.values()) == pytest.approx(group, rel=1e-12, abs=1e-15)


@given(tree=trees(), use_std=st.booleans(), factor=st.integers(2, 5))
def test_drawing_every_node_as_often_again_changes_nothing(tree, use_std, factor):
    # an end counts once, however often its siblings were drawn
    assume(not {trajectory.steps[-1].node for trajectory in tree.trajectories} & set(tree.parents))
    more = {node: factor * count for node, count in tree.samples.items()}
    again = [
        chain([step.node for step in trajectory.steps], trajectory.reward, samples=more)
        for trajectory in tree.trajectories
    ]
    expected = sibling_means(tree.trajectories, use_std=use_std)
    assert sibling_means(again, use_std=use_std) == pytest.approx(expected, rel=1e-9, abs=1e-9)
