"""The stage online keeps some rollouts of its steps, exactly those of an uninterrupted run."""

from __future__ import annotations

from pathlib import Path

import pytest
from fake_runs import Run, config

from rlsys.errors import InterruptedRunError, NonFiniteLossError
from rlsys.run.rollout_files import read_rollouts, rollout_files


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for _, path in rollout_files(folder / "rollouts")}


def test_rollouts_of_every_online_step_are_kept(tmp_path: Path) -> None:
    Run(tmp_path, config())()
    kept = read_rollouts(tmp_path, 0)
    assert list(kept) == [3, 4, 5], "the two steps of the warm start have none"
    assert [rows[0]["step"] for rows in kept.values()] == [1, 2, 3]
    assert all(len({row["prompt_id"] for row in rows}) == 2 for rows in kept.values())
    for version, rows in kept.items():  # as the fake learner answers for the version that it has made
        values = {(value, gap) for row in rows for value, gap in zip(row["advantages"], row["gaps"], strict=True)}
        assert values == {(float(version), version / 100)}
        assert {len(row["gaps"]) == len(row["token_ids"]) for row in rows} == {True}


def test_zero_keeps_none(tmp_path: Path) -> None:
    run = Run(tmp_path, config(run={"kept_prompts": 0}))()
    assert files(tmp_path) == {} and all(batch.kept == () for _, batch in run.learner.batches)


def test_an_interrupted_run_continues_with_the_same_bytes(tmp_path: Path) -> None:
    Run(tmp_path / "whole", config())()
    run = Run(tmp_path / "resumed", config())
    run.interrupt_at(4)
    with pytest.raises(InterruptedRunError):
        run()
    assert list(read_rollouts(tmp_path / "resumed", 0)) == [3, 4]
    Run(tmp_path / "resumed", config())()
    assert files(tmp_path / "resumed") == files(tmp_path / "whole") != {}


def skipping(folder: Path, interrupted: int = 0) -> Run:
    """Return a run that skips its first step towards version 4, and is interrupted in a call of the learner."""
    run, calls = Run(folder, config()), []

    def on_train(version: int) -> None:
        calls.append(version)
        if len(calls) == interrupted:
            run.controller.interrupt("SIGTERM")
        if version == 4 and calls.count(4) == 1:
            raise NonFiniteLossError("joint loss is nan")

    run.learner.on_train = on_train
    return run


def test_the_rollouts_of_a_skipped_step_say_so(tmp_path: Path) -> None:
    skipping(tmp_path)()
    skipped, made = [], []
    for row in read_rollouts(tmp_path, 0)[4]:
        (skipped if row["untrained"] else made).append(row)
    assert {row["untrained"] for row in skipped} == {
        "not trained: the step was skipped, because a loss or gradient was not finite"
    }
    assert {row["advantages"] is None for row in skipped} == {True} and {row["step"] for row in skipped} == {2}
    prompts, others = ({row["prompt_id"] for row in rows} for rows in (skipped, made))
    assert len(prompts) == len(others) == 2 and not prompts & others


@pytest.mark.parametrize("call", [3, 4, 5])
def test_a_run_that_skips_a_step_continues_with_the_same_bytes(call: int, tmp_path: Path) -> None:
    """Interrupted before the skipped step, in it, and in the next one."""
    skipping(tmp_path / "whole")()
    with pytest.raises(InterruptedRunError):
        skipping(tmp_path / "resumed", interrupted=call)()
    resumed = Run(tmp_path / "resumed", config()) if call == 5 else skipping(tmp_path / "resumed")
    resumed()
    assert files(tmp_path / "resumed") == files(tmp_path / "whole")
