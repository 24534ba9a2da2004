"""States, moves, the exact plan check and shortest plans of the blocks world.

Blocks stand in towers on a table. One hand moves one block at a time from the top of a tower to the top of another
tower or to the table.

Source: the domain blocksworld-4ops of PlanBench, arXiv:2206.10498.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

Tower = tuple[str, ...]
"""Blocks from the top to the one on the table."""
Move = tuple[str, ...]
"""A move's name and its blocks: pick-up a, put-down a, stack a b (a onto b), unstack a b (a off b)."""
Fact = tuple[str, ...]
"""("on", a, b), ("ontable", a), ("clear", a), ("holding", a) or ("handempty",)."""
Goal = frozenset[Fact]

MOVES = {"pick-up": 1, "put-down": 1, "stack": 2, "unstack": 2}
"""Number of blocks of each move."""


class State(NamedTuple):
    """Towers in the order of the text, and the block in the hand.

    A tower keeps its place when a block is put on it or taken off it. A new tower is the last one.
    """

    towers: tuple[Tower, ...]
    held: str | None = None


def facts(state: State) -> frozenset[Fact]:
    """Return all facts that are true in a state. The order of the towers has no influence."""
    true: set[Fact] = {("handempty",) if state.held is None else ("holding", state.held)}
    for tower in state.towers:
        true.add(("clear", tower[0]))
        true.add(("ontable", tower[-1]))
        true.update(("on", upper, lower) for upper, lower in pairwise(tower))
    return frozenset(true)


def successors(state: State) -> Iterator[tuple[Move, State]]:
    """Yield every possible move and the state after it, in the order of the towers."""
    towers, held = state
    for place, tower in enumerate(towers):
        before, after = towers[:place], towers[place + 1 :]
        if held is not None:
            yield ("stack", held, tower[0]), State((*before, (held, *tower), *after))
        elif len(tower) > 1:
            yield ("unstack", tower[0], tower[1]), State((*before, tower[1:], *after), tower[0])
        else:
            yield ("pick-up", tower[0]), State((*before, *after), tower[0])
    if held is not None:
        yield ("put-down", held), State((*towers, (held,)))


def run_moves(state: State, moves: Sequence[Move]) -> State:
    """Return the state after possible moves."""
    for move in moves:
        state = dict(successors(state))[move]
    return state


def shortest_plan(state: State, goal: Goal) -> tuple[Move, ...] | None:
    """Return a plan with the fewest moves, by breadth-first search; None if the goal cannot be reached.

    The order of `successors` decides between several plans, so the plan does not depend on the names of the blocks.
    """
    seen = {facts(state)}
    waiting: deque[tuple[State, tuple[Move, ...]]] = deque([(state, ())])
    if goal <= facts(state):
        return ()
    while waiting:
        current, moves = waiting.popleft()
        for move, following in successors(current):
            true = facts(following)
            if goal <= true:
                return (*moves, move)
            if true not in seen:
                seen.add(true)
                waiting.append((following, (*moves, move)))
    return None


def check_plan(state: State, goal: Goal, moves: Sequence[Move]) -> str:
    """Return the first reason why the moves fail (an impossible move or a missing goal fact), or ""."""
    for number, move in enumerate(moves, 1):
        following = dict(successors(state)).get(move)
        if following is None:
            return f"move {number} ({' '.join(move)}): {_why_impossible(state, move)}"
        state = following
    missing = sorted(goal - facts(state))
    return f"goal not reached: {_denied(missing[0])}" if missing else ""


def _why_impossible(state: State, move: Move) -> str:
    """Return the first precondition of a move that a state does not meet."""
    true = facts(state)
    name, block, other = (*move, "")[:3]
    blocks = {state.held, *(block for tower in state.towers for block in tower)}
    for named in move[1:]:
        if named not in blocks:
            return f"no block {named}"
    if name in ("put-down", "stack"):
        return f"{block} is not in the hand" if state.held != block else _denied(("clear", other))
    if state.held is not None:
        return f"{state.held} is in the hand"
    place = ("on", block, other) if name == "unstack" else ("ontable", block)
    return _denied(place if place not in true else ("clear", block))


def _denied(fact: Fact) -> str:
    kind, block, *other = fact
    return f"{block} is not {'on the table' if kind == 'ontable' else ' '.join([kind, *other])}"
