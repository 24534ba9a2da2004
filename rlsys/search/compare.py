"""Search against independent samples at inference: solved at least once, by answers and by generated tokens.

A prompt counts as solved from its first right answer on. Only generated tokens are counted: of a tree all of them,
whatever became of them (discarded branches, merged duplicates, another model's nodes), in the order in which it asked
for them; of samples all of theirs, in the order of the samples. What is under way beside an answer counts after it in
both. What a search puts into a chain itself, and prompts, are not generated.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rlsys.stats import Estimate, mean_difference, mean_over_prompts
from rlsys.trees import Tree, TreeFailure
from rlsys.types import BoolArray, Trajectory

COUNTS = (1, 2, 4, 8, 16, 32)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Attempts:
    """The answers to one prompt, A of them, in the order in which they came.

    right: [A] bool.
    tokens: [A] int64, ascending: generated for this prompt until the answer was there.
    total: generated for this prompt, all told.
    """

    right: BoolArray
    tokens: NDArray[np.int64]
    total: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Solved shares of the same prompts with as many answers, or as many tokens.

    difference: search minus samples, paired.
    ended: share of the prompts whose search ended unsolved with less; more of it might have solved them.
    """

    search: Estimate
    samples: Estimate
    difference: Estimate
    ended: float


def tree_attempts(tree: Tree | TreeFailure) -> Attempts:
    """The scored answers of a tree; none where there is no tree."""
    if isinstance(tree, TreeFailure):
        return _attempts([], [], 0)
    nodes = [tree.nodes[number] for number in tree.answers()]
    return _attempts([node.correct for node in nodes], [node.scored_tokens for node in nodes], tree.tokens)


def sample_attempts(trajectories: Sequence[Trajectory]) -> Attempts:
    """Independent samples of one prompt; one without an answer is an attempt as well."""
    tokens = np.cumsum([t.completion_length for t in trajectories], dtype=np.int64)
    right = [t.outcome == "ok" and t.reward > 0 for t in trajectories]
    return _attempts(right, tokens, int(tokens[-1]) if len(tokens) else 0)


def _attempts(right: Sequence[bool], tokens: Sequence[int] | NDArray[np.int64], total: int) -> Attempts:
    return Attempts(right=np.array(right, dtype=bool), tokens=np.array(tokens, dtype=np.int64), total=total)


def solved_in_answers(attempts: Sequence[Attempts], counts: Sequence[int]) -> BoolArray:
    """[prompts, counts] bool: whether one of the first so many answers is right (Test@N)."""
    return _first(attempts, [np.arange(1, len(found.right) + 1) for found in attempts]) <= np.array(counts)


def solved_in_tokens(attempts: Sequence[Attempts], budgets: Sequence[int]) -> BoolArray:
    """[prompts, budgets] bool: whether a right answer was there before more than so many tokens were generated."""
    return _first(attempts, [found.tokens for found in attempts]) <= np.array(budgets)


def _first(attempts: Sequence[Attempts], places: Sequence[NDArray[np.int64]]) -> NDArray[np.float64]:
    """[prompts, 1] place of the first right answer, infinity where there is none."""
    firsts = [place[found.right] for found, place in zip(attempts, places, strict=True)]
    return np.array([[first[0] if len(first) else np.inf] for first in firsts]).reshape(-1, 1)


def answer_counts(most: int) -> list[int]:
    """The N of Test@N up to `most`, itself included."""
    return sorted({count for count in (*COUNTS, most) if count <= most})


def token_budgets(search: Sequence[Attempts], parts: Sequence[float] = (1 / 8, 1 / 4, 1 / 2, 1)) -> list[int]:
    """Parts of as many tokens as nine in ten trees generated at least; beyond that too many searches have ended."""
    top = float(np.quantile([found.total for found in search], 0.1, method="lower"))
    return sorted({max(1, int(top * part)) for part in parts})


def compare_answers(
    search: Sequence[Attempts], samples: Sequence[Attempts], counts: Sequence[int]
) -> dict[int, Comparison]:
    """Test@N of both by N. samples: of every prompt at least as many as the largest N."""
    first, second = solved_in_answers(search, counts), solved_in_answers(samples, counts)
    ended = np.array([[len(found.right)] for found in search]) < np.array(counts)
    return {count: _compare(first[:, i], second[:, i], ended[:, i]) for i, count in enumerate(counts)}


def compare_tokens(
    search: Sequence[Attempts], samples: Sequence[Attempts], budgets: Sequence[int]
) -> dict[int, Comparison]:
    """Solved shares by tokens per prompt. samples: of every unsolved prompt enough for the largest budget."""
    first, second = solved_in_tokens(search, budgets), solved_in_tokens(samples, budgets)
    ended = np.array([[found.total] for found in search]) < np.array(budgets)
    return {budget: _compare(first[:, i], second[:, i], ended[:, i]) for i, budget in enumerate(budgets)}


def _compare(search: BoolArray, samples: BoolArray, ended: BoolArray) -> Comparison:
    return Comparison(
        search=mean_over_prompts(search[:, None]),
        samples=mean_over_prompts(samples[:, None]),
        difference=mean_difference(search, samples),
        ended=float((ended & ~search).mean()),
    )
