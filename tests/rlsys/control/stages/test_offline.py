"""The loop of the stages that train on data, over fakes."""

from __future__ import annotations

from pathlib import Path

import pytest
from fake_runs import KINDS, Run, config
from staged_files import files

from rlsys.run.metrics import read_rows


def test_sft_learns_rows_and_exports_its_policy(tmp_path: Path) -> None:
    sections = {"sft": files(tmp_path)["sft"], "train": {"max_steps": 1}}
    settings = config(stages=["warm_start", "sft", "online"], **sections)
    run = Run(tmp_path, settings)()
    first, second = (tmp_path / "checkpoints" / f"step_00000{n}" / "policy" for n in (2, 4))
    assert run.only(*KINDS) == [
        ("start_stage", "warm_start", run.model, None, None),
        *[("train", 1), ("train", 2), ("save", 2)],
        ("start_stage", "sft", first, None, None),
        *[("train", 3), ("train", 4), ("save", 4)],  # no actor samples, so nothing is published
        ("start_stage", "online", second, None, None),
        *[("send", 4), ("train", 5), ("send", 5), ("save", 5)],
    ]
    assert [step for step, _ in run.learner.batches] == [0, 1, 0, 1, 0]
    sizes = [(len(batch.demonstrations), len(batch.pairs), len(batch.groups)) for _, batch in run.learner.batches]
    assert sizes == [(2, 0, 0), (2, 0, 0), (3, 0, 0), (3, 0, 0), (0, 0, 2)]
    assert (tmp_path / "stages" / "sft" / "model.safetensors").read_text() == "4"
    assert [row for row in run.rows() if row[0] == "sft"] == [("sft", 1), ("sft", 2)]


@pytest.mark.parametrize("last", ["sft", "preference"])
def test_the_last_stage_is_published_and_evaluated(tmp_path: Path, last: str) -> None:
    run = Run(tmp_path, config(stages=[last], **files(tmp_path)))()
    total = {"sft": 2, "preference": 4}[last]
    assert run.only("send") == [("send", total)]
    assert "held_out/greedy_accuracy" in read_rows(tmp_path / "metrics.jsonl")[-1]


def test_chosen_sides_alone_need_no_reference(tmp_path: Path) -> None:
    sections = {**files(tmp_path), "objective": {"sft": {"weight": 1.0}}}
    run = Run(tmp_path, config(stages=["preference"], **sections))()
    assert run.only("score") == [] and len(run.learner.batches[0][1].pairs) == 2


def test_only_the_data_of_trained_steps_are_loaded(tmp_path: Path) -> None:
    run = Run(tmp_path, config(stages=["warm_start"]))
    asked: list[int] = []
    batch = run.data.batch
    run.data.batch = lambda stage, step: asked.append(step) or batch(stage, step)
    run()
    assert asked == [0, 1]
