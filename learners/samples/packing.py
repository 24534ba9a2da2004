"""Sequences with equal beginnings, packed into one row in which each beginning stands once.

A packed row is a tree of tokens: every token sees its own ancestors and nothing else, at the position that it has in
its sequence. So a causal model computes for every token what it computes in the sequence alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rlsys.sequences import common_prefix_length, order_key
from rlsys.types import Int32Array

Places = np.ndarray
BLOCK_QUERIES = 64
ALIKE = 0.7


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedRow:
    """One or more sequences in one row of L tokens.

    Attributes:
        token_ids: [L] int32.
        depths: [L] int64, position of every token in its sequences.
        places: for each sequence of T tokens, [T] int64: the index in the row of each of its tokens.
        shared: for each sequence, its number of leading tokens that stand in the row for an earlier one.
    """

    token_ids: Int32Array
    depths: np.ndarray
    places: tuple[Places, ...]
    shared: tuple[int, ...]

    @property
    def length(self) -> int:
        """Number of tokens, L."""
        return len(self.token_ids)


def pack(sequences: Sequence[Int32Array]) -> PackedRow:
    """Pack sequences into one row, in their lexicographic order.

    In that order, no earlier sequence has more tokens in common with one than the last.
    """
    parts: list[Int32Array] = []
    depths: list[np.ndarray] = []
    places: list[Places] = [_NOTHING] * len(sequences)
    shared = [0] * len(sequences)
    length, last = 0, -1
    for number in sorted(range(len(sequences)), key=lambda number: order_key(sequences[number])):
        sequence = sequences[number]
        common = common_prefix_length(sequence, sequences[last]) if parts else 0
        own = np.arange(length, length + len(sequence) - common)
        places[number] = np.concatenate([places[last][:common], own]) if common else own
        shared[number] = common
        parts.append(sequence[common:])
        depths.append(np.arange(common, len(sequence)))
        length, last = length + len(own), number
    return PackedRow(
        token_ids=np.concatenate(parts), depths=np.concatenate(depths), places=tuple(places), shared=tuple(shared)
    )


_NOTHING = np.zeros(0, dtype=np.int64)


@dataclass(frozen=True, slots=True, kw_only=True)
class Blocks:
    """S blocks of packed rows: each holds n neighbouring tokens of one sequence, and the T that they see.

    Attributes:
        queries: [S, n] int64, places of the tokens in the flattened rows.
        keys: [S, T] int64, places of the tokens of the sequence up to the end of the block.
        visible: [S, n, T] bool, which keys a query sees; None if queries and keys are the same tokens, which see all
            earlier ones. Padding sees the first key, because a softmax of nothing is NaN.
    """

    queries: Tensor
    keys: Tensor
    visible: Tensor | None


@dataclass(frozen=True, slots=True, kw_only=True)
class RowAttention:
    """The attention of packed rows, which costs about as much as that of the sequences alone.

    Attributes:
        blocks: blocks of similar lengths.
        order: [B * L] int64, the place of every token of the rows in the flattened queries of all blocks, one after the
            other; 0 for padding.
    """

    blocks: tuple[Blocks, ...]
    order: Tensor


Span = tuple[Places, int, int]  # the places of a sequence, and the range of its tokens that are queries


def attention_of(places: Sequence[Places], shared: Sequence[int], tokens: int) -> RowAttention:
    """Cut the tokens of packed rows into blocks.

    Args:
        places: for each sequence of all rows, the places of its tokens in the flattened rows.
        shared: for each sequence, its number of leading tokens that stand in its row for an earlier one.
        tokens: number of tokens of the rows with padding.
    """
    own = [(each, common) for each, common in zip(places, shared, strict=True) if len(each) > common]
    size = _block_size([len(each) - common for each, common in own if common])
    whole: list[Span] = [(each, 0, len(each)) for each, common in own if not common]
    parts: list[Span] = [
        (each, start, min(start + size, len(each)))
        for each, common in own
        if common
        for start in range(common, len(each), size)
    ]
    blocks, order, before = [], np.zeros(tokens, np.int64), 0
    for alike in [*_alike(whole), *_alike(parts)]:
        new = _blocks(alike)
        for number, (each, start, stop) in enumerate(alike):
            order[each[start:stop]] = before + number * new.queries.shape[1] + np.arange(stop - start)
        before += new.queries.numel()
        blocks.append(new)
    return RowAttention(blocks=tuple(blocks), order=torch.from_numpy(order))


def _blocks(spans: Sequence[Span]) -> Blocks:
    """Return blocks of spans, of which either all or none are whole sequences."""
    queries = _padded([each[start:stop] for each, start, stop in spans])
    if spans[0][1] == 0:
        return Blocks(queries=queries, keys=queries, visible=None)
    keys = _padded([each[:stop] for each, _, stop in spans])
    limits = _padded([np.arange(start, stop) for _, start, stop in spans])
    return Blocks(queries=queries, keys=keys, visible=torch.arange(keys.shape[1]) <= limits[:, :, None])


def _alike(spans: Sequence[Span]) -> list[list[Span]]:
    """Return spans in groups whose numbers of keys differ by no more than the share ALIKE."""
    groups: list[list[Span]] = []
    for span in sorted(spans, key=lambda span: -span[2]):
        if not groups or span[2] < ALIKE * groups[-1][0][2]:
            groups.append([])
        groups[-1].append(span)
    return groups


def _padded(rows: Sequence[np.ndarray]) -> Tensor:
    """Return rows of int64, padded with 0 to the length of the longest."""
    result = np.zeros((len(rows), max(map(len, rows))), np.int64)
    for number, row in enumerate(rows):
        result[number, : len(row)] = row
    return torch.from_numpy(result)


def _block_size(lengths: Sequence[int]) -> int:
    """Return the number of queries of a block for which the attention of sequences with these own tokens costs least.

    A block costs its queries, and about as much as BLOCK_QUERIES of them to bring its keys together.
    """
    if not lengths:
        return 1
    sizes = np.unique(lengths)
    blocks = -(-np.array(lengths)[None] // sizes[:, None])
    return int(sizes[np.argmin(blocks.sum(axis=1) * (sizes + BLOCK_QUERIES))])


@dataclass(frozen=True, slots=True, kw_only=True)
class PaddedRows:
    """B rows, padded to L tokens.

    Attributes:
        input_ids: [B, L] int64.
        depths: [B, L] int64, position of every token in its sequences, 0 for padding; None if no row is shared.
        attention: the attention of the rows; None if no row is shared.
        places: for each sequence of T tokens, [T] int64: the index of each of its tokens in the flattened input_ids.
    """

    input_ids: np.ndarray
    depths: np.ndarray | None
    attention: RowAttention | None
    places: tuple[Places, ...]


def pad_rows(rows: Sequence[PackedRow], pad_id: int) -> PaddedRows:
    """Pad rows to one length. Without rows, the result is one row of padding."""
    width = max([2, *(row.length for row in rows)])
    input_ids = np.full((max(1, len(rows)), width), pad_id, dtype=np.int64)
    depths = np.zeros(input_ids.shape, dtype=np.int64)
    for number, row in enumerate(rows):
        input_ids[number, : row.length] = row.token_ids
        depths[number, : row.length] = row.depths
    places = tuple(number * width + each for number, row in enumerate(rows) for each in row.places)
    if all(len(row.places) == 1 for row in rows):
        return PaddedRows(input_ids=input_ids, depths=None, attention=None, places=places)
    attention = attention_of(places, [common for row in rows for common in row.shared], input_ids.size)
    return PaddedRows(input_ids=input_ids, depths=depths, attention=attention, places=places)


def token_cost(length: int, width: int, *, packed: bool) -> float:
    """Return the cost of a token in tokens without attention.

    A token costs 24 width^2 operations of multiplication in a layer, and 4 width operations of attention for every
    token that it is compared with: all of its sequence in a packed row, and half of it in one with plain attention.

    Args:
        length: tokens of the sequence.
        width: hidden size of the model.
        packed: whether several sequences share the row.
    """
    return 1 + (length if packed else length / 2) / (6 * width)


@dataclass(frozen=True, slots=True)
class SharedRow:
    """Items that share a row.

    Attributes:
        items: their numbers.
        length: tokens of the row, or a few more.
    """

    items: list[int]
    length: int


def share_rows(items: Sequence[Sequence[Int32Array]], *, width: int, limit: int, longest: int) -> list[SharedRow]:
    """Choose the items that share a row, because that costs less than rows of their own.

    Args:
        items: sequences of every item; those of one item always share a row.
        width: hidden size of the model.
        limit: tokens of a row that several items share.
        longest: tokens of the longest sequence that shares a row.

    Returns:
        Rows in which every item occurs once.
    """
    rows: list[SharedRow] = []
    last = np.zeros(0, dtype=np.int32)
    for number in sorted(range(len(items)), key=lambda number: [order_key(each) for each in items[number]]):
        sequences = items[number]
        alone = pack(sequences).length if len(sequences) > 1 else len(sequences[0])
        length = max(map(len, sequences))
        own = alone - common_prefix_length(last, sequences[0])
        apart = alone * token_cost(length, width, packed=len(sequences) > 1)
        fits = rows and length <= longest and rows[-1].length + own <= limit
        if fits and own * token_cost(length, width, packed=True) < apart:
            rows[-1] = SharedRow([*rows[-1].items, number], rows[-1].length + own)
        else:
            rows.append(SharedRow([number], alone))
        last = sequences[-1]
    return rows
