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
BLOCK_QUERIES = 64


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


def order_key(sequence: Int32Array) -> bytes:
    """Return a key by which sequences sort in lexicographic order."""
    return sequence.astype(">i4").tobytes()


@dataclass(frozen=True, slots=True, kw_only=True)
class Blocks:
    """The attention of packed rows as S blocks, each n neighbouring tokens of one sequence and the T that they see.

    The cost is that of the sequences alone, also where many of them share a row.

    Attributes:
        queries: [S, n] int64, places of the tokens in the flattened rows.
        keys: [S, T] int64, places of the tokens of the sequence up to the end of the block.
        visible: [S, n, T] bool, which keys a query sees. Padding sees the first one, because a softmax of nothing is
            NaN.
        order: [B * L] int64, the place in the flattened queries of every token of the rows; 0 for padding.
    """

    queries: np.ndarray
    keys: np.ndarray
    visible: BoolArray
    order: np.ndarray


def blocks_of(places: Sequence[Places], shared: Sequence[int], tokens: int) -> Blocks:
    """Cut the tokens of packed rows into blocks.

    Args:
        places: for each sequence of all rows, the places of its tokens in the flattened rows.
        shared: for each sequence, its number of leading tokens that stand in its row for an earlier one.
        tokens: number of tokens of the rows with padding.
    """
    size = _block_size([len(each) - common for each, common in zip(places, shared, strict=True)])
    spans = [
        (each, start, min(start + size, len(each)))
        for each, common in zip(places, shared, strict=True)
        for start in range(common, len(each), size)
    ]
    longest = max(stop for _, _, stop in spans)
    queries, keys = np.zeros((len(spans), size), np.int64), np.zeros((len(spans), longest), np.int64)
    limits, order = np.zeros((len(spans), size), np.int64), np.zeros(tokens, np.int64)
    for number, (each, start, stop) in enumerate(spans):
        queries[number, : stop - start] = each[start:stop]
        keys[number, :stop] = each[:stop]
        limits[number, : stop - start] = np.arange(start, stop)
        order[each[start:stop]] = number * size + np.arange(stop - start)
    return Blocks(queries=queries, keys=keys, visible=np.arange(longest) <= limits[:, :, None], order=order)


def _block_size(lengths: Sequence[int]) -> int:
    """Return the number of queries of a block for which the attention of sequences with these own tokens costs least.

    A block costs its queries, and about as much as BLOCK_QUERIES of them to bring its keys together.
    """
    counts = np.array([length for length in lengths if length])
    sizes = np.unique(counts)
    blocks = -(-counts[None] // sizes[:, None])
    return int(sizes[np.argmin(blocks.sum(axis=1) * (sizes + BLOCK_QUERIES))])


@dataclass(frozen=True, slots=True, kw_only=True)
class PaddedRows:
    """B rows, padded to L tokens.

    Attributes:
        input_ids: [B, L] int64.
        depths: [B, L] int64, position of every token in its sequences, 0 for padding; None if no row is shared.
        blocks: the attention of the rows; None if no row is shared.
        places: for each sequence of T tokens, [T] int64: the index of each of its tokens in the flattened input_ids.
    """

    input_ids: np.ndarray
    depths: np.ndarray | None
    blocks: Blocks | None
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
        return PaddedRows(input_ids=input_ids, depths=None, blocks=None, places=places)
    blocks = blocks_of(places, [common for row in rows for common in row.shared], input_ids.size)
    return PaddedRows(input_ids=input_ids, depths=depths, blocks=blocks, places=places)


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


def share_rows(items: Sequence[Sequence[Int32Array]], *, width: int, limit: int) -> list[SharedRow]:
    """Choose the items that share a row, because that costs less than rows of their own.

    Args:
        items: sequences of every item; those of one item always share a row.
        width: hidden size of the model.
        limit: tokens of a row that several items share.

    Returns:
        Rows in which every item occurs once.
    """
    rows: list[SharedRow] = []
    last = np.zeros(0, dtype=np.int32)
    for number in sorted(range(len(items)), key=lambda number: [order_key(each) for each in items[number]]):
        sequences = items[number]
        alone = pack(sequences).length if len(sequences) > 1 else len(sequences[0])
        longest = max(map(len, sequences))
        own = alone - common_prefix_length(last, sequences[0])
        apart = alone * token_cost(longest, width, packed=len(sequences) > 1)
        if rows and rows[-1].length + own <= limit and own * token_cost(longest, width, packed=True) < apart:
            rows[-1] = SharedRow([*rows[-1].items, number], rows[-1].length + own)
        else:
            rows.append(SharedRow([number], alone))
        last = sequences[-1]
    return rows
