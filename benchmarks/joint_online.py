"""Joint training against GRPO alone at equal generated tokens: held-out accuracy, reward, wall time.

`python benchmarks/joint_online.py [--folder runs/joint_online_benchmark] [--write]`

Both arms start from the same warm start of a seed and take as many prompts a step. GRPO samples them all; the joint arm
searches a part of them, and its pairs and chains to imitate come from these trees alone. Every generated token counts,
those of discarded branches, duplicates and failed trees too. Both arms get the same sweep of learning rates, on a seed
that is not in the comparison; the rate with the larger area under its accuracy over tokens is taken. The joint arm's
other settings are those of the config, of which only the weight of sft was chosen after a trial: 0.5, on seed 0, in
8 steps at 2e-4. GRPO's are the quickstart's.

Limit: the joint arm reaches the accuracy that GRPO has at its end with at most 0.6 of GRPO's tokens, mean of the seeds.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)  # in place of this folder, where a file would hide the package `actors`
sys.path.append(str(ROOT / "benchmarks"))

import results_page  # noqa: E402
from cells import metrics, trained  # noqa: E402

CONFIG = ROOT / "configs" / "joint_online.yaml"
ARMS = {
    "GRPO": ["search.fraction=0", "objective.preference.weight=0", "objective.sft.weight=0"],
    "joint": [],
}
RATES = (1e-4, 2e-4, 4e-4)
SWEEP_SEED, SEEDS = 100, (0, 1, 2)
STEPS, INTERVAL = 60, 4
LIMIT = 0.6
SMOOTHED = 3  # evaluations in a moving mean: one of 512 problems x 4 samples has a standard error near 0.01


@dataclass(frozen=True, slots=True)
class Curve:
    """What a run reached: [points] generated tokens so far, held-out sampled accuracy, rewards and seconds."""

    tokens: np.ndarray
    accuracy: np.ndarray
    reward: np.ndarray
    seconds: np.ndarray

    def area(self, budget: float) -> float:
        """Mean accuracy over the first `budget` tokens."""
        grid = np.linspace(0, budget, 200)
        return float(np.interp(grid, self.tokens, self.accuracy).mean())

    def tokens_to(self, accuracy: float) -> float:
        """Tokens at which the smoothed accuracy is first reached, linear between evaluations; NaN if never."""
        smooth = smoothed(self.accuracy)
        above = np.flatnonzero(smooth >= accuracy)
        if not len(above):
            return float("nan")
        at = int(above[0])
        if at == 0:
            return float(self.tokens[0])
        share = (accuracy - smooth[at - 1]) / (smooth[at] - smooth[at - 1])
        return float(self.tokens[at - 1] + share * (self.tokens[at] - self.tokens[at - 1]))


def smoothed(values: np.ndarray) -> np.ndarray:
    """Means of each value and those just before it."""
    return np.array([values[max(0, n + 1 - SMOOTHED) : n + 1].mean() for n in range(len(values))])


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path("runs/joint_online_benchmark"))
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--write", action="store_true", help=f"write {results_page.PAGE} and its figures")
    arguments = parser.parse_args()
    folder = arguments.folder.absolute()
    rates = {arm: best_rate(folder, arm) for arm in ARMS}
    curves = {arm: [curve(folder, arm, seed, rates[arm]) for seed in arguments.seeds] for arm in ARMS}
    shares = [joint.tokens_to(end_of(grpo)) / grpo.tokens[-1] for grpo, joint in zip(*curves.values(), strict=True)]
    mean = float(np.mean(shares))
    shown = [
        *lines(arguments.seeds, rates, curves),
        "",
        f"Tokens of the joint arm to GRPO's last accuracy: {mean:.3f} of GRPO's, mean of the seeds (limit {LIMIT}).",
    ]
    print("\n".join(shown))
    if arguments.write:
        found = {arm: [{key: getattr(c, key).tolist() for key in c.__slots__} for c in curves[arm]] for arm in ARMS}
        results_page.keep("joint_online", {"rates": rates, "curves": found, "shares": shares, "lines": shown})
    return int(not mean <= LIMIT and not arguments.write)  # the page says it then


def end_of(found: Curve) -> float:
    return float(smoothed(found.accuracy)[-1])


def best_rate(folder: Path, arm: str) -> float:
    found = {rate: curve(folder, arm, SWEEP_SEED, rate) for rate in RATES}
    budget = min(each.tokens[-1] for each in found.values())
    areas = {rate: each.area(budget) for rate, each in found.items()}
    for rate, area in areas.items():
        print(
            f"{arm}, rate {rate:g}: mean accuracy {area:.4f} over {budget:,.0f} tokens, last {end_of(found[rate]):.4f}"
        )
    best = max(areas, key=lambda rate: areas[rate])
    if best in (min(RATES), max(RATES)):
        print(f"{arm}: the best rate, {best:g}, is at the edge of the sweep")
    return best


def curve(folder: Path, arm: str, seed: int, rate: float) -> Curve:
    base = folder / f"seed-{seed}" / "warm_start"
    quick = [f"run.seed={seed}", "evaluation.prompts=16", "evaluation.samples=0"]
    trained(base, CONFIG, [*quick, "stages=[warm_start]"])
    run_dir = folder / f"seed-{seed}" / f"{arm}-{rate:g}"
    overrides = [
        f"run.seed={seed}",
        "stages=[online]",
        f"model={{path: {base / 'stages' / 'warm_start'}}}",
        f"train.max_steps={STEPS}",
        f"train.optimizer.learning_rate={rate}",
        f"evaluation.interval={INTERVAL}",
        "checkpoint.interval=1000",
        *ARMS[arm],
    ]
    trained(run_dir, CONFIG, overrides)
    return curve_of(metrics(run_dir, "online"))


def curve_of(rows: Sequence[dict[str, float]]) -> Curve:
    tokens = np.cumsum([row.get("rollout/generated_tokens", 0.0) for row in rows])
    # The first row is the evaluation before the first step. Those between steps are no part of training.
    steps = [row["time/step_s"] - row.get("time/evaluate_s", 0.0) if "time/step_s" in row else 0.0 for row in rows]
    seconds = np.cumsum(steps)
    rewards = [row.get("rollout/reward") or 0.0 for row in rows]
    at = [n for n, row in enumerate(rows) if row.get("held_out/sampled_accuracy") is not None]
    accuracy = np.array([rows[n]["held_out/sampled_accuracy"] for n in at])
    return Curve(tokens[at], accuracy, np.array(rewards)[at], seconds[at])


def lines(seeds: Sequence[int], rates: dict[str, float], curves: dict[str, list[Curve]]) -> list[str]:
    found = [
        "| seed | arm | rate | accuracy before | at equal tokens | at the end | reward of the last step | tokens "
        "| seconds, without evaluations | tokens to GRPO's last accuracy, share |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for number, seed in enumerate(seeds):
        end, whole = end_of(curves["GRPO"][number]), curves["GRPO"][number].tokens[-1]
        equal = min(of_arm[number].tokens[-1] for of_arm in curves.values())
        for arm, of_arm in curves.items():
            each = of_arm[number]
            accuracy = [each.accuracy[0], np.interp(equal, each.tokens, smoothed(each.accuracy)), end_of(each)]
            cells = [f"{seed}", arm, f"{rates[arm]:g}", *(f"{value:.3f}" for value in (*accuracy, each.reward[-1]))]
            cells += [f"{each.tokens[-1]:,.0f}", f"{each.seconds[-1]:.0f}", f"{each.tokens_to(end) / whole:.3f}"]
            found.append(f"| {' | '.join(cells)} |")
    return found


if __name__ == "__main__":
    started = time.monotonic()
    code = main()
    print(f"{time.monotonic() - started:.0f} s", file=sys.stderr)
    sys.exit(code)
