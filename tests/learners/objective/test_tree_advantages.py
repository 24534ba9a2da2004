"""Advantages of tree nodes against hand-made numbers."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from tree_chains import BY_CHAINS, EVERY, chain, estimate, sibling_means

from learners.objective.tree_advantages import NodeAdvantage, tree_advantages
from rlsys.trees import ENVIRONMENT


def test_a_tree_by_hand():
    # 0 -> 1 (drawn 3 times) -> 3 (right), 4 (wrong, drawn twice);  0 -> 2 -> 5 (right)
    # V(1) = (1 * 1 + 2 * 0) / 3 = 1/3;  V(2) = V(5) = 1;  V(0) = (3 * 1/3 + 1 * 1) / 4 = 1/2
    tree = [chain(nodes, reward, samples={1: 3, 4: 2}) for nodes, reward in (((1, 3), 1), ((1, 4), 0), ((2, 5), 1))]
    expected = {1: 1 / 3 - 1 / 2, 2: 1 / 2, 3: 2 / 3, 4: -1 / 3, 5: 0.0}
    assert sibling_means(tree, use_std=False) == pytest.approx(expected, rel=1e-12)
    # below 0: sqrt((3 (1/6)^2 + (1/2)^2) / 4) = sqrt(1/12); below 1: sqrt(((2/3)^2 + 2 (1/3)^2) / 3) = sqrt(2/9)
    top, bottom = math.sqrt(1 / 12) + 1e-6, math.sqrt(2 / 9) + 1e-6
    divided = {1: -1 / 6 / top, 2: 1 / 2 / top, 3: 2 / 3 / bottom, 4: -1 / 3 / bottom, 5: 0.0}
    estimates = sibling_means(tree, use_std=True)
    assert estimates == pytest.approx(divided, rel=1e-12)
    assert estimates[5] == 0.0


def test_a_node_counts_as_often_as_it_was_drawn():
    tree = [chain((1, 3), 1, samples={1: 3}), chain((2,), 0, samples={2: 2})]
    # V(0) = (3 * 1 + 2 * 0) / 5
    estimates = tree_advantages(tree, estimator="sibling_mean", use_std=False)
    assert estimates == {1: NodeAdvantage(1 - 3 / 5, 3.0), 2: NodeAdvantage(-3 / 5, 2.0), 3: NodeAdvantage(0.0, 1.0)}


def test_a_mean_of_means_is_not_a_mean_of_leaves():
    # node 1 has three right leaves, node 2 one wrong one: V(0) = 1/2, where a mean over the leaves is 3/4
    tree = [chain((1, 3), 1), chain((1, 4), 1), chain((1, 5), 1), chain((2, 6), 0)]
    estimates = sibling_means(tree, use_std=False)
    assert (estimates[1], estimates[2]) == (0.5, -0.5)


def test_the_end_of_a_trajectory_is_one_more_child_of_its_last_node():
    # 1 ends wrong and goes on to 2, drawn twice and right: V(1) = (2 * 1 + 0) / 3
    tree = [chain((1,), 0), chain((1, 2), 1, samples={2: 2}), chain((3,), 0)]
    estimates = sibling_means(tree, use_std=False)
    assert estimates == pytest.approx({1: 1 / 3, 2: 1 / 3, 3: -1 / 3}, rel=1e-12)


def test_backtracking_children_do_not_count_for_their_parent():
    # 0 -> 1 -> 2 (wrong), 3 (backtracking) -> 4 (right), 5 (wrong);  0 -> 6 (right).
    # V(3) = 1/2 does not count above it: V(1) = V(2) = 0, V(0) = 1/2; 3 has no backtracking sibling.
    tree = [chain(nodes, reward, backtracks=[3]) for nodes, reward in (((1, 2), 0), ((1, 3, 4), 1), ((1, 3, 5), 0))]
    estimates = sibling_means([*tree, chain((6,), 1)], use_std=False)
    assert estimates == {1: -0.5, 2: 0.0, 3: 0.0, 4: 0.5, 5: -0.5, 6: 0.5}
    # Two backtracking children are compared with each other: V = 1/2 and 0, mean 1/4.
    tree = [*tree, chain((1, 7), 0, backtracks=[7])]
    estimates = sibling_means([*tree, chain((6,), 1)], use_std=False)
    assert (estimates[3], estimates[7], estimates[1]) == (0.25, -0.25, -0.5)
    # Without any other child, V(1) is their mean.
    only = [chain((1, 3), 1, backtracks=[3]), chain((6,), 0)]
    assert sibling_means(only, use_std=False) == {1: 0.5, 3: 0.0, 6: -0.5}


# 0 -> 1 -> 3 (right), 4 (wrong, drawn twice);  0 -> 2 -> 5 (right).
# Four chains, 1 0 0 1, mean 1/2; three of them through 1, two of these through 4.
SMALL = [chain(nodes, reward, samples={1: 3, 4: 2}) for nodes, reward in (((1, 3), 1), ((1, 4), 0), ((2, 5), 1))]
SMALL_DRAWS = {1: 3, 2: 1, 3: 1, 4: 2, 5: 1}
# 0 -> 1 -> 2 (wrong), and two backtracking children of 1: 3 -> 4 (right), 5 (wrong); 7 (wrong).  0 -> 6 (right).
# Without a hint: chains 1-2 and 6, rewards 0 1, mean 1/2. After the hint: 3-4, 3-5, 7, rewards 1 0 0, mean 1/3.
HINTED = [
    chain(nodes, reward, backtracks=[3, 7])
    for nodes, reward in (((1, 2), 0), ((1, 3, 4), 1), ((1, 3, 5), 0), ((1, 7), 0), ((6,), 1))
]
HINTED_DRAWS = {1: 1, 2: 1, 3: 2, 4: 1, 5: 1, 6: 1, 7: 1}


def assert_tree(trajectories, estimator, expected, draws, *, std):
    estimates, counts = estimate(trajectories, estimator)
    assert estimates == pytest.approx(expected, rel=1e-12)
    assert counts == draws
    divided, counts = estimate(trajectories, estimator, use_std=True)
    assert divided == pytest.approx({node: advantage / (std[node] + 1e-6) for node, advantage in expected.items()})
    assert counts == draws


# All rewards of SMALL: squared deviations 4 (1/2)^2 over n - 1 = 3.
# HINTED without a hint: 2 (1/2)^2 over 1; after it: (2/3)^2 + 2 (1/3)^2 = 2/3 over 2.
SMALL_STD = dict.fromkeys(SMALL_DRAWS, math.sqrt(1 / 3))
HINTED_STD = {node: math.sqrt(1 / 2) if node in (1, 2, 6) else math.sqrt(1 / 3) for node in HINTED_DRAWS}


def test_group_by_hand():
    # chains 1/2, -1/2, -1/2, 1/2; node 1: (1/2 - 1/2 - 1/2) / 3
    expected = {1: -1 / 6, 2: 1 / 2, 3: 1 / 2, 4: -1 / 2, 5: 1 / 2}
    assert_tree(SMALL, "group", expected, SMALL_DRAWS, std=SMALL_STD)
    # chains 3-4, 3-5, 7: 2/3, -1/3, -1/3; node 3: (2/3 - 1/3) / 2
    expected = {1: -1 / 2, 2: -1 / 2, 6: 1 / 2, 3: 1 / 6, 4: 2 / 3, 5: -1 / 3, 7: -1 / 3}
    assert_tree(HINTED, "group", expected, HINTED_DRAWS, std=HINTED_STD)


def test_treepo_by_hand():
    # Groups: all 4, and the 3 through node 1, mean 1/3; node 2 has one chain, and nothing goes on from 4.
    # 1-3: (4 * 1/2 + 3 * 2/3) / 7 = 4/7;  1-4: (4 * -1/2 + 3 * -1/3) / 7 = -3/7;  2-5: 1/2
    # node 1: (4/7 - 2 * 3/7) / 3
    expected = {1: -2 / 21, 2: 1 / 2, 3: 4 / 7, 4: -3 / 7, 5: 1 / 2}
    assert_tree(SMALL, "treepo", expected, SMALL_DRAWS, std=SMALL_STD)
    # After the hint: all 3, and the 2 through node 3, mean 1/2.
    # 3-4: (3 * 2/3 + 2 * 1/2) / 5 = 3/5;  3-5: (3 * -1/3 + 2 * -1/2) / 5 = -2/5;  7: -1/3;  node 3: (3/5 - 2/5) / 2
    expected = {1: -1 / 2, 2: -1 / 2, 6: 1 / 2, 3: 1 / 10, 4: 3 / 5, 5: -2 / 5, 7: -1 / 3}
    assert_tree(HINTED, "treepo", expected, HINTED_DRAWS, std=HINTED_STD)


def test_treerl_by_hand():
    # R~ of right and wrong: 1 - 1/3 = 2/3, 0 - 2/3 = -2/3.  V(1) = (2/3 - 2 * 2/3) / 3 = -2/9, V(2) = 2/3, V(3) = 2/3,
    # V(4) = -2/3, V(5) = 2/3, V(0) = 0.  A(1) = -2 * 2/9 / sqrt 3;  A(2) = 2 * 2/3;  A(3) = 2/3 + (2/3 + 2/9);
    # A(4) = (-2/3 + (-2/3 + 2/9)) / sqrt 2;  A(5) = 2/3 + 0
    expected = {1: -4 / 9 / math.sqrt(3), 2: 4 / 3, 3: 14 / 9, 4: -10 / 9 / math.sqrt(2), 5: 2 / 3}
    assert_tree(SMALL, "treerl", expected, SMALL_DRAWS, std=SMALL_STD)
    # Without a hint R~ = -1, 1: A(1) = -1 - 1, A(2) = -1 + 0, A(6) = 1 + 1.
    # After it R~ = 1, -1/2, -1/2: V(3) = 1/4; A(3) = 2/4 / sqrt 2, A(4) = 1 + 3/4, A(5) = -1/2 - 3/4, A(7) = -1.
    expected = {1: -2.0, 2: -1.0, 6: 2.0, 3: 1 / 2 / math.sqrt(2), 4: 7 / 4, 5: -5 / 4, 7: -1.0}
    assert_tree(HINTED, "treerl", expected, HINTED_DRAWS, std=HINTED_STD)


def test_backed_up_by_hand():
    # Rewards 1 -1 -1 1, mean 0. Node 1 of two: w = 2/3 of the right chain, which outlives the wrong ones. Leaves +-1.
    expected = {1: math.tanh(2 / 3), 2: math.tanh(2 / 3), 3: 1.0, 4: -1.0, 5: 1.0}
    doubled = {node: 2 * std for node, std in SMALL_STD.items()}  # 2 R - 1 is twice as wide as R
    assert_tree(SMALL, "backed_up", expected, SMALL_DRAWS, std=doubled)
    # Without a hint: mean 0, and only wrong chains through 1. After it: mean -1/3.
    after = {3: math.tanh(2 / 3) + 1 / 3, 4: 4 / 3, 5: -2 / 3, 7: -2 / 3}
    doubled = {node: 2 * std for node, std in HINTED_STD.items()}
    assert_tree(HINTED, "backed_up", {1: -math.tanh(2 / 3), 2: -1.0, 6: 1.0, **after}, HINTED_DRAWS, std=doubled)


def test_backed_up_shares_add_up_and_never_fall_below_a_tenth():
    # Right chains 1-2-leaf, one of the three drawn twice: w = 2/4 and 3/4 each; mean of 2 R - 1 is (4 - 1) / 5.
    tree = [chain((1, 2, 3), 1), chain((1, 2, 4), 1, samples={4: 2}), chain((1, 2, 5), 1), chain((6,), 0)]
    estimates, _ = estimate(tree, "backed_up")
    assert estimates[1] == pytest.approx(math.tanh(4 * 2 / 4) - 3 / 5, rel=1e-12)
    assert estimates[2] == pytest.approx(math.tanh(4 * 3 / 4) - 3 / 5, rel=1e-12)
    assert estimates[4] == pytest.approx(1 - 3 / 5, rel=1e-12)
    # Node 1 of 39: 2/40 is below a tenth; node 3: 4/40 is a tenth; node 4 is above it. A wrong chain: mean 0 with 40.
    estimates, _ = estimate([chain(range(1, 40), 0), chain((40,), 1)], "backed_up")
    assert [estimates[n] for n in (1, 3, 4)] == pytest.approx([math.tanh(-w) for w in (0.1, 0.1, 5 / 40)], rel=1e-12)


def test_results_of_a_second_hint_do_not_count_for_the_first():
    # 0 -> 1 (wrong), hint: 2 -> 3 (wrong), 4 (right); below 2 a second hint: 5 (right), 6 (wrong)
    tree = [((1,), 0), ((2, 3), 0), ((2, 4), 1), ((2, 5), 1), ((2, 6), 0)]
    estimates, draws = estimate([chain(nodes, reward, backtracks=[2, 5, 6]) for nodes, reward in tree], "group")
    assert estimates == {1: 0.0, 2: 0.0, 3: -0.5, 4: 0.5, 5: 0.5, 6: -0.5}
    assert draws == {1: 1, 2: 2, 3: 1, 4: 1, 5: 1, 6: 1}


@pytest.mark.parametrize("estimator", BY_CHAINS)
def test_hints_below_different_nodes_are_not_compared(estimator):
    # below 1 and below 2 one answer is wrong and one hinted chain follows: right there, wrong here
    tree = [((1, 3), 0), ((1, 4), 1), ((2, 5), 0), ((2, 6), 0)]
    estimates, _ = estimate([chain(nodes, reward, backtracks=[4, 6]) for nodes, reward in tree], estimator)
    assert estimates == dict.fromkeys(range(1, 7), 0.0)


@pytest.mark.parametrize("estimator", BY_CHAINS)
def test_chains_with_a_hint_do_not_count_for_nodes_before_it(estimator):
    # Only nodes after the hint are compared; node 1 is only on chains with a hint.
    tree = [chain((1, 3), 1, backtracks=[3]), chain((1, 4), 0, backtracks=[4]), chain((6,), 1)]
    estimates, draws = estimate(tree, estimator)
    assert estimates[1] == estimates[6] == 0.0 and estimates[3] == -estimates[4] > 0
    assert draws == dict.fromkeys((1, 3, 4, 6), 1.0)


@pytest.mark.parametrize("use_std", [True, False])
@pytest.mark.parametrize("estimator", BY_CHAINS)
def test_a_wrong_answer_with_a_hint_below_it_still_counts_as_often_as_it_was_drawn(estimator, use_std):
    plain = [chain((1,), 0, samples={1: 3}), chain((2,), 1)]
    hinted = [*plain, chain((1, 3), 1, samples={1: 3}, backtracks=[3])]
    estimates = tree_advantages(hinted, estimator=estimator, use_std=use_std)
    assert estimates.pop(3) == NodeAdvantage(0.0, 1.0)
    assert estimates == tree_advantages(plain, estimator=estimator, use_std=use_std)


@pytest.mark.parametrize("estimator", EVERY)
def test_unjudged_trajectories_count_nowhere(estimator):
    judged = [chain((1, 2), 1), chain((1, 3), 0)]
    spoiled = [*judged, chain((1, 4), math.nan, "error"), chain((5,), 99.0, "timeout")]
    expected = tree_advantages(judged, estimator=estimator, use_std=True)
    assert tree_advantages(spoiled, estimator=estimator, use_std=True) == expected
    assert tree_advantages(spoiled[2:], estimator=estimator, use_std=True) == {}
    assert tree_advantages([], estimator=estimator, use_std=True) == {}


@pytest.mark.parametrize("estimator", BY_CHAINS)
def test_a_chain_without_nodes_is_part_of_the_baseline(estimator):
    # two right chains against one wrong one that has no thoughts
    estimates, draws = estimate([chain((1,), 1), chain((2,), 1), chain((), 0)], estimator)
    assert set(estimates) == {1, 2} and estimates[1] == estimates[2] > 0 and draws == {1: 1, 2: 1}


@pytest.mark.parametrize("use_std", [True, False])
@pytest.mark.parametrize("estimator", EVERY)
def test_equal_rewards_and_lone_chains_are_exactly_zero(estimator, use_std):
    # three times 0.1 has a mean above 0.1, and 0.1 weighted 3 to 7 one below it
    tree = [chain((1, 2), 0.1), chain((1, 3), 0.1), chain((1, 4), 0.1), chain((5,), 0.1, samples={5: 7})]
    assert estimate(tree, estimator, use_std=use_std)[0] == dict.fromkeys(range(1, 6), 0.0)
    wrong = [chain((1, 2), 0), chain((1, 3), 0), chain((4, 5), 0)]
    assert estimate(wrong, estimator, use_std=use_std)[0] == dict.fromkeys(range(1, 6), 0.0)
    assert estimate([chain((1, 2), 1)], estimator, use_std=use_std)[0] == {1: 0.0, 2: 0.0}


@pytest.mark.parametrize("estimator", EVERY)
def test_bad_input_is_refused(estimator):
    with pytest.raises(ValueError, match="finite rewards"):
        tree_advantages([chain((1,), math.inf)], estimator=estimator, use_std=True)
    with pytest.raises(ValueError, match="unknown estimator 'median'"):
        tree_advantages([], estimator="median", use_std=False)


@pytest.mark.parametrize("estimator", EVERY)
def test_a_reply_of_an_environment_changes_no_advantage(estimator):
    # 1 ends a turn; 7 is the reply to it, and 2 and 3 follow. Without 7 they would be the children of 1.
    def with_reply(trajectory):
        steps = [replace(step, parent=7) if step.node in (2, 3) else step for step in trajectory.steps]
        reply = replace(trajectory.steps[0], node=7, parent=1, type=ENVIRONMENT)
        return replace(trajectory, steps=(steps[0], reply, *steps[1:]))

    inside = [chain((1, 2, 4), 1), chain((1, 2, 5), 0), chain((1, 3), 0, samples={3: 2})]
    others = [chain((6,), 1), chain((8, 9), 0)]
    plain = tree_advantages([*inside, *others], estimator=estimator, use_std=True)
    played = tree_advantages([*map(with_reply, inside), *others], estimator=estimator, use_std=True)
    assert played.pop(7) == NodeAdvantage(0.0, 1.0)
    assert played == plain and any(node.advantage for node in plain.values())
