"""Comparisons of token sequences, and values along them."""

from __future__ import annotations

import numpy as np

from rlsys.types import BoolArray, Float32Array, Int32Array, TeacherTokens


def common_prefix_length(first: Int32Array, second: Int32Array) -> int:
    """Return the length of the longest common prefix of two token sequences, in tokens."""
    length = min(len(first), len(second))
    differing = np.flatnonzero(first[:length] != second[:length])
    return int(differing[0]) if len(differing) else length


def order_key(sequence: Int32Array) -> bytes:
    """Return a key by which sequences sort in lexicographic order. No id is negative."""
    return sequence.astype(">i4").tobytes()


def teacher_tokens(loss_mask: BoolArray, ids: Int32Array, logprobs: Float32Array) -> TeacherTokens:
    """Return the scores of a sequence of T tokens, whose first token nothing predicts.

    Args:
        loss_mask: [T], the tokens to be trained.
        ids: [T - 1, K] tokens after each prefix.
        logprobs: [T - 1, K] nats, of these tokens.
    """
    mask = loss_mask.copy()
    mask[0] = False
    first = np.zeros((1, ids.shape[1]))
    return TeacherTokens(
        mask=mask,
        ids=np.concatenate([first.astype(np.int32), ids]),
        logprobs=np.concatenate([first.astype(np.float32), logprobs]),
    )
