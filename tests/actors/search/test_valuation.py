"""Values of new nodes: what is asked, when a chain ends, and how values guide the search."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError
from search_world import THINK, Grown, grow, scripted, search_config, search_model, spoken
from tree_samples import children_of

from actors.search.requests import Value, Values
from actors.search.selection import value_of
from actors.search.tree import Node
from rlsys.config.search import SearchConfig
from rlsys.trees import Tree, answer_text

STEPS = {"type": "steps"}
JUDGE = {"type": "model", "path": "judge", "prune_below": 0.5}
WRONG = "<thinking>b</thinking>"
CHAINS = {"start": {"thinking": 9}, "thinking": {"thinking": 9, "answer": 9}}


def chains(texts: list[str], values: dict[str, float | None], **fields: Any) -> Grown:
    world = scripted(CHAINS, {"": texts}, values=values)
    fields = {"expansion": "chain", "value": STEPS, "stop": {"simulations": len(texts)}, **fields}
    return grow(world, search_config(**{"selection": {"type": "surprise", "chains": len(texts)}, **fields}))


def summary(tree: Tree) -> list[tuple[str, str | None, float | None, int, float]]:
    return [(node.text, node.defect, node.estimate, node.visits, node.total) for node in tree.nodes[1:]]


def test_a_wrong_step_ends_its_chain_with_reward_0() -> None:
    grown = chains([f"{THINK}{WRONG}{THINK}<answer>1</answer>"], {WRONG: 0.0})
    # The three thoughts were asked for at once; the third one and the answer are not in the tree.
    [[line]] = grown.valued
    assert (line.before, line.texts, line.rollouts) == ((), (THINK, WRONG, THINK), ())
    assert summary(grown.tree) == [(THINK, None, 1.0, 1, 0.0), (WRONG, "wrong_step", 0.0, 1, 0.0)]
    # <thinking>, a, </thinking>, <answer>, 1, </answer> and the end token
    assert grown.tree.counts == {"values": 3, "wrong_step": 1, "dropped_tokens": 7}
    assert (grown.judged, grown.tree.simulations) == ([], 1)


def test_a_value_that_could_not_be_told_changes_nothing() -> None:
    grown = chains([f"{THINK}{WRONG}<answer>1</answer>"], {THINK: None, WRONG: None})
    assert [each[:3] for each in summary(grown.tree)[:2]] == [(THINK, None, None), (WRONG, None, None)]
    assert (grown.tree.solved, grown.tree.counts) == (True, {"values": 2})


def test_a_wrong_step_is_not_followed_when_it_is_drawn_again() -> None:
    text = f"{WRONG}<answer>1</answer>"
    grown = chains([text, text], {WRONG: 0.0})
    [node] = grown.tree.nodes[1:]
    assert (node.samples, node.visits, node.total, len(grown.valued)) == (2, 2, 0.0, 1)
    assert grown.tree.counts == {"values": 1, "wrong_step": 1, "duplicates": 1, "dropped_tokens": 8}


def test_nodes_of_the_tree_are_not_asked_for_again() -> None:
    grown = chains([f"{THINK}<answer>0</answer>", f"{THINK}{THINK}<answer>1</answer>"], {})
    assert [[(line.before, line.texts) for line in lines] for lines in grown.valued] == [
        [((), (THINK,))],
        [((THINK,), (THINK,))],
    ]


def test_places_in_and_before_a_wrong_step_are_drawn_again() -> None:
    """Places behind the wrong step are in no node. With 3 thoughts there are 6 more tokens of nodes than with 2."""
    texts = [f"{THINK}{WRONG}{THINK}<answer>1</answer>"]
    search = chains(texts, {WRONG: 0.0}).search
    search._tree.root.full, places = True, search._places  # so that places without an excess are taken too
    taken = {place for _ in range(99) if (place := places.take())}
    assert {(node.text, kept) for node, kept in taken} == {(text, kept) for text in (THINK, WRONG) for kept in range(3)}


def test_children_of_an_expansion_are_asked_for_at_once() -> None:
    world = scripted(
        {"start": {"thinking": 3}, "thinking": {"answer": 1}},
        {"<thinking>": ["b</thinking>", "a</thinking>", "a</thinking>"], f"{THINK}<answer>": ["1</answer>"]},
        values={WRONG: 0.0},
    )
    grown = grow(world, search_config(value=STEPS, stop={"simulations": 2}))
    [lines] = grown.valued
    assert [line.texts for line in lines] == [(WRONG,), (THINK,)]  # the repeated draw is the same node
    # The wrong child was visited at once. Q of the right one was 1 until its answer: (1 + 1) / (1 + 1) = 1.
    assert summary(grown.tree)[:2] == [(WRONG, "wrong_step", 0.0, 1, 0.0), (THINK, None, 1.0, 1, 1.0)]
    assert children_of(grown.tree, 1) == []


def test_a_pruned_node_ends_its_chain_without_a_reward() -> None:
    grown = chains([f"{THINK}{WRONG}<answer>1</answer>"], {THINK: 0.75, WRONG: 0.25}, value=JUDGE)
    assert summary(grown.tree) == [(THINK, None, 0.75, 0, 0.0), (WRONG, "pruned", 0.25, 0, 0.0)]
    assert grown.judged == []


def test_an_estimate_counts_as_one_chain() -> None:
    node = Node(1, None, 1, "thinking")
    assert value_of(node) is None
    node.visits, node.total = 3, 2.0
    assert value_of(node) == pytest.approx(2 / 3)
    node.estimate = 0.25  # (0.25 + 2) / 4
    assert value_of(node) == 0.5625
    node.visits, node.total = 0, 0.0
    assert value_of(node) == 0.25


class Rollouts:
    """A world that answers a request for values with the number of its calls and 5 tokens."""

    def __init__(self, world: Any) -> None:
        self.pattern, self.complete, self.judge = world.pattern, world.complete, world.judge
        self.seen: list[Value] = []

    def value(self, request: Value) -> Values:
        self.seen.append(request)
        return Values(values=tuple((0.5,) * len(line.texts) for line in request.lines), failed={"timeout": 1}, tokens=5)


def test_rollouts_begin_behind_each_new_node() -> None:
    text = f"{THINK}{WRONG}<answer>1</answer>"
    world = Rollouts(scripted(CHAINS, {"": [text]}))
    config = search_config(
        expansion="chain",
        selection={"type": "surprise"},
        value={"type": "rollouts", "count": 2},
        stop={"simulations": 1},
    )
    tree = grow(world, config).tree
    model = search_model()
    [[line]] = [request.lines for request in world.seen]
    calls = [planned.call for planned in (*line.rollouts[0], *line.rollouts[1])]
    context = [*model.prompt_ids, *model.codec.encode(THINK)]
    assert [call.token_ids for call in calls] == [context] * 2 + [[*context, *model.codec.encode(WRONG)]] * 2
    assert len({call.seed for call in calls}) == 4 and [len(each) for each in line.rollouts] == [2, 2]
    drawn = len(spoken(calls[0], model.codec, text).token_ids)
    assert (tree.calls, tree.tokens, [node.estimate for node in tree.nodes]) == (5, drawn + 5, [None, 0.5, 0.5, None])
    assert tree.counts == {"values": 2, "value_timeout": 1}


def agreeing(answers: list[str]) -> Tree:
    """Return a tree with one chain for each answer, of which every second one begins with another thought."""
    texts = [f"{(THINK, WRONG)[n % 2]}<answer>{answer}</answer>" for n, answer in enumerate(answers)]
    fields = {"value": {"type": "agreement"}, "backtracking": False}
    return chains(texts, {}, **fields).tree


def test_the_reward_of_an_answer_is_the_share_of_the_same_answers() -> None:
    tree = agreeing(["00", "01", " 00 ", "00", "10"])
    # Of five answers, 00 has three: 3/5. The thought a has 00, " 00 " and 10, the thought b 01 and 00.
    values = {node.text: (node.visits, node.total) for node in tree.nodes}
    assert values[THINK] == (3, pytest.approx(0.6 + 0.6 + 0.2))
    assert values[WRONG] == (2, pytest.approx(0.2 + 0.6))
    assert (tree.nodes[0].visits, tree.nodes[0].total) == (5, pytest.approx(2.2))
    assert [tree.nodes[n].total for n in tree.answers()] == [pytest.approx(x) for x in (0.6, 0.2, 0.6, 0.6, 0.2)]


def test_draws_of_an_answer_count_in_its_share() -> None:
    # The first and the third chain are one node, drawn twice: 2 of 3 draws. The thought b has the third draw.
    tree = agreeing(["0", "1", "0"])
    [first, second] = tree.answers()
    assert (tree.nodes[first].samples, tree.nodes[first].total) == (2, pytest.approx(2 * 2 / 3))
    assert tree.nodes[second].total == pytest.approx(1 / 3)
    assert tree.most_frequent == first
    assert [agreeing(list(answers)).most_frequent for answers in ("01", "011")] == [2, 4]  # the first of equal ones


def test_verdicts_are_recorded_and_change_no_reward() -> None:
    tree = agreeing(["1", "1"])  # right
    assert [tree.nodes[n].verdict.reward for n in tree.answers()] == [1.0, 1.0]
    assert [agreeing([digit, digit]).nodes[0].total for digit in "01"] == [2.0, 2.0]


def test_the_text_of_an_answer_is_what_its_tags_hold() -> None:
    assert answer_text("\n<answer> 1  <b\n2 </answer>") == "1 <b 2"


@pytest.mark.parametrize("fields", [{"backtracking": True}, {"stop": {"correct": [{"count": 1}]}}])
def test_agreement_refuses_what_uses_verdicts(fields: dict[str, Any]) -> None:
    without = {"value": {"type": "agreement"}, "backtracking": False, "stop": {"correct": []}}
    SearchConfig.model_validate(without)
    with pytest.raises(ValidationError, match="set backtracking to false and stop.correct to"):
        SearchConfig.model_validate({**without, **fields})
