"""The start of a stage over fakes: reference policies and their scores."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from fake_runs import Run, config
from staged_files import PAIRS, files

from rlsys.control.run_context import RunContext
from rlsys.errors import CheckpointError, InterruptedRunError, NonFiniteLossError
from rlsys.models.folder import weights_digest

SCORED = [("score", 6), ("score", 1)]  # 7 pairs, two of a step: three steps' pairs a call


def test_pairs_are_scored_once_before_the_first_step(tmp_path: Path) -> None:
    run = Run(tmp_path, config(stages=["sft", "preference"], **files(tmp_path)))()
    before = tmp_path / "checkpoints" / "step_000002" / "policy"
    calls = run.only("start_stage", "train", "score")
    assert calls[3:] == [
        ("start_stage", "preference", before, None, None),
        *SCORED,
        *[("train", n) for n in range(3, 7)],
    ]
    for _, batch in run.learner.batches[2:]:
        assert [pair.rejected_reference for pair in batch.pairs] == [-float(p.rejected_ids.sum()) for p in batch.pairs]
    kept = json.loads((tmp_path / "stages" / "preference.references.json").read_text())
    assert kept["scores"] == [[-3.0, -11.0 - n] for n in range(PAIRS)]


def interrupted(run_dir: Path, settings: Any, version: int) -> Run:
    run = Run(run_dir, settings)
    run.interrupt_at(version)
    with pytest.raises(InterruptedRunError):
        run()
    return run


def test_a_resume_within_the_stage_uses_the_kept_scores(tmp_path: Path) -> None:
    settings = config(stages=["sft", "preference"], **files(tmp_path))
    undisturbed = Run(tmp_path / "a", settings)()
    first = interrupted(tmp_path / "b", settings, 4)
    second = Run(tmp_path / "b", settings)()
    checkpoint = tmp_path / "b" / "checkpoints" / "step_000004"
    assert second.only("start_stage", "score") == [
        ("start_stage", "preference", checkpoint / "policy", checkpoint, None)
    ]

    def learned(*runs: Run) -> list[Any]:
        return [
            (step, pair.rejected_ids.tolist(), pair.rejected_reference)
            for run in runs
            for step, batch in run.learner.batches
            for pair in batch.pairs
        ]

    assert learned(first, second) == learned(undisturbed)
    assert second.rows() == undisturbed.rows()


@pytest.mark.parametrize("change", ["gone", "damaged", "other pairs", "other tokens"])
def test_without_matching_scores_the_learner_starts_on_the_reference_policy(tmp_path: Path, change: str) -> None:
    sections = files(tmp_path)
    interrupted(tmp_path / "run", config(stages=["sft", "preference"], **sections), 4)
    kept = tmp_path / "run" / "stages" / "preference.references.json"
    if change == "gone":
        kept.unlink()
    elif change == "damaged":
        kept.write_text(kept.read_text()[:-9])
    elif change == "other pairs":
        path = tmp_path / "pairs.jsonl"
        path.write_text(path.read_text().replace("[1, 10]", "[1, 30]"))
    else:
        sections["objective"]["preference"]["mask_prefix_dpo"] = False
    run = Run(tmp_path / "run", config(stages=["sft", "preference"], **sections))()
    checkpoint, exported = tmp_path / "run" / "checkpoints" / "step_000004", tmp_path / "run" / "stages" / "sft"
    assert run.only("start_stage", "score", "score_probe")[:5] == [
        ("start_stage", "preference", exported, None, None),
        *SCORED,
        ("start_stage", "preference", checkpoint / "policy", checkpoint, None),
        ("score_probe", 2),  # actors and learner are compared once both have the checkpoint
    ]


def test_another_reference_policy_has_other_scores(tmp_path: Path) -> None:
    settings = config(stages=["preference"], **files(tmp_path))
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model.safetensors").write_text("initial")
    interrupted(tmp_path, settings, 2)
    shutil.rmtree(tmp_path / "checkpoints")
    (tmp_path / "model" / "model.safetensors").write_text("another")
    run = Run(tmp_path, settings)()
    assert run.only("start_stage")[0] == ("start_stage", "preference", run.model, None, None)
    assert run.only("score") == SCORED


@pytest.mark.parametrize("stage", ["preference", "online"])
def test_a_changed_reference_policy_is_refused(tmp_path: Path, stage: str) -> None:
    sections = files(tmp_path) if stage == "preference" else {"objective": {"kl": {"weight": 0.1}}}
    settings = config(stages=["warm_start", stage], **sections)
    interrupted(tmp_path, settings, 3)  # the warm start makes version 2
    exported = tmp_path / "stages" / "warm_start" / "model.safetensors"
    content = exported.read_bytes()
    exported.unlink()  # a hard link into a checkpoint
    exported.write_bytes(content + b"!")
    with pytest.raises(CheckpointError, match="warm_start: expected the policy that the stage began with, sha256 "):
        Run(tmp_path, settings)()
    exported.write_bytes(content)
    assert Run(tmp_path, settings)().rows()[-1][0] == stage


def test_the_reference_digest_covers_all_weights() -> None:
    assert RunContext.policy_digest is weights_digest


def test_the_online_stage_trains_pairs_of_a_file_and_groups(tmp_path: Path) -> None:
    sections = files(tmp_path)
    sections["objective"] = {
        "preference": {"weight": 0.1, "source": "file"},
        "sft": {"weight": 0.1, "source": "demonstrations"},
    }
    run = Run(tmp_path, config(stages=["sft", "online"], train={"max_steps": 2}, **sections))()
    assert run.only("score") == SCORED
    for step, (trained_step, batch) in enumerate(run.learner.batches[2:]):
        assert (trained_step, len(batch.groups), len(batch.pairs), len(batch.demonstrations)) == (step, 2, 2, 2)
        assert all(pair.chosen_reference == -3.0 for pair in batch.pairs)
    assert (tmp_path / "stages" / "online.references.json").exists()


def test_an_interruption_while_pairs_are_scored(tmp_path: Path) -> None:
    settings = config(stages=["preference"], **files(tmp_path))
    run = Run(tmp_path, settings)
    score = run.learner.score_pairs

    async def ask(pairs: Any) -> Any:
        run.controller.interrupt("SIGTERM")
        return await score(pairs)

    run.learner.score_pairs = ask
    with pytest.raises(InterruptedRunError, match="SIGTERM"):
        run()
    assert run.only("score", "train") == SCORED[:1]
    assert Run(tmp_path, settings)().only("score") == SCORED


def test_a_score_that_is_not_finite_ends_the_run(tmp_path: Path) -> None:
    run = Run(tmp_path, config(stages=["preference"], **files(tmp_path)))

    async def broken(pairs: Any) -> Any:
        return [(0.0, float("nan") if 12 in pair.rejected_ids else 0.0) for pair in pairs]

    run.learner.score_pairs = broken
    with pytest.raises(NonFiniteLossError, match="pair 3 of the preference data"):
        run()
    assert not (tmp_path / "stages" / "preference.references.json").exists()
