"""Figures of a training step: gathered pass by pass, reduced over ranks once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from learners.batching import MicroBatch


@dataclass(frozen=True, slots=True)
class Pass:
    """One forward and backward pass of this rank. row_weights: [B] weight of a token of each row."""

    batch: MicroBatch
    row_weights: Tensor
    real_tokens: int

    def token_weights(self) -> Tensor:
        return self.row_weights[self.batch.row_ids]


class StepSums:
    """Figures of a training step: sums and maxima over tokens, later reduced over ranks."""

    def __init__(self, device: str) -> None:
        self._device = device
        # Ranks reduce by position, so all must hold the same names even where one had no token.
        self.sums: dict[str, float] = {"gap": 0.0}
        self.maxima: dict[str, float] = {"learner/ratio_max": 0.0, "learner/logprob_gap_max": 0.0}
        self.notes: dict[str, list[float]] = {}

    def add(self, name: str, value: Tensor | float) -> None:
        self.sums[name] = self.sums.get(name, 0.0) + float(value.detach() if isinstance(value, Tensor) else value)

    def note(self, name: str, value: float) -> None:
        """A figure that is the same on all ranks; the step reports its mean over updates."""
        self.notes.setdefault(name, []).append(value)

    def add_supervised(self, item: Pass) -> None:
        self._add_padding(item)
        self.add("supervised", len(item.batch.row_ids))

    def add_policy(self, item: Pass, metrics: dict[str, Tensor], old: Tensor, entropy: Tensor) -> None:
        self._add_padding(item)
        self.add("policy", old.numel())
        self.add("entropy", entropy.sum())
        self.add("clipped_low", metrics["clipped_low"])
        self.add("clipped_high", metrics["clipped_high"])
        if old.numel():
            behavior = item.batch.behavior_logprobs[item.batch.loss_mask].to(old.device)
            gap = (old - behavior).abs()
            self.add("gap", gap.sum())
            self._maximum("learner/logprob_gap_max", gap.max())
            self._maximum("learner/ratio_max", metrics["ratio_max"])

    def _add_padding(self, item: Pass) -> None:
        self.add("padded", item.batch.input_ids.numel())
        self.add("real", item.real_tokens)

    def _maximum(self, name: str, value: Tensor) -> None:
        self.maxima[name] = max(self.maxima.get(name, 0.0), float(value))

    def reduce(self, updates: int) -> dict[str, float]:
        """Names of the metrics registry, the same on all ranks. Losses are means over updates. Collective."""
        sums = self._all_reduce(self.sums, dist.ReduceOp.SUM)
        found = {name: value / updates for name, value in sums.items() if "/" in name}
        found |= {name: sum(values) / len(values) for name, values in self.notes.items()}
        found["learner/updates"] = float(updates)
        found["learner/tokens"] = sums["real"]
        found["learner/padding_share"] = 1 - sums["real"] / sums["padded"]
        if "supervised" in sums:
            return found | {"supervised/tokens": sums["supervised"]}
        tokens = max(1.0, sums["policy"])
        found |= self._all_reduce(self.maxima, dist.ReduceOp.MAX)
        shares = {
            "learner/logprob_gap_mean": "gap",
            "learner/entropy": "entropy",
            "learner/clip_low_fraction": "clipped_low",
            "learner/clip_high_fraction": "clipped_high",
            "learner/kl": "kl",
        }
        return found | {name: sums[key] / tokens for name, key in shares.items() if key in sums}

    def _all_reduce(self, values: dict[str, float], operation: Any) -> dict[str, float]:
        names = sorted(values)
        # On the device of the ranks: NCCL takes nothing else.
        tensor = torch.tensor([values[name] for name in names], dtype=torch.float64, device=self._device)
        dist.all_reduce(tensor, op=operation)
        return dict(zip(names, tensor.tolist(), strict=True))
