"""Sequences with equal beginnings, packed into one row in which each beginning stands once.

A packed row is a tree of tokens: every token sees its own ancestors and nothing else, at the position that it has in
its sequence. So a causal model computes for every token what it computes in the sequence alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rlsys.sequences import common_prefix_length
from rlsys.types import BoolArray, Int32Array

Places = np.ndarray


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedRow:
    """One or more sequences in one row of L tokens.

    Attributes:
        token_ids: [L] int32.
        depths: [L] int64, position of every token in its sequences.
        places: for each sequence of T tokens, [T] int64: the index in the row of each of its tokens.
    """

    token_ids: Int32Array
    depths: np.ndarray
    places: tuple[Places, ...]

    @property
    def length(self) -> int:
        """Number of tokens, L."""
        return len(self.token_ids)

    def visible(self) -> BoolArray:
        """Return [L, L] bool: whether the token of the first index sees the token of the second."""
        seen = np.zeros((self.length, self.length), dtype=np.bool_)
        for places in self.places:
            seen[np.ix_(places, places)] |= np.tri(len(places), dtype=np.bool_)
        return seen


def pack(sequences: Sequence[Int32Array]) -> PackedRow:
    """Pack sequences into one row. A sequence shares tokens with the earlier one that has most of them in common."""
    parts: list[Int32Array] = []
    depths: list[np.ndarray] = []
    places: list[Places] = []
    length = 0
    for sequence in sequences:
        common, source = max(
            ((common_prefix_length(sequence, other), -number) for number, other in enumerate(sequences[: len(places)])),
            default=(0, 0),
        )
        own = np.arange(length, length + len(sequence) - common)
        places.append(np.concatenate([places[-source][:common], own]) if common else own)
        parts.append(sequence[common:])
        depths.append(np.arange(common, len(sequence)))
        length += len(own)
    return PackedRow(token_ids=np.concatenate(parts), depths=np.concatenate(depths), places=tuple(places))


@dataclass(frozen=True, slots=True, kw_only=True)
class PaddedRows:
    """B rows, padded to L tokens.

    Attributes:
        input_ids: [B, L] int64.
        depths: [B, L] int64, position of every token in its sequences, 0 for padding; None if no row is shared.
        visible: [B, L, L] bool, the tokens that each token sees; None if no row is shared.
        places: for each sequence of T tokens, [T] int64: the index of each of its tokens in the flattened input_ids.
    """

    input_ids: np.ndarray
    depths: np.ndarray | None
    visible: BoolArray | None
    places: tuple[Places, ...]


def pad_rows(rows: Sequence[PackedRow], pad_id: int) -> PaddedRows:
    """Pad rows to one length. Without rows, the result is one row of padding."""
    width = max([2, *(row.length for row in rows)])
    input_ids = np.full((max(1, len(rows)), width), pad_id, dtype=np.int64)
    depths = visible = None
    if any(len(row.places) > 1 for row in rows):
        depths = np.zeros(input_ids.shape, dtype=np.int64)
        # Padding sees itself, because a softmax of nothing is NaN.
        visible = np.repeat(np.eye(width, dtype=np.bool_)[None], len(rows), axis=0)
    for number, row in enumerate(rows):
        input_ids[number, : row.length] = row.token_ids
        if depths is not None and visible is not None:
            depths[number, : row.length] = row.depths
            visible[number, : row.length, : row.length] = row.visible()
    places = tuple(number * width + each for number, row in enumerate(rows) for each in row.places)
    return PaddedRows(input_ids=input_ids, depths=depths, visible=visible, places=places)


def row_cost(length: int, width: int, *, packed: bool) -> float:
    """Return the cost of a row in tokens without attention.

    A token costs 24 width^2 operations of multiplication in a layer, and 4 width operations of attention for every
    token that it is compared with: all of a packed row, and half of a row with plain causal attention.

    Args:
        length: tokens of the row.
        width: hidden size of the model.
        packed: whether several sequences share the row.
    """
    compared = length if packed else length / 2
    return length * (1 + compared / (6 * width))


def share_rows(items: Sequence[Sequence[Int32Array]], *, width: int, limit: int) -> list[list[int]]:
    """Choose the items that share a row, because that costs less than rows of their own.

    Args:
        items: sequences of every item; those of one item always share a row.
        width: hidden size of the model.
        limit: tokens of a row that several items share.

    Returns:
        Item numbers of every row, so that every number occurs once.
    """
    order = sorted(
        range(len(items)), key=lambda number: [sequence.astype(">i4").tobytes() for sequence in items[number]]
    )
    rows: list[list[int]] = []
    length, last = 0, np.zeros(0, dtype=np.int32)
    for number in order:
        alone = pack(items[number]).length
        common = min(common_prefix_length(last, items[number][0]), alone)
        together = length + alone - common
        apart = row_cost(length, width, packed=True) + row_cost(alone, width, packed=len(items[number]) > 1)
        if rows and common and together <= limit and row_cost(together, width, packed=True) < apart:
            rows[-1].append(number)
            length = together
        else:
            rows.append([number])
            length = alone
        last = items[number][-1]
    return rows
