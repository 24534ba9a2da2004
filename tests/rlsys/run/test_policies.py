"""Which policy of a run is meant by a path, a stage or a step."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from exported_runs import write_run

from rlsys.commands.evaluation_targets import find_target
from rlsys.errors import ConfigError, DamagedFileError
from rlsys.run.policies import find_run_policy
from rlsys.run.resume import Start
from rlsys.run.state import read_state
from rlsys.types import RunState


@pytest.fixture
def policy(tmp_path: Path) -> Path:
    folder = tmp_path / "policy"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    return folder


@pytest.mark.parametrize(
    ("target", "stage", "step", "folder", "position"),
    [
        ("", None, None, "stages/online", ("online", 5, 8)),
        ("", "warm_start", None, "stages/warm_start", ("warm_start", 3, 3)),
        ("", None, 7, "checkpoints/step_000007/policy", ("online", 4, 7)),
        ("", None, 3, "checkpoints/step_000003/policy", ("warm_start", 3, 3)),
        ("checkpoints/step_000007", None, None, "checkpoints/step_000007/policy", ("online", 4, 7)),
        ("checkpoints/step_000007/policy", None, None, "checkpoints/step_000007/policy", ("online", 4, 7)),
        ("stages/warm_start", None, None, "stages/warm_start", ("warm_start", 3, 3)),
    ],
)
def test_every_policy_of_a_run_can_be_chosen(
    tmp_path: Path, policy: Path, target: str, stage: str | None, step: int | None, folder: str, position: object
) -> None:
    run = write_run(tmp_path / "run", policy)
    chosen = find_run_policy(str(run / target), stage, step)
    note = "" if target or stage or step else f"{run}: policy of the finished stage online"
    assert chosen.folder == run / folder and chosen.run_dir == run and chosen.note == note
    assert (chosen.stage, chosen.step, chosen.version) == position


def test_a_run_stands_for_its_newest_complete_policy(tmp_path: Path, policy: Path) -> None:
    run = write_run(tmp_path / "run", policy, finished=["warm_start"])
    chosen = find_run_policy(str(run))
    assert chosen.folder == run / "checkpoints/step_000008/policy"
    assert (chosen.stage, chosen.step, chosen.version) == ("online", 5, 8)
    assert chosen.note == f"{run}: policy of checkpoint step_000008; stage online is not finished"
    (run / "checkpoints/step_000008/policy/config.json").write_text("[]")
    chosen = find_run_policy(str(run))
    assert chosen.version == 7 and "checkpoint skipped: " in chosen.note
    for step in (7, 8):
        shutil.rmtree(run / f"checkpoints/step_00000{step}")
    chosen = find_run_policy(str(run))
    assert (chosen.folder, chosen.stage, chosen.version) == (run / "stages/warm_start", "warm_start", 3)
    assert chosen.note == f"{run}: policy of the finished stage warm_start"


def test_export_and_evaluate_choose_the_same_policy(tmp_path: Path, policy: Path) -> None:
    finished = write_run(tmp_path / "finished", policy)
    unfinished = write_run(tmp_path / "unfinished", policy, finished=["warm_start"])
    for target in (finished, unfinished, unfinished / "stages/warm_start", unfinished / "checkpoints/step_000007"):
        place, exported = find_target(str(target)), find_run_policy(str(target))
        assert (place.policy, place.note) == (exported.folder, exported.note)


@pytest.mark.parametrize(("step", "copied"), [(3, []), (7, ["warm_start"])])
def test_a_branch_has_no_policy_of_the_stages_after_its_checkpoint(
    tmp_path: Path, policy: Path, step: int, copied: list[str]
) -> None:
    run, branch = write_run(tmp_path / "run", policy), tmp_path / "branch"
    for stage in ("warm_start", "online"):
        (run / "stages" / f"{stage}.references.json").write_text("{}")
    checkpoint = run / "checkpoints" / f"step_00000{step}"
    start = Start(read_state(checkpoint / "state.json"), checkpoint, named=True)
    branch.mkdir()
    start.prepare_directory(branch)
    (branch / "config.yaml").write_bytes((run / "config.yaml").read_bytes())
    scores = ["warm_start.references.json", *(["online.references.json"] if step == 7 else [])]
    assert sorted(path.name for path in (branch / "stages").iterdir()) == sorted([*copied, *scores])
    if not copied:
        with pytest.raises(ConfigError, match="the run has no policy yet"):
            find_run_policy(str(branch))
    else:
        assert find_run_policy(str(branch)).stage == "warm_start"


def test_a_branch_keeps_the_trees_that_its_stage_has_so_far(tmp_path: Path, policy: Path) -> None:
    run, branch = write_run(tmp_path / "run", policy, stages=["warm_start", "search", "sft"]), tmp_path / "branch"
    trees = run / "stages" / "search" / "trees"
    trees.mkdir(parents=True)
    for stage, kept in ((0, False), (1, True)):
        shutil.rmtree(branch, ignore_errors=True)
        branch.mkdir()
        state = RunState(stage=stage, step=0, weight_version=3, cursor=0)
        Start(state, run / "checkpoints" / "step_000003", named=True).prepare_directory(branch)
        assert (branch / "stages" / "search" / "trees").is_dir() is kept


def test_a_search_has_no_policy(tmp_path: Path, policy: Path) -> None:
    run = write_run(tmp_path / "run", policy, finished=[])
    shutil.rmtree(run / "checkpoints")
    (run / "search.json").write_text("{}")
    with pytest.raises(ConfigError, match="a run of `rlsys search` has trees and no policy; give the model folder"):
        find_run_policy(str(run))


def test_without_metrics_the_weight_version_of_a_stage_is_unknown(tmp_path: Path, policy: Path) -> None:
    run = write_run(tmp_path / "run", policy)
    (run / "metrics.jsonl").unlink()
    assert find_run_policy(str(run)).version is None
    assert find_run_policy(str(run), step=8).version == 8


@pytest.mark.parametrize(
    ("target", "stage", "step", "message"),
    [
        ("run", "search", None, "expected a finished stage search, found warm_start; checkpoints: step_000003, "),
        ("run", "online", None, "expected a finished stage online, found warm_start; checkpoints: step_000003, "),
        ("run", None, 4, "--step 4: the run has no "),
        ("run", "online", 7, "expected one of them, found both"),
        ("policy", None, None, "expected a run directory, one of its checkpoints, or a policy folder of its stages"),
        ("run/stages", None, None, "found no config.yaml of a run in or above it"),
        ("nowhere", None, None, "found no such folder"),
        ("run/checkpoints/step_000003", None, 3, "--stage and --step choose from a run directory, found none"),
        ("new", None, None, "new: the run has no policy yet, neither a checkpoint nor a finished stage"),
    ],
)
def test_what_is_not_there_is_refused_in_one_line(
    tmp_path: Path, policy: Path, target: str, stage: str | None, step: int | None, message: str
) -> None:
    run = write_run(tmp_path / "run", policy, finished=["warm_start"])
    (tmp_path / "new").mkdir()
    shutil.copy(run / "config.yaml", tmp_path / "new")
    with pytest.raises(ConfigError) as caught:
        find_run_policy(str(tmp_path / target), stage, step)
    assert message in caught.value.message and "\n" not in caught.value.message


def test_a_damaged_policy_is_refused_and_a_damaged_optimizer_state_is_not_read(tmp_path: Path, policy: Path) -> None:
    run = write_run(tmp_path / "run", policy)
    (run / "checkpoints/step_000007/learner/learner.json").write_text("damaged")
    assert find_run_policy(str(run), step=7).version == 7
    (run / "checkpoints/step_000007/policy/config.json").write_text("[]")
    with pytest.raises(DamagedFileError, match=r"policy/config.json: expected sha256 .*; choose another checkpoint"):
        find_run_policy(str(run), step=7)
