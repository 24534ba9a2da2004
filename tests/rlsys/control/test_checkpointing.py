"""Saves that fail, and scores of checkpoints."""

from __future__ import annotations

import asyncio
import errno
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from fake_runs import Run, config

from rlsys.control.checkpointing import check_best_metric
from rlsys.errors import CheckpointError, ConfigError
from rlsys.run.manifest import verify_checkpoint
from rlsys.run.metrics import read_rows
from rlsys.types import Prompt, RolloutFailure, SamplingSettings

ONLINE: dict[str, Any] = {"stages": ["online"], "checkpoint": {"interval": 1, "keep_last": 9}}


def failing(run: Run, versions: set[int]) -> None:
    """Make the learner fail to write these versions, after it has written a part."""
    save = run.learner.save

    async def fail(folder: Path) -> None:
        await save(folder)
        if run.learner.version in versions:
            raise CheckpointError("learner rank 0: no space left on device")

    run.learner.save = fail


def steps(count: int, **checkpoint: Any) -> Any:
    train = {"max_steps": count}
    return config(**{**ONLINE, "train": train, "checkpoint": {**ONLINE["checkpoint"], **checkpoint}})


def test_training_goes_on_after_a_failed_save_and_the_last_good_one_stays(tmp_path: Path) -> None:
    run = Run(tmp_path, steps(5))
    before: list[list[str]] = []
    failing(run, {2, 3})
    run.learner.on_train = lambda version: before.append(names(run)) if version == 4 else None
    run()
    assert before == [["step_000001"]], "no part of a failed save is left, not even for a moment"
    assert names(run) == ["step_000001", "step_000004", "step_000005"]
    rows = read_rows(tmp_path / "metrics.jsonl")
    assert [row["process/failed_saves"] for row in rows if row["step"]] == [0, 0, 1, 2, 2]


@pytest.mark.parametrize("max_staleness", [0, 1])
def test_actors_go_on_sampling_while_a_checkpoint_is_written(max_staleness: int, tmp_path: Path) -> None:
    """The save waits for a call of an actor that begins and ends during the save."""
    train = {"max_steps": 2, "max_staleness": max_staleness, "max_failed_rollouts": 0.9}
    run = Run(tmp_path, config(stages=["online"], train=train, checkpoint={"interval": 1}))
    generate, save = run.pool.generate, run.learner.save
    writing, sampled = asyncio.Event(), asyncio.Event()

    async def noted(actor: int, prompts: Sequence[Prompt], settings: SamplingSettings) -> Sequence[Any]:
        within = writing.is_set()
        if run.learner.version == 1 and not within:  # what the step has made room for
            await writing.wait()
            return [RolloutFailure(prompt=prompt, reason="asked once more") for prompt in prompts]
        groups = await generate(actor, prompts, settings)
        if within:
            sampled.set()
        return groups

    async def slow(folder: Path) -> None:
        writing.set()
        await asyncio.wait_for(sampled.wait(), 10)
        await save(folder)

    run.pool.generate, run.learner.save = noted, slow
    run()
    assert names(run) == ["step_000001", "step_000002"]


def test_too_many_failed_saves_in_a_row_end_the_run(tmp_path: Path) -> None:
    run = Run(tmp_path, steps(9, max_failed_saves=1))
    failing(run, {2, 4, 5, 6})
    with pytest.raises(CheckpointError, match=r"2 saves in a row .*max_failed_saves = 1; the first: .*no space left"):
        run()
    assert run.only("train")[-1] == ("train", 5)
    assert names(run) == ["step_000001", "step_000003"]


def test_the_save_at_the_end_of_a_stage_and_of_an_interrupted_run_must_succeed(tmp_path: Path) -> None:
    ended = Run(tmp_path / "ended", steps(3))
    failing(ended, {3})
    with pytest.raises(CheckpointError, match="no space left"):
        ended()
    assert not (tmp_path / "ended" / "stages").exists()
    interrupted = Run(tmp_path / "interrupted", steps(3, interval=9))
    failing(interrupted, {2})
    interrupted.interrupt_at(2)
    with pytest.raises(CheckpointError, match="no space left"):
        interrupted()


def test_a_failed_export_ends_the_run_and_the_same_command_continues(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copyfile = shutil.copyfile

    def full(source: Path, target: Path) -> None:
        if target.parent.name == ".online":
            raise OSError(errno.ENOSPC, "No space left on device")
        copyfile(source, target)

    monkeypatch.setattr(Path, "hardlink_to", lambda target, source: full(source, target))
    monkeypatch.setattr(shutil, "copyfile", full)
    run = Run(tmp_path, steps(2))
    with pytest.raises(CheckpointError, match=r"stages/online could not be written: .*No space.*step_000002 is saved"):
        run()
    monkeypatch.undo()
    assert Run(tmp_path, steps(2))().only("train") == []
    assert [path.name for path in (tmp_path / "stages").iterdir()] == ["online"]


def test_a_checkpoint_has_the_score_of_its_own_step(tmp_path: Path) -> None:
    settings = config(
        **{
            **ONLINE,
            "train": {"max_steps": 4},
            "checkpoint": {"interval": 1, "best_metric": "held_out/greedy_accuracy"},
            "evaluation": {"interval": 2},
        }
    )
    run = Run(tmp_path, settings)()
    scores = {name: verify_checkpoint(tmp_path / "checkpoints" / name).get("score") for name in names(run)}
    assert [name for name, score in scores.items() if score] == ["step_000002", "step_000004"]
    assert scores["step_000004"]["metric"] == "held_out/greedy_accuracy"


def test_an_unknown_metric_is_refused_with_the_nearest_name() -> None:
    check_best_metric(config())
    check_best_metric(config(checkpoint={"best_metric": None}))
    with pytest.raises(ConfigError, match=r"checkpoint.best_metric: .*'held_out/acc.*did you mean held_out/"):
        check_best_metric(config(checkpoint={"best_metric": "held_out/accuracy"}))


def names(run: Run) -> list[str]:
    return sorted(path.name for path in (run.run_dir / "checkpoints").iterdir())
