"""Damage to the files of a run is unusable input: exit code 2, and one line with the file and what to do.

A failure to write is none: the input is right, and the same command may succeed later.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from resumable_runs import INPUTS, config, save, start, state, store

from rlsys import cli
from rlsys.commands.evaluation_targets import find_target
from rlsys.control.stage_policies import StagePolicies
from rlsys.errors import CheckpointError, RlsysError
from rlsys.files import write_json
from rlsys.run.ledger import Ledger
from rlsys.run.metrics import MetricsWriter
from rlsys.run.provenance import check_reference
from rlsys.run.state import state_to_json

ACTIONS = ("restore it", "restore one", "restore the f", "remove the line", "resume from another", "choose another")
CHECKPOINT = Path("checkpoints", "step_000005")


def restart(run_dir: Path) -> None:
    start(run_dir, config())


def branch(run_dir: Path) -> None:
    start(run_dir / "b", config(str(run_dir / CHECKPOINT)))


def evaluate(run_dir: Path) -> None:
    find_target(str(run_dir))


def open_ledger(run_dir: Path) -> None:
    Ledger(run_dir, 5).resume(cursor=4, in_flight=(2, 3))


def open_metrics(run_dir: Path) -> None:
    MetricsWriter(run_dir, 5)


def begin_stage(run_dir: Path) -> None:
    policy = run_dir / "stages" / "sft"
    policies = StagePolicies(
        config=config(),
        run_dir=run_dir,
        model=run_dir / "model",
        policy_digest=lambda folder: folder.joinpath("config.json").read_text(),
    )
    check_reference(run_dir / CHECKPOINT, policy, policies.digest(policy))


def rewritten_state(folder: Path, **changes: object) -> None:
    """Write a checkpoint with another state, whose manifest fits."""
    shutil.rmtree(folder)
    temporary = store(folder.parent.parent).begin("step_000005")
    write_json(temporary / "state.json", {**state_to_json(state(5)), **changes})
    store(folder.parent.parent).commit(temporary, "step_000005", {"weight_version": 5, "inputs": INPUTS})


DAMAGES: dict[str, tuple[str, Callable[[Path], object], Callable[[Path], None]]] = {
    "manifest cut": (f"{CHECKPOINT}/MANIFEST.json", lambda path: path.write_text("{"), restart),
    "manifest changed": (
        f"{CHECKPOINT}/MANIFEST.json", lambda path: path.write_text(path.read_text().replace("d1", "d9")), restart,
    ),
    "state cut": (f"{CHECKPOINT}/state.json", lambda path: path.write_text(""), restart),
    "state missing": (f"{CHECKPOINT}/state.json", lambda path: path.unlink(), restart),
    "file added": (f"{CHECKPOINT}/more", lambda path: path.write_text("x"), restart),
    "link added": (f"{CHECKPOINT}/more", lambda path: path.symlink_to("state.json"), restart),
    "state of another version": (f"{CHECKPOINT}", lambda path: rewritten_state(path, later=1), restart),
    "negative step": (f"{CHECKPOINT}", lambda path: rewritten_state(path, step=-1), restart),
    "config missing": ("config.yaml", lambda path: path.unlink(), restart),
    "evaluated": (f"{CHECKPOINT}/state.json", lambda path: path.write_text(""), evaluate),
    "named": (f"{CHECKPOINT}/state.json", lambda path: path.write_text(""), branch),
    "ledger line": ("ledger.jsonl", lambda path: path.write_text("{}\n"), open_ledger),
    "ledger lacks prompts": (
        "ledger.jsonl",
        lambda path: path.write_text(json.dumps({"version": 5, "trained": [0], "filtered": [], "skipped": []}) + "\n"),
        open_ledger,
    ),
    "ledger is a folder": ("ledger.jsonl", lambda path: path.mkdir(), open_ledger),
    "metrics line": ("metrics.jsonl", lambda path: path.write_text("[]\n"), open_metrics),
    "metrics is a folder": ("metrics.jsonl", lambda path: path.mkdir(), open_metrics),
    "policy of a stage": ("stages/sft", lambda path: None, begin_stage),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_unusable_input_and_the_line_says_what_to_do(
    tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file, damage, command = DAMAGES[name]
    save(tmp_path, 5)
    damage(tmp_path / file)
    with pytest.raises(SystemExit) as stopped:
        cli._exit_with(lambda: command(tmp_path))
    lines = capsys.readouterr().err.splitlines()
    assert (stopped.value.code, len(lines)) == (2, 1)
    assert lines[0].startswith("error: ") and "Error:" not in lines[0]
    assert str(tmp_path) in lines[0] and Path(file).name in lines[0]
    assert any(action in lines[0] for action in ACTIONS)


def test_a_file_that_cannot_be_written_is_a_failure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli._exit_with(lambda: write_json(tmp_path / "no folder" / "state.json", {}))
    assert stopped.value.code == 1
    assert "could not be written" in capsys.readouterr().err


def test_handlers_of_checkpoint_errors_take_damage_too(tmp_path: Path) -> None:
    save(tmp_path, 5)
    (tmp_path / CHECKPOINT / "MANIFEST.json").write_text("{")
    with pytest.raises(CheckpointError, match="none of the 1 checkpoints is valid") as caught:
        restart(tmp_path)
    assert isinstance(caught.value, RlsysError)
