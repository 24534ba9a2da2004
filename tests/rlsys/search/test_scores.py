"""Scores of chains under the policy and a teacher, and the chain that teaches the most. By hand."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from tree_samples import CharCodec, answer, node, tree

from rlsys.config.search import ExtractConfig
from rlsys.errors import ConfigError, DamagedFileError
from rlsys.search.extract import correct_chains
from rlsys.search.scores import ChainScores, ScoreFile, node_means, write_scores
from rlsys.search.supervised import supervised_rows
from rlsys.trees import Tree

CODEC = CharCodec()
HALF, QUARTER = math.log(0.5), math.log(0.25)
RULE = ExtractConfig(supervised="divergence")


def two() -> Tree:
    """Return a tree with the right chains abX (number 2) and cY (number 4), and a wrong one."""
    return tree(
        node(0, "ab"),
        answer(1, "X", "ok"),
        node(0, "c"),
        answer(3, "Y", "ok"),
        answer(3, "Z", "wrong"),
        prompt_id="one",
    )


def test_the_means_of_nodes_by_hand() -> None:
    # ^ q a b X $: five log-probabilities, of q, a, b, X and $. Node ab: (-1 - 3) / 2; the answer X: -5, without $.
    (chain, *_) = correct_chains(two(), CODEC)
    assert chain.number == 2
    assert node_means(chain, np.array([-9, -1, -3, -5, -7], dtype=np.float32)) == [-2.0, -5.0]


def test_the_divergence_by_hand() -> None:
    # Gaps 0.5 - 0.25 and 0.25 - 1, which counts as 0: the mean is 0.125.
    assert ChainScores([QUARTER, 0.0], [HALF, QUARTER]).divergence == pytest.approx(0.125, rel=1e-12)
    assert ChainScores([HALF, HALF], [HALF, QUARTER]).divergence == 0


def scored(path: Path, first: ChainScores, second: ChainScores) -> ScoreFile:
    write_scores(path, [("one", {2: first, 4: second})])
    return ScoreFile(path)


def test_the_chain_with_more_nodes_that_the_teacher_prefers_is_trained(tmp_path: Path) -> None:
    known, new = ChainScores([HALF, HALF], [HALF, HALF]), ChainScores([QUARTER, HALF], [HALF, HALF])
    for scores, text in (((known, new), "cY"), ((new, known), "abX"), ((known, known), "abX")):
        (row,) = supervised_rows(two(), RULE, CODEC, scored(tmp_path / "scores.jsonl", *scores))
        assert row.text == text  # of equals, that with the smaller ids
    wrong = tree(answer(0, "X", "wrong"), prompt_id="one")
    assert supervised_rows(wrong, RULE, CODEC, scored(tmp_path / "scores.jsonl", known, new)) == []


def test_scores_that_are_missing_or_of_other_trees(tmp_path: Path) -> None:
    path = tmp_path / "scores.jsonl"
    with pytest.raises(ConfigError, match=r"divergence needs .*scores\.jsonl: run `rlsys score .* TEACHER` first"):
        ScoreFile(path)
    short = ChainScores([HALF], [HALF])
    scores = scored(path, short, short)
    with pytest.raises(ConfigError, match=r"2 nodes of the chain 2 of one, found others: run `rlsys score` again"):
        supervised_rows(two(), RULE, CODEC, scores)
    write_scores(path, [("another", {})])
    with pytest.raises(ConfigError, match=r"of the chain 2 of one, found none: run `rlsys score` again"):
        supervised_rows(two(), RULE, CODEC, ScoreFile(path))


@pytest.mark.parametrize(
    "row",
    [
        [],
        {"chains": {}},
        {"prompt_id": "a", "chains": []},
        {"prompt_id": "a", "chains": {"1": {"policy": [0.5]}}},
        {"prompt_id": "a", "chains": {"1": {"policy": [0.5], "teacher": ["x"]}}},
    ],
)
def test_a_damaged_line_is_named(tmp_path: Path, row: object) -> None:
    path = tmp_path / "scores.jsonl"
    path.write_text(json.dumps({"prompt_id": "b", "chains": {}}) + "\n" + json.dumps(row) + "\n")
    with pytest.raises(DamagedFileError, match=r"scores\.jsonl:2: expected prompt_id"):
        ScoreFile(path)
