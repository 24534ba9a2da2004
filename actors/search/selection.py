"""Selection of the child that a simulation enters, and of the node at which a frontier search begins.

Q is the mean reward of a node, N the number of its ended simulations, with or without a reward, O the number of its
unfinished simulations, and p its parent. Unfinished simulations count in the exploration term and leave Q unchanged.
O_p includes the simulation that makes the choice. UCB subtracts it, so that one simulation at a time gives the paper's
formula.
Source: Liu et al., Watch the Unobserved (WU-UCT), ICLR 2020, eq. 4.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import Protocol

from actors.search.tree import GrowingTree, Node, Status
from rlsys.config.search import FrontierConfig, PuctConfig, SelectionConfig, UcbConfig


class Stats(Protocol):
    """Statistics from which the scores of a node follow; see `actors.search.tree.Node`."""

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
    A child with unfinished simulations and no visit has the Q of its parent.

    Source: Marco-o1 v2, arXiv:2503.01461, sec. 3, and its released program; UCB1 (Auer et al. 2002).
    """
    factor = 2.0 if config.form == "code" else 1.0
    logarithm = factor * math.log(max(1, _count(parent) - 1))
    scores = []
    for child in children:
        count = _count(child)
        scores.append(_q(child, parent) + config.exploration * math.sqrt(logarithm / count) if count else math.inf)
    return scores


def puct_scores(children: Sequence[Stats], parent: Stats, config: PuctConfig) -> list[float]:
    """Return the PUCT score of each child.

    score = Q + c P sqrt(N_p + O_p) / (1 + N + O)
    P is proportional to s exp(sum of log-probabilities / tokens ** length_exponent) and sums to 1 over `children`; s is
    the number of draws of a child. A fixed text, which no model chose, has the mean P of the others. A child without a
    visit has the Q of its parent.

    Source: Silver et al. 2017 (PUCT); priors as in MCTS-DPO, arXiv:2405.00451, and AlphaMath.
    """
    written = [child for child in children if child.chosen_tokens]
    drawn = [_prior(child, config) for child in written]
    fixed = sum(drawn) / len(drawn) if drawn else 1.0
    priors = [_prior(child, config) if child.chosen_tokens else fixed for child in children]
    scale = config.exploration * math.sqrt(_count(parent)) / (sum(priors) or 1.0)
    return [
        _q(child, parent) + scale * prior / (1 + _count(child)) for child, prior in zip(children, priors, strict=True)
    ]


def _prior(child: Stats, config: PuctConfig) -> float:
    return child.samples * math.exp(child.logprob / child.chosen_tokens**config.length_exponent)


def frontier_score(node: Stats, parent: Stats | None, depth: int, deepest: int, config: FrontierConfig) -> float:
    """Return the score of a node of the global frontier.

    score = w_v tanh(Q_p) + w_H H + w_d sqrt(depth / deepest), with H the mean negative log-probability of the node's
    drawn tokens in nats.

    Source: DeepSearch, arXiv:2509.25454, global frontier selection.
    """
    value = parent.total / parent.visits if parent is not None and parent.visits else 0.0
    entropy = -node.logprob / node.chosen_tokens if node.chosen_tokens else 0.0
    return (
        config.value_weight * math.tanh(value)
        + config.entropy_weight * entropy
        + config.depth_weight * math.sqrt(depth / max(1, deepest))
    )


def frontier_node(tree: GrowingTree, config: FrontierConfig, rng: random.Random) -> Node:
    """Return the node with the best frontier score among those at which a simulation can begin.

    A node that waits for its expansion is chosen only if there is no other.
    """
    candidates = [node for node in tree.nodes if node.status is Status.OPEN and _can_begin_at(tree, node)]
    nodes = [node for node in candidates if not node.expanding] or candidates
    deepest = tree.max_depth or max(node.depth for node in tree.nodes)
    scores = [frontier_score(node, node.parent, node.depth, deepest, config) for node in nodes]
    return nodes[draw_best(scores, rng)]


def draw_best(scores: Sequence[float], rng: random.Random) -> int:
    """Return the index of the largest score. A random draw decides between equal scores."""
    best = max(scores)
    ties = [index for index, score in enumerate(scores) if score == best]
    return ties[0] if len(ties) == 1 else rng.choice(ties)


def _can_begin_at(tree: GrowingTree, node: Node) -> bool:
    return node.expanding or tree.has_capacity(node) or (node.terminal and not node.defect)


def _count(node: Stats) -> int:
    return node.visits + node.unrewarded + node.in_flight


def _q(child: Stats, parent: Stats) -> float:
    if child.visits:
        return child.total / child.visits
    return parent.total / parent.visits if parent.visits else 0.0


def _ucb_of(config: SelectionConfig) -> UcbConfig:
    """Return the UCB that chooses among the children of a node, also below a node that another rule chose."""
    if isinstance(config, UcbConfig):
        return config
    return UcbConfig(exploration=config.exploration) if isinstance(config, FrontierConfig) else UcbConfig()
