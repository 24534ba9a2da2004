"""`rlsys show`: some rollouts of a step."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import fakes
import pytest
from minimal_config import minimal_with
from rich.console import Console
from tree_samples import golden
from viewed_run import step_record, write_rollouts

from rlsys.commands.show import run
from rlsys.config.files import dump_config
from rlsys.errors import ConfigError, DamagedFileError, EngineError
from rlsys.run.journal import Journal
from rlsys.run.lock import RunLock
from rlsys.run.rollout_files import RolloutLog
from rlsys.search.tree_json import tree_line


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    log = RolloutLog(tmp_path, -1, 2, lambda ids: f"{len(ids)} tokens\n")
    for version, rewards in ((301, (0.5, 0.0, 1.0)), (302, (0.25, 0.75, 0.5))):
        groups = [fakes.group(fakes.prompt(f"p{number}"), rewards=rewards) for number in range(2)]
        log.write(version, step_record(log, groups, version - 300, version))
    log.close()
    return tmp_path


def shown(folder: Path, prompt: str = "", **options: Any) -> list[str]:
    output = io.StringIO()
    run(folder, prompt, Console(file=output, width=120), **options)
    return output.getvalue().splitlines()


def rewards(lines: list[str]) -> list[str]:
    return [line.split("reward ")[1].split()[0] for line in lines if line.startswith("-- ")]


def test_the_last_step_is_shown(run_dir: Path) -> None:
    lines = shown(run_dir)
    assert lines[0] == "rollouts of step 2 (weight version 302): 4 of the 6 kept completions"
    assert rewards(lines) == ["0.25", "0.75", "0.5", "0.25"]
    line = "-- right, reward 0.25 (mean of its 3: 0.5), 2 tokens, mean log-probability 0.000"
    assert f"{line}, advantages +1 to +2, mean +1.5, largest gap +0.5" in lines


@pytest.mark.parametrize(
    ("pick", "expected"), [("best", ["1", "1", "0.5", "0.5"]), ("worst", ["0", "0", "0.5", "0.5"])]
)
def test_the_best_and_worst_of_a_step(run_dir: Path, pick: str, expected: list[str]) -> None:
    assert rewards(shown(run_dir, step=1, pick=pick)) == expected


def test_the_wrong_ones_of_all_steps(run_dir: Path) -> None:
    lines = shown(run_dir, pick="wrong")
    assert lines[0] == "rollouts that are not right: 2 of the 12 kept completions"
    assert [line for line in lines if line.startswith("== ")] == [
        "== p0, reference p0, step 1",
        "== p1, reference p1, step 1",
    ]
    assert rewards(lines) == ["0", "0"]
    assert shown(run_dir, pick="wrong", prompt="p1")[0] == "rollouts that are not right: 1 of the 6 kept completions"
    assert shown(run_dir, pick="wrong", step=2) == [
        "rollouts of step 2 that are not right: 0 of the 6 kept completions",
        "(a run keeps up to 4 completions of each of run.kept_prompts prompts of a step, not the others)",
    ]
    with pytest.raises(ConfigError, match="--step: no rollouts of step 9 are kept"):
        shown(run_dir, pick="wrong", step=9)


def test_wrong_ones_that_are_not_kept_are_counted_by_the_accuracy(run_dir: Path) -> None:
    config = minimal_with(["run.kept_prompts=2", "train.groups_per_step=8", "train.group_size=3"])
    (run_dir / "config.yaml").write_text(dump_config(config))
    rows = [
        {"stage": "online", "step": step, "weights/version": 300 + step, "rollout/accuracy": accuracy}
        for step, accuracy in ((1, 0.0), (2, 22 / 24), (3, 0.5))
    ]
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    rule = "a run keeps up to 4 completions of each of run.kept_prompts = 2 of the 8 prompts of a step"
    note = f"({rule}; 2 of all 24 of these steps were not right (rollout/accuracy))"
    assert shown(run_dir, pick="wrong", step=2)[1] == note
    assert "; 26 of all 48 of these steps were" in " ".join(shown(run_dir, pick="wrong")[:3])
    (run_dir / "config.until_000301.yaml").touch()  # the steps before may have had another size
    assert " ".join(shown(run_dir, pick="wrong", step=2)[1:]) == f"({rule}, not the others)"
    small = minimal_with(["train.groups_per_step=2", "train.group_size=3", "train.updates_per_step=1"])
    (run_dir / "config.yaml").write_text(dump_config(small))
    assert len(shown(run_dir, pick="wrong", step=2)) == 1  # all are kept


def test_the_newest_wrong_ones_are_shown(tmp_path: Path) -> None:
    log = RolloutLog(tmp_path, -1, 2, lambda ids: "text")
    for version in range(1, 8):
        groups = [fakes.group(fakes.prompt("p"), rewards=(0.0, 0.0, 1.0))]
        log.write(version, step_record(log, groups, version, version))
    log.close()
    lines = shown(tmp_path, pick="wrong")
    assert lines[0] == "rollouts that are not right: 14 of the 21 kept completions, the newest 10"
    assert [line.split()[-1] for line in lines if line.startswith("== ")] == ["7", "6", "5", "4", "3"]


def test_random_ones_are_of_the_step(run_dir: Path) -> None:
    assert set(rewards(shown(run_dir, pick="random"))) <= {"0.25", "0.75", "0.5"}


def test_a_step_that_is_not_kept_and_a_wrong_word_are_named(run_dir: Path) -> None:
    with pytest.raises(ConfigError, match="--step: no rollouts of step 9 are kept; the nearest step with some is 2"):
        shown(run_dir, step=9)
    with pytest.raises(ConfigError, match="--pick: expected one of best, worst, random, wrong, found 'good'"):
        shown(run_dir, pick="good")
    with pytest.raises(ConfigError, match=r"it has no rollouts; a run keeps those of run\.kept_prompts"):
        shown(run_dir / "rollouts", step=1)


def test_a_file_that_is_cut_off_is_named(run_dir: Path) -> None:
    path = run_dir / "rollouts" / "000300.jsonl.gz"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(DamagedFileError, match=r"000300\.jsonl\.gz: expected rollouts, found the file cut off inside"):
        shown(run_dir)
    with RunLock(run_dir), pytest.raises(ConfigError, match="it has no rollouts"):
        shown(run_dir)


def test_a_run_that_ended_early_names_the_command_that_has_the_reason(tmp_path: Path) -> None:
    with contextlib.suppress(EngineError), Journal(tmp_path):
        raise EngineError("2 of 8 verifications failed")
    reason = f"; it ended early: `rlsys status {tmp_path}` has the reason$"
    for options, message in (({}, "found neither in it nor in .*"), ({"pick": "wrong"}, "it has no rollouts; .*")):
        with pytest.raises(ConfigError, match=message + reason):
            shown(tmp_path, **options)
    with Journal(tmp_path):
        pass
    with pytest.raises(ConfigError, match="kept_prompts prompts of a step$"):
        shown(tmp_path, pick="wrong")


def test_rollouts_of_a_prompt(run_dir: Path) -> None:
    assert rewards(shown(run_dir, prompt="p1")) == ["0.25", "0.75", "0.5"]
    assert rewards(shown(run_dir, prompt="p1", step=1, pick="best")) == ["1", "0.5", "0"]
    with pytest.raises(ConfigError, match="it has no tree and no kept rollouts of prompt 'p7'"):
        shown(run_dir, prompt="p7")
    with pytest.raises(ConfigError, match="of prompt 'p1' in step 9"):
        shown(run_dir, prompt="p1", step=9)


def test_trees_are_listed_below_the_rollouts(run_dir: Path) -> None:
    (run_dir / "stages" / "search" / "trees").mkdir(parents=True)
    (run_dir / "stages" / "search" / "trees" / "00000.jsonl").write_text(tree_line(golden()) + "\n")
    lines = shown(run_dir)
    assert lines[0].startswith("rollouts of step 2") and "trees" in lines
    assert "trees" not in shown(run_dir, step=2)


def test_control_characters_and_reasons(tmp_path: Path) -> None:
    write_rollouts(tmp_path, range(1, 2), "a\x1b[2Jb")
    lines = shown(tmp_path)
    assert "\x1b" not in "".join(lines)
    assert r"a\x1b[2Jb" in lines and r"   verifier: a\x1b[2Jb" in lines and r"   a\x1b[2Jb: 1" in lines
