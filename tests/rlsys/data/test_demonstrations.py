"""Demonstrations by step: they depend on the step alone."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from fakes import NumberTask

from rlsys.data.demonstrations import DemonstrationStream
from rlsys.data.prompts import GENERATED_CHECKED
from rlsys.errors import ConfigError, DataError
from rlsys.types import Demonstration, Problem


class Recording(NumberTask):
    """Task that records the indices of the demonstrations it was asked for."""

    def __init__(self, train: int | None) -> None:
        super().__init__(train)
        self.indices: list[int] = []

    def demonstration(self, index: int, rng: random.Random) -> tuple[Problem, str] | None:
        self.indices.append(index)
        return super().demonstration(index, rng)


def encode(question: str, chain: str) -> tuple[list[int], list[bool]]:
    return [ord(letter) for letter in question + chain], [False] * len(question) + [True] * len(chain)


def stream(task: NumberTask, seed: int = 0, max_tokens: int = 64) -> DemonstrationStream:
    return DemonstrationStream(task, encode, seed=seed, rows_per_step=4, max_tokens=max_tokens)


def texts(rows: list[Demonstration]) -> list[str]:
    return ["".join(map(chr, row.token_ids)) for row in rows]


@pytest.mark.parametrize("size", [None, 5])
def test_a_step_gets_the_same_rows_in_any_order_of_calls(size: int | None) -> None:
    in_order = [texts(stream(NumberTask(size)).rows(step)) for step in range(6)]
    one_stream = stream(NumberTask(size))
    assert [texts(one_stream.rows(step)) for step in (5, 0, 3)] == [in_order[5], in_order[0], in_order[3]]
    assert len({text for step in in_order for text in step}) == 24  # every row has its own random numbers
    assert texts(stream(NumberTask(size), seed=1).rows(0)) != in_order[0]


def test_a_finite_task_is_shuffled_epoch_by_epoch() -> None:
    task = Recording(6)
    source = stream(task)
    for step in range(6):  # 24 rows: 4 epochs of 6
        source.rows(step)
    epochs = [task.indices[start : start + 6] for start in range(0, 24, 6)]
    assert all(sorted(epoch) == list(range(6)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1
    assert set(Counter(task.indices).values()) == {4}


def test_a_generator_is_read_in_order() -> None:
    task = Recording(None)
    stream(task).rows(2)
    assert task.indices == [8, 9, 10, 11]


def test_only_the_completion_is_trained() -> None:
    for row in stream(NumberTask(None)).rows(0):  # a question of 3 letters, a chain of 8
        assert row.loss_mask.tolist() == [False] * 3 + [True] * 8
        assert row.token_ids.shape == (11,)


def test_the_longest_demonstration_just_fits() -> None:
    stream(NumberTask(None), max_tokens=11).rows(0)
    message = r"demonstration of train-0 has 11 tokens, actors\.max_model_len is 10"
    with pytest.raises(ConfigError, match=message):
        stream(NumberTask(None), max_tokens=10).rows(0)


@pytest.mark.parametrize(("size", "checked"), [(37, 37), (None, GENERATED_CHECKED)])
def test_check_builds_all_demonstrations_or_the_first_of_a_generator(size: int | None, checked: int) -> None:
    class OneTooLong(NumberTask):
        def demonstration(self, index: int, rng: random.Random) -> tuple[Problem, str] | None:
            indices.append(index)
            return self.problem("train", index), "12345678" + "x" * (index == checked - 1)

    indices: list[int] = []
    stream(OneTooLong(size), max_tokens=12).check()
    assert sorted(indices) == list(range(checked))
    with pytest.raises(ConfigError, match=rf"demonstration of train-{checked - 1} has 12 tokens"):
        stream(OneTooLong(size), max_tokens=11).check()


def test_a_task_without_demonstrations() -> None:
    class Silent(NumberTask):
        def demonstration(self, index: int, rng: random.Random) -> None:
            return None

    with pytest.raises(DataError, match=r"task\.demonstration_column"):
        stream(Silent(3)).rows(0)


class Growing(NumberTask):
    """Task whose demonstration i has 3 + i tokens."""

    def demonstration(self, index: int, rng: random.Random) -> tuple[Problem, str] | None:
        return self.problem("train", index), "x" * index


def test_demonstrations_that_are_too_long_are_left_out_up_to_a_share() -> None:
    def tolerant(share: float) -> DemonstrationStream:
        options = {"seed": 0, "rows_per_step": 4, "max_tokens": 6}
        return DemonstrationStream(Growing(8), encode, max_bad_rows=share, **options)

    first, second = tolerant(0.5), tolerant(0.5)
    first.check()
    assert first.notes == (
        "task: 4 of 8 demonstrations left out, the first: the demonstration of train-4 has 7 tokens, "
        "actors.max_model_len is 6",
    )
    lengths = sorted(len(row.token_ids) for row in first.rows(0))
    assert lengths == [3, 4, 5, 6]
    second.leave_out_as(first)
    assert texts(second.rows(3)) == texts(first.rows(3))
    assert first.digest("x") == second.digest("x") != "x"
    with pytest.raises(DataError, match=r"4 of 8 demonstrations are unusable, more than task\.max_bad_rows 0\.4"):
        tolerant(0.4).check()
