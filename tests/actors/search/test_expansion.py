"""Token limits of a call, and the forced start of its node."""

from __future__ import annotations

import random

import pytest
from search_world import (
    BARE,
    ONE_THOUGHT,
    THINK,
    Script,
    codec,
    grow,
    scripted,
    search_config,
    search_model,
    table,
)

from actors.search.expansion import Expander
from actors.search.tree import GrowingTree, NewNode
from rlsys.trees import Tree


def texts(tree: Tree) -> list[str]:
    return [node.text for node in tree.nodes[1:]]


def test_the_limit_of_a_node_type_comes_before_that_of_the_search() -> None:
    thinking = BARE["thinking"].model_copy(update={"max_tokens": 5})
    pattern = table({**ONE_THOUGHT, "thinking": {"answer": 1}}, None, {"thinking": thinking})
    world = Script(pattern, {"<thinking>": ["a</thinking>"], f"{THINK}<answer>": ["1</answer>"]})
    calls = grow(world, search_config(max_node_tokens=9)).calls
    assert [call.max_tokens for call, _ in calls] == [5, 9]


def test_calls_keep_within_the_context_and_the_chain() -> None:
    """Tag, 2 drawn tokens and tag are 4 tokens. A chain of 6 tokens then has room for 2 more, and so has a context of
    6 tokens after the prompt."""
    children = {**ONE_THOUGHT, "thinking": {"answer": 1}}
    said = {"<thinking>": ["a</thinking>"], f"{THINK}<answer>": ["1</answer>"]}
    room = len(search_model().prompt_ids) + 6
    for arguments in ({"max_chain_tokens": 6}, {"models": {"policy": search_model(max_model_len=room)}}):
        calls = grow(scripted(children, said), search_config(), **arguments).calls
        assert [call.max_tokens for call, _ in calls] == [5, 2]


@pytest.mark.parametrize("expansion", ["node", "chain"])
def test_a_lack_of_room_is_counted_and_no_model_is_asked(expansion: str) -> None:
    world = scripted({"start": {"thinking": 2}, "thinking": {"answer": 1}}, {})
    grown = grow(
        world,
        search_config(expansion=expansion),
        models={"policy": search_model(max_model_len=len(search_model().prompt_ids))},
    )
    assert (grown.events, grown.tree.stop, grown.tree.calls) == ([], "exhausted", 0)
    assert grown.tree.counts == {"no_room": 2 if expansion == "node" else 1}


def test_a_chain_without_room_below_leaves_other_branches_open() -> None:
    """A chain has at most 4 tokens. A thought takes 3, and the last one is not enough for an answer. The second chain
    has its answer in 3 tokens."""
    world = scripted(
        {"start": {"thinking": 1, "answer": 1}, "thinking": {"answer": 1}},
        {"": [f"{THINK}<answer>1</answer>", "<answer>1</answer>"]},
    )
    tree = grow(world, search_config(expansion="chain"), max_chain_tokens=4).tree
    assert texts(tree) == [THINK, "<answer>", "<answer>1</answer>"]
    assert (tree.nodes[2].defect, tree.stop) == ("truncated", "exhausted")


def test_only_a_matching_node_follows_the_beginning_of_a_node() -> None:
    """The last token of a thought also holds "<t". Neither a fixed reflection nor an answer can follow it."""
    pattern = table(
        {**ONE_THOUGHT, "thinking": {"reflection": 1, "answer": 1, "thinking": 1}, "reflection": {"answer": 1}}
    )
    tree = GrowingTree(pattern, chains=False, max_depth=9)
    expander = Expander(
        tree, search_config(), {"policy": search_model()}, random.Random(0), tree_seed=(0, "p"), max_chain_tokens=99
    )
    new = NewNode(
        type="thinking",
        text=THINK,
        token_ids=codec().encode(f"{THINK}<t"),
        forced=1,
        logprobs=[-1.0] * 4,
        spill="<t",
        writer="policy",
        finish_reason="stop",
        versions=(),
        defect=None,
    )
    plan = expander.children(tree.add(tree.root, new))
    assert (plan.fixed, [part.type for part in plan.calls]) == ([], ["thinking"])
    # "<t" is there already, so only the rest of the opening tag is forced.
    assert codec().decode(plan.calls[0].forced) == "hinking>"
    assert tree.counts == {"other_node_begun": 2}
