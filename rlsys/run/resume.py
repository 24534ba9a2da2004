"""Find the state that a run starts from: the initial model, or a checkpoint of the same experiment."""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

from rlsys.config.compare import changed_fields, check_fields, load_run_config
from rlsys.config.schema import Config
from rlsys.config.stages import stage_plan
from rlsys.directory import CheckpointDirectory, RunDirectory, SearchDirectory
from rlsys.errors import ConfigError, DamagedFileError
from rlsys.files import read_json, write_json
from rlsys.models.folder import is_policy
from rlsys.run.checkpoints import CheckpointStore
from rlsys.run.manifest import MANIFEST, verify_chosen
from rlsys.run.state import read_state
from rlsys.types import RunState


@dataclass(frozen=True, slots=True)
class Start:
    """The state that a run starts from.

    Attributes:
        checkpoint: the checkpoint of the state; None for the initial model.
        named: whether `run.resume` names the checkpoint, which is then not one of the run's own.
        changed: fields that may change and have changed since the run last started, as text.
    """

    state: RunState
    checkpoint: Path | None
    named: bool = False
    changed: tuple[str, ...] = ()

    def describe(self) -> str:
        """Return a line that tells the user from which state the run starts."""
        if self.checkpoint is None:
            return "starting from the initial model"
        changed = f"; changed: {', '.join(self.changed)}" if self.changed else ""
        return f"resuming from {self.checkpoint} (weight version {self.state.weight_version}){changed}"

    def prepare_directory(self, run_dir: Path) -> None:
        """Change the run directory for this start. Call it only after all checks have passed."""
        if self.checkpoint is None:
            RunDirectory(run_dir).resumed_from.unlink(missing_ok=True)  # the run begins anew
        elif self.named:
            origin, stages = self.checkpoint.parent.parent, RunDirectory(run_dir).stages
            if origin.resolve() != run_dir.resolve():
                shutil.rmtree(stages, ignore_errors=True)
                _copy_stages(origin, run_dir, self.state.stage)
            write_json(RunDirectory(run_dir).resumed_from, {"checkpoint": str(self.checkpoint.resolve())})
        elif self.changed:
            earlier = RunDirectory(run_dir).config_until(self.state.weight_version)
            if not earlier.exists():  # otherwise nothing was trained since the last change
                shutil.copyfile(RunDirectory(run_dir).config, earlier)


FIRST_START = Start(RunState(stage=0, step=0, weight_version=0, cursor=0), None)
"""The start of a run without a checkpoint."""


def checkpoint_store(config: Config) -> CheckpointStore:
    """Return the checkpoints of the run directory, which need not exist."""
    keep = config.checkpoint
    best = (keep.best_metric, keep.best_mode) if keep.best_metric else None
    folder = RunDirectory(Path(config.run.dir).absolute()).checkpoints
    return CheckpointStore(folder, keep.keep_last, keep.keep_every, best)


def holds_search(run_dir: Path) -> bool:
    """Return whether a run directory has the trees of `rlsys search`."""
    search = SearchDirectory(run_dir)
    return search.origin.exists() and any(search.trees.rglob("*.json*"))


def find_start(config: Config, run_dir: Path, store: CheckpointStore) -> Start:
    """Return the start that `run.resume` asks for, without changing any file.

    If `run.resume` is a path, the run begins from that checkpoint. The same command later continues from the run's
    newest checkpoint.

    Raises:
        ConfigError: a fixed field differs from the run to be resumed; the directory holds a search; the directory
            holds a run although `run.resume` is `never`, or a run that did not begin from the named checkpoint; the
            path is not a valid checkpoint, or is the last checkpoint of another finished run.
        DamagedFileError: checkpoints exist and all are invalid.
    """
    if holds_search(run_dir):
        raise ConfigError(f"run.dir {run_dir} holds the trees of a search: choose another run.dir")
    _check_folders(store.folder)
    resume, own = config.run.resume, store.latest()
    if resume == "never" and (own is not None or _has_metrics(run_dir)):
        raise ConfigError(f"run.resume is never and run.dir {run_dir} holds a run: choose another run.dir")
    if resume in ("auto", "never"):
        if own is None:
            return FIRST_START
        return _start_at(config, own, run_dir)
    path = Path(resume).absolute()
    descends = _resumed_from(run_dir) == str(path.resolve())
    if descends and own is not None:
        return _start_at(config, own, run_dir)
    _check_named(path)
    if not descends:
        _check_unused(path, own, run_dir)
    return _branch(config, path, run_dir)


def find_newest_start(config: Config, run_dir: Path, store: CheckpointStore) -> Start:
    """Return the start after a loss of the learner: the newest checkpoint, or else the start of this command.

    Raises:
        DamagedFileError: checkpoints exist and all are invalid.
    """
    if config.run.resume == "never":  # this command itself has written to the directory by now
        config = config.model_copy(update={"run": config.run.model_copy(update={"resume": "auto"})})
    return replace(find_start(config, run_dir, store), named=False)


def all_steps_made(config: Config, state: RunState) -> bool:
    """Return whether the last stage has made all its training steps."""
    last = len(config.stages) - 1
    return state.stage == last and state.step >= stage_plan(config, config.stages[last]).steps


def is_complete(config: Config, start: Start, run_dir: Path) -> bool:
    """Return whether this run, and not the one it resumes from, has made all steps and exported its policy."""
    checkpoints = RunDirectory(run_dir).checkpoints
    own = start.checkpoint is not None and start.checkpoint.parent.resolve() == checkpoints.resolve()
    exported = RunDirectory(run_dir).exported_policy(config.stages[-1])
    return own and all_steps_made(config, start.state) and is_policy(exported)


def _start_at(config: Config, checkpoint: Path, origin: Path) -> Start:
    """Return the start at a checkpoint of the run directory `origin`."""
    before = load_run_config(origin)
    state = read_state(CheckpointDirectory(checkpoint).state)
    check_fields(config, before, state, RunDirectory(origin).config)
    _check_critic(config, state, checkpoint)
    return Start(state, checkpoint, changed=changed_fields(before, config))


def _branch(config: Config, checkpoint: Path, run_dir: Path) -> Start:
    """Return the start at a named checkpoint, from which run_dir begins its own series of checkpoints."""
    origin = checkpoint.parent.parent
    start = _start_at(config, checkpoint, origin)
    if origin.resolve() != run_dir.resolve() and all_steps_made(config, start.state):
        stage = config.stages[-1]
        raise ConfigError(
            f"run.resume: {checkpoint} has made all {start.state.step} steps of the last stage; "
            f"raise {stage_plan(config, stage).section}.max_steps (now {stage_plan(config, stage).steps})"
        )
    return replace(start, named=True)


def _check_critic(config: Config, state: RunState, checkpoint: Path) -> None:
    """Raise if a started stage needs a critic and has none. A critic can only begin together with its stage."""
    plan = stage_plan(config, config.stages[state.stage])
    if plan.settings.critic and 0 < state.step < plan.steps and not CheckpointDirectory(checkpoint).critic.is_dir():
        raise ConfigError(
            f"objective.value.weight and objective.policy.estimator gae need a critic, and {checkpoint} has none: the "
            f"first {state.step} steps of stage online were made without one; set both back, or begin the stage with a "
            f"critic, in a new run.dir with stages [online] and model.path {CheckpointDirectory(checkpoint).policy}"
        )


def _check_folders(folder: Path) -> None:
    """Raise if the folder of checkpoints is a file, or has a foreign subfolder.

    The subfolder would be removed as a damaged checkpoint.
    """
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"run.dir {folder.parent}: expected a folder, but {folder} is none; choose another run.dir")
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        foreign = path.is_dir() and not path.name.startswith(".") and not re.match(r"step_\d", path.name)
        if foreign and not (path / MANIFEST).exists():
            raise ConfigError(
                f"run.dir {folder.parent}: expected checkpoints of rlsys alone in {folder}, found the folder "
                f"{path.name} without a {MANIFEST}; move it away, or choose another run.dir"
            )


def _check_named(path: Path) -> None:
    """Raise if the path in run.resume is not a valid checkpoint."""
    expected = "expected auto, never or the folder of a checkpoint, RUN_DIR/checkpoints/step_N"
    if not (path / MANIFEST).is_file():
        folders = [path / "checkpoints", path] if path.is_dir() else []
        nearby = sorted(manifest.parent for folder in folders for manifest in folder.glob(f"*/{MANIFEST}"))
        kind = "a file" if path.is_file() else "no such folder" if not path.is_dir() else f"a folder without {MANIFEST}"
        hint = f"; did you mean {nearby[-1]}?" if nearby else ""
        raise ConfigError(f"run.resume {path}: {expected}, found {kind}{hint}")
    try:
        verify_chosen(path)
    except DamagedFileError as error:
        raise ConfigError(f"run.resume: {error.message}") from None


def _check_unused(path: Path, own: Path | None, run_dir: Path) -> None:
    """Raise if run_dir holds another run, whose checkpoints would be overwritten or mixed with the new ones.

    Args:
        path: the checkpoint that run.resume names.
        own: the newest checkpoint in run_dir.
    """
    if own is not None and own.resolve() == path.resolve():
        return
    if own is not None and own.resolve().parent == path.resolve().parent:
        raise ConfigError(
            f"run.resume {path}: {own} is newer; move the newer ones out of {own.parent}, or choose a new run.dir"
        )
    if own is not None or _has_metrics(run_dir):
        raise ConfigError(
            f"run.resume {path}: run.dir {run_dir} holds another run; move it away, or choose a new run.dir"
        )


def _copy_stages(origin: Path, run_dir: Path, present: int) -> None:
    """Copy what the stages of another run have written up to a stage, where one may find its reference policy.

    The policies of this and later stages stay behind: they were trained after the checkpoint, and not by this run.
    """
    source, target = RunDirectory(origin), RunDirectory(run_dir)
    for number, stage in enumerate(load_run_config(origin).stages[: present + 1]):
        folder, scores = source.exported_policy(stage), source.reference_scores(stage)
        if folder.is_dir() and (number < present or not is_policy(folder)):
            shutil.copytree(folder, target.exported_policy(stage))
        if scores.is_file():
            target.stages.mkdir(exist_ok=True)
            shutil.copyfile(scores, target.reference_scores(stage))


def _has_metrics(run_dir: Path) -> bool:
    return RunDirectory(run_dir).metrics.exists()


def _resumed_from(run_dir: Path) -> str | None:
    """Return the named checkpoint from which the run began, or None."""
    file = RunDirectory(run_dir).resumed_from
    if not file.exists():
        return None
    try:
        return str(read_json(file)["checkpoint"])
    except (KeyError, TypeError):
        raise DamagedFileError(f"{file}: damaged: expected a checkpoint; restore it, or start a new run.dir") from None
