"""Choose one answer among several without a verifier: by votes or by value, and know when more draws change nothing.

Sources: self-consistency, arXiv:2203.11171 (majority); adaptive consistency, arXiv:2305.11860 (when to stop).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """One answer to a prompt, in the order of arrival.

    Attributes:
        text: The answer, the same text for the same answer; None for a chain without an answer.
        right: Whether the verifier accepts it. Nothing here reads it; it tells whether the choice was right.
        tokens: Tokens that were generated for the prompt until it was there.
        value: How good the chain looks without a verdict, for example its mean log-probability.
        draws: Number of times that it was drawn.
    """

    text: str | None
    right: bool
    tokens: int
    value: float = 0.0
    draws: int = 1


def within(candidates: Sequence[Candidate], budget: int) -> list[Candidate]:
    """Return the candidates that were there within a budget of tokens."""
    return [each for each in candidates if each.tokens <= budget]


def majority(candidates: Sequence[Candidate]) -> Candidate | None:
    """Return the first candidate of the most frequent answer, or None without any. Of equal ones the first wins."""
    votes = _votes(candidates)
    if not votes:
        return None
    leader = votes.most_common(1)[0][0]
    return next(each for each in candidates if each.text == leader)


def best(candidates: Sequence[Candidate]) -> Candidate | None:
    """Return the answer with the largest value (best-of-n), or None without any. Of equal ones the first wins."""
    answers = [each for each in candidates if each.text is not None]
    return max(answers, key=lambda each: each.value, default=None)


def until_sure(candidates: Sequence[Candidate], sure: float) -> list[Candidate]:
    """Return the candidates up to the one at which the leading answer is ahead with probability `sure`."""
    votes = Counter[str]()
    for number, each in enumerate(candidates, start=1):
        if each.text is not None:
            votes[each.text] += each.draws
        if certainty(list(votes.values())) >= sure:
            return list(candidates[:number])
    return list(candidates)


def certainty(votes: Sequence[int]) -> float:
    """Return the probability that the most frequent answer is more probable than the second one.

    With a votes for the first and b for the second, it is P(p > 1/2) for p of the distribution Beta(a + 1, b + 1):
    the share of the sequences of a + b + 1 fair coins with at most a heads. Without a vote it is 1/2.

    Source: adaptive consistency, arXiv:2305.11860, eq. 3, over the two leading answers.
    """
    first, second, *_ = *sorted(votes, reverse=True), 0, 0
    coins = first + second + 1
    return sum(math.comb(coins, heads) for heads in range(first + 1)) / 2**coins


def _votes(candidates: Sequence[Candidate]) -> Counter[str]:
    votes = Counter[str]()
    for each in candidates:
        if each.text is not None:
            votes[each.text] += each.draws
    return votes
