"""Forward passes of one rank over its share of the samples, for log-probabilities and values of targets."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from learners.attention import can_pack
from learners.language_model import CHUNK_LOGITS
from learners.objective.logprobs import OtherTokens
from learners.objective.whole_teacher import WholeTeacher
from learners.samples.batching import MicroBatch, collate, to_device
from learners.samples.packing import share_rows
from learners.samples.planning import plan_micro_batches
from learners.samples.types import PackItem
from learners.settings import RankSettings
from rlsys.errors import InputError

MASK_ELEMENTS = 1 << 26
"""Bound of the elements of all masks of a pass. Samples for which they could be more have rows of their own, whose
attention needs no mask. The two sides of a pair share a row at any length."""
ROW_PARTS = (1, 2, 4, 8)
"""Numbers of rows of a rank among which the plan chooses, for several ranks."""


@dataclass(frozen=True, slots=True)
class Share:
    """The items of one pass.

    Attributes:
        rows: numbers of the items of every row.
        parts: number of parts of the targets.
    """

    rows: list[list[int]]
    parts: int

    @property
    def numbers(self) -> list[int]:
        """Numbers of all items, in the order of their targets."""
        return [number for row in self.rows for number in row]


class ForwardPasses:
    """Runner of models over the micro-batches of this rank, and counter of the passes."""

    def __init__(self, settings: RankSettings) -> None:
        self._settings = settings
        self.passes = 0  # of all models, since the start of the process
        # Of the policy, once a stage has started. Its reference and critic have the same shape.
        self.vocabulary: int | None = None
        self._width, self._packs = 1, False

    def describe(self, module: PreTrainedModel, teacher: PreTrainedModel | None = None) -> None:
        """Note what the passes of a stage need to know of the policy, and of a held teacher."""
        config = module.config.get_text_config()
        self.vocabulary, self._width = int(config.vocab_size), int(config.hidden_size)
        # Ranks that share rows compute attention from positions in the row alone.
        models = filter(None, (module, teacher))
        self._packs = self._settings.learner.sequence_parallel == 1 and all(map(can_pack, models))

    def shares(self, items: Sequence[PackItem]) -> list[Share]:
        """Return the items of every pass of this rank."""
        settings = self._settings
        budget = settings.learner.micro_batch_tokens * settings.learner.sequence_parallel
        rows, plan = self._plan(items, budget)
        targets = [sum(int(sample.targets.sum()) for number in row for sample in items[number].samples) for row in rows]
        # All ranks make the same number of parts, because they gather a partitioned output layer together.
        largest = [max(sum(targets[row] for row in share) for share in turn) for turn in zip(*plan, strict=True)]
        vocabulary = self.vocabulary or 1
        return [
            Share([rows[row] for row in share], max(1, -(-count * vocabulary // CHUNK_LOGITS)))
            for share, count in zip(plan[settings.share], largest, strict=True)
        ]

    def _plan(self, items: Sequence[PackItem], budget: int) -> tuple[list[list[int]], list[list[list[int]]]]:
        """Return the items of every row, and the rows of every pass of every rank."""
        shares = self._settings.shares
        if not self._packs:
            lengths, heights = [item.length for item in items], [len(item.samples) for item in items]
            plan = plan_micro_batches(lengths, ranks=shares, budget_tokens=budget, sample_counts=heights)
            return [[number] for number in range(len(items))], plan
        sequences = [[sample.inputs for sample in item.samples] for item in items]
        # Long rows share most, and short ones can be dealt to the ranks more evenly.
        total = sum(item.length for item in items)
        limits = {min(budget, total // (shares * parts)) for parts in ROW_PARTS} if shares > 1 else {budget}
        plans = [self._shared_plan(sequences, limit, budget) for limit in sorted(limits)]
        _, rows, best = min(plans, key=lambda plan: plan[0])
        return rows, best

    def _shared_plan(
        self, sequences: Sequence[Sequence[Any]], limit: int, budget: int
    ) -> tuple[int, list[list[int]], list[list[list[int]]]]:
        """Return the tokens of the rank with most, and the plan of rows up to a limit."""
        rows = share_rows(sequences, width=self._width, limit=limit, longest=MASK_ELEMENTS // budget)
        lengths = [row.length for row in rows]
        plan = plan_micro_batches(lengths, ranks=self._settings.shares, budget_tokens=budget)
        most = max(sum(lengths[row] for turn in share for row in turn) for share in plan)
        return most, [row.items for row in rows], plan

    def micro_batches(self, items: Sequence[PackItem]) -> list[MicroBatch]:
        """Return the micro-batches of this rank, on its device."""
        return [self.collate(items, share) for share in self.shares(items)]

    def collate(self, items: Sequence[PackItem], share: Share) -> MicroBatch:
        """Return the micro-batch of a share of the items, on this rank's device."""
        ends = [0, *itertools.accumulate(map(len, share.rows))]
        rows = [range(*ends) for ends in itertools.pairwise(ends)] if self._packs else None
        own = [items[number] for number in share.numbers]
        batch = collate(own, self._settings.pad_token_id, rows, parts=share.parts)
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

    def logprobs(
        self, model: Any, batch: MicroBatch, *, entropy: bool, others: OtherTokens | WholeTeacher | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Compute log-probabilities of all targets, entropies at the policy's, and those of the teacher's tokens.

        Args:
            model: a LanguageModel, or an engine of one.
            batch: micro-batch with N targets, M of them in the policy term.
            entropy: whether to compute the entropies, and the softened policy if the term sft needs it.
            others: from `others`; None computes nothing of a teacher.

        Returns:
            logprobs: [N] nats. The policy term's targets use the sampling temperature, other targets temperature 1.
            entropy: [M] nats; [0] without `entropy`.
            others: [P, K] nats, of the tokens that the teacher scored, or [P, 1] divergences from it.
            softened: [S] nats, of the supervised targets under the softened policy; [0] unless they are needed.
        """
        self.passes += 1
        temperature = torch.ones(len(batch.targets), device=batch.targets.device)
        at = None
        if batch.policy is not None:
            temperature[batch.policy.positions] = self._settings.temperature
            if entropy:
                at = torch.zeros_like(batch.targets, dtype=torch.bool).index_fill_(0, batch.policy.positions, True)
        soft = None
        if entropy and batch.sft is not None and self._settings.objective.sft.curiosity:
            soft = torch.zeros_like(batch.targets, dtype=torch.bool).index_fill_(0, batch.sft.positions, True)
        logprobs, entropies, at_others, softened = model(
            input_ids=batch.input_ids,
            targets=batch.targets,
            target_ids=batch.target_ids,
            temperature=temperature,
            parts=batch.parts,
            entropy_at=at,
            entropy_gradient=self._settings.objective.policy.entropy_coef > 0,
            others=others,
            softened_at=soft,
            depths=batch.depths,
            attention=batch.attention,
        )
        return logprobs, entropies, at_others, softened

    def others(self, batch: MicroBatch, teacher: Any, interpolation: float) -> OtherTokens | WholeTeacher | None:
        """Return what a pass computes for the term distill; None without its targets.

        Args:
            teacher: a frozen model in use: the teacher of the whole vocabulary.
            interpolation: share of that teacher in this step.
        """
        distill = batch.distill
        if distill is None:
            return None
        if distill.ids is not None:
            return OtherTokens(distill.positions, distill.ids)
        self.passes += 1
        states = teacher.states(batch, batch.targets[distill.positions])
        beta = self._settings.objective.distill.beta
        layer = teacher.logits
        return WholeTeacher(
            rows=distill.positions, states=states, output_layer=layer, beta=beta, interpolation=interpolation
        )

    def score(self, model: Any, row: Any) -> Tensor:
        """Return log p(token t+1 | tokens 0..t) of a row of T tokens, [T-1], at temperature 1."""
        ids = torch.from_numpy(np.asarray(row, dtype=np.int64))
        self.check_ids(ids)
        ids = ids.to(self._settings.device)
        places, ones = torch.arange(len(ids) - 1, device=ids.device), torch.ones(len(ids) - 1, device=ids.device)
        logprobs: Tensor = model(input_ids=ids[None], targets=places, target_ids=ids[1:], temperature=ones)[0]
        return logprobs

    def values(self, critic: Any, batch: MicroBatch) -> Tensor:
        """Compute the critic's [N] estimates of the return that follows each target, made before the target."""
        self.passes += 1
        values = critic(input_ids=batch.input_ids, depths=batch.depths, attention=batch.attention).float()
        return values.flatten().index_select(0, batch.targets)
