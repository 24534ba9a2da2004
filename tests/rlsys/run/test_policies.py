"""Which policy of a run is meant by a path, a stage or a step."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from exported_runs import write_run

from rlsys.errors import ConfigError, DamagedFileError
from rlsys.run.policies import find_run_policy


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
    assert chosen.folder == run / folder and chosen.run_dir == run and chosen.note == ""
    assert (chosen.stage, chosen.step, chosen.version) == position


def test_a_run_that_goes_on_gives_its_last_finished_stage_and_says_so(tmp_path: Path, policy: Path) -> None:
    run = write_run(tmp_path / "run", policy, finished=["warm_start"])
    chosen = find_run_policy(str(run))
    assert (chosen.stage, chosen.version) == ("warm_start", 3)
    assert chosen.note == (
        "stage online is not finished; checkpoints: step_000003, step_000007, step_000008; --step 8 chooses the last"
    )


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
        ("new", None, None, "expected a finished stage, found none; there are no checkpoints yet"),
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
    with pytest.raises(DamagedFileError, match=r"policy/config.json: expected sha256"):
        find_run_policy(str(run), step=7)
