"""Blocks world: moves that bring blocks from one arrangement to another. Generator and exact verifier."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Sequence

from rlsys.config.tasks import BlocksworldConfig
from rlsys.errors import DataError
from rlsys.tables.files import Row, described, is_unicode
from rlsys.tables.sources import read_source
from rlsys.tasks import tags
from rlsys.tasks.blocksworld import chains as plan_chains
from rlsys.tasks.blocksworld import text as block_text
from rlsys.tasks.blocksworld.arrangement import arrangement
from rlsys.tasks.blocksworld.blocks import Goal, State, Tower, check_plan, facts
from rlsys.tasks.blocksworld.pddl import read_pddl
from rlsys.tasks.blocksworld.steps import PlanSteps
from rlsys.tasks.generated import CORRECT, GeneratedTask, check_ids, wrong
from rlsys.types import Problem, Verdict

HELD_OUT_EVERY = 5
"""The hash of an arrangement assigns one in HELD_OUT_EVERY to the held-out split, for every seed."""


class BlocksworldTask(GeneratedTask[BlocksworldConfig, tuple[State, Goal]]):
    """Planning of moves from towers of blocks to a goal.

    The sha256 of its arrangement decides the split of a problem (`arrangement`): neither the names of the blocks nor
    the order in which the towers are listed have an influence. `problems_path` names a held-out file.

    The answer of a problem is its question: the verifier executes the moves and accepts every plan that works.
    """

    one_answer = False
    noun = "arrangement"

    def vocabulary(self) -> tuple[str, ...]:
        """Return the tags, words of questions and chains, and block names with the space before them."""
        names = (f" {letter}" for letter in self.config.alphabet)
        return (*tags.tag_strings(), *block_text.PIECES, *plan_chains.PIECES, *names, *"0123456789")

    def _read_problems(self) -> tuple[Problem, ...]:
        path = self.config.problems_path
        return load_problems(path, self.config.alphabet) if path else ()

    def _draw(self, rng: random.Random) -> tuple[State, Goal] | None:
        """Return two random arrangements of the same blocks. The goal is a random part of the second one.

        An arrangement that already meets the goal is rejected.
        """
        count = rng.randint(self.config.min_blocks, self.config.max_blocks)
        blocks = rng.sample(self.config.alphabet, count)
        state = _random_state(blocks, rng)
        placed = sorted(fact for fact in facts(_random_state(blocks, rng)) if fact[0] == "on")
        goal = frozenset(rng.sample(placed, rng.randint(min(1, len(placed)), len(placed))))
        return None if goal <= facts(state) else (state, goal)

    def _problem(self, problem_id: str, instance: tuple[State, Goal]) -> Problem:
        return _as_problem(problem_id, *instance)

    def _chain(self, instance: tuple[State, Goal], rng: random.Random) -> str:
        return plan_chains.build_chain(
            *instance,
            moves_per_node=self.config.moves_per_node,
            error_rate=self.config.error_rate,
            shares=self.config.shares,
            rng=rng,
        )

    def _judge(self, problem_answer: str, text: str) -> Verdict:
        moves = block_text.read_plan(text)
        if isinstance(moves, str):
            return wrong(moves, answered=False)
        fault = check_plan(*block_text.read_problem(problem_answer), moves)
        return wrong(fault) if fault else CORRECT

    def _step_rules(self, question: str) -> PlanSteps:
        return PlanSteps(*block_text.read_problem(question))

    def identity(self, question: str) -> str:
        return fingerprint(*block_text.read_problem(question))

    def _is_held_out(self, identity: str) -> bool:
        return is_held_out(identity)

    def _advice(self) -> str:
        return f"{self.config.min_blocks} to {self.config.max_blocks} blocks; raise task.max_blocks"


def fingerprint(state: State, goal: Goal) -> str:
    """Return the sha256 of the arrangement of a problem."""
    return hashlib.sha256(json.dumps(arrangement(state, goal)).encode()).hexdigest()


def is_held_out(name: str) -> bool:
    """Return whether problems with this fingerprint belong to the held-out split."""
    # With this remainder, 5 of the 22 arrangements with three blocks are held out, with 0 it would be 3 rare ones.
    return int(name[:8], 16) % HELD_OUT_EVERY == 4


def _as_problem(problem_id: str, state: State, goal: Goal) -> Problem:
    text = block_text.problem_text(state, goal)
    return Problem(problem_id=problem_id, question=text, answer=text)


def _random_state(blocks: Sequence[str], rng: random.Random) -> State:
    """Put the blocks, in random order, on the table or under the tower before, with equal probability."""
    towers: list[Tower] = []
    for block in rng.sample(blocks, len(blocks)):
        if towers and rng.random() < 0.5:
            towers[-1] = (*towers[-1], block)
        else:
            towers.append((block,))
    return State(tuple(towers))


def load_problems(path: str, alphabet: str) -> tuple[Problem, ...]:
    """Read JSONL rows of {instance, pddl}. The objects of each problem get the letters of the alphabet in order.

    Raises:
        ConfigError: An environment variable in the path is not set.
        DataError: The file is missing or empty; a row cannot be read; a problem is solved before the first move; or
            two rows have the same instance.
    """
    source = read_source(path, "", "task.problems_path")
    where = f"task.problems_path {source.path}"
    problems = tuple(_read_row(row, alphabet, where) for row in source.rows)
    check_ids(problems, f"{where}: two rows have the instance")
    return problems


def _read_row(row: Row, alphabet: str, where: str) -> Problem:
    if isinstance(row.values, str):
        raise DataError(f"{where}: row {row.number}: {row.values}")
    instance, text = row.values.get("instance"), row.values.get("pddl")
    is_named = isinstance(instance, str | int) and not isinstance(instance, bool) and is_unicode(str(instance))
    if not is_named or not isinstance(text, str) or not is_unicode(text):
        raise DataError(
            f"{where}: row {row.number}: expected {{instance: number or text, pddl: text}}, "
            f"found instance {described(instance)}, pddl {described(text)}"
        )
    try:
        state, goal = read_pddl(text, alphabet)
        if goal <= facts(state):  # the plan would be empty, which is not an answer
            raise DataError("expected a goal that takes a move, found one that :init meets")
        return _as_problem(str(instance), state, goal)
    except DataError as error:
        raise DataError(f"{where}: row {row.number} (instance {instance}): {error}") from None
