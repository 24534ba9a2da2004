"""Advantages of the thought nodes of one searched prompt: how much better than its siblings each one was."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from learners.advantages import STD_EPSILON
from rlsys.types import Trajectory

TreeEstimator = Literal["sibling_mean"]

ROOT = 0  # the prompt's number in every tree


@dataclass(frozen=True, slots=True)
class NodeAdvantage:
    """advantage: of every token of the node. draws: how often these tokens count, > 0."""

    advantage: float
    draws: float


def tree_advantages(
    trajectories: Sequence[Trajectory], *, estimator: TreeEstimator, use_std: bool
) -> dict[int, NodeAdvantage]:
    """Sibling-mean advantages of the nodes of a searched group, by node number.

    V(n)   = sum_c s_c V(c) / sum_c s_c                      over the children c of n, s_c their `samples`
    std(n) = sqrt( sum_c s_c (V(c) - V(n))^2 / sum_c s_c )   ddof 0
    A(c)   = (V(c) - V(n)) / (std(n) + 1e-6)                 use_std
    A(c)   = V(c) - V(n)                                     otherwise

    The tree is rebuilt from the steps of the judged trajectories; a node that none of them holds has no advantage.
    The end of a trajectory is one more child of its last node: without tokens, drawn once, its value the reward.
    So a leaf has the value of its reward, and a node at which one trajectory ends and others go on averages over
    both. A branch counts as often as it was drawn, not as often as it was visited, since the search itself chooses
    what it visits. Advantages weighted by samples sum to 0 over the children of a node, ends included; they are
    exactly 0 where these are equal or there is only one. The order of the trajectories changes nothing.

    Backtracking children are siblings of one another only: they are there because the verifier found an answer below
    n wrong, a hint that the policy never gets, so what they are worth is no merit of n. V(n) is their mean only where
    n has no other child on a judged trajectory.

    What no trajectory holds is unknown here: with node expansion a child that failed at once counts, and one that the
    search never went on from does not.

    Raises:
        ValueError: the reward of a judged trajectory is not finite.

    Source: SPO, arXiv:2505.23564, tree form: the mean of means is its value, use_std its normalised advantage.
    """
    if estimator != "sibling_mean":
        raise ValueError(f"unknown estimator {estimator!r} of tree advantages")
    judged = [trajectory for trajectory in trajectories if trajectory.judged]
    rewards = [trajectory.reward for trajectory in judged]
    if not np.isfinite(rewards).all():
        raise ValueError(f"expected finite rewards from the task's verifier, found {rewards}")
    steps = {step.node: step for trajectory in judged for step in trajectory.steps}
    branches: dict[tuple[int, bool], list[tuple[int, float]]] = defaultdict(list)
    for trajectory in judged:
        branches[trajectory.steps[-1].node if trajectory.steps else ROOT, False].append((1, trajectory.reward))
    means: dict[tuple[int, bool], float] = {}
    scales: dict[tuple[int, bool], float] = {}
    values: dict[int, float] = {}
    # Parents have smaller numbers than their children, so a node's branches are complete when its turn comes.
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
    found = {}
    for node, step in steps.items():
        siblings = step.parent, step.backtrack
        found[node] = NodeAdvantage((values[node] - means[siblings]) / scales[siblings], float(step.samples))
    return found


def _weighted_mean(branches: Sequence[tuple[int, float]]) -> float:
    """Of (weight, value); exactly the value where all are equal, and the same in any order."""
    found = [value for _, value in branches]
    if min(found) == max(found):
        return found[0]
    return math.fsum(weight * value for weight, value in branches) / sum(weight for weight, _ in branches)


def _weighted_std(branches: Sequence[tuple[int, float]], mean: float) -> float:
    squares = math.fsum(weight * (value - mean) ** 2 for weight, value in branches)
    return math.sqrt(squares / sum(weight for weight, _ in branches))
