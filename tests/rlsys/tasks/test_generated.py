"""Common parts of the generated tasks: splits, held-out files, ids and chains."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest

from rlsys.config.section import Section
from rlsys.config.tasks import GeneratedConfig
from rlsys.errors import ConfigError, DataError
from rlsys.tasks import tags
from rlsys.tasks.generated import CORRECT, GeneratedTask, check_ids, hashed_random, join_nodes, wrong
from rlsys.types import Problem, Verdict

OPTIONAL = (tags.SUB_TASK, tags.RECLARIFY, tags.HYPOTHESIS, tags.DOUBLE_CHECK)


class NumbersSizes(Section):
    top: int | None = None


class NumbersConfig(GeneratedConfig):
    type: str = "numbers"
    demonstrations: NumbersSizes = NumbersSizes()
    top: int = 20


class Numbers(GeneratedTask[NumbersConfig, int]):
    """Numbers below 20. Even numbers are held out, and 7 is rejected."""

    one_answer = True
    noun = "number"

    file_problems: tuple[Problem, ...] = ()

    def _read_problems(self) -> tuple[Problem, ...]:
        return self.file_problems

    def _draw(self, rng: random.Random) -> int | None:
        number = rng.randrange(self.config.top)
        return None if number == 7 else number

    def _problem(self, problem_id: str, instance: int) -> Problem:
        return Problem(problem_id=problem_id, question=str(instance), answer=str(instance + 1))

    def _chain(self, instance: int, rng: random.Random) -> str:
        return f"<answer>{instance + 1}</answer>"

    def _judge(self, problem_answer: str, text: str) -> Verdict:
        return CORRECT if text == problem_answer else wrong()

    def identity(self, question: str) -> str:
        return question

    def _is_held_out(self, identity: str) -> bool:
        return int(identity) % 2 == 0

    def _advice(self) -> str:
        return f"{self.config.top} numbers"


def numbers(*file_problems: Problem, **fields: object) -> Numbers:
    task = Numbers(NumbersConfig.model_validate(fields), 0)
    task.file_problems = file_problems
    return task


def test_a_problem_is_drawn_until_it_belongs_to_the_split() -> None:
    task = numbers()
    train = [task.problem("train", index) for index in range(200)]
    assert {int(problem.question) for problem in train} == {1, 3, 5, 9, 11, 13, 15, 17, 19}
    assert {int(task.problem("held_out", index).question) % 2 for index in range(50)} == {0}
    assert train[3].problem_id == "train-3"
    assert (task.size("train"), task.size("held_out"), task.digest()) == (None, None, "")


def test_a_demonstration_has_the_problem_of_its_index() -> None:
    problem, chain = numbers().demonstration(4, random.Random(0))
    assert problem == numbers().problem("train", 4)
    assert numbers().verify(problem, chain) == CORRECT
    assert numbers().verify(problem, "no tag") == wrong("no final <answer>", answered=False)


def test_demonstrations_may_have_other_sizes() -> None:
    task = numbers(top=1000, demonstrations={"top": 10})
    shown = {int(task.demonstration(index, random.Random(0))[0].question) for index in range(100)}
    assert shown == {1, 3, 5, 9}  # of the train split, and 7 is rejected
    assert max(int(task.problem("train", index).question) for index in range(100)) > 10


def test_a_task_without_rules_cannot_tell_about_steps() -> None:
    assert numbers().check_steps("3", "<thinking>4</thinking>") is None


def test_a_held_out_file_replaces_the_held_out_split_and_leaves_the_train_split() -> None:
    problem = Problem(problem_id="a", question="3", answer="4")
    task = numbers(problem)
    assert (task.size("held_out"), task.problem("held_out", 0)) == (1, problem)
    assert 3 not in {int(task.problem("train", index).question) for index in range(200)}
    other = numbers(Problem(problem_id="a", question="3", answer="5"))
    assert len({task.digest(), other.digest(), ""}) == 3


def test_a_split_without_problems_is_an_error() -> None:
    with pytest.raises(ConfigError, match="^task: no train number among 10000 .* many possible numbers, found 1 "):
        numbers(top=1).problem("train", 0)


def test_two_problems_with_one_id_are_refused() -> None:
    problems = [Problem(problem_id=name, question="q", answer="a") for name in ("x", "y", "x")]
    check_ids(problems[:2], "file: two rows have the id")
    with pytest.raises(DataError, match="^file: two rows have the id 'x'; expected one each$"):
        check_ids(problems, "file: two rows have the id")


def test_hashed_random_is_the_same_in_every_version() -> None:
    # The seed is the first 8 bytes of sha256("0:train:3"), big-endian.
    assert hashed_random(0, "train", 3).random() == random.Random(13823076544659827054).random()


def chain(present: set[str], texts: Iterator[int]) -> str:
    """A chain whose optional texts count the calls for a text."""
    return join_nodes(
        {tag: tag in present for tag in OPTIONAL},
        sub_task=lambda: f"{next(texts)}",
        reclarify=lambda: f"{next(texts)}",
        hypothesis=lambda: f"{next(texts)}",
        thinking=lambda: [tags.node(tags.THINKING, f"{next(texts)}")],
        double_check=lambda: f"{next(texts)}",
        answer="a",
    )


def test_nodes_are_joined_in_order() -> None:
    assert chain(set(OPTIONAL), iter(range(5))) == (
        "<sub-task>0</sub-task><reclarify>1</reclarify><hypothesis>2</hypothesis><thinking>3</thinking>"
        "<double-check>4</double-check><answer>a</answer>"
    )


def test_the_text_of_an_absent_node_is_not_computed() -> None:
    texts = iter(range(5))
    assert chain({tags.HYPOTHESIS}, texts) == "<hypothesis>0</hypothesis><thinking>1</thinking><answer>a</answer>"
    assert next(texts) == 2
