"""Sequences that share a row: what each token sees, and which items share one."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from joint_samples import ids

from learners.samples.packing import PackedRow, RowAttention, attention_of, pack, pad_rows, share_rows, token_cost


def seen(attention: RowAttention, padding: Sequence[int] = ()) -> np.ndarray:
    """Return [B * L, B * L] bool, whether the first token sees the second."""
    tokens = len(attention.order)
    result = np.zeros((tokens, tokens), dtype=np.bool_)
    queries, keys = [], []  # of all blocks, one after the other
    for blocks in attention.blocks:
        size = blocks.queries.shape[1]
        visible = np.tri(size, dtype=np.bool_)[None] if blocks.visible is None else blocks.visible.numpy()
        assert blocks.visible is not None or blocks.keys is blocks.queries
        queries += blocks.queries.flatten().tolist()
        for number, places in enumerate(blocks.keys.numpy()):
            keys += [places[sees] for sees in visible[min(number, len(visible) - 1)]]
    for token, place in enumerate(attention.order.tolist()):
        assert token in padding or queries[place] == token
        result[token, keys[place]] = True
    return result


def attention_in(row: PackedRow) -> RowAttention:
    return attention_of(row.places, row.shared, row.length)


def test_a_row_by_hand() -> None:
    row = pack([ids(1, 2, 3), ids(1, 2, 4, 5), ids(1, 2, 4, 6), ids(9, 2)])
    assert row.token_ids.tolist() == [1, 2, 3, 4, 5, 6, 9, 2]
    assert row.depths.tolist() == [0, 1, 2, 2, 3, 3, 0, 1]
    assert [places.tolist() for places in row.places] == [[0, 1, 2], [0, 1, 3, 4], [0, 1, 3, 5], [6, 7]]
    assert row.shared == (0, 2, 3, 0)
    assert seen(attention_in(row)).astype(int).tolist() == [
        [1, 0, 0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0, 0, 0],
        [1, 1, 0, 1, 0, 0, 0, 0],
        [1, 1, 0, 1, 1, 0, 0, 0],
        [1, 1, 0, 1, 0, 1, 0, 0],
        [0, 0, 0, 0, 0, 0, 1, 0],
        [0, 0, 0, 0, 0, 0, 1, 1],
    ]


def test_equal_sequences_and_prefixes_take_no_room() -> None:
    row = pack([ids(1, 2, 3), ids(1, 2, 3), ids(1, 2)])
    assert row.length == 3
    assert [places.tolist() for places in row.places] == [[0, 1, 2], [0, 1, 2], [0, 1]]
    assert row.shared == (2, 3, 0) and [len(each.queries) for each in attention_in(row).blocks] == [1, 1]


@pytest.mark.parametrize("seed", range(20))
def test_every_sequence_can_be_read_from_its_row(seed: int) -> None:
    draw = np.random.default_rng(seed)
    sequences = [draw.integers(0, 2, draw.integers(1, 9)).astype(np.int32) for _ in range(8)]
    row = pack(sequences)
    visible = seen(attention_in(row))
    for sequence, places in zip(sequences, row.places, strict=True):
        assert row.token_ids[places].tolist() == sequence.tolist()
        assert row.depths[places].tolist() == list(range(len(sequence)))
        for at, place in enumerate(places):
            assert np.flatnonzero(visible[place]).tolist() == sorted(places[: at + 1].tolist())


def test_blocks_are_as_long_as_completions_and_not_as_prompts() -> None:
    """The tokens compared are about those of the sequences alone, not those of the whole row squared."""
    prompt = np.full(256, 3, dtype=np.int32)
    row = pack([np.concatenate([prompt, np.full(256, n, dtype=np.int32)]) for n in range(8)])
    whole, parts = attention_in(row).blocks
    assert row.length == 9 * 256
    assert whole.queries.shape == (1, 512) and whole.visible is None
    assert parts.queries.shape == (7, 256) and parts.keys.shape == (7, 512)


def test_a_long_sequence_does_not_make_the_blocks_of_short_ones_longer() -> None:
    draw = np.random.default_rng(0)
    prompt, lengths = draw.integers(0, 9, 20), (*[30] * 6, 1000)
    row = pack([np.concatenate([prompt, draw.integers(0, 9, length)]).astype(np.int32) for length in lengths])
    attention = attention_in(row)
    assert sum(each.queries.shape[0] * each.keys.shape[1] ** 2 for each in attention.blocks) < 1.2 * 1020**2 * 34
    assert max(each.keys.shape[1] for each in attention.blocks if len(each.queries) == 6) == 50


def test_padded_rows_by_hand() -> None:
    rows = pad_rows([pack([ids(1, 2, 3), ids(1, 2, 4)]), pack([ids(5, 6)])], 9)
    assert rows.input_ids.tolist() == [[1, 2, 3, 4], [5, 6, 9, 9]]
    assert rows.attention is not None and rows.depths is not None
    assert rows.depths.tolist() == [[0, 1, 2, 2], [0, 1, 0, 0]]
    assert seen(rows.attention, padding=[6, 7])[:6].astype(int).tolist() == [
        [1, 0, 0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0, 0, 0],
        [1, 1, 0, 1, 0, 0, 0, 0],
        [0, 0, 0, 0, 1, 0, 0, 0],
        [0, 0, 0, 0, 1, 1, 0, 0],
    ]
    masks = [each.visible for each in rows.attention.blocks if each.visible is not None]
    assert len(masks) == 1 and masks[0].any(dim=2).all(), "a softmax of nothing is NaN"


def test_rows_of_one_sequence_have_no_blocks() -> None:
    rows = pad_rows([pack([ids(1, 2, 3)]), pack([ids(5)])], 9)
    assert (rows.attention, rows.depths) == (None, None)
    assert pad_rows([], 9).input_ids.tolist() == [[9, 9]]


def test_groups_share_rows_and_strangers_do_not() -> None:
    prompts = [np.full(40, prompt, dtype=np.int32) for prompt in (3, 4)]
    chains = [np.concatenate([prompts[n % 2], ids(n, n + 1)]) for n in range(8)]
    alone = np.arange(30, dtype=np.int32)
    rows = share_rows([[chain] for chain in chains] + [[alone]], width=64, limit=1000, longest=100)
    assert [(sorted(row.items), row.length) for row in rows] == [([8], 30), ([0, 2, 4, 6], 48), ([1, 3, 5, 7], 48)]


def test_a_row_stays_within_its_limit_and_items_stay_whole() -> None:
    prompt = np.full(40, 3, dtype=np.int32)
    pairs = [[np.concatenate([prompt, ids(n, side)]) for side in (1, 2)] for n in range(10, 16)]
    rows = share_rows(pairs, width=1000, limit=46, longest=100)
    assert sorted(number for row in rows for number in row.items) == list(range(6))
    assert [len(row.items) for row in rows] == [2, 2, 2]  # 40 + 2 * 3 tokens
    assert [len(row.items) for row in share_rows(pairs, width=1000, limit=10, longest=100)] == [1] * 6


def test_sequences_with_little_in_common_do_not_share() -> None:
    """Attention to tokens that are not visible would cost more than the shared beginning saves."""
    common = np.full(10, 3, dtype=np.int32)
    chains = [[np.concatenate([common, np.full(400, n, dtype=np.int32)])] for n in range(10, 18)]
    assert len(share_rows(chains, width=64, limit=100_000, longest=1000)) == 8
    assert len(share_rows(chains, width=4096, limit=100_000, longest=1000)) == 1


def test_sequences_whose_mask_would_be_large_do_not_share() -> None:
    prompt = np.full(40, 3, dtype=np.int32)
    chains = [[np.concatenate([prompt, ids(*[n] * length)])] for length in (10, 61) for n in range(4, 8)]
    rows = share_rows(chains, width=1000, limit=1000, longest=100)
    assert max(len(row.items) for row in rows) > 1
    # The first sequence of a row needs no mask.
    assert all(len(chains[number][0]) <= 100 for row in rows for number in row.items[1:])


def test_costs_by_hand() -> None:
    assert token_cost(600, 100, packed=True) == 2
    assert token_cost(600, 100, packed=False) == 1.5
    assert token_cost(0, 100, packed=True) == 1
