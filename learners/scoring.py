"""Scores of samples and pairs from forward passes without gradient, shared by all ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from learners.forward import ForwardPasses
from learners.samples.batching import MicroBatch
from learners.samples.build import pair_score_samples
from learners.samples.types import PackItem, Sample
from learners.settings import RankSettings
from rlsys.errors import NonFiniteLossError
from rlsys.types import Float32Array, Preference

Forward = Callable[[MicroBatch], Tensor]


class RankScorer:
    """Scores under the current policy, the reference policy and the critic.

    Every method is collective. Each rank computes its share, and all ranks get all scores. If a score is not finite,
    all ranks raise a NonFiniteLossError.
    """

    def __init__(
        self, settings: RankSettings, forward: ForwardPasses, policy: Any, reference: Any, critic: Any
    ) -> None:
        self._settings, self._forward = settings, forward
        self._policy, self._reference, self._critic = policy, reference, critic

    def old_logprobs(self, samples: Sequence[Sample]) -> list[Float32Array]:
        """Return [T] log-probabilities of each sample's targets under the current policy, nats."""
        return self._score("log-probabilities of the policy", samples, self._logprobs_under(self._policy))

    def reference_logprobs(self, samples: Sequence[Sample]) -> list[Float32Array]:
        """Return [T] log-probabilities of each sample's targets under the reference policy, nats."""
        if not samples:  # a stage without groups may have no reference policy
            return []
        with self._reference.in_use():
            forward = self._logprobs_under(self._reference)
            return self._score("log-probabilities of the reference policy", samples, forward)

    def values(self, samples: Sequence[Sample]) -> list[Float32Array]:
        """Return the critic's [T] estimates of the return that follows each target, made before the target."""
        return self._score("values of the critic", samples, lambda batch: self._forward.values(self._critic, batch))

    def policy_pair_scores(self, pairs: Sequence[Preference]) -> list[tuple[float, float]]:
        """Return the scores of the chosen and the rejected side under the current policy, sums in nats."""
        return self._pair_scores("the policy", pairs, self._policy)

    def reference_pair_scores(self, pairs: Sequence[Preference]) -> list[tuple[float, float]]:
        """Return the scores of the chosen and the rejected side under the reference policy, sums in nats."""
        if not pairs:
            return []
        with self._reference.in_use():
            return self._pair_scores("the reference policy", pairs, self._reference)

    def _pair_scores(self, model_name: str, pairs: Sequence[Preference], model: Any) -> list[tuple[float, float]]:
        samples = pair_score_samples(pairs, self._settings.objective)
        description = f"log-probabilities of preference pairs under {model_name}"
        logprobs = self._score(description, samples, self._logprobs_under(model))
        sums = [float(each.sum(dtype=np.float64)) for each in logprobs]
        return list(zip(sums[0::2], sums[1::2], strict=True))

    def _logprobs_under(self, model: Any) -> Forward:
        return lambda batch: self._forward.logprobs(model, batch, entropy=False)[0]

    @torch.no_grad()
    def _score(self, description: str, samples: Sequence[Sample], forward: Forward) -> list[Float32Array]:
        """Return [T] float32 scores of each sample: one per target, 0 elsewhere.

        Args:
            description: name of the scores, for the error message.
            samples: samples to score.
            forward: computes the scores of a micro-batch's targets, [N].

        Raises:
            NonFiniteLossError: on all ranks, if a score is not finite on one.
        """
        if not samples:
            return []
        masks = [sample.targets for sample in samples]
        starts = np.cumsum([0, *(int(mask.sum()) for mask in masks)])
        flat = torch.zeros(int(starts[-1]), dtype=torch.float32, device=self._settings.device)
        items = [PackItem(samples=(sample,)) for sample in samples]
        for share in self._forward.shares(items):
            scores = forward(self._forward.collate(items, share))
            offset = 0
            for number in share.numbers:
                size = int(starts[number + 1] - starts[number])
                flat[int(starts[number]) : int(starts[number + 1])] = scores[offset : offset + size]
                offset += size
        flat *= self._settings.reports
        dist.all_reduce(flat)  # one rank reports the score of each target; the other ranks add 0
        values = flat.cpu().numpy()
        if bad := int((~np.isfinite(values)).sum()):
            raise NonFiniteLossError(
                f"{description}: {bad} of {len(values)} not finite; nothing was updated or published"
            )
        by_sample = []
        for number, mask in enumerate(masks):
            sample_scores = np.zeros(len(mask), dtype=np.float32)
            sample_scores[mask] = values[starts[number] : starts[number + 1]]
            by_sample.append(sample_scores)
        return by_sample
