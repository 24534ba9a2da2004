"""The start of a run, for every value of run.resume."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

import pytest

from rlsys.config.files import apply_override, dump_config, parse_config
from rlsys.config.schema import Config
from rlsys.errors import CheckpointError, ConfigError
from rlsys.files import write_json
from rlsys.run.checkpoints import CheckpointStore
from rlsys.run.resume import Start, find_newest_start, find_start
from rlsys.run.state import state_to_json
from rlsys.types import RunState, StageName

INPUTS = {"task.path": "d1", "model.path": "d2", "tokenizer": "d3"}
FRESH = RunState(stage=0, step=0, weight_version=0, cursor=0)


def config(resume: str = "auto", **changes: Any) -> Config:
    values: dict[str, Any] = {
        "run": {"dir": "unused", "resume": resume, "seed": 3},
        "model": {"path": "some/model"},
        "task": {"type": "letter_count", "max_length": 9},
    }
    for path, value in changes.items():
        section, _, key = path.partition("__")
        values[section] = {**values.get(section, {}), key: value} if key else value
    return parse_config(values, "test")


def store(run_dir: Path) -> CheckpointStore:
    return CheckpointStore(run_dir / "checkpoints", keep_last=9)


def state(version: int) -> RunState:
    return RunState(stage=1, step=version - 1, weight_version=version, cursor=4, in_flight=(2, 3))


def save(run_dir: Path, *versions: int, of: Config | None = None) -> None:
    """Write the run directory of a run with checkpoints of these versions.

    Args:
        of: the config of the run; by default `config()`.
    """
    run_dir.mkdir(exist_ok=True)
    (run_dir / "config.yaml").write_text(dump_config(of or config()))
    for version in versions:
        name = f"step_{version:06d}"
        temporary = store(run_dir).begin(name)
        write_json(temporary / "state.json", state_to_json(state(version)))
        store(run_dir).commit(temporary, name, {"weight_version": version, "inputs": INPUTS})


def start(run_dir: Path, now: Config) -> Start:
    return find_start(now, run_dir, store(run_dir))


def begin(run_dir: Path, now: Config) -> Start:
    """Find the start of a run and settle it."""
    run_dir.mkdir(exist_ok=True)
    beginning = start(run_dir, now)
    beginning.prepare_directory(run_dir)
    return beginning


@pytest.mark.parametrize("resume", ["auto", "never"])
def test_an_empty_directory_starts_from_the_model(resume: str, tmp_path: Path) -> None:
    beginning = start(tmp_path, config(resume))
    assert beginning == Start(FRESH, None)
    assert beginning.describe() == "starting from the initial model"


def test_auto_continues_from_the_newest_checkpoint(tmp_path: Path) -> None:
    save(tmp_path, 2, 5)
    beginning = start(tmp_path, config())
    assert beginning == Start(state(5), tmp_path / "checkpoints" / "step_000005")
    assert "step_000005 (weight version 5)" in beginning.describe()


def test_auto_skips_a_damaged_checkpoint_and_never_starts_over_silently(tmp_path: Path) -> None:
    save(tmp_path, 2, 5)
    (tmp_path / "checkpoints" / "step_000005" / "state.json").write_text("{}")
    assert start(tmp_path, config()).state == state(2)
    (tmp_path / "checkpoints" / "step_000002" / "state.json").write_text("{}")
    with pytest.raises(CheckpointError, match="none of the 2 checkpoints is valid"):
        start(tmp_path, config())


@pytest.mark.parametrize("resume", ["auto", "never"])
def test_a_run_that_lost_its_learner_continues_from_its_newest_checkpoint(resume: str, tmp_path: Path) -> None:
    begin(tmp_path, config(resume))
    save(tmp_path)
    (tmp_path / "metrics.jsonl").write_text("")
    assert find_newest_start(config(resume), tmp_path, store(tmp_path)) == Start(FRESH, None)
    save(tmp_path, 5, 9)
    beginning = find_newest_start(config(resume), tmp_path, store(tmp_path))
    assert beginning.state == state(9) and not beginning.named


def test_a_branched_run_continues_from_the_named_checkpoint_and_then_from_its_own(tmp_path: Path) -> None:
    save(tmp_path / "a", 5)
    named = config(str(tmp_path / "a" / "checkpoints" / "step_000005"))
    begin(tmp_path / "b", named)
    save(tmp_path / "b")
    assert find_newest_start(named, tmp_path / "b", store(tmp_path / "b")).state == state(5)
    save(tmp_path / "b", 7)
    assert find_newest_start(named, tmp_path / "b", store(tmp_path / "b")).state == state(7)


def test_never_refuses_a_used_directory(tmp_path: Path) -> None:
    save(tmp_path / "a", 2)
    with pytest.raises(ConfigError, match=r"run\.resume is never"):
        start(tmp_path / "a", config("never"))
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(ConfigError, match=r"choose another run\.dir"):
        start(tmp_path, config("never"))


def test_a_path_names_the_beginning_of_a_run_and_the_same_command_continues_it(tmp_path: Path) -> None:
    save(tmp_path / "a", 2, 5)
    (tmp_path / "a" / "stages" / "warm_start").mkdir(parents=True)
    earlier = tmp_path / "a" / "checkpoints" / "step_000002"
    command = config(str(earlier))
    assert start(tmp_path / "b", command) == Start(state(2), earlier, named=True)
    assert not (tmp_path / "b").exists(), "nothing is changed before the start is accepted"
    (tmp_path / "b" / "stages" / "online").mkdir(parents=True)  # from an unrelated run
    begin(tmp_path / "b", command)
    assert [path.name for path in (tmp_path / "b" / "stages").iterdir()] == ["warm_start"]
    (tmp_path / "b" / "metrics.jsonl").write_text("")  # killed before its first own checkpoint
    assert begin(tmp_path / "b", command) == Start(state(2), earlier, named=True)
    save(tmp_path / "b", 3, 4)
    shutil.rmtree(tmp_path / "a")  # no longer needed
    assert start(tmp_path / "b", command) == Start(state(4), tmp_path / "b" / "checkpoints" / "step_000004")


def test_a_path_is_refused_in_the_directory_of_another_run(tmp_path: Path) -> None:
    save(tmp_path / "a", 2)
    save(tmp_path / "b", 7)
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "metrics.jsonl").write_text("")
    path = str(tmp_path / "a" / "checkpoints" / "step_000002")
    for name in ("b", "c"):
        with pytest.raises(ConfigError, match=rf"run\.dir {tmp_path / name} holds another run; .* new run\.dir"):
            start(tmp_path / name, config(path))
        assert not (tmp_path / name / "resumed_from.json").exists()


def test_a_path_within_the_run_directory_is_refused_while_there_are_newer_ones(tmp_path: Path) -> None:
    save(tmp_path, 2, 5)
    (tmp_path / "metrics.jsonl").write_text("")
    path = tmp_path / "checkpoints" / "step_000002"
    with pytest.raises(ConfigError, match=r"step_000005 is newer; move the newer ones out of .*/checkpoints, or"):
        start(tmp_path, config(str(path)))
    (tmp_path / "checkpoints" / "step_000005").rename(tmp_path / "step_000005")
    (tmp_path / "stages" / "warm_start").mkdir(parents=True)
    assert begin(tmp_path, config(str(path))) == Start(state(2), path, named=True)
    assert (tmp_path / "stages" / "warm_start").is_dir()
    save(tmp_path, 3)  # the run continues from here, even if retention has removed the first checkpoint
    shutil.rmtree(path)
    assert start(tmp_path, config(str(path))).state == state(3)


def test_a_run_that_began_anew_descends_from_no_path(tmp_path: Path) -> None:
    save(tmp_path / "a", 2)
    path = str(tmp_path / "a" / "checkpoints" / "step_000002")
    begin(tmp_path / "b", config(path))
    assert start(tmp_path / "b", config()) == Start(FRESH, None)
    assert (tmp_path / "b" / "resumed_from.json").exists(), "asking alone forgets nothing"
    begin(tmp_path / "b", config())
    save(tmp_path / "b", 1)
    with pytest.raises(ConfigError, match="holds another run"):
        start(tmp_path / "b", config(path))


def test_the_end_of_another_run_leaves_nothing_to_do(tmp_path: Path) -> None:
    save(tmp_path / "a", 9)  # online, step 8
    path = str(tmp_path / "a" / "checkpoints" / "step_000009")
    message = r"^run\.resume: .* has made all 8 steps of the last stage; raise train\.max_steps \(now 8\)$"
    with pytest.raises(ConfigError, match=message):
        start(tmp_path / "b", config(path, train={"max_steps": 8}))
    assert start(tmp_path / "b", config(path, train={"max_steps": 9})).state == state(9)
    assert start(tmp_path / "a", config(path, train={"max_steps": 8})).state == state(9)  # the run itself is complete


def test_a_path_is_relative_to_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path / "a", 2)
    monkeypatch.chdir(tmp_path)
    checkpoint = start(tmp_path / "b", config("a/checkpoints/step_000002")).checkpoint
    assert checkpoint == tmp_path / "a" / "checkpoints" / "step_000002"


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("nowhere", "no such folder$"),
        ("always", "no such folder$"),
        ("file", "a file$"),
        ("empty", r"a folder without MANIFEST\.json$"),
        ("a", r"a folder without MANIFEST\.json; did you mean .*/a/checkpoints/step_000002\?$"),
        ("a/checkpoints", r"a folder without MANIFEST\.json; did you mean .*/a/checkpoints/step_000002\?$"),
    ],
)
def test_a_path_that_is_no_checkpoint(path: str, reason: str, tmp_path: Path) -> None:
    save(tmp_path / "a", 1, 2)
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    expected = r"expected auto, never or the folder of a checkpoint, RUN_DIR/checkpoints/step_N, found "
    with pytest.raises(ConfigError, match=rf"^run\.resume {tmp_path / path}: {expected}{reason}"):
        start(tmp_path / "b", config(str(tmp_path / path)))


def test_a_path_of_a_damaged_checkpoint(tmp_path: Path) -> None:
    save(tmp_path / "a", 2)
    path = tmp_path / "a" / "checkpoints" / "step_000002"
    (path / "state.json").write_text("{}")
    message = rf"^run\.resume: {path}/state\.json: expected \d+ bytes, found 2; choose another checkpoint, or restore"
    with pytest.raises(ConfigError, match=message):
        start(tmp_path / "b", config(str(path)))


@pytest.mark.parametrize("resume", ["auto", "never"])
def test_folders_of_others_among_the_checkpoints_are_refused_and_stay(tmp_path: Path, resume: str) -> None:
    """They would count as damaged checkpoints, which the next save removes."""
    save(tmp_path, 2)
    (tmp_path / "checkpoints" / "step_000009").mkdir()  # damaged, but with the name of a checkpoint
    (tmp_path / "checkpoints" / "step_000002.pinned").write_text("")
    assert start(tmp_path, config()).state == state(2)
    foreign = tmp_path / "checkpoints" / "checkpoint-500"
    foreign.mkdir()
    (foreign / "optimizer.pt").write_text("")
    message = (
        rf"^run\.dir {tmp_path}: expected checkpoints of rlsys alone in {foreign.parent}, found the folder "
        r"checkpoint-500 without a MANIFEST\.json; move it away, or choose another run\.dir$"
    )
    with pytest.raises(ConfigError, match=message):
        start(tmp_path, config(resume))
    assert (foreign / "optimizer.pt").exists()


@pytest.mark.parametrize("text", [None, "run: [", "run: {dir: x, speed: 2}"])
def test_a_run_without_a_usable_config_cannot_be_resumed(tmp_path: Path, text: str | None) -> None:
    save(tmp_path, 2)
    path = tmp_path / "config.yaml"
    path.unlink() if text is None else path.write_text(text)
    message = rf"^run\.dir or run\.resume: {tmp_path} cannot be resumed without its config\.yaml: .*; restore it, or"
    with pytest.raises(ConfigError, match=message):
        start(tmp_path, config())


@pytest.mark.parametrize("text", ["[]", "{}"])
def test_a_damaged_resumed_from_file_is_named(tmp_path: Path, text: str) -> None:
    save(tmp_path / "a", 2)
    begin(tmp_path / "b", config(str(tmp_path / "a" / "checkpoints" / "step_000002")))
    (tmp_path / "b" / "resumed_from.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"resumed_from\.json: damaged: expected a checkpoint; restore it"):
        start(tmp_path / "b", config(str(tmp_path / "a" / "checkpoints" / "step_000002")))


def test_changed_fields_are_listed(tmp_path: Path) -> None:
    save(tmp_path, 2)
    now = config(train={"max_steps": 500}, learner={"ranks": 1, "zero_stage": 0}, run__address="127.0.0.1:6379")
    beginning = start(tmp_path, now)
    assert beginning.changed == ("learner.ranks 2 -> 1", "learner.zero_stage 1 -> 0", "train.max_steps 80 -> 500")
    assert beginning.describe().endswith(
        "; changed: learner.ranks 2 -> 1, learner.zero_stage 1 -> 0, train.max_steps 80 -> 500"
    )
    assert start(tmp_path, config()).changed == ()


@pytest.mark.parametrize(
    ("changes", "field", "expected", "found"),
    [
        ({"run": {"dir": "unused", "seed": 4}}, "run.seed", "3", "4"),
        ({"model__path": "other/model"}, "model.path", "some/model", "other/model"),
        ({"task__max_length": 10}, "task.max_length", "9", "10"),
        ({"stages": ["online"]}, "stages", "['warm_start', 'online']", "['online']"),
        ({"task": {"type": "dataset", "path": "x"}}, "task.type", "letter_count", "dataset"),
        ({"model": {"from_scratch": {}}}, "model.path", "some/model", "None"),
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
    assert f"expected {expected}, found {found}; set it back, or start a new run.dir" in message


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
    assert caught.value.message.endswith(", found 7; set it back, or start a new run.dir")
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


def test_the_directory_of_a_search_is_refused(tmp_path: Path) -> None:
    write_json(tmp_path / "search.json", {})
    assert start(tmp_path, config()).checkpoint is None  # the search has no trees
    (tmp_path / "trees").mkdir()
    (tmp_path / "trees" / "00000.jsonl").write_text("")
    with pytest.raises(ConfigError, match="holds the trees of a search: choose another run.dir"):
        start(tmp_path, config())
