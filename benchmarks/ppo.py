"""PPO with a critic on the quickstart task: sampled accuracy before and after, tokens against GRPO's.

`python benchmarks/ppo.py [--folder runs/ppo]` trains `configs/ppo_letter_count.yaml` and `configs/quickstart.yaml` with
seeds 0, 1 and 2. Limits: from at most 0.50 to at least 0.70 with at most twice the tokens that GRPO generates.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "benchmarks"))

import results_page  # noqa: E402
from cells import metrics, trained  # noqa: E402

SEEDS = (0, 1, 2)
CONFIGS = {name: ROOT / "configs" / f"{name}.yaml" for name in ("ppo_letter_count", "quickstart")}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path("runs/ppo"))
    parser.add_argument("--write", action="store_true", help=f"write {results_page.PAGE} and its figures")
    arguments = parser.parse_args()
    rows = [measure(arguments.folder.absolute(), name, seed) for seed in SEEDS for name in CONFIGS]
    shown = [
        "| seed | config | sampled before | after | no answer after | tokens | explained variance, last 10 steps | s |",
        "|---|---|---|---|---|---|---|---|",
        *(row.line() for row in rows),
    ]
    print("\n".join(shown))
    if arguments.write:
        results_page.keep("ppo", {"lines": shown})
    critic, plain = ([row for row in rows if row.name == name] for name in CONFIGS)
    good = all(row.before <= 0.50 and row.after >= 0.70 for row in critic)
    good &= all(a.tokens <= 2 * b.tokens for a, b in zip(critic, plain, strict=True))
    return int(not good and not arguments.write)  # the page shows it then


@dataclass(frozen=True, slots=True)
class Run:
    """What a run reached. explained: variance of the returns that the critic explains; None without one."""

    name: str
    seed: int
    before: float
    after: float
    no_answer: float
    tokens: float
    explained: float | None
    seconds: float

    def line(self) -> str:
        figures = [f"{value:.3f}" for value in (self.before, self.after, self.no_answer)]
        explained = "" if self.explained is None else f"{self.explained:.3f}"
        cells = [f"{self.seed}", self.name, *figures, f"{self.tokens:,.0f}", explained, f"{self.seconds:.0f}"]
        return f"| {' | '.join(cells)} |"


def measure(folder: Path, name: str, seed: int) -> Run:
    run_dir = folder / f"{name}-{seed}"
    seconds = trained(run_dir, CONFIGS[name], [f"run.seed={seed}"])
    rows = metrics(run_dir, "online")
    explained = [row["value/explained_variance"] for row in rows[-10:] if "value/explained_variance" in row]
    return Run(
        name=name,
        seed=seed,
        before=rows[0]["held_out/sampled_accuracy"],
        after=rows[-1]["held_out/sampled_accuracy"],
        no_answer=rows[-1]["held_out/sampled_no_answer_rate"],
        tokens=sum(row.get("rollout/generated_tokens", 0) for row in rows),
        explained=sum(explained) / len(explained) if explained else None,
        seconds=seconds,
    )


if __name__ == "__main__":
    sys.exit(main())
