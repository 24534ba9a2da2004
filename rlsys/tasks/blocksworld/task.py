"""Blocks world: which moves bring blocks from one arrangement to another; a generator and its exact verifier."""

from __future__ import annotations

import hashlib
import json
import random
from collections import Counter
from collections.abc import Sequence
from functools import cached_property

from rlsys.config.tasks import BlocksworldConfig
from rlsys.errors import ConfigError, DataError
from rlsys.tables.sources import Row, is_unicode, read_source
from rlsys.tasks import tags
from rlsys.tasks.blocksworld import chains as plan_chains
from rlsys.tasks.blocksworld import text as block_text
from rlsys.tasks.blocksworld.blocks import Goal, State, Tower, check_plan, facts
from rlsys.tasks.blocksworld.pddl import read_pddl
from rlsys.tasks.generated import hashed_random
from rlsys.types import Problem, Split, Verdict

# One problem in HELD_OUT_EVERY belongs to the held-out split, by its hash, whatever the seed.
HELD_OUT_EVERY = 5
_MAX_DRAWS = 10_000


class BlocksworldTask:
    """Blocks in towers, facts that are wanted, and four moves.

    A problem belongs to the held-out split if the sha256 of its facts falls into a fixed bucket, so the
    two splits share no problem for any seeds and indices, in whatever order its towers are told. The
    same arrangement of blocks with other names is another problem. With `problems_path` the held-out
    split is that file, and its problems are excluded from the train split.

    The answer of a problem is its question: the verifier tries out the moves, and any plan is right that works.
    """

    one_answer = False

    def __init__(self, config: BlocksworldConfig, seed: int) -> None:
        self.config = config
        self.seed = seed

    def size(self, split: Split) -> int | None:
        """Number of problems of a held-out file; None for the generators."""
        return len(self._problems) if split == "held_out" and self._problems else None

    def problem(self, split: Split, index: int) -> Problem:
        """The index-th problem of a split."""
        if split == "held_out" and self._problems:
            return self._problems[index]
        return _as_problem(f"{split}-{index}", *self._generate(split, index))

    def demonstration(self, index: int, rng: random.Random) -> tuple[Problem, str]:
        """The index-th train problem and a chain for it; `rng` decides tags and errors."""
        state, goal = self._generate("train", index)
        chain = plan_chains.build_chain(
            state,
            goal,
            moves_per_node=self.config.moves_per_node,
            error_rate=self.config.error_rate,
            shares=self.config.shares,
            rng=rng,
        )
        return _as_problem(f"train-{index}", state, goal), chain

    def verify(self, problem_answer: str, completion: str) -> Verdict:
        """Reward 1 where the one final <answer> is a plan that reaches the goal, else 0."""
        text = tags.final_answer(completion)
        moves = "no final <answer>" if text is None else block_text.read_plan(text)
        if isinstance(moves, str):
            return Verdict(outcome="wrong", reward=0.0, answered=False, detail=moves)
        fault = check_plan(*block_text.read_problem(problem_answer), moves)
        if fault:
            return Verdict(outcome="wrong", reward=0.0, answered=True, detail=fault)
        return Verdict(outcome="ok", reward=1.0, answered=True)

    def digest(self) -> str:
        """sha256 of the held-out problems that were read, "" where all are generated."""
        rows = [[problem.problem_id, problem.question] for problem in self._problems]
        return hashlib.sha256(json.dumps(rows).encode()).hexdigest() if rows else ""

    def notes(self) -> tuple[str, ...]:
        return ()

    def vocabulary(self) -> tuple[str, ...]:
        """Tags, words of questions and chains, and the names of blocks with the space before them."""
        named = (f" {letter}" for letter in self.config.alphabet)
        return (*tags.tag_strings(), *block_text.PIECES, *plan_chains.PIECES, *named, *"0123456789")

    @cached_property
    def _problems(self) -> tuple[Problem, ...]:
        """The problems of `problems_path`, read on first use: a reward process needs none."""
        path = self.config.problems_path
        return load_problems(path, self.config.alphabet) if path else ()

    @cached_property
    def _excluded(self) -> frozenset[str]:
        return frozenset(fingerprint(*block_text.read_problem(problem.question)) for problem in self._problems)

    def _generate(self, split: Split, index: int) -> tuple[State, Goal]:
        """State and goal, by rejection of problems of the other split and of solved ones."""
        rng = hashed_random(self.seed, split, index)
        for _ in range(_MAX_DRAWS):
            state, goal = self._draw(rng)
            name = fingerprint(state, goal)
            if not goal <= facts(state) and is_held_out(name) == (split == "held_out") and name not in self._excluded:
                return state, goal
        raise ConfigError(
            f"task: no {split} problem among {_MAX_DRAWS} drawn; expected many possible problems, found "
            f"{len(self.config.alphabet)} letters in task.alphabet; add letters to it"
        )

    def _draw(self, rng: random.Random) -> tuple[State, Goal]:
        """Two random arrangements of the same blocks; the goal is a random part of what lies on what in the second."""
        count = rng.randint(self.config.min_blocks, self.config.max_blocks)
        blocks = rng.sample(self.config.alphabet, count)
        state = _random_state(blocks, rng)
        placed = sorted(fact for fact in facts(_random_state(blocks, rng)) if fact[0] == "on")
        return state, frozenset(rng.sample(placed, rng.randint(min(1, len(placed)), len(placed))))


def fingerprint(state: State, goal: Goal) -> str:
    """sha256 of the facts of a problem; the order in which its towers are told does not matter."""
    return hashlib.sha256(json.dumps([sorted(facts(state)), sorted(goal)]).encode()).hexdigest()


def is_held_out(name: str) -> bool:
    """Whether the problem with this fingerprint belongs to the held-out split."""
    return int(name[:8], 16) % HELD_OUT_EVERY == 0


def _as_problem(problem_id: str, state: State, goal: Goal) -> Problem:
    text = block_text.problem_text(state, goal)
    return Problem(problem_id=problem_id, question=text, answer=text)


def _random_state(blocks: Sequence[str], rng: random.Random) -> State:
    """The blocks in random order, each on the table or under the tower before it, with equal probability."""
    towers: list[Tower] = []
    for block in rng.sample(blocks, len(blocks)):
        if towers and rng.random() < 0.5:
            towers[-1] = (*towers[-1], block)
        else:
            towers.append((block,))
    return State(tuple(towers))


def load_problems(path: str, alphabet: str) -> tuple[Problem, ...]:
    """Read JSONL rows of {instance, pddl}; the objects of each get the letters of the alphabet in order.

    Raises:
        ConfigError: a variable of the path is not set.
        DataError: the file is missing or empty, a row cannot be read or is solved before a move, or an instance occurs
            twice.
    """
    source = read_source(path, "", "task.problems_path")
    where = f"task.problems_path {source.path}"
    problems = tuple(_read_row(row, alphabet, where) for row in source.rows)
    [(name, times)] = Counter(problem.problem_id for problem in problems).most_common(1)
    if times > 1:  # seeds of completions are hashed from the id
        raise DataError(f"{where}: two rows have the instance {name!r}; expected one each")
    return problems


def _read_row(row: Row, alphabet: str, where: str) -> Problem:
    if isinstance(row.values, str):
        raise DataError(f"{where}: row {row.number}: {row.values}")
    instance, text = row.values.get("instance"), row.values.get("pddl")
    named = isinstance(instance, str | int) and not isinstance(instance, bool) and is_unicode(str(instance))
    if not named or not isinstance(text, str) or not is_unicode(text):
        raise DataError(
            f"{where}: row {row.number}: expected {{instance: number or text, pddl: text}}, "
            f"found instance {str(instance)[:40]!r}, pddl {str(text)[:40]!r}"
        )
    try:
        state, goal = read_pddl(text, alphabet)
        if goal <= facts(state):  # the plan would be empty, which is no answer
            raise DataError("expected a goal that takes a move, found one that :init meets")
        return _as_problem(str(instance), state, goal)
    except DataError as error:
        raise DataError(f"{where}: row {row.number} (instance {instance}): {error}") from None
