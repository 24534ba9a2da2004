"""Statistics of trees and engines, by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from rlsys.interfaces import EngineStats
from rlsys.search.stats import EngineFigures, TreeFigures, figure_rows
from rlsys.trees import StopReason, ThoughtNode, Tree, TreeFailure
from rlsys.types import Outcome, Question, StepVerdict, Verdict

NONE = np.zeros(0, np.int32)


def node(outcome: Outcome | None = None, reward: float = 0.0, scored: int = -1) -> ThoughtNode:
    verdict = None if outcome is None else Verdict(outcome=outcome, reward=reward, answered=True)
    return ThoughtNode(
        parent=0,
        type="answer",
        text="",
        token_ids=NONE,
        forced=0,
        logprobs=NONE.astype(np.float32),
        verdict=verdict,
        scored=scored,
    )


Answer = tuple[Outcome, float]
RIGHT: Answer = ("ok", 1.0)
WRONG: Answer = ("wrong", 0.0)


def tree(*answers: Answer, stop: StopReason = "correct", **counts: int) -> Tree:
    leaves = (node(outcome, reward, scored) for scored, (outcome, reward) in enumerate(answers))
    return Tree(
        prompt_id="p",
        question="q",
        answer="a",
        pattern="a",
        tokenizers={},
        models={},
        prompt_token_ids={},
        nodes=(node(), *leaves, node("timeout")),
        stop=stop,
        simulations=4,
        calls=6,
        tokens=60,
        counts=counts,
    )


def figures() -> TreeFigures:
    sums = TreeFigures()
    sums.add(2, tree(RIGHT, RIGHT, WRONG, truncated=1, duplicates=2))
    sums.add(0, tree(WRONG, stop="simulations", truncated=2))
    sums.add(1, TreeFailure(prompt_id="p", question="q", answer="a", reason="too long"))
    return sums


def test_figures_of_trees_by_hand() -> None:
    report = figures().report()
    # Two trees have 3 and 1 scored answers, with 2 and 0 correct ones. Each has 6 calls and 60 tokens.
    assert report.pop("solved")["mean"] == 0.5
    assert report == {
        "trees": 2,
        "failed": 1,
        "most_frequent_answer_correct": 0.5,  # all answers have one text, and the first one of the first tree is right
        "first_right_chains": {"checked": 0, "every_step_right": 0},  # nobody judges the steps
        "scored_answers": 4,
        "right_answers_per_tree": 1.0,
        "simulations": 8,
        "calls": 12,
        "calls_per_scored_answer": 3.0,
        "generated_tokens": 120,
        "tokens_per_scored_answer": 30.0,
        "stops": {"correct": 1, "simulations": 1},
        "counts": {"duplicates": 2, "truncated": 3},
    }
    assert figures().solved_fraction == 0.5


def test_the_first_right_chain_of_each_tree_is_judged() -> None:
    verdicts = [StepVerdict(wrong_node=1), StepVerdict(), None]
    asked = []

    def check(question: Question, chain: str) -> StepVerdict | None:
        asked.append((question, chain))
        return verdicts[len(asked) - 1]

    sums = TreeFigures(check_steps=check)
    for number, grown in enumerate([tree(WRONG, RIGHT, RIGHT), tree(RIGHT), tree(RIGHT), tree(WRONG)]):
        sums.add(number, grown)
    first = tree(WRONG, RIGHT, RIGHT)
    assert asked[0] == ("q", first.completion(first.answers()[1]))
    assert len(asked) == 3 and sums.report()["first_right_chains"] == {"checked": 2, "every_step_right": 1}
    assert dict(figure_rows(sums.report(), None))["first right chain, every step right"] == "0.500 of 2"


def test_the_order_of_trees_has_no_influence() -> None:
    trees = {number: tree(*([RIGHT] if number % 3 else [WRONG])) for number in range(9)}
    one, other = TreeFigures(), TreeFigures()
    for number in range(9):
        one.add(number, trees[number])
        other.add(8 - number, trees[8 - number])
    assert one.report() == other.report()


def test_without_trees_there_are_no_fractions() -> None:
    report = TreeFigures().report()
    assert report["solved"] is None and report["tokens_per_scored_answer"] is None
    assert TreeFigures().solved_fraction is None


def usage(**changes: Any) -> EngineStats:
    values: dict[str, Any] = {
        "model": "policy",
        "engine": 0,
        "busy_s": 3.0,
        "wall_s": 4.0,
        "generated_tokens": 100,
        "prompt_tokens": 200,
        "cached_tokens": 50,
        "in_flight_mean": 10.0,
    }
    return EngineStats(**{**values, **changes})


def engines() -> EngineFigures:
    sums = EngineFigures()
    sums.add([usage(), usage(model="reviewer", generated_tokens=20, prompt_tokens=0, cached_tokens=0)])
    sums.add([usage(busy_s=1.0, wall_s=4.0, in_flight_mean=2.0, cached_tokens=100)])
    return sums


def test_figures_of_engines_by_hand() -> None:
    report = engines().report(wall_s=8.0, grown=2)
    # The policy is busy for 4 of 8 s, with (10 * 3 + 2 * 1) / 4 = 8 requests in flight. 150 of 400 tokens are cached.
    assert report == {
        "wall_s": 8.0,
        "grown": 2,
        "tokens_per_s": 220 / 8,
        "prefix_cache_hit_rate": 0.375,
        "engines": [
            {"model": "policy", "engine": 0, "idle_fraction": 0.5, "in_flight_mean": 8.0, "generated_tokens": 200},
            {"model": "reviewer", "engine": 0, "idle_fraction": 0.25, "in_flight_mean": 10.0, "generated_tokens": 20},
        ],
    }


def test_idle_engines() -> None:
    sums = EngineFigures()
    sums.add([usage(busy_s=0.0, wall_s=0.0, prompt_tokens=0, cached_tokens=0)] * 2)
    report = sums.report(wall_s=0.0, grown=0)
    assert report["prefix_cache_hit_rate"] is None and report["tokens_per_s"] is None
    assert report["engines"][0]["idle_fraction"] is None


@pytest.mark.parametrize("with_engines", [False, True])
def test_the_table_has_the_figures(with_engines: bool) -> None:
    rates = engines().report(wall_s=8.0, grown=2) if with_engines else None
    rows = [list(row) for row in figure_rows(figures().report(), rates)]
    expected = [
        ["failed", "1"],
        ["right answers per tree", "1.00"],
        ["calls per scored answer", "3.00"],
        ["tokens per scored answer", "30.0"],
        ["stopped by", "correct 1, simulations 1"],
        ["defects", "truncated 3"],
        ["other counts", "duplicates 2"],
    ]
    rates_shown = [
        ["prefix-cache hit rate", "0.375"],
        ["policy engine 0", "idle 0.500, in flight 8.0"],
        ["reviewer engine 0", "idle 0.250, in flight 10.0"],
        ["wall time", "8.0 s for 2 trees"],
    ]
    assert all(row in rows for row in expected)
    assert all((row in rows) == with_engines for row in rates_shown)
