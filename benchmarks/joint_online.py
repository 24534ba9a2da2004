"""Compare joint training with GRPO at equal generated tokens: held-out accuracy, reward, wall time.

`python benchmarks/joint_online.py [--study letter_count | hard_letter_count] [--folder FOLDER] [--write]`

All arms of a seed start from the same warm start and use the same number of prompts per step. Joint arms search a part
of them, and their preference pairs and demonstrations come from these trees alone. Every generated token counts,
including those of discarded branches, duplicates, failed trees and groups that dynamic sampling replaced. A teacher
generates nothing: it scores tokens. All arms get the same sweep of learning rates, on a seed that is not in the
comparison; the rate with the largest area under the curve of accuracy over tokens is used.

- `letter_count`: samples mostly succeed. The joint arm has the other settings of its config. Their search.fraction and
  weights of preference and sft were chosen after a few trials on the seed of the sweep.
- `hard_letter_count`: about one sample in ten succeeds. The arms are GRPO, GRPO with dynamic sampling, joint with
  search, with a larger teacher, and with both. The teacher learned from demonstrations without errors. All have the
  settings of the config but for the number of steps and the evaluations.

Limit: a joint arm reaches the last accuracy of the baseline with at most 0.6 of its tokens, mean of the seeds. A curve
that flattens also reaches its own last accuracy early, so the page shows the baseline's own share too, and the tokens
that all arms need to a lower accuracy.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)  # in place of this folder, where a file would hide the package `actors`
sys.path.append(str(ROOT / "benchmarks"))

import results_page  # noqa: E402
from cells import metrics, seconds_of, tokens_to, trained  # noqa: E402

LIMIT = 0.6
INTERVAL = 4
SMOOTHED = 3  # evaluations in a moving mean: one of 256 to 512 problems x 4 samples has a standard error near 0.01
SWEEP_SEED, SEEDS = 100, (1, 2, 3)
QUICK = ["evaluation.greedy=false", "evaluation.prompts=256"]
NO_PAIRS, NO_SFT = "objective.preference={weight: 0}", "objective.sft={weight: 0}"
TEACHER = [
    "actors.count=1",  # the engine of the teacher has the other core
    "teacher.model={path: {teacher}, max_model_len: 256, kv_cache_gib: 0.2}",
    "objective.distill={weight: 1.0, divergence: sampled}",
]


@dataclass(frozen=True, slots=True)
class Study:
    """A comparison on one task.

    Attributes:
        config: Name of the config of all arms.
        arms: Overrides of each arm. {teacher} stands for the folder of the teacher.
        baseline: Arm whose last accuracy the others are to reach.
        rates: Learning rates of the sweep.
        steps: Training steps of a run.
        sweep_steps: Training steps of a run of the sweep.
        goal: A lower accuracy, to which the tokens are shown, too.
        page: Name of the figures in docs/results.
        teacher: Overrides of the config whose warm start makes the teacher; None without one.
    """

    config: str
    arms: Mapping[str, Sequence[str]]
    baseline: str
    rates: Sequence[float]
    steps: int
    sweep_steps: int
    goal: float
    page: str
    teacher: Sequence[str] | None = None

    @property
    def path(self) -> Path:
        return ROOT / "configs" / f"{self.config}.yaml"


STUDIES = {
    "letter_count": Study(
        config="joint_online",
        arms={"GRPO": ["search.fraction=0", NO_PAIRS, NO_SFT], "joint": []},
        baseline="GRPO",
        rates=(1e-4, 2e-4, 4e-4),
        steps=60,
        sweep_steps=32,
        goal=0.9,
        page="joint_online",
    ),
    "hard_letter_count": Study(
        config="joint_hard_letter_count",
        arms={
            "GRPO": ["search.unsolved=false", NO_PAIRS, NO_SFT, "train.dynamic_sampling_rounds=0", *QUICK],
            "GRPO, dynamic sampling": ["search.unsolved=false", NO_PAIRS, NO_SFT, *QUICK],
            "joint with search": QUICK,
            "joint with search and teacher": [*TEACHER, *QUICK],
            "joint with teacher, without search": ["search.unsolved=false", NO_PAIRS, NO_SFT, *TEACHER, *QUICK],
        },
        baseline="GRPO, dynamic sampling",
        rates=(5e-5, 1e-4, 2e-4, 4e-4),
        steps=24,
        sweep_steps=8,
        goal=0.5,
        page="joint_hard_letter_count",
        teacher=[
            "task.error_rate=0",
            "model.from_scratch={hidden_size: 256, layers: 4, heads: 8, intermediate_size: 512, tie_embeddings: false}",
            "warm_start.max_steps=900",
        ],
    ),
}


@dataclass(frozen=True, slots=True)
class Curve:
    """Results of a run at its evaluations, [points] each.

    Attributes:
        tokens: Generated tokens so far.
        accuracy: Held-out sampled accuracy.
        reward: Mean reward of the steps since the previous evaluation; at the first evaluation, of the first step.
        seconds: Seconds so far, without evaluations.
    """

    tokens: np.ndarray
    accuracy: np.ndarray
    reward: np.ndarray
    seconds: np.ndarray

    def area(self, budget: float) -> float:
        """Return the mean accuracy over the first `budget` tokens."""
        grid = np.linspace(0, budget, 200)
        return float(np.interp(grid, self.tokens, self.accuracy).mean())

    def tokens_to(self, accuracy: float) -> float:
        """Return the tokens at which the smoothed accuracy first reaches a value; NaN if it never does."""
        return tokens_to(accuracy, self.tokens, smoothed(self.accuracy))


def smoothed(values: np.ndarray) -> np.ndarray:
    """Return the mean of each value and the values just before it."""
    return np.array([values[max(0, n + 1 - SMOOTHED) : n + 1].mean() for n in range(len(values))])


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--study", choices=list(STUDIES), default="letter_count")
    parser.add_argument("--folder", type=Path, help="by default runs/joint_online_benchmark/STUDY")
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--write", action="store_true", help=f"write {results_page.PAGE} and its figures")
    arguments = parser.parse_args()
    study = STUDIES[arguments.study]
    folder = (arguments.folder or Path("runs/joint_online_benchmark") / arguments.study).absolute()
    swept = {
        arm: {rate: curve(study, folder, arm, SWEEP_SEED, rate, study.sweep_steps) for rate in study.rates}
        for arm in study.arms
    }
    rates = {arm: best_rate(found) for arm, found in swept.items()}
    # All arms of a seed before the next seed, so that a run that ends early has whole seeds.
    cells = {
        (seed, arm): curve(study, folder, arm, seed, rates[arm], study.steps)
        for seed in arguments.seeds
        for arm in study.arms
    }
    curves = {arm: [cells[seed, arm] for seed in arguments.seeds] for arm in study.arms}
    baseline = curves[study.baseline]
    shares = {arm: [share(each, to) for each, to in zip(found, baseline, strict=True)] for arm, found in curves.items()}
    shown = [
        f"Measured by `python benchmarks/joint_online.py --study {arguments.study}` in {seconds_of(folder) / 60:.0f} "
        "minutes on 2 cores.",
        "",
        *sweep_lines(study, swept, rates),
        "",
        *lines(study, arguments.seeds, rates, curves),
        "",
        *verdict(study, shares, curves),
    ]
    print("\n".join(shown))
    if arguments.write:
        found = {arm: [{key: getattr(c, key).tolist() for key in c.__slots__} for c in curves[arm]] for arm in curves}
        results_page.keep(study.page, {"rates": rates, "curves": found, "shares": shares, "lines": shown})
    met = any("Met: yes" in line for line in shown)
    return int(not met and not arguments.write)  # with --write, the page reports it


def end_of(found: Curve) -> float:
    return float(smoothed(found.accuracy)[-1])


def share(found: Curve, baseline: Curve) -> float:
    """Return the tokens to the last accuracy of the baseline, divided by all of its tokens.

    A run that never reaches this accuracy counts with all of its tokens.
    """
    tokens = found.tokens_to(end_of(baseline))
    return float((found.tokens[-1] if np.isnan(tokens) else tokens) / baseline.tokens[-1])


def best_rate(found: dict[float, Curve]) -> float:
    areas = areas_of(found)
    return max(areas, key=lambda rate: areas[rate])


def areas_of(found: dict[float, Curve]) -> dict[float, float]:
    """Return the mean accuracy of every rate over the tokens that all rates generated."""
    budget = min(each.tokens[-1] for each in found.values())
    return {rate: each.area(budget) for rate, each in found.items()}


def sweep_lines(study: Study, swept: dict[str, dict[float, Curve]], rates: dict[str, float]) -> list[str]:
    lines = [
        f"All arms get the same sweep of learning rates: {study.sweep_steps} steps on seed {SWEEP_SEED}. The table has "
        "the mean held-out accuracy over the tokens that all rates generated, and in brackets the last one. The rate "
        "with the largest mean is used.",
        "",
        f"| arm | {' | '.join(f'{rate:g}' for rate in study.rates)} | used |",
        f"|---|{'---|' * len(study.rates)}---|",
    ]
    for arm, found in swept.items():
        cells = [f"{area:.3f} ({end_of(found[rate]):.3f})" for rate, area in areas_of(found).items()]
        edge = ", at the edge of the sweep" if rates[arm] in (min(study.rates), max(study.rates)) else ""
        lines.append(f"| {arm} | {' | '.join(cells)} | {rates[arm]:g}{edge} |")
    return lines


def verdict(study: Study, shares: dict[str, list[float]], curves: dict[str, list[Curve]]) -> list[str]:
    """Return the figure with a limit of every joint arm, and two figures that put it into perspective."""
    last = [end_of(each) for each in curves[study.baseline]]
    found = []
    for arm in (arm for arm in curves if arm.startswith("joint")):
        mean, never = float(np.mean(shares[arm])), 0
        for each, bar in zip(curves[arm], last, strict=True):
            never += bool(np.isnan(each.tokens_to(bar)))
        found += [
            f"The arm `{arm}` needs {mean:.3f} of the tokens of `{study.baseline}` to reach its last accuracy, mean of "
            f"the seeds. The limit is {LIMIT}. Met: {'yes' if mean <= LIMIT and not never else 'no'}."
            + (f" {never} of {len(last)} seeds never reach it and count with all of their tokens." if never else ""),
            "",
        ]
    early = {arm: np.array([each.tokens_to(study.goal) for each in curves[arm]]) for arm in curves}
    needed = ", ".join(f"`{arm}` {np.mean(tokens):,.0f}" for arm, tokens in early.items())
    ratios = "; ".join(
        f"`{arm}` {', '.join(f'{ratio:.3f}' for ratio in tokens / early[study.baseline])}"
        for arm, tokens in early.items()
        if arm != study.baseline
    )
    return [
        *found,
        f"`{study.baseline}` itself first reaches its last accuracy after {np.mean(shares[study.baseline]):.3f} of its "
        "tokens.",
        "",
        f"Tokens to an accuracy of {study.goal:g} (nan: a seed never reaches it): {needed}. "
        f"By seed, divided by those of the baseline: {ratios}.",
    ]


def curve(study: Study, folder: Path, arm: str, seed: int, rate: float, steps: int) -> Curve:
    base = folder / f"seed-{seed}" / "warm_start"
    quick = [f"run.seed={seed}", "evaluation.prompts=16", "evaluation.samples=0", "stages=[warm_start]"]
    trained(base, study.path, quick)
    settings = " ".join(study.arms[arm])
    if "{teacher}" in settings:
        trained(folder / "teacher", study.path, [*quick[1:], *(study.teacher or ())])
    run_dir = folder / f"seed-{seed}" / f"{arm}-{rate:g}"
    overrides = [
        f"run.seed={seed}",
        "stages=[online]",
        f"model={{path: {base / 'stages' / 'warm_start'}}}",
        f"train.max_steps={steps}",
        f"train.optimizer.learning_rate={rate}",
        f"evaluation.interval={INTERVAL}",
        "checkpoint.interval=1000",
        *(each.replace("{teacher}", str(folder / "teacher" / "stages" / "warm_start")) for each in study.arms[arm]),
    ]
    trained(run_dir, study.path, overrides)
    return curve_of(metrics(run_dir, "online"))


def curve_of(rows: Sequence[dict[str, float]]) -> Curve:
    tokens = np.cumsum([row.get("rollout/generated_tokens", 0.0) for row in rows])
    # The first row is the evaluation before the first step. The time of later evaluations does not count as training.
    steps = [row["time/step_s"] - row.get("time/evaluate_s", 0.0) if "time/step_s" in row else 0.0 for row in rows]
    seconds = np.cumsum(steps)
    at = [n for n, row in enumerate(rows) if row.get("held_out/sampled_accuracy") is not None]
    accuracy = np.array([rows[n]["held_out/sampled_accuracy"] for n in at])
    spans = [(1, 1), *itertools.pairwise(at)]  # the steps since the previous evaluation
    rewards = [np.mean([row["rollout/reward"] for row in rows[low + 1 : n + 1] or rows[1:2]]) for low, n in spans]
    return Curve(tokens[at], accuracy, np.array(rewards), seconds[at])


def lines(study: Study, seeds: Sequence[int], rates: dict[str, float], curves: dict[str, list[Curve]]) -> list[str]:
    """Return a table of seeds and arms, with accuracy, reward and seconds at equal tokens and at the end."""
    found = [
        "Accuracy is held-out accuracy at temperature 1, a mean of 3 evaluations except before training. Reward is the "
        "mean over the steps of these evaluations; for joint arms it includes the answers of trees. Seconds exclude "
        "evaluations. Equal tokens are the tokens that all arms of a seed have generated.",
        "",
        "| seed | arm | rate | accuracy before | equal tokens | accuracy | reward | seconds | all tokens of the arm "
        f"| accuracy | share of the tokens of `{study.baseline}` to reach its last accuracy |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for number, seed in enumerate(seeds):
        baseline = curves[study.baseline][number]
        equal = min(of_arm[number].tokens[-1] for of_arm in curves.values())
        for arm, of_arm in curves.items():
            each = of_arm[number]
            at_equal = [np.interp(equal, each.tokens, smoothed(what)) for what in (each.accuracy, each.reward)]
            seconds = np.interp(equal, each.tokens, each.seconds)
            reached = not np.isnan(each.tokens_to(end_of(baseline)))
            cells = [f"{seed}", arm, f"{rates[arm]:g}", f"{each.accuracy[0]:.3f}", f"{equal:,.0f}"]
            cells += [*(f"{value:.3f}" for value in at_equal), f"{seconds:.0f}", f"{each.tokens[-1]:,.0f}"]
            cells += [f"{end_of(each):.3f}", f"{share(each, baseline):.3f}" if reached else "never"]
            found.append(f"| {' | '.join(cells)} |")
    return found


if __name__ == "__main__":
    started = time.monotonic()
    code = main()
    print(f"{time.monotonic() - started:.0f} s", file=sys.stderr)
    sys.exit(code)
