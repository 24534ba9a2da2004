"""Answer which policy is meant by a run directory, a checkpoint or a policy folder in a run.

A run directory stands for the newest complete policy of its run: that of the newest checkpoint, or the one exported
by a finished stage if no checkpoint is of a later stage. Nothing is written, and only what one rename made visible is
read. So the run may still be going on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rlsys.config.files import load_config
from rlsys.config.schema import Config
from rlsys.config.stages import stage_plans
from rlsys.directory import CheckpointDirectory, RunDirectory, SearchDirectory
from rlsys.earlier_runs import origin
from rlsys.errors import ConfigError, DamagedFileError
from rlsys.models.folder import is_policy
from rlsys.run.checkpoints import newest_first
from rlsys.run.lock import in_use
from rlsys.run.manifest import verify_checkpoint, verify_chosen
from rlsys.run.metrics import read_rows
from rlsys.run.provenance import read_provenance
from rlsys.run.state import read_state
from rlsys.types import RunState


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyPlace:
    """The place of a complete policy in a run directory.

    Attributes:
        folder: the model or adapter folder.
        checkpoint: the checkpoint that holds it; None for the policy that a finished stage exported.
        note: lines for the user about the choice between several policies; "" if the user named this one.
    """

    run_dir: Path
    folder: Path
    checkpoint: Path | None
    note: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunPolicy:
    """A complete policy of a run.

    Attributes:
        folder: the model or adapter folder.
        stage: the stage that trained it last.
        step: training steps of this stage; None if metrics.jsonl does not tell.
        version: weight version; None if metrics.jsonl does not tell.
        model_digest: digest of the initial model, which an adapter changes; None if no checkpoint tells.
        note: lines for the user about the choice between several policies; "" if the user named this one.
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
    """Return a policy of a run, with its config and position. See `locate_policy` for arguments and errors."""
    place = locate_policy(target, stage, step)
    config = load_config(RunDirectory(place.run_dir).config)
    return _exported(place, config) if place.checkpoint is None else _saved(place, place.checkpoint, config)


def locate_policy(target: str, stage: str | None = None, step: int | None = None) -> PolicyPlace:
    """Return where a policy of a run lies.

    Args:
        target: a run directory, a checkpoint, or the policy folder of one of its stages or checkpoints.
        stage: a finished stage of the run directory, in place of the newest policy.
        step: the number in the name of a checkpoint of the run directory, in place of the newest policy.

    Raises:
        ConfigError: the target is none of them, or the run has no such policy.
        DamagedFileError: a file of the checkpoint or run is damaged.
    """
    path = Path(target).absolute()
    if stage is not None and step is not None:
        raise ConfigError("--stage and --step: expected one of them, found both; leave one out")
    if RunDirectory(path).config.is_file():
        if step is not None:
            return _in_checkpoint(path, _named_checkpoint(path, step))
        return _newest(path, target) if stage is None else _of_stage(path, stage)
    if stage is not None or step is not None:
        raise ConfigError(f"{target}: --stage and --step choose from a run directory, found none (no config.yaml)")
    # RUN/checkpoints/step_N, RUN/checkpoints/step_N/policy, RUN/stages/NAME
    for checkpoint in (path, path.parent):
        run_dir = checkpoint.parent.parent
        if CheckpointDirectory(checkpoint).policy.is_dir() and RunDirectory(run_dir).config.is_file():
            return _in_checkpoint(run_dir, checkpoint)
    run_dir = path.parent.parent
    if is_policy(path) and path.parent == RunDirectory(run_dir).stages and RunDirectory(run_dir).config.is_file():
        return PolicyPlace(run_dir=run_dir, folder=path, checkpoint=None)
    raise ConfigError(
        f"{target}: expected a run directory, one of its checkpoints, or a policy folder of its stages; found "
        f"{'no config.yaml of a run in or above it' if path.is_dir() else 'no such folder' + origin(target)}"
    )


def _newest(run_dir: Path, target: str) -> PolicyPlace:
    """Return the newest complete policy of a run. A damaged checkpoint is passed over, and the note says so."""
    directory = RunDirectory(run_dir)
    stages, finished = _trained_stages(run_dir)
    done = stages.index(finished[-1]) if finished else -1
    damaged: list[str] = []
    for checkpoint in newest_first(directory.checkpoints):
        try:
            state = _state(checkpoint, stages)
            if state.stage <= done:
                break
            place = _in_checkpoint(run_dir, checkpoint, verify_checkpoint)
        except DamagedFileError as error:
            damaged.append(f"checkpoint skipped: {error.message}")
            continue
        progress = "is being trained" if in_use(run_dir) else "is not finished"
        note = f"{target}: policy of checkpoint {checkpoint.name}; stage {stages[state.stage]} {progress}"
        return replace(place, note="\n".join([*damaged, note]))
    if finished:
        note = f"{target}: policy of the finished stage {finished[-1]}"
        return replace(_of_stage(run_dir, finished[-1]), note="\n".join([*damaged, note]))
    if damaged:
        raise DamagedFileError(f"{directory.checkpoints}: no checkpoint is valid; {'; '.join(damaged)}; restore one")
    if SearchDirectory(run_dir).origin.exists():
        raise ConfigError(
            f"{target}: a run of `rlsys search` has trees and no policy; give the model folder or hub id, or a "
            "training run"
        )
    training = "; it is being trained" if in_use(run_dir) else ""
    raise ConfigError(f"{target}: the run has no policy yet, neither a checkpoint nor a finished stage{training}")


def _of_stage(run_dir: Path, stage: str) -> PolicyPlace:
    """Return the policy that a stage exported, or raise ConfigError."""
    _, finished = _trained_stages(run_dir)
    if stage not in finished:
        raise ConfigError(
            f"{run_dir}: expected a finished stage {stage}, found {', '.join(finished) or 'none'}; "
            f"{_advice(RunDirectory(run_dir))}"
        )
    return PolicyPlace(run_dir=run_dir, folder=RunDirectory(run_dir).stages / stage, checkpoint=None)


def _in_checkpoint(
    run_dir: Path, checkpoint: Path, verify: Callable[[Path, Sequence[str]], object] = verify_chosen
) -> PolicyPlace:
    """Return the policy of a checkpoint, whose files are verified."""
    paths = CheckpointDirectory(checkpoint)
    verify(checkpoint, [paths.policy.name, paths.state.name])
    return PolicyPlace(run_dir=run_dir, folder=paths.policy, checkpoint=checkpoint)


def _trained_stages(run_dir: Path) -> tuple[list[str], list[str]]:
    """Return the names of all stages, and of those that have exported a policy."""
    config, directory = load_config(RunDirectory(run_dir).config), RunDirectory(run_dir)
    trained = [plan.name for plan in stage_plans(config) if plan.trains]
    return list(config.stages), [name for name in trained if is_policy(directory.exported_policy(name))]


def _state(checkpoint: Path, stages: Sequence[str]) -> RunState:
    """Return the state of a checkpoint of a run with some stages, or raise DamagedFileError."""
    file = CheckpointDirectory(checkpoint).state
    state = read_state(file)
    if state.stage >= len(stages):
        raise DamagedFileError(f"{file}: expected the number of a stage of {', '.join(stages)}, found {state.stage}")
    return state


def _exported(place: PolicyPlace, config: Config) -> RunPolicy:
    directory, stage = RunDirectory(place.run_dir), place.folder.name
    row = next((row for row in reversed(read_rows(directory.metrics)) if row["stage"] == stage), None)
    checkpoints = newest_first(directory.checkpoints)
    return RunPolicy(
        run_dir=place.run_dir,
        config=config,
        folder=place.folder,
        stage=stage,
        step=int(row["step"]) if row else None,
        version=int(row["weights/version"]) if row else None,
        model_digest=next(filter(None, (_model_digest(path, config) for path in checkpoints)), None),
        note=place.note,
    )


def _saved(place: PolicyPlace, checkpoint: Path, config: Config) -> RunPolicy:
    state = _state(checkpoint, config.stages)
    return RunPolicy(
        run_dir=place.run_dir,
        config=config,
        folder=place.folder,
        stage=config.stages[state.stage],
        step=state.step,
        version=state.weight_version,
        model_digest=_model_digest(checkpoint, config),
        note=place.note,
    )


def _named_checkpoint(run_dir: Path, step: int) -> Path:
    checkpoint = RunDirectory(run_dir).checkpoints / f"step_{step:06d}"
    if not checkpoint.is_dir():
        raise ConfigError(f"--step {step}: the run has no {checkpoint}; {_advice(RunDirectory(run_dir))}")
    return checkpoint


def _model_digest(checkpoint: Path, config: Config) -> str | None:
    """Return the digest of the initial model that a checkpoint records; None if it cannot be read."""
    name = "model.path" if config.model.path else "model.from_scratch"
    try:
        return read_provenance(checkpoint).inputs.get(name)
    except ConfigError:  # made by an older version, or removed by the run
        return None


def _advice(directory: RunDirectory) -> str:
    """Return which checkpoints there are, and how to choose one."""
    names = [path.name for path in reversed(newest_first(directory.checkpoints)) if path.name[5:].isdigit()]
    if not names:
        return "there are no checkpoints yet"
    return f"checkpoints: {', '.join(names)}; --step {int(names[-1][5:])} chooses the last"
