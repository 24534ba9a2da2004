"""Where a run starts: from scratch, or from a checkpoint of the same experiment."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from rlsys.checkpoint import CheckpointStore, read_json, state_from_json
from rlsys.config import Config
from rlsys.config_file import fixed_fields, load_config
from rlsys.errors import CheckpointError, ConfigError
from rlsys.types import RunState


@dataclass(frozen=True, slots=True)
class Start:
    """The state a run begins with, and the checkpoint it comes from."""

    state: RunState
    checkpoint: Path | None

    def describe(self) -> str:
        if self.checkpoint is None:
            return "starting from the initial model"
        return f"resuming from {self.checkpoint} (weight version {self.state.weight_version})"


def find_start(config: Config, run_dir: Path, store: CheckpointStore) -> Start:
    """Apply `run.resume`.

    Raises:
        ConfigError: a fixed field differs from that of the run directory, the directory is used although
            `run.resume` is never, or the given path is no checkpoint.
        CheckpointError: checkpoints exist and none is valid.
    """
    resume = config.run.resume
    if resume == "never":
        if (run_dir / "metrics.jsonl").exists() or store.latest() is not None:
            raise ConfigError(f"run.resume is never and run.dir {run_dir} holds a run: choose another run.dir")
        checkpoint = None
    elif resume == "auto":
        checkpoint = store.latest()
    else:
        checkpoint = Path(resume).absolute()
        try:
            store.verify(checkpoint)
        except CheckpointError as error:
            raise ConfigError(f"run.resume: {error.message}") from None
    if checkpoint is None:
        return Start(RunState(stage=0, step=0, weight_version=0, cursor=0), None)
    origin = run_dir if resume == "auto" else checkpoint.parent.parent
    _check_fixed_fields(config, origin)
    if origin.resolve() != run_dir.resolve() and (origin / "stages").is_dir():
        # A stage may be anchored to the policy of the one before.
        shutil.copytree(origin / "stages", run_dir / "stages", dirs_exist_ok=True)
    return Start(state_from_json(read_json(checkpoint / "state.json")), checkpoint)


def _check_fixed_fields(config: Config, run_dir: Path) -> None:
    path = run_dir / "config.yaml"
    before, now = fixed_fields(load_config(path)), fixed_fields(config)
    names = list(before | now)  # another type of task or model has other fields
    different = [name for name in names if before.get(name) != now.get(name)]
    if different:
        name = different[0]
        raise ConfigError(
            f"{name} differs from the run to be resumed ({path}): expected {before.get(name)}, "
            f"found {now.get(name)}; "
            "set it back, or start a new run.dir"
            + (f" (also different: {', '.join(different[1:])})" if different[1:] else "")
        )
