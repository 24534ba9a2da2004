"""Probabilities of the nodes of correct chains under the policy and a teacher, and the chains that teach the most.

`rlsys score` writes them, one line for each tree:

    {"prompt_id": ..., "chains": {"12": {"policy": [...], "teacher": [...]}, ...}}

A chain is named by the number of its last node, and has one mean log-probability, in nats a token, for each node.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np

from rlsys.errors import ConfigError
from rlsys.files import read_records, write_text
from rlsys.search.extract import Chain
from rlsys.trees import ENVIRONMENT
from rlsys.types import Float32Array

Reader = Literal["policy", "teacher"]
READERS: tuple[Reader, ...] = ("policy", "teacher")


@dataclass(frozen=True, slots=True)
class ChainScores:
    """Mean log-probability of each node of a chain, nats a token."""

    policy: Sequence[float]
    teacher: Sequence[float]

    @property
    def divergence(self) -> float:
        """Mean over the nodes of max(0, P_T - P_S).

        P is the geometric mean of the probabilities of a node's tokens. The mean is large for chains with many nodes
        that the teacher finds probable and the policy does not.
        Source: divergence-aware sampling, DASD, arXiv:2601.09088, which counts such sentences.
        """
        gaps = np.exp(np.asarray(self.teacher)) - np.exp(np.asarray(self.policy))
        return float(np.maximum(gaps, 0).mean())


def node_means(chain: Chain, logprobs: Float32Array) -> list[float]:
    """Return the mean log-probability of each node of a chain; 0 for replies of an environment, which no model chose.

    Args:
        chain: the chain, of T tokens.
        logprobs: [T - 1] nats, of each token after the first.
    """
    ends = [chain.prompt_length, *(end for end, _, _ in chain.nodes)]
    sums = np.concatenate([np.zeros(1), np.cumsum(logprobs, dtype=np.float64)])
    means = [float((sums[stop - 1] - sums[start - 1]) / max(1, stop - start)) for start, stop in pairwise(ends)]
    return [0.0 if kind == ENVIRONMENT else mean for mean, (_, _, kind) in zip(means, chain.nodes, strict=True)]


def write_scores(path: Path, trees: Iterable[tuple[str, Mapping[int, ChainScores]]]) -> None:
    """Write the scores of trees, named by their prompts."""
    lines = [
        json.dumps(
            {
                "prompt_id": prompt_id,
                "chains": {
                    str(number): {name: [round(value, 6) for value in getattr(scores, name)] for name in READERS}
                    for number, scores in chains.items()
                },
            }
        )
        for prompt_id, chains in trees
    ]
    write_text(path, "".join(f"{line}\n" for line in lines))


class ScoreFile:
    """The scores that `rlsys score` has written for a search.

    Raises:
        ConfigError: the file is missing.
        DamagedFileError: a line is damaged.
    """

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            raise ConfigError(
                f"extract.supervised divergence needs {path}: run `rlsys score {path.parent} TEACHER` first"
            )
        self._path = path
        expected = "prompt_id, and chains with a list of numbers for policy and teacher"
        self._chains = {row["prompt_id"]: row["chains"] for row in read_records(path, _is_valid, expected)}

    def divergences(self, prompt_id: str, chains: Sequence[Chain]) -> dict[int, float]:
        """Return the divergence of each chain of a tree, by the number of its last node.

        Raises:
            ConfigError: a chain has no scores, or those of other nodes.
        """
        known, by_number = self._chains.get(prompt_id, {}), {}
        for chain in chains:
            scores = known.get(str(chain.number))
            if scores is None or any(len(scores[name]) != len(chain.nodes) for name in READERS):
                raise ConfigError(
                    f"{self._path}: expected scores of {len(chain.nodes)} nodes of the chain {chain.number} of "
                    f"{prompt_id}, found {'none' if scores is None else 'others'}: run `rlsys score` again"
                )
            by_number[chain.number] = ChainScores(scores["policy"], scores["teacher"]).divergence
        return by_number


def _is_valid(row: Any) -> bool:
    if (
        not isinstance(row, dict)
        or not isinstance(row.get("prompt_id"), str)
        or not isinstance(row.get("chains"), dict)
    ):
        return False
    return all(
        isinstance(scores, dict) and all(map(_is_list, map(scores.get, READERS))) for scores in row["chains"].values()
    )


def _is_list(values: Any) -> bool:
    return isinstance(values, list) and all(isinstance(value, float | int) for value in values)
