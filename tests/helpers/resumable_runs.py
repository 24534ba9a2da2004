"""Run directories to resume from: a config, and checkpoints of some versions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rlsys.config.files import dump_config, parse_config
from rlsys.config.schema import Config
from rlsys.files import write_json
from rlsys.run.checkpoints import CheckpointStore
from rlsys.run.resume import Start, find_start
from rlsys.run.state import state_to_json
from rlsys.types import RunState

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
