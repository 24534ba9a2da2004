"""Reader of blocks-world problems in PDDL, as PlanBench publishes them.

Source: PlanBench, arXiv:2206.10498, instances of the domain blocksworld-4ops.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from rlsys.errors import DataError
from rlsys.tasks.blocksworld.blocks import Fact, Goal, State, Tower, facts

_ARITY = {"on": 2, "ontable": 1, "clear": 1, "holding": 1, "handempty": 0}
_IN_GOALS = ("on", "ontable", "clear")
_DEEPEST = 16  # a problem needs 4 levels: (define (:goal (and (on x y))))
_TOKEN = re.compile(r"[()]|[^\s()]+")


def read_pddl(text: str, names: Sequence[str]) -> tuple[State, Goal]:
    """Return the initial state and the goal of a problem. The i-th object gets the i-th of `names`.

    The towers have the order of the objects on the table.

    Raises:
        DataError: The text is not a valid problem. The message names the defect.
    """
    sections = _sections(text)
    objects = sections[":objects"]
    if not objects or not all(isinstance(name, str) for name in objects) or len(set(objects)) < len(objects):
        raise DataError(f":objects: expected different names, found {_shown(objects)}")
    if len(objects) > len(names):
        raise DataError(f":objects: {len(objects)} blocks, more than the {len(names)} letters of task.alphabet")
    goal = sections[":goal"]
    conjuncts = goal[0][1:] if len(goal) == 1 and goal[0][:1] == ["and"] else goal
    goal_facts = _read_facts(conjuncts, objects, ":goal", _IN_GOALS)
    _check_goal(goal_facts)
    state = _state(_read_facts(sections[":init"], objects, ":init", tuple(_ARITY)), objects)
    renamed = dict(zip(objects, names, strict=False))
    towers = tuple(tuple(renamed[block] for block in tower) for tower in state.towers)
    renamed_goal = frozenset((fact[0], *(renamed[block] for block in fact[1:])) for fact in goal_facts)
    return State(towers, None if state.held is None else renamed[state.held]), renamed_goal


def _sections(text: str) -> dict[str, list[Any]]:
    """Return the contents of :objects, :init and :goal as nested lists of words."""
    [problem, *more] = _nested(text) or [None]
    if more or not isinstance(problem, list) or problem[:1] != ["define"]:
        raise DataError(f"expected one (define ...), found {' '.join(text.split())[:60]!r}")
    sections: dict[str, list[Any]] = {}
    for part in problem[1:]:
        if isinstance(part, list) and part and part[0] in (":objects", ":init", ":goal"):
            if part[0] in sections:
                raise DataError(f"{part[0]} is given twice")
            sections[part[0]] = part[1:]
    missing = [name for name in (":objects", ":init", ":goal") if name not in sections]
    if missing:
        raise DataError(f"{missing[0]} is missing")
    return sections


def _nested(text: str) -> list[Any]:
    """Return parentheses as nested lists of lower-case words, without comments."""
    open_lists: list[list[Any]] = [[]]
    for word in _TOKEN.findall(re.sub(r";[^\n]*", "", text.lower())):
        if word == "(":
            if len(open_lists) > _DEEPEST:
                raise DataError(f"expected parentheses at most {_DEEPEST} deep, found more")
            open_lists.append([])
        elif word != ")":
            open_lists[-1].append(word)
        elif len(open_lists) > 1:
            closed = open_lists.pop()
            open_lists[-1].append(closed)
        else:
            raise DataError("a parenthesis is closed that was never opened")
    if len(open_lists) > 1:
        raise DataError("a parenthesis is never closed")
    return open_lists[0]


def _read_facts(items: Iterable[Any], objects: Sequence[str], where: str, known: Sequence[str]) -> frozenset[Fact]:
    read = set()
    for item in items:
        # `known` has no lists, so this also refuses an item that begins with a list.
        if not isinstance(item, list) or not item or item[0] not in known or len(item) - 1 != _ARITY[item[0]]:
            forms = ", ".join(f"({' '.join([name, *'xy'[: _ARITY[name]]])})" for name in known)
            raise DataError(f"{where}: expected {forms}, found {_shown(item)}")
        for name in item[1:]:
            if name not in objects:
                raise DataError(f"{where}: {_shown(item)}: {_shown(name)} is not among :objects")
        read.add(tuple(item))
    return frozenset(read)


def _state(init: frozenset[Fact], objects: Sequence[str]) -> State:
    """Return the state in which exactly the facts of `init` are true."""
    upper_of = {fact[2]: fact[1] for fact in init if fact[0] == "on"}
    towers: list[Tower] = []
    for base in (block for block in objects if ("ontable", block) in init):
        tower: Tower = (base,)
        while tower[0] in upper_of and len(tower) <= len(objects):
            tower = (upper_of[tower[0]], *tower)
        towers.append(tower)
    state = State(tuple(towers), next((block for block in objects if ("holding", block) in init), None))
    places = Counter([*(block for tower in towers for block in tower), *([state.held] if state.held else [])])
    for block in objects:
        if places[block] != 1:
            raise DataError(f":init: expected one place for block {block}, found {places[block]}")
    true = facts(state)
    if true != init:
        missing, extra = sorted(true - init), sorted(init - true)
        fault = f"no ({' '.join(missing[0])})" if missing else f"({' '.join(extra[0])})"
        raise DataError(f":init: {fault} contradicts the other facts")
    return state


def _check_goal(goal: Goal) -> None:
    """Raise DataError if no state meets a goal."""
    if not goal:
        raise DataError(":goal: expected at least one fact, found none")
    under = {fact[1]: fact[2] for fact in goal if fact[0] == "on"}
    places = Counter(fact[1] for fact in goal if fact[0] != "clear")
    covers = Counter(fact[-1] for fact in goal if fact[0] != "ontable")  # `clear` counts as a cover
    for block in sorted({*places, *covers}):
        lower, steps = under.get(block), 0
        while lower not in (None, block) and steps <= len(under):
            lower, steps = under.get(lower), steps + 1
        if places[block] > 1 or covers[block] > 1 or lower is not None:
            raise DataError(f":goal: its facts about block {block} contradict one another")


def _shown(value: Any) -> str:
    text = " ".join(map(_shown, value)) if isinstance(value, list) else str(value)
    return f"({text})"[:60] if isinstance(value, list) else text[:60]
