"""Selection scores against numbers derived by hand."""

from __future__ import annotations

import math
import random
from collections import Counter
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.search.frontier import frontier_score
from actors.search.selection import choose, draw_best, puct_scores, ucb_scores
from rlsys.config.search import FrontierConfig, PuctConfig, UcbConfig


@dataclass
class NodeStats:
    visits: int = 0
    total: float = 0.0
    in_flight: int = 0
    logprob: float = 0.0
    chosen_tokens: int = 0
    unrewarded: int = 0
    samples: int = 1
    estimate: float | None = None


def chooser(visits: int, total: float, others: int = 0) -> NodeStats:
    """Return a parent with the choosing simulation and `others` running through it."""
    return NodeStats(visits, total, in_flight=1 + others)


def test_ucb_in_the_papers_form() -> None:
    # N_p = 4, ln 4 = 1.3862943611198906, c = 2.
    # 3 visits, total 2:  2/3 + 2 sqrt(1.38629.../3) = 0.66666... + 2 * 0.6797779934458725 = 2.0262226535584117
    # 1 visit,  total 0:  0   + 2 sqrt(1.38629.../1) =               2 * 1.1774100225154747 = 2.3548200450309493
    scores = ucb_scores([NodeStats(3, 2.0), NodeStats(1, 0.0)], chooser(4, 2.0), UcbConfig())
    assert scores == pytest.approx([2.0262226535584117, 2.3548200450309493], rel=1e-12)


def test_ucb_in_the_codes_form() -> None:
    # N_p = 4: 2 ln 4 = 2.772588722239781, c = 1.
    # 3 visits, total 2:  0.66666... + sqrt(2.77258.../3) = 0.66666... + 0.9613512577339219 = 1.6280179244005886
    # 1 visit,  total 0:  sqrt(2.77258...) = 1.6651092223153954
    scores = ucb_scores(
        [NodeStats(3, 2.0), NodeStats(1, 0.0)], chooser(4, 2.0), UcbConfig(form="code", exploration=1.0)
    )
    assert scores == pytest.approx([1.6280179244005886, 1.6651092223153954], rel=1e-12)


@given(st.lists(st.tuples(st.integers(1, 50), st.floats(0, 1)), min_size=2, max_size=6))
def test_exploration_1414_in_the_code_form_equals_2_in_the_paper(children: list[tuple[int, float]]) -> None:
    # 1.414 sqrt(2 x) = 1.99970... sqrt(x): the two differ by less than 2e-4 of the exploration term.
    nodes = [NodeStats(visits, visits * value) for visits, value in children]
    parent = chooser(sum(child.visits for child in nodes), sum(child.total for child in nodes))
    paper = ucb_scores(nodes, parent, UcbConfig(exploration=2.0))
    code = ucb_scores(nodes, parent, UcbConfig(form="code", exploration=1.414))
    for child, left, right in zip(nodes, paper, code, strict=True):
        bonus = left - child.total / child.visits
        assert right == pytest.approx(left, abs=2e-4 * bonus + 1e-12)
        assert right <= left


def test_an_unvisited_child_comes_first() -> None:
    children = [NodeStats(9, 9.0), NodeStats(), NodeStats(1, 1.0)]
    parent = chooser(10, 10.0)
    assert ucb_scores(children, parent, UcbConfig())[1] == math.inf
    assert choose(children, parent, UcbConfig(), random.Random(0)) == 1
    assert choose(children, parent, UcbConfig(exploration=0.0), random.Random(0)) == 1


def test_running_simulations_shrink_exploration_and_leave_q() -> None:
    # The chooser not counted, N_p + O_p = 4 + 2 = 6, ln 6 = 1.791759469228055, c = 1.
    # N 2, total 1, O 0:  1/2 + sqrt(1.79175.../2) = 0.5 + 0.9465092364124228 = 1.4465092364124228
    # N 2, total 1, O 2:  1/2 + sqrt(1.79175.../4) = 0.5 + 0.6692830995229253 = 1.1692830995229253
    config, parent = UcbConfig(exploration=1.0), chooser(4, 2.0, others=2)
    scores = ucb_scores([NodeStats(2, 1.0), NodeStats(2, 1.0, in_flight=2)], parent, config)
    assert scores == pytest.approx([1.4465092364124228, 1.1692830995229253], rel=1e-12)
    # Without exploration only Q is left, and running simulations do not change it.
    greedy = ucb_scores([NodeStats(2, 1.0), NodeStats(2, 1.0, in_flight=7)], parent, UcbConfig(exploration=0.0))
    assert greedy == [0.5, 0.5]


def test_a_child_with_running_simulations_and_no_visit_has_its_parents_q() -> None:
    # N_p 4, total 3: Q_p = 3/4. ln(4 + 1) = 1.6094379124341003; O = 1: 0.75 + sqrt(1.60943...) = 2.018636241...
    parent = chooser(4, 3.0, others=1)
    [score] = ucb_scores([NodeStats(in_flight=1)], parent, UcbConfig(exploration=1.0))
    assert score == pytest.approx(0.75 + math.sqrt(math.log(5)), rel=1e-12)
    # Without any visit Q is 0, and ln(0 + 1) is 0.
    assert ucb_scores([NodeStats(in_flight=1)], chooser(0, 0.0, others=1), UcbConfig()) == [0.0]


def test_puct_by_hand() -> None:
    # Priors by mean log-probability (length exponent 1): exp(-2/2) = e^-1, exp(-8/4) = e^-2.
    # P = e^-1 / (e^-1 + e^-2) = 1/(1 + e^-1) = 0.7310585786300049 and 0.2689414213699951.
    # N_p 8 and the choosing simulation: sqrt 9 = 3; c = 2, so c sqrt(..) = 6.
    # N 3, O 0, total 1:  1/3 + 6 * 0.73105857863 / 4 = 0.33333... + 1.09658786794... = 1.4299212012783407
    # N 5, O 1, total 4:  4/5 + 6 * 0.26894142137 / 7 = 0.8 + 0.23052121831... = 1.0305212183171387
    children = [
        NodeStats(3, 1.0, logprob=-2.0, chosen_tokens=2),
        NodeStats(5, 4.0, in_flight=1, logprob=-8.0, chosen_tokens=4),
    ]
    scores = puct_scores(children, chooser(8, 5.0), PuctConfig(type="puct", exploration=2.0))
    assert scores == pytest.approx([1.4299212012783407, 1.0305212183171387], rel=1e-12)


def test_the_length_exponent_of_a_prior() -> None:
    # Exponent 0: exp(-2) against exp(-8); P_0 = 1/(1 + e^-6) = 0.9975273768433653. sqrt(1) = 1, N = 0, Q = 0.
    children = [NodeStats(logprob=-2.0, chosen_tokens=2), NodeStats(logprob=-8.0, chosen_tokens=4)]
    scores = puct_scores(children, chooser(0, 0.0), PuctConfig(type="puct", length_exponent=0.0))
    assert scores == pytest.approx([0.9975273768433653, 1 - 0.9975273768433653], rel=1e-12)


def test_priors_too_small_for_a_float_and_fixed_texts() -> None:
    # exp(-1000) is 0 as a float: no prior counts, and no division by 0 either. Q of the parent is 1/2.
    hopeless = [NodeStats(logprob=-1000.0, chosen_tokens=1), NodeStats(logprob=-1000.0, chosen_tokens=1)]
    assert puct_scores(hopeless, NodeStats(2, 1.0), PuctConfig(type="puct")) == [0.5, 0.5]
    # Two fixed texts: prior 1/2 each. sqrt(2 + 2) = 2; 0.5 + 2 * 0.5 / 1 = 1.5.
    assert puct_scores([NodeStats(), NodeStats()], chooser(2, 1.0, others=1), PuctConfig(type="puct")) == [1.5, 1.5]


def test_draws_count_in_a_prior_and_a_fixed_text_has_the_mean() -> None:
    # Equal texts but for the draws: 3 e^-1 and 1 e^-1, so 2 e^-1 for the fixed text: P = 3/6, 1/6, 2/6. sqrt(1) = 1.
    children = [
        NodeStats(logprob=-1.0, chosen_tokens=1, samples=3),
        NodeStats(logprob=-1.0, chosen_tokens=1),
        NodeStats(),
    ]
    scores = puct_scores(children, chooser(0, 0.0), PuctConfig(type="puct"))
    assert scores == pytest.approx([1 / 2, 1 / 6, 1 / 3], rel=1e-12)


def test_frontier_by_hand() -> None:
    # Q_p = 3/4: 0.4 tanh(0.75) = 0.4 * 0.6351489523872873 = 0.25405958095491495
    # H = 6/4 = 1.5 nats a token: 0.4 * 1.5 = 0.6; depth 4 of 16: 0.01 sqrt(1/4) = 0.005. Sum 0.859059580954915
    config = FrontierConfig(type="frontier")
    node = NodeStats(logprob=-6.0, chosen_tokens=4)
    assert frontier_score(node, NodeStats(4, 3.0), 4, 16, config) == pytest.approx(0.859059580954915, rel=1e-12)
    # The prompt has no parent and no tokens. The Q of a parent without a visit is 0.
    assert frontier_score(NodeStats(), None, 0, 16, config) == 0.0
    assert frontier_score(node, NodeStats(), 0, 16, config) == pytest.approx(0.6, rel=1e-12)
    # A node with visits has its own Q, 1/4 here: 0.4 tanh(0.25) + 0.6 + 0.005 = 0.4 * 0.24491866240370913 + 0.605.
    node = NodeStats(8, 2.0, logprob=-6.0, chosen_tokens=4)
    assert frontier_score(node, NodeStats(9, 9.0), 4, 16, config) == pytest.approx(0.7029674649614836, rel=1e-12)


def test_frontier_below_a_just_expanded_node_is_ucb() -> None:
    # By UCB the second child wins (see the paper's form above, c = 2); with c = 0 the first, by Q.
    children, parent = [NodeStats(3, 2.0), NodeStats(1, 0.0)], chooser(4, 2.0)
    assert choose(children, parent, FrontierConfig(type="frontier"), random.Random(0)) == 1
    assert choose(children, parent, FrontierConfig(type="frontier", exploration=0.0), random.Random(0)) == 0


def test_a_random_draw_decides_between_ties() -> None:
    def picks(seed: int) -> list[int]:
        rng = random.Random(seed)
        return [
            choose([NodeStats(), NodeStats(1, 1.0), NodeStats()], NodeStats(1, 1.0), UcbConfig(), rng)
            for _ in range(300)
        ]

    assert picks(1) == picks(1)
    assert picks(1) != picks(2)
    # 300 draws of two: 150 each; 100 is 5.8 standard deviations (sqrt(75) = 8.7) away.
    counts = Counter(picks(1))
    assert set(counts) == {0, 2} and min(counts.values()) > 100


def test_without_a_tie_nothing_is_drawn() -> None:
    # A choice without alternatives must not advance the generator: it would change all later draws.
    rng = random.Random(5)
    before = rng.getstate()
    assert draw_best([0.0, 2.0, 1.0], rng) == 1
    assert choose([NodeStats()], NodeStats(), UcbConfig(), rng) == 0
    assert rng.getstate() == before


def test_simulations_that_ended_without_a_reward_shrink_exploration() -> None:
    # Five simulations ended below the first child without a reward. Q of both is 1, N_p = 10: the first has
    # 1 + 2 sqrt(ln 10 / 5) = 2.357, the second, with four visits, 1 + 2 sqrt(ln 10 / 4) = 2.517.
    children = [NodeStats(unrewarded=5), NodeStats(visits=4, total=4.0)]
    parent = NodeStats(visits=4, total=4.0, unrewarded=5, in_flight=2)
    expected = [1 + 2 * math.sqrt(math.log(10) / count) for count in (5, 4)]
    assert ucb_scores(children, parent, UcbConfig()) == pytest.approx(expected)
