"""Conversion of a searched tree to the group of trajectories, pairs and demonstrations for training."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping

from rlsys.config.search import ExtractConfig
from rlsys.search.extract import Codec, preference_pairs, step_preferences
from rlsys.search.paths import path_tokens
from rlsys.search.supervised import supervised_rows
from rlsys.trees import ENDED_BY_VALUE, ENDINGS, ENVIRONMENT, ThoughtNode, Tree
from rlsys.types import FinishReason, Prompt, RolloutFailure, Step, Trajectory, TrajectoryGroup, Verdict

log = logging.getLogger(__name__)


def build_searched_group(
    tree: Tree, prompt: Prompt, codec: Codec, extract: ExtractConfig
) -> TrajectoryGroup | RolloutFailure:
    """Return the trajectories, preference pairs and demonstrations of a tree.

    There is one trajectory for every scored answer and for every chain that the policy itself ended without an answer.
    The latter have the verdict on their completion or episode, or reward 0 if the search has ended them. Trajectories
    have the order of their last nodes in the tree. If the policy chose no token of any trajectory, as in a tree that
    another model proposed, the group has pairs and demonstrations only.

    Args:
        codec: Codec of the policy.
        extract: Selection of the pairs and the demonstration.

    Returns:
        The group, or a failure if there is no trajectory and no answer was scored. A tree that another model proposed
        and whose answers are all wrong is not a failure.
    """
    _log_failed_verifications(tree)
    ends = [(n, verdict) for n, node in enumerate(tree.nodes) if (verdict := _verdict(node))]
    trajectories = tuple(_trajectory(tree, n, verdict, codec) for n, verdict in ends)
    if not any(trajectory.loss_mask.any() for trajectory in trajectories):
        trajectories = ()
    metrics = search_metrics(tree)
    if not trajectories and not metrics["scored"]:
        reason = f"no chain of the tree was judged or ended: {_events(tree)}"
        return RolloutFailure(prompt=prompt, reason=reason, tokens=tree.tokens)
    return TrajectoryGroup(
        prompt=prompt,
        trajectories=trajectories,
        searched=True,
        pairs=tuple(preference_pairs(tree, extract, codec)),
        step_preferences=tuple(step_preferences(tree, extract, codec)),
        demonstrations=tuple(row.demonstration for row in supervised_rows(tree, extract, codec)),
        metrics=metrics,
    )


def search_metrics(tree: Tree) -> Mapping[str, float]:
    """Return counts of one tree by name, and `reward_sum`, the sum of the rewards of its scored answers."""
    nodes = tree.nodes[1:]
    rewards = [node.verdict.reward for node in nodes if node.verdict and node.scored >= 0]
    figures = {
        "simulations": tree.simulations,
        "calls": tree.calls,
        "tokens": tree.tokens,
        "scored": len(rewards),
        "reward_sum": sum(rewards),
        "correct": sum(node.correct for node in nodes),
        "solved": tree.solved,
        "defects": sum(node.defect is not None for node in nodes),
        "duplicates": sum(node.samples - 1 for node in nodes),
        "backtracks": sum(node.backtrack for node in nodes),
        "verifier_errors": len(list(_failed_verifications(tree))),
        "replies": sum(node.type == ENVIRONMENT for node in nodes),
        "environment_errors": tree.counts.get("environment_error", 0) + tree.counts.get("environment_timeout", 0),
        "values": tree.counts.get("values", 0),
        "value_errors": tree.failed_values,
    }
    return {name: float(value) for name, value in figures.items()}


def _verdict(node: ThoughtNode) -> Verdict | None:
    """Return the verdict on the trajectory that ends at a node; None if no trajectory ends there."""
    if node.scored >= 0:
        return node.verdict
    if node.defect in ENDINGS and node.writer == "policy":
        verdict = node.verdict or Verdict(outcome="wrong", reward=0.0, answered=False, detail=node.defect)
        return verdict if verdict.outcome in ("ok", "wrong") else None
    return None


def _trajectory(tree: Tree, number: int, verdict: Verdict, codec: Codec) -> Trajectory:
    path = path_tokens(tree, number, codec)
    return Trajectory(
        token_ids=path.token_ids,
        loss_mask=path.chosen,
        behavior_logprobs=path.logprobs,
        versions=path.versions,
        finish_reason=_finish_reason(tree.nodes[number]),
        reward=verdict.reward,
        outcome=verdict.outcome,
        answered=verdict.answered,
        detail=verdict.detail,
        parts=verdict.parts,
        steps=tuple(_step(n, start, stop, tree.nodes[n]) for n, start, stop in path.spans),
    )


def _finish_reason(node: ThoughtNode) -> FinishReason:
    """Return why a chain ended. For a whole node it is "stop" or "turns", even if its call went on."""
    is_whole = node.defect in (None, *ENDED_BY_VALUE)
    return (node.finish_reason or "stop") if not is_whole or node.finish_reason == "turns" else "stop"


def _step(number: int, start: int, stop: int, node: ThoughtNode) -> Step:
    return Step(
        node=number,
        parent=node.parent,
        start=start,
        stop=stop,
        type=node.type,
        samples=node.samples,
        visits=node.visits,
        value=node.value,
        backtrack=node.backtrack,
    )


def _failed_verifications(tree: Tree) -> Iterator[Verdict]:
    return (node.verdict for node in tree.nodes if node.verdict and node.verdict.outcome in ("error", "timeout"))


def _log_failed_verifications(tree: Tree) -> None:
    failed = list(_failed_verifications(tree))
    if failed:
        log.warning(
            "prompt %s: verification failed for %d chains of its tree: %s",
            tree.prompt_id,
            len(failed),
            failed[0].detail,
        )


def _events(tree: Tree) -> str:
    return ", ".join(f"{count} {name}" for name, count in sorted(tree.counts.items())) or "no node could be requested"
