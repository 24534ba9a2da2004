"""Distributions and examples of a training step, for TensorBoard."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from rlsys.directory import SearchDirectory
from rlsys.run.judgements import by_reward, group_facts, group_rewards, heading, judgement, own_logprobs, reward_of
from rlsys.search.outline import code_block, outline, outline_group
from rlsys.search.tree_index import shards
from rlsys.search.tree_json import read_trees
from rlsys.trees import Tree
from rlsys.types import Int32Array, TrajectoryGroup

Decode = Callable[[Int32Array], str]
EXAMPLE_INTERVAL = 10  # training steps between two examples
_LONGEST = 6000  # characters of one example


def histograms(groups: Sequence[TrajectoryGroup]) -> Mapping[str, np.ndarray]:
    """Return the distributions of a step's sampled trajectories, by names of rlsys.run.metrics.HISTOGRAMS."""
    sampled = [group for group in groups if not group.searched]
    trajectories = [trajectory for group in sampled for trajectory in group.trajectories]
    rewards = [group_rewards(group) for group in sampled]
    return {
        "rollout/completion_lengths": np.array([t.completion_length for t in trajectories], dtype=float),
        "rollout/rewards": np.array([reward for row in rewards for reward in row]),
        "rollout/group_rewards": np.array([np.mean(row) for row in rewards if row]),
    }


def examples(groups: Sequence[TrajectoryGroup], decode: Decode) -> Mapping[str, str]:
    """Return texts about a step as Markdown, by names of rlsys.run.metrics.TEXTS.

    The examples are the best and the worst trajectory of the first group whose rewards differ, or a trajectory of the
    first group, and the first searched group with a right answer, or the first one.
    """
    sampled = [group for group in groups if not group.searched and group.trajectories]
    searched = [group for group in groups if group.searched and group.trajectories]
    texts = {}
    if sampled:
        chosen = next((g for g in sampled if len(set(group_rewards(g))) > 1), sampled[0])
        texts["rollout/samples"] = _samples(chosen, decode)
    if searched:
        solved = next((group for group in searched if group.metrics.get("solved")), searched[0])
        texts["search/tree"] = _cut(outline_group(solved, decode))
    return texts


def tree_example(directory: SearchDirectory) -> Mapping[str, str]:
    """Return the first solved tree of a search's first file, or its first tree, as Markdown."""
    paths = shards(directory.trees)
    trees = [tree for tree in read_trees(paths[0]) if isinstance(tree, Tree)] if paths else []
    tree = next((tree for tree in trees if tree.solved), trees[0] if trees else None)
    return {"search/tree": _cut(outline(tree))} if tree else {}


def _samples(group: TrajectoryGroup, decode: Decode) -> str:
    judged = by_reward((t for t in group.trajectories if t.judged), "best", reward_of)
    shown = [judged[0], judged[-1]] if judged and judged[0].reward != judged[-1].reward else group.trajectories[:1]
    prompt = decode(group.prompt.token_ids)
    parts = [f"**prompt** {group.prompt.prompt_id}, reference `{group.prompt.answer}`", code_block(prompt)]
    for trajectory in shown:
        completion = decode(trajectory.token_ids[len(group.prompt.token_ids) :])
        row = {**group_facts(group), **judgement(trajectory), "logprobs": own_logprobs(trajectory)}
        parts += [f"**{heading(row)}**", code_block(_cut(completion))]
    return "\n\n".join(parts)


def _cut(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]} ... ({len(text) - _LONGEST:,} characters more)"
