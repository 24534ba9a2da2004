"""Advantages of the thought nodes of one searched prompt."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from learners.objective.advantages import STD_EPSILON, Float64Array, group_advantages
from rlsys.trees import ENVIRONMENT
from rlsys.types import Trajectory

TreeEstimator = Literal["sibling_mean", "treerl", "treepo", "backed_up", "group"]

ROOT = 0  # number of the prompt in every tree


@dataclass(frozen=True, slots=True)
class NodeAdvantage:
    """Advantage of a node.

    Attributes:
        advantage: advantage of each of its tokens.
        draws: number of samples that its tokens stand for, > 0.
    """

    advantage: float
    draws: float


@dataclass(frozen=True, slots=True)
class _Tree:
    """Sampled chains of one tree and their rewards.

    Attributes:
        chains: nodes of every chain, without the root.
        rewards: [chains], the reward of every chain.
        through: indices of the chains through each node.
    """

    chains: list[tuple[int, ...]]
    rewards: Float64Array
    through: dict[int, list[int]]

    @property
    def inner(self) -> set[int]:
        """Nodes at which at least one chain continues."""
        return {node for chain in self.chains for node in chain[:-1]}


def tree_advantages(
    trajectories: Sequence[Trajectory], *, estimator: TreeEstimator, use_std: bool
) -> dict[int, NodeAdvantage]:
    """Compute the advantages of the nodes of a searched group, by node number.

    sibling_mean: see `_sibling_mean`, which compares a node with its siblings; draws are the node's `samples`.

    The other estimators count chains: c(s) are the sampled chains through node s, R_i is the reward of chain i, and
    draws(s) = |c(s)|. A node is trained once, with advantage * draws. Before clipping, the policy gradient equals that
    of the papers, which train every sampled chain in full.

    group:      A(s) = mean over c(s) of R_i - mean R
    treepo:     A(s) = mean over c(s) of  sum_g |g| (R_i - mean_g R) / sum_g |g|;  g: the set of all chains, and for
                each inner node of chain i the set of chains through it, if it has at least two
    treerl:     A(s) = [(V(s) - V(root)) + (V(s) - V(parent))] / sqrt|c(s)|;  V(s) = mean over c(s) of R~_i, the reward
                minus the mean of all other rewards. The division partly offsets the factor `draws`: otherwise, a node
                shared by many chains would outweigh the nodes in which they differ.
    backed_up:  A(s) = score(s) - mean (2 R - 1);  see `_backed_up`
    use_std:    A(s) / (std + 1e-6), std of all R (of 2 R - 1 for backed_up), n - 1 in the denominator

    A leaf that was drawn `samples` times counts as that many chains. A chain that ends at an inner node counts once.
    All advantages of a tree are exactly 0 if its rewards are equal or it has only one chain. (Without this rule,
    backed_up would reward the inner nodes of a tree with only wrong answers: the score tanh(q) of an inner node is
    always above the mean reward, which is -1.)

    A backtracking child exists because the verifier rejected an answer below its parent. This is a hint that the policy
    does not get when it is used. So the backtracking children of a node form a separate tree with that node as root,
    and a chain counts only in the tree of its last backtracking child. A reward that followed a hint therefore changes
    neither the value nor the baseline of nodes that were sampled without the hint. A node that lies only on chains with
    a later hint gets advantage 0 and draws 1.

    A reply of an environment is no choice of the policy: its node gets advantage 0, and its children count as those of
    the node before it.

    The tree is rebuilt from the steps of the judged trajectories, in any order. Unjudged trajectories are ignored. A
    node outside the judged trajectories has no advantage.

    Args:
        trajectories: trajectories of one searched group.
        estimator: one of the above.
        use_std: whether to divide by the standard deviation.

    Raises:
        ValueError: the reward of a judged trajectory is not finite, or an unknown estimator.

    Source: SPO, arXiv:2505.23564 (sibling_mean); TreePO, arXiv:2508.17445 and its code (weights
        "group_size"; the code also whitens over the step); TreeRL, arXiv:2506.11902; DeepSearch, arXiv:2509.25454.
    """
    whole = [trajectory for trajectory in trajectories if trajectory.judged]
    replies = {step.node: step.parent for trajectory in whole for step in trajectory.steps if step.type == ENVIRONMENT}
    judged = [_without(replies, trajectory) for trajectory in whole] if replies else whole
    rewards = [trajectory.reward for trajectory in judged]
    if not np.isfinite(rewards).all():
        raise ValueError(f"expected finite rewards from the task's verifier, found {rewards}")
    by_node = {node: NodeAdvantage(0.0, 1.0) for node in replies}
    if estimator == "sibling_mean":
        return by_node | _sibling_mean(judged, use_std)
    if estimator not in _ESTIMATES:
        raise ValueError(f"unknown estimator {estimator!r} of tree advantages")
    by_node |= {step.node: NodeAdvantage(0.0, 1.0) for trajectory in judged for step in trajectory.steps}
    for tree in _trees(judged, signed=estimator == "backed_up"):
        equal = tree.rewards.min() == tree.rewards.max()
        advantages = {} if equal else _ESTIMATES[estimator](tree)
        scale = tree.rewards.std(ddof=1) + STD_EPSILON if use_std and not equal else 1.0
        for node, chains in tree.through.items():
            by_node[node] = NodeAdvantage(float(advantages.get(node, 0.0) / scale), float(len(chains)))
    return by_node


def _without(replies: Mapping[int, int], trajectory: Trajectory) -> Trajectory:
    """Return a trajectory without its nodes of replies, which are given with their parents."""
    steps = [step for step in trajectory.steps if step.node not in replies]
    return replace(
        trajectory, steps=tuple(replace(step, parent=replies.get(step.parent, step.parent)) for step in steps)
    )


def _trees(judged: Sequence[Trajectory], *, signed: bool) -> list[_Tree]:
    """Return the tree sampled without hints, and one tree for every set of backtracking siblings."""
    inner = {step.parent for trajectory in judged for step in trajectory.steps if not step.backtrack}
    chains: dict[tuple[int, bool], list[tuple[tuple[int, ...], float]]] = defaultdict(list)
    for trajectory in judged:
        steps = trajectory.steps
        steps = steps[max((place for place, step in enumerate(steps) if step.backtrack), default=0) :]
        root = (steps[0].parent, steps[0].backtrack) if steps else (ROOT, False)
        count = steps[-1].samples if steps and steps[-1].node not in inner else 1
        reward = 2.0 * trajectory.reward - 1.0 if signed else trajectory.reward
        chains[root] += [(tuple(step.node for step in steps), reward)] * count
    return [_tree(rewarded_chains) for rewarded_chains in chains.values()]


def _tree(rewarded_chains: Sequence[tuple[tuple[int, ...], float]]) -> _Tree:
    through: dict[int, list[int]] = defaultdict(list)
    for chain, (nodes, _) in enumerate(rewarded_chains):
        for node in nodes:
            through[node].append(chain)
    rewards = np.array([reward for _, reward in rewarded_chains], dtype=np.float64)
    return _Tree([nodes for nodes, _ in rewarded_chains], rewards, dict(through))


def _means(tree: _Tree, credit: Float64Array) -> dict[int, float]:
    """Return the mean credit of the chains through every node."""
    return {node: float(credit[chains].mean()) for node, chains in tree.through.items()}


def _group(tree: _Tree) -> dict[int, float]:
    return _means(tree, tree.rewards - tree.rewards.mean())


def _treepo(tree: _Tree) -> dict[int, float]:
    rewards, inner = tree.rewards, tree.inner
    sizes = np.full(len(rewards), float(len(rewards)))
    credit = len(rewards) * (rewards - rewards.mean())
    for node, chains in tree.through.items():
        if node in inner and len(chains) > 1:
            sizes[chains] += len(chains)
            credit[chains] += len(chains) * (rewards[chains] - rewards[chains].mean())
    return _means(tree, credit / sizes)


def _treerl(tree: _Tree) -> dict[int, float]:
    all_valid = np.ones(len(tree.rewards), dtype=np.bool_)
    leave_one_out = group_advantages(tree.rewards, all_valid, estimator="rloo")
    values = _means(tree, leave_one_out)
    parents = {node: parent for chain in tree.chains for parent, node in itertools.pairwise(chain)}
    advantages = {}
    for node, chains in tree.through.items():
        parent = values[parents[node]] if node in parents else 0.0  # R~ sums to 0, so V(root) = 0
        advantages[node] = (2.0 * values[node] - parent) / math.sqrt(len(chains))
    return advantages


def _backed_up(tree: _Tree) -> dict[int, float]:
    """Return the scores that DeepSearch backs up, minus the mean reward.

    w = max((i + 1) / (l + 1), 0.1) r   for the i-th of the l nodes of a chain with reward r in [-1, 1]
    q = sum of the positive w of a node; if it has none, sum of all w
    score = r at a leaf, tanh(q) elsewhere

    This q equals that of backing up the chains one by one, in any order: w is added to a q of the same sign, replaces q
    if q < 0 < w, and is dropped if w < 0 < q. The temperature and the bound of tanh are 1, as in the authors' code.
    """
    shares: dict[int, list[float]] = defaultdict(list)
    for chain, reward in zip(tree.chains, tree.rewards.tolist(), strict=True):
        for place, node in enumerate(chain, start=1):
            shares[node].append(max((place + 1) / (len(chain) + 1), 0.1) * reward)
    scores = _means(tree, tree.rewards)
    for node in tree.inner:
        scores[node] = math.tanh(math.fsum([share for share in shares[node] if share > 0.0] or shares[node]))
    baseline = float(tree.rewards.mean())
    return {node: score - baseline for node, score in scores.items()}


_ESTIMATES: dict[TreeEstimator, Callable[[_Tree], dict[int, float]]] = {
    "group": _group,
    "treepo": _treepo,
    "treerl": _treerl,
    "backed_up": _backed_up,
}


def _sibling_mean(judged: Sequence[Trajectory], use_std: bool) -> dict[int, NodeAdvantage]:
    """Compute the advantage of each node's value over the mean of its siblings.

    V(n)   = sum_c s_c V(c) / sum_c s_c                      over the children c of n, s_c their `samples`
    std(n) = sqrt( sum_c s_c (V(c) - V(n))^2 / sum_c s_c )   ddof 0
    A(c)   = (V(c) - V(n)) / (std(n) + 1e-6)                 use_std
    A(c)   = V(c) - V(n)                                     otherwise

    The end of a trajectory counts as an additional child of its last node: it has no tokens, was drawn once, and its
    value is the reward. So the value of a leaf is its reward, and the value of a node at which only some trajectories
    end averages over ends and children. A branch counts as often as it was drawn, not as often as it was visited,
    because the search chooses its visits. Advantages weighted by samples sum to 0 over the children of a node, ends
    included. They are exactly 0 if all values are equal or there is only one child.

    Backtracking children are siblings only of one another. They exist because the verifier rejected an answer below n,
    a hint that the policy does not have, so their values do not count in V(n). V(n) is their mean only if n has no
    other child on a judged trajectory.

    Nodes outside the trajectories are unknown here. With node expansion, this includes a child from which the search
    never continued, but not a child that failed at once.
    """
    steps = {step.node: step for trajectory in judged for step in trajectory.steps}
    branches: dict[tuple[int, bool], list[tuple[int, float]]] = defaultdict(list)
    for trajectory in judged:
        branches[trajectory.steps[-1].node if trajectory.steps else ROOT, False].append((1, trajectory.reward))
    means: dict[tuple[int, bool], float] = {}
    scales: dict[tuple[int, bool], float] = {}
    values: dict[int, float] = {}
    # Parents have smaller numbers than their children, so in this order a node's branches are complete.
    for node in sorted({ROOT, *steps} if judged else (), reverse=True):
        for backtrack in (True, False):
            siblings = node, backtrack
            if branches[siblings]:
                values[node] = means[siblings] = _weighted_mean(branches[siblings])
                deviation = _weighted_std(branches[siblings], means[siblings]) + STD_EPSILON
                scales[siblings] = deviation if use_std else 1.0
        if node in steps:
            step = steps[node]
            branches[step.parent, step.backtrack].append((step.samples, values[node]))
    advantages = {}
    for node, step in steps.items():
        siblings = step.parent, step.backtrack
        advantages[node] = NodeAdvantage((values[node] - means[siblings]) / scales[siblings], float(step.samples))
    return advantages


def _weighted_mean(branches: Sequence[tuple[int, float]]) -> float:
    """Return the weighted mean of (weight, value) pairs. It is independent of order, and exact for equal values."""
    values = [value for _, value in branches]
    if min(values) == max(values):
        return values[0]
    return math.fsum(weight * value for weight, value in branches) / sum(weight for weight, _ in branches)


def _weighted_std(branches: Sequence[tuple[int, float]], mean: float) -> float:
    squares = math.fsum(weight * (value - mean) ** 2 for weight, value in branches)
    return math.sqrt(squares / sum(weight for weight, _ in branches))
