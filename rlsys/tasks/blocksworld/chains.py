"""Worked chains of thought for the blocks world: a few moves, the state after them, and at the end the plan."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from rlsys.config.tasks import TagShares
from rlsys.tasks import tags
from rlsys.tasks.blocksworld.blocks import Goal, Move, State, facts, shortest_plan, successors
from rlsys.tasks.blocksworld.text import goal_text, plan_text, state_text

# Pieces of chain text that a from-scratch tokenizer makes single tokens.
PIECES = ("get", "not", " moves")


@dataclass(frozen=True, slots=True)
class Note:
    """One <thinking> node: moves, the state noted after them, and one that is noted first and taken back."""

    moves: tuple[Move, ...]
    state: State
    taken_back: State | None = None


def build_chain(
    state: State, goal: Goal, *, moves_per_node: int, error_rate: float, shares: TagShares, rng: random.Random
) -> str:
    """A chain that plans from a state to a goal, which must be reachable.

    Order of the nodes: sub-task, reclarify, hypothesis, thinking (one per `moves_per_node` moves),
    double-check, answer; all but thinking and answer with the probability in `shares`. With
    probability shares.reflection one state is first noted wrongly, a reflection takes it back and
    the node is written again; of the other chains a share of error_rate notes a state wrongly and
    plans on from there (a silent error), so that the answer, all moves in order, is seldom right.
    """
    chance = tags.draw(shares, rng)
    reflects = chance[tags.REFLECTION]
    wrong = reflects or rng.random() < error_rate
    notes = take_notes(state, goal, moves_per_node, rng if wrong else None, silent=not reflects)
    moves = [move for note in notes for move in note.moves]
    nodes = []
    if chance[tags.SUB_TASK]:
        nodes.append(tags.node(tags.SUB_TASK, f"get {goal_text(goal - facts(state))}"))
    if chance[tags.RECLARIFY]:
        nodes.append(tags.node(tags.RECLARIFY, f"goal {goal_text(goal)}"))
    if chance[tags.HYPOTHESIS]:
        nodes.append(tags.node(tags.HYPOTHESIS, f"{max(1, len(moves) + rng.choice((-2, 0, 2)))} moves"))
    for note in notes:
        nodes.extend(_thinking_nodes(note))
    if chance[tags.DOUBLE_CHECK]:
        nodes.append(tags.node(tags.DOUBLE_CHECK, state_text(notes[-1].state)))
    nodes.append(tags.node(tags.ANSWER, plan_text(moves)))
    return "".join(nodes)


def take_notes(
    state: State, goal: Goal, moves_per_node: int, planted: random.Random | None, *, silent: bool
) -> list[Note]:
    """A shortest plan in pieces of `moves_per_node` moves; with `planted`, one of them noted wrongly.

    A silent error stays, and the plan goes on from the state that was noted; any other is taken back.
    """
    notes = _notes(state, goal, moves_per_node)
    if planted is None:
        return notes
    place = planted.randrange(len(notes))
    before = notes[place - 1].state if place else state
    moves = notes[place].moves
    others = _other_states(before, moves)
    if not others:
        return notes
    other = planted.choice(others)
    if not silent:
        notes[place] = Note(moves, notes[place].state, taken_back=other)
        return notes
    return [*notes[:place], Note(moves, other), *_notes(other, goal, moves_per_node)]


def _notes(state: State, goal: Goal, moves_per_node: int) -> list[Note]:
    plan = shortest_plan(state, goal)
    if plan is None:
        raise ValueError(f"no plan reaches {goal_text(goal)} from {state_text(state)}")
    notes = []
    for start in range(0, len(plan), moves_per_node):
        moves = plan[start : start + moves_per_node]
        state = _after(state, moves)
        notes.append(Note(moves, state))
    return notes


def _after(state: State, moves: Sequence[Move]) -> State:
    for move in moves:
        state = dict(successors(state))[move]
    return state


def _other_states(state: State, moves: Sequence[Move]) -> list[State]:
    """Where another last move would have led."""
    before_last = _after(state, moves[:-1])
    return [other for move, other in successors(before_last) if move != moves[-1]]


def _thinking_nodes(note: Note) -> list[str]:
    nodes = []
    if note.taken_back is not None:
        nodes.append(_thinking(note.moves, note.taken_back))
        nodes.append(tags.node(tags.REFLECTION, f"not {_difference(note.taken_back, note.state)}"))
    nodes.append(_thinking(note.moves, note.state))
    return nodes


def _thinking(moves: Sequence[Move], state: State) -> str:
    return tags.node(tags.THINKING, f"{plan_text(moves)}\n{state_text(state)}")


def _difference(wrong: State, right: State) -> str:
    """A place of a block that only the wrong state has."""
    places = [fact for fact in facts(wrong) - facts(right) if fact[0] in ("on", "ontable", "holding")]
    kind, *blocks = min(places)
    return {"on": " on ".join(blocks), "ontable": f"{blocks[0]} on table", "holding": f"hold {blocks[0]}"}[kind]
