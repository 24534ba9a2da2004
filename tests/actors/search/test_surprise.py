"""Search that begins new chains where the model was least sure."""

from __future__ import annotations

import random
from typing import Literal

import pytest
from pydantic import ValidationError
from search_world import BARE, World, grow, search_model, table, token_logprob

from actors.search.expansion import Expander
from actors.search.requests import SearchModel
from actors.search.surprise import SurprisingPlaces
from actors.search.tree import GrowingTree, Node
from rlsys.config.search import SearchConfig, StopConfig, SurpriseConfig

TABLE = table(
    {"start": {"thinking": 8}, "thinking": {"thinking": 1, "answer": 1}}, nodes={"thinking": BARE["thinking"]}
)
ANSWER = "<answer>"
PROMPT = Node(0, None, 0, "start")


def empty_places(unit: Literal["token", "node"] = "token") -> SurprisingPlaces:
    tree = GrowingTree(TABLE, chains=True, max_depth=None)
    config = SearchConfig(expansion="chain", max_depth=None)
    expander = Expander(
        tree, config, {"policy": search_model()}, random.Random(0), tree_seed=(0, ""), max_chain_tokens=9
    )
    return SurprisingPlaces(tree, expander, SurpriseConfig(type="surprise", unit=unit))


def node(number: int, logprobs: list[float], *, forced: int = 0, terminal: bool = False) -> Node:
    ids = [100 * number + place for place in range(forced + len(logprobs))]
    return Node(number, PROMPT, 1, "thinking", token_ids=ids, logprobs=logprobs, forced=forced, terminal=terminal)


def test_places_come_by_surprise_and_once() -> None:
    places, first, second = empty_places(), node(1, [-0.5, -3.0, -0.1]), node(2, [-9.0, -2.0], forced=4)
    places.add(first, 0, 0)
    places.add(second, 1, 0)  # its first token was drawn at a place that was used
    places.add(node(3, [-99.0], terminal=True), 0, 0)
    # Excess over the tokens before: 0.5, 2.5 and 0.1 - 3; the second node 2 - 9.
    assert [places.take() for _ in range(3)] == [(first, 1), (first, 0), None]
    places._tree.root.full = True  # no whole chain can be drawn in the place of those without an excess
    taken = [(first, 1), (first, 0), *(places.take() for _ in range(3))]
    assert taken == [(first, 1), (first, 0), (first, 2), (second, 5), None]


def test_the_tokens_that_a_chain_keeps_count_as_before() -> None:
    # A chain of two nodes, and a sibling of the second one that keeps its first two tokens.
    places, first, second, third = empty_places(), node(1, [-3.0]), node(2, [-1.0, -4.0, -3.5]), node(3, [-0.1, -4.5])
    second.parent = third.parent = first
    third.forced, third.token_ids = 2, [*second.token_ids[:2], 7, 8]
    places.add(first, 0, 0)
    places.add(second, 0, 0)
    places.add(third, 1, 0)
    places._tree.root.full = True
    # Excess: 3; 1 - 3, 4 - 3 and 3.5 - 4; and in the sibling 4.5 - 4.
    assert [places.take() for _ in range(6)] == [(first, 0), (second, 1), (third, 3), (second, 2), (second, 0), None]


@pytest.mark.parametrize("unit", ["token", "node"])
def test_the_excess_is_divided_by_the_tokens_of_a_new_chain(unit: Literal["token", "node"]) -> None:
    places = empty_places(unit)
    long, short = node(1, [-1.0, -4.0, -0.1]), node(2, [-2.0, -3.2])
    places.add(long, 0, 5)
    places.add(short, 0, 0)
    # By token: 1 / 8 and 3 / 7; 2 / 2 and 1.2 / 1. By node: 1 / 8 and 3 / 8; 2 / 2 and 1.2 / 2.
    expected = {"token": [(short, 1), (short, 0), (long, 1), (long, 0)], "node": [(short, 0), (short, 1), (long, 1)]}
    assert [places.take() for _ in expected[unit]] == expected[unit]


def test_nodes_that_no_model_wrote_do_not_hide_what_stands_before_them() -> None:
    places, first, fixed, last = empty_places(), node(1, [-5.0]), node(2, []), node(3, [-1.0])
    fixed.parent, last.parent = first, fixed
    places.add(first, 0, 0)
    places.add(last, 0, 0)
    assert [places.take() for _ in range(2)] == [(first, 0), None]  # the last token's excess is 1 - 5


def test_a_place_that_siblings_share_is_used_once() -> None:
    places, first, second = empty_places(), node(1, [-2.0, -1.0]), node(2, [-2.0, -1.5])
    second.token_ids = [first.token_ids[0], 7]
    places._tree.root.full = True
    places.add(first, 0, 0)
    places.add(second, 0, 0)
    assert [places.take() for _ in range(4)] == [(first, 0), (second, 1), (first, 1), None]


def test_places_that_led_to_right_answers_come_later() -> None:
    places, right, wrong = empty_places(), node(1, [-3.0, -2.0]), node(2, [-1.0])
    places.add(right, 0, 0)
    places.add(wrong, 0, 0)
    right.visits, right.total = 4, 3.0
    places._tree.root.full = True
    assert [places.take() for _ in range(3)] == [(wrong, 0), (right, 0), (right, 1)]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("unit", ["token", "node"])
def test_every_chain_begins_at_the_token_with_the_largest_excess_so_far(unit: str, seed: int) -> None:
    model = search_model()
    config = SearchConfig(
        expansion="chain",
        selection={"type": "surprise", "unit": unit},
        parallel_simulations=1,
        backtracking=False,
        stop=StopConfig(simulations=12),
    )
    world = World(pattern=TABLE, defects=0.0, failures=1.0)  # no verdicts, so there are no values
    calls = grow(world, config, models={"policy": model}, seed=seed).calls
    assert len(calls) == 12
    prompt, places, seen = len(model.prompt_ids), {}, set()
    for call, drawn in calls:
        context = tuple(call.token_ids)
        best = max(places, key=places.__getitem__, default=None)
        redraws = best is not None and places[best] > 0
        if not redraws:
            assert context == tuple(model.prompt_ids)
        else:
            assert context == best[1], places[best]
            del places[best]  # used once
        whole = [*context, *drawn.token_ids.tolist()]
        for place in range(len(context), len(whole)):
            start = max([prompt, *(end for end in range(prompt + 1, place + 1) if closes(model, whole, end))])
            if ANSWER in model.codec.decode(whole[start:]).split("</")[0]:
                break
            before = [-token_logprob(whole[: earlier + 1]) for earlier in range(prompt, place)]
            excess = -token_logprob(whole[: place + 1]) - max(before, default=0.0)
            kept = whole[: place if unit == "token" else start]
            key = tuple(whole[: place + 1])
            if key not in seen and place >= len(context) + redraws:
                places[key, tuple(kept)] = excess
            seen.add(key)


def closes(model: SearchModel, whole: list[int], end: int) -> bool:
    """Return whether the tokens before `end` end with a closing tag."""
    return model.codec.decode(whole[:end]).endswith("</thinking>")


def test_whole_chains_come_first() -> None:
    config = SearchConfig(
        expansion="chain",
        selection=SurpriseConfig(type="surprise", chains=3),
        parallel_simulations=8,
        stop=StopConfig(simulations=8),
    )
    calls = grow(World(pattern=TABLE, defects=0.0, failures=0.0), config, models={"policy": search_model()}).calls
    lengths = [len(call.token_ids) for call, _ in calls]
    assert lengths[:3] == [len(search_model().prompt_ids)] * 3 and min(lengths[3:]) >= lengths[0]


def test_node_expansion_is_refused() -> None:
    with pytest.raises(ValidationError, match="set expansion to chain"):
        SearchConfig(expansion="node", selection=SurpriseConfig(type="surprise"))
