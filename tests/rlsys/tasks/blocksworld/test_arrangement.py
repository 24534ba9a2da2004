"""Arrangements: what is left of a problem without the names of its blocks."""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import combinations, permutations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlsys.tasks.blocksworld.arrangement import arrangement
from rlsys.tasks.blocksworld.blocks import Fact, Goal, State, facts
from rlsys.tasks.blocksworld.text import read_problem


def of(text: str) -> list[list[list[int]]]:
    return arrangement(*read_problem(text))


def renamed(known: frozenset[Fact], names: dict[str, str]) -> frozenset[Fact]:
    return frozenset((fact[0], *(names[block] for block in fact[1:])) for fact in known)


def states(blocks: str) -> Iterator[State]:
    """All ways to cut every order of the blocks into towers. A state occurs once for every order of its towers."""
    for order in permutations(blocks):
        for cuts in range(2 ** (len(blocks) - 1)):
            towers = [[order[0]]]
            for place, block in enumerate(order[1:]):
                if cuts >> place & 1:
                    towers.append([block])
                else:
                    towers[-1].append(block)
            yield State(tuple(map(tuple, towers)))


def unsolved_problems(blocks: str) -> set[tuple[State, Goal]]:
    distinct = {facts(state): state for state in states(blocks)}
    ends = [sorted(fact for fact in known if fact[0] == "on") for known in distinct]
    goals = {frozenset(part) for end in ends for size in range(1, len(end) + 1) for part in combinations(end, size)}
    return {(state, goal) for state in distinct.values() for goal in goals if not goal <= facts(state)}


def test_an_arrangement_by_hand() -> None:
    # Two groups: c alone (no block above or below it, on the table in the start), and a under b, which the goal swaps.
    # A row: above and below in the start, above and below in the goal; ontable, clear, holding of start and of goal.
    assert of("now b on a, c\ngoal a on b") == [
        [[-1, -1, -1, -1, 1, 1, 0, 0, 0, 0]],
        [[-1, 1, 1, -1, 0, 1, 0, 0, 0, 0], [0, -1, -1, 0, 1, 0, 0, 0, 0, 0]],
    ]


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("now a on b, c\ngoal c on a", "now g, d on e\ngoal g on d", True),
        ("now a on b, c\ngoal c on a", "now a on b, c\ngoal c on b", False),
        ("now a on b, c\ngoal c on a", "now a on b, c, d\ngoal c on a", False),
        ("now a, b, c\ngoal a on b", "now a, b, c\ngoal c on a", True),
        ("now a, b, c\ngoal a on b", "now a, b, c\ngoal a on b, clear c", False),
        ("now a, b, hold c\ngoal c on a", "now a, c, hold b\ngoal b on c", True),
        ("now a, b, hold c\ngoal c on a", "now a, b, c\ngoal c on a", False),
        ("now a, b\ngoal a on b, b on table", "now a, b\ngoal a on b", False),
    ],
)
def test_problems_that_a_renaming_makes_equal(one: str, other: str, same: bool) -> None:
    assert (of(one) == of(other)) == same


def test_three_blocks_have_22_unsolved_arrangements() -> None:
    problems = unsolved_problems("abc")
    smallest = {
        (state, goal): min(
            tuple(sorted(renamed(known, dict(zip("abc", names, strict=True)))) for known in (facts(state), goal))
            for names in permutations("abc")
        )
        for state, goal in problems
    }
    found = {(str(arrangement(*problem)), str(facts_of)) for problem, facts_of in smallest.items()}
    # One arrangement for every class of renamings, and the other way round.
    assert len(found) == len({one for one, _ in found}) == len({two for _, two in found}) == 22


@given(seed=st.integers(0, 10**6))
def test_names_and_order_of_towers_have_no_influence(seed: int) -> None:
    rng = random.Random(seed)
    state, goal = read_problem("now a on b, c on d, e, f\ngoal a on c on e")
    names = dict(zip("abcdef", rng.sample("abcdefghijkl", 6), strict=True))
    towers = tuple(tuple(names[block] for block in tower) for tower in rng.sample(state.towers, 4))
    assert arrangement(State(towers), renamed(goal, names)) == arrangement(state, goal)
