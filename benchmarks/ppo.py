"""Compare PPO with a critic and GRPO on the quickstart task: sampled accuracy before and after, generated tokens.

`python benchmarks/ppo.py [--folder runs/ppo]` trains `configs/ppo_letter_count.yaml` and `configs/quickstart.yaml` with
seeds 0, 1 and 2. Both configs of a seed have the same warm start. Limits: PPO raises the accuracy from at most 0.50 to
at least 0.70. It generates at most twice as many tokens as GRPO, in total and until an accuracy of 0.70.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "benchmarks"))

import results_page  # noqa: E402
from cells import metrics, seconds_of, tokens_to, trained  # noqa: E402

SEEDS = (0, 1, 2)
GOAL, INTERVAL = 0.70, 5
CONFIGS = {name: ROOT / "configs" / f"{name}.yaml" for name in ("ppo_letter_count", "quickstart")}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path("runs/ppo"))
    parser.add_argument("--write", action="store_true", help=f"write {results_page.PAGE} and its figures")
    arguments = parser.parse_args()
    rows = [measure(arguments.folder.absolute(), name, seed) for seed in SEEDS for name in CONFIGS]
    critic, plain = ([row for row in rows if row.name == name] for name in CONFIGS)
    shown = [
        f"Measured by `python benchmarks/ppo.py` in {seconds_of(arguments.folder) / 60:.0f} minutes on 2 cores. "
        "Accuracy is held-out accuracy at temperature 1.",
        "",
        f"| seed | config | accuracy before | after | no answer after | tokens to {GOAL:g} | all tokens "
        "| explained variance, last 10 steps | seconds |",
        "|---|---|---|---|---|---|---|---|---|",
        *(row.line() for row in rows),
        "",
        *(verdict(own, grpo) for own, grpo in zip(critic, plain, strict=True)),
    ]
    print("\n".join(shown))
    if arguments.write:
        results_page.keep("ppo", {"lines": shown})
    good = all(is_good(own, grpo) for own, grpo in zip(critic, plain, strict=True))
    return int(not good and not arguments.write)  # with --write, the page reports it


@dataclass(frozen=True, slots=True)
class Run:
    """Results of a run.

    Attributes:
        to_goal: Generated tokens until the accuracy GOAL, linear between evaluations; NaN if it is never reached.
        explained: Share of the variance of the returns that the critic explains; None without a critic.
    """

    name: str
    seed: int
    before: float
    after: float
    no_answer: float
    to_goal: float
    tokens: float
    explained: float | None
    seconds: float

    def line(self) -> str:
        figures = [f"{value:.3f}" for value in (self.before, self.after, self.no_answer)]
        explained = "" if self.explained is None else f"{self.explained:.3f}"
        tokens = [f"{self.to_goal:,.0f}", f"{self.tokens:,.0f}"]
        cells = [f"{self.seed}", self.name, *figures, *tokens, explained, f"{self.seconds:.0f}"]
        return f"| {' | '.join(cells)} |"


def is_good(own: Run, grpo: Run) -> bool:
    within = own.tokens <= 2 * grpo.tokens and own.to_goal <= 2 * grpo.to_goal
    return own.before <= 0.50 and own.after >= GOAL and within


def verdict(own: Run, grpo: Run) -> str:
    return (
        f"- Seed {own.seed}: PPO's tokens divided by GRPO's are {own.tokens / grpo.tokens:.2f} in total, and "
        f"{own.to_goal / grpo.to_goal:.2f} until an accuracy of {GOAL:g}. Expected: accuracy from at most 0.50 to at "
        f"least {GOAL:.2f}, and both ratios at most 2. Met: {'yes' if is_good(own, grpo) else 'no'}."
    )


def measure(folder: Path, name: str, seed: int) -> Run:
    run_dir = folder / f"{name}-{seed}"
    seconds = trained(run_dir, CONFIGS[name], [f"run.seed={seed}", f"evaluation.interval={INTERVAL}"])
    rows = metrics(run_dir, "online")
    tokens = np.cumsum([row.get("rollout/generated_tokens", 0) for row in rows])
    evaluated = [n for n, row in enumerate(rows) if row.get("held_out/sampled_accuracy") is not None]
    accuracy = np.array([rows[n]["held_out/sampled_accuracy"] for n in evaluated])
    explained = [row["value/explained_variance"] for row in rows[-10:] if "value/explained_variance" in row]
    return Run(
        name=name,
        seed=seed,
        before=float(accuracy[0]),
        after=float(accuracy[-1]),
        no_answer=rows[-1]["held_out/sampled_no_answer_rate"],
        to_goal=tokens_to(GOAL, tokens[evaluated], accuracy),
        tokens=float(tokens[-1]),
        explained=sum(explained) / len(explained) if explained else None,
        seconds=seconds,
    )


if __name__ == "__main__":
    sys.exit(main())
