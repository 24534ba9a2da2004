"""Which child a simulation goes to, and which node a global frontier offers. Pure scores.

Q is the mean reward of a node, N its visits, O the simulations under way through it, p its parent. In-flight
simulations count as visits in the exploration term and leave Q as it is. The one that chooses is under way through the
parent as well; UCB does not count it, so that one simulation at a time gives the paper's formula.
Source: Liu et al., Watch the Unobserved (WU-UCT), ICLR 2020, eq. 4.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import Protocol

from rlsys.config.search import FrontierConfig, PuctConfig, SelectionConfig, UcbConfig


class Stats(Protocol):
    """What is known of a node.

    tried: simulations that ended without a value. drawn, logprob: tokens that its writer chose, and the sum of their
    log-probabilities, nats.
    """

    visits: int
    total: float
    tried: int
    in_flight: int
    logprob: float
    drawn: int


def choose(children: Sequence[Stats], parent: Stats, config: SelectionConfig, rng: random.Random) -> int:
    """Index of the child with the largest score; ties are drawn."""
    if len(children) == 1:
        return 0
    if isinstance(config, PuctConfig):
        scores = puct_scores(children, parent, config)
    else:
        scores = ucb_scores(children, parent, config if isinstance(config, UcbConfig) else _ucb_of(config))
    return draw_best(scores, rng)


def ucb_scores(children: Sequence[Stats], parent: Stats, config: UcbConfig) -> list[float]:
    """Q + c sqrt(ln(N_p + O_p - 1) / (N + O)), in the code's form with 2 ln; infinite where N + O = 0.

    A child without a visit but with simulations has its parent's Q.
    Source: Marco-o1 v2, arXiv:2503.01461, sec. 3, and its released program; UCB1 (Auer et al. 2002).
    """
    factor = 2.0 if config.form == "code" else 1.0
    logarithm = factor * math.log(max(1, _count(parent) - 1))
    found = []
    for child in children:
        count = _count(child)
        found.append(_q(child, parent) + config.exploration * math.sqrt(logarithm / count) if count else math.inf)
    return found


def puct_scores(children: Sequence[Stats], parent: Stats, config: PuctConfig) -> list[float]:
    """Q + c P sqrt(N_p + O_p) / (1 + N + O), P proportional to exp(sum of log-probabilities / tokens ** exponent).

    P sums to 1 over the children given, and decides alone where nothing has a visit yet. A node that nobody sampled,
    a fixed text, has log-probability 0. A child without a visit has its parent's Q.
    Source: Silver et al. 2017 (PUCT); priors as in MCTS-DPO, arXiv:2405.00451, and AlphaMath.
    """
    priors = [math.exp(child.logprob / max(1, child.drawn) ** config.length_exponent) for child in children]
    scale = config.exploration * math.sqrt(_count(parent)) / (sum(priors) or 1.0)
    return [
        _q(child, parent) + scale * prior / (1 + _count(child)) for child, prior in zip(children, priors, strict=True)
    ]


def frontier_score(node: Stats, parent: Stats | None, depth: int, deepest: int, config: FrontierConfig) -> float:
    """w_v tanh(Q_parent) + w_H H + w_d sqrt(depth / deepest), H the mean negative log-probability of the node.

    Source: DeepSearch, arXiv:2509.25454, global frontier selection.
    """
    value = parent.total / parent.visits if parent is not None and parent.visits else 0.0
    entropy = -node.logprob / node.drawn if node.drawn else 0.0
    return (
        config.value_weight * math.tanh(value)
        + config.entropy_weight * entropy
        + config.depth_weight * math.sqrt(depth / max(1, deepest))
    )


def draw_best(scores: Sequence[float], rng: random.Random) -> int:
    """Index of the largest score; one of them at random where several are equal."""
    best = max(scores)
    ties = [index for index, score in enumerate(scores) if score == best]
    return ties[0] if len(ties) == 1 else rng.choice(ties)


def _count(node: Stats) -> int:
    return node.visits + node.tried + node.in_flight


def _q(child: Stats, parent: Stats) -> float:
    if child.visits:
        return child.total / child.visits
    return parent.total / parent.visits if parent.visits else 0.0


def _ucb_of(config: FrontierConfig) -> UcbConfig:
    return UcbConfig(exploration=config.exploration)
