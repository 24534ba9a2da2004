"""A checkpoint records what it was trained on, and continues with nothing else."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from resumable_runs import FRESH, INPUTS, config, store

from rlsys.config.compare import extraction_request
from rlsys.config.schema import Config
from rlsys.config.stages import SEARCHED, ExtractedTable
from rlsys.directory import RunDirectory
from rlsys.errors import CheckpointError, ConfigError
from rlsys.files import write_json
from rlsys.run.provenance import (
    Provenance,
    check_extracted,
    check_extraction,
    check_inputs,
    check_reference,
    read_provenance,
)
from rlsys.types import RunState

ROWS = {"sft.path": ExtractedTable(name="supervised", digest="r1")}
CHAINS = {"preference.path": ExtractedTable(name="preferences", digest="p1")}
STEPS = {"preference.path": ExtractedTable(name="step_preferences", digest="p1")}


def checkpoint(run_dir: Path, record: dict[str, str] | None) -> Path:
    temporary = store(run_dir).begin("step_000002")
    info = {"weight_version": 2} | ({} if record is None else {"inputs": record})
    return store(run_dir).commit(temporary, "step_000002", info)


@pytest.mark.parametrize(
    ("provenance", "record"),
    [
        (Provenance(inputs=INPUTS), INPUTS),
        (
            Provenance(inputs={**INPUTS, "sft.path": SEARCHED, "preference.path": SEARCHED}, extracted=ROWS),
            {**INPUTS, "sft.path": "stage search: supervised r1", "preference.path": "stage search:"},
        ),
        (Provenance(inputs=INPUTS, reference="p0"), {**INPUTS, "reference": "p0"}),
    ],
)
def test_a_record_is_written_as_it_always_was_and_reads_back(
    provenance: Provenance, record: dict[str, str], tmp_path: Path
) -> None:
    assert provenance.to_json() == record
    assert read_provenance(checkpoint(tmp_path, record)) == provenance


def test_contents_that_changed_behind_an_unchanged_name(tmp_path: Path) -> None:
    path = checkpoint(tmp_path, INPUTS)
    check_inputs(path, INPUTS)
    check_inputs(None, {"task.path": "anything"})
    with pytest.raises(ConfigError, match=r"^task\.path: the contents differ .*step_000002 .* new run\.dir"):
        check_inputs(path, {**INPUTS, "task.path": "another"})
    with pytest.raises(ConfigError, match=r"^model\.path and tokenizer: "):
        check_inputs(path, {**INPUTS, "model.path": "another", "tokenizer": "another"})


def test_a_teacher_can_be_added_and_not_exchanged(tmp_path: Path) -> None:
    check_inputs(checkpoint(tmp_path / "without", INPUTS), {**INPUTS, "teacher.model.path": "digest"})
    path = checkpoint(tmp_path / "taught", {**INPUTS, "teacher.model.path": "digest"})
    with pytest.raises(ConfigError, match=r"^teacher\.model\.path: the contents differ"):
        check_inputs(path, {**INPUTS, "teacher.model.path": "another"})


def test_a_file_of_pairs_cannot_be_added(tmp_path: Path) -> None:
    path = checkpoint(tmp_path, INPUTS)
    for now in ("digest", SEARCHED):
        with pytest.raises(ConfigError, match=r"^preference\.path: .*step_000002 was trained without pairs of a file"):
            check_inputs(path, {**INPUTS, "preference.path": now})


def test_a_checkpoint_without_a_record_is_of_an_older_version(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="step_000002 was made by an older version of rlsys"):
        check_inputs(checkpoint(tmp_path, None), INPUTS)


@pytest.mark.parametrize("before", [SEARCHED, f"{SEARCHED} supervised digest"])
def test_extracted_rows_are_compared_when_they_are_read(before: str, tmp_path: Path) -> None:
    path = checkpoint(tmp_path, {"sft.path": before})
    check_inputs(path, {"sft.path": SEARCHED})
    with pytest.raises(ConfigError, match=r"^sft\.path: the contents differ"):
        check_inputs(path, {"sft.path": "digest"})  # of a file that sft.path names now


def test_other_extracted_rows_than_a_checkpoint_was_trained_on_are_refused(tmp_path: Path) -> None:
    trained = checkpoint(tmp_path, Provenance(inputs=INPUTS, extracted={**ROWS, **CHAINS}).to_json())
    check_extracted(trained, {}, tmp_path)
    check_extracted(trained, {**ROWS, **CHAINS}, tmp_path)
    for tables in (ROWS, CHAINS):
        ((name, table),) = tables.items()
        message = rf"/{table.name}\.parquet: the rows differ from those that .*step_000002 was trained with; put them"
        with pytest.raises(ConfigError, match=message):
            check_extracted(trained, {name: replace(table, digest="other")}, tmp_path)


def test_a_stage_that_had_not_read_the_rows_accepts_any(tmp_path: Path) -> None:
    check_extracted(checkpoint(tmp_path, {"sft.path": SEARCHED}), {**ROWS, **CHAINS}, tmp_path)


@pytest.mark.parametrize(
    ("before", "now", "message"),
    [(CHAINS, STEPS, "chains, found steps"), (STEPS, CHAINS, "steps, found chains")],
)
def test_chains_do_not_become_steps_within_a_stage(before: Any, now: Any, message: str, tmp_path: Path) -> None:
    trained = checkpoint(tmp_path, Provenance(inputs=INPUTS, extracted=before).to_json())
    with pytest.raises(
        ConfigError, match=rf"^objective\.preference\.pairs: .*step_000002 was trained on {message}; set"
    ):
        check_extracted(trained, now, tmp_path)


def test_another_reference_policy_is_refused(tmp_path: Path) -> None:
    path = checkpoint(tmp_path, {**INPUTS, "reference": "p0"})
    check_reference(path, Path("policy"), "p0")
    check_reference(None, Path("policy"), "p1")
    with pytest.raises(CheckpointError, match=r"^policy: expected the policy .* sha256 p0, found p1; restore"):
        check_reference(path, Path("policy"), "p1")


def test_a_checkpoint_without_a_reference_policy_accepts_any(tmp_path: Path) -> None:
    check_reference(checkpoint(tmp_path, INPUTS), Path("policy"), "p1")


# --- what the stage search was asked for ---


def after_search(stages: tuple[str, ...] = ("search", "sft", "preference"), **changes: Any) -> Config:
    return config(
        stages=list(stages), objective={"preference": {"weight": 1.0}, **changes.pop("objective", {})}, **changes
    )


def searched(stage: int, step: int, run_dir: Path) -> tuple[RunState, Path]:
    """A state and checkpoint of a run whose stage search was asked for the data of `after_search()`, of 9 prompts."""
    record = RunDirectory(run_dir).search_stage.stage_record
    record.parent.mkdir(parents=True, exist_ok=True)
    write_json(record, {"asked": extraction_request(after_search(), 9), "figures": {}})
    return replace(FRESH, stage=stage, step=step), run_dir / "checkpoints" / "step_000001"


@pytest.mark.parametrize(("stage", "step"), [(1, 1), (1, 100), (2, 1)])
def test_other_data_are_not_asked_for_once_a_stage_reads_them(tmp_path: Path, stage: int, step: int) -> None:
    start = searched(stage, step, tmp_path)
    check_extraction(after_search(), *start, 9)
    with pytest.raises(ConfigError, match=r"^extract\.chosen differs from what the stage search .*stage\.json\): "):
        check_extraction(after_search(extract={"chosen": "longest"}), *start, 9)
    with pytest.raises(ConfigError, match=r"^search\.prompts differs .*: expected 9, found 8; set it back"):
        check_extraction(after_search(), *start, 8)


def test_extraction_may_change_if_nothing_reads_it_or_it_is_still_to_come(tmp_path: Path) -> None:
    changed = after_search(extract={"chosen": "longest"})
    check_extraction(changed, *searched(0, 0, tmp_path), 8)  # the stage search is still to come
    check_extraction(changed, FRESH, None, 8)
    check_extraction(changed, *searched(2, 100, tmp_path), 8)  # the last stage has made all its steps
    stages = ("search", "preference", "online")
    trees = after_search(stages, extract={"chosen": "longest"}, search={"fraction": 0.5})
    check_extraction(trees, *searched(2, 1, tmp_path), 9)  # the online stage uses the trees of its own steps
    filed = {"preference": {"weight": 1.0, "source": "file"}}
    with pytest.raises(ConfigError, match=r"^extract\.chosen differs"):
        check_extraction(
            after_search(stages, extract={"chosen": "longest"}, objective=filed), *searched(2, 1, tmp_path), 9
        )
    paths = {"sft": {"path": "rows"}, "preference": {"path": "pairs"}}
    check_extraction(after_search(extract={"chosen": "longest"}, **paths), *searched(1, 1, tmp_path), 9)


@pytest.mark.parametrize("record", [{}, [], {"asked": 1}])
def test_a_damaged_record_of_the_stage_search_is_named(tmp_path: Path, record: Any) -> None:
    start = searched(1, 1, tmp_path)
    write_json(RunDirectory(tmp_path).search_stage.stage_record, record)
    with pytest.raises(CheckpointError, match=r"stage\.json: damaged; restore it"):
        check_extraction(after_search(), *start, 9)
