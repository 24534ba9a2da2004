"""The prompt stream: it continues after a seek without a difference, and every epoch has its own order."""

from __future__ import annotations

from dataclasses import replace

import pytest
from fakes import NumberTask
from hypothesis import given, settings
from hypothesis import strategies as st

from rlsys.data import prompts
from rlsys.data.prompts import GENERATED_CHECKED, PromptBuilder, PromptStream
from rlsys.errors import ConfigError, DataError
from rlsys.types import Problem, Split


def encode(text: str) -> list[int]:
    return [ord(letter) for letter in text]


def stream(size: int | None, seed: int = 0) -> PromptStream:
    builder = PromptBuilder(NumberTask(size), encode, max_model_len=8, max_tokens=4)
    return PromptStream(builder, seed)


def take(source: PromptStream, count: int) -> list[tuple[int, str]]:
    return [(index, prompt.prompt_id) for index, prompt in (source.take() for _ in range(count))]


def problems(taken: list[tuple[int, str]]) -> list[str]:
    return [prompt_id.split("@")[0] for _, prompt_id in taken]


@settings(deadline=None, max_examples=60)
@given(data=st.data(), size=st.one_of(st.none(), st.integers(1, 7)))
def test_a_seek_issues_what_was_in_flight_and_then_continues(data: st.DataObject, size: int | None) -> None:
    undisturbed = take(stream(size), 30)
    before = stream(size)
    done = data.draw(st.integers(0, 20))
    taken = take(before, done)
    in_flight = [taken[i][0] for i in sorted(data.draw(st.sets(st.integers(0, done - 1))))] if done else []

    after = stream(size)
    after.seek(before.cursor, in_flight)
    assert after.waiting() == tuple(in_flight)
    expected = [undisturbed[index] for index in in_flight] + undisturbed[done:]
    count = data.draw(st.integers(0, len(in_flight)))  # a second interruption, before all are issued
    first = take(after, count)
    final = stream(size)
    final.seek(after.cursor, after.waiting())
    assert first + take(final, len(expected) - count) == expected


def test_every_epoch_is_a_permutation_and_they_differ() -> None:
    size = 20
    taken = problems(take(stream(size), 3 * size))
    epochs = [taken[start : start + size] for start in range(0, 3 * size, size)]
    assert all(sorted(epoch) == sorted(f"train-{i}" for i in range(size)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3


def test_the_seed_decides_the_order() -> None:
    assert take(stream(20, seed=1), 20) == take(stream(20, seed=1), 20)
    assert take(stream(20, seed=1), 20) != take(stream(20, seed=2), 20)


def test_a_prompt_has_another_id_in_every_epoch() -> None:
    # The seed of a completion is a hash of the id. The same id would give the same completions.
    ids = [prompt_id for _, prompt_id in take(stream(5), 25)]
    assert len(set(ids)) == 25


def test_a_generator_is_read_in_order() -> None:
    assert take(stream(None), 3) == [(0, "train-0"), (1, "train-1"), (2, "train-2")]


def test_the_longest_prompt_just_fits() -> None:
    # Problem i of this task has i + 1 tokens; 10 - 6 leaves 4, so problem 3 fits and problem 4 does not.
    builder = PromptBuilder(NumberTask(9, 9, same_length=False), encode, max_model_len=10, max_tokens=6)
    assert len(builder.build("train", 3).token_ids) == 4
    message = r"prompt train-4 has 5 tokens; actors\.max_model_len minus sampling\.max_tokens leaves 4"
    with pytest.raises(ConfigError, match=message):
        builder.build("train", 4)
    with pytest.raises(ConfigError, match="train-4"):
        builder.check("train")


def test_check_passes_if_all_prompts_fit() -> None:
    short = PromptBuilder(NumberTask(4, same_length=False), encode, max_model_len=10, max_tokens=6)
    short.check("train")


def test_check_builds_the_first_prompts_of_a_generator() -> None:
    # The prompt of index i has i + 1 tokens, so the last one that is built has GENERATED_CHECKED tokens.
    def check(longest: int) -> None:
        task = NumberTask(None, same_length=False)
        PromptBuilder(task, encode, max_model_len=longest + 6, max_tokens=6).check("train")

    check(GENERATED_CHECKED)
    with pytest.raises(ConfigError, match=f"train-{GENERATED_CHECKED - 1} has"):
        check(GENERATED_CHECKED - 1)


def test_a_long_check_is_announced(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr("rlsys.data.prompts.SLOW_TO_CHECK", 3)
    for size in (3, 4):
        PromptBuilder(NumberTask(size), encode, max_model_len=10, max_tokens=6).check("train")
    assert [record.getMessage() for record in caplog.records] == [
        "task: counting the tokens of 4 prompts before the start, about 0 s"
    ]


@pytest.mark.parametrize(("requested", "size", "returned"), [(2, 4, 2), (9, 4, 4), (5, None, 5)])
def test_held_out_prompts_are_the_first_ones(requested: int, size: int | None, returned: int) -> None:
    builder = PromptBuilder(NumberTask(1, size), encode, max_model_len=10, max_tokens=6)
    assert [prompt.prompt_id for prompt in builder.held_out(requested)] == [f"held_out-{i}" for i in range(returned)]


def tolerant(share: float, train: int = 9, held_out: int = 9) -> PromptBuilder:
    """Return a builder whose problem i has i + 1 tokens, of which 4 fit."""
    task = NumberTask(train, held_out, same_length=False)
    return PromptBuilder(task, encode, max_model_len=10, max_tokens=6, max_bad_rows=share)


def test_prompts_that_are_too_long_are_left_out_up_to_a_share() -> None:
    builder = tolerant(0.6)
    builder.check("train")
    assert builder.usable("train") == [0, 1, 2, 3]
    [note] = builder.notes
    assert note == (
        "task: 5 of 9 training prompts left out, the first: prompt train-4 has 5 tokens; actors.max_model_len minus "
        "sampling.max_tokens leaves 4"
    )
    taken = problems(take(PromptStream(builder, 0), 8))
    assert sorted(taken) == sorted([f"train-{index}" for index in range(4)] * 2)
    with pytest.raises(DataError) as caught:
        tolerant(0.5).check("train")
    assert caught.value.message.startswith(
        "task: 5 of 9 training prompts are unusable, more than task.max_bad_rows 0.5; "
    )
    assert all(f"prompt train-{index} has {index + 1} tokens" in caught.value.message for index in (4, 5, 6))
    with pytest.raises(DataError, match="all 9 training prompts are unusable"):
        PromptBuilder(NumberTask(9), encode, max_model_len=8, max_tokens=6, max_bad_rows=1.0).check("train")


def test_the_digest_follows_the_prompts_that_are_left_out() -> None:
    whole, some = tolerant(1.0, train=4), tolerant(1.0)
    for builder in (whole, some):
        builder.check("train")
        builder.held_out(2)
    assert whole.digest("x") == "x" and len(some.digest("x")) == 64
    fewer = tolerant(1.0, train=8)
    fewer.check("train")
    assert fewer.digest("x") != some.digest("x")


def test_held_out_prompts_that_are_too_long_are_skipped() -> None:
    builder = tolerant(0.6)
    assert [prompt.prompt_id for prompt in builder.held_out(3)] == ["held_out-0", "held_out-1", "held_out-2"]
    assert builder.notes == ()  # the others were not looked at
    assert len(builder.held_out(9)) == 4
    assert builder.notes[0].startswith("task: 5 of 9 held-out prompts left out, the first: prompt held_out-4 has")
    with pytest.raises(DataError, match="5 of 9 held-out prompts are unusable"):
        tolerant(0.5).held_out(9)


def test_a_prompt_that_cannot_be_encoded_counts_as_one_that_is_too_long() -> None:
    def refuse(text: object) -> list[int]:
        if text == "xx":
            raise DataError("no template")
        return [1]

    builder = PromptBuilder(NumberTask(4, same_length=False), refuse, max_model_len=9, max_tokens=1, max_bad_rows=0.25)
    builder.check("train")
    assert builder.usable("train") == [0, 2, 3]
    assert builder.notes[0].endswith("the first: prompt train-1: no template")


class AlternatingTask(NumberTask):
    """A generator whose problems with odd indices are too long."""

    def problem(self, split: Split, index: int) -> Problem:
        problem = super().problem(split, index)
        return replace(problem, question="long" * (index % 2 + 1))


def test_a_generator_draws_others_in_place_of_long_prompts() -> None:
    builder = PromptBuilder(AlternatingTask(None), encode, max_model_len=8, max_tokens=4, max_bad_rows=0.6)
    builder.check("train")
    assert "of 2048 training prompts left out" in builder.notes[0]
    assert builder.digest("d") == "d"  # the check stops after some seconds, so it decides nothing
    source = PromptStream(builder, 0)
    with pytest.raises(DataError, match="leaves 4"):  # all places that are tried for an odd index are odd
        take(source, 2)


def test_other_places_are_tried_for_a_long_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompts, "FAR", 999)  # from odd to even
    builder = PromptBuilder(AlternatingTask(None), encode, max_model_len=8, max_tokens=4, max_bad_rows=0.6)
    taken = take(PromptStream(builder, 0), 4)
    assert [index for index, _ in taken] == [0, 1, 2, 3]
    assert problems(taken) == [NumberTask(None).problem("train", index).problem_id for index in (0, 1000, 2, 1002)]
    strict = PromptBuilder(AlternatingTask(None), encode, max_model_len=8, max_tokens=4)
    with pytest.raises(DataError, match="leaves 4"):
        strict.generated(1)


def test_a_task_without_training_problems_can_only_be_evaluated() -> None:
    builder = PromptBuilder(NumberTask(0), encode, max_model_len=8, max_tokens=4)
    with pytest.raises(DataError, match=r"it has no training problems, so it can only be evaluated"):
        builder.check("train")
