"""A teacher, on an engine of its own or in the learner, beside RL and search in one joint step; and a kill."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from joint_runs import after_row, check_figures, check_terms, killed_at, last_contents, online, rows_of
from real_runs import TINY, TREES, Command, FinishedRun, commands, last_checkpoint, steady_rows, write_config

from rlsys.run.metrics import read_rows

pytestmark = [pytest.mark.integration, pytest.mark.long, pytest.mark.timeout(900)]
WEIGHTS = {"policy": 1.0, "kl": 0.01, "distill": 0.5}


def taught(pupil: FinishedRun, teacher: Path, divergence: str) -> dict[str, Any]:
    """Half of the prompts are searched; a model with the same tokenizer scores all chains."""
    engines = {"model": {"path": str(teacher), "max_model_len": 128, "kv_cache_gib": 0.1}}
    return online(
        pupil,
        3,
        actors={**TINY["actors"], "count": 1},  # the engine of the teacher has the other core
        search={**TREES, "expansion": "chain", "fraction": 0.5},
        teacher={"in_learner": str(teacher)} if divergence == "whole" else engines,
        objective={
            "kl": {"weight": WEIGHTS["kl"]},
            "distill": {"weight": WEIGHTS["distill"], "divergence": divergence},
        },
    )


@pytest.fixture(scope="module", params=["sampled", "top_k", "whole"])
def config(request: pytest.FixtureRequest, finished_run: FinishedRun) -> dict[str, Any]:
    return taught(finished_run, finished_run.dir / "stages" / "online", request.param)


@pytest.fixture(scope="module")
def undisturbed(config: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("taught")
    with commands() as start:
        start("train", write_config(folder, config)).finish()
    return folder / "run"


def test_a_teacher_trains_the_policy_beside_the_rewards(undisturbed: Path, config: dict[str, Any]) -> None:
    check_figures(read_rows(undisturbed / "metrics.jsonl"))
    for row in rows_of(undisturbed, "online"):
        check_terms(row, WEIGHTS)
        # Every token that the policy chose has a score, also those of chains without a verdict's difference.
        assert row["objective/distill_denominator"] == row["objective/policy_denominator"] > 0
        assert row["distill/divergence"] > 0
        assert "in_learner" in config["teacher"] or 0 <= row["rollout/idle_teacher"] <= 1


def test_a_kill_changes_nothing(undisturbed: Path, config: dict[str, Any], tmp_path: Path) -> None:
    path, run = write_config(tmp_path, config), tmp_path / "run"
    with commands() as start:
        begin: Callable[..., Command] = start
        killed_at(begin, path, run, after_row(run, "online", 2))
        assert last_checkpoint(run).name in ("step_000001", "step_000002")
        begin("train", path).finish()
    assert steady_rows(run) == steady_rows(undisturbed)
    assert last_contents(run) == last_contents(undisturbed)


@pytest.mark.parametrize(("divergence", "share"), [("top_k", 1.0), ("top_k", 0.5), ("whole", 1.0)])
def test_a_policy_that_is_its_own_teacher_has_nothing_to_learn_from_it(
    divergence: str, share: float, finished_run: FinishedRun, tmp_path: Path
) -> None:
    """Below 1, engines of the teacher also score demonstrations."""
    values = taught(finished_run, finished_run.dir / "stages" / "warm_start", divergence)
    values["objective"]["distill"]["on_policy_share"] = share
    values["objective"]["sft"] = {"source": "demonstrations", "rows_per_step": 4}
    with commands() as start:
        train = {**values["train"], "max_steps": 1, "updates_per_step": 1}
        start("train", write_config(tmp_path, {**values, "train": train})).finish()
    (row,) = rows_of(tmp_path / "run", "online")
    assert 0 <= row["distill/divergence"] < 1e-9  # nats; fp32 differs by about 1e-6, and the divergence is quadratic
    own, scored = row["objective/policy_denominator"], row["objective/distill_denominator"]
    assert scored == own if share == 1 else scored > own > 0
