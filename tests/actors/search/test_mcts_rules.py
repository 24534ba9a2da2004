"""Rules of a tree one by one: what the authors' program gets wrong, when a tree stops, what limits a call."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import pytest
from search_world import (
    BARE,
    Grown,
    Script,
    World,
    codec,
    grow,
    prompt,
    shipped,
    table,
    token_logprob,
    token_version,
    writer,
)
from tree_samples import children_of

from actors.search.expansion import Expander
from actors.search.mcts import TreeSearch
from actors.search.requests import Ask, Judge
from actors.search.tree import GrowingTree, NewNode
from rlsys.config.search import CorrectRule, FrontierConfig, SearchConfig, StopConfig, UcbConfig
from rlsys.search.tree_json import parse_line, tree_line
from rlsys.trees import Tree
from rlsys.types import Verdict, VersionSpan

THINK = "<thinking>a</thinking>"
ONE_THOUGHT = {"start": {"thinking": 1}}


def config(**fields: Any) -> SearchConfig:
    """One simulation at a time and no rule that stops a tree, unless told."""
    stop = StopConfig.model_validate({"correct": (), **fields.pop("stop", {})})
    return SearchConfig(**{"parallel_simulations": 1, "stop": stop, **fields})


def script(children: Mapping[str, Any], proposals: Mapping[str, Any], after_wrong: Mapping[str, Any] = {}) -> Script:
    return Script(table(children, after_wrong), proposals)


def texts(tree: Tree) -> list[str]:
    return [node.text for node in tree.nodes[1:]]


# --- the flaws of the authors' program, row by row ---


def test_an_answer_drawn_again_counts_once() -> None:
    """Four draws of one right chain: one distinct answer, judged once, and no reason to stop at two of them."""
    chain = f"{THINK}<answer>1</answer>"
    world = script({"start": {"thinking": 4}, "thinking": {"answer": 1}}, {"": [chain] * 4})
    grown = grow(world, config(expansion="chain", stop={"correct": [CorrectRule(count=2)]}))
    tree = grown.tree
    assert (tree.stop, grown.judged) == ("exhausted", [chain])
    [answer] = tree.answers()
    assert (tree.nodes[answer].visits, tree.nodes[answer].total, tree.nodes[answer].samples) == (4, 4.0, 4)


@pytest.mark.parametrize("most", [1, 2])
def test_backtracking_children_of_an_ancestor_are_bounded(most: int) -> None:
    """Four wrong answers below one thought, then one below each reclarification: so many times it is reclarified."""
    children = {**ONE_THOUGHT, "thinking": {"answer": 4}, "reclarify": {"answer": 1}}
    again = [f"{letter}</reclarify>" for letter in "ab"][:most]
    below = {f"{THINK}<reclarify>{text}<answer>": ["000</answer>"] for text in again}
    world = script(
        children,
        {
            "<thinking>": ["a</thinking>"],
            f"{THINK}<answer>": [f"{'0' * n}</answer>" for n in range(1, 5)],
            f"{THINK}<reclarify>": again,
            **below,
        },
        {"thinking": {"reclarify": most}},
    )
    tree = grow(world, config()).tree
    assert [node.type for node in tree.nodes if node.backtrack] == ["reclarify"] * most
    assert (tree.counts["backtracks"], len(tree.answers())) == (most, 4 + most)
    assert not any(world.left.values())


def test_no_backtracking_where_it_is_off_or_the_answer_is_right() -> None:
    children = {**ONE_THOUGHT, "thinking": {"answer": 1}, "reclarify": {"answer": 1}}
    wrong = {"thinking": {"reclarify": 1}}
    for letter, on in (("0", False), ("1", True), ("e", True), ("t", True)):
        world = script(children, {"<thinking>": ["a</thinking>"], f"{THINK}<answer>": [f"{letter}</answer>"]}, wrong)
        tree = grow(world, config(backtracking=on)).tree
        assert (len(tree.nodes), tree.stop) == (3, "exhausted")


def test_a_truncated_node_is_invalid_and_never_closed() -> None:
    """Three tokens are allowed; a thought of four letters and one of two: 4 + 1 tokens with its closing tag, 2 + 1."""
    world = script(
        {"start": {"thinking": 2}, "thinking": {"answer": 1}},
        {"<thinking>": ["abab</thinking>", "ab</thinking>"], "<thinking>ab</thinking><answer>": ["1</answer>"]},
    )
    grown = grow(world, config(max_node_tokens=3))
    cut = grown.tree.nodes[1]
    assert (cut.text, cut.defect, cut.finish_reason, cut.generated) == ("<thinking>aba", "too_long", "length", 3)
    assert (children_of(grown.tree, 1), cut.visits, grown.tree.counts) == ([], 0, {"too_long": 1})
    assert grown.judged == ["<thinking>ab</thinking><answer>1</answer>"]


@pytest.mark.parametrize(("most", "defect"), [(2, "too_long"), (3, None)])
def test_a_node_of_a_chain_has_the_limit_of_a_node_of_its_own(most: int, defect: str | None) -> None:
    """Two letters and the closing tag are 3 tokens, whoever put the opening tag."""
    chain = "<thinking>ab</thinking><answer>1</answer>"
    world = script({**ONE_THOUGHT, "thinking": {"answer": 1}}, {"": [chain]})
    grown = grow(world, config(expansion="chain", max_node_tokens=most))
    assert grown.tree.nodes[1].defect == defect
    assert grown.judged == ([] if defect else [chain])


def test_a_chain_without_an_answer_has_reward_0_and_its_branch_is_left() -> None:
    """One branch never comes to an answer: the answers of the other grow with the simulations."""
    children = {"start": {"thinking": 1, "hypothesis": 1}, "thinking": {"answer": 8}, "hypothesis": {"answer": 8}}
    dead = "<hypothesis>a</hypothesis>"
    proposals = {
        "<thinking>": ["a</thinking>"],
        "<hypothesis>": ["a</hypothesis>"],
        f"{THINK}<answer>": [f"{'0' * n}</answer>" for n in range(1, 9)],
        f"{dead}<answer>": ["0" * 600] * 8,  # to the end of the chain
    }
    tree = grow(script(children, proposals), config(max_node_tokens=999, stop={"simulations": 12})).tree
    by_text = {node.text: node for node in tree.nodes}
    assert (by_text[dead].visits, by_text[dead].total, by_text[dead].value) == (8, 0.0, 0.0)
    assert tree.nodes[0].visits == 8 + len(tree.answers()) and len(tree.answers()) == 8


def test_a_chain_that_is_cut_off_in_an_answer_is_not_judged() -> None:
    """Room for 7 tokens: a thought is 3 of them, the answer's tag and two letters 3; the next is the last."""
    world = script({**ONE_THOUGHT, "thinking": {"answer": 1}}, {"": [f"{THINK}<answer>1111</answer>"]})
    grown = grow(world, config(expansion="chain", stop={"simulations": 1}), max_chain_tokens=7)
    last = grown.tree.nodes[-1]
    assert (last.text, last.defect, last.verdict) == ("<answer>111", "truncated", None)
    assert grown.judged == [] and grown.tree.simulations == 1


@pytest.mark.parametrize("more", ["b", THINK, "<answer>0</answer>"])
def test_an_answer_that_anything_follows_is_not_judged(more: str) -> None:
    """The verifier refuses such a completion too: the policy cannot collect reward by going on."""
    children = {"start": {"thinking": 2}, "thinking": {"answer": 1}}
    world = script(children, {"": [f"{THINK}<answer>1</answer>{more}", f"{THINK}<answer>0</answer>"]})
    grown = grow(world, config(expansion="chain"))
    assert grown.judged == [f"{THINK}<answer>0</answer>"]
    [cut] = [node for node in grown.tree.nodes if node.defect]
    assert (cut.type, cut.text, cut.defect) == ("answer", f"<answer>1</answer>{more}", "malformed")


def test_finished_branches_are_not_gone_to_again() -> None:
    """3 answers, 99 simulations allowed: 3 are begun, one for each."""
    world = script(
        {**ONE_THOUGHT, "thinking": {"answer": 3}},
        {"<thinking>": ["a</thinking>"], f"{THINK}<answer>": ["0</answer>", "1</answer>", "01</answer>"]},
    )
    tree = grow(world, config(stop={"simulations": 99})).tree
    assert (tree.stop, tree.simulations, [tree.nodes[n].visits for n in tree.answers()]) == ("exhausted", 3, [1, 1, 1])


def test_a_loop_ends_at_the_depth_limit() -> None:
    """thinking -> thinking without end; 4 nodes at most, so that the last of a chain is an answer."""
    world = World(pattern=table({**ONE_THOUGHT, "thinking": {"thinking": 1, "answer": 1}}), defects=0, failures=0)
    tree = grow(world, config(max_depth=4, stop={"simulations": 200})).tree
    depths = {node.type: [] for node in tree.nodes}
    for number, node in enumerate(tree.nodes):
        depths[node.type].append(len(tree.path(number)))
    assert (max(depths["thinking"]), sorted(depths["answer"]), tree.stop) == (3, [2, 3, 4], "exhausted")


@pytest.mark.parametrize("expansion", ["node", "chain"])
def test_nothing_is_asked_where_the_depth_limit_leaves_no_way_to_an_answer(expansion: str) -> None:
    """A thought is followed by a thought or by a check, only a check by an answer. 4 nodes at most: the second thought
    is the last one, the third place is a check's."""
    children = {**ONE_THOUGHT, "thinking": {"thinking": 1, "double_check": 1}, "double_check": {"answer": 1}}
    world = World(pattern=table(children), defects=0, failures=0)
    grown = grow(world, config(expansion=expansion, max_depth=4, stop={"simulations": 200}))
    tree = grown.tree
    if expansion == "node":
        found = sorted((len(tree.path(number)), node.type) for number, node in enumerate(tree.nodes))
        assert found == [
            (0, "start"),
            (1, "thinking"),
            (2, "double_check"),
            (2, "thinking"),
            (3, "answer"),
            (3, "double_check"),
            (4, "answer"),
        ]
    for call, _ in grown.calls:
        said = codec().decode(call.token_ids[len(writer().prompt_ids) :])
        assert said.count("</thinking>") + said.count("</double-check>") < 4
        assert said.count("</thinking>") < 3


def test_no_backtracking_where_the_depth_limit_leaves_no_way_to_an_answer() -> None:
    """Behind the thought at place 1 a reclarification takes a thought and an answer: 4 nodes."""
    children = {**ONE_THOUGHT, "thinking": {"answer": 1}, "reclarify": {"thinking": 1}}
    said = {"<thinking>": ["a</thinking>"], f"{THINK}<answer>": ["0</answer>"]}
    again = f"{THINK}<reclarify>b</reclarify>"
    more = {
        f"{THINK}<reclarify>": ["b</reclarify>"],
        f"{again}<thinking>": ["b</thinking>"],
        f"{again}<thinking>b</thinking><answer>": ["1</answer>"],
    }
    wrong = {"thinking": {"reclarify": 1}}
    assert len(grow(script(children, said, wrong), config(max_depth=3)).tree.nodes) == 3
    assert len(grow(script(children, {**said, **more}, wrong), config(max_depth=4)).tree.nodes) == 6


def test_the_verifier_decides_on_the_whole_chain() -> None:
    world = script(
        {**ONE_THOUGHT, "thinking": {"answer": 2}},
        {"<thinking>": ["a</thinking>"], f"{THINK}<answer>": ["0</answer>", "1</answer>"]},
    )
    grown = grow(world, config())
    assert sorted(grown.judged) == [f"{THINK}<answer>0</answer>", f"{THINK}<answer>1</answer>"]
    right = {node.text: node.correct for node in grown.tree.nodes if node.verdict}
    assert right == {"<answer>0</answer>": False, "<answer>1</answer>": True}


def test_a_node_keeps_its_tokens_and_where_they_come_from() -> None:
    world = script(
        {**ONE_THOUGHT, "thinking": {"answer": 1}},
        {"<thinking>": ["ab</thinking>"], "<thinking>ab</thinking><answer>": ["1</answer>"]},
    )
    tree = grow(world, config()).tree
    own, start = codec(), len(writer().prompt_ids)
    node = tree.nodes[1]
    ids = [*own.encode("<thinking>"), *own.encode("ab</thinking>")]
    assert node.token_ids.tolist() == ids and (node.forced, node.writer, node.finish_reason) == (1, "policy", "stop")
    context = [*own.prompt(tree.question), *ids]
    assert node.logprobs.tolist() == [0.0, *(token_logprob(context[: start + n]) for n in (2, 3, 4))]
    changes = [n for n in (1, 2, 3) if n == 1 or token_version(start + n) != token_version(start + n - 1)]
    assert node.versions == tuple(VersionSpan(start=n, version=token_version(start + n)) for n in changes)


def test_the_seed_decides_everything() -> None:
    def line(**arguments: Any) -> str:
        return tree_line(grow(World(pattern=shipped("d")), config(stop={"simulations": 20}), **arguments).tree)

    assert line(seed=3) == line(seed=3)
    assert line(seed=3) != line(seed=4)
    assert line(seed=3, prompt_id="p") != line(seed=3, prompt_id="q").replace('"q"', '"p"')
    assert tree_line(parse_line(line(seed=3))) == line(seed=3)


# --- when a tree stops ---


def events(grown: Grown) -> list[str]:
    """ask, judge, or the outcome of what was delivered."""
    found = []
    for event in grown.events:
        if isinstance(event, tuple):
            found.append(event[1].outcome if isinstance(event[1], Verdict) else "drawn")
        else:
            found.append({Ask: "ask", Judge: "judge"}[type(event)])
    return found


def test_no_call_once_the_tokens_are_spent() -> None:
    """Two simulations wait for one thought of 2 tokens; it is the last that 2 tokens allow."""
    world = script({**ONE_THOUGHT, "thinking": {"thinking": 2, "answer": 2}}, {"<thinking>": ["a</thinking>"]})
    grown = grow(world, config(parallel_simulations=2, stop={"tokens": 2}))
    assert (events(grown), grown.tree.stop, grown.tree.tokens) == (["ask", "drawn"], "tokens", 2)


def test_answers_that_are_there_are_judged_when_the_tokens_are_spent() -> None:
    """3 tokens are not spent after the thought (2), and are after the answer (4), which is under way by then."""
    world = script(
        {**ONE_THOUGHT, "thinking": {"answer": 1}}, {"<thinking>": ["a</thinking>"], f"{THINK}<answer>": ["1</answer>"]}
    )
    grown = grow(world, config(stop={"tokens": 3}))
    assert events(grown) == ["ask", "drawn", "ask", "drawn", "judge", "ok"]
    assert (grown.tree.stop, len(grown.tree.answers())) == ("tokens", 1)


def test_distinct_scored_answers_stop_a_tree_and_errors_are_none() -> None:
    world = script(
        {**ONE_THOUGHT, "thinking": {"answer": 4}},
        {"<thinking>": ["a</thinking>"], f"{THINK}<answer>": [f"{x}</answer>" for x in ("e", "0", "1", "t")]},
    )
    tree = grow(world, config(stop={"answers": 2})).tree
    assert (tree.stop, len(tree.answers())) == ("answers", 2)
    judged = [node for node in tree.nodes if node.verdict]
    assert all((node.scored >= 0) == (node.verdict.outcome in ("ok", "wrong")) for node in judged)


def test_a_threshold_holds_only_after_its_simulations() -> None:
    """Every answer is right. One is enough after 3 simulations, 5 at once: so 3 are finished."""
    world = script(
        {"start": {"thinking": 9}, "thinking": {"answer": 1}},
        {"": [f"<thinking>{'a' * n}</thinking><answer>1</answer>" for n in range(9)]},
    )
    rules = [CorrectRule(count=5), CorrectRule(count=1, after=3)]
    tree = grow(world, config(expansion="chain", stop={"correct": rules})).tree
    assert (tree.stop, tree.simulations, tree.calls) == ("correct", 3, 3)


def test_a_simulation_without_an_answer_can_be_the_one_a_threshold_waits_for() -> None:
    """The first chain is right, the second ends in a defect. After 2 simulations one right answer is enough, so no
    third is begun."""
    world = script(
        {"start": {"thinking": 9}, "thinking": {"answer": 1}},
        {"": [f"{THINK}<answer>1</answer>", "<thinking>b</thinking>"]},
    )
    tree = grow(world, config(expansion="chain", stop={"correct": [CorrectRule(count=1, after=2)]})).tree
    assert (tree.stop, tree.simulations, tree.counts) == ("correct", 2, {"unanswered": 1})


def test_simulations_are_counted_with_those_that_end_in_a_defect() -> None:
    world = script({"start": {"thinking": 9}, "thinking": {"answer": 1}}, {"": ["b"] * 4})
    tree = grow(world, config(expansion="chain", parallel_simulations=3, stop={"simulations": 4})).tree
    assert (tree.stop, tree.simulations, tree.calls, tree.counts) == (
        "simulations",
        4,
        4,
        {"duplicates": 3, "malformed": 1},
    )


def test_a_simulation_that_has_asked_counts_though_others_are_in_its_way() -> None:
    """Two simulations end at the wrong answers below the sub-task and below its thought. Then the sub-task gets another
    thought and the thought a reclarification at once. That other thought is the same one again, where all that is left
    is the reclarification under way: the third simulation ends there, and has cost a call."""
    task = "<sub-task>a</sub-task>"
    world = script(
        {
            "start": {"sub_task": 1},
            "sub_task": {"answer": 1, "thinking": 1},
            "thinking": {"answer": 1},
            "reclarify": {"answer": 1},
        },
        {
            "<sub-task>": ["a</sub-task>"],
            f"{task}<answer>": ["0</answer>"],
            f"{task}<thinking>": ["a</thinking>", "a</thinking>"],
            f"{task}{THINK}<answer>": ["0</answer>"],
            f"{task}{THINK}<reclarify>": ["b</reclarify>"],
            f"{task}{THINK}<reclarify>b</reclarify><answer>": ["0</answer>"],
        },
        {"sub_task": {"thinking": 1}, "thinking": {"reclarify": 1}},
    )
    tree = grow(world, config(parallel_simulations=2)).tree
    assert not any(world.left.values())
    assert (tree.stop, tree.simulations, tree.nodes[0].visits) == ("exhausted", 4, 3)
    assert tree.counts == {"backtracks": 2, "duplicates": 1}


def test_a_simulation_with_others_in_its_way_has_never_been() -> None:
    """Three simulations wait for the thought; the first goes on to ask for its answer, and the others wait for that as
    well. There is one answer for the three."""
    world = script(
        {**ONE_THOUGHT, "thinking": {"answer": 1}}, {"<thinking>": ["a</thinking>"], f"{THINK}<answer>": ["1</answer>"]}
    )
    grown = grow(world, config(parallel_simulations=3))
    assert grown.most_running == 3
    assert (grown.tree.stop, grown.tree.simulations, grown.tree.nodes[0].visits) == ("exhausted", 1, 1)


def test_a_table_that_does_not_fit_the_depth_limit_gives_a_tree_without_a_node() -> None:
    for selection in (UcbConfig(), FrontierConfig(type="frontier")):
        world = World(pattern=shipped("letter_count"))
        grown = grow(world, config(max_depth=3, selection=selection))
        assert (grown.events, len(grown.tree.nodes), grown.tree.stop) == ([], 1, "exhausted")


# --- the order in which answers are applied ---


def test_a_verdict_does_not_wait_for_the_chains_asked_for_before_it() -> None:
    """Two chains are out. The first is answered and judged: the third is asked for while the second is still out. Its
    answer has to wait for the second."""
    world = script(
        {"start": {"thinking": 9}, "thinking": {"answer": 1}},
        {"": [f"<thinking>{letter}</thinking><answer>1</answer>" for letter in ("a", "b", "aa")]},
    )
    found = TreeSearch(
        prompt(),
        world.pattern,
        config(expansion="chain", parallel_simulations=2, stop={"simulations": 3}),
        {"policy": writer()},
        max_chain_tokens=99,
        seed=0,
    )

    def drawn(ask: Any) -> list[Any]:
        return [world.complete(call, writer()) for call in ask.calls]

    first, second = found.start()
    ahead, behind = drawn(first), drawn(second)
    [judge] = found.deliver(first.number, ahead)
    [third] = found.deliver(judge.number, world.judge(judge.completion))
    assert isinstance(third, Ask)
    assert found.deliver(third.number, drawn(third)) == []
    [judge] = found.deliver(second.number, behind)
    [last] = found.deliver(judge.number, world.judge(judge.completion))
    assert found.deliver(last.number, world.judge(last.completion)) == []
    thoughts = ["<thinking>a</thinking>", "<thinking>b</thinking>", "<thinking>aa</thinking>"]
    assert [node.text for node in found.tree().nodes if node.type == "thinking"] == thoughts


# --- verdicts that are none ---


def test_an_answer_that_could_not_be_judged_is_masked_and_the_tree_goes_on() -> None:
    world = script(
        {**ONE_THOUGHT, "thinking": {"answer": 3}},
        {"<thinking>": ["a</thinking>"], f"{THINK}<answer>": ["e</answer>", "t</answer>", "1</answer>"]},
        {"thinking": {"thinking": 1}},
    )
    tree = grow(world, config()).tree
    by_text = {node.text: node for node in tree.nodes}
    for letter in "et":
        node = by_text[f"<answer>{letter}</answer>"]
        assert (node.visits, node.total, node.scored, node.correct) == (0, 0.0, -1, False)
    assert (tree.nodes[0].visits, tree.nodes[0].total) == (1, 1.0)
    assert (tree.counts, tree.simulations, tree.stop) == ({"verifier_error": 1, "verifier_timeout": 1}, 3, "exhausted")


# --- limits of a call ---


def test_the_limit_of_a_node_is_its_types_before_the_searchs() -> None:
    thinking = BARE["thinking"].model_copy(update={"max_tokens": 5})
    pattern = table({**ONE_THOUGHT, "thinking": {"answer": 1}}, None, {"thinking": thinking})
    world = Script(pattern, {"<thinking>": ["a</thinking>"], f"{THINK}<answer>": ["1</answer>"]})
    calls = grow(world, config(max_node_tokens=9)).calls
    assert [call.max_tokens for call, _ in calls] == [5, 9]


def test_calls_keep_within_the_context_and_the_chain() -> None:
    """The prompt, a tag, then 2 tokens drawn, a tag: behind it a chain of 6 tokens has room for 2 more, a context of
    6 tokens behind the prompt as well."""
    children = {**ONE_THOUGHT, "thinking": {"answer": 1}}
    said = {"<thinking>": ["a</thinking>"], f"{THINK}<answer>": ["1</answer>"]}
    room = len(writer().prompt_ids) + 6
    for arguments in ({"max_chain_tokens": 6}, {"writers": {"policy": writer(max_model_len=room)}}):
        calls = grow(script(children, said), config(), **arguments).calls
        assert [call.max_tokens for call, _ in calls] == [5, 2]


@pytest.mark.parametrize("expansion", ["node", "chain"])
def test_where_there_is_no_room_nothing_is_asked_and_it_is_counted(expansion: str) -> None:
    world = script({"start": {"thinking": 2}, "thinking": {"answer": 1}}, {})
    grown = grow(world, config(expansion=expansion), writers={"policy": writer(max_model_len=len(writer().prompt_ids))})
    assert (grown.events, grown.tree.stop, grown.tree.calls) == ([], "exhausted", 0)
    assert grown.tree.counts == {"no_room": 2 if expansion == "node" else 1}


def test_a_chain_without_room_below_leaves_other_branches_open() -> None:
    """4 tokens a chain: a thought takes 3, and one token is left behind its end, no answer. The other chain begins
    anew and has its answer in 3."""
    world = script(
        {"start": {"thinking": 1, "answer": 1}, "thinking": {"answer": 1}},
        {"": [f"{THINK}<answer>1</answer>", "<answer>1</answer>"]},
    )
    tree = grow(world, config(expansion="chain"), max_chain_tokens=4).tree
    assert texts(tree) == [THINK, "<answer>", "<answer>1</answer>"]
    assert (tree.nodes[2].defect, tree.stop) == ("truncated", "exhausted")


def test_no_node_is_put_behind_the_beginning_of_another() -> None:
    """The last token of a thought holds "<t" as well. No fixed reflection can follow it, nor a written answer."""
    pattern = table(
        {**ONE_THOUGHT, "thinking": {"reflection": 1, "answer": 1, "thinking": 1}, "reflection": {"answer": 1}}
    )
    tree = GrowingTree(pattern, chains=False, max_depth=9)
    expander = Expander(tree, config(), {"policy": writer()}, random.Random(0), tree_seed=(0, "p"), max_chain_tokens=99)
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
    assert (plan.fixed, [part.type for part in plan.parts]) == ([], ["thinking"])
    # "<t" is there already, so only the rest of the opening tag is put behind it.
    assert codec().decode(plan.parts[0].forced) == "hinking>"
    assert tree.counts == {"other_node_begun": 2}
