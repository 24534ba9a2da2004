"""The state of a run, read from its files alone. Nothing is written, and Ray is not asked."""

from __future__ import annotations

import re
import shutil
import stat
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rlsys.config.files import load_config
from rlsys.config.schema import Config
from rlsys.config.stages import stage_plans
from rlsys.directory import RunDirectory, SearchDirectory
from rlsys.earlier_runs import check_run_folder
from rlsys.errors import ConfigError, DamagedFileError
from rlsys.files import read_json
from rlsys.models.folder import is_policy
from rlsys.run.checkpoints import newest_first
from rlsys.run.held_out import last_figures
from rlsys.run.journal import INTERVAL_S, Heartbeat, read_heartbeat
from rlsys.run.ledger import OUTCOMES, read_ledger
from rlsys.run.lock import read_owner
from rlsys.run.manifest import MANIFEST
from rlsys.run.metrics import read_rows
from rlsys.run.throughput import Throughput, measure

State = Literal["running", "finished", "interrupted", "failed", "crashed", "unknown"]
SILENT_S = 6 * INTERVAL_S  # an older heartbeat is a sign that the driver hangs
_TAIL_BYTES = 65536
_ERROR = re.compile(r"^(\w+\.)*\w*(Error|Exception|Interrupt)\b.*|.*\b(ERROR|CRITICAL)\b.*|Fatal Python error.*")
COUNTS = {
    "actor_restarts": "process/actor_restarts",
    "learner_restarts": "process/learner_restarts",
    "failed_saves": "process/failed_saves",
    "failed_rollouts": "rollout/failed",
    "skipped_steps": "learner/skipped_steps",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """The newest checkpoint of a run."""

    path: str
    weight_version: int
    age_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class LastError:
    """The newest line in the logs of the processes that reports an error."""

    file: str
    line: str
    age_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class RunStatus:
    """The state of a run. Ages and times are in seconds.

    Attributes:
        reason: why the state is believed, or how the command ended.
        stages: finished and all training steps of every stage; the stage `search` has a step of its own.
        record_age_s: age of metrics.jsonl, which grows with every training step.
        heartbeat: the last heartbeat of the driver; None for a run without one.
        heartbeat_age_s: its age.
        left_s: estimated time until the end of the present stage; None if nothing is known.
        counts: restarts and failures. Those of processes began with the last command.
        prompts: how many prompts of the stream have each outcome.
        held_out: the figures of the last evaluation; see `rlsys.run.held_out`.
        trackers: refused rows and last weight version of every experiment tracker.
        messages: the last messages of the driver.
        faults: files that tell less than they should, and what to do about it.
    """

    run_dir: str
    state: State
    reason: str
    stage: str
    step: int
    steps: int
    stages: Mapping[str, tuple[int, int]]
    weight_version: int
    record_age_s: float | None
    heartbeat: Heartbeat | None
    heartbeat_age_s: float | None
    throughput: Throughput | None
    left_s: float | None
    counts: Mapping[str, int]
    prompts: Mapping[str, int]
    held_out: Mapping[str, float]
    checkpoint: Checkpoint | None
    trackers: Mapping[str, Mapping[str, Any]]
    messages: Sequence[str]
    faults: Sequence[str]
    last_error: LastError | None
    disk_bytes: int
    free_bytes: int


def read_status(run_dir: Path) -> RunStatus:
    """Return the state of a run.

    Raises:
        ConfigError: the folder is no run directory of `rlsys train`.
        DamagedFileError: a file of the run cannot be read.
    """
    directory = _training_run(run_dir)
    config, rows = load_config(directory.config), read_rows(directory.metrics)
    heartbeat, faults = _heartbeat(directory)
    checkpoint = _newest_checkpoint(directory)
    stages = _progress(config, rows)
    stage = _present_stage(stages, rows)
    done, steps = stages[stage]
    exported = is_policy(directory.exported_policy(config.stages[-1]))
    state, reason = _state(directory, heartbeat, complete=exported and stage == config.stages[-1] and done >= steps)
    here = [row for row in rows if row["stage"] == stage]
    throughput = measure(here, config)
    last = rows[-1] if rows else {}
    return RunStatus(
        run_dir=str(run_dir),
        state=state,
        reason=reason,
        stage=stage,
        step=done,
        steps=steps,
        stages=stages,
        weight_version=int(last.get("weights/version", 0)),
        record_age_s=_age(directory.metrics) if rows else None,
        heartbeat=heartbeat,
        heartbeat_age_s=_now() - heartbeat.time if heartbeat else None,
        throughput=throughput,
        left_s=throughput.step_s * (steps - done) if throughput and done < steps else None,
        counts={name: int(_latest(rows, metric) or 0) for name, metric in COUNTS.items()},
        prompts=_prompts(directory),
        held_out=last_figures(rows),
        checkpoint=checkpoint,
        trackers=_trackers(directory),
        messages=_lines(directory.driver_log)[-5:],
        faults=[*faults, *_lost_rows(directory, rows, checkpoint)],
        last_error=_last_error(directory),
        disk_bytes=sum(_size(path) for path in run_dir.rglob("*")),
        free_bytes=shutil.disk_usage(run_dir).free,
    )


def _heartbeat(directory: RunDirectory) -> tuple[Heartbeat | None, list[str]]:
    """Return the last heartbeat, and what is wrong with its file. Without it, only the signs of life are missing."""
    try:
        return read_heartbeat(directory.path), []
    except DamagedFileError as error:
        return None, [error.message]


def _lost_rows(directory: RunDirectory, rows: Sequence[object], checkpoint: Checkpoint | None) -> list[str]:
    """Return what is wrong with metrics.jsonl."""
    if rows or checkpoint is None or not checkpoint.weight_version:
        return []
    reason = f"found none, and a checkpoint of weight version {checkpoint.weight_version}; restore the file"
    return [f"{directory.metrics}: expected a row for each training step, {reason}"]


def _training_run(run_dir: Path) -> RunDirectory:
    """Return the paths of a run, or raise ConfigError if the folder holds none."""
    check_run_folder(run_dir)
    directory, expected = RunDirectory(run_dir), "expected a run directory of `rlsys train`"
    if not directory.config.is_file():
        raise ConfigError(f"{run_dir}: {expected}, found no {directory.config.name} there")
    if SearchDirectory(run_dir).origin.exists():
        raise ConfigError(f"{run_dir}: {expected}, found a search; `rlsys show {run_dir}` lists its trees")
    return directory


def _progress(config: Config, rows: Sequence[Mapping[str, Any]]) -> dict[str, tuple[int, int]]:
    """Return finished and all steps of every stage. The stage `search` counts as one step."""
    stages: dict[str, tuple[int, int]] = {}
    for plan in stage_plans(config):
        made = [row["step"] for row in rows if row["stage"] == plan.name]
        stages[plan.name] = (max(made, default=0), plan.steps) if plan.trains else (len(made[:1]), 1)
    return stages


def _present_stage(stages: Mapping[str, tuple[int, int]], rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the stage of the last row, or the next one if that stage has made all its steps."""
    names = list(stages)
    number = names.index(rows[-1]["stage"]) if rows and rows[-1]["stage"] in stages else 0
    done, steps = stages[names[number]]
    return names[min(number + (done >= steps), len(names) - 1)]


def _state(directory: RunDirectory, heartbeat: Heartbeat | None, *, complete: bool) -> tuple[State, str]:
    """Return the state of a run and its reason. The lock is only read, never taken."""
    owner = read_owner(directory.path)
    if owner is None:
        end = heartbeat.end if heartbeat else ""
        if end.startswith("failed"):
            return "failed", end.removeprefix("failed: ")
        if complete:
            return "finished", "all steps are made"
        by = end.removeprefix("interrupted by ") if end.startswith("interrupted") else "steps are missing"
        return "interrupted", by if "continues" in by else f"{by}; the same command continues"
    where = f"process {owner.pid} on {owner.host}"
    if not owner.here:
        age = _now() - heartbeat.time if heartbeat else None
        if age is not None and age < SILENT_S:
            return "running", where
        return "unknown", f"{where} holds the lock; ask there whether it runs"
    if not owner.alive:
        return "crashed", f"{where} died, as by SIGKILL or for lack of memory; the same command continues"
    return "running", where


def _latest(rows: Sequence[Mapping[str, Any]], metric: str) -> float | None:
    return next((row[metric] for row in reversed(rows) if row.get(metric) is not None), None)


def _prompts(directory: RunDirectory) -> dict[str, int]:
    lines = read_ledger(directory.ledger)
    return {outcome: sum(len(line[outcome]) for line in lines) for outcome in OUTCOMES} if lines else {}


def _newest_checkpoint(directory: RunDirectory) -> Checkpoint | None:
    newest = next((path for path in newest_first(directory.checkpoints) if not path.is_symlink()), None)
    if newest is None:
        return None
    version = re.sub(r"\D", "", newest.name)
    return Checkpoint(path=str(newest), weight_version=int(version or 0), age_s=_age(newest / MANIFEST))


def _trackers(directory: RunDirectory) -> dict[str, Mapping[str, Any]]:
    states = {path.stem: read_json(path) for path in sorted(directory.trackers.glob("*.json"))}
    return {name: {key: state.get(key) for key in ("version", "failures")} for name, state in states.items()}


def _last_error(directory: RunDirectory) -> LastError | None:
    """Return the last error in the newest log file that has one."""
    logs = [path for path in directory.logs.glob("*.log") if path != directory.driver_log]
    for path in sorted(logs, key=_modified, reverse=True):
        line = next((line for line in reversed(_lines(path)) if _ERROR.match(line)), None)
        if line is not None:
            return LastError(file=str(path), line=line[:500], age_s=_age(path))
    return None


def _lines(path: Path) -> list[str]:
    """Return the last lines of a log."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - _TAIL_BYTES))
            return file.read().decode(errors="replace").splitlines()
    except OSError:
        return []


def _age(path: Path) -> float:
    return max(0.0, _now() - _modified(path))


def _modified(path: Path) -> float:
    """Return the Unix time of the last change; 0 for a file that was removed meanwhile."""
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def _size(path: Path) -> int:
    """Return the bytes of a file; 0 for a folder, or a file that was removed meanwhile."""
    try:
        status = path.lstat()
    except OSError:
        return 0
    return status.st_size if stat.S_ISREG(status.st_mode) else 0


def _now() -> float:
    return time.time()  # noqa: TID251 - compared with the times of files
