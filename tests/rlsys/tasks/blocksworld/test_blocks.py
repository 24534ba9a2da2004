"""States, moves, plans and their texts, by hand and in comparison with an independent STRIPS simulator."""

from __future__ import annotations

import re
from collections import deque

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlsys.tasks.blocksworld.blocks import Fact, Goal, Move, State, check_plan, facts, shortest_plan, successors
from rlsys.tasks.blocksworld.text import goal_text, plan_text, problem_text, read_plan, read_problem, state_text

# The domain blocksworld-4ops as published: preconditions, facts added, facts deleted.
DOMAIN: dict[str, tuple[str, str, str]] = {
    "pick-up": ("clear x|ontable x|handempty", "holding x", "ontable x|clear x|handempty"),
    "put-down": ("holding x", "clear x|handempty|ontable x", "holding x"),
    "stack": ("clear y|holding x", "handempty|clear x|on x y", "clear y|holding x"),
    "unstack": ("on x y|clear x|handempty", "holding x|clear y", "on x y|clear x|handempty"),
}


def grounded(pattern: str, x: str, y: str) -> set[Fact]:
    return {tuple({"x": x, "y": y}.get(word, word) for word in item.split()) for item in pattern.split("|")}


def strips(true: frozenset[Fact], move: Move) -> frozenset[Fact] | None:
    """Return the facts after a move, or None if a precondition is missing."""
    x, y = (*move[1:], "")[:2]
    needed, added, deleted = (grounded(pattern, x, y) for pattern in DOMAIN[move[0]])
    return frozenset(true - deleted | added) if needed <= true else None


def all_moves(blocks: str) -> list[Move]:
    single = [(name, x) for name in ("pick-up", "put-down") for x in blocks]
    return single + [(name, x, y) for name in ("stack", "unstack") for x in blocks for y in blocks]


@st.composite
def states(draw: st.DrawFn, most: int = 5) -> State:
    """Draw towers of up to `most` blocks. One block may be in the hand."""
    order = draw(st.permutations("abcde"[: draw(st.integers(2, most))]))
    held = order.pop() if draw(st.booleans()) else None
    cuts = [True, *(draw(st.booleans()) for _ in order[1:])]
    towers: list[tuple[str, ...]] = []
    for block, cut in zip(order, cuts, strict=True):
        towers = [*towers, (block,)] if cut else [*towers[:-1], (*towers[-1], block)]
    return State(tuple(towers), held)


def state_of(text: str) -> State:
    return read_problem(f"now {text}\ngoal clear a")[0]


def goal_of(text: str) -> Goal:
    return read_problem(f"now a\ngoal {text}")[1]


@given(state=states())
def test_successors_are_those_of_the_published_domain(state: State) -> None:
    blocks = "".join(block for fact in facts(state) if fact[0] in ("clear", "on", "holding") for block in fact[1:])
    expected = {move: strips(facts(state), move) for move in all_moves("".join(sorted(set(blocks))))}
    after = [(move, facts(following)) for move, following in successors(state)]
    assert dict(after) == {move: true for move, true in expected.items() if true is not None}
    assert len(dict(after)) == len(after)


def test_facts_by_hand() -> None:
    assert facts(state_of("a on b, c, hold d")) == {
        ("on", "a", "b"), ("ontable", "b"), ("ontable", "c"), ("clear", "a"), ("clear", "c"), ("holding", "d"),
    }  # fmt: skip
    assert facts(state_of("a, b")) == {
        ("ontable", "a"),
        ("ontable", "b"),
        ("clear", "a"),
        ("clear", "b"),
        ("handempty",),
    }
    assert facts(state_of("a, b on c")) == facts(state_of("b on c, a"))


def test_towers_keep_their_order() -> None:
    after = dict(successors(state_of("a on b, c")))
    assert after["unstack", "a", "b"] == state_of("b, c, hold a")
    assert after["pick-up", "c"] == state_of("a on b, hold c")
    after = dict(successors(state_of("b, c, hold a")))
    assert after["stack", "a", "b"] == state_of("a on b, c")
    assert after["put-down", "a"] == state_of("b, c, a")


def length_by_levels(state: State, goal: Goal, blocks: str) -> int:
    """Return the fewest moves to a goal, by a search over levels with STRIPS."""
    level, seen, steps = {facts(state)}, {facts(state)}, 0
    while not any(goal <= true for true in level):
        level = {after for true in level for move in all_moves(blocks) if (after := strips(true, move))} - seen
        seen |= level
        steps += 1
    return steps


@given(state=states(4), other=states(4), data=st.data())
@settings(max_examples=40, deadline=None)
def test_plans_are_shortest_and_work(state: State, other: State, data: st.DataObject) -> None:
    possible = sorted(fact for fact in facts(other) if fact[0] != "handempty")
    goal = frozenset(data.draw(st.sets(st.sampled_from(possible), min_size=1)))
    plan = shortest_plan(state, goal)
    if {block for fact in goal for block in fact[1:]} <= {block for fact in facts(state) for block in fact[1:]}:
        assert plan is not None and check_plan(state, goal, plan) == ""
        assert len(plan) == length_by_levels(state, goal, "abcd")
    else:
        assert plan is None


def test_the_deepest_three_block_problem_by_hand() -> None:
    # From a on b on c to c on b on a: a goes to the table, b goes on a, and c goes on b.
    plan = shortest_plan(state_of("a on b on c"), goal_of("c on b on a"))
    assert plan_text(plan or ()) == "unstack a b\nput-down a\nunstack b c\nstack b a\npick-up c\nstack c b"


@pytest.mark.parametrize("goal", ["a on b, b on a", "a on b, c on b", "a on b, clear b", "a on z"])
def test_a_goal_that_no_state_meets_has_no_plan(goal: str) -> None:
    facts_of_goal = frozenset(fact for part in goal.split(", ") for fact in goal_of(part))
    assert shortest_plan(state_of("a, b, c"), facts_of_goal) is None


@given(state=states(), names=st.permutations("vwxyz"))
@settings(max_examples=40, deadline=None)
def test_plans_do_not_depend_on_names(state: State, names: list[str]) -> None:
    # Blocks with other names in the same places get the same moves, so a model need not learn the alphabet.
    def renamed(text: str) -> str:
        return re.sub(r"\b[a-e]\b", lambda match: names["abcde".index(match[0])], text)

    question = problem_text(state, frozenset({("on", "b", "a")}))
    plan, other = (shortest_plan(*read_problem(text)) for text in (question, renamed(question)))
    assert plan is not None and other is not None
    assert plan_text(other) == renamed(plan_text(plan))


@pytest.mark.parametrize(
    ("plan", "detail"),
    [
        ("unstack a b\nput-down a\npick-up c\nstack c a", ""),
        ("unstack a b\nput-down a", "goal not reached: c is not on a"),
        ("unstack a b\nput-down a\npick-up c", "goal not reached: c is not on a"),
        ("pick-up a", "move 1 (pick-up a): a is not on the table"),
        ("pick-up b", "move 1 (pick-up b): b is not clear"),
        ("unstack a c", "move 1 (unstack a c): a is not on c"),
        ("unstack c b", "move 1 (unstack c b): c is not on b"),
        ("unstack b a", "move 1 (unstack b a): b is not on a"),
        ("put-down a", "move 1 (put-down a): a is not in the hand"),
        ("pick-up c\nstack c b", "move 2 (stack c b): b is not clear"),
        ("pick-up c\nstack c c", "move 2 (stack c c): c is not clear"),
        ("pick-up c\nstack a c", "move 2 (stack a c): a is not in the hand"),
        ("pick-up c\npick-up b", "move 2 (pick-up b): c is in the hand"),
        ("pick-up c\nunstack a b", "move 2 (unstack a b): c is in the hand"),
        ("pick-up z", "move 1 (pick-up z): no block z"),
        ("pick-up c\nstack c table", "move 2 (stack c table): no block table"),
    ],
)
def test_check_plan_names_the_defect(plan: str, detail: str) -> None:
    moves = read_plan(plan)
    assert isinstance(moves, tuple)
    assert check_plan(state_of("a on b, c"), goal_of("c on a"), moves) == detail


def test_a_missing_fact_is_named() -> None:
    assert check_plan(state_of("a on b"), goal_of("a on table"), []) == "goal not reached: a is not on the table"
    assert check_plan(state_of("a on b"), goal_of("clear b"), []) == "goal not reached: b is not clear"


def test_unstack_under_another_block() -> None:
    assert check_plan(state_of("a on b on c"), goal_of("clear c"), [("unstack", "b", "c")]) == (
        "move 1 (unstack b c): b is not clear"
    )


@given(state=states(), data=st.data())
def test_check_plan_agrees_with_the_published_domain(state: State, data: st.DataObject) -> None:
    moves = data.draw(st.lists(st.sampled_from(all_moves("abcde")), max_size=4))
    true: frozenset[Fact] | None = facts(state)
    for move in moves:
        true = strips(true, move) if true is not None else None
    goal = frozenset({("clear", "a")})
    assert (check_plan(state, goal, moves) == "") == (true is not None and goal <= true)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "no moves"),
        (" \n ", "no moves"),
        ("lift a", "move 1 (lift a): expected pick-up, put-down, stack, unstack"),
        ("pick-up a\n\nthen", "move 2 (then): expected pick-up, put-down, stack, unstack"),
        ("Pick-up a", "move 1 (Pick-up a): expected pick-up, put-down, stack, unstack"),
        ("stack a", "move 1 (stack a): stack names 2 blocks, found 1"),
        ("pick-up a b", "move 1 (pick-up a b): pick-up names 1 block, found 2"),
        ("pick-up", "move 1 (pick-up): pick-up names 1 block, found 0"),
        ("pick-up a stack a b", "move 1 (pick-up a stack a b): pick-up names 1 block, found 4"),
        (" pick-up  a \n\n stack a b\n", (("pick-up", "a"), ("stack", "a", "b"))),
    ],
)
def test_read_plan(text: str, expected: object) -> None:
    assert read_plan(text) == expected


def test_texts_by_hand() -> None:
    state = State((("a", "b"), ("c",)), "d")
    assert state_text(state) == "now a on b, c, hold d"
    assert state_text(State((), "d")) == "now hold d"
    goal = frozenset({("on", "b", "c"), ("on", "a", "b"), ("ontable", "c"), ("clear", "a"), ("on", "d", "e")})
    assert goal_text(goal) == "a on b on c on table, d on e, clear a"
    assert goal_text(frozenset({("ontable", "a")})) == "a on table"


@given(state=states(), other=states(), data=st.data())
def test_a_problem_survives_its_text(state: State, other: State, data: st.DataObject) -> None:
    possible = sorted(fact for fact in facts(other) if fact[0] in ("on", "ontable", "clear"))
    goal = frozenset(data.draw(st.sets(st.sampled_from(possible), min_size=1)))
    assert read_problem(problem_text(state, goal)) == (state, goal)


def test_every_three_block_state_is_reached() -> None:
    # 13 arrangements of 3 blocks in towers, and 3 * 3 with one block in the hand.
    first = state_of("a, b, c")
    seen, waiting = {facts(first)}, deque([first])
    while waiting:
        for _, following in successors(waiting.popleft()):
            if facts(following) not in seen:
                seen.add(facts(following))
                waiting.append(following)
    assert len(seen) == 13 + 9
