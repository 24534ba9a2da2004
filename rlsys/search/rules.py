"""Rules that select one of the correct chains of a tree."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from rlsys.config.search import ChainRule
from rlsys.sequences import order_key

if TYPE_CHECKING:
    from rlsys.search.extract import Chain


def choose(chains: Sequence[Chain], rule: ChainRule, solve_rate: float) -> Chain:
    """Return the chain that a rule selects; of equal ones, the one with the smallest token ids from the left.

    longest, shortest, median: by tokens after the prompt; of an even number, the lower median.
    highest_value:  by `Chain.value`.
    by_difficulty:  closest to the budget shortest + (1 - solve_rate) (longest - shortest), the shorter of two
                    (difficulty-aware prompting, LiteCoT, arXiv:2505.19716; there a model judges the difficulty).
    retrospective:  the shortest that begins with the first thought of the longest (Retro-Search, arXiv:2504.04383).

    Args:
        chains: correct chains of one tree, at least one.
        rule: any but "none".
        solve_rate: mean reward of the chains of the tree, 0 to 1.
    """
    by_length = sorted(chains, key=lambda chain: (chain.length, *tie(chain)))
    longest = min(chains, key=lambda chain: (-chain.length, *tie(chain)))
    if rule == "median":
        return by_length[(len(chains) - 1) // 2]
    if rule == "retrospective":
        end = longest.nodes[0][0]
        return next(chain for chain in by_length if _begins(chain, longest, end))
    shortest = by_length[0].length
    budget = shortest + (1 - min(1.0, max(0.0, solve_rate))) * (longest.length - shortest)
    measure: dict[str, Callable[[Chain], float]] = {
        "highest_value": lambda chain: -chain.value,
        "longest": lambda chain: -chain.length,
        "shortest": lambda chain: chain.length,
        "by_difficulty": lambda chain: abs(chain.length - budget),
    }
    if rule == "by_difficulty":
        return min(by_length, key=measure[rule])  # the first of equals is the shorter
    return min(chains, key=lambda chain: (measure[rule](chain), *tie(chain)))


def _begins(chain: Chain, other: Chain, end: int) -> bool:
    """Return whether a chain has a thought that ends where the first thought of another one does, with equal tokens."""
    return chain.nodes[0][0] == end and bool((chain.token_ids[:end] == other.token_ids[:end]).all())


def tie(chain: Chain) -> tuple[bytes, str, float, float, tuple[tuple[int, int, str], ...]]:
    """Return a sort key of a chain that includes everything that becomes data."""
    return order_key(chain.token_ids), chain.text, -chain.value, -chain.reward, chain.nodes
