"""Rules of a tree, among them all in which the paper's authors' program errs."""

from __future__ import annotations

from typing import Any

import pytest
from search_world import (
    ONE_THOUGHT,
    THINK,
    World,
    codec,
    grow,
    scripted,
    search_config,
    search_model,
    shipped,
    table,
    token_logprob,
    token_version,
)
from tree_samples import children_of

from actors.search.requests import Judge
from rlsys.config.search import CorrectRule
from rlsys.search.tree_json import parse_line, tree_line
from rlsys.types import VersionSpan


def test_an_answer_drawn_again_counts_once() -> None:
    """Four draws of one right chain are one distinct answer, judged once. The limit is two right answers."""
    chain = f"{THINK}<answer>1</answer>"
    world = scripted({"start": {"thinking": 4}, "thinking": {"answer": 1}}, {"": [chain] * 4})
    grown = grow(world, search_config(expansion="chain", stop={"correct": [CorrectRule(count=2)]}))
    tree = grown.tree
    assert (tree.stop, grown.judged) == ("exhausted", [chain])
    [answer] = tree.answers()
    assert (tree.nodes[answer].visits, tree.nodes[answer].total, tree.nodes[answer].samples) == (4, 4.0, 4)


@pytest.mark.parametrize("most", [1, 2])
def test_backtracking_children_of_an_ancestor_are_bounded(most: int) -> None:
    """There are four wrong answers below the thought and one below each reclarification."""
    children = {**ONE_THOUGHT, "thinking": {"answer": 4}, "reclarify": {"answer": 1}}
    reclarified = [f"{letter}</reclarify>" for letter in "ab"][:most]
    below = {f"{THINK}<reclarify>{text}<answer>": ["000</answer>"] for text in reclarified}
    world = scripted(
        children,
        {
            "<thinking>": ["a</thinking>"],
            f"{THINK}<answer>": [f"{'0' * n}</answer>" for n in range(1, 5)],
            f"{THINK}<reclarify>": reclarified,
            **below,
        },
        {"thinking": {"reclarify": most}},
    )
    tree = grow(world, search_config()).tree
    assert [node.type for node in tree.nodes if node.backtrack] == ["reclarify"] * most
    assert (tree.counts["backtracks"], len(tree.answers())) == (most, 4 + most)
    assert not any(world.left.values())


def test_no_backtracking_if_it_is_off_or_the_answer_is_right() -> None:
    children = {**ONE_THOUGHT, "thinking": {"answer": 1}, "reclarify": {"answer": 1}}
    wrong = {"thinking": {"reclarify": 1}}
    for letter, on in (("0", False), ("1", True), ("e", True), ("t", True)):
        world = scripted(children, {"<thinking>": ["a</thinking>"], f"{THINK}<answer>": [f"{letter}</answer>"]}, wrong)
        tree = grow(world, search_config(backtracking=on)).tree
        assert (len(tree.nodes), tree.stop) == (3, "exhausted")


def test_a_truncated_node_is_invalid_and_never_closed() -> None:
    """Three tokens are allowed. The thoughts have 4 + 1 and 2 + 1 tokens with their closing tags."""
    world = scripted(
        {"start": {"thinking": 2}, "thinking": {"answer": 1}},
        {"<thinking>": ["abab</thinking>", "ab</thinking>"], "<thinking>ab</thinking><answer>": ["1</answer>"]},
    )
    grown = grow(world, search_config(max_node_tokens=3))
    cut = grown.tree.nodes[1]
    assert (cut.text, cut.defect, cut.finish_reason, cut.generated) == ("<thinking>aba", "too_long", "length", 3)
    assert (children_of(grown.tree, 1), cut.visits, grown.tree.counts) == ([], 0, {"too_long": 1})
    assert grown.judged == ["<thinking>ab</thinking><answer>1</answer>"]


@pytest.mark.parametrize(("most", "defect"), [(2, "too_long"), (3, None)])
def test_a_node_of_a_chain_has_the_limit_of_a_single_node(most: int, defect: str | None) -> None:
    """Two letters and the closing tag are 3 tokens. The opening tag does not count."""
    chain = "<thinking>ab</thinking><answer>1</answer>"
    world = scripted({**ONE_THOUGHT, "thinking": {"answer": 1}}, {"": [chain]})
    grown = grow(world, search_config(expansion="chain", max_node_tokens=most))
    assert grown.tree.nodes[1].defect == defect
    assert grown.judged == ([] if defect else [chain])


def test_a_chain_without_an_answer_has_reward_0_and_its_branch_loses() -> None:
    """One branch never reaches an answer; the simulations go to the other one."""
    children = {"start": {"thinking": 1, "hypothesis": 1}, "thinking": {"answer": 8}, "hypothesis": {"answer": 8}}
    dead = "<hypothesis>a</hypothesis>"
    proposals = {
        "<thinking>": ["a</thinking>"],
        "<hypothesis>": ["a</hypothesis>"],
        f"{THINK}<answer>": [f"{'0' * n}</answer>" for n in range(1, 9)],
        f"{dead}<answer>": ["0" * 600] * 8,  # to the end of the chain
    }
    tree = grow(scripted(children, proposals), search_config(max_node_tokens=999, stop={"simulations": 12})).tree
    by_text = {node.text: node for node in tree.nodes}
    assert (by_text[dead].visits, by_text[dead].total, by_text[dead].value) == (8, 0.0, 0.0)
    assert tree.nodes[0].visits == 8 + len(tree.answers()) and len(tree.answers()) == 8


def test_a_chain_that_is_truncated_in_an_answer_is_judged_as_cut_off() -> None:
    """There is room for 7 tokens: 3 for the thought, 1 for the answer's tag and 3 for letters."""
    world = scripted({**ONE_THOUGHT, "thinking": {"answer": 1}}, {"": [f"{THINK}<answer>1111</answer>"]})
    grown = grow(world, search_config(expansion="chain", stop={"simulations": 1}), max_chain_tokens=7)
    last = grown.tree.nodes[-1]
    assert (last.text, last.defect, last.scored) == ("<answer>111", "truncated", -1)
    asked = [(event.completion, event.finished) for event in grown.events if isinstance(event, Judge)]
    assert asked == [(f"{THINK}<answer>111", False)] and grown.tree.simulations == 1


@pytest.mark.parametrize("more", ["b", THINK, "<answer>0</answer>"])
def test_an_answer_with_text_after_it_is_no_answer_of_the_tree(more: str) -> None:
    """It is judged as the completion that it is."""
    children = {"start": {"thinking": 2}, "thinking": {"answer": 1}}
    world = scripted(children, {"": [f"{THINK}<answer>1</answer>{more}", f"{THINK}<answer>0</answer>"]})
    grown = grow(world, search_config(expansion="chain"))
    assert grown.judged == [f"{THINK}<answer>1</answer>{more}", f"{THINK}<answer>0</answer>"]
    [cut] = [node for node in grown.tree.nodes if node.defect]
    assert (cut.type, cut.text, cut.defect, cut.scored) == ("answer", f"<answer>1</answer>{more}", "malformed", -1)


def test_simulations_do_not_enter_finished_branches() -> None:
    """With 3 answers and 99 allowed simulations, 3 are begun, one for each answer."""
    world = scripted(
        {**ONE_THOUGHT, "thinking": {"answer": 3}},
        {"<thinking>": ["a</thinking>"], f"{THINK}<answer>": ["0</answer>", "1</answer>", "01</answer>"]},
    )
    tree = grow(world, search_config(stop={"simulations": 99})).tree
    assert (tree.stop, tree.simulations, [tree.nodes[n].visits for n in tree.answers()]) == ("exhausted", 3, [1, 1, 1])


def test_a_loop_ends_at_the_depth_limit() -> None:
    """The table allows endless thoughts. A chain has at most 4 nodes, and the last one is an answer."""
    world = World(pattern=table({**ONE_THOUGHT, "thinking": {"thinking": 1, "answer": 1}}), defects=0, failures=0)
    tree = grow(world, search_config(max_depth=4, stop={"simulations": 200})).tree
    depths = {node.type: [] for node in tree.nodes}
    for number, node in enumerate(tree.nodes):
        depths[node.type].append(len(tree.path(number)))
    assert (max(depths["thinking"]), sorted(depths["answer"]), tree.stop) == (3, [2, 3, 4], "exhausted")


@pytest.mark.parametrize("expansion", ["node", "chain"])
def test_no_call_if_the_depth_limit_leaves_no_way_to_an_answer(expansion: str) -> None:
    """A thought or a check may follow a thought; an answer may follow a check only. With at most 4 nodes the second
    thought is the last one, and the third node is a check."""
    children = {**ONE_THOUGHT, "thinking": {"thinking": 1, "double_check": 1}, "double_check": {"answer": 1}}
    world = World(pattern=table(children), defects=0, failures=0)
    grown = grow(world, search_config(expansion=expansion, max_depth=4, stop={"simulations": 200}))
    tree = grown.tree
    if expansion == "node":
        assert sorted((len(tree.path(number)), node.type) for number, node in enumerate(tree.nodes)) == [
            (0, "start"),
            (1, "thinking"),
            (2, "double_check"),
            (2, "thinking"),
            (3, "answer"),
            (3, "double_check"),
            (4, "answer"),
        ]
    for call, _ in grown.calls:
        said = codec().decode(call.token_ids[len(search_model().prompt_ids) :])
        assert said.count("</thinking>") + said.count("</double-check>") < 4
        assert said.count("</thinking>") < 3


def test_no_backtracking_if_the_depth_limit_leaves_no_way_to_an_answer() -> None:
    """After the first thought a reclarification needs a thought and an answer: 4 nodes."""
    children = {**ONE_THOUGHT, "thinking": {"answer": 1}, "reclarify": {"thinking": 1}}
    said = {"<thinking>": ["a</thinking>"], f"{THINK}<answer>": ["0</answer>"]}
    reclarified = f"{THINK}<reclarify>b</reclarify>"
    more = {
        f"{THINK}<reclarify>": ["b</reclarify>"],
        f"{reclarified}<thinking>": ["b</thinking>"],
        f"{reclarified}<thinking>b</thinking><answer>": ["1</answer>"],
    }
    wrong = {"thinking": {"reclarify": 1}}
    assert len(grow(scripted(children, said, wrong), search_config(max_depth=3)).tree.nodes) == 3
    assert len(grow(scripted(children, {**said, **more}, wrong), search_config(max_depth=4)).tree.nodes) == 6


def test_the_verifier_decides_on_the_whole_chain() -> None:
    world = scripted(
        {**ONE_THOUGHT, "thinking": {"answer": 2}},
        {"<thinking>": ["a</thinking>"], f"{THINK}<answer>": ["0</answer>", "1</answer>"]},
    )
    grown = grow(world, search_config())
    assert sorted(grown.judged) == [f"{THINK}<answer>0</answer>", f"{THINK}<answer>1</answer>"]
    right = {node.text: node.correct for node in grown.tree.nodes if node.verdict}
    assert right == {"<answer>0</answer>": False, "<answer>1</answer>": True}


def test_a_node_keeps_its_tokens_and_where_they_come_from() -> None:
    world = scripted(
        {**ONE_THOUGHT, "thinking": {"answer": 1}},
        {"<thinking>": ["ab</thinking>"], "<thinking>ab</thinking><answer>": ["1</answer>"]},
    )
    tree = grow(world, search_config()).tree
    own, start = codec(), len(search_model().prompt_ids)
    node = tree.nodes[1]
    ids = [*own.encode("<thinking>"), *own.encode("ab</thinking>")]
    assert node.token_ids.tolist() == ids and (node.forced, node.writer, node.finish_reason) == (1, "policy", "stop")
    context = [*own.prompt(tree.question), *ids]
    assert node.logprobs.tolist() == [0.0, *(token_logprob(context[: start + n]) for n in (2, 3, 4))]
    changes = [n for n in (1, 2, 3) if n == 1 or token_version(start + n) != token_version(start + n - 1)]
    assert node.versions == tuple(VersionSpan(start=n, version=token_version(start + n)) for n in changes)


def test_the_seed_decides_all_draws() -> None:
    def line(**arguments: Any) -> str:
        return tree_line(grow(World(pattern=shipped("d")), search_config(stop={"simulations": 20}), **arguments).tree)

    assert line(seed=3) == line(seed=3)
    assert line(seed=3) != line(seed=4)
    assert line(seed=3, prompt_id="p") != line(seed=3, prompt_id="q").replace('"q"', '"p"')
    assert tree_line(parse_line(line(seed=3))) == line(seed=3)


def test_a_failed_verification_gives_no_reward_and_the_tree_goes_on() -> None:
    world = scripted(
        {**ONE_THOUGHT, "thinking": {"answer": 3}},
        {"<thinking>": ["a</thinking>"], f"{THINK}<answer>": ["e</answer>", "t</answer>", "1</answer>"]},
        {"thinking": {"thinking": 1}},
    )
    tree = grow(world, search_config()).tree
    by_text = {node.text: node for node in tree.nodes}
    for letter in "et":
        node = by_text[f"<answer>{letter}</answer>"]
        assert (node.visits, node.total, node.scored, node.correct) == (0, 0.0, -1, False)
    assert (tree.nodes[0].visits, tree.nodes[0].total) == (1, 1.0)
    assert (tree.counts, tree.simulations, tree.stop) == ({"verifier_error": 1, "verifier_timeout": 1}, 3, "exhausted")
