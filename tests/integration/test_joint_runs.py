"""The joint objective over Ray, vLLM and two DeepSpeed ranks: what a run leaves behind, kills, and shipped configs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from joint_runs import (
    OFFLINE,
    after_row,
    check_figures,
    check_gradients,
    check_terms,
    joint,
    killed_at,
    last_contents,
    policy_digest,
    ppo,
    rows_of,
)
from real_runs import (
    PREFERENCE,
    SFT,
    TREE_COUNT,
    WARM,
    Command,
    FinishedRun,
    commands,
    last_checkpoint,
    steady_rows,
    write_config,
)
from real_searches import count_finished, finished_trees, wait_until, whole_shards

from rlsys.run.metrics import read_rows

pytestmark = [pytest.mark.integration, pytest.mark.timeout(900)]
LARGEST_GAP = 5e-4
WEIGHTS = {"policy": 1.0, "kl": 0.01, "preference": 0.1, "sft": 0.1}


def finished(folder: Path, values: dict[str, Any]) -> Path:
    """The run directory of an undisturbed run."""
    with commands() as start:
        start("train", write_config(folder, values)).finish()
    return folder / "run"


@pytest.fixture(scope="module")
def whole_run(finished_run: FinishedRun) -> Path:
    return finished_run.dir


@pytest.fixture(scope="module")
def offline_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finished(tmp_path_factory.mktemp("offline"), OFFLINE)


def table(run: Path, name: str) -> list[dict[str, Any]]:
    import pyarrow.parquet

    return pyarrow.parquet.read_table(run / "stages" / "search" / "data" / f"{name}.parquet").to_pylist()


def test_the_offline_stages_leave_all_of_it_behind(whole_run: Path) -> None:
    names = {path.name for path in (whole_run / "stages").iterdir()}
    kept = {"preference.references.json", "online.references.json"}
    assert names == {"warm_start", "search", "sft", "preference", "online", *kept}
    # Each training stage has changed the policy, and hands over what the next one begins with.
    stages = ("warm_start", "sft", "preference", "online")
    folders = [whole_run / "model", *(whole_run / "stages" / stage for stage in stages)]
    assert len({policy_digest(folder) for folder in folders}) == 5
    assert policy_digest(folders[-1]) == policy_digest(last_checkpoint(whole_run) / "policy")


def test_the_offline_stages_log_what_they_do(whole_run: Path) -> None:
    check_figures(read_rows(whole_run / "metrics.jsonl"))
    (search,) = rows_of(whole_run, "search")
    trees = finished_trees(whole_run / "stages" / "search")
    assert len(trees) == search["search/trees"] == TREE_COUNT
    assert search["search/pairs"] == len(table(whole_run, "preferences")) > 0
    assert search["search/demonstrations"] == len(table(whole_run, "supervised")) > 0
    assert search["search/step_preferences"] == len(table(whole_run, "step_preferences"))
    report = json.loads((whole_run / "stages" / "search" / "data" / "report.json").read_text())
    assert report["rows"]["supervised"] + report["duplicates"]["supervised"] == search["search/solved"] * TREE_COUNT

    for row in [*rows_of(whole_run, "warm_start"), *rows_of(whole_run, "sft")]:
        check_terms(row, {"sft": 1.0})
    rows = rows_of(whole_run, "preference")
    for row in rows:
        check_terms(row, {"preference": 0.1, "sft": 0.1})
        assert ("objective/sft_grad_norm" in row) == (row["step"] % 2 == 1)  # every second step, from the first on
        if row["step"] % 2:
            check_gradients(row, ("preference", "sft"))
            assert min(row["objective/preference_grad_norm"], row["objective/sft_grad_norm"]) > 0
        assert row["objective/preference_denominator"] == 8
    # In the first update the policy is the reference: both gained nothing, up to rounding.
    assert abs(rows[0]["preference/margin"]) < 1e-3
    assert rows[-1]["preference/margin"] > 0.1 and rows[-1]["preference/accuracy"] > 0.5


def test_all_terms_learn_together_with_pairs_of_a_file(whole_run: Path) -> None:
    rows = rows_of(whole_run, "online")
    assert [row["step"] for row in rows] == list(range(1, 11))
    for row in rows:
        check_terms(row, WEIGHTS)
        assert all(row[f"objective/{term}_denominator"] > 0 for term in WEIGHTS)
        if row["step"] % 2:
            check_gradients(row, tuple(WEIGHTS))
            assert row["objective/preference_grad_norm"] > 0 and row["objective/sft_grad_norm"] > 0
            # In the first update the policy is the reference.
            assert (row["objective/kl_grad_norm"] > 1e-5) == (row["step"] > 1)


@pytest.mark.parametrize(("stage", "before"), [("preference", "sft"), ("online", "preference")])
def test_kept_scores_are_those_of_the_policy_the_stage_began_with(whole_run: Path, stage: str, before: str) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    kept = json.loads((whole_run / "stages" / f"{stage}.references.json").read_text())["scores"]
    pairs = table(whole_run, "preferences")
    assert len(kept) == len(pairs)
    model = AutoModelForCausalLM.from_pretrained(whole_run / "stages" / before)
    for pair, scores in zip(pairs, kept, strict=True):
        for side, score in zip(("chosen_ids", "rejected_ids"), scores, strict=True):
            ids = torch.tensor([pair[side]])
            with torch.no_grad():
                logprobs = torch.log_softmax(model(ids).logits[0, :-1].double(), dim=-1)
            taken = logprobs.gather(1, ids[0, 1:, None])[pair["common_prefix"] - 1 :, 0]
            assert score == pytest.approx(taken.sum().item(), abs=1e-3)


@pytest.mark.long
def test_an_offline_stage_that_ends_the_run_publishes_and_is_evaluated(offline_run: Path) -> None:
    rows = read_rows(offline_run / "metrics.jsonl")
    check_figures(rows)
    assert last_checkpoint(offline_run).name == f"step_{WARM + SFT + PREFERENCE:06d}"
    assert 0 < rows[-1]["weights/probe_gap_max"] < LARGEST_GAP
    assert "held_out/greedy_accuracy" in rows[-1]


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_offline_stages_killed_and_resumed_end_where_an_undisturbed_run_does(
    offline_run: Path, start: Callable[..., Command], tmp_path: Path
) -> None:
    """In mid-search and in mid-preference."""
    config, run = write_config(tmp_path, OFFLINE), tmp_path / "run"
    search, references = run / "stages" / "search", run / "stages" / "preference.references.json"

    def begun() -> bool:  # trees end in no order: seven of them may be parts of several shards
        return count_finished(search) >= 7 and bool(whole_shards(search))

    killed_at(start, config, run, lambda command: wait_until(command, begun))
    kept, shards = finished_trees(search), whole_shards(search)
    assert 0 < len(kept) < TREE_COUNT and shards
    assert last_checkpoint(run).name == f"step_{WARM:06d}"

    killed_at(start, config, run, after_row(run, "preference", 5))
    assert whole_shards(search).items() >= shards.items()  # what was there was not grown again
    assert rows_of(run, "preference")[-1]["step"] < PREFERENCE
    assert last_checkpoint(run).name in [f"step_{WARM + SFT + step:06d}" for step in (4, 8)]
    scored = references.stat()

    start("train", config).finish()
    assert references.stat().st_ino == scored.st_ino and references.stat().st_mtime_ns == scored.st_mtime_ns
    assert steady_rows(run) == steady_rows(offline_run)
    assert finished_trees(search) == finished_trees(offline_run / "stages" / "search")
    for stage in ("warm_start", "sft", "preference"):
        assert policy_digest(run / "stages" / stage) == policy_digest(offline_run / "stages" / stage)
    assert last_contents(run) == last_contents(offline_run)


@pytest.fixture(scope="module")
def joint_run(finished_run: FinishedRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finished(tmp_path_factory.mktemp("joint"), joint(finished_run))


@pytest.mark.long
def test_all_terms_learn_in_one_loop(joint_run: Path) -> None:
    check_figures(read_rows(joint_run / "metrics.jsonl"))
    rows = rows_of(joint_run, "online")
    assert [row["step"] for row in rows] == [1, 2, 3]
    before = 0.0
    for row in rows:
        check_terms(row, WEIGHTS)
        check_gradients(row, tuple(WEIGHTS))
        assert 0 < row["search/trees"] < 8  # half of the prompts; a replaced group may be of either half
        assert row["learner/updates"] == 2
        assert row["objective/preference_denominator"] * 2 == row["search/pairs"] > 0
        for term in WEIGHTS:
            assert row[f"objective/{term}_denominator"] > 0
        # Of every rollout that did not fail, each token is counted once.
        replaced, before = row["rollout/filtered_tokens"] - before, row["rollout/filtered_tokens"]
        assert row["rollout/generated_tokens"] == row["rollout/tokens"] + row["search/tokens"] + replaced
        assert row["rollout/failed"] == 0
    assert rows[-1]["rollout/filtered"] > 0
    assert 0 < max(row["weights/probe_gap_max"] for row in rows) < LARGEST_GAP
    assert 0 < max(row["learner/logprob_gap_max"] for row in rows) < LARGEST_GAP
    # The first update, in which gradients are measured, may have none of the step's pairs; the policy is the reference
    # in that of the first step.
    assert all(row["objective/policy_grad_norm"] > 0 for row in rows)
    for term in ("preference", "sft"):
        assert any(row[f"objective/{term}_grad_norm"] > 0 for row in rows), term
    assert [row["objective/kl_grad_norm"] > 1e-5 for row in rows] == [False, True, True]


@pytest.mark.long
@pytest.mark.timeout(1200)
def test_joint_training_killed_and_resumed_ends_where_an_undisturbed_run_does(
    joint_run: Path, finished_run: FinishedRun, start: Callable[..., Command], tmp_path: Path
) -> None:
    config, run = write_config(tmp_path, joint(finished_run)), tmp_path / "run"
    check_resume(joint_run, config, run, start)


@pytest.fixture(scope="module")
def ppo_run(finished_run: FinishedRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finished(tmp_path_factory.mktemp("ppo"), ppo(finished_run))


@pytest.mark.long
def test_ppo_learns_with_a_critic(ppo_run: Path, finished_run: FinishedRun) -> None:
    check_figures(read_rows(ppo_run / "metrics.jsonl"))
    rows = rows_of(ppo_run, "online")
    check_terms(rows[0], {"value": 1.0})
    for row in rows[1:]:
        check_terms(row, {"policy": 1.0, "value": 1.0})
    assert all(row["value/explained_variance"] <= 1 and row["objective/value_grad_norm"] > 0 for row in rows)
    # The critic begins at 0, which explains nothing of returns that vary; the warm-up moves only the critic.
    assert rows[0]["value/mean"] == 0 and rows[0]["value/explained_variance"] == pytest.approx(0, abs=1e-6)
    assert rows[-1]["value/mean"] != 0
    first, second = (ppo_run / "checkpoints" / f"step_00000{n}" / "policy" for n in (1, 2))
    begun = finished_run.dir / "stages" / "warm_start"
    assert same_weights(first, begun) and not same_weights(second, begun)


def same_weights(first: Path, second: Path) -> bool:
    from safetensors.numpy import load_file

    sides = [load_file(folder / "model.safetensors") for folder in (first, second)]
    assert sides[0].keys() == sides[1].keys()
    return all(np.array_equal(sides[0][name], sides[1][name]) for name in sides[0])


@pytest.mark.long
@pytest.mark.timeout(1200)
def test_ppo_killed_and_resumed_ends_where_an_undisturbed_run_does(
    ppo_run: Path, finished_run: FinishedRun, start: Callable[..., Command], tmp_path: Path
) -> None:
    config, run = write_config(tmp_path, ppo(finished_run)), tmp_path / "run"
    check_resume(ppo_run, config, run, start)
    assert {name.split("/")[0] for name in last_contents(run)} == {
        "policy",
        "learner",
        "critic",
        "critic_learner",
        "state.json",
    }


def check_resume(undisturbed: Path, config: str, run: Path, start: Callable[..., Command]) -> None:
    """A kill after the second step, and the same command again."""
    killed_at(start, config, run, after_row(run, "online", 2))
    steps = rows_of(undisturbed, "online")[-1]["step"]
    assert rows_of(run, "online")[-1]["step"] < steps
    assert last_checkpoint(run).name in ("step_000001", "step_000002")
    start("train", config).finish()
    assert steady_rows(run) == steady_rows(undisturbed)
    assert last_contents(run) == last_contents(undisturbed)
