"""How tokens add up to one number: the weight of a token in the loss of an optimizer update."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

from learners.advantages import Float64Array

LossAggregation = Literal["token_mean", "sequence_mean", "constant"]


def token_weights(completion_lengths: Sequence[int], *, aggregation: LossAggregation, max_tokens: int) -> Float64Array:
    """Weight of each trained token of each row, so that loss = sum_rows w_row sum_tokens l.

    token_mean:     w_i = 1 / sum_j |o_j|              every token counts the same (DAPO)
    sequence_mean:  w_i = 1 / (n |o_i|)                every row counts the same (GRPO)
    constant:       w_i = 1 / (rows * max_tokens)      no dependence on lengths (Dr.GRPO)

    A row without trained tokens adds no loss. It counts as one of the `rows` of constant, whose denominator
    must not depend on what was sampled; it is not one of the n rows of sequence_mean, where the mean over
    its tokens does not exist.

    Args:
        completion_lengths: |o_i|, trained tokens of every row of the optimizer update: of all ranks and all
            micro-batches, or the loss would depend on how rows are spread over them.
        aggregation: one of the above.
        max_tokens: bound of a completion, `sampling.max_tokens`; used by constant only.

    Returns:
        [rows] float64.

    Raises:
        ValueError: negative length, max_tokens < 1, or an unknown aggregation.

    Source: DAPO, arXiv:2503.14476, eq. 12; GRPO, arXiv:2402.03300, eq. 3; Dr.GRPO, arXiv:2503.20783,
        sec. 3.2.
    """
    lengths = np.asarray(completion_lengths, dtype=np.float64)
    if max_tokens < 1 or (lengths < 0).any():
        raise ValueError(f"expected max_tokens >= 1 and lengths >= 0, found {max_tokens} and {completion_lengths}")
    match aggregation:
        case "token_mean":
            return np.full(len(lengths), 1.0 / max(lengths.sum(), 1.0))
        case "sequence_mean":
            rows = max(int(np.count_nonzero(lengths)), 1)
            return np.asarray(1.0 / (rows * np.maximum(lengths, 1.0)), dtype=np.float64)
        case "constant":
            return np.full(len(lengths), 1.0 / (max(len(lengths), 1) * max_tokens))
        case _:
            raise ValueError(f"objective.loss_aggregation: unknown value {aggregation!r}")
