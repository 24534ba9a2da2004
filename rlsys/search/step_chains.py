"""Chains of nodes with values: all nodes of a tree, with one prefix for each end of a chain and not for each node."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rlsys.search.extract import StepValue
from rlsys.types import BoolArray


@dataclass(frozen=True, slots=True, kw_only=True)
class StepChain:
    """Nodes that follow one another, with their values: the way to a node after which none has a value.

    Attributes:
        steps: The nodes in order. The first one follows the prompt, or nodes without a value.
        known: Number of nodes at the start that an earlier chain has.
    """

    steps: tuple[StepValue, ...]
    known: int

    @property
    def loss_mask(self) -> BoolArray:
        """[T] bool mask over the tokens of the last node's chain, True for generated tokens of the new nodes."""
        mask = np.zeros(len(self.steps[-1].token_ids), dtype=bool)
        for step in self.steps[self.known :]:
            mask[step.start + step.forced : len(step.token_ids)] = True
        return mask


def step_chains(steps: Sequence[StepValue]) -> list[StepChain]:
    """Return all nodes of `rlsys.search.extract.step_values` as chains, in the order of their last nodes."""
    by_ids: dict[bytes, StepValue] = {}
    for step in steps:
        if step.start < len(step.token_ids):  # a node without tokens would come before itself
            by_ids.setdefault(step.token_ids.tobytes(), step)
    parents = {id(step): by_ids.get(step.token_ids[: step.start].tobytes()) for step in steps}
    followed = {id(parent) for parent in parents.values()}
    chains: list[StepChain] = []
    seen: set[int] = set()
    for last in steps:
        if id(last) in followed:
            continue
        path = [last]
        while (parent := parents[id(path[0])]) is not None:
            path.insert(0, parent)
        known = sum(id(step) in seen for step in path)  # with a node, all nodes before it are known
        seen.update(map(id, path))
        chains.append(StepChain(steps=tuple(path), known=known))
    return chains
