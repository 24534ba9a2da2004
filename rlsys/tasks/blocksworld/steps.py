"""Rules for the steps of a chain in the blocks world."""

from __future__ import annotations

import re

from rlsys.tasks import tags
from rlsys.tasks.blocksworld.blocks import Goal, Move, State, check_plan, facts, run_moves
from rlsys.tasks.blocksworld.text import goal_text, read_goal, read_place, read_plan, read_state, state_text
from rlsys.tasks.steps import StepRules, WrongStepError


class PlanSteps(StepRules[tuple[State, tuple[Move, ...]]]):
    """Every move must be possible, and the stated state must be the one after it.

    The state has the towers and all moves so far.
    """

    def __init__(self, state: State, goal: Goal) -> None:
        self.start = state, ()
        self.goal = goal

    def think(self, state: tuple[State, tuple[Move, ...]], text: str) -> tuple[State, tuple[Move, ...]]:
        towers, made = state
        plan, _, stated = text.rpartition("\n")
        moves = read_plan(plan)
        if isinstance(moves, str):
            raise WrongStepError(moves)
        if fault := check_plan(towers, frozenset(), moves):
            raise WrongStepError(fault)
        towers = run_moves(towers, moves)
        _require_state(towers, stated)
        return towers, (*made, *moves)

    def reflect(self, before: tuple[State, tuple[Move, ...]], thought: str, text: str, fault: str) -> None:
        plan, _, stated = thought.rpartition("\n")
        moves = read_plan(plan)
        possible = not isinstance(moves, str) and not check_plan(before[0], frozenset(), moves)
        true = facts(run_moves(before[0], moves)) if possible and not isinstance(moves, str) else frozenset()
        place = read_place(text.removeprefix("not ")) if text.startswith("not ") else None
        if not fault or place is None or place in true or place not in facts(read_state(stated)):
            raise WrongStepError(f"{text[:40]!r} does not name a wrong place of the thought before it")

    def note(self, state: tuple[State, tuple[Move, ...]], tag: str, text: str) -> None:
        towers, made = state
        if tag == tags.SUB_TASK:
            missing = self.goal - facts(towers)
            right, expected = read_goal(text.removeprefix("get ")) == missing, f"get {goal_text(missing)}"
        elif tag == tags.RECLARIFY:
            right, expected = read_goal(text.removeprefix("goal ")) == self.goal, f"goal {goal_text(self.goal)}"
        elif tag == tags.HYPOTHESIS:
            right, expected = re.fullmatch("[0-9]{1,3} moves", text) is not None, "a number of moves"
        elif tag == tags.DOUBLE_CHECK:
            return _require_state(towers, text)
        else:
            right, expected = read_plan(text) == made, "all moves so far"
            if missing := self.goal - facts(towers):
                raise WrongStepError(f"an answer before the goal is reached: {goal_text(missing)} is missing")
        if not right:
            raise WrongStepError(f"expected {expected}, found {text[:40]!r}")
        return None


def _require_state(state: State, text: str) -> None:
    stated = read_state(text)
    if not text.startswith("now ") or (sorted(stated.towers), stated.held) != (sorted(state.towers), state.held):
        raise WrongStepError(f"expected {state_text(state)!r}, found {text[:40]!r}")
