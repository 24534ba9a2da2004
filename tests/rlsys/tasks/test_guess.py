"""The guessing game: problems, hints, rewards and demonstrated games."""

from __future__ import annotations

import random

import pytest
from problems import problem_of

from rlsys.config.tasks import GuessConfig, GuessSizes
from rlsys.errors import ConfigError
from rlsys.interfaces import Reply
from rlsys.tasks import build_task
from rlsys.tasks.guess import reply
from rlsys.types import Split


def bounds(question: object) -> tuple[int, int]:
    word, low, to, high = str(question).split()
    assert (word, to) == ("guess", "to")
    return int(low), int(high)


@pytest.mark.parametrize("digits", [1, 2, 3])
def test_the_number_is_in_its_range(digits: int) -> None:
    task = build_task(GuessConfig(digits=digits, min_width=4, max_width=9), 0)
    for index in range(300):
        problem = task.problem("train", index)
        low, high = bounds(problem.question)
        assert low <= int(problem.answer) <= high and 4 <= high - low + 1 <= 9
        assert {len(str(number)) for number in (low, high)} == {digits}


def test_no_range_is_in_both_splits() -> None:
    task = build_task(GuessConfig(), 3)
    splits: tuple[Split, Split] = ("train", "held_out")
    train, held_out = ({task.problem(split, n).question for n in range(500)} for split in splits)
    assert not train & held_out and len(held_out) > 40
    assert task.problem("train", 7) == build_task(GuessConfig(), 3).problem("train", 7)


def test_too_few_ranges_are_an_error() -> None:
    with pytest.raises(ConfigError, match="no held_out range .* raise task.max_width or task.digits"):
        build_task(GuessConfig(digits=1, min_width=10, max_width=10), 0).problem("held_out", 0)


@pytest.mark.parametrize(
    ("turn", "expected"),
    [
        ("<guess>30</guess>", Reply(text="<hint>higher</hint>")),
        ("<guess>50</guess>", Reply(text="<hint>lower</hint>")),
        ("<guess>40</guess>", Reply(text="<hint>right</hint>", done=True)),
        ("<guess>1</guess><guess>50</guess>", Reply(text="<hint>lower</hint>")),
        ("I give up", Reply(text="<hint>no guess</hint>", done=True, detail="a turn without a guess")),
    ],
)
def test_hints(turn: str, expected: Reply) -> None:
    assert reply(problem_of("40"), ["<guess>35</guess>", turn]) == expected
    assert reply(problem_of("40"), []) == Reply()


@pytest.mark.parametrize(
    ("completion", "outcome", "reward", "answered"),
    [
        ("<guess>40</guess>", "ok", 1.0, True),
        ("<guess>30</guess><guess>50</guess><guess>40</guess>", "ok", 0.5, True),
        ("<guess>30</guess>" * 4 + "<guess>40</guess>", "wrong", 0.0, True),  # later than max_guesses
        ("<guess>40</guess><guess>41</guess>", "wrong", 0.0, True),
        ("<guess>4 0</guess>", "wrong", 0.0, False),
    ],
)
def test_fewer_guesses_have_higher_rewards(completion: str, outcome: str, reward: float, answered: bool) -> None:
    verdict = build_task(GuessConfig(max_guesses=4), 0).verify(problem_of("40"), completion, False)
    assert (verdict.outcome, verdict.reward, verdict.answered) == (outcome, reward, answered)


def test_demonstrations_are_games_with_the_hints_of_the_environment() -> None:
    task = build_task(GuessConfig(error_rate=0.3, max_guesses=6), 0)
    lengths = set()
    for index in range(200):
        problem, chain = task.demonstration(index, random.Random(index)) or (None, "")
        assert problem == task.problem("train", index) and isinstance(chain, tuple)
        turns, hints = chain[::2], chain[1::2]
        assert [reply(problem, turns[: n + 1]).text for n in range(len(turns))] == list(hints)
        solved = hints[-1] == "<hint>right</hint>"
        assert solved == task.verify(problem, "".join(turns)).correct
        assert solved or len(turns) == 6
        lengths.add(len(turns))
    assert lengths == set(range(1, 7))


def test_without_errors_a_guess_follows_all_hints_and_sizes_may_be_smaller() -> None:
    config = GuessConfig(error_rate=0, max_guesses=60, demonstrations=GuessSizes(max_width=25))
    task = build_task(config, 0)
    for index in range(100):
        problem, chain = task.demonstration(index, random.Random(index)) or (None, "")
        assert problem is not None
        low, high = bounds(problem.question)
        assert high - low < 25
        for guess, hint in zip(chain[::2], chain[1::2], strict=True):
            number = int(guess.removeprefix("<guess>").removesuffix("</guess>"))
            assert low <= number <= high
            low, high = (number + 1, high) if "higher" in hint else (low, number - 1)
