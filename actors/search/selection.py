"""Selection of the child that a simulation enters.

Q is the value of a node (`value_of`), N the number of its ended simulations, with or without a reward, O the number of
its unfinished simulations, and p its parent. Unfinished simulations count in the exploration term, Q stays unchanged.
O_p includes the simulation that makes the choice. UCB subtracts it, so that one simulation at a time gives the paper's
formula.
Source: Liu et al., Watch the Unobserved (WU-UCT), ICLR 2020, eq. 4.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import Protocol

from rlsys.config.search import FrontierConfig, PuctConfig, SelectionConfig, UcbConfig


class Stats(Protocol):
    """Statistics from which the scores of a node follow; see `actors.search.tree.Node`."""

    estimate: float | None

    visits: int
    total: float
    unrewarded: int
    in_flight: int
    logprob: float
    chosen_tokens: int
    samples: int


def choose(children: Sequence[Stats], parent: Stats, config: SelectionConfig, rng: random.Random) -> int:
    """Return the index of the child with the largest score. A random draw decides between equal scores."""
    if len(children) == 1:
        return 0
    if isinstance(config, PuctConfig):
        scores = puct_scores(children, parent, config)
    else:
        scores = ucb_scores(children, parent, _ucb_of(config))
    return draw_best(scores, rng)


def ucb_scores(children: Sequence[Stats], parent: Stats, config: UcbConfig) -> list[float]:
    """Return the UCB score of each child.

    score = Q + c sqrt(ln(N_p + O_p - 1) / (N + O)), infinite if N + O = 0. The "code" form has 2 ln in place of ln.
    A child with unfinished simulations, no visit and no estimate has the Q of its parent.

    Source: Marco-o1 v2, arXiv:2503.01461, sec. 3, and its released program; UCB1 (Auer et al. 2002).
    """
    factor = 2.0 if config.form == "code" else 1.0
    logarithm = factor * math.log(max(1, _count(parent) - 1))
    scores = []
    for child in children:
        count = _count(child)
        scores.append(
            value_or_parents(child, parent) + config.exploration * math.sqrt(logarithm / count) if count else math.inf
        )
    return scores


def puct_scores(children: Sequence[Stats], parent: Stats, config: PuctConfig) -> list[float]:
    """Return the PUCT score of each child.

    score = Q + c P sqrt(N_p + O_p) / (1 + N + O)
    P is proportional to s exp(sum of log-probabilities / tokens ** length_exponent) and sums to 1 over `children`; s is
    the number of draws of a child. A fixed text, which no model chose, has the mean P of the others. A child without a
    visit and an estimate has the Q of its parent.

    Source: Silver et al. 2017 (PUCT); priors as in MCTS-DPO, arXiv:2405.00451, and AlphaMath.
    """
    written = [child for child in children if child.chosen_tokens]
    drawn = [_prior(child, config) for child in written]
    fixed = sum(drawn) / len(drawn) if drawn else 1.0
    priors = [_prior(child, config) if child.chosen_tokens else fixed for child in children]
    scale = config.exploration * math.sqrt(_count(parent)) / (sum(priors) or 1.0)
    return [
        value_or_parents(child, parent) + scale * prior / (1 + _count(child))
        for child, prior in zip(children, priors, strict=True)
    ]


def _prior(child: Stats, config: PuctConfig) -> float:
    return child.samples * math.exp(child.logprob / child.chosen_tokens**config.length_exponent)


def draw_best(scores: Sequence[float], rng: random.Random) -> int:
    """Return the index of the largest score. A random draw decides between equal scores."""
    best = max(scores)
    ties = [index for index, score in enumerate(scores) if score == best]
    return ties[0] if len(ties) == 1 else rng.choice(ties)


def _count(node: Stats) -> int:
    return node.visits + node.unrewarded + node.in_flight


def value_of(node: Stats) -> float | None:
    """Return the value Q of a node; None for a node without visits and estimate.

    Without an estimate, Q is the mean reward of the chains that ended at or below the node. An estimate e counts as one
    more chain, with reward e: Q = (e + total) / (1 + visits).
    """
    if node.estimate is not None:
        return (node.estimate + node.total) / (1 + node.visits)
    return node.total / node.visits if node.visits else None


def value_or_parents(child: Stats, parent: Stats) -> float:
    """Return the value of a node, or of its parent if it has none; 0 by default."""
    value = value_of(child)
    return (value_of(parent) or 0.0) if value is None else value


def _ucb_of(config: SelectionConfig) -> UcbConfig:
    """Return the UCB that chooses among the children of a node, also below a node that another rule chose."""
    if isinstance(config, UcbConfig):
        return config
    return UcbConfig(exploration=config.exploration) if isinstance(config, FrontierConfig) else UcbConfig()
