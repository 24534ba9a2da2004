"""The stages without rollouts over fakes: order of calls, kills and resumes, scores of the reference policy."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fake_runs import KINDS, Run, config

from rlsys.control.run_context import RunContext
from rlsys.control.stop_request import StopRequest
from rlsys.errors import CheckpointError, ConfigError, DataError, InterruptedRunError, NonFiniteLossError
from rlsys.models.folder import weights_digest
from rlsys.run.metrics import read_rows

PAIRS = 7
SCORED = [("score", 6), ("score", 1)]  # 7 pairs, two of a step: three steps' pairs a call


def files(folder: Path) -> dict[str, Any]:
    """Sections of a config: the rejected side of pair n ends with the token 10 + n."""
    rows = [{"token_ids": [1, 10 + n], "loss_mask": [False, True]} for n in range(5)]
    sides = [{"chosen_ids": [1, 2], "rejected_ids": [1, 10 + n], "prompt_length": 1, "common_prefix": 1}
             for n in range(PAIRS)]  # fmt: skip
    for name, lines in (("rows", rows), ("pairs", sides)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return {
        "sft": {"path": str(folder / "rows.jsonl"), "max_steps": 2, "rows_per_step": 3},
        "preference": {"path": str(folder / "pairs.jsonl"), "max_steps": 4, "pairs_per_step": 2},
        "objective": {"preference": {"weight": 1.0}},
    }


class FakeSearch:
    """Keeps what it was asked. done: whether it finds its work done."""

    def __init__(self, run: Run, done: bool = False) -> None:
        self.run_, self.done = run, done
        self.signal = ""

    def is_complete(self, policy: Path) -> bool:
        self.run_.calls.append(("is_complete", policy))
        return self.done

    async def run(self, policy: Path, stop: StopRequest) -> Mapping[str, float]:
        self.run_.calls.append(("grow", policy))
        if self.signal:
            self.run_.controller.interrupt(self.signal)
            stop.check()
        return {"search/trees": 3.0}


def searching(run_dir: Path, settings: Any, done: bool = False) -> tuple[Run, FakeSearch]:
    run = Run(run_dir, settings)
    run.search = FakeSearch(run, done)
    return run, run.search


def test_sft_learns_rows_and_hands_its_policy_over(tmp_path: Path) -> None:
    sections = {"sft": files(tmp_path)["sft"], "train": {"max_steps": 1}}
    settings = config(stages=["warm_start", "sft", "online"], **sections)
    run = Run(tmp_path, settings)()
    first, second = (tmp_path / "checkpoints" / f"step_00000{n}" / "policy" for n in (2, 4))
    assert run.only(*KINDS) == [
        ("start_stage", "warm_start", run.model, None, None),
        *[("train", 1), ("train", 2), ("save", 2)],
        ("start_stage", "sft", first, None, None),
        *[("train", 3), ("train", 4), ("save", 4)],  # nobody samples: nothing is published
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


def test_a_resume_within_the_stage_takes_the_kept_scores(tmp_path: Path) -> None:
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
def test_without_fitting_scores_the_stage_is_started_on_the_policy_that_it_began_with(
    tmp_path: Path, change: str
) -> None:
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
    checkpoint, handed = tmp_path / "run" / "checkpoints" / "step_000004", tmp_path / "run" / "stages" / "sft"
    assert run.only("start_stage", "score", "score_probe")[:5] == [
        ("start_stage", "preference", handed, None, None),
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
def test_a_policy_that_a_stage_refers_to_and_that_has_changed_is_refused(tmp_path: Path, stage: str) -> None:
    sections = files(tmp_path) if stage == "preference" else {"objective": {"kl": {"weight": 0.1}}}
    settings = config(stages=["warm_start", stage], **sections)
    interrupted(tmp_path, settings, 3)  # the warm start makes version 2
    handed = tmp_path / "stages" / "warm_start" / "model.safetensors"
    content = handed.read_bytes()
    handed.unlink()  # a hard link into a checkpoint
    handed.write_bytes(content + b"!")
    with pytest.raises(CheckpointError, match="warm_start: expected the policy that the stage began with, sha256 "):
        Run(tmp_path, settings)()
    handed.write_bytes(content)
    assert Run(tmp_path, settings)().rows()[-1][0] == stage


def test_runs_tell_reference_policies_apart_by_all_their_weights() -> None:
    assert RunContext.policy_digest is weights_digest


def test_chosen_sides_alone_need_no_reference(tmp_path: Path) -> None:
    sections = {**files(tmp_path), "objective": {"sft": {"weight": 1.0}}}
    run = Run(tmp_path, config(stages=["preference"], **sections))()
    assert run.only("score") == [] and len(run.learner.batches[0][1].pairs) == 2


def test_pairs_of_a_file_beside_the_groups_of_the_online_stage(tmp_path: Path) -> None:
    sections = files(tmp_path)
    sections["objective"] = {
        "preference": {"weight": 0.1, "source": "file"},
        "sft": {"weight": 0.1, "source": "demonstrations"},
    }
    run = Run(tmp_path, config(stages=["sft", "online"], train={"max_steps": 2}, **sections))()
    assert run.only("score") == SCORED
    for step, (found, batch) in enumerate(run.learner.batches[2:]):
        assert (found, len(batch.groups), len(batch.pairs), len(batch.demonstrations)) == (step, 2, 2, 2)
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


def test_the_search_publishes_the_policy_and_changes_no_weights(tmp_path: Path) -> None:
    settings = config(stages=["warm_start", "search", "sft"], **files(tmp_path))
    run, _ = searching(tmp_path, settings)
    run()
    policy = tmp_path / "checkpoints" / "step_000002" / "policy"
    assert run.only(*KINDS, "is_complete", "grow")[3:11] == [
        ("save", 2),
        ("is_complete", policy),
        ("start_stage", "search", policy, None, None),
        ("send", 2),
        ("grow", policy),
        ("start_stage", "sft", policy, None, None),
        ("train", 3),
        ("train", 4),
    ]
    assert [(row["stage"], row["step"], row["weights/version"]) for row in read_rows(tmp_path / "metrics.jsonl")] == [
        ("warm_start", 1, 1), ("warm_start", 2, 2), ("search", 0, 2), ("sft", 1, 3), ("sft", 2, 4),
    ]  # fmt: skip
    assert {state.stage for state in run.saved().values()} == {0, 2}


def test_a_search_comes_first_without_a_checkpoint(tmp_path: Path) -> None:
    settings = config(stages=["search", "sft"], **files(tmp_path))
    run, _ = searching(tmp_path, settings)
    run()
    assert run.only("start_stage", "send", "grow")[:3] == [
        ("start_stage", "search", run.model, None, None),
        ("send", 0),
        ("grow", run.model),
    ]
    assert run.rows()[0] == ("search", 0)


def test_a_finished_search_is_passed_by_and_a_later_stage_never_sees_it(tmp_path: Path) -> None:
    settings = config(stages=["warm_start", "search", "sft", "online"], sft=files(tmp_path)["sft"])
    first, search = searching(tmp_path, settings)
    search.signal = "SIGTERM"
    with pytest.raises(InterruptedRunError, match="^SIGTERM$"):
        first()
    assert first.only("save") == [("save", 2)]
    second, _ = searching(tmp_path, settings, done=True)
    second.interrupt_at(3)  # in the first step of sft
    with pytest.raises(InterruptedRunError):
        second()
    assert [call[1] for call in second.only("start_stage")] == ["sft"]
    third, _ = searching(tmp_path, settings)
    third()
    assert third.only("is_complete", "grow") == []
    assert third.rows().count(("search", 0)) == 1


def test_an_interruption_before_the_first_tree_begins_none(tmp_path: Path) -> None:
    run, _ = searching(tmp_path, config(stages=["search", "sft"], sft=files(tmp_path)["sft"]))
    update = run.pool.update_weights

    async def publish(actor: int, *arguments: Any) -> Any:
        run.controller.interrupt("SIGINT")
        return await update(actor, *arguments)

    run.pool.update_weights = publish
    with pytest.raises(InterruptedRunError, match="SIGINT"):
        run()
    assert run.only("grow") == []


def test_the_anchor_after_a_search_is_the_policy_before_it(tmp_path: Path) -> None:
    imitated = {"sft": {"weight": 0.1}, "preference": {"source": "file"}}
    sections = files(tmp_path) | {"objective": {"kl": {"weight": 0.1}, **imitated}, "train": {"max_steps": 1}}
    run, _ = searching(tmp_path, config(stages=["warm_start", "search", "online"], **sections))
    run()
    assert run.only("start_stage")[-1][4] == tmp_path / "stages" / "warm_start"
    assert not (tmp_path / "stages" / "search").exists()  # no policy is handed over


def extract(run_dir: Path, chosen: int) -> None:
    """What the stage search leaves behind: the chosen side of every pair ends with this token."""
    folder = run_dir / "stages" / "search" / "data"
    folder.mkdir(parents=True, exist_ok=True)
    pairs = {"chosen_ids": [[1, chosen]], "rejected_ids": [[1, 3]], "prompt_length": [1], "common_prefix": [1]}
    pq.write_table(pa.table(pairs), folder / "preferences.parquet")


def test_a_resume_trains_on_what_the_search_extracted_before(tmp_path: Path) -> None:
    settings = config(stages=["search", "preference"], objective={"preference": {"weight": 1.0}})
    extract(tmp_path, 2)
    first, _ = searching(tmp_path, settings)
    first.interrupt_at(3)
    with pytest.raises(InterruptedRunError):
        first()
    second, _ = searching(tmp_path, settings)
    second.interrupt_at(5)
    with pytest.raises(InterruptedRunError):
        second()
    assert second.only("train") == [("train", 4), ("train", 5)]
    extract(tmp_path, 4)
    third, _ = searching(tmp_path, settings)
    with pytest.raises(ConfigError, match=r"preferences\.parquet: the rows differ from those that .*step_000005 was"):
        third()
    assert third.only("start_stage", "train") == []


def test_files_that_the_search_did_not_write_are_named(tmp_path: Path) -> None:
    run, _ = searching(tmp_path, config(stages=["search", "sft"]))
    with pytest.raises(DataError, match=r"^stage search: .*stages/search/data/supervised\.parquet: no such file"):
        run()
    assert run.only("train") == []
