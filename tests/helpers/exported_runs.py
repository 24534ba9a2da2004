"""Run directories with finished policies, made without a run."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from minimal_config import minimal

from rlsys.config.files import dump_config, parse_config
from rlsys.files import json_record, write_json
from rlsys.run.checkpoints import CheckpointStore
from rlsys.run.state import state_to_json
from rlsys.types import RunState

FIGURES = {
    "held_out/greedy_accuracy": 0.75,
    "held_out/greedy_reward": 0.725,
    "held_out/sampled_accuracy": 0.5,
    "held_out/completion_length": 12.25,
}


def write_run(
    folder: Path,
    policy: Path,
    finished: Sequence[str] = ("warm_start", "online"),
    inputs: Mapping[str, str] | None = None,
    **changes: Any,
) -> Path:
    """Write the directory of a run with the stages warm_start (3 steps) and online (5 steps), measured at 0 and 8.

    Args:
        folder: the run directory; created if missing.
        policy: every policy of the run is a copy of this folder.
        finished: the stages that are finished.
        inputs: digests that every checkpoint records.
        changes: changes of the config, `section__key=value`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    changes = {
        "run__dir": str(folder), "stages": ["warm_start", "online"], "warm_start__max_steps": 3, "train__max_steps": 5,
        "evaluation__samples": 2, **changes,
    }  # fmt: skip
    config = parse_config(minimal(**changes), "test")
    (folder / "config.yaml").write_text(dump_config(config))
    for stage in finished:
        shutil.copytree(policy, folder / "stages" / stage)
    store = CheckpointStore(folder / "checkpoints", 9)
    for stage, step, version in ((0, 3, 3), (1, 4, 7), (1, 5, 8)):
        name = f"step_{version:06d}"
        temporary = store.begin(name)
        shutil.copytree(policy, temporary / "policy")
        (temporary / "learner").mkdir()
        (temporary / "learner" / "learner.json").write_text("{}")
        state = RunState(stage=stage, step=step, weight_version=version, cursor=0)
        write_json(temporary / "state.json", state_to_json(state))
        store.commit(temporary, name, {"weight_version": version, "inputs": inputs or {}})
    rows: list[dict[str, Any]] = [{"stage": "warm_start", "step": step, "weights/version": step} for step in (1, 2, 3)]
    rows += [{"stage": "online", "step": step, "weights/version": 3 + step} for step in range(6)]
    for row in (rows[3], rows[-1]):
        row |= FIGURES
    (folder / "metrics.jsonl").write_bytes(b"".join(map(json_record, rows)))
    return folder
