"""Data of trees with replies of an environment: no row of any table trains their tokens."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from tree_samples import END, PROMPT, CharCodec, answer, node, tree

from rlsys.config.search import ExtractConfig
from rlsys.search.extract import correct_chains, preference_pairs, step_preferences, step_values
from rlsys.search.outline import outline
from rlsys.search.scores import node_means
from rlsys.search.step_chains import step_chains
from rlsys.search.supervised import supervised_rows
from rlsys.trees import ENVIRONMENT, Tree

CODEC = CharCodec()
REPLIES = "0123456789"


def played() -> Tree:
    """Return a tree whose replies are digits, and nothing else is."""
    return tree(
        node(0, "aa", "tool"),
        node(1, "12", ENVIRONMENT, forced=2),
        node(2, "b", "tool"),
        node(3, "345", ENVIRONMENT, forced=3),
        answer(4, "X", "ok", samples=4),
        answer(4, "y", "wrong", samples=4),
        node(2, "cc"),  # 7
        answer(7, "z", "wrong", samples=8),
    )


def letters(token_ids: np.ndarray, mask: np.ndarray | None = None) -> str:
    chosen = token_ids if mask is None else token_ids[mask]
    return "".join({PROMPT: "^", END: "$"}.get(token, chr(token)) for token in chosen.tolist())


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, ["aabX$"]),
        ({"supervised_nodes": ("tool",)}, ["aab"]),
        ({"supervised_nodes": ("tool", ENVIRONMENT)}, ["aab"]),
        ({"supervised_nodes": (ENVIRONMENT, "answer"), "supervised_rows": "node"}, ["X$"]),
        ({"supervised_rows": "node"}, ["aa", "b", "X$"]),
    ],
)
def test_supervised_rows(settings: dict[str, Any], expected: list[str]) -> None:
    rows = supervised_rows(played(), ExtractConfig(**settings), CODEC)
    assert [letters(row.token_ids, row.loss_mask) for row in rows] == expected
    assert letters(rows[-1].token_ids)[: len("^qaa12b345")] == "^qaa12b345"[: len(rows[-1].token_ids)]


def test_replies_alone_give_no_supervised_row() -> None:
    assert supervised_rows(played(), ExtractConfig(supervised_nodes=(ENVIRONMENT,)), CODEC) == []


def test_pairs_of_chains() -> None:
    config = ExtractConfig(pairs_per_tree=2, pairs="longest_prefix")
    for pair in preference_pairs(played(), config, CODEC):
        for token_ids, mask in ((pair.chosen_ids, pair.chosen_mask), (pair.rejected_ids, pair.rejected_mask)):
            assert mask is not None
            left = letters(token_ids, ~mask)
            assert left and set(left) <= set(REPLIES) and not set(letters(token_ids, mask)) & set(REPLIES)


def test_pairs_of_nodes_are_of_the_policy() -> None:
    pairs = step_preferences(played(), ExtractConfig(step_min_visits=1), CODEC)
    assert [(letters(pair.chosen_ids), letters(pair.rejected_ids)) for pair in pairs] == [("b", "cc"), ("X", "y")]
    assert letters(pairs[1].prefix_ids) == "^qaa12b345"


def test_values_of_steps() -> None:
    chains = step_chains(step_values(played(), CODEC))
    trained = [letters(chain.steps[-1].token_ids, chain.loss_mask) for chain in chains]
    assert sorted(trained) == ["aabX", "ccz", "y"]
    types = {step.type: letters(step.token_ids[step.start :]) for step in chains[0].steps}
    assert types == {"tool": "b", ENVIRONMENT: "345", "answer": "X"}


def test_the_value_and_scores_of_a_chain_are_those_of_its_thoughts() -> None:
    [chain] = correct_chains(played(), CODEC)
    # Of 16 chains below aa 4 are right, of 8 below b 4, and all that end at X: (0.25 + 0.5 + 1) / 3.
    assert chain.value == pytest.approx((0.25 + 0.5 + 1) / 3, rel=1e-12)
    means = node_means(chain, -np.arange(len(chain.token_ids) - 1, dtype=np.float32))
    assert [mean == 0 for mean in means] == [kind == ENVIRONMENT for _, _, kind in chain.nodes]


def test_a_reply_is_shown_by_its_type() -> None:
    assert "environment, value 0.25 of 16" in outline(played())
