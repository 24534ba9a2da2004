"""What `rlsys train` says when a run has reached its end."""

from __future__ import annotations

from pathlib import Path

from rlsys.config.schema import Config
from rlsys.config.stages import stage_plan
from rlsys.directory import RunDirectory
from rlsys.run.metrics import read_rows

FIGURES = {
    "held_out/greedy_accuracy": "greedy accuracy",
    "held_out/sampled_accuracy": "sampled accuracy",
    "held_out/pass_at_k": "pass@k",
}
# A directory that holds a run is refused where run.resume is never.
AGAIN = "run.resume=auto"


def finished(config: Config) -> str:
    """Where the run is, its last held-out figures, and what to do next, a line each."""
    stage = config.stages[-1]
    section = stage_plan(config, stage).section
    more = 2 * config.max_steps(stage)
    return (
        f"run directory: {config.run.dir}\n"
        f"held-out: {_held_out(config)}\n"
        f"evaluate: rlsys evaluate {config.run.dir}\n"
        f"continue: rlsys train {config.run.dir}/config.yaml {section}.max_steps={more}"
        + (f" {AGAIN}" if config.run.resume == "never" else "")
    )


def interrupted(config: Config, saved: str) -> str:
    """What to do after a stop; follows the name of the signal."""
    how = f" with {AGAIN}" if config.run.resume == "never" else ""
    return f"; {saved}, the same command continues{how}"


def complete(config: Config, step: int) -> str:
    """The line for a command that finds nothing to do."""
    stage = config.stages[-1]
    return f"already complete ({step} of {config.max_steps(stage)} {stage} steps)\n"


def _held_out(config: Config) -> str:
    """The figures of the last evaluation in metrics.jsonl."""
    for row in reversed(read_rows(RunDirectory(Path(config.run.dir)).metrics)):
        found = [f"{label} {row[name]:.3f}" for name, label in FIGURES.items() if row.get(name) is not None]
        if found:
            return f"{', '.join(found)} (weight version {row['weights/version']})"
    return "not measured"
