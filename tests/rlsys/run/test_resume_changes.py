"""What may change between a run and its resume: fields of the config, rows of a step, the critic."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
from resumable_runs import INPUTS, config, save, start, state, store

from rlsys.config.files import apply_override, dump_config
from rlsys.config.schema import Config
from rlsys.errors import ConfigError
from rlsys.files import write_json
from rlsys.run.state import state_to_json
from rlsys.types import StageName


def test_changed_fields_are_listed(tmp_path: Path) -> None:
    save(tmp_path, 2)
    now = config(train={"max_steps": 500}, learner={"ranks": 1, "zero_stage": 0}, run__address="127.0.0.1:6379")
    beginning = start(tmp_path, now)
    assert beginning.changed == ("learner.ranks 2 -> 1", "learner.zero_stage 1 -> 0", "train.max_steps 80 -> 500")
    assert beginning.describe().endswith(
        "; changed: learner.ranks 2 -> 1, learner.zero_stage 1 -> 0, train.max_steps 80 -> 500"
    )
    assert start(tmp_path, config()).changed == ()


def test_the_config_before_a_change_is_kept(tmp_path: Path) -> None:
    save(tmp_path, 2)
    before = (tmp_path / "config.yaml").read_text(encoding="utf-8")
    for max_steps in (80, 500, 600):  # the first is no change, and nothing is trained between the others
        beginning = start(tmp_path, config(train={"max_steps": max_steps}))
        beginning.prepare_directory(tmp_path)
        (tmp_path / "config.yaml").write_text(dump_config(config(train={"max_steps": max_steps})), encoding="utf-8")
        assert len(list(tmp_path.glob("config.*_000002.yaml"))) == (max_steps > 80)
    assert (tmp_path / "config.until_000002.yaml").read_text(encoding="utf-8") == before


@pytest.mark.parametrize(
    ("changes", "field", "expected", "found"),
    [
        ({"run": {"dir": "unused", "seed": 4}}, "run.seed", "3", "4"),
        ({"model__path": "other/model"}, "model.path", "some/model", "other/model"),
        ({"task__max_length": 10}, "task.max_length", "9", "10"),
        ({"stages": ["online"]}, "stages", "['warm_start', 'online']", "['online']"),
        ({"task": {"type": "dataset", "path": "x"}}, "task.type", "letter_count", "dataset"),
        ({"model": {"from_scratch": {}}}, "model.path", "some/model", "null"),
    ],
)
def test_a_fixed_field_that_differs_is_named(
    changes: dict[str, Any], field: str, expected: str, found: str, tmp_path: Path
) -> None:
    save(tmp_path, 2)
    with pytest.raises(ConfigError) as caught:
        start(tmp_path, config(**changes))
    message = caught.value.message
    assert message.startswith(f"{field} differs from the run to be resumed ({tmp_path / 'config.yaml'})")
    assert f"expected {expected}, found {found}; set it back, or start another run with run.dir=runs/NEW" in message


def test_all_that_differ_are_named(tmp_path: Path) -> None:
    save(tmp_path, 2)
    with pytest.raises(ConfigError, match=r"task\.max_length differs .* \(also different: task\.chunk\)"):
        start(tmp_path, config(task={"type": "letter_count", "max_length": 10, "chunk": 2}))


def test_a_path_is_compared_with_its_own_run(tmp_path: Path) -> None:
    save(tmp_path / "a", 2)
    checkpoint = tmp_path / "a" / "checkpoints" / "step_000002"
    changed = config(str(checkpoint), task__max_length=10)
    with pytest.raises(ConfigError, match="max_length differs"):
        start(tmp_path / "b", changed)


def test_other_fields_may_change(tmp_path: Path) -> None:
    save(tmp_path, 2)
    changed = config(train={"max_steps": 500}, learner={"ranks": 1, "zero_stage": 0}, actors={"count": 1})
    assert start(tmp_path, changed).state == state(2)


FILED = {"preference": {"weight": 1.0, "source": "file"}}
IMITATING = {"sft": {"weight": 1.0, "source": "demonstrations"}}
ROWS = {"sft": {"path": "rows"}, "preference": {"path": "pairs"}}


@pytest.mark.parametrize(
    ("second", "objective", "field"),
    [
        ("warm_start", {}, "warm_start.rows_per_step"),
        ("sft", {}, "sft.rows_per_step"),
        ("preference", FILED, "preference.pairs_per_step"),
        ("online", FILED, "preference.pairs_per_step"),
        ("online", IMITATING, "objective.sft.rows_per_step"),
    ],
)
def test_the_rows_of_a_step_are_fixed_within_their_stage(
    second: StageName, objective: dict[str, Any], field: str, tmp_path: Path
) -> None:
    """Version 1 is step 0 of the second stage; version 4 is step 3."""
    stages = ["sft" if second == "warm_start" else "warm_start", second]
    sections: dict[str, Any] = {"stages": stages, "objective": objective, **ROWS}

    def changed(max_steps: int) -> Config:
        values = copy.deepcopy(sections)
        for override in (f"{field}=7", f"{'train' if second == 'online' else second}.max_steps={max_steps}"):
            apply_override(values, override)
        return config(**values)

    save(tmp_path, 4, of=config(**sections))
    with pytest.raises(ConfigError) as caught:
        start(tmp_path, changed(9))
    assert caught.value.message.startswith(
        f"{field} differs from the run to be resumed ({tmp_path / 'config.yaml'}), which is within stage {second}, at "
        "step 3: expected "
    )
    assert caught.value.message.endswith(", found 7; set it back, or start another run with run.dir=runs/NEW")
    assert start(tmp_path, changed(3)).state == state(4)  # the stage has made all its steps and takes no more rows
    save(tmp_path / "before", 1, of=config(**sections))
    assert start(tmp_path / "before", changed(9)).state == state(1)


def test_rows_per_step_are_fixed_only_if_the_stage_takes_rows_before_and_now(tmp_path: Path) -> None:
    save(tmp_path, 4, of=config(**ROWS))  # within stage online
    for changes in ({"sft": {"rows_per_step": 7}}, {"objective": IMITATING}):
        assert start(tmp_path, config(**changes)).state == state(4)
    save(tmp_path / "imitating", 4, of=config(objective=IMITATING))
    assert start(tmp_path / "imitating", config()).state == state(4)


CRITIC = {"policy": {"estimator": "gae"}, "value": {"weight": 1.0}}


@pytest.mark.parametrize("resume", ["auto", "path"])
def test_a_critic_cannot_begin_within_the_online_stage(tmp_path: Path, resume: str) -> None:
    save(tmp_path, 2)  # after step 1 of the stage online
    checkpoint = tmp_path / "checkpoints" / "step_000002"
    now = config("auto" if resume == "auto" else str(checkpoint), objective=CRITIC)
    expected = (
        r"^objective\.value\.weight and objective\.policy\.estimator gae need a critic, and .*step_000002 has none: "
        r"the first 1 steps of stage online were made without one; set both back, .*model\.path .*step_000002/policy$"
    )
    with pytest.raises(ConfigError, match=expected):
        start(tmp_path, now)
    # The stage has made all its steps, so it needs no critic.
    assert start(tmp_path, config(now.run.resume, objective=CRITIC, train={"max_steps": 1})).state == state(2)
    store(tmp_path).discard(checkpoint)
    save(tmp_path, 1)  # step 0 of the stage, which then begins with a critic
    assert start(tmp_path, config(objective=CRITIC)).state == state(1)


def test_a_checkpoint_with_a_critic_goes_on_with_and_without_it(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(dump_config(config()))
    temporary = store(tmp_path).begin("step_000002")
    write_json(temporary / "state.json", state_to_json(state(2)))
    (temporary / "critic").mkdir()
    (temporary / "critic" / "config.json").write_text("{}")
    store(tmp_path).commit(temporary, "step_000002", {"weight_version": 2, "inputs": INPUTS})
    assert start(tmp_path, config(objective=CRITIC)).state == start(tmp_path, config()).state == state(2)


def test_stages_that_follow_those_of_the_run_begin_with_its_policy(tmp_path: Path) -> None:
    save(tmp_path, 2, of=config(stages=["warm_start"]))
    with pytest.raises(ConfigError) as caught:
        start(tmp_path, config(stages=["warm_start", "online"]))
    policy = tmp_path / "stages" / "warm_start"
    assert caught.value.message.startswith("stages differs from the run to be resumed ")
    assert caught.value.message.endswith(f"run.dir=runs/NEW with stages=[online] model={{path: {policy}}}")
    with pytest.raises(ConfigError, match="run.dir=runs/NEW$"):
        start(tmp_path, config(stages=["online"]))
