"""Describe the end of a run for the user of `rlsys train`."""

from __future__ import annotations

from pathlib import Path

from rlsys.config.schema import Config
from rlsys.config.stages import stage_plan
from rlsys.directory import RunDirectory
from rlsys.run.held_out import figures_text, last_figures
from rlsys.run.metrics import read_rows
from rlsys.run.resume import checkpoint_store

# run.resume `never` refuses a directory that holds a run.
RESUME = "run.resume=auto"


def finished(config: Config) -> str:
    """Return lines with the run directory, the last held-out figures, and the commands for what comes next."""
    stage = config.stages[-1]
    section = stage_plan(config, stage).section
    max_steps = 2 * stage_plan(config, stage).steps
    rows = read_rows(RunDirectory(Path(config.run.dir)).metrics)
    return (
        f"run directory: {config.run.dir}\n"
        f"held-out: {figures_text(last_figures(rows))}\n{_best(config)}"
        f"evaluate: rlsys evaluate {config.run.dir}\n"
        f"export: rlsys export {config.run.dir} --output FOLDER\n"
        f"continue: rlsys train {config.run.dir}/config.yaml {section}.max_steps={max_steps}"
        + (f" {RESUME}" if config.run.resume == "never" else "")
    )


def interrupted(config: Config, saved: str) -> str:
    """Return the advice to continue after a stop. The text follows the name of the signal."""
    option = f" with {RESUME}" if config.run.resume == "never" else ""
    return f"; {saved}, the same command continues{option}"


def complete(config: Config, step: int) -> str:
    """Return the line for a run that has made all its steps."""
    stage = config.stages[-1]
    return f"already complete ({step} of {stage_plan(config, stage).steps} {stage} steps)\n"


def _best(config: Config) -> str:
    """Return the line for the best checkpoint, if it is not the newest."""
    best = checkpoint_store(config).earlier_best()
    if best is None:
        return ""
    path, score = best
    folder = f"{config.run.dir}/{path.relative_to(Path(config.run.dir).absolute())}"
    return f"best {config.checkpoint.best_metric}: {score:.3f}, {folder} (also a target of rlsys evaluate and export)\n"
