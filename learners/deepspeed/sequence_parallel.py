"""Sequence parallelism (Ulysses): the ranks of a group each run a part of every row.

A rank has all heads of its own tokens everywhere but in the attention, where it has its own heads of all tokens.
DeepSpeed's layer exchanges the one for the other. It looks only at positions in the row, so a row holds one sample.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import AttentionInterface, PreTrainedModel

from learners.attention import FAST

ULYSSES = "ulysses"


@functools.cache
def sequence_group(size: int) -> SequenceGroup | None:
    """Return the group of this rank, or None if every rank has whole rows. Collective at the first call.

    Args:
        size: ranks of a group; the same in all calls with several.
    """
    return SequenceGroup(size) if size > 1 else None


class SequenceGroup:
    """Neighbouring ranks that share every row.

    Args:
        size: ranks of a group, above 1.
    """

    def __init__(self, size: int) -> None:
        from deepspeed.runtime.sequence_parallel import parallel_state_sp

        parallel_state_sp.initialize_sequence_parallel(sequence_parallel_size=size)
        self.size = size
        self._group: Any = parallel_state_sp.get_sequence_parallel_group()
        self._index = dist.get_rank(self._group)
        AttentionInterface.register(ULYSSES, self._attention)

    def use_in(self, model: PreTrainedModel) -> None:
        """Let the attention of a model exchange tokens for heads."""
        model.set_attn_implementation(ULYSSES)

    def part(self, input_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Return this rank's part of rows, [B, C], and the positions of its tokens, [B, C].

        Args:
            input_ids: [B, L] int64. Rows are padded to C times the size of the group.
        """
        length = input_ids.shape[1]
        padded = torch.nn.functional.pad(input_ids, (0, -length % self.size))
        positions = torch.arange(padded.shape[1], device=input_ids.device).expand_as(padded)
        own = [each.chunk(self.size, dim=1)[self._index].contiguous() for each in (padded, positions)]
        return own[0], own[1]

    def own_places(self, places: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """Return which places in whole rows are in this rank's part, [n], and their places in the part, [n].

        Args:
            places: [N] int64, in the flattened rows.
            length: tokens of a row, L.
        """
        width = -(-length // self.size)
        rows, columns = places // length, places % length
        numbers = (columns // width == self._index).nonzero().squeeze(-1)
        return numbers, (rows * width + columns - self._index * width)[numbers]

    def combine(self, values: Tensor, numbers: Tensor, count: int) -> Tensor:
        """Return the values of all ranks of the group, [N] or [N, K]. Collective.

        Every rank computes one and the same loss of them. The gradient reaches only this rank's values, so the sum of
        the ranks' gradients is that of one loss.

        Args:
            values: [n] or [n, K] values of this rank.
            numbers: [n] int64, their numbers.
            count: number of all values, N.
        """
        own = values.new_zeros((count, *values.shape[1:])).index_copy(0, numbers, values)
        total = own.detach().clone()
        dist.all_reduce(total, group=self._group)
        return own + (total - own.detach())

    def _attention(self, module: Any, query: Tensor, key: Tensor, value: Tensor, _mask: Any, **features: Any) -> Any:
        """Return the attention of this rank's tokens to all earlier tokens of their rows."""
        exchange = _exchange(self._group, query.shape[0], query.shape[1], key.shape[1], query.shape[-1])
        if features.get("position_ids") is None:  # DeepSpeed demands them; the attention does not use them
            features["position_ids"] = torch.zeros((1, query.shape[2]), dtype=torch.long, device=query.device)
        return exchange(module, query, key, value, None, **features)


@functools.cache
def _exchange(group: Any, batch: int, heads: int, key_value_heads: int, head_size: int) -> Any:
    """Return DeepSpeed's layer for rows of any length."""
    from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF

    return UlyssesSPAttentionHF(
        attn=AttentionInterface()[FAST],
        batch_size=batch,
        attn_head_count=heads,
        attn_head_size=head_size,
        kv_head_count=key_value_heads,
        num_hidden_layers=1,  # used only to debug
        process_group=group,
        seq_length_is_variable=True,
    )
