"""Figures of a training step that every rank knows without asking the others: counts, norms, and how values fit."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from learners.objective.joint import Denominators
from learners.samples.batching import MicroBatch
from learners.samples.types import Row
from learners.step_metrics import StepSums


def count_of(batch: MicroBatch, term: str) -> int:
    """Targets of a term in a micro-batch, or pairs."""
    if term == "preference":
        return len(batch.pairs.weights) if batch.pairs else 0
    targets = batch.sft if term == "sft" else batch.policy
    return len(targets.at) if targets else 0


def note_denominators(sums: StepSums, found: Denominators, weights: dict[str, float]) -> int:
    """Log what every term is divided by; how many terms have nothing in this update."""
    by_term = {"policy": found.policy, "kl": found.policy, "value": found.value, "sft": found.sft}
    by_term["preference"] = found.pairs
    for term in weights:
        sums.note(f"objective/{term}_denominator", float(by_term[term]))
    return sum(not by_term[term] for term in weights)


def note_norms(sums: StepSums, norms: dict[str, float]) -> None:
    for term, norm in norms.items():
        sums.note(f"objective/{term}_grad_norm", norm)
        sums.note(f"objective/{term}_grad_share", norm / sum(norms.values()) if sum(norms.values()) else 0.0)


def note_explained_variance(sums: StepSums, rows: Sequence[Row]) -> None:
    """1 - Var(return - value) / Var(return), of the values at the start of the step: the same on all ranks."""
    tokens = [row.policy for row in rows if row.policy and row.policy.returns is not None]
    returns, values = (
        np.concatenate([getattr(found, name)[found.mask] for found in tokens]).astype(np.float64)
        for name in ("returns", "values")
    )
    if returns.var() > 0:
        sums.note("value/explained_variance", float(1 - (returns - values).var() / returns.var()))
    sums.note("value/mean", float(values.mean()))
