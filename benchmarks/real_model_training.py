"""Train a pretrained chat model on arithmetic: held-out accuracy before, after the supervised stage and after RL.

`python benchmarks/real_model_training.py [--folder runs/real_model] [--seeds 0 1 2] [--write]` makes the model folder
(real_model.py) and the data files (arithmetic.py), and trains `configs/smollm2_arithmetic.yaml` with every seed. It can
be interrupted and started again: finished parts are not made twice. Limits: RL alone raises the sampled accuracy by at
least 0.15, mean of the seeds, and a seed takes at most 100 minutes on 2 cores.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)  # in place of this folder, where a file would hide the package `actors`
sys.path.append(str(ROOT / "benchmarks"))

import arithmetic  # noqa: E402
import real_model  # noqa: E402
import results_page  # noqa: E402
from cells import evaluated, metrics, seconds_of, trained  # noqa: E402

from rlsys.stats import mean_difference  # noqa: E402

CONFIG = ROOT / "configs" / "smollm2_arithmetic.yaml"
SEEDS = (0, 1, 2)
PROBLEMS = 256
POINTS = {"before": "before", "sft": "after the supervised stage", "online": "after RL"}
MODES = ("sampled", "greedy")
RISE, MINUTES = 0.15, 100
Figures = Mapping[str, Any]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path("runs/real_model"))
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--write", action="store_true", help=f"write {results_page.PAGE} and its figures")
    arguments = parser.parse_args()
    folder = arguments.folder.absolute()
    model, data = real_model.model_folder(folder / "model"), folder / "data"
    arithmetic.write_files(data)
    found = {seed: of_seed(seed, folder, model, data) for seed in arguments.seeds}
    minutes = {seed: seconds_of(folder / f"seed-{seed}") / 60 for seed in found}
    steps = {seed: metrics(run_of(folder, seed), "online")[1:] for seed in found}
    shown = lines(found, minutes, steps)
    print("\n".join(shown))
    if arguments.write:
        results_page.keep("real_model", {"figures": summaries(found), "minutes": minutes, "lines": shown})
    return int(not is_good(found, minutes) and not arguments.write)  # with --write, the page reports it


def run_of(folder: Path, seed: int) -> Path:
    return folder / f"seed-{seed}" / "run"


def of_seed(seed: int, folder: Path, model: Path, data: Path) -> dict[str, Figures]:
    """Return the held-out figures of a seed by point. The held-out problems are the same for every seed."""
    own, run_dir = folder / f"seed-{seed}", run_of(folder, seed)
    overrides = [
        f"run.seed={seed}",
        f"model.path={model}",
        f"sft.path={data / 'supervised.jsonl'}",
        f"task.path={data / 'train.jsonl'}",
        f"task.held_out_path={data / 'held_out.jsonl'}",
    ]
    measured = [*overrides, f"evaluation.prompts={PROBLEMS}"]
    own.mkdir(parents=True, exist_ok=True)
    figures = {"before": evaluated(model, CONFIG, measured, own / "before.evaluation.json")}
    # The evaluations of the run itself are kept small, because those of the stages' policies follow.
    trained(run_dir, CONFIG, [*overrides, "evaluation.prompts=16", "evaluation.samples=0"])
    for stage in ("sft", "online"):
        policy, output = run_dir / "stages" / stage, own / f"{stage}.evaluation.json"
        figures[stage] = evaluated(policy, CONFIG, measured, output)
    return figures


def values(found: Mapping[int, Mapping[str, Figures]], point: str, mode: str) -> np.ndarray:
    """Return the accuracy of every problem and seed, [seeds * problems]."""
    return np.concatenate([np.array(of[point][mode]["by_problem"]["accuracy"]) for of in found.values()])


def rise(found: Mapping[int, Mapping[str, Figures]]) -> float:
    """Return the rise of the sampled accuracy by RL alone, mean of the seeds."""
    return float(values(found, "online", "sampled").mean() - values(found, "sft", "sampled").mean())


def is_good(found: Mapping[int, Mapping[str, Figures]], minutes: Mapping[int, float]) -> bool:
    return rise(found) >= RISE and max(minutes.values()) <= MINUTES


def summaries(found: Mapping[int, Mapping[str, Figures]]) -> dict[str, Any]:
    """Return the figures of every seed and point without those of single problems."""

    def summary(figures: Figures) -> dict[str, Any]:
        return {mode: {key: value for key, value in figures[mode].items() if key in KEPT} for mode in MODES}

    return {str(seed): {point: summary(of[point]) for point in POINTS} for seed, of in found.items()}


KEPT = ("accuracy", "no_answer_rate", "completion_length")


def lines(
    found: Mapping[int, Mapping[str, Figures]],
    minutes: Mapping[int, float],
    steps: Mapping[int, Sequence[Mapping[str, float]]],
) -> list[str]:
    """Return the section of the page.

    Args:
        found: The figures by seed and point.
        minutes: Minutes of a seed with its evaluations.
        steps: Metrics of the online steps of a seed.
    """
    rows = [
        f"Measured by `python benchmarks/real_model_training.py` with {PROBLEMS} held-out problems, answered greedily "
        "and with 2 samples at temperature 1. Square brackets hold the lowest and the highest seed.",
        "",
        "| point | sampled accuracy | greedy accuracy | sampled, no answer | tokens of a sampled answer |",
        "|---|---|---|---|---|",
    ]
    for point, title in POINTS.items():
        of = [each[point] for each in found.values()]
        cells = [_seeds([each[mode]["accuracy"]["mean"] for each in of]) for mode in MODES]
        cells += [_seeds([each["sampled"]["no_answer_rate"]["mean"] for each in of])]
        cells += [f"{np.mean([each['sampled']['completion_length'] for each in of]):.1f}"]
        rows.append(f"| {title} | {' | '.join(cells)} |")
    rows += [
        "",
        "| seed | minutes | online steps | rollout, s | learning, s | publish, s |",
        "|---|---|---|---|---|---|",
    ]
    for seed, of_steps in steps.items():
        medians = [np.median([row[f"time/{part}_s"] for row in of_steps]) for part in ("rollout", "learn", "publish")]
        times = [f"{median:.1f}" for median in medians]
        rows.append(f"| {seed} | {minutes[seed]:.0f} | {len(of_steps)} | {' | '.join(times)} |")
    return [*rows, "", "Times of a step are medians.", "", verdict(found, minutes)]


def verdict(found: Mapping[int, Mapping[str, Figures]], minutes: Mapping[int, float]) -> str:
    by = mean_difference(values(found, "online", "sampled"), values(found, "sft", "sampled"))
    return (
        f"RL alone changes the sampled accuracy by {by.mean:+.3f} ({by.low:+.3f} to {by.high:+.3f}, paired by problem "
        f"and seed). The longest seed took {max(minutes.values()):.0f} minutes. Expected: at least +{RISE:g}, and at "
        f"most {MINUTES} minutes a seed. Met: {'yes' if is_good(found, minutes) else 'no'}."
    )


def _seeds(means: Sequence[float]) -> str:
    return f"{np.mean(means):.3f} [{min(means):.3f}, {max(means):.3f}]"


if __name__ == "__main__":
    sys.exit(main())
