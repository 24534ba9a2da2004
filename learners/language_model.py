"""A causal language model that returns log-probabilities of given targets and never holds all logits."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

from learners.objective.logprobs import OtherTokens, token_logprobs
from learners.objective.whole_teacher import WholeTeacher
from learners.samples.packing import RowAttention
from learners.small_model import REFUSALS, small_model

CHUNK_LOGITS = 1 << 25
"""Largest number of logits at once: 128 MiB in fp32."""
ROUNDING = {torch.float32: 1e-4, torch.float64: 1e-6}
"""Differences of two computations of one value; some models compute norms in fp32."""


class SequenceGroup(Protocol):
    """Ranks that share every row; see `learners.deepspeed.sequence_parallel`."""

    def use_in(self, model: PreTrainedModel) -> None:
        """Let the attention of a model see the whole rows."""

    def part(self, input_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Return this rank's part of rows, and the positions of its tokens."""

    def own_places(self, places: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """Return which places are in this rank's part, and where."""

    def combine(self, values: Tensor, numbers: Tensor, count: int) -> Tensor:
        """Return the values of all ranks."""


class LanguageModel(nn.Module):
    """A language model as the learner calls it.

    The output layer runs on targets alone, a part of them at a time, and again in the backward pass. Everything that
    the model does with its logits, such as scaling or soft-capping, stays: the body of the model is replaced by the
    hidden states, and the rest of it is called. If that gives other logits, the whole logits are computed.

    Args:
        module: causal language model of transformers.
        sequence: ranks that share every row; None if this rank has whole rows.
    """

    def __init__(self, module: PreTrainedModel, sequence: SequenceGroup | None = None) -> None:
        super().__init__()
        self.module, self._sequence = module, sequence
        self._divides = can_divide(module)
        if sequence is not None:
            sequence.use_in(module)

    def forward(
        self,
        input_ids: Tensor,
        targets: Tensor,
        target_ids: Tensor,
        temperature: Tensor,
        *,
        parts: int = 1,
        entropy_at: Tensor | None = None,
        entropy_gradient: bool = False,
        others: OtherTokens | WholeTeacher | None = None,
        softened_at: Tensor | None = None,
        depths: Tensor | None = None,
        attention: RowAttention | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return log-probabilities and entropies of targets, and log-probabilities of other tokens.

        See `token_logprobs`.

        Args:
            input_ids: [B, L] int64.
            targets: [N] int64, places in the flattened input_ids whose logits predict a target.
            target_ids: [N] int64, the predicted tokens.
            temperature: [N] float32.
            parts: number of parts of the targets, one after the other; the same on all ranks, which gather the weights
                of a partitioned output layer for every part.
            entropy_at: [N] bool, where entropies are computed; None computes none.
            entropy_gradient: whether entropies carry gradient.
            others: tokens other than the targets, or a teacher of the whole vocabulary; None for none.
            softened_at: [N] bool, where the policy is softened; None softens none.
            depths, attention: see `MicroBatch`; None if every row holds one sample.

        Returns:
            logprobs: [N] nats; carries gradient, also for N = 0.
            entropy: [M] nats.
            others: [P, K] nats, or [P, 1] divergences from the teacher; carries gradient.
            softened: [S] nats.
        """
        targets_only = _Targets(target_ids, temperature, entropy_at, others, softened_at)
        if self._sequence is None:
            states = self.states(input_ids, targets, depths, attention)
            return self._logprobs(states, targets_only, parts, entropy_gradient)
        own_ids, positions = self._sequence.part(input_ids)
        numbers, places = self._sequence.own_places(targets, input_ids.shape[1])
        states = self.states(own_ids, places, positions, None)
        own, entropies, at_others, softened = self._logprobs(
            states, targets_only.select(numbers), parts, entropy_gradient
        )
        logprobs = self._sequence.combine(own, numbers, len(targets))
        if others is not None:
            of_rank = torch.isin(others.rows, numbers).nonzero().squeeze(-1)
            at_others = self._sequence.combine(at_others, of_rank, len(others.rows))
        if entropy_at is not None:
            entropies = self._sequence.combine(entropies, *_numbers(entropy_at, numbers))
        if softened_at is not None:
            softened = self._sequence.combine(softened, *_numbers(softened_at, numbers))
        return logprobs, entropies, at_others, softened

    def states(
        self, input_ids: Tensor, places: Tensor, depths: Tensor | None, attention: RowAttention | None
    ) -> Tensor:
        """Return the hidden states at places, [N, H], or the logits, [N, V], of a module that is not divided."""
        body = self.module.base_model if self._divides else self.module
        return run_body(body, input_ids, depths, attention).flatten(0, 1).index_select(0, places)

    def _logprobs(
        self, states: Tensor, targets: _Targets, parts: int, entropy_gradient: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return what `forward` returns from the states that predict the targets."""

        def part(states: Tensor, part: _Targets) -> tuple[Tensor, Tensor, Tensor, Tensor]:
            logits = self.logits(states)
            whole = part.others if isinstance(part.others, WholeTeacher) else None
            outputs = token_logprobs(
                logits,
                part.ids,
                part.temperature,
                entropy_at=part.entropy_at,
                entropy_gradient=entropy_gradient,
                others=part.others if isinstance(part.others, OtherTokens) else None,
                softened_at=part.softened_at,
            )
            return (*outputs[:2], whole.divergences(logits), outputs[3]) if whole else outputs

        if parts == 1:
            return part(states, targets)
        pairs = zip(states.tensor_split(parts), targets.split(parts), strict=True)
        outputs = zip(*(checkpoint(part, *pair, use_reentrant=False) for pair in pairs), strict=True)
        logprobs, entropy, others, softened = map(torch.cat, outputs)
        return logprobs, entropy, others, softened

    def logits(self, states: Tensor) -> Tensor:
        """Return the [N, V] logits of what `states` returned."""
        return self._output_layer(states) if self._divides else states

    def gradient_checkpointing_enable(self, **arguments: Any) -> None:
        """Compute the activations of the body again in the backward pass."""
        self.module.gradient_checkpointing_enable(**arguments)

    @cached_property
    def _output_layer(self) -> _OutputLayer:
        """The output layer with all that the module does with hidden states.

        It is made at the first pass, when DeepSpeed has given the module attributes that its copy needs as well. A
        cached property is no attribute of the kind that a module registers.
        """
        return _OutputLayer(self.module)


@dataclass(frozen=True, slots=True)
class _Targets:
    """N targets: their tokens, temperatures, where entropies are computed, other tokens, and where p is softened."""

    ids: Tensor
    temperature: Tensor
    entropy_at: Tensor | None
    others: OtherTokens | WholeTeacher | None
    softened_at: Tensor | None

    def select(self, numbers: Tensor) -> _Targets:
        """Return the targets of ascending numbers, [n] int64."""
        at = None if self.entropy_at is None else self.entropy_at[numbers]
        others = None if self.others is None else self.others.select(numbers)
        soft = None if self.softened_at is None else self.softened_at[numbers]
        return _Targets(self.ids[numbers], self.temperature[numbers], at, others, soft)

    def split(self, parts: int) -> list[_Targets]:
        """Return consecutive parts, as `tensor_split` makes them."""
        return [
            self.select(numbers) for numbers in torch.arange(len(self.ids), device=self.ids.device).tensor_split(parts)
        ]


def _numbers(at: Tensor, own: Tensor) -> tuple[Tensor, int]:
    """Return the numbers of this rank's places among all places of a mask, [N] bool, and the count of all.

    Args:
        own: [n] int64, numbers of this rank's targets.
    """
    return (at.cumsum(0) - 1)[own][at[own]], int(at.sum())


class _OutputLayer:
    """A copy of a model whose body returns given hidden states. The weights are those of the model."""

    def __init__(self, module: PreTrainedModel) -> None:
        # DeepSpeed's record of modules needs the same one in all passes.
        self._head, self._given = copy.copy(module), _Given()
        self._head._modules = {**module._modules, module.base_model_prefix: self._given}

    def __call__(self, hidden: Tensor) -> Tensor:
        """Return the [N, V] logits of [N, H] hidden states."""
        ids = torch.zeros((1, len(hidden)), dtype=torch.long, device=hidden.device)
        self._given.hidden = hidden[None]
        try:
            logits: Tensor = self._head(input_ids=ids, use_cache=False).logits[0]
        finally:
            self._given.hidden = None  # its graph would keep the model in memory
        return logits


class _Given(nn.Module):
    """Stands for the body of a model, and returns given hidden states, [1, N, H]."""

    hidden: Tensor | None = None

    def forward(self, *_arguments: Any, **_inputs: Any) -> _GivenOutput:
        return _GivenOutput(last_hidden_state=self.hidden)


class _GivenOutput(BaseModelOutputWithPast):
    """Output of a body, with None for all values that only some bodies have."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


@torch.no_grad()
def can_divide(module: PreTrainedModel) -> bool:
    """Return whether the output layer of a model can run without the body.

    It is tried on two tokens and a small model of the same kind.
    """
    try:
        small = small_model(module)
        ids = torch.tensor([[0, 1]], device=small.device)
        whole = small(input_ids=ids, use_cache=False).logits
        divided = _OutputLayer(small)(run_body(small.base_model, ids)[0, 1:])
    except REFUSALS:
        return False
    tolerance = ROUNDING.get(whole.dtype, 0.05) * float(whole.abs().max())
    return torch.allclose(whole[0, 1:], divided, rtol=0, atol=tolerance)


def run_body(
    body: Any, input_ids: Tensor, depths: Tensor | None = None, attention: RowAttention | None = None
) -> Tensor:
    """Return the [B, L, H] hidden states of a body, or the [B, L, V] logits of a whole model.

    Args:
        body: the model without its output layer, or the whole model.
        input_ids: [B, L] int64.
        depths: [B, L] int64, positions of the tokens; None if every row begins with its first token.
        attention: the attention of the rows, for models that `can_pack`; None if every row holds one sample.
    """
    inputs: dict[str, Any] = {} if depths is None else {"position_ids": depths}
    if attention is not None:  # the mask has 4 dimensions, so that the model makes none of its own
        mask = torch.zeros((1, 1, 1, 1), dtype=next(body.parameters()).dtype, device=input_ids.device)
        inputs |= {"attention_mask": mask, "row_attention": attention}
    outputs: Tensor = body(input_ids=input_ids, use_cache=False, **inputs)[0]
    return outputs
