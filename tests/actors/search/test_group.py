"""Groups from searched trees: trajectories, masks, pairs and figures."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from actors.search.group import build_searched_group, search_metrics
from rlsys.config.search import ExtractConfig
from rlsys.trees import ThoughtNode, Tree
from rlsys.types import Prompt, RolloutFailure, TrajectoryGroup, Verdict, VersionSpan

PROMPT = Prompt(prompt_id="p", token_ids=np.array([1, 2], dtype=np.int32), answer="4", question="2+2?")
RIGHT = Verdict(outcome="ok", reward=1.0, answered=True, detail="right")
WRONG = Verdict(outcome="wrong", reward=0.0, answered=True, detail="found 5")
EXTRACT = ExtractConfig(step_min_visits=1)


class Letters:
    """A codec with one token for each letter: 100 plus its place in the alphabet. Token 0 is the end token."""

    digest = "letters"
    end_token_id = 0
    end_token_ids = (0,)

    def encode(self, text: str) -> list[int]:
        return [100 + ord(letter) - ord("a") for letter in text]

    def prompt(self, question: str) -> list[int]:
        return [1, 2]


CODEC = Letters()


def node(parent: int, text: str, **changes: Any) -> ThoughtNode:
    """Return a node with one token for each character. The first token is forced."""
    ids = CODEC.encode(text)
    logprobs = [0.0, *(-0.5 for _ in ids[1:])]
    values: dict[str, Any] = {
        "parent": parent,
        "type": "thinking",
        "text": text,
        "token_ids": np.array(ids, dtype=np.int32),
        "forced": 1,
        "logprobs": np.array(logprobs, dtype=np.float32),
        "finish_reason": "stop",
        "versions": (VersionSpan(start=1, version=7),),
    }
    return ThoughtNode(**{**values, **changes})


def answer(parent: int, text: str, verdict: Verdict, scored: int, **changes: Any) -> ThoughtNode:
    reward = verdict.reward
    return node(parent, text, type="answer", verdict=verdict, scored=scored, visits=1, total=reward, **changes)


def tree(*nodes: ThoughtNode, proposer: str = "policy", **changes: Any) -> Tree:
    start = node(-1, "", type="start", logprobs=np.zeros(0, np.float32), forced=0, versions=(), finish_reason=None)
    values: dict[str, Any] = {
        "prompt_id": "p",
        "question": "2+2?",
        "answer": "4",
        "pattern": "a",
        "tokenizers": {proposer: "letters"},
        "models": {proposer: "a model"},
        "prompt_token_ids": {proposer: np.array([1, 2], dtype=np.int32)},
        "nodes": (start, *nodes),
        "stop": "simulations",
        "simulations": 5,
        "calls": 6,
        "tokens": 40,
        "counts": {},
    }
    return Tree(**{**values, **changes})


def build(searched: Tree, extract: ExtractConfig = EXTRACT) -> TrajectoryGroup:
    group = build_searched_group(searched, PROMPT, CODEC, extract)
    assert isinstance(group, TrajectoryGroup)
    return group


# Node 1 was drawn three times. Below it are a right answer, a wrong one and a truncated thought.
SMALL = (
    node(0, "abc", samples=3, visits=2, total=1.0),
    answer(1, "de", RIGHT, 0),
    answer(1, "fg", WRONG, 1),
    node(1, "hijk", defect="truncated", finish_reason="length", versions=(VersionSpan(start=1, version=6),)),
)


def test_a_trajectory_by_hand() -> None:
    group = build(tree(*SMALL))
    first, _, third = group.trajectories
    assert first.token_ids.tolist() == [1, 2, 100, 101, 102, 103, 104]
    assert first.loss_mask.tolist() == [False, False, False, True, True, False, True]
    assert first.behavior_logprobs.tolist() == [0, 0, 0, -0.5, -0.5, 0, -0.5]
    assert first.versions == (VersionSpan(start=3, version=7), VersionSpan(start=6, version=7))
    assert (first.reward, first.outcome, first.answered, first.detail) == (1.0, "ok", True, "right")
    steps = [(s.node, s.parent, s.start, s.stop, s.type, s.samples, s.visits, s.value) for s in first.steps]
    assert steps == [(1, 0, 2, 5, "thinking", 3, 2, 0.5), (2, 1, 5, 7, "answer", 1, 1, 1.0)]
    assert (third.reward, third.outcome, third.answered, third.detail) == (0.0, "wrong", False, "truncated")
    assert third.steps[-1].value is None
    assert [trajectory.finish_reason for trajectory in group.trajectories] == ["stop", "stop", "length"]
    assert group.searched and group.prompt is PROMPT and group.oldest_version == 6


@pytest.mark.parametrize("defect", ["truncated", "unclosed", "malformed", "unanswered"])
def test_a_chain_that_the_policy_ended_without_an_answer_is_wrong(defect: str) -> None:
    group = build(tree(*SMALL[:2], node(1, "hi", defect=defect)))
    assert [t.detail for t in group.trajectories] == ["right", defect]


def test_chains_that_the_search_or_another_model_ended_are_no_trajectories() -> None:
    others = (
        node(1, "hi", defect="off_pattern"),
        node(1, "jk", defect="too_deep"),
        node(1, "lm", defect="truncated", writer="reviewer"),
        node(1, "no"),  # has no child
        node(1, "pq", verdict=Verdict(outcome="timeout", reward=0.0, answered=False, detail="late"), type="answer"),
    )
    two = {"policy": "letters", "reviewer": "letters"}
    group = build(tree(*SMALL, *others, tokenizers=two))
    assert [t.steps[-1].node for t in group.trajectories] == [2, 3, 4]


def test_a_whole_answer_has_the_finish_reason_stop() -> None:
    group = build(tree(node(0, "abc", visits=1, total=1.0), answer(1, "de", RIGHT, 0, finish_reason="length")))
    assert [t.finish_reason for t in group.trajectories] == ["stop"]


def test_tokens_of_a_second_model_are_never_the_policys() -> None:
    reviewed = node(0, "abc", writer="reviewer", visits=1, total=1.0)
    searched = tree(reviewed, answer(1, "de", RIGHT, 0), tokenizers={"policy": "letters", "reviewer": "other"})
    (trajectory,) = build(searched).trajectories
    assert trajectory.loss_mask.tolist() == [False] * 6 + [True]
    assert trajectory.versions == (VersionSpan(start=6, version=7),)
    # A chain without a token of the policy still counts for the advantages of its siblings.
    reviewed_answer = answer(0, "fg", WRONG, 1, writer="reviewer")
    more = build(replace(searched, nodes=(*searched.nodes, reviewed_answer))).trajectories
    assert [t.loss_mask.any() for t in more] == [True, False]
    assert more[1].oldest_version is None


def test_pairs_steps_and_demonstration_follow_the_extract_section() -> None:
    group = build(tree(*SMALL))
    ((pair,), (step,), (shown,)) = (group.pairs, group.step_preferences, group.demonstrations)
    assert pair.chosen_ids.tolist() == [1, 2, 100, 101, 102, 103, 104, 0]
    assert pair.rejected_ids.tolist() == [1, 2, 100, 101, 102, 105, 106, 0]
    assert (step.chosen_ids.tolist(), step.rejected_ids.tolist()) == ([103, 104], [105, 106])
    assert shown.token_ids.tolist() == pair.chosen_ids.tolist()
    assert shown.loss_mask.tolist() == [False] * 2 + [True] * 6
    nothing = build(tree(*SMALL), ExtractConfig(supervised="none", chosen="none", step_preferences=False))
    assert (nothing.pairs, nothing.step_preferences, nothing.demonstrations) == ((), (), ())
    assert len(nothing.trajectories) == 3


def proposed_by_another(*nodes: ThoughtNode) -> Tree:
    written = tuple(replace(node, writer="model") for node in nodes)
    return tree(*written, proposer="model", tokenizers={"model": "other"})


def test_a_tree_of_another_model_gives_pairs_and_a_demonstration_and_no_trajectory() -> None:
    group = build(proposed_by_another(*SMALL))
    assert group.trajectories == ()
    assert group.oldest_version is None
    assert (len(group.pairs), len(group.step_preferences), len(group.demonstrations)) == (1, 1, 1)
    assert group.metrics["scored"] == 2


def test_an_unsolved_tree_of_another_model_is_not_a_failure() -> None:
    group = build(proposed_by_another(node(0, "abc", visits=1), answer(1, "fg", WRONG, 0)))
    assert (group.trajectories, group.pairs, group.demonstrations) == ((), (), ())
    assert (group.metrics["scored"], group.metrics["solved"]) == (1, 0)


@pytest.mark.parametrize(
    "searched",
    [
        tree(node(0, "ab", defect="off_pattern"), node(0, "cd", defect="too_deep"), counts={"off_pattern": 1}),
        proposed_by_another(node(0, "ab", defect="truncated")),
        tree(tokens=0),
    ],
)
def test_a_tree_without_a_judged_or_ended_chain_is_a_failure_with_reason_and_cost(searched: Tree) -> None:
    failure = build_searched_group(searched, PROMPT, CODEC, EXTRACT)
    assert isinstance(failure, RolloutFailure)
    assert failure.prompt is PROMPT
    expected = "1 off_pattern" if searched.counts else "no node could be requested"
    assert failure.reason == f"no chain of the tree was judged or ended: {expected}"
    assert failure.tokens == searched.tokens


def test_figures_by_hand(caplog: pytest.LogCaptureFixture) -> None:
    late = Verdict(outcome="timeout", reward=0.0, answered=False, detail="too late")
    extra = (node(0, "no", type="answer", verdict=late, samples=2), node(0, "rs", backtrack=True))
    with caplog.at_level(logging.WARNING):
        group = build(tree(*SMALL, *extra, answer(0, "tu", replace(RIGHT, reward=0.5), 2)))
    assert group.metrics == {
        "simulations": 5.0,
        "calls": 6.0,
        "tokens": 40.0,
        "scored": 3.0,
        "reward_sum": 1.5,
        "correct": 2.0,
        "solved": 1.0,
        "defects": 1.0,
        "duplicates": 3.0,  # two of the first thought, one of the late answer
        "backtracks": 1.0,
        "verifier_errors": 1.0,
        "replies": 0.0,
        "environment_errors": 0.0,
        "values": 0.0,
        "value_errors": 0.0,
    }
    assert all(type(value) is float for value in group.metrics.values())
    assert [record.getMessage() for record in caplog.records] == [
        "prompt p: verification failed for 1 chains of its tree: too late"
    ]
    assert search_metrics(tree())["scored"] == 0


def test_the_same_nodes_have_the_same_tokens_in_all_trajectories() -> None:
    group = build(tree(*SMALL))

    def values(name: str) -> set[tuple[int, Sequence[Any]]]:
        return {
            (step.node, tuple(getattr(t, name)[step.start : step.stop].tolist()))
            for t in group.trajectories
            for step in t.steps
        }

    for name in ("token_ids", "loss_mask", "behavior_logprobs"):
        assert len(values(name)) == 4
