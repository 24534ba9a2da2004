"""The controller over fakes: stages in order, checkpoints, resumes and interruptions."""

from __future__ import annotations

import inspect
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fake_runs import KINDS, Run, config

from rlsys.control.controller import Controller
from rlsys.control.stages.offline import OfflineStage
from rlsys.control.stages.online import OnlineStage
from rlsys.control.stages.training import TrainingStage
from rlsys.errors import EngineError, InterruptedRunError
from rlsys.run.metrics import read_rows


def test_a_row_for_every_step_and_one_for_the_start(tmp_path: Path) -> None:
    run = Run(tmp_path, config())()
    steps = [("warm_start", 1), ("warm_start", 2), ("online", 0), ("online", 1), ("online", 2), ("online", 3)]
    assert run.rows() == steps
    rows = read_rows(tmp_path / "metrics.jsonl")
    assert [row["weights/version"] for row in rows] == [1, 2, 2, 3, 4, 5]
    evaluated = [(row["stage"], row["step"]) for row in rows if "held_out/greedy_accuracy" in row]
    assert evaluated == [("online", 0), ("online", 3)]
    assert all(row["rollout/staleness_max"] == 0 for row in rows if "rollout/reward" in row)


def test_the_warm_start_is_published_once_before_the_online_stage(tmp_path: Path) -> None:
    run = Run(tmp_path, config(train={"max_steps": 1}))()
    first = tmp_path / "checkpoints" / "step_000002"
    assert run.only(*KINDS) == [
        ("start_stage", "warm_start", run.model, None, None),
        ("train", 1),
        ("train", 2),
        ("save", 2),
        ("start_stage", "online", first / "policy", None, None),
        ("send", 2),
        ("train", 3),
        ("send", 3),
        ("save", 3),
    ]
    assert {call[2] for call in run.only("update")} == {2, 3}


def test_a_warm_start_alone_is_published_and_evaluated_at_its_end(tmp_path: Path) -> None:
    run = Run(tmp_path, config(stages=["warm_start"]))()
    assert run.only("train", "send") == [("train", 1), ("train", 2), ("send", 2)]
    assert "held_out/greedy_accuracy" in read_rows(tmp_path / "metrics.jsonl")[-1]


def test_a_stage_exports_its_policy_with_tokenizer_as_the_reference_of_the_next(tmp_path: Path) -> None:
    run = Run(tmp_path, config(objective={"kl": {"weight": 0.1}}, train={"max_steps": 1}))()
    exported = tmp_path / "stages" / "warm_start"
    assert (exported / "model.safetensors").read_text() == "2"
    assert (exported / "tokenizer.json").read_text() == "{}"
    assert run.only("start_stage")[1][4] == exported
    assert (tmp_path / "stages" / "online" / "model.safetensors").read_text() == "3"
    alone = Run(tmp_path / "alone", config(stages=["online"], objective={"kl": {"weight": 0.1}}))()
    assert alone.only("start_stage")[0][4] == alone.model


def test_checkpoints_at_the_interval_and_at_the_ends_of_stages(tmp_path: Path) -> None:
    run = Run(tmp_path, config(warm_start={"max_steps": 3}, train={"max_steps": 5}, checkpoint={"interval": 2}))()
    # The interval counts the steps of the stage: 2 and the end of the warm start; 2, 4 and the end of online.
    assert run.only("save") == [("save", version) for version in (2, 3, 5, 7, 8)]
    saved = run.saved()
    assert {name: (state.stage, state.step) for name, state in saved.items()} == {
        "step_000002": (0, 2),
        "step_000003": (0, 3),
        "step_000005": (1, 2),
        "step_000007": (1, 4),
        "step_000008": (1, 5),
    }


@pytest.mark.parametrize("max_staleness", [0, 1])
@pytest.mark.parametrize("version", [1, 2, 3, 4])
def test_an_interrupted_run_goes_on_as_if_nothing_had_happened(
    version: int, max_staleness: int, tmp_path: Path
) -> None:
    settings = config(train={"max_staleness": max_staleness}, evaluation={"interval": 1})
    undisturbed = Run(tmp_path / "a", settings)()
    first = Run(tmp_path / "b", settings)
    first.interrupt_at(version)
    with pytest.raises(InterruptedRunError, match="SIGTERM"):
        first()
    assert first.only("save")[-1] == ("save", version)
    second = Run(tmp_path / "b", settings)()
    assert second.rows() == undisturbed.rows()
    assert first.learner.trained + second.learner.trained == undisturbed.learner.trained
    last = "step_000005"
    assert replace(second.saved()[last], in_flight=()) == replace(undisturbed.saved()[last], in_flight=())
    trained = [row.get("rollout/accuracy") for row in read_rows(tmp_path / "b" / "metrics.jsonl")]
    assert trained == [row.get("rollout/accuracy") for row in read_rows(tmp_path / "a" / "metrics.jsonl")]


def test_an_interruption_in_the_last_step_changes_nothing(tmp_path: Path) -> None:
    run = Run(tmp_path, config())
    run.interrupt_at(5)
    run()  # reaches its end
    assert run.rows()[-1] == ("online", 3)
    assert (tmp_path / "stages" / "online" / "model.safetensors").read_text() == "5"


def test_an_interruption_in_the_last_step_of_a_stage_comes_after_the_export(tmp_path: Path) -> None:
    run = Run(tmp_path, config())
    run.interrupt_at(2)
    with pytest.raises(InterruptedRunError, match="SIGTERM"):
        run()
    assert run.only("train", "start_stage")[-1] == ("train", 2)
    assert [path.name for path in (tmp_path / "stages").iterdir()] == ["warm_start"]


def test_the_export_of_a_smaller_max_steps_is_removed_while_the_stage_goes_on(tmp_path: Path) -> None:
    Run(tmp_path, config())()
    longer = Run(tmp_path, config(train={"max_steps": 5}))
    longer.interrupt_at(6)
    with pytest.raises(InterruptedRunError):
        longer()
    assert not (tmp_path / "stages" / "online").exists()


def test_a_run_that_was_killed_before_its_last_export_only_exports(tmp_path: Path) -> None:
    Run(tmp_path, config())()
    (tmp_path / "stages" / "online").rename(tmp_path / "elsewhere")
    again = Run(tmp_path, config())()
    assert again.calls == []
    assert (tmp_path / "stages" / "online" / "model.safetensors").read_text() == "5"


def test_a_resume_within_a_stage_hands_the_checkpoint_to_the_learner(tmp_path: Path) -> None:
    first = Run(tmp_path, config())
    first.interrupt_at(4)
    with pytest.raises(InterruptedRunError):
        first()
    checkpoint = tmp_path / "checkpoints" / "step_000004"
    second = Run(tmp_path, config())()
    assert second.only("start_stage") == [("start_stage", "online", checkpoint / "policy", checkpoint, None)]
    assert second.only("send") == [("send", 4), ("send", 5)]


def test_a_run_whose_warm_start_is_complete_starts_online_from_its_policy(tmp_path: Path) -> None:
    Run(tmp_path, config(stages=["warm_start", "online"], train={"max_steps": 1}))()
    for path in (tmp_path / "checkpoints" / "step_000003").rglob("*"):  # killed before the online checkpoint
        if path.is_file():
            path.unlink()
    for folder in ("policy", "learner", ""):
        (tmp_path / "checkpoints" / "step_000003" / folder).rmdir()
    # and, at the latest moment, before the hand-over
    (tmp_path / "stages" / "warm_start" / "model.safetensors").unlink()
    second = Run(tmp_path, config(train={"max_steps": 1}, objective={"kl": {"weight": 0.1}}))()
    policy, exported = tmp_path / "checkpoints" / "step_000002" / "policy", tmp_path / "stages" / "warm_start"
    assert second.only("start_stage") == [("start_stage", "online", policy, None, exported)]
    assert (exported / "model.safetensors").read_text() == "2"


def test_a_raised_max_steps_continues_the_last_stage(tmp_path: Path) -> None:
    Run(tmp_path, config())()
    again = Run(tmp_path, config())()
    assert again.calls == []  # nothing is left to do
    longer = Run(tmp_path, config(train={"max_steps": 5}))()
    assert longer.only("train") == [("train", 6), ("train", 7)]
    assert longer.rows()[-3:] == [("online", 3), ("online", 4), ("online", 5)]


def test_an_interruption_before_the_first_step_saves_nothing_and_still_ends(tmp_path: Path) -> None:
    run = Run(tmp_path, config())
    original = run.learner.start_stage

    async def start(*arguments: Any) -> None:
        run.controller.interrupt("SIGINT")
        run.controller.interrupt("SIGTERM")  # the first reason counts
        await original(*arguments)

    run.learner.start_stage = start
    with pytest.raises(InterruptedRunError, match="SIGINT"):
        run()
    assert run.only("save", "train") == []


def test_a_learner_that_fails_ends_the_run_and_no_checkpoint_is_left_half_written(tmp_path: Path) -> None:
    run = Run(tmp_path, config(stages=["online"], checkpoint={"interval": 1}))

    async def fail(folder: Path) -> None:
        (folder / "policy").mkdir()
        raise EngineError("learner rank 1 died")

    run.learner.save = fail
    with pytest.raises(EngineError, match="rank 1"):
        run()
    assert list((tmp_path / "checkpoints").iterdir()) == []


def test_run_stays_short() -> None:
    for method in (Controller.run, TrainingStage.run, OfflineStage.train, OnlineStage.train):
        assert len(inspect.getsource(method).splitlines()) <= 40
