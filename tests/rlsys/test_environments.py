"""Environments of the user: functions, games that are replayed, and what cannot be one."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from problems import problem_of

from rlsys.config.environment import EnvironmentConfig, active_environment
from rlsys.config.tasks import GuessConfig, LetterCountConfig, SumsConfig, TaskConfig
from rlsys.environments import BUILT_IN, build_environment
from rlsys.errors import ConfigError
from rlsys.interfaces import Reply

CODE = """
from rlsys.environments import Game, Reply

calls = []

def echo(problem, turns, prefix=""):
    return Reply(text=prefix + "".join(turns))

class Tower(Game):
    def __init__(self, problem, height=3):
        super().__init__(problem)
        calls.append(problem.answer)
        self.floor, self.height = 0, height

    def start(self):
        return Reply(text="floor 0")

    def step(self, turn):
        self.floor += 1 if turn == "up" else -1
        return Reply(text=f"floor {self.floor}", done=self.floor == self.height)

class Plain:
    pass

number = 4

def lonely(problem):
    return Reply()
"""


@pytest.fixture
def folder(tmp_path: Path) -> str:
    (tmp_path / "mine.py").write_text(CODE)
    return str(tmp_path)


def built(folder: str, name: str, **arguments: Any) -> Any:
    return build_environment(EnvironmentConfig(fn=f"mine.py:{name}", arguments=arguments), folder)


def test_a_function_gets_problem_turns_and_arguments(folder: str) -> None:
    assert built(folder, "echo", prefix="> ")(problem_of("3"), ("a", "b")) == Reply(text="> ab")


def test_a_game_is_played_again_for_every_reply(folder: str) -> None:
    tower = built(folder, "Tower", height=2)
    assert tower(problem_of("3"), ()) == Reply(text="floor 0")
    assert tower(problem_of("3"), ("up",)) == Reply(text="floor 1")
    assert tower(problem_of("3"), ("up", "up")) == Reply(text="floor 2", done=True)
    assert tower(problem_of("4"), ("down",)) == Reply(text="floor -1"), "nothing is left of other episodes"


def test_the_examples_of_the_page_work(tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "environments.md").read_text()
    function, game = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    (tmp_path / "mine.py").write_text(function)
    convert = built(str(tmp_path), "convert")
    assert convert(problem_of("?"), ("<unit>3 mile</unit>",)) == Reply(text="<metres>4828.03</metres>")
    assert convert(problem_of("?"), ()) == convert(problem_of("?"), ("no unit",)) == Reply()
    (tmp_path / "stairs.py").write_text(game)
    stairs = build_environment(EnvironmentConfig(fn="stairs.py:Stairs", arguments={"height": 2}), str(tmp_path))
    assert stairs(problem_of("?"), ()) == Reply(text="<floor>0</floor>")
    assert stairs(problem_of("?"), ("up", "down", "up", "up")) == Reply(
        text="<floor>2</floor>", done=True, solved=True, reward=1.0
    )


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("Plain", {}, "found the class Plain"),
        ("number", {}, "found int"),
        ("echo", {"suffix": 1}, "unexpected keyword argument 'suffix'"),
        ("Tower", {"width": 1}, "unexpected keyword argument 'width'"),
        ("lonely", {}, "it is called as lonely(problem, turns): too many positional arguments"),
        ("echo", {"suffix": 1}, "it is called as echo(problem, turns, suffix=1): got an unexpected"),
        ("nothing", {}, "mine.py has no 'nothing'"),
    ],
)
def test_what_is_no_environment_is_refused(folder: str, name: str, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        built(folder, name, **arguments)
    assert message in caught.value.message and "environment.fn" in caught.value.message


@pytest.mark.parametrize(
    ("task", "section", "fn", "stop"),
    [
        (LetterCountConfig(), {}, None, ()),
        (SumsConfig(), {}, None, ()),
        (SumsConfig(tool_share=0.1), {}, "calculator", ("</tool>",)),
        (GuessConfig(), {}, "guess", ("</guess>",)),
        (GuessConfig(), {"fn": "mine.py:echo", "stop": [";"]}, "mine.py:echo", (";",)),
        (LetterCountConfig(), {"fn": "calculator", "stop": [";"]}, "calculator", (";",)),
        (LetterCountConfig(), {"fn": "calculator", "role": "tool"}, "calculator", ()),
    ],
)
def test_the_environment_in_use(task: TaskConfig, section: dict[str, Any], fn: str | None, stop: Any) -> None:
    active = active_environment(EnvironmentConfig.model_validate(section), task)
    assert (active and (active.fn, active.stop)) == (fn and (fn, stop))


@pytest.mark.parametrize("name", BUILT_IN)
def test_a_verifier_process_can_read_the_section_of_every_environment_that_ships(name: str) -> None:
    section = EnvironmentConfig(stop=("</x>",)).model_copy(update={"fn": name})
    assert EnvironmentConfig.model_validate(section.model_dump(mode="json")) == section
