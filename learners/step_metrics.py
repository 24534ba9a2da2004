"""Figures of a training step: gathered pass by pass, reduced over ranks once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from learners.objective.losses import LossOutput
from learners.samples.batching import MicroBatch

# Figures of a term, by what they are called in LossOutput.metrics: means over its targets or
# pairs, and left out where there are none.
SHARES = {
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
    "value": {"value_clipped": "value/clipped_fraction", "squared_error": "value/squared_error"},
}
MAXIMA = {
    "ratio_max": "learner/ratio_max",
    "gap_max": "learner/logprob_gap_max",
    "is_ratio_max": "learner/importance_max",
}
IMPORTANCE = ("learner/importance_mean", "learner/importance_max", "learner/importance_truncated")


class StepSums:
    """Figures of a training step: sums and maxima over passes, later reduced over ranks.

    Args:
        terms: the terms that the step has. Ranks reduce by position, so all must hold the same names even where one
            had no target.
    """

    def __init__(self, device: str, terms: tuple[str, ...]) -> None:
        self._device, self._terms = device, terms
        self._sums: dict[str, float] = {"padded": 0.0, "real": 0.0}
        self._maxima: dict[str, float] = dict.fromkeys(MAXIMA.values(), 0.0) if "policy" in terms else {}
        self._notes: dict[str, list[float]] = {}
        for term in terms:
            self._sums |= {f"objective/{term}_loss": 0.0, f"count/{term}": 0.0}
            self._sums |= {f"{term}/{key}": 0.0 for key in SHARES[term]}
        if terms:
            self._sums["learner/loss"] = 0.0

    def add_pass(self, batch: MicroBatch) -> None:
        self._sums["padded"] += batch.input_ids.numel()
        self._sums["real"] += batch.real_tokens

    def add_term(self, term: str, found: LossOutput, count: int, weight: float) -> None:
        """The part of one pass in a term. count: its targets or pairs in the pass."""
        loss = float(found.loss.detach())
        self._sums[f"objective/{term}_loss"] += loss
        self._sums[f"count/{term}"] += count
        self._sums["learner/loss"] += weight * loss
        for key in SHARES[term]:
            if key in found.metrics:
                self._sums[f"{term}/{key}"] += float(found.metrics[key])
        for key, name in MAXIMA.items():
            if key in found.metrics:
                self._maxima[name] = max(self._maxima[name], float(found.metrics[key]))

    def note(self, name: str, value: float) -> None:
        """A figure that is the same on all ranks; the step reports its mean."""
        self._notes.setdefault(name, []).append(value)

    def reduce(self, updates: int) -> dict[str, float]:
        """Names of the metrics registry, the same on all ranks. Losses are means over updates. Collective."""
        sums = self._all_reduce(self._sums, dist.ReduceOp.SUM)
        found = {name: sum(values) / len(values) for name, values in self._notes.items()}
        for name, value in sums.items():
            if name.startswith(("objective/", "learner/")):
                found[name] = value / max(1, updates)
        counts = {term: sums[f"count/{term}"] for term in self._terms}
        for term, count in counts.items():
            if count:  # nothing has no mean: an accuracy of 0 would say that all pairs are wrong
                found |= {name: sums[f"{term}/{key}"] / count for key, name in SHARES[term].items()}
            if sum(counts.values()):
                found[f"objective/{term}_share"] = count / sum(counts.values())
        found["learner/updates"] = float(updates)
        found["learner/tokens"] = sums["real"]
        if sums["padded"]:
            found["learner/padding_share"] = 1 - sums["real"] / sums["padded"]
        found |= self._all_reduce(self._maxima, dist.ReduceOp.MAX) if self._maxima else {}
        if not found.get("learner/importance_max"):  # ratios are positive: there were none
            for name in IMPORTANCE:
                found.pop(name, None)
        return found

    def _all_reduce(self, values: Mapping[str, float], operation: Any) -> dict[str, float]:
        names = sorted(values)
        # On the device of the ranks: NCCL takes nothing else.
        tensor = torch.tensor([values[name] for name in names], dtype=torch.float64, device=self._device)
        dist.all_reduce(tensor, op=operation)
        return dict(zip(names, tensor.tolist(), strict=True))


def norm_of_sums(parts: list[Tensor]) -> float:
    """Norm of a gradient whose parts every rank holds a summand of. Collective."""
    for part in parts:
        dist.all_reduce(part)
    return float(torch.stack([part.square().sum() for part in parts]).sum().sqrt())
