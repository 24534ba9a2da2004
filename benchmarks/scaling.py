"""Measure how the time of a training step grows: with prompts, group size, length, model, actors and ranks.

`python benchmarks/scaling.py [--folder runs/scaling] [--write]` runs short jobs that differ from a base job in one
setting each, one after the other. It can be interrupted and started again. The models are untrained, so every
completion has the full length, and an entropy bonus lets every sample have a gradient. A figure is the median of the
steps after the first two. `--write` writes docs/scaling.md.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)  # in place of this folder, where a file would hide the package `actors`
sys.path.append(str(ROOT / "benchmarks"))

import results_page  # noqa: E402
from cells import metrics, trained  # noqa: E402

CONFIG, PAGE = ROOT / "configs" / "quickstart.yaml", ROOT / "docs" / "scaling.md"
BEGIN, END = "<!-- step: written by benchmarks/scaling.py -->", "<!-- end of step -->"
FIRST_STEPS, STEPS = 2, 6
BASE = {
    "train.groups_per_step": 16,
    "train.group_size": 8,
    "sampling.max_tokens": 64,
    "model.from_scratch.hidden_size": 192,
    "actors.count": 1,
    "learner.ranks": 1,
}
FIXED = [
    "stages=[online]",
    "actors.max_model_len=320",
    "train.updates_per_step=1",
    "objective.policy.entropy_coef=1e-4",
    f"train.max_steps={FIRST_STEPS + STEPS}",
    "evaluation.prompts=16",
    "evaluation.samples=0",
    "checkpoint.interval=100",
]
VARIED = {
    "prompts of a step": ("train.groups_per_step", (8, 32, 64)),
    "completions of a prompt": ("train.group_size", (4, 16, 32)),
    "tokens of a completion": ("sampling.max_tokens", (32, 128, 256)),
    "width of the model": ("model.from_scratch.hidden_size", (96, 384, 768)),
    "actors": ("actors.count", (2,)),
    "learner ranks": ("learner.ranks", (2,)),
}
PARTS = ("step", "rollout", "learn", "publish")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path("runs/scaling"))
    parser.add_argument("--write", action="store_true", help=f"write {PAGE.name}")
    arguments = parser.parse_args()
    folder = arguments.folder.absolute()
    base = measured(folder / "base", {})
    cells = {
        what: {value: measured(folder / f"{key}={value}", {key: value}) for value in values}
        for what, (key, values) in VARIED.items()
    }
    lines = table(base, cells)
    print("\n".join(lines))
    if arguments.write:
        results_page.write_section(PAGE, BEGIN, END, lines)
    return 0


def measured(run_dir: Path, changes: Mapping[str, int]) -> dict[str, float]:
    """Return the median seconds of a step and its parts."""
    settings = {**BASE, **changes}
    # A head of 32 numbers and an inner layer of 4/3 of the width, as in the quickstart.
    width = settings["model.from_scratch.hidden_size"]
    shape = {"model.from_scratch.heads": width // 32, "model.from_scratch.intermediate_size": width * 4 // 3}
    overrides = [f"{key}={value}" for key, value in {**settings, **shape}.items()]
    trained(run_dir, CONFIG, [*FIXED, *overrides])
    rows = metrics(run_dir, "online")[-STEPS:]
    return {part: statistics.median(row[f"time/{part}_s"] for row in rows) for part in PARTS}


def table(base: Mapping[str, float], cells: Mapping[str, Mapping[int, Mapping[str, float]]]) -> list[str]:
    """Return the times of every job, and its step relative to the base job."""
    lines = [
        "| varied | value | step, s | rollout, s | learning, s | publish, s | step to base |",
        "|---|" + "---|" * 6,
    ]

    def add(what: str, value: object, times: Mapping[str, float]) -> None:
        figures = " | ".join(f"{times[part]:.2f}" for part in PARTS)
        lines.append(f"| {what} | {value} | {figures} | {times['step'] / base['step']:.2f} |")

    for what, of in cells.items():
        key = VARIED[what][0]
        for value, times in sorted([*of.items(), (BASE[key], base)], key=_value):
            add(what, value, times)
    return lines


def _value(cell: Sequence[object]) -> int:
    return int(str(cell[0]))


if __name__ == "__main__":
    sys.exit(main())
