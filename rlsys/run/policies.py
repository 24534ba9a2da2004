"""Find a policy of a run: the one that a stage exported, or the one of a checkpoint.

Nothing is written, and only what one rename made visible is read. So the run may still be going on.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rlsys.config.files import load_config
from rlsys.config.schema import Config
from rlsys.config.stages import stage_plans
from rlsys.directory import CheckpointDirectory, RunDirectory
from rlsys.errors import ConfigError
from rlsys.models.folder import is_policy
from rlsys.run.manifest import verify_checkpoint
from rlsys.run.metrics import read_rows
from rlsys.run.provenance import read_provenance
from rlsys.run.state import read_state


@dataclass(frozen=True, slots=True, kw_only=True)
class RunPolicy:
    """A finished policy of a run.

    Attributes:
        folder: the model or adapter folder.
        stage: the stage that trained it last.
        step: training steps of this stage; None if metrics.jsonl does not tell.
        version: weight version; None if metrics.jsonl does not tell.
        model_digest: digest of the initial model, which an adapter changes; None if no checkpoint tells.
        note: a line for the user about a later policy of the run, or "".
    """

    run_dir: Path
    config: Config
    folder: Path
    stage: str
    step: int | None
    version: int | None
    model_digest: str | None
    note: str = ""


def find_run_policy(target: str, stage: str | None = None, step: int | None = None) -> RunPolicy:
    """Return a policy of a run.

    Args:
        target: a run directory, a checkpoint, or the policy folder of one of its stages or checkpoints.
        stage: a finished stage of the run directory; None for the last one.
        step: the number in the name of a checkpoint of the run directory, in place of a stage.

    Raises:
        ConfigError: the target is none of them, or the run has no such policy.
        DamagedFileError: a file of the checkpoint or run is damaged.
    """
    path = Path(target).absolute()
    if stage is not None and step is not None:
        raise ConfigError("--stage and --step: expected one of them, found both; leave one out")
    if RunDirectory(path).config.is_file():
        return _of_checkpoint(path, _named_checkpoint(path, step)) if step is not None else _of_stage(path, stage)
    if stage is not None or step is not None:
        raise ConfigError(f"{target}: --stage and --step choose from a run directory, found none (no config.yaml)")
    # RUN/checkpoints/step_N, RUN/checkpoints/step_N/policy, RUN/stages/NAME
    for checkpoint in (path, path.parent):
        run_dir = checkpoint.parent.parent
        if CheckpointDirectory(checkpoint).policy.is_dir() and RunDirectory(run_dir).config.is_file():
            return _of_checkpoint(run_dir, checkpoint)
    run_dir = path.parent.parent
    if is_policy(path) and path.parent == RunDirectory(run_dir).stages and RunDirectory(run_dir).config.is_file():
        return _of_stage(run_dir, path.name)
    raise ConfigError(
        f"{target}: expected a run directory, one of its checkpoints, or a policy folder of its stages; found "
        f"{'no config.yaml of a run in or above it' if path.is_dir() else 'no such folder'}"
    )


def _of_stage(run_dir: Path, stage: str | None) -> RunPolicy:
    directory = RunDirectory(run_dir)
    config = load_config(directory.config)
    trained = [plan.name for plan in stage_plans(config) if plan.trains]
    finished = [name for name in trained if is_policy(directory.exported_policy(name))]
    if stage is None and finished:
        stage = finished[-1]
    chosen = next((name for name in finished if name == stage), None)
    if chosen is None:
        raise ConfigError(
            f"{run_dir}: expected {f'a finished stage {stage}' if stage else 'a finished stage'}, found "
            f"{', '.join(finished) or 'none'}; {_advice(directory)}"
        )
    rows = (row for row in reversed(read_rows(directory.metrics)) if row["stage"] == chosen)
    row = next(rows, None)
    later = trained[trained.index(chosen) + 1 :]
    note = f"stage {later[0]} is not finished; {_advice(directory)}" if chosen == finished[-1] and later else ""
    return RunPolicy(
        run_dir=run_dir,
        config=config,
        folder=directory.exported_policy(chosen),
        stage=chosen,
        step=int(row["step"]) if row else None,
        version=int(row["weights/version"]) if row else None,
        model_digest=next(filter(None, (_model_digest(path, config) for path in _checkpoints(directory))), None),
        note=note,
    )


def _named_checkpoint(run_dir: Path, step: int) -> Path:
    checkpoint = RunDirectory(run_dir).checkpoints / f"step_{step:06d}"
    if not checkpoint.is_dir():
        raise ConfigError(f"--step {step}: the run has no {checkpoint}; {_advice(RunDirectory(run_dir))}")
    return checkpoint


def _of_checkpoint(run_dir: Path, checkpoint: Path) -> RunPolicy:
    paths, config = CheckpointDirectory(checkpoint), load_config(RunDirectory(run_dir).config)
    verify_checkpoint(checkpoint, [paths.policy.name, paths.state.name])
    state = read_state(paths.state)
    return RunPolicy(
        run_dir=run_dir,
        config=config,
        folder=paths.policy,
        stage=config.stages[state.stage],
        step=state.step,
        version=state.weight_version,
        model_digest=_model_digest(checkpoint, config),
    )


def _model_digest(checkpoint: Path, config: Config) -> str | None:
    """Return the digest of the initial model that a checkpoint records; None if it cannot be read."""
    name = "model.path" if config.model.path else "model.from_scratch"
    try:
        return read_provenance(checkpoint).inputs.get(name)
    except ConfigError:  # made by an older version, or removed by the run
        return None


def _advice(directory: RunDirectory) -> str:
    """Return which checkpoints there are, and how to choose one."""
    names = [path.name for path in _checkpoints(directory)]
    if not names:
        return "there are no checkpoints yet"
    return f"checkpoints: {', '.join(names)}; --step {int(names[-1][5:])} chooses the last"


def _checkpoints(directory: RunDirectory) -> list[Path]:
    return sorted(path for path in directory.checkpoints.glob("step_*") if path.name[5:].isdigit())
