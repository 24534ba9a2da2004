"""Metrics of a training step: gathered pass by pass, reduced over the ranks once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from learners.objective.joint import Denominators
from learners.objective.losses import LossOutput
from learners.samples.batching import MicroBatch
from learners.samples.types import Sample

# Metric names, by term and by name in LossOutput.metrics. Each metric is a mean over the targets or pairs of its term.
# It is left out if the term has no targets or pairs.
MEANS = {
    "policy": {
        "gap": "learner/logprob_gap_mean",
        "entropy": "learner/entropy",
        "clipped_low": "learner/clip_low_fraction",
        "clipped_high": "learner/clip_high_fraction",
        "dual_clipped": "learner/dual_clip_fraction",
        "is_ratio_sum": "learner/importance_mean",
        "is_truncated": "learner/importance_truncated",
    },
    "kl": {"kl": "learner/kl"},
    "preference": {
        "accuracy": "preference/accuracy",
        "margin": "preference/margin",
        "chosen_logratio": "preference/chosen_logratio",
        "rejected_logratio": "preference/rejected_logratio",
        "chosen_logprob": "preference/chosen_logprob",
        "rejected_logprob": "preference/rejected_logprob",
    },
    "sft": {},
    "distill": {"divergence": "distill/divergence"},
    "ranking": {"accuracy": "ranking/accuracy"},
    "custom": {},
    "value": {"value_clipped": "value/clipped_fraction", "squared_error": "value/squared_error"},
}
MAXIMA = {
    "ratio_max": "learner/ratio_max",
    "gap_max": "learner/logprob_gap_max",
    "is_ratio_max": "learner/importance_max",
}
IMPORTANCE = ("learner/importance_mean", "learner/importance_max", "learner/importance_truncated")


class StepMetrics:
    """Sums, maxima and noted values of one training step.

    `add_*` takes values of this rank, and `reduce` combines them over the ranks. `note*` takes values that are the
    same on all ranks.

    Args:
        device: device of the ranks' process group.
        terms: terms of the step. Ranks reduce by position, so all ranks must pass the same terms, even a term without
            a target on this rank.
        reports: False if another rank has the same values and reports them.
    """

    def __init__(self, device: str, terms: tuple[str, ...], *, reports: bool = True) -> None:
        self._device, self._terms, self._reports = device, terms, reports
        self._sums: dict[str, float] = {"padded": 0.0, "real": 0.0}
        self._maxima: dict[str, float] = dict.fromkeys(MAXIMA.values(), 0.0) if "policy" in terms else {}
        self._notes: dict[str, list[float]] = {}
        for term in terms:
            self._sums |= {f"objective/{term}_loss": 0.0, f"count/{term}": 0.0}
            self._sums |= {f"{term}/{key}": 0.0 for key in MEANS[term]}
        if terms:
            self._sums["learner/loss"] = 0.0

    def add_pass(self, batch: MicroBatch) -> None:
        """Count the tokens of a micro-batch, with and without padding."""
        self._sums["padded"] += batch.input_ids.numel()
        self._sums["real"] += batch.real_tokens

    def add_term(self, term: str, output: LossOutput, count: int, weight: float) -> None:
        """Add the contribution of one pass to a term.

        Args:
            term: name of the term.
            output: loss and metrics of the pass.
            count: number of the term's targets or pairs in the pass.
            weight: weight of the term in the joint loss.
        """
        loss = float(output.loss.detach())
        self._sums[f"objective/{term}_loss"] += loss
        self._sums[f"count/{term}"] += count
        self._sums["learner/loss"] += weight * loss
        for key in MEANS[term]:
            if key in output.metrics:
                self._sums[f"{term}/{key}"] += float(output.metrics[key])
        for key, name in MAXIMA.items():
            if key in output.metrics:
                self._maxima[name] = max(self._maxima[name], float(output.metrics[key]))

    def note(self, name: str, value: float) -> None:
        """Add a value that is the same on all ranks. `reduce` returns the mean of the values with one name."""
        self._notes.setdefault(name, []).append(value)

    def note_denominators(self, denominators: Denominators) -> None:
        """Note the denominators of the step's terms, and how many terms are empty in this update."""
        by_term = denominators.by_term
        for term in self._terms:
            self.note(f"objective/{term}_denominator", float(by_term[term]))
        self.note("learner/empty_terms", float(sum(not by_term[term] for term in self._terms)))

    def note_gradient_norms(self, norms: Mapping[str, float]) -> None:
        """Note the gradient norm of every term, and its share in the sum of the norms."""
        for term, norm in norms.items():
            self.note(f"objective/{term}_grad_norm", norm)
            self.note(f"objective/{term}_grad_share", norm / sum(norms.values()) if sum(norms.values()) else 0.0)

    def note_explained_variance(self, samples: Sequence[Sample]) -> None:
        """Note the explained variance and the mean of the critic's values at the start of the step.

        explained variance = 1 - Var(return - value) / Var(return)
        """
        tokens = [sample.policy for sample in samples if sample.policy and sample.policy.returns is not None]
        returns, values = (
            np.concatenate([getattr(each, name)[each.mask] for each in tokens]).astype(np.float64)
            for name in ("returns", "values")
        )
        if returns.var() > 0:
            self.note("value/explained_variance", float(1 - (returns - values).var() / returns.var()))
        self.note("value/mean", float(values.mean()))

    def reduce(self, updates: int) -> dict[str, float]:
        """Reduce over the ranks. Collective.

        Args:
            updates: number of optimizer updates of the step; losses are means over them.

        Returns:
            Values by registered metric name, the same on all ranks.
        """
        sums = self._all_reduce(self._sums if self._reports else dict.fromkeys(self._sums, 0.0), dist.ReduceOp.SUM)
        metrics = {name: sum(values) / len(values) for name, values in self._notes.items()}
        for name, value in sums.items():
            if name.startswith(("objective/", "learner/")):
                metrics[name] = value / max(1, updates)
        counts = {term: sums[f"count/{term}"] for term in self._terms}
        for term, count in counts.items():
            if count:  # an accuracy of 0 would mean that all pairs are wrong, not that there are none
                metrics |= {name: sums[f"{term}/{key}"] / count for key, name in MEANS[term].items()}
            if sum(counts.values()):
                metrics[f"objective/{term}_share"] = count / sum(counts.values())
        metrics["learner/updates"] = float(updates)
        metrics["learner/tokens"] = sums["real"]
        if sums["padded"]:
            metrics["learner/padding_share"] = 1 - sums["real"] / sums["padded"]
        maxima = self._all_reduce(self._maxima, dist.ReduceOp.MAX) if self._maxima else {}
        metrics |= maxima if counts.get("policy") else {}
        if not metrics.get("learner/importance_max"):  # ratios are positive, so 0 means that there were none
            for name in IMPORTANCE:
                metrics.pop(name, None)
        return metrics

    def _all_reduce(self, values: Mapping[str, float], operation: Any) -> dict[str, float]:
        names = sorted(values)
        # NCCL reduces only tensors on the device.
        tensor = torch.tensor([values[name] for name in names], dtype=torch.float64, device=self._device)
        dist.all_reduce(tensor, op=operation)
        return dict(zip(names, tensor.tolist(), strict=True))


def summed_gradient_norm(parts: list[Tensor]) -> float:
    """Sum gradients over the ranks in place and return their norm. Collective.

    Args:
        parts: gradient of each parameter on this rank.
    """
    for part in parts:
        dist.all_reduce(part)
    return float(torch.stack([part.square().sum() for part in parts]).sum().sqrt())
