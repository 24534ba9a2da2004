"""Models and tasks that `rlsys evaluate` is asked for."""

from __future__ import annotations

import json
import os
import shutil
import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from rlsys.commands import evaluation_targets as targets
from rlsys.commands.evaluation_targets import find_target, find_tasks, split_arguments
from rlsys.config.files import dump_config, parse_config
from rlsys.errors import ConfigError, DamagedFileError
from rlsys.files import write_json
from rlsys.run.checkpoints import CheckpointStore
from rlsys.run.lock import RunLock
from rlsys.run.manifest import read_manifest, render_manifest
from rlsys.run.state import state_to_json
from rlsys.types import RunState

VALUES: dict[str, Any] = {
    "run": {"dir": "unused", "seed": 5},
    "model": {"path": "unused"},
    "task": {"type": "letter_count"},
    "evaluation": {"prompts": 8},
}


def make_run(folder: Path, **sections: Any) -> Path:
    """Make a run directory with two checkpoints and an exported policy."""
    store = CheckpointStore(folder / "checkpoints", 2)
    for version in (1, 2):
        temporary = store.begin(f"step_00000{version}")
        (temporary / "policy").mkdir()
        (temporary / "policy" / "config.json").write_text("{}")
        state = RunState(stage=1, step=version, weight_version=version, cursor=0)
        write_json(temporary / "state.json", state_to_json(state))
        store.commit(temporary, f"step_00000{version}", {"weight_version": version})
    (folder / "stages" / "online").mkdir(parents=True)
    (folder / "stages" / "online" / "config.json").write_text("{}")
    (folder / "config.yaml").write_text(dump_config(parse_config(VALUES | sections, "test")))
    return folder


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return make_run(tmp_path / "run")


def set_schema(checkpoint: Path, schema: int) -> None:
    body = {**read_manifest(checkpoint), "schema": schema}
    (checkpoint / "MANIFEST.json").write_text(render_manifest(body))


def test_models_and_overrides_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lr=3").mkdir()
    arguments = ["runs/a/", "evaluation.samples=2", "Qwen/Qwen2.5", "runs/a_b.c/x=1", "task={type: sums}", "lr=3"]
    models = ["runs/a", "Qwen/Qwen2.5", "runs/a_b.c/x=1", "lr=3"]
    assert split_arguments(arguments) == (models, ["evaluation.samples=2", "task={type: sums}"])
    with pytest.raises(ConfigError, match="found only overrides"):
        split_arguments(["run.seed=1"])
    with pytest.raises(ConfigError, match="^a is given 2 times; name every model once$"):
        split_arguments(["a", "b", "a/"])


@pytest.mark.parametrize(
    ("target", "policy"),
    [
        ("", "stages/online"),
        ("checkpoints/step_000001", "checkpoints/step_000001/policy"),
        ("checkpoints/step_000001/policy", "checkpoints/step_000001/policy"),
        ("stages/online", "stages/online"),
    ],
)
def test_every_folder_of_a_run_with_a_policy_can_be_evaluated(run: Path, target: str, policy: str) -> None:
    found_target = find_target(str(run / target))
    assert (found_target.policy, found_target.config) == (run / policy, run / "config.yaml")
    [task] = find_tasks([found_target], None, [], ["evaluation.samples=7"])
    assert (task.name, task.config.run.seed, task.config.evaluation.samples) == ("letter_count", 5, 7)


def test_the_chosen_policy_of_an_unfinished_run_is_named(run: Path) -> None:
    shutil.rmtree(run / "stages")
    target, chosen = find_target(str(run)), f"{run}: policy of checkpoint step_000002; stage online is"
    assert (target.policy, target.note) == (run / "checkpoints/step_000002/policy", f"{chosen} not finished")
    with RunLock(run):
        assert find_target(str(run)).note == f"{chosen} being trained"
    # A killed run leaves the record of its owner behind.
    (run / "lock").write_text(json.dumps({"pid": os.getpid() + 2**30, "host": socket.gethostname()}))
    assert find_target(str(run)).note == f"{chosen} not finished"


def test_a_run_without_a_policy(run: Path) -> None:
    for folder in ("checkpoints", "stages"):
        shutil.rmtree(run / folder)
    message = "the run has no policy yet, neither a checkpoint nor a finished stage"
    with pytest.raises(ConfigError, match=f"{message}$"):
        find_target(str(run))
    with RunLock(run), pytest.raises(ConfigError, match=f"{message}; it is being trained$"):
        find_target(str(run))


def test_a_format_of_a_newer_version_is_named(run: Path) -> None:
    shutil.rmtree(run / "stages")
    newest, older = run / "checkpoints" / "step_000002", run / "checkpoints" / "step_000001"
    set_schema(newest, 2)
    with pytest.raises(DamagedFileError, match="expected schema 1, found 2 of a newer rlsys; restore"):
        find_target(str(newest))
    target = find_target(str(run))
    assert target.policy == older / "policy"
    assert "checkpoint skipped" in target.note and "of a newer rlsys" in target.note
    set_schema(older, 2)
    with pytest.raises(DamagedFileError, match="no checkpoint is valid.*of a newer rlsys.*restore one"):
        find_target(str(run))


def test_a_damaged_checkpoint_has_a_remedy(run: Path) -> None:
    checkpoint = run / "checkpoints" / "step_000002"
    file = checkpoint / "policy" / "config.json"
    file.write_bytes(bytes(reversed(file.read_bytes())))
    with pytest.raises(DamagedFileError, match=r"expected sha256 .*; choose another checkpoint, or restore"):
        find_target(str(checkpoint))


def test_a_folder_elsewhere_needs_a_config(run: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere" / "model"
    elsewhere.mkdir(parents=True)
    with pytest.raises(ConfigError, match="expected a run directory, a checkpoint or a model folder, found neither"):
        find_target(str(elsewhere))
    with pytest.raises(ConfigError, match="nothing: no such folder"):
        find_target(str(elsewhere / "nothing"))
    (elsewhere / "config.json").write_text("{}")
    target = find_target(str(elsewhere))
    assert (target.policy, target.config) == (elsewhere, None)
    with pytest.raises(ConfigError, match="needs --config or --task"):
        find_tasks([target], None, [], [])
    assert find_tasks([target], str(run / "config.yaml"), [], [])[0].config.run.seed == 5
    assert find_tasks([target, find_target(str(run))], None, [], [])[0].config.run.seed == 5  # of the other model


def test_hub_ids_and_folders_of_the_cache_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cached = tmp_path / "models--org--name"
    (cached / "snapshots" / "abc").mkdir(parents=True)
    monkeypatch.setattr(targets, "given_model", lambda name, _field: SimpleNamespace(path=Path("got", name)))
    assert find_target("org/name").policy == Path("got/org/name")
    assert find_target(str(cached)).policy == Path("got", str(cached))


def write(path: Path, values: Any) -> str:
    path.write_text(yaml.safe_dump(values))
    return str(path)


def test_task_files_are_sections_or_configs(run: Path, tmp_path: Path) -> None:
    section = write(tmp_path / "short.yaml", {"type": "sums", "max_terms": 2})
    other = write(tmp_path / "other.yaml", {**VALUES, "run": {"dir": "x", "seed": 9}, "sampling": {"max_tokens": 7}})
    tasks = find_tasks([find_target(str(run))], None, [section, other], ["evaluation.prompts=3"])
    assert [task.name for task in tasks] == ["letter_count", "short", "other"]
    assert [task.config.task.type for task in tasks] == ["letter_count", "sums", "letter_count"]
    assert [task.config.run.seed for task in tasks] == [5, 5, 9]
    assert [task.config.sampling.max_tokens for task in tasks] == [160, 160, 7]
    assert [task.config.evaluation.prompts for task in tasks] == [3, 3, 3]


def test_a_task_file_is_enough_for_a_model_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    [task] = find_tasks([find_target(str(tmp_path))], None, [write(tmp_path / "s.yaml", {"type": "sums"})], [])
    assert (task.name, task.config.task.type) == ("s", "sums")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"sampling": {}}, "expected a section task, or its keys, found sampling"),
        ({"type": "sums", "size": 3}, "task.sums.size: unknown key|task.size: unknown key"),
        ([1], "expected a mapping of sections, found a list"),
    ],
)
def test_a_bad_task_file_is_named(run: Path, tmp_path: Path, values: Any, message: str) -> None:
    path = write(tmp_path / "bad.yaml", values)
    with pytest.raises(ConfigError, match=f"bad.yaml: ({message})"):
        find_tasks([find_target(str(run))], None, [path], [])


def test_tasks_need_different_names(run: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "letter_count.yaml", {"type": "sums"})
    with pytest.raises(ConfigError, match="^2 tasks are named letter_count; give each --task file a name of its own$"):
        find_tasks([find_target(str(run))], None, [path], [])
    with pytest.raises(ConfigError, match="missing.yaml: cannot be read"):
        find_tasks([find_target(str(run))], None, [str(tmp_path / "missing.yaml")], [])


@pytest.mark.parametrize(
    ("sections", "refused"),
    [
        ({}, False),
        ({"sampling": {"max_tokens": 50}}, False),  # the config of the first model counts
        ({"task": {"type": "letter_count", "error_rate": 0.5}}, False),  # decides demonstrations, not problems
        ({"task": {"type": "letter_count", "max_length": 20}}, True),
        ({"task": {"type": "sums"}}, True),
        ({"run": {"dir": "unused", "seed": 6}}, True),
    ],
)
def test_runs_with_other_problems_are_not_compared(
    run: Path, tmp_path: Path, sections: dict[str, Any], refused: bool
) -> None:
    other = make_run(tmp_path / "other", **sections)
    both = [find_target(str(run)), find_target(str(other))]
    if not refused:
        assert len(find_tasks(both, None, [], [])) == 1
        return
    with pytest.raises(ConfigError, match="other: its run has other held-out problems than .*; name the config"):
        find_tasks(both, None, [], [])
    assert len(find_tasks(both, str(run / "config.yaml"), [], [])) == 1


@pytest.mark.parametrize(
    ("sections", "key", "name", "remedy"),
    [
        ({"task": {"type": "dataset", "path": "additions.jsonl"}}, "task.path", "additions.jsonl", "task.path=/abs"),
        (
            {"rewards": {"functions": [{"fn": "format"}, {"fn": "mine.py:short"}]}},
            *("rewards.functions.1.fn", "mine.py", r"rewards.functions=\[...\] with absolute"),
        ),
    ],
)
def test_relative_paths_of_a_run_are_named_with_its_config_and_the_folder_that_was_searched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sections: dict[str, Any], key: str, name: str, remedy: str
) -> None:
    run = make_run(tmp_path / "run", **sections)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    found = f"^{key} {name} in {run / 'config.yaml'}: no such file in the current folder {tmp_path / 'elsewhere'}; "
    with pytest.raises(ConfigError, match=f"{found}.* the run's first command, or give {remedy}"):
        find_tasks([find_target(str(run))], None, [], [])
    override = "task.path=/data.jsonl" if key == "task.path" else "rewards.functions=[{fn: /mine.py:short}]"
    assert find_tasks([find_target(str(run))], None, [], [override])
    Path(name).touch()
    assert find_tasks([find_target(str(run))], None, [], [])
