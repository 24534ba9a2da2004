"""Tasks of users: what is checked at the start, and what its faults say."""

from __future__ import annotations

import pickle
import random
from pathlib import Path
from typing import Any

import pytest

from rlsys.config.outside_tasks import CustomConfig
from rlsys.errors import ConfigError
from rlsys.tasks import build_task
from rlsys.tasks.custom import CustomTask
from rlsys.types import Message, Problem, Verdict

CODE = """
import random
from rlsys.tasks.base import BaseTask
from rlsys.types import Message, Problem, Verdict

class Adds(BaseTask):
    def __init__(self, seed, largest=9, **faults):
        self.seed, self.largest, self.faults = seed, largest, faults
        if faults.get("raises") == "__init__":
            raise KeyError("no such table")

    def size(self, split):
        return self.faults.get("size")

    def problem(self, split, index):
        if self.faults.get("raises") == "problem":
            return {}["missing"]
        if "problem" in self.faults:
            return self.faults["problem"]
        number = index + (1000 if split == "held_out" else 0) + self.faults.get("shift", 0)
        if self.faults.get("random"):
            number = random.random()
        values = {"problem_id": str(index), "question": f"{number} + 1?", "answer": str(number + 1)}
        return Problem(**{**values, **self.faults.get("values", {})})

    def verify(self, problem, completion, finished=True):
        return Verdict(outcome="ok", reward=self.largest, answered=True)

def make(seed):
    return Adds(seed)

def repeated(seed):
    task = Adds(seed)
    task.problem = lambda split, index: Problem(problem_id="0", question="always the same", answer="")
    return task

def numbers(seed):
    task = Adds(seed)
    task.problem = lambda split, index: Problem(problem_id="0", question=3, answer="")
    return task

def sets(seed):
    task = Adds(seed)
    task.problem = lambda split, index: Problem(problem_id="0", question="q", answer="", metadata={"a": {1}})
    return task

class Bare:
    def __init__(self, seed): ...
    def problem(self, split, index): ...

class Narrow(Adds):
    def verify(self, problem, completion): ...

number = 3
"""


@pytest.fixture
def folder(tmp_path: Path) -> str:
    (tmp_path / "mine.py").write_text(CODE)
    return str(tmp_path)


def task_of(folder: str, name: str = "Adds", **arguments: Any) -> CustomTask:
    task = build_task(CustomConfig(fn=f"mine.py:{name}", arguments=arguments), 3, folder)
    assert isinstance(task, CustomTask)
    return task


def test_a_task_with_two_methods_has_the_defaults_of_the_others(folder: str) -> None:
    task = task_of(folder, largest=2)
    problem = task.problem("train", 4)
    assert (problem.question, problem.answer) == ("4 + 1?", "5")
    assert task.verify(problem, "5") == Verdict(outcome="ok", reward=2, answered=True)
    assert (task.size("train"), task.one_answer, task.notes()) == (None, True, ())
    assert task.check_steps("?", "") is None and task.demonstration(0, random.Random(0)) is None
    assert {"<answer>", "a", "\n"} <= set(task.vocabulary())
    copy = pickle.loads(pickle.dumps(task))
    assert copy.problem("train", 4) == problem


def test_a_function_may_make_the_task(folder: str) -> None:
    assert task_of(folder, "make").problem("held_out", 0).question == "1000 + 1?"


def test_a_module_of_the_folder_is_found(folder: str) -> None:
    (Path(folder) / "my_module_of_tasks.py").write_text(CODE)
    task = CustomTask(CustomConfig(fn="my_module_of_tasks:Adds"), 3, folder)
    assert task.problem("train", 0).answer == "1"
    assert task.digest() == task_of(folder).digest()


def test_the_digest_follows_the_code(tmp_path: Path) -> None:
    def digest(code: str) -> str:
        folder = tmp_path / str(len(code))
        folder.mkdir()
        (folder / "mine.py").write_text(code)
        return task_of(str(folder)).digest()

    assert digest(CODE) != digest(CODE + "\n")


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("Missing", {}, r"mine\.py has no 'Missing'; it has Adds, make, "),
        ("number", {}, r"expected a class or a function, found int"),
        ("Adds", {"raises": "__init__"}, r"raised KeyError: 'no such table' \(mine\.py:10\)"),
        ("make", {"big": 1}, r".* as in make\(big=\.\.\., seed=\.\.\.\): got an unexpected keyword argument 'big'"),
        ("Bare", {}, r"Bare has no method size; derive it from rlsys\.tasks\.base\.BaseTask"),
        ("Narrow", {}, r"verify gets 3 arguments, as in rlsys\.tasks\.base\.BaseTask: too many positional"),
    ],
)
def test_a_task_that_cannot_be_made(folder: str, name: str, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=rf"^task\.fn 'mine\.py:{name}': {message}"):
        task_of(folder, name, **arguments)


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("Adds", {"raises": "problem"}, r"problem\('train', 0\) raised KeyError: 'missing' \(mine\.py:17\)"),
        ("Adds", {"problem": None}, r"problem\('train', 0\): expected a Problem \(rlsys\.types\), found NoneType"),
        ("Adds", {"values": {"answer": 3}}, r"problem\('train', 0\): expected text as answer, found 3"),
        ("numbers", {}, r"problem\('train', 0\): expected a text or a tuple of Message as question, found 3"),
        ("sets", {}, r".*expected JSON values in metadata, .*found Object of type set is not JSON serializable"),
        ("Adds", {"random": True}, r"problem\('train', 0\): expected a function of seed, split and index"),
        ("Adds", {"size": 0}, r"size\('held_out'\): expected None or a number of problems, found 0"),
        ("Adds", {"size": 1.5}, r"size\('train'\): expected None or a number of problems, found 1\.5"),
    ],
)
def test_problems_that_cannot_be_used(folder: str, name: str, arguments: dict[str, Any], message: str) -> None:
    task = task_of(folder, name, **arguments)
    with pytest.raises(ConfigError, match=rf"^task\.fn 'mine\.py:{name}': {message}"):
        task.notes()


def test_training_questions_that_are_held_out_are_counted(folder: str) -> None:
    [note] = task_of(folder, "repeated").notes()
    assert "200 of the first 200 training questions are also held out" in note
    [note] = task_of(folder, shift=0, size=1).notes() or [""]
    assert note == ""


def test_a_conversation_is_a_question(folder: str) -> None:
    task = task_of(folder)
    question = (Message(role="user", content="hi"),)
    task._task.problem = lambda split, index: Problem(problem_id="0", question=question, answer="")
    assert task.problem("train", 0).question == question
