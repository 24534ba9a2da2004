"""Comparison of search with independent samples at inference: shares solved, by answers and by generated tokens.

A prompt is solved once it has one right answer. Only generated tokens count, not prompts or the tokens that the search
puts into a chain. A tree counts all its tokens in the order of its requests, including discarded branches, merged
duplicates and nodes of another model. Samples count all their tokens in the order of the samples. In both, tokens of
requests that are still running when an answer arrives count after this answer.
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
    """A answers to one prompt in the order of their arrival.

    Attributes:
        right: [A] bool.
        tokens: [A] int64, ascending: tokens generated for the prompt until the answer arrived.
        total: All tokens generated for the prompt.
    """

    right: BoolArray
    tokens: NDArray[np.int64]
    total: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Solved shares of search and samples for the same prompts and the same budget of answers or tokens.

    Attributes:
        search: Share that the search solved.
        samples: Share that the samples solved.
        difference: Search minus samples, paired by prompt.
        ended: Share of the prompts whose search ended unsolved before it had used the budget.
    """

    search: Estimate
    samples: Estimate
    difference: Estimate
    ended: float


def tree_attempts(tree: Tree | TreeFailure) -> Attempts:
    """Return the scored answers of a tree; a failed tree has none."""
    if isinstance(tree, TreeFailure):
        return _attempts([], [], 0)
    nodes = [tree.nodes[number] for number in tree.answers()]
    return _attempts([node.correct for node in nodes], [node.scored_tokens for node in nodes], tree.tokens)


def sample_attempts(trajectories: Sequence[Trajectory]) -> Attempts:
    """Return the attempts of independent samples of one prompt. A sample without an answer is also an attempt."""
    tokens = np.cumsum([t.completion_length for t in trajectories], dtype=np.int64)
    right = [t.correct for t in trajectories]
    return _attempts(right, tokens, int(tokens[-1]) if len(tokens) else 0)


def _attempts(right: Sequence[bool], tokens: Sequence[int] | NDArray[np.int64], total: int) -> Attempts:
    return Attempts(right=np.array(right, dtype=bool), tokens=np.array(tokens, dtype=np.int64), total=total)


def solved_in_answers(attempts: Sequence[Attempts], counts: Sequence[int]) -> BoolArray:
    """Return whether one of the first N answers is right (Test@N), [prompts, counts] bool."""
    return _first(attempts, [np.arange(1, len(attempt.right) + 1) for attempt in attempts]) <= np.array(counts)


def solved_in_tokens(attempts: Sequence[Attempts], budgets: Sequence[int]) -> BoolArray:
    """Return whether a right answer arrived within each token budget, [prompts, budgets] bool."""
    return _first(attempts, [attempt.tokens for attempt in attempts]) <= np.array(budgets)


def _first(attempts: Sequence[Attempts], places: Sequence[NDArray[np.int64]]) -> NDArray[np.float64]:
    """Return the place of the first right answer, [prompts, 1]; infinity without a right answer."""
    firsts = [place[attempt.right] for attempt, place in zip(attempts, places, strict=True)]
    return np.array([[first[0] if len(first) else np.inf] for first in firsts]).reshape(-1, 1)


def answer_counts(most: int) -> list[int]:
    """Return the values of N for Test@N: those of `COUNTS` below `most`, and `most`."""
    return sorted({count for count in (*COUNTS, most) if count <= most})


def token_budgets(search: Sequence[Attempts], parts: Sequence[float] = (1 / 8, 1 / 4, 1 / 2, 1)) -> list[int]:
    """Return fractions of the 10 % quantile of the tokens per tree. At larger budgets too many searches have ended."""
    top = float(np.quantile([attempt.total for attempt in search], 0.1, method="lower"))
    return sorted({max(1, int(top * part)) for part in parts})


def compare_answers(
    search: Sequence[Attempts], samples: Sequence[Attempts], counts: Sequence[int]
) -> dict[int, Comparison]:
    """Return Test@N of search and samples by N. Each prompt needs at least as many samples as the largest N."""
    first, second = solved_in_answers(search, counts), solved_in_answers(samples, counts)
    ended = np.array([[len(attempt.right)] for attempt in search]) < np.array(counts)
    return {count: _compare(first[:, i], second[:, i], ended[:, i]) for i, count in enumerate(counts)}


def compare_tokens(
    search: Sequence[Attempts], samples: Sequence[Attempts], budgets: Sequence[int]
) -> dict[int, Comparison]:
    """Return the solved shares by tokens per prompt. Samples of an unsolved prompt must reach the largest budget."""
    first, second = solved_in_tokens(search, budgets), solved_in_tokens(samples, budgets)
    ended = np.array([[attempt.total] for attempt in search]) < np.array(budgets)
    return {budget: _compare(first[:, i], second[:, i], ended[:, i]) for i, budget in enumerate(budgets)}


def _compare(search: BoolArray, samples: BoolArray, ended: BoolArray) -> Comparison:
    return Comparison(
        search=mean_over_prompts(search[:, None]),
        samples=mean_over_prompts(samples[:, None]),
        difference=mean_difference(search, samples),
        ended=float((ended & ~search).mean()),
    )
