"""Advantages of the completions of one prompt: how much better than its siblings each one was."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from rlsys.types import BoolArray, Trajectory

Float64Array = NDArray[np.float64]

STD_EPSILON = 1e-6
ROOT = 0  # the prompt's number in every tree


def group_advantages(rewards: Float64Array, valid: BoolArray, *, use_std: bool) -> Float64Array:
    """Group-relative advantages.

    mean = (1/n) sum_i R_i;   std = sqrt( sum_i (R_i - mean)^2 / (n - 1) ),  i over the n valid entries
    A_i  = (R_i - mean) / (std + 1e-6)      use_std (GRPO)
    A_i  = R_i - mean                       otherwise (Dr.GRPO; times n / (n - 1) it is RLOO)

    The advantages of a group sum to 0. They are exactly 0 where there is nothing to compare: all valid
    rewards are equal (rounding in the mean must not become a signal that 1 / std blows up), or fewer than
    two are valid. Entries that are not valid get 0 and touch nothing else; even a NaN there is ignored.

    Args:
        rewards: [G], one reward a completion.
        valid: [G], True where the verifier returned a verdict (outcome "ok" or "wrong").
        use_std: divide by the sample standard deviation (n - 1 in the denominator, as verl and trl do).

    Returns:
        [G] float64.

    Raises:
        ValueError: shapes differ, or a valid reward is not finite.

    Source: GRPO, arXiv:2402.03300, sec. 4.1.2; Dr.GRPO, arXiv:2503.20783, sec. 3.2.
    """
    if rewards.ndim != 1 or rewards.shape != valid.shape:
        raise ValueError(f"expected rewards and valid of one shape [G], found {rewards.shape} and {valid.shape}")
    advantages = np.zeros(rewards.shape, dtype=np.float64)
    kept = rewards[valid].astype(np.float64)
    if not np.isfinite(kept).all():
        raise ValueError(f"expected finite rewards from the task's verifier, found {kept.tolist()}")
    if len(kept) < 2 or kept.min() == kept.max():
        return advantages
    centred = kept - kept.mean()
    advantages[valid] = centred / (kept.std(ddof=1) + STD_EPSILON) if use_std else centred
    return advantages


def tree_advantages(trajectories: Sequence[Trajectory], *, use_std: bool) -> dict[int, float]:
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
        found[node] = (values[node] - means[siblings]) / scales[siblings]
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
