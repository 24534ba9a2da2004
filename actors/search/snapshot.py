"""Conversion of growing trees to immutable trees."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from actors.search.requests import SearchModel
from actors.search.stopping import StopRule
from actors.search.tree import GrowingTree, Node
from rlsys.trees import Role, ThoughtNode, Tree
from rlsys.types import Prompt


def finished_tree(
    prompt: Prompt, growing: GrowingTree, models: Mapping[Role, SearchModel], stop: StopRule, calls: int
) -> Tree:
    """Return the tree of a finished search.

    Args:
        calls: Number of completions requested from engines.
    """
    return Tree(
        prompt_id=prompt.prompt_id,
        question=prompt.question,
        answer=prompt.answer,
        pattern=growing.pattern.name,
        tokenizers={role: model.codec.digest for role, model in models.items()},
        models={role: model.model for role, model in models.items()},
        prompt_token_ids={role: np.asarray(model.prompt_ids, dtype=np.int32) for role, model in models.items()},
        nodes=tuple(_thought_node(node) for node in growing.nodes),
        stop=stop.final_reason,
        simulations=stop.begun,
        calls=calls,
        tokens=stop.tokens,
        counts=dict(sorted(growing.counts.items())),
    )


def _thought_node(node: Node) -> ThoughtNode:
    logprobs = np.zeros(len(node.token_ids), dtype=np.float32)
    logprobs[node.forced :] = node.logprobs
    return ThoughtNode(
        parent=node.parent.number if node.parent else -1,
        type=node.type,
        text=node.text,
        token_ids=np.asarray(node.token_ids, dtype=np.int32),
        forced=node.forced,
        logprobs=logprobs,
        spill=node.spill,
        writer=node.writer,
        finish_reason=node.finish_reason,
        versions=node.versions,
        defect=node.defect,
        backtrack=node.backtrack,
        samples=node.samples,
        visits=node.visits,
        total=node.total,
        verdict=node.verdict,
        scored=node.scored,
        scored_tokens=node.scored_tokens,
        estimate=node.estimate,
    )
