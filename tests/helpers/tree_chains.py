"""Trajectories through the nodes of small trees, and their advantages by node."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st

from learners.objective.advantages import group_advantages
from learners.objective.tree_advantages import TreeEstimator, tree_advantages
from rlsys.types import Outcome, Step, Trajectory

reward_lists = st.lists(st.integers(-8, 8).map(lambda n: n / 4), min_size=2, max_size=16)

few = settings(max_examples=25, deadline=None)
BY_CHAINS: tuple[TreeEstimator, ...] = ("group", "treepo", "treerl", "backed_up")
EVERY: tuple[TreeEstimator, ...] = ("sibling_mean", *BY_CHAINS)


def estimate(
    trajectories: Sequence[Trajectory], estimator: TreeEstimator, *, use_std: bool = False
) -> tuple[dict[int, float], dict[int, float]]:
    """Return advantages and draws by node."""
    estimates = tree_advantages(trajectories, estimator=estimator, use_std=use_std)
    return {n: entry.advantage for n, entry in estimates.items()}, {n: entry.draws for n, entry in estimates.items()}


def flat_group(rewards: Sequence[float], *, use_std: bool) -> np.ndarray:
    everything = np.ones(len(rewards), dtype=bool)
    return group_advantages(np.array(rewards), everything, estimator="grpo" if use_std else "dr_grpo")


def sibling_means(trajectories: Sequence[Trajectory], *, use_std: bool) -> dict[int, float]:
    return estimate(trajectories, "sibling_mean", use_std=use_std)[0]


def chain(
    nodes: Sequence[int],
    reward: float,
    outcome: Outcome = "ok",
    samples: Mapping[int, int] | None = None,
    backtracks: Sequence[int] = (),
) -> Trajectory:
    """Return a trajectory through nodes of one token each."""
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
