"""Advantages and actor-learner gaps of the tokens of a few trajectories of a step, for people to look at."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
from torch import Tensor

from learners.samples.types import Origin, PackItem, Sample
from rlsys.interfaces import TokenValues
from rlsys.overlong import OverlongShaping
from rlsys.types import TrainingBatch


class TokenRecorder:
    """Values of the tokens of `TrainingBatch.kept` in one training step.

    A trajectory is in one micro-batch of one update of the step, so one rank records it.

    Args:
        batch: data of the step.
        terms: names of the terms with a weight in the step.
        shaping: overlong shaping of the rewards that the loss compares.
    """

    def __init__(self, batch: TrainingBatch, terms: Collection[str], shaping: OverlongShaping) -> None:
        self._batch, self._terms, self._shaping, self._kept = batch, terms, shaping, frozenset(batch.kept)
        self._built: set[Origin] = set()
        self._trained: set[Origin] = set()
        self._values: dict[Origin, TokenValues] = {}

    def note_items(self, items: Sequence[PackItem], trained: Sequence[PackItem]) -> None:
        """Note the trajectories of an update.

        Args:
            items: all items with targets, of all ranks.
            trained: those that are in a pass.
        """
        if self._kept:
            self._built |= self._kept & _origins(items)
            self._trained |= self._kept & _origins(trained)

    def add_pass(self, items: Sequence[PackItem], logprobs: Tensor) -> None:
        """Record what a pass of this rank tells.

        Args:
            items: items of the pass, in the order of their targets.
            logprobs: [N] nats, of all targets.
        """
        if not self._kept or not self._kept & _origins(items):
            return
        start = 0
        for sample in (sample for item in items for sample in item.samples):
            targets = sample.targets
            stop = start + int(targets.sum())
            if sample.origin in self._kept and sample.policy is not None:
                self._values[sample.origin] = _values(sample, targets, logprobs[start:stop])
            start = stop

    def values(self) -> list[TokenValues | None]:
        """Return the values of each kept trajectory, in order; None where another rank has them."""
        return [
            self._values.get(origin)
            or (None if origin in self._trained else TokenValues(untrained=self._reason(*origin)))
            for origin in self._batch.kept
        ]

    def _reason(self, group_number: int, number: int) -> str:
        """Return why the policy term does not train a trajectory."""
        group = self._batch.groups[group_number]
        trajectory = group.trajectories[number]
        if not trajectory.judged:
            return f"not trained: the verifier gave no verdict ({trajectory.outcome})"
        if not trajectory.loss_mask[1:].any():
            return "not trained: the policy chose none of its tokens"
        if "policy" not in self._terms:
            return "the policy term has no weight in this step"
        if (group_number, number) not in self._built:
            return "not trained: its nodes are trained with another completion of the tree"
        if not self._shaping.rewards_differ(group):
            return "not trained: all rewards of the group are equal"
        return "not trained: its advantage is 0"


def _origins(items: Sequence[PackItem]) -> set[Origin]:
    return {sample.origin for item in items for sample in item.samples if sample.origin and sample.policy}


def _values(sample: Sample, targets: np.ndarray, logprobs: Tensor) -> TokenValues:
    tokens = sample.policy
    assert tokens is not None  # noqa: S101 - the caller has looked
    trained = tokens.mask & targets
    own = np.zeros(sample.length, dtype=np.float32)
    own[targets] = logprobs.detach().float().cpu().numpy()
    if tokens.old_logprobs is not None:  # of the start of the step; the pass may come after other updates
        own = tokens.old_logprobs
    nothing = np.float32(np.nan)
    gaps = own - tokens.behavior_logprobs
    return TokenValues(advantages=np.where(trained, tokens.advantages, nothing), gaps=np.where(trained, gaps, nothing))
