"""Where a run starts: from scratch, or from a checkpoint of the same experiment."""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from rlsys.config.compare import changed_fields, check_fields, config_of, extraction_request
from rlsys.config.files import flat_fields
from rlsys.config.schema import Config
from rlsys.config.stages import SEARCHED, stage_plan, stage_plans
from rlsys.directory import RunDirectory, SearchDirectory
from rlsys.errors import CheckpointError, ConfigError
from rlsys.files import read_json, write_json
from rlsys.run.checkpoints import MANIFEST, CheckpointStore, state_from_json
from rlsys.run.resume_paths import check_folders, check_named, check_unused, has_metrics, resumed_from
from rlsys.types import RunState


@dataclass(frozen=True, slots=True)
class Start:
    """The state a run begins with, and the checkpoint it comes from.

    named: the checkpoint is that of `run.resume`, none of the run's own line. changed: fields that may change and have,
    since the run last began, as text.
    """

    state: RunState
    checkpoint: Path | None
    named: bool = False
    changed: tuple[str, ...] = ()

    def describe(self) -> str:
        if self.checkpoint is None:
            return "starting from the initial model"
        changed = f"; changed: {', '.join(self.changed)}" if self.changed else ""
        return f"resuming from {self.checkpoint} (weight version {self.state.weight_version}){changed}"

    def settle(self, run_dir: Path) -> None:
        """Bring into the run directory what this start needs there, once everything about it is accepted."""
        if self.checkpoint is None:
            RunDirectory(run_dir).resumed_from.unlink(missing_ok=True)  # this run begins anew
        elif self.named:
            origin, stages = self.checkpoint.parent.parent, RunDirectory(run_dir).stages
            if origin.resolve() != run_dir.resolve():
                shutil.rmtree(stages, ignore_errors=True)
                if RunDirectory(origin).stages.is_dir():  # a stage may be anchored to the policy of the one before
                    shutil.copytree(RunDirectory(origin).stages, stages)
            write_json(RunDirectory(run_dir).resumed_from, {"checkpoint": str(self.checkpoint.resolve())})


def find_start(config: Config, run_dir: Path, store: CheckpointStore) -> Start:
    """Apply `run.resume`. The same command again continues: a path is where the run begins, not where it stays.

    Nothing is changed; `Start.settle` does that.

    Raises:
        ConfigError: a fixed field differs from that of the run to be resumed, the directory is that of a search, or is
            used although `run.resume` is never or a path that it does not descend from, or the path is no checkpoint,
            or one of another run that leaves no step to make.
        CheckpointError: checkpoints exist and none is valid.
    """
    search = SearchDirectory(run_dir)
    if search.origin.exists() and any(search.trees.rglob("*.json*")):
        raise ConfigError(f"run.dir {run_dir} holds the trees of a search: choose another run.dir")
    check_folders(store.folder)
    resume, own = config.run.resume, store.latest()
    if resume == "never" and (own is not None or has_metrics(run_dir)):
        raise ConfigError(f"run.resume is never and run.dir {run_dir} holds a run: choose another run.dir")
    if resume in ("auto", "never"):
        if own is None:
            return Start(RunState(stage=0, step=0, weight_version=0, cursor=0), None)
        return _start_at(config, own, run_dir)
    path = Path(resume).absolute()
    descends = resumed_from(run_dir) == str(path.resolve())
    if descends and own is not None:
        return _start_at(config, own, run_dir)
    check_named(path, store)
    if not descends:
        check_unused(path, own, run_dir)
    return _branch(config, path, run_dir)


def find_again(config: Config, run_dir: Path, store: CheckpointStore) -> Start:
    """Where a run goes on that has lost its learner: its newest checkpoint, else where this command began.

    Raises:
        CheckpointError: checkpoints exist and none is valid.
    """
    if config.run.resume == "never":  # that the directory is in use now is this command's doing
        config = config.model_copy(update={"run": config.run.model_copy(update={"resume": "auto"})})
    return replace(find_start(config, run_dir, store), named=False)


def check_inputs(start: Start, fingerprint: Mapping[str, str]) -> None:
    """Compare the contents of data, model and tokenizer with those that the checkpoint was trained with.

    Args:
        fingerprint: of the inputs as they are now (`Inputs.fingerprint`).
    Raises:
        ConfigError: one differs; names the field.
    """
    if start.checkpoint is None:
        return
    before = read_json(start.checkpoint / MANIFEST)["info"].get("inputs")
    if before is None:
        raise ConfigError(
            f"{start.checkpoint} was made by an older version of rlsys, which did not record the contents of data, "
            "model and tokenizer; continue with that version, or start a new run.dir"
        )
    if "preference.path" in fingerprint and "preference.path" not in before:
        raise ConfigError(
            f"preference.path: {start.checkpoint} was trained without pairs of a file, which objective.preference or "
            "objective.sft asks for now; set these back, or start a new run.dir"
        )
    different = [name for name, digest in fingerprint.items() if _known_now(before.get(name), digest) != digest]
    if different:
        digests = [
            f"expected sha256 {_short(before.get(name))}, found {_short(fingerprint[name])}" for name in different
        ]
        raise ConfigError(
            f"{' and '.join(different)}: the contents differ from those that {start.checkpoint} was trained with "
            f"({'; '.join(digests)}); put them back, or start a new run.dir"
        )


def _short(digest: str | None) -> str:
    """Enough of a digest to tell it from others; what is no digest, as it is."""
    return digest[:12] if digest and re.fullmatch("[0-9a-f]{64}", digest) else digest or "none"


def _known_now(before: str | None, now: str) -> str | None:
    """What a checkpoint recorded, without what is not known before the data of the stage `search` are read."""
    return SEARCHED if now == SEARCHED and before and before.startswith(SEARCHED) else before


def check_extraction(config: Config, start: Start, prompts: int) -> None:
    """Compare what the stage `search` would be asked for now with what it was, once it is passed and yet to be read.

    Args:
        prompts: how many the stage grows trees for.
    Raises:
        ConfigError: one differs; names the field.
        CheckpointError: what the stage has noted cannot be read.
    """
    plans, state = stage_plans(config), start.state
    if start.checkpoint is None or all(plan.trains for plan in plans[: state.stage]):
        return
    left = plans[state.stage + (state.step >= plans[state.stage].steps) :]
    path = RunDirectory(start.checkpoint.parent.parent).search_stage.stage_record
    if not any(plan.reads_extracted for plan in left) or not path.exists():
        return
    try:
        before, now = (
            flat_fields({"search": {"prompts": asked["prompts"]}, "extract": asked["extract"]})
            for asked in (read_json(path)["asked"], extraction_request(config, prompts))
        )
    except (KeyError, TypeError):
        raise CheckpointError(f"{path}: damaged; restore it, or start a new run.dir") from None
    for name in before | now:
        if before.get(name) != now.get(name):
            raise ConfigError(
                f"{name} differs from what the stage search has extracted ({path}): expected {before.get(name)}, found "
                f"{now.get(name)}; set it back, or start a new run.dir"
            )


def _start_at(config: Config, checkpoint: Path, origin: Path) -> Start:
    """Continue from a checkpoint of the run directory `origin`."""
    before = config_of(origin)
    state = state_from_json(read_json(checkpoint / "state.json"))
    check_fields(config, before, state, RunDirectory(origin).config)
    _check_critic(config, state, checkpoint)
    return Start(state, checkpoint, changed=changed_fields(before, config))


def _check_critic(config: Config, state: RunState, checkpoint: Path) -> None:
    """A critic begins with the policy that its stage begins with: within the stage there is no place to begin one."""
    plan = stage_plan(config, config.stages[state.stage])
    if plan.settings.critic and 0 < state.step < plan.steps and not (checkpoint / "critic").is_dir():
        raise ConfigError(
            f"objective.value.weight and objective.policy.estimator gae need a critic, and {checkpoint} has none: the "
            f"first {state.step} steps of stage online were made without; set both back, or begin the stage with a "
            f"critic, in a new run.dir with stages [online] and model.path {checkpoint / 'policy'}"
        )


def _branch(config: Config, checkpoint: Path, run_dir: Path) -> Start:
    """Begin a line of checkpoints in run_dir with one that was named."""
    origin = checkpoint.parent.parent
    start = _start_at(config, checkpoint, origin)
    if origin.resolve() != run_dir.resolve() and all_steps_made(config, start.state):
        stage = config.stages[-1]
        raise ConfigError(
            f"run.resume: {checkpoint} has made all {start.state.step} steps of the last stage; "
            f"raise {stage_plan(config, stage).section}.max_steps (now {config.max_steps(stage)})"
        )
    return replace(start, named=True)


def all_steps_made(config: Config, state: RunState) -> bool:
    """Whether the last stage has none left."""
    last = len(config.stages) - 1
    return state.stage == last and state.step >= config.max_steps(config.stages[last])
