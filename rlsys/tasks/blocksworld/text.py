"""Text of blocks-world problems, states and plans, and its parsers.

`now a on b, c` is a tower of a on b and the block c. `goal b on c on a` requires two facts. A plan has one move per
line. Every word, and every block with the space before it, can be one token.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from itertools import pairwise

from rlsys.tasks.blocksworld.blocks import MOVES, Fact, Goal, Move, State

# Pieces of the texts that are single tokens of a from-scratch tokenizer, in addition to the names of the blocks.
PIECES = (*MOVES, "now", "goal", " on", " on table", " clear", " hold", ",", "\n")


def state_text(state: State) -> str:
    """Return the towers, each from the top, and the block in the hand: `now a on b, c, hold d`."""
    items = [" on ".join(tower) for tower in state.towers]
    held = [f"hold {state.held}"] if state.held is not None else []
    return f"now {', '.join(items + held)}"


def goal_text(goal: Goal) -> str:
    """Return the facts of a goal in a fixed order, joined by tower: `a on b on table, clear c`."""
    lower_of = {fact[1]: fact[2] for fact in goal if fact[0] == "on"}
    lower_of |= {fact[1]: "table" for fact in goal if fact[0] == "ontable"}
    items = []
    for block in sorted(lower_of.keys() - set(lower_of.values())):
        item = [block]
        while item[-1] in lower_of:
            item.append(lower_of[item[-1]])
        items.append(" on ".join(item))
    return ", ".join([*items, *sorted(f"clear {fact[1]}" for fact in goal if fact[0] == "clear")])


def problem_text(state: State, goal: Goal) -> str:
    """Return the question: a line with the state and a line with the goal."""
    return f"{state_text(state)}\ngoal {goal_text(goal)}"


@lru_cache(maxsize=256)
def read_problem(text: str) -> tuple[State, Goal]:
    """Return the state and the goal of a text of `problem_text`."""
    now, _, goal = text.partition("\n")
    return read_state(now), read_goal(goal.removeprefix("goal "))


def read_state(text: str) -> State:
    """Return the state of a text of `state_text`. Any other text is read as a state that no problem has."""
    towers, held = [], None
    for item in text.removeprefix("now ").split(", "):
        if item.startswith("hold "):
            held = item.removeprefix("hold ")
        else:
            towers.append(tuple(item.split(" on ")))
    return State(tuple(towers), held)


def read_goal(text: str) -> Goal:
    """Return the facts of a text of `goal_text`."""
    return frozenset(fact for item in text.split(", ") for fact in _item_facts(item))


def read_place(text: str) -> Fact | None:
    """Return the fact of `a on b`, `a on table` or `hold a`, None for other texts."""
    if text.startswith("hold "):
        return "holding", text.removeprefix("hold ")
    places = _item_facts(text)
    return places[0] if len(places) == 1 and places[0][0] != "clear" else None


def _item_facts(item: str) -> list[Fact]:
    if item.startswith("clear "):
        return [("clear", item.removeprefix("clear "))]
    blocks = item.split(" on ")
    return [("ontable", upper) if lower == "table" else ("on", upper, lower) for upper, lower in pairwise(blocks)]


def plan_text(moves: Iterable[Move]) -> str:
    """Return the moves, one per line."""
    return "\n".join(" ".join(move) for move in moves)


def read_plan(text: str) -> tuple[Move, ...] | str:
    """Return the moves of a text, one per line, or the reason why it is not a plan.

    Extra white space is ignored.
    """
    moves: list[Move] = []
    for line in text.splitlines():
        move = tuple(line.split())
        if not move:
            continue
        where = f"move {len(moves) + 1} ({' '.join(move)[:40]})"
        if move[0] not in MOVES:
            return f"{where}: expected {', '.join(MOVES)}"
        if len(move) - 1 != MOVES[move[0]]:
            return f"{where}: {move[0]} names {MOVES[move[0]]} block{'s' * (MOVES[move[0]] > 1)}, found {len(move) - 1}"
        moves.append(move)
    return tuple(moves) or "no moves"
