"""Joint training against GRPO alone at equal generated tokens: held-out accuracy, reward, wall time.

`python benchmarks/joint_online.py [--folder runs/joint_online_benchmark] [--write]`

Both arms start from the same warm start of a seed and take as many prompts a step. GRPO samples them all; the joint arm
searches a part of them, and its pairs and chains to imitate come from these trees alone. Every generated token counts,
those of discarded branches, duplicates and failed trees too. Both arms get the same sweep of learning rates, on a seed
that is not in the comparison; the rate with the larger area under its accuracy over tokens is taken. The joint arm's
other settings are those of the config, whose search.fraction and weights of preference and sft were chosen after a few
trials on that same seed. GRPO's are the quickstart's, where they were found.

Limit: the joint arm reaches the accuracy that GRPO has at its end with at most 0.6 of GRPO's tokens, mean of the seeds.
A curve that flattens reaches its own last accuracy early too, so GRPO's own share stands beside it, and what both need
to an accuracy below the plateau.
"""

from __future__ import annotations

import argparse
import itertools
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
from cells import metrics, seconds_of, tokens_to, trained  # noqa: E402

CONFIG = ROOT / "configs" / "joint_online.yaml"
ARMS = {
    "GRPO": [
        "search.fraction=0",
        "objective.preference={weight: 0}",
        "objective.sft={weight: 0}",
    ],
    "joint": [],
}
RATES = (1e-4, 2e-4, 4e-4)
SWEEP_SEED, SEEDS = 100, (1, 2, 3)
STEPS, SWEEP_STEPS, INTERVAL = 60, 32, 4
LIMIT = 0.6
BELOW_PLATEAU = 0.9
SMOOTHED = 3  # evaluations in a moving mean: one of 512 problems x 4 samples has a standard error near 0.01


@dataclass(frozen=True, slots=True)
class Curve:
    """What a run reached at every evaluation.

    tokens, accuracy, reward, seconds: [points] generated tokens so far, held-out sampled accuracy, mean reward of the
    steps since the evaluation before (of the first step, before it), seconds so far without evaluations.
    """

    tokens: np.ndarray
    accuracy: np.ndarray
    reward: np.ndarray
    seconds: np.ndarray

    def area(self, budget: float) -> float:
        """Mean accuracy over the first `budget` tokens."""
        grid = np.linspace(0, budget, 200)
        return float(np.interp(grid, self.tokens, self.accuracy).mean())

    def tokens_to(self, accuracy: float) -> float:
        """Tokens at which the smoothed accuracy is first reached; NaN if never."""
        return tokens_to(accuracy, self.tokens, smoothed(self.accuracy))


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
    swept = {arm: {rate: curve(folder, arm, SWEEP_SEED, rate, SWEEP_STEPS) for rate in RATES} for arm in ARMS}
    rates = {arm: best_rate(found) for arm, found in swept.items()}
    curves = {arm: [curve(folder, arm, seed, rates[arm]) for seed in arguments.seeds] for arm in ARMS}
    shares = {arm: [share(each, grpo) for each, grpo in zip(curves[arm], curves["GRPO"], strict=True)] for arm in ARMS}
    mean = float(np.mean(shares["joint"]))
    shown = [
        f"`python benchmarks/joint_online.py`; {seconds_of(folder) / 60:.0f} minutes on 2 cores.",
        "",
        *sweep_lines(swept, rates),
        "",
        *lines(arguments.seeds, rates, curves),
        "",
        *verdict(shares, curves),
    ]
    print("\n".join(shown))
    if arguments.write:
        found = {arm: [{key: getattr(c, key).tolist() for key in c.__slots__} for c in curves[arm]] for arm in ARMS}
        results_page.keep("joint_online", {"rates": rates, "curves": found, "shares": shares, "lines": shown})
    return int(not mean <= LIMIT and not arguments.write)  # the page says it then


def end_of(found: Curve) -> float:
    return float(smoothed(found.accuracy)[-1])


def share(found: Curve, grpo: Curve) -> float:
    """Tokens until GRPO's last accuracy, as a share of all of GRPO's; of a run that never reaches it, all its own."""
    tokens = found.tokens_to(end_of(grpo))
    return float((found.tokens[-1] if np.isnan(tokens) else tokens) / grpo.tokens[-1])


def best_rate(found: dict[float, Curve]) -> float:
    areas = areas_of(found)
    return max(areas, key=lambda rate: areas[rate])


def areas_of(found: dict[float, Curve]) -> dict[float, float]:
    """Mean accuracy of every rate over the tokens that all of them generated."""
    budget = min(each.tokens[-1] for each in found.values())
    return {rate: each.area(budget) for rate, each in found.items()}


def sweep_lines(swept: dict[str, dict[float, Curve]], rates: dict[str, float]) -> list[str]:
    lines = [
        f"Learning rates, the same sweep for both arms, {SWEEP_STEPS} steps on seed {SWEEP_SEED}: mean held-out "
        "accuracy over the tokens that all rates generated, in brackets the last; the largest mean is taken.",
        "",
        f"| arm | {' | '.join(f'{rate:g}' for rate in RATES)} | taken |",
        f"|---|{'---|' * len(RATES)}---|",
    ]
    for arm, found in swept.items():
        cells = [f"{area:.3f} ({end_of(found[rate]):.3f})" for rate, area in areas_of(found).items()]
        edge = ", at the edge of the sweep" if rates[arm] in (min(RATES), max(RATES)) else ""
        lines.append(f"| {arm} | {' | '.join(cells)} | {rates[arm]:g}{edge} |")
    return lines


def verdict(shares: dict[str, list[float]], curves: dict[str, list[Curve]]) -> list[str]:
    """The judged figure, and two that tell what it is worth."""
    last = [end_of(each) for each in curves["GRPO"]]
    never = sum(np.isnan(each.tokens_to(bar)) for each, bar in zip(curves["joint"], last, strict=True))
    joint, own = (float(np.mean(shares[arm])) for arm in ("joint", "GRPO"))
    early = {arm: np.array([each.tokens_to(BELOW_PLATEAU) for each in curves[arm]]) for arm in curves}
    needed = {arm: f"{np.mean(tokens):,.0f}" for arm, tokens in early.items()}
    return [
        f"To GRPO's last accuracy the joint arm needs {joint:.3f} of GRPO's tokens, mean of the seeds; the limit is "
        f"{LIMIT}: {'yes' if joint <= LIMIT else 'no'}."
        + (f" {never} of {len(last)} seeds never reach it; they count with all of their tokens." if never else "")
        + f" GRPO itself is at its last accuracy after {own:.3f}.",
        "",
        f"To an accuracy of {BELOW_PLATEAU:g}, below the plateau: {needed['joint']} tokens jointly, {needed['GRPO']} "
        f"with GRPO, by seed {', '.join(f'{ratio:.3f}' for ratio in early['joint'] / early['GRPO'])} of GRPO's.",
    ]


def curve(folder: Path, arm: str, seed: int, rate: float, steps: int = STEPS) -> Curve:
    base = folder / f"seed-{seed}" / "warm_start"
    quick = [f"run.seed={seed}", "evaluation.prompts=16", "evaluation.samples=0"]
    trained(base, CONFIG, [*quick, "stages=[warm_start]"])
    run_dir = folder / f"seed-{seed}" / f"{arm}-{rate:g}"
    overrides = [
        f"run.seed={seed}",
        "stages=[online]",
        f"model={{path: {base / 'stages' / 'warm_start'}}}",
        f"train.max_steps={steps}",
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
    at = [n for n, row in enumerate(rows) if row.get("held_out/sampled_accuracy") is not None]
    accuracy = np.array([rows[n]["held_out/sampled_accuracy"] for n in at])
    spans = [(1, 1), *itertools.pairwise(at)]  # of steps: those since the evaluation before
    rewards = [np.mean([row["rollout/reward"] for row in rows[low + 1 : n + 1] or rows[1:2]]) for low, n in spans]
    return Curve(tokens[at], accuracy, np.array(rewards), seconds[at])


def lines(seeds: Sequence[int], rates: dict[str, float], curves: dict[str, list[Curve]]) -> list[str]:
    """A row for every seed and arm; accuracy, reward and seconds at as many tokens as both arms generated."""
    found = [
        "Accuracy is held-out, at temperature 1, a mean of 3 evaluations but for that before training. Reward is the "
        "mean of the steps around; the joint arm's holds the answers of its trees. Seconds are without evaluations.",
        "",
        "| seed | arm | rate | accuracy before | tokens of both | accuracy | reward | seconds | all its tokens "
        "| accuracy | tokens to GRPO's last accuracy, share of GRPO's |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for number, seed in enumerate(seeds):
        grpo = curves["GRPO"][number]
        equal = min(of_arm[number].tokens[-1] for of_arm in curves.values())
        for arm, of_arm in curves.items():
            each = of_arm[number]
            at_equal = [np.interp(equal, each.tokens, smoothed(what)) for what in (each.accuracy, each.reward)]
            seconds = np.interp(equal, each.tokens, each.seconds)
            reached = not np.isnan(each.tokens_to(end_of(grpo)))
            cells = [f"{seed}", arm, f"{rates[arm]:g}", f"{each.accuracy[0]:.3f}", f"{equal:,.0f}"]
            cells += [*(f"{value:.3f}" for value in at_equal), f"{seconds:.0f}", f"{each.tokens[-1]:,.0f}"]
            cells += [f"{end_of(each):.3f}", f"{share(each, grpo):.3f}" if reached else "never"]
            found.append(f"| {' | '.join(cells)} |")
    return found


if __name__ == "__main__":
    started = time.monotonic()
    code = main()
    print(f"{time.monotonic() - started:.0f} s", file=sys.stderr)
    sys.exit(code)
