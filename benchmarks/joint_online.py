"""Compare joint training with GRPO alone at equal generated tokens: held-out accuracy, reward, wall time.

`python benchmarks/joint_online.py [--folder runs/joint_online_benchmark] [--write]`

Both arms of a seed start from the same warm start and use the same number of prompts per step. GRPO samples all
prompts. The joint arm searches a part of them, and its preference pairs and demonstrations come from these trees alone.
Every generated token counts, including those of discarded branches, duplicates and failed trees. Both arms get the same
sweep of learning rates, on a seed that is not in the comparison; the rate with the largest area under the curve of
accuracy over tokens is used. The joint arm has the other settings of its config. Their search.fraction and weights of
preference and sft were chosen after a few trials on the same seed. GRPO has the settings of the quickstart.

Limit: the joint arm reaches the last accuracy of GRPO with at most 0.6 of GRPO's tokens, mean of the seeds. A curve
that flattens also reaches its own last accuracy early, so the page shows GRPO's own share too, and the tokens that both
arms need to an accuracy below the plateau.
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
        f"Measured by `python benchmarks/joint_online.py` in {seconds_of(folder) / 60:.0f} minutes on 2 cores.",
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
    return int(not mean <= LIMIT and not arguments.write)  # with --write, the page reports it


def end_of(found: Curve) -> float:
    return float(smoothed(found.accuracy)[-1])


def share(found: Curve, grpo: Curve) -> float:
    """Return the tokens to GRPO's last accuracy, divided by all of GRPO's tokens.

    A run that never reaches this accuracy counts with all of its tokens.
    """
    tokens = found.tokens_to(end_of(grpo))
    return float((found.tokens[-1] if np.isnan(tokens) else tokens) / grpo.tokens[-1])


def best_rate(found: dict[float, Curve]) -> float:
    areas = areas_of(found)
    return max(areas, key=lambda rate: areas[rate])


def areas_of(found: dict[float, Curve]) -> dict[float, float]:
    """Return the mean accuracy of every rate over the tokens that all rates generated."""
    budget = min(each.tokens[-1] for each in found.values())
    return {rate: each.area(budget) for rate, each in found.items()}


def sweep_lines(swept: dict[str, dict[float, Curve]], rates: dict[str, float]) -> list[str]:
    lines = [
        f"Both arms get the same sweep of learning rates: {SWEEP_STEPS} steps on seed {SWEEP_SEED}. The table has the "
        "mean held-out accuracy over the tokens that all rates generated, and in brackets the last accuracy. The rate "
        "with the largest mean is used.",
        "",
        f"| arm | {' | '.join(f'{rate:g}' for rate in RATES)} | used |",
        f"|---|{'---|' * len(RATES)}---|",
    ]
    for arm, found in swept.items():
        cells = [f"{area:.3f} ({end_of(found[rate]):.3f})" for rate, area in areas_of(found).items()]
        edge = ", at the edge of the sweep" if rates[arm] in (min(RATES), max(RATES)) else ""
        lines.append(f"| {arm} | {' | '.join(cells)} | {rates[arm]:g}{edge} |")
    return lines


def verdict(shares: dict[str, list[float]], curves: dict[str, list[Curve]]) -> list[str]:
    """Return the figure with a limit, and two figures that put it into perspective."""
    last = [end_of(each) for each in curves["GRPO"]]
    never = sum(np.isnan(each.tokens_to(bar)) for each, bar in zip(curves["joint"], last, strict=True))
    joint, own = (float(np.mean(shares[arm])) for arm in ("joint", "GRPO"))
    early = {arm: np.array([each.tokens_to(BELOW_PLATEAU) for each in curves[arm]]) for arm in curves}
    needed = {arm: f"{np.mean(tokens):,.0f}" for arm, tokens in early.items()}
    return [
        f"The joint arm needs {joint:.3f} of GRPO's tokens to reach GRPO's last accuracy, mean of the seeds. The limit "
        f"is {LIMIT}. Met: {'yes' if joint <= LIMIT else 'no'}."
        + (f" {never} of {len(last)} seeds never reach it and count with all of their tokens." if never else "")
        + f" GRPO itself first reaches its last accuracy after {own:.3f} of its tokens.",
        "",
        f"To reach an accuracy of {BELOW_PLATEAU:g}, which is below the plateau, the joint arm needs "
        f"{needed['joint']} tokens and GRPO {needed['GRPO']}. Ratio of the two by seed: "
        f"{', '.join(f'{ratio:.3f}' for ratio in early['joint'] / early['GRPO'])}.",
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
    # The first row is the evaluation before the first step. The time of later evaluations does not count as training.
    steps = [row["time/step_s"] - row.get("time/evaluate_s", 0.0) if "time/step_s" in row else 0.0 for row in rows]
    seconds = np.cumsum(steps)
    at = [n for n, row in enumerate(rows) if row.get("held_out/sampled_accuracy") is not None]
    accuracy = np.array([rows[n]["held_out/sampled_accuracy"] for n in at])
    spans = [(1, 1), *itertools.pairwise(at)]  # the steps since the previous evaluation
    rewards = [np.mean([row["rollout/reward"] for row in rows[low + 1 : n + 1] or rows[1:2]]) for low, n in spans]
    return Curve(tokens[at], accuracy, np.array(rewards), seconds[at])


def lines(seeds: Sequence[int], rates: dict[str, float], curves: dict[str, list[Curve]]) -> list[str]:
    """Return a table of seeds and arms, with accuracy, reward and seconds at equal tokens and at the end."""
    found = [
        "Accuracy is held-out accuracy at temperature 1, a mean of 3 evaluations except before training. Reward is the "
        "mean over the steps of these evaluations; for the joint arm it includes the answers of trees. Seconds exclude "
        "evaluations. Equal tokens are the tokens that both arms of a seed have generated.",
        "",
        "| seed | arm | rate | accuracy before | equal tokens | accuracy | reward | seconds | all tokens of the arm "
        "| accuracy | share of GRPO's tokens to reach GRPO's last accuracy |",
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
