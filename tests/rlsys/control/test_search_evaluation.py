"""The searched part of an evaluation, over scripted actors."""

from __future__ import annotations

import asyncio
import io
import json
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from fakes import FakePool, prompt, trajectory
from rich.console import Console
from tree_samples import answer, tree

from rlsys.config.files import parse_config
from rlsys.config.schema import Config
from rlsys.control.search_evaluation import (
    grow_trees,
    sample_until,
    sampling_of,
    search_and_sample,
    show_search,
    with_search,
)
from rlsys.errors import TooManyFailuresError
from rlsys.search.stats import StepCheck
from rlsys.trees import Tree, TreeFailure
from rlsys.types import Prompt, SamplingSettings, StepVerdict, TrajectoryGroup


def config(answers: int = 2, **sections: dict[str, Any]) -> Config:
    values: dict[str, Any] = {
        "run": {"dir": "unused", "seed": 5},
        "model": {"path": "unused"},
        "task": {"type": "letter_count"},
        "evaluation": {"search_answers": answers, "samples": 0, "greedy": False},
    }
    return parse_config(values | sections, "test")


class SearchingPool(FakePool):
    """Actors that return samples of 5 tokens and trees of 40 tokens with two answers.

    The last sample of every third call is right. Of the trees, only those of even prompts have a right answer: the
    second one, after 30 tokens.
    """

    def __init__(self, count: int = 2, failing: Sequence[str] = (), *, verdicts: bool = True) -> None:
        super().__init__(count, [], failing)
        self.verdicts = verdicts
        self.under_way = self.most = 0

    async def grow(self, actor: int, prompt: Prompt) -> Tree | TreeFailure:
        self.calls.append(("grow", actor, prompt.prompt_id))
        self.under_way += 1
        self.most = max(self.most, self.under_way)
        await asyncio.sleep(0)
        self.under_way -= 1
        if prompt.prompt_id in self.failing:
            return TreeFailure(prompt_id=prompt.prompt_id, question="q", answer="1", reason="no [node] fits")
        even = int(prompt.prompt_id[1:]) % 2 == 0
        below = (
            answer(0, "x", "wrong", scored_tokens=12),
            answer(0, "y", "ok" if even else "wrong", scored_tokens=30),
        )
        grown = tree(*below, prompt_id=prompt.prompt_id, tokens=40)
        if self.verdicts:
            return grown
        assert below[0].verdict
        bad = replace(below[0].verdict, outcome="error", detail="scripted")
        return replace(grown, nodes=(grown.nodes[0], *(replace(n, verdict=bad, scored=-1) for n in grown.nodes[1:])))

    async def generate(
        self, actor: int, prompts: Sequence[Prompt], settings: SamplingSettings
    ) -> Sequence[TrajectoryGroup]:
        self.calls.append(("generate", settings.seed, tuple(p.prompt_id for p in prompts)))
        third = settings.seed // 2**31 == 2
        wrong, right = trajectory(reward=0.0, outcome="wrong", length=5), trajectory(length=5)
        samples = (wrong,) * (settings.samples - 1) + (right if third else wrong,)
        return [TrajectoryGroup(prompt=p, trajectories=samples) for p in prompts]


def test_the_search_of_an_evaluation_stops_at_answers_and_uses_the_policy() -> None:
    given = config(
        64,
        search={
            "model": {"path": "another"},
            "reviewer": {"path": "third"},
            "stop": {"simulations": 9, "tokens": 500, "correct": [{"count": 1}], "sure": 0.9},
            "temperature": 0.5,
        },
    )
    search_section = with_search(given).search
    expected = {"simulations": 256, "tokens": None, "answers": 64, "correct": (), "sure": None}
    assert search_section.stop.model_dump() == expected
    assert (search_section.model, search_section.reviewer) == (None, given.search.reviewer)
    assert with_search(config(2)).search.stop.simulations == 128  # what the config allows is not lowered
    drawn = sampling_of(given)
    assert (drawn.samples, drawn.temperature, drawn.top_p, drawn.max_tokens, drawn.seed) == (64, 0.5, 1.0, 160, 5)


def test_trees_come_back_in_the_order_of_the_prompts_and_wait_for_their_turn() -> None:
    pool = SearchingPool(count=3)
    settings = config(actors={"max_num_seqs": 40}, search={"parallel_simulations": 8})
    trees = asyncio.run(grow_trees(pool, [prompt(f"p{i}") for i in range(100)], settings))
    assert [each.prompt_id for each in trees] == [f"p{i}" for i in range(100)]
    assert sorted(pool.calls, key=lambda call: int(call[2][1:])) == [("grow", i % 3, f"p{i}") for i in range(100)]
    assert pool.most == 3 * 10  # of each actor 2 * 40 / 8, so that the deadlines of the others do not run yet


def test_more_samples_are_drawn_for_unfinished_prompts_only_and_are_new() -> None:
    pool = SearchingPool(count=1)
    settings = SamplingSettings(samples=2, temperature=1.0, top_p=1.0, max_tokens=9, seed=5)
    prompts = [prompt(name) for name in ("p0", "p1")]
    enough = iter([True, False, True])  # p0 and p1 in the first round, p1 in the second
    drawn = asyncio.run(sample_until(pool, prompts, settings, lambda _: next(enough), 0.1))
    assert pool.calls == [("generate", 5, ("p0", "p1")), ("generate", 5 + 2**31, ("p1",))]
    assert [[t.completion_length for t in samples] for samples in drawn] == [[5, 5], [5, 5, 5, 5]]


def evaluated(pool: SearchingPool, count: int = 10, check_steps: StepCheck | None = None) -> dict[str, Any]:
    prompts = [prompt(f"p{i}") for i in range(count)]
    return asyncio.run(search_and_sample(pool, prompts, with_search(config()), check_steps))


def test_right_chains_with_every_step_right_are_counted() -> None:
    verdicts = iter([StepVerdict(wrong_node=1, detail=""), None, *[StepVerdict(wrong_node=None, detail="")] * 2])
    results = evaluated(SearchingPool(failing=["p0", "p1"]), check_steps=lambda question, chain: next(verdicts))
    assert results["first_right_chains"] == {"checked": 3, "every_step_right": 2}  # of four solved trees
    assert evaluated(SearchingPool())["first_right_chains"] == {"checked": 0, "every_step_right": 0}


def test_the_figures_by_hand() -> None:
    results = evaluated(SearchingPool(failing=["p0", "p1"]))
    assert json.loads(json.dumps(results)) == results
    assert (results["answers"], results["failed_trees"], results["first_failure"]) == (2, 2, "no [node] fits")
    # 8 trees of 40 tokens and two failures; the first 2 samples of 5 tokens.
    assert results["tokens_per_problem"] == {"search": pytest.approx(32), "samples": pytest.approx(10)}
    answers, tokens = results["at_equal_answers"], results["at_equal_tokens"]
    assert list(answers) == ["1", "2"] and list(tokens) == ["5", "10", "20", "40"]
    # p2, p4, p6 and p8 are solved by the second answer, after 30 tokens; no sample is right before the sixth,
    # which is there after 30 tokens as well. Drawing goes on for it, since 4 samples do not fill 40 tokens.
    assert [row["search"]["mean"] for row in answers.values()] == [0, 0.4]
    assert [row["samples"]["mean"] for row in answers.values()] == [0, 0]
    assert [row["search"]["mean"] for row in tokens.values()] == [0, 0, 0, 0.4]
    assert [row["samples"]["mean"] for row in tokens.values()] == [0, 0, 0, 1]
    assert tokens["40"]["difference"]["mean"] == pytest.approx(-0.6)
    assert [row["ended"] for row in tokens.values()] == pytest.approx([0.2] * 4)


def test_the_tables_say_what_failed() -> None:
    results, stream = evaluated(SearchingPool(failing=["p0"])), io.StringIO()
    show_search(results, 10, Console(file=stream, width=160))
    shown = stream.getvalue()
    # 4 of 10 against none: as many as the tables say.
    lines = shown.splitlines()
    place = next(number for number, line in enumerate(lines) if line.startswith("2 "))
    assert cells(lines[place])[:3] == ["2", "samples", "0.000"]
    search = cells(lines[place + 1])
    assert (search[1:3], search[4].split()[0], search[5]) == (["search", "0.400"], "+0.400", "0.100")
    assert max(map(len, lines)) <= 80
    assert "the search chose nodes by the verifier's verdicts; samples have no such help\n" in shown
    assert "1 trees failed and count as unsolved; the first: no [node] fits" in shown
    assert "search 36, 2 samples 10" in shown


def cells(line: str) -> list[str]:
    return re.split(r"  +", line)


def test_a_search_without_a_tree_has_no_figures() -> None:
    with pytest.raises(TooManyFailuresError, match=r"none of 2 trees could be grown; the first: no \[node\] fits"):
        evaluated(SearchingPool(failing=["p0", "p1"]), 2)


def test_a_verifier_that_fails_in_trees_fails_the_evaluation() -> None:
    with pytest.raises(TooManyFailuresError, match=r"20 of 20 verifications .*scripted"):
        evaluated(SearchingPool(verdicts=False))
