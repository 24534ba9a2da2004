"""A publish that lacks something ends the run with a WeightSyncError; without the fault the same run agrees."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from real_runs import TINY, Command, write_config
from reliability import recorded

from rlsys.config.tasks import LetterCountConfig
from rlsys.run.metrics import read_rows
from rlsys.tasks import build_task

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]
SHORT = {**TINY, "train": {**TINY["train"], "max_steps": 2}, "checkpoint": {"interval": 100}}


def write_data_set(path: Path) -> None:
    """Letter counting as a JSONL file with columns of other names."""
    task = build_task(LetterCountConfig(**TINY["task"]), 0)
    with path.open("w", encoding="utf-8") as stream:
        for index in range(60):
            found = task.demonstration(index, random.Random(index))
            assert found is not None
            problem, chain = found
            row = {"prompt": problem.question, "label": f"#### {problem.answer}", "chain": chain}
            stream.write(json.dumps(row) + "\n")


def data_set_config(tmp_path: Path) -> dict[str, Any]:
    write_data_set(tmp_path / "data.jsonl")
    task = {
        "type": "dataset",
        "path": str(tmp_path / "data.jsonl"),
        "question_column": "prompt",
        "answer_column": "label",
        "answer_pattern": "#### (.+)",
        "demonstration_column": "chain",
    }
    return {**SHORT, "task": task, "learner": {**TINY["learner"], "zero_stage": 0}, "evaluation": {"prompts": 4}}


def failed_line(command: Command) -> str:
    errors = command.fail(1)
    command.assert_gone(within_s=5)
    assert "Traceback" not in errors
    lines = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and errors.splitlines()[-1] == lines[0]
    return lines[0]


@pytest.mark.long
@recorded(
    fault="output layer missing from every actor's publish",
    promise="the probe finds it; nobody samples with it, the run ends and names actor and version",
    injection="publish.drop: lm_head.weight",
)
def test_output_layer_left_out_ends_the_run(start: Callable[..., Command], tmp_path: Path) -> None:
    """On a data set, so that its prompts and demonstrations are used too. The first publish is after 20 steps."""
    config = write_config(tmp_path, data_set_config(tmp_path))
    environment = {"RLSYS_FAULTS": "publish.drop:lm_head.weight"}
    line = failed_line(start("train", config, "warm_start.max_steps=20", environment=environment))
    assert re.match(r"error: actor [01], weight version 20: log-probabilities differ .*lm_head", line)
    rows = read_rows(tmp_path / "run" / "metrics.jsonl")
    assert {row["stage"] for row in rows} == {"warm_start"}  # nothing was sampled from such weights


@pytest.mark.long
@recorded(
    fault="tensor missing from every actor's publish",
    promise="nobody samples with it; the run ends and names actor, version and tensor",
    injection="publish.omit: model.norm.weight",
)
def test_missing_tensor_is_named(start: Callable[..., Command], tmp_path: Path) -> None:
    config = write_config(tmp_path, {**SHORT, "stages": ["online"]})
    environment = {"RLSYS_FAULTS": "publish.omit:model.norm.weight"}
    line = failed_line(start("train", config, environment=environment))
    assert re.fullmatch(
        r"error: actor [01], weight version 0: tensor model\.norm\.weight is missing from the publish",
        line,
    )


@pytest.mark.long
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("zero_stage", [0, 3])
def test_gap_after_every_publish(start: Callable[..., Command], tmp_path: Path, tied: bool, zero_stage: int) -> None:
    scratch = {**TINY["model"]["from_scratch"], "tie_embeddings": tied}
    learner = {"ranks": 2, "zero_stage": zero_stage}
    config = write_config(tmp_path, {**SHORT, "model": {"from_scratch": scratch}, "learner": learner})
    start("train", config, "train.max_steps=6").finish()
    rows = [row for row in read_rows(tmp_path / "run" / "metrics.jsonl") if row["stage"] == "online"][1:]
    assert len(rows) == 6
    for name in ("weights/probe_gap_max", "learner/logprob_gap_max"):
        assert 0 < max(row[name] for row in rows) <= 5e-4


@pytest.mark.long
def test_data_set_run_to_the_end(start: Callable[..., Command], tmp_path: Path) -> None:
    start("train", write_config(tmp_path, data_set_config(tmp_path))).finish()
    last = read_rows(tmp_path / "run" / "metrics.jsonl")[-1]
    assert (last["stage"], last["step"]) == ("online", 2)
    assert last["rollout/no_answer_rate"] < 1 and last["rollout/verifier_errors"] == 0


@pytest.mark.long
def test_two_ranks_at_zero_2_continue_as_one_at_zero_0(start: Callable[..., Command], tmp_path: Path) -> None:
    config, run = write_config(tmp_path, SHORT), tmp_path / "run"
    start("train", config).finish()
    start("train", config, "train.max_steps=4", "learner.ranks=1", "learner.zero_stage=0").finish()
    rows = read_rows(run / "metrics.jsonl")
    assert [row["step"] for row in rows if row["stage"] == "online"] == [0, 1, 2, 3, 4]
    assert max(row.get("learner/logprob_gap_max", 0.0) for row in rows) <= 5e-4
