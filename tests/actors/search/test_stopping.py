"""The limits that end a search, and the simulations that count."""

from __future__ import annotations

from search_world import (
    ONE_THOUGHT,
    THINK,
    Grown,
    World,
    grow,
    scripted,
    search_config,
    shipped,
)

from actors.search.requests import Ask, Judge
from actors.search.stopping import StopRule, thinking_of
from actors.search.tree import Node
from rlsys.config.search import CorrectRule, FrontierConfig, StopConfig, UcbConfig
from rlsys.types import Verdict


def events(grown: Grown) -> list[str]:
    """Return "ask" and "judge" for requests, "drawn" or the verdict's outcome for answers."""
    names = []
    for event in grown.events:
        if isinstance(event, tuple):
            names.append(event[1].outcome if isinstance(event[1], Verdict) else "drawn")
        else:
            names.append({Ask: "ask", Judge: "judge"}[type(event)])
    return names


def test_no_call_after_the_last_token() -> None:
    """Two simulations wait for one thought of 2 tokens, which reaches the limit of 2 tokens."""
    world = scripted({**ONE_THOUGHT, "thinking": {"thinking": 2, "answer": 2}}, {"<thinking>": ["a</thinking>"]})
    grown = grow(world, search_config(parallel_simulations=2, stop={"tokens": 2}))
    assert (events(grown), grown.tree.stop, grown.tree.tokens) == (["ask", "drawn"], "tokens", 2)


def test_drawn_answers_are_judged_after_the_last_token() -> None:
    """The limit is 3 tokens. The thought has 2, so an answer is requested; with the answer there are 4."""
    world = scripted(
        {**ONE_THOUGHT, "thinking": {"answer": 1}}, {"<thinking>": ["a</thinking>"], f"{THINK}<answer>": ["1</answer>"]}
    )
    grown = grow(world, search_config(stop={"tokens": 3}))
    assert events(grown) == ["ask", "drawn", "ask", "drawn", "judge", "ok"]
    assert (grown.tree.stop, len(grown.tree.answers())) == ("tokens", 1)


def test_distinct_scored_answers_stop_a_tree_and_failed_verifications_do_not() -> None:
    world = scripted(
        {**ONE_THOUGHT, "thinking": {"answer": 4}},
        {"<thinking>": ["a</thinking>"], f"{THINK}<answer>": [f"{x}</answer>" for x in ("e", "0", "1", "t")]},
    )
    tree = grow(world, search_config(stop={"answers": 2})).tree
    assert (tree.stop, len(tree.answers())) == ("answers", 2)
    judged = [node for node in tree.nodes if node.verdict]
    assert all((node.scored >= 0) == (node.verdict.outcome in ("ok", "wrong")) for node in judged)


def test_a_rule_holds_only_after_its_simulations() -> None:
    """Every answer is right. 5 right answers are enough at any time, 1 after 3 simulations: so 3 are finished."""
    world = scripted(
        {"start": {"thinking": 9}, "thinking": {"answer": 1}},
        {"": [f"<thinking>{'a' * n}</thinking><answer>1</answer>" for n in range(9)]},
    )
    rules = [CorrectRule(count=5), CorrectRule(count=1, after=3)]
    tree = grow(world, search_config(expansion="chain", stop={"correct": rules})).tree
    assert (tree.stop, tree.simulations, tree.calls) == ("correct", 3, 3)


def test_a_simulation_without_an_answer_counts_for_a_rule() -> None:
    """The first chain is right, the second ends in a defect. After 2 simulations one right answer is enough, so there
    is no third simulation."""
    world = scripted(
        {"start": {"thinking": 9}, "thinking": {"answer": 1}},
        {"": [f"{THINK}<answer>1</answer>", "<thinking>b</thinking>"]},
    )
    tree = grow(world, search_config(expansion="chain", stop={"correct": [CorrectRule(count=1, after=2)]})).tree
    assert (tree.stop, tree.simulations, tree.counts) == ("correct", 2, {"unanswered": 1})


def test_simulations_that_end_in_a_defect_are_counted() -> None:
    world = scripted({"start": {"thinking": 9}, "thinking": {"answer": 1}}, {"": ["b"] * 4})
    tree = grow(world, search_config(expansion="chain", parallel_simulations=3, stop={"simulations": 4})).tree
    assert (tree.stop, tree.simulations, tree.calls, tree.counts) == (
        "simulations",
        4,
        4,
        {"duplicates": 3, "malformed": 1},
    )


def test_a_blocked_simulation_that_has_asked_a_model_counts() -> None:
    """Two simulations end at the wrong answers below the sub-task and below its thought. Then a second thought is
    requested below the sub-task, and a reclarification below the thought. The second thought equals the first one,
    below which only the open reclarification is left: the third simulation ends there and has cost a call."""
    task = "<sub-task>a</sub-task>"
    world = scripted(
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
    tree = grow(world, search_config(parallel_simulations=2)).tree
    assert not any(world.left.values())
    assert (tree.stop, tree.simulations, tree.nodes[0].visits) == ("exhausted", 4, 3)
    assert tree.counts == {"backtracks": 2, "duplicates": 1}


def test_a_blocked_simulation_that_has_asked_no_model_does_not_count() -> None:
    """Three simulations wait for the thought. The first one requests its answer, which blocks the other two."""
    world = scripted(
        {**ONE_THOUGHT, "thinking": {"answer": 1}}, {"<thinking>": ["a</thinking>"], f"{THINK}<answer>": ["1</answer>"]}
    )
    grown = grow(world, search_config(parallel_simulations=3))
    assert grown.most_running == 3
    assert (grown.tree.stop, grown.tree.simulations, grown.tree.nodes[0].visits) == ("exhausted", 1, 1)


def test_a_table_that_does_not_fit_the_depth_limit_gives_a_tree_without_a_node() -> None:
    for selection in (UcbConfig(), FrontierConfig(type="frontier")):
        world = World(pattern=shipped("letter_count"))
        grown = grow(world, search_config(max_depth=3, selection=selection))
        assert (grown.events, len(grown.tree.nodes), grown.tree.stop) == ([], 1, "exhausted")


def test_right_answers_are_distinct_by_their_thinking() -> None:
    """A sub-task, white space and the answer's own text make no other way to the answer; another thought does."""
    pattern = shipped("letter_count")

    def thinking(*nodes: tuple[str, str]) -> str:
        node = Node(0, None, 0, "start")
        for name, text in nodes:
            node = Node(node.number + 1, node, node.depth + 1, name, text=text)
        return thinking_of(node, pattern)

    plain = thinking(("thinking", "<thinking>a</thinking>"), ("answer", "<answer>1</answer>"))
    longer = thinking(("sub_task", "b"), ("thinking", "\n<thinking>a</thinking>"), ("answer", "<answer> 1</answer>"))
    other = thinking(("thinking", "<thinking>b</thinking>"), ("answer", "<answer>1</answer>"))
    assert plain == longer != other
    assert thinking(("sub_task", "b"), ("answer", "1")) == "b1"  # without a thought the whole chain counts

    rule, right = (
        StopRule(StopConfig(correct=(CorrectRule(count=2),))),
        Verdict(outcome="ok", reward=1.0, answered=True),
    )
    counted = []
    for key in (plain, longer, other):
        rule.count(right, key)
        counted.append((rule.correct, rule.is_reached()))
    assert counted == [(1, False), (1, False), (2, True)]
    rule.count(Verdict(outcome="wrong", reward=0.0, answered=True), "c")
    assert (rule.correct, rule.scored) == (2, 4)


def test_a_sure_majority_ends_a_tree_and_needs_no_verdict() -> None:
    """All four answers are the same wrong one. Three votes have the certainty 15 / 16, by four coins."""
    answers = [f"{x}</answer>" for x in ("7", "7 ", " 7", "7  ")]
    script = {"<thinking>": ["a</thinking>"], f"{THINK}<answer>": answers}
    for sure, expected in ((15 / 16, ("sure", 3)), (0.98, ("exhausted", 4))):
        world = scripted({**ONE_THOUGHT, "thinking": {"answer": 4}}, script)
        tree = grow(world, search_config(parallel_simulations=1, stop={"sure": sure, "correct": []})).tree
        assert (tree.stop, len(tree.answers())) == expected
