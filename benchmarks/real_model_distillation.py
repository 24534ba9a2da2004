"""On-policy distillation of a pretrained chat model of 135M parameters, alone and beside GRPO, against GRPO alone.

`python benchmarks/real_model_distillation.py [--folder runs/real_model] [--seeds 1] [--write]` continues
real_model_training.py: the student is the model after its supervised stage, and the teacher is the one after RL.
The learner holds the teacher, so that the divergence is over the whole vocabulary. Finished cells are reused.
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

import real_model  # noqa: E402
import real_model_training  # noqa: E402
import results_page  # noqa: E402
from cells import evaluated, metrics, trained  # noqa: E402
from real_model_training import CONFIG, MODES, PROBLEMS  # noqa: E402

from rlsys.stats import mean_over_prompts  # noqa: E402

STEPS = 20
TAUGHT = ["objective.distill={weight: 1, divergence: whole, beta: 1}", "teacher.in_learner=TEACHER"]
ARMS: Mapping[str, Sequence[str]] = {
    "on-policy distillation": [*TAUGHT, "objective.policy.weight=0"],
    "distillation joint with GRPO": TAUGHT,
    "GRPO": [],
}
RATE = 3.0e-5


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path("runs/real_model"))
    parser.add_argument("--seeds", nargs="+", type=int, default=[1])
    parser.add_argument("--write", action="store_true", help=f"write {results_page.PAGE} and its figures")
    arguments = parser.parse_args()
    folder = arguments.folder.absolute()
    model, data = real_model.model_folder(folder / "model"), folder / "data"
    rows = [of_seed(seed, folder, model, data) for seed in arguments.seeds]
    shown = lines(rows)
    print("\n".join(shown))
    if arguments.write:
        results_page.keep("real_model_distillation", {"seeds": arguments.seeds, "lines": shown})
    return 0


def of_seed(seed: int, folder: Path, model: Path, data: Path) -> dict[str, Any]:
    """Return the figures of student, teacher and all arms of a seed."""
    points = real_model_training.of_seed(seed, folder, model, data)["points"]
    found: dict[str, Any] = {
        name: {"accuracy": {mode: points[point][mode]["accuracy"] for mode in MODES}, "tokens": 0, "minutes": 0.0}
        for name, point in (("student", "sft"), ("teacher", "online"))
    }
    stages = folder / f"seed-{seed}" / "run" / "stages"
    overrides = [
        f"run.seed={seed}",
        f"task.path={data / 'train.jsonl'}",
        f"task.held_out_path={data / 'held_out.jsonl'}",
    ]
    measured = [*overrides, f"evaluation.prompts={PROBLEMS}"]
    for number, (name, settings) in enumerate(ARMS.items()):
        run_dir = folder / "distillation" / f"seed-{seed}" / f"arm-{number}"  # apart: minutes are summed by folder
        asked = [each.replace("TEACHER", str(stages / "online")) for each in settings]
        train = [f"train.max_steps={STEPS}", f"train.optimizer={{learning_rate: {RATE}, warmup_updates: 5}}"]
        quick = ["stages=[online]", f"model.path={stages / 'sft'}", "evaluation.prompts=16", "evaluation.samples=0"]
        seconds = trained(run_dir, CONFIG, [*overrides, *quick, *train, *asked])
        tokens = sum(row.get("rollout/generated_tokens", 0) for row in metrics(run_dir, "online"))
        figures = evaluated(run_dir / "stages" / "online", CONFIG, measured, run_dir / "evaluation.json")
        accuracy = {mode: figures[mode]["by_problem"]["accuracy"] for mode in MODES}
        found[name] = {"accuracy": accuracy, "tokens": tokens, "minutes": seconds / 60}
    return found


def lines(seeds: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the section of the page."""
    shown = [
        f"Measured by `python benchmarks/real_model_distillation.py`, {len(seeds)} seeds: {STEPS} online steps of 32 "
        f"prompts with 8 samples at a learning rate of {RATE:g}, from the policy after the supervised stage. "
        f"The teacher is the policy after RL. {PROBLEMS} held-out problems, answered greedily and with 2 samples. "
        "Intervals are 95 % intervals over the problems of all seeds.",
        "",
        "| arm | sampled accuracy | greedy accuracy | generated tokens | minutes |",
        "|---|---|---|---|---|",
    ]
    for name in seeds[0]:
        cells = [name, *(_accuracy([seed[name]["accuracy"][mode] for seed in seeds]) for mode in MODES)]
        cells += [f"{np.mean([seed[name]['tokens'] for seed in seeds]):,.0f}"]
        cells += [f"{np.mean([seed[name]['minutes'] for seed in seeds]):.1f}"]
        shown.append(f"| {' | '.join(cells)} |")
    return shown


def _accuracy(seeds: Sequence[Sequence[float]]) -> str:
    found = mean_over_prompts(np.concatenate([np.array(each) for each in seeds])[:, None])
    return f"{found.mean:.3f} ({found.low:.3f} to {found.high:.3f})"


if __name__ == "__main__":
    sys.exit(main())
