"""Chains that end without an answer: they are judged as the same completions are without a tree."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import pytest
from played_trees import JUDGES, SEARCHES, verdict_of
from search_world import Grown, Script, World, codec, grow, prompt, search_config, table

from actors.search.group import build_searched_group
from rlsys.config.search import ExtractConfig
from rlsys.search.tree_json import tree_line
from rlsys.trees import ThoughtNode
from rlsys.types import Trajectory, TrajectoryGroup, Verdict

NEXT = {"thinking": 2, "sub_task": 1, "answer": 1}
CHILDREN = {"start": {"thinking": 3}, "thinking": NEXT, "sub_task": NEXT, "reflection": {"thinking": 1}}
AFTER_WRONG = {"thinking": {"reflection": 1}}
STEPS = {"expansion": "chain", "value": {"type": "steps"}}


@dataclass(frozen=True, kw_only=True)
class Judged(World):
    """A world with one of JUDGES, or with the judge of `World`."""

    judging: str | None = None

    def judge(self, chain: str, finished: bool = True) -> Verdict:
        return JUDGES[self.judging](chain, finished) if self.judging else super().judge(chain, finished)


def trajectories(grown: Grown) -> Sequence[Trajectory]:
    """Return the trajectories of a tree; none where the search or failed verifications have ended all its chains."""
    group = build_searched_group(grown.tree, prompt(), codec(), ExtractConfig())
    return group.trajectories if isinstance(group, TrajectoryGroup) else ()


def is_ended_by_the_search(node: ThoughtNode) -> bool:
    """Return whether a completion with these tokens would go on."""
    has_end_token = int(node.token_ids[-1]) in codec().end_token_ids
    is_cut_off = node.finish_reason == "length" and node.defect != "wrong_step"
    return node.defect is not None and not has_end_token and not is_cut_off


@pytest.mark.parametrize("kind", [*SEARCHES, "steps"])
@pytest.mark.parametrize("judging", [None, *JUDGES])
def test_a_chain_without_an_answer_has_the_verdict_on_its_completion(kind: str, judging: str | None) -> None:
    world = Judged(pattern=table(CHILDREN, AFTER_WRONG), defects=0.3, judging=judging)
    searched = {"backtracking": False, **{**SEARCHES, "steps": STEPS}[kind]}
    config = search_config(**searched, parallel_simulations=3, max_depth=12, stop={"simulations": 20})
    seen = Counter[str]()
    for seed, tokens in enumerate((500, 30, 12)):
        result = grow(world, config, seed=seed, max_chain_tokens=tokens)
        if config.expansion == "chain":
            parents = {node.parent for node in result.tree.nodes}
            ends = [node for n, node in enumerate(result.tree.nodes) if n not in parents and node.defect is None]
            assert [node for node in ends if node.finish_reason == "length" and node.type != "answer"] == []
        for chain in trajectories(result):
            node = result.tree.nodes[chain.steps[-1].node]
            if is_ended_by_the_search(node):
                seen["ended by the search"] += 1
                expected = Verdict(outcome="wrong", reward=0.0, answered=False, detail=node.defect or "")
                assert (verdict_of(chain), chain.finish_reason) == (expected, "stop")
                continue
            ids = chain.token_ids[len(prompt().token_ids) :].tolist()
            text = codec().decode([token for token in ids if token not in codec().end_token_ids])
            assert verdict_of(chain) == world.judge(text, chain.finish_reason != "length")
            seen[f"{node.defect is None} {chain.finish_reason}"] += 1
            if kind != "agreement" and node.defect:
                assert node.visits == node.samples and node.total == node.visits * chain.reward
    assert {"True stop", "False stop", "False length"} <= set(seen)


@pytest.mark.parametrize("kind", SEARCHES)
def test_the_order_of_arrival_does_not_change_a_tree_with_failed_chains(kind: str) -> None:
    world = Judged(pattern=table(CHILDREN, AFTER_WRONG), defects=0.3, judging="functions")
    searched = {"backtracking": False, **SEARCHES[kind], "parallel_simulations": 4, "max_depth": 12}
    config = search_config(**searched, stop={"simulations": 24})
    orders = [None, *map(random.Random, range(1, 4))]
    assert len({tree_line(grow(world, config, arrivals=order).tree) for order in orders}) == 1


def test_a_chain_that_is_cut_off_after_a_whole_node_is_judged() -> None:
    """There is room for the 3 tokens of one thought."""
    world = Script(
        table({"start": {"thinking": 3}, "thinking": {"answer": 1}}), {"": ["<thinking>a</thinking><answer>"]}
    )
    config = search_config(backtracking=False, expansion="chain", stop={"simulations": 1})
    result = grow(world, config, max_chain_tokens=3)
    [node], [chain] = result.tree.nodes[1:], trajectories(result)
    assert (node.text, node.defect, node.visits, node.scored) == ("<thinking>a</thinking>", "truncated", 1, -1)
    assert (chain.outcome, chain.reward, chain.finish_reason, chain.truncated) == ("wrong", 0.0, "length", True)


def test_a_failed_verification_of_a_chain_without_an_answer_gives_no_reward() -> None:
    world = Script(table({"start": {"thinking": 3}, "thinking": {"answer": 1}}), {"": ["<thinking>e</thinking>"] * 2})
    tree = grow(world, search_config(backtracking=False, expansion="chain", stop={"simulations": 2})).tree
    [node] = tree.nodes[1:]
    assert (node.defect, node.samples, node.visits, node.scored) == ("unanswered", 2, 0, -1)
    assert node.verdict is not None and node.verdict.outcome == "error"
    assert tree.counts["verifier_error"] == 1, "the same chain is judged once"


def test_a_right_answer_in_a_chain_without_the_form_is_no_answer_of_the_tree() -> None:
    chains = ["<thinking>a</thinking><answer>1</answer><thinking>1</thinking>", "<thinking>b</thinking>"]
    world = Script(table({"start": {"thinking": 3}, "thinking": {"answer": 1}}), {"": chains})
    result = grow(world, search_config(backtracking=False, expansion="chain", stop={"simulations": 2}))
    tree = result.tree
    assert not tree.answers() and not tree.solved and tree.nodes[0].total == 1.0
    assert [(chain.reward, chain.outcome) for chain in trajectories(result)] == [(1.0, "ok"), (0.0, "wrong")]
