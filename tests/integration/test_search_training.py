"""A training run that searches half of its prompts, over Ray, vLLM and two DeepSpeed ranks."""

from __future__ import annotations

import hashlib
import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from real_runs import (
    TINY,
    TREES,
    Command,
    FinishedRun,
    commands,
    last_checkpoint,
    steady_rows,
    wait_for_row,
    write_config,
)

from rlsys.run.metrics import METRICS, read_rows

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]
LARGEST_GAP = 5e-4
STEPS = 4
SEARCHING: dict[str, Any] = {
    **TINY,
    "sampling": {"max_tokens": 60},
    "search": {**TREES, "expansion": "chain", "fraction": 0.5},
    "train": {**TINY["train"], "max_steps": STEPS},
    "checkpoint": {"interval": 2},
}


def searching(finished_run: FinishedRun) -> dict[str, Any]:
    """From the policy that another run has warmed up."""
    return {**SEARCHING, "stages": ["online"], "model": {"path": str(finished_run.dir / "stages" / "warm_start")}}


@pytest.fixture(scope="module")
def searching_run(finished_run: FinishedRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("searching")
    with commands() as start:
        command = start("train", write_config(folder, searching(finished_run))).finish()
        command.assert_gone(within_s=5)
    return folder / "run"


def online_rows(run: Path) -> list[dict[str, Any]]:
    return [row for row in read_rows(run / "metrics.jsonl") if row["stage"] == "online" and row["step"] > 0]


def check_searched(rows: list[dict[str, Any]], trees: int) -> None:
    for row in rows:
        assert set(row) - {"stage", "step"} <= set(METRICS)
        assert row["search/trees"] == trees
        assert 0 < row["search/scored"] <= row["search/simulations"] <= 16 * trees
        assert row["search/correct"] <= row["search/scored"] and row["search/solved"] <= 1
        assert 0 < row["search/trained_share"] <= 1
        assert row["learner/grad_norm"] > 0
        assert 0 <= row["rollout/idle_policy"] <= 1
    # Two different programs never agree to the last bit: zero would mean no comparison.
    assert 0 < max(row["learner/logprob_gap_max"] for row in rows) < LARGEST_GAP
    assert max(row["weights/probe_gap_max"] for row in rows) < LARGEST_GAP
    for name in ("backtracks", "duplicates", "pairs", "step_preferences", "demonstrations"):
        assert sum(row[f"search/{name}"] for row in rows) > 0, name
    assert any(0 < row["search/reward"] < 1 for row in rows)


@pytest.mark.long
def test_half_of_the_prompts_are_searched(searching_run: Path) -> None:
    rows = online_rows(searching_run)
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    check_searched(rows, trees=4)
    for row in rows:
        # 4 sampled groups of 4; every completion has at least its end token.
        assert 16 <= row["rollout/tokens"] <= 16 * 60
        assert row["rollout/staleness_max"] == 0
    assert (searching_run / "stages" / "online" / "model.safetensors").is_file()


@pytest.mark.long
def test_evaluate_decodes_with_search(searching_run: Path, start: Callable[..., Command], tmp_path: Path) -> None:
    output = tmp_path / "figures.json"
    overrides = ("evaluation.search_answers=4", "evaluation.prompts=16", "evaluation.samples=0")
    command = start("evaluate", str(searching_run), *overrides, "--output", str(output)).finish()
    command.assert_gone(within_s=5)
    found = json.loads(output.read_text())
    # Greedy answers are those of the run's own evaluation, searched or not.
    last = read_rows(searching_run / "metrics.jsonl")[-1]
    assert found["greedy"]["accuracy"]["mean"] == pytest.approx(last["held_out/greedy_accuracy"], abs=1e-12)
    assert found["search"]["answers"] == 4 and found["search"]["failed_trees"] == 0
    by_answers = found["search"]["at_equal_answers"]
    assert list(by_answers) == ["1", "2", "4"]
    for side in ("search", "samples"):
        solved = [by_answers[n][side]["mean"] for n in by_answers]
        assert solved == sorted(solved) and 0 < solved[-1] <= 1
    assert len(found["search"]["at_equal_tokens"]) > 0
    assert "search" in command.stdout


@pytest.mark.long
def test_all_prompts_are_searched(finished_run: FinishedRun, start: Callable[..., Command], tmp_path: Path) -> None:
    config = write_config(tmp_path, searching(finished_run))
    start("train", config, "search.fraction=1.0", "train.max_steps=2").finish().assert_gone(within_s=5)
    rows = online_rows(tmp_path / "run")
    assert len(rows) == 2
    check_searched(rows, trees=8)
    assert not any("rollout/reward" in row for row in rows)  # nothing was sampled


@pytest.mark.long
@pytest.mark.timeout(1200)
def test_killed_and_resumed_ends_where_an_undisturbed_run_does(start: Callable[..., Command], tmp_path: Path) -> None:
    """With a warm start of its own."""
    values = {**SEARCHING, "train": {**SEARCHING["train"], "max_steps": 6}}
    folders = [tmp_path / "undisturbed", tmp_path / "killed"]
    for folder in folders:
        folder.mkdir()
    configs = [write_config(folder, values) for folder in folders]
    start("train", configs[0]).finish().assert_gone(within_s=5)
    first = start("train", configs[1])
    wait_for_row(first, folders[1] / "run", "online", 3)
    first.signal(signal.SIGKILL, group=False)
    first.fail(-signal.SIGKILL)
    first.assert_gone(within_s=15)
    assert last_checkpoint(folders[1] / "run").name in ("step_000062", "step_000064")
    start("train", configs[1]).finish().assert_gone(within_s=5)

    undisturbed, killed = (folder / "run" for folder in folders)
    check_searched(online_rows(undisturbed), trees=4)
    assert steady_rows(killed) == steady_rows(undisturbed)
    assert policy_digest(killed) == policy_digest(undisturbed)


def policy_digest(run: Path) -> str:
    files = sorted((last_checkpoint(run) / "policy").glob("*.safetensors"))
    assert files
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()
