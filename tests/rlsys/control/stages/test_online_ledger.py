"""The ledger refuses a run state that lost a prompt, and without it the run would train other prompts."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from fake_runs import Run, config

from rlsys.errors import CheckpointError
from rlsys.files import read_json, write_json
from rlsys.run.checkpoints import CheckpointStore
from rlsys.run.ledger import read_ledger
from rlsys.run.manifest import verify_checkpoint


def saved(run_dir: Path, max_staleness: int, **changes: Any) -> Run:
    """Return a run of four steps of two prompts that resumes after its second step, with a changed state."""
    train = {"max_steps": 4, "max_staleness": max_staleness}
    settings = config(stages=["online"], train=train, checkpoint={"interval": 2, "keep_last": 9})
    Run(run_dir, settings)()
    shutil.rmtree(run_dir / "checkpoints" / "step_000004")
    checkpoint = run_dir / "checkpoints" / "step_000002"
    store, info = CheckpointStore(run_dir / "checkpoints", 9), verify_checkpoint(checkpoint)
    temporary = store.begin("step_000002")
    shutil.copytree(checkpoint, temporary, dirs_exist_ok=True)
    (temporary / "MANIFEST.json").unlink()
    state = read_json(temporary / "state.json")
    write_json(temporary / "state.json", {**state, **{name: change(state) for name, change in changes.items()}})
    store.commit(temporary, "step_000002", info)
    return Run(run_dir, settings)


def trained(run_dir: Path) -> list[int]:
    return [index for line in read_ledger(run_dir / "ledger.jsonl") for index in line["trained"]]


@pytest.mark.parametrize("max_staleness", [0, 1])
def test_a_state_as_it_was_trains_every_prompt_once(max_staleness: int, tmp_path: Path) -> None:
    saved(tmp_path, max_staleness)()
    assert trained(tmp_path) == list(range(8))


@pytest.mark.parametrize(
    ("max_staleness", "issued", "lost", "changes"),
    [
        (0, 5, 4, {"cursor": lambda state: state["cursor"] + 1}),
        (1, 7, 6, {"cursor": lambda state: state["cursor"] + 1}),
        (1, 6, 4, {"in_flight": lambda state: state["in_flight"][1:]}),
        (1, 6, 5, {"in_flight": lambda state: state["in_flight"][:-1]}),
    ],
)
def test_a_lost_prompt_is_refused_and_would_be_missed(
    max_staleness: int, issued: int, lost: int, changes: dict[str, Any], tmp_path: Path
) -> None:
    run = saved(tmp_path, max_staleness, **changes)
    message = (
        rf"has issued {issued} prompts; the ledger and the prompts in flight lack \[{lost}\] \(1\); restore the file"
    )
    with pytest.raises(CheckpointError, match=message):
        run()
    before = trained(tmp_path)
    (tmp_path / "ledger.jsonl").unlink()  # what refuses it
    Run(tmp_path, run.config)()
    assert lost not in before + trained(tmp_path)


@pytest.mark.parametrize("outcome", ["trained", "filtered", "skipped"])
def test_a_prompt_with_two_outcomes_is_refused(outcome: str, tmp_path: Path) -> None:
    """A changed ledger says that a prompt in flight was trained, filtered or skipped before."""
    run = saved(tmp_path, 1)
    path = tmp_path / "ledger.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    lines[1][outcome].append(4)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(CheckpointError, match=r"has issued 6 prompts; .* contain twice \[4\] \(1\); restore the file"):
        run()
