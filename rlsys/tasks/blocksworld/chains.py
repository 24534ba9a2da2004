"""Worked chains of thought for the blocks world. A node notes a few moves and the state after them."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from rlsys.config.tasks import TagShares
from rlsys.tasks import tags
from rlsys.tasks.blocksworld.blocks import Goal, Move, State, facts, run_moves, shortest_plan, successors
from rlsys.tasks.blocksworld.text import goal_text, plan_text, state_text
from rlsys.tasks.generated import join_nodes

# Pieces of chains that are single tokens of a from-scratch tokenizer.
PIECES = ("get", "not", " moves")


@dataclass(frozen=True, slots=True)
class Note:
    """Content of a <thinking> node.

    Attributes:
        moves: The moves.
        state: The state noted after the moves.
        taken_back: A wrong state that is noted first and then taken back.
    """

    moves: tuple[Move, ...]
    state: State
    taken_back: State | None = None


def build_chain(
    state: State, goal: Goal, *, moves_per_node: int, error_rate: float, shares: TagShares, rng: random.Random
) -> str:
    """Return a chain that plans from a state to a reachable goal, with one thinking node per `moves_per_node` moves.

    `shares` has the probabilities of the optional nodes. With probability shares.reflection, one state is first noted
    wrongly; a reflection takes it back and the node is written again. A fraction `error_rate` of the other chains notes
    a state wrongly and continues from there (a silent error). Their answer, all moves in order, is seldom right.
    """
    present = tags.draw(shares, rng)
    reflects = present[tags.REFLECTION]
    wrong = reflects or rng.random() < error_rate
    notes = take_notes(state, goal, moves_per_node, rng if wrong else None, silent=not reflects)
    moves = [move for note in notes for move in note.moves]
    return join_nodes(
        present,
        sub_task=lambda: f"get {goal_text(goal - facts(state))}",
        reclarify=lambda: f"goal {goal_text(goal)}",
        hypothesis=lambda: f"{max(1, len(moves) + rng.choice((-2, 0, 2)))} moves",
        thinking=lambda: [node for note in notes for node in _thinking_nodes(note)],
        double_check=lambda: state_text(notes[-1].state),
        answer=plan_text(moves),
    )


def take_notes(
    state: State, goal: Goal, moves_per_node: int, planted: random.Random | None, *, silent: bool
) -> list[Note]:
    """Return a shortest plan in pieces of `moves_per_node` moves. With `planted`, one state is noted wrongly.

    After a silent error the plan continues from the wrong state. Any other error is taken back.
    """
    notes = _notes(state, goal, moves_per_node)
    if planted is None:
        return notes
    place = planted.randrange(len(notes))
    before = notes[place - 1].state if place else state
    moves = notes[place].moves
    wrong_states = _other_states(before, moves)
    if not wrong_states:
        return notes
    wrong = planted.choice(wrong_states)
    if not silent:
        notes[place] = Note(moves, notes[place].state, taken_back=wrong)
        return notes
    return [*notes[:place], Note(moves, wrong), *_notes(wrong, goal, moves_per_node)]


def _notes(state: State, goal: Goal, moves_per_node: int) -> list[Note]:
    plan = shortest_plan(state, goal)
    if plan is None:
        raise ValueError(f"no plan reaches {goal_text(goal)} from {state_text(state)}")
    notes = []
    for start in range(0, len(plan), moves_per_node):
        moves = plan[start : start + moves_per_node]
        state = run_moves(state, moves)
        notes.append(Note(moves, state))
    return notes


def _other_states(state: State, moves: Sequence[Move]) -> list[State]:
    """Return the states after the same moves with another last move."""
    before_last = run_moves(state, moves[:-1])
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
    """Return a place of a block that is true in the wrong state only."""
    places = [fact for fact in facts(wrong) - facts(right) if fact[0] in ("on", "ontable", "holding")]
    kind, *blocks = min(places)
    return {"on": " on ".join(blocks), "ontable": f"{blocks[0]} on table", "holding": f"hold {blocks[0]}"}[kind]
