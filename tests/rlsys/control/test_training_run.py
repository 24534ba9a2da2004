"""Training steps that are left out because they are not finite."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from fake_runs import Run, config

from rlsys.errors import NonFiniteLossError, NonFiniteStepsError
from rlsys.run.ledger import read_ledger
from rlsys.run.metrics import read_rows


def spoilt(run: Run, calls: set[int]) -> Callable[[int], None]:
    """Return a hook that fails the calls of `train` with these numbers, from 1."""

    def fail(_version: int) -> None:
        if len(run.only("train")) in calls:
            raise NonFiniteLossError("joint loss is nan")

    return fail


def test_online_the_groups_of_a_skipped_step_are_replaced_and_nothing_is_published(tmp_path: Path) -> None:
    run = Run(tmp_path, config(stages=["online"], checkpoint={"interval": 1}))
    run.learner.on_train = spoilt(run, {2})
    run()
    # Groups of two prompts: the second pair is dropped, and version 2 is made of the third.
    assert run.only("train", "save") == [
        *(("train", 1), ("save", 1), ("train", 2), ("train", 2)),
        *(("save", 2), ("train", 3), ("save", 3)),
    ]
    assert [call[1] for call in run.only("send")] == [0, 1, 2, 3]
    assert [line["trained"] for line in read_ledger(tmp_path / "ledger.jsonl")] == [[0, 1], [4, 5], [6, 7]]
    assert [line["skipped"] for line in read_ledger(tmp_path / "ledger.jsonl")] == [[], [2, 3], []]
    assert [row["learner/skipped_steps"] for row in rows(run)] == [0, 1, 1]
    tokens = [row["rollout/generated_tokens"] for row in rows(run)]
    assert tokens[1] == 2 * tokens[0], "the next row contains the tokens of the skipped step"


def test_offline_a_skipped_step_counts_and_its_rows_do_not_come_again(tmp_path: Path) -> None:
    run = Run(tmp_path, config(stages=["warm_start"], warm_start={"max_steps": 3, "rows_per_step": 2}))
    run.learner.on_train = spoilt(run, {2})
    run()
    assert run.only("train") == [("train", 1), ("train", 2), ("train", 3)]
    assert [step for step, _ in run.learner.batches] == [0, 1, 2]
    assert [row["learner/skipped_steps"] for row in rows(run)] == [0, 1, 1]
    assert run.saved()["step_000003"].counters == {"skipped_steps": 1.0}


def test_a_resumed_run_goes_on_counting(tmp_path: Path) -> None:
    settings = config(stages=["online"], checkpoint={"interval": 1})
    run = Run(tmp_path, settings)
    run.learner.on_train = spoilt(run, {2})
    original = run.learner.on_train

    def stop(version: int) -> None:
        original(version)
        if version == 2:
            run.controller.interrupt("SIGTERM")

    run.learner.on_train = stop
    with pytest.raises(Exception, match="SIGTERM"):
        run()
    again = Run(tmp_path, settings)()
    assert again.only("train") == [("train", 3)]
    assert [row["learner/skipped_steps"] for row in rows(again)] == [0, 1, 1]
    assert [line["trained"] for line in read_ledger(tmp_path / "ledger.jsonl")] == [[0, 1], [4, 5], [6, 7]]


@pytest.mark.parametrize("stage", ["online", "warm_start"])
def test_too_many_skipped_steps_in_a_row_end_the_attempt(stage: str, tmp_path: Path) -> None:
    steps = {"warm_start": {"max_steps": 9, "rows_per_step": 2}} if stage == "warm_start" else {}
    run = Run(tmp_path, config(stages=[stage], checkpoint={"interval": 1}, learner={"max_skipped_steps": 2}, **steps))
    run.learner.on_train = spoilt(run, {2, 3, 4})
    with pytest.raises(NonFiniteStepsError, match=r"3 .*learner.max_skipped_steps = 2; the first: joint loss is nan"):
        run()
    assert run.rows()[-1] == ((stage, 1) if stage == "online" else (stage, 3))
    assert run.only("save") == [("save", 1)], "a return to a skipped step would count as progress"
    assert not (tmp_path / "stages").exists()


def test_a_good_step_between_bad_ones_begins_the_count_again(tmp_path: Path) -> None:
    run = Run(tmp_path, config(stages=["online"], learner={"max_skipped_steps": 1}))
    run.learner.on_train = spoilt(run, {1, 3, 5})
    run()
    assert run.only("train") == [("train", 1), ("train", 1), ("train", 2), ("train", 2), ("train", 3), ("train", 3)]


def test_a_save_that_is_due_at_a_skipped_step_comes_after_the_next_good_one(tmp_path: Path) -> None:
    settings = config(
        stages=["warm_start"], warm_start={"max_steps": 9, "rows_per_step": 2}, checkpoint={"interval": 3}
    )
    run = Run(tmp_path, settings)
    run.learner.on_train = spoilt(run, {2, 3})
    run()
    assert run.only("save") == [("save", 4), ("save", 6), ("save", 9)]


def rows(run: Run) -> list[dict[str, float]]:
    return [row for row in read_rows(run.run_dir / "metrics.jsonl") if row["step"] > 0]
