"""The adaptive share of a teacher over the steps of a stage: what the learner gets, and a resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from fake_runs import Run, config

from rlsys.errors import InterruptedRunError, NonFiniteLossError
from rlsys.interpolation import TeacherShare
from rlsys.types import TrainingBatch

DISTILL = {"weight": 1.0, "divergence": "top_k", "interpolation": 0.4, "final_interpolation": 0.9}
STEPS = 6


def settings(**distill: Any) -> Any:
    return config(
        stages=["online"],
        train={"max_steps": STEPS},
        checkpoint={"interval": 1},
        objective={"distill": {**DISTILL, **distill}},
        teacher={"model": {"path": "unused"}},
    )


def taught(run: Run) -> Run:
    """Let the learner report the losses 1, 1/2, 1/3, ... of the versions."""
    train = run.learner.train

    async def with_loss(batch: TrainingBatch, step: int, version: int) -> dict[str, float]:
        return {**await train(batch, step, version), "objective/distill_loss": 1 / version}

    run.learner.train = with_loss
    return run


def shares(*runs: Run) -> list[float | None]:
    return [batch.interpolation for run in runs for _, batch in run.learner.batches]


def test_the_learner_gets_the_share_that_follows_from_its_losses(tmp_path: Path) -> None:
    run = taught(Run(tmp_path, settings(interpolation_rate=0.5)))()
    share, expected = TeacherShare(share=0.4), []
    for step in range(STEPS):
        expected.append(share.share)
        share = share.after(1 / (step + 1), linear=0.4 + 0.5 * (step + 1) / (STEPS - 1), last=0.9, rate=0.5)
    assert shares(run) == pytest.approx(expected)
    assert expected[2] > 0.4 + 0.5 * 2 / (STEPS - 1), "the losses fall, so the share is ahead of the line"
    assert shares(taught(Run(tmp_path / "linear", settings()))()) == [None] * STEPS


@pytest.mark.parametrize("last", [1, 3])
def test_an_interruption_changes_no_bit_of_the_share(last: int, tmp_path: Path) -> None:
    adaptive = settings(interpolation_rate=0.5)
    undisturbed = taught(Run(tmp_path / "a", adaptive))()
    first = taught(Run(tmp_path / "b", adaptive))
    first.interrupt_at(last)
    with pytest.raises(InterruptedRunError):
        first()
    second = taught(Run(tmp_path / "b", adaptive))()
    assert shares(first, second) == shares(undisturbed)
    assert second.saved()["step_000006"].counters == undisturbed.saved()["step_000006"].counters


def test_a_skipped_step_does_not_move_the_share(tmp_path: Path) -> None:
    run = taught(Run(tmp_path, settings(interpolation_rate=0.5)))

    def fail(_version: int) -> None:
        if len(run.only("train")) == 2:
            raise NonFiniteLossError("joint loss is nan")

    run.learner.on_train = fail
    run()
    assert shares(run)[1] == shares(run)[2] < shares(run)[3]
