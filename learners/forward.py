"""Forward passes of one rank over its share of the samples, for log-probabilities and values of targets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from learners.objective.logprobs import masked_token_logprobs
from learners.samples.batching import MicroBatch, collate, plan_micro_batches, to_device
from learners.samples.types import PackItem
from learners.settings import RankSettings
from rlsys.errors import InputError


class ForwardPasses:
    """Runner of models over the micro-batches of this rank, and counter of the passes."""

    def __init__(self, settings: RankSettings) -> None:
        self._settings = settings
        self.passes = 0  # of all models, since the start of the process
        self.vocabulary: int | None = None  # token ids of the policy, once a stage has started

    def shares(self, items: Sequence[PackItem]) -> list[list[int]]:
        """Return the item indices of every pass of this rank."""
        plan = plan_micro_batches(
            [item.length for item in items],
            ranks=self._settings.ranks,
            budget_tokens=self._settings.learner.micro_batch_tokens,
            sample_counts=[len(item.samples) for item in items],
        )
        return plan[self._settings.rank]

    def micro_batches(self, items: Sequence[PackItem]) -> list[MicroBatch]:
        """Return the micro-batches of this rank, on its device."""
        return [self.collate([items[number] for number in share]) for share in self.shares(items)]

    def collate(self, items: Sequence[PackItem]) -> MicroBatch:
        """Return the micro-batch of these items, on this rank's device."""
        batch = collate(items, self._settings.pad_token_id)
        self.check_ids(batch.input_ids)
        return to_device(batch, self._settings.device)

    def check_ids(self, token_ids: Tensor) -> None:
        """Check that the policy has all tokens; a device would only report a failed assertion.

        Raises:
            InputError: a token id is beyond the vocabulary.
        """
        largest = int(token_ids.max()) if token_ids.numel() else 0
        if self.vocabulary is not None and largest >= self.vocabulary:
            raise InputError(
                f"learner rank {self._settings.rank}: token id {largest} is beyond the vocabulary of the policy, which "
                f"has {self.vocabulary} tokens; data and model.path belong to different models"
            )

    def logprobs(self, model: Any, batch: MicroBatch, *, entropy: bool) -> tuple[Tensor, Tensor]:
        """Compute log-probabilities of all targets, and entropies at the policy's targets.

        Args:
            model: a causal language model.
            batch: micro-batch with N targets, M of them in the policy term.
            entropy: whether to compute the entropies.

        Returns:
            logprobs: [N] nats. The policy term's targets use the sampling temperature, other targets temperature 1.
            entropy: [M] nats; [0] without `entropy`.
        """
        self.passes += 1
        ids, mask = batch.input_ids, batch.loss_mask[:, batch.first_target :]
        # No attention mask is needed: under causal attention, no real token attends to padding on its right.
        keep = ids.shape[1] - batch.first_target
        logits = model(input_ids=ids, use_cache=False, logits_to_keep=keep).logits[:, :-1]
        temperature: float | Tensor = 1.0
        if batch.policy is not None and self._settings.temperature != 1:
            temperature = torch.ones(batch.targets, device=ids.device)
            temperature[batch.policy.positions] = self._settings.temperature
        return masked_token_logprobs(
            logits,
            ids[:, batch.first_target + 1 :],
            mask,
            temperature,
            entropy_at=batch.policy.positions if entropy and batch.policy is not None else None,
            entropy_gradient=self._settings.objective.policy.entropy_coef > 0,
        )

    def values(self, critic: Any, batch: MicroBatch) -> Tensor:
        """Compute the critic's [N] estimates of the return that follows each target, made before the target."""
        self.passes += 1
        values = critic(input_ids=batch.input_ids, use_cache=False)[:, :-1].float()
        return values[batch.loss_mask]
