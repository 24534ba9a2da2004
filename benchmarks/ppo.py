"""PPO with a critic on the quickstart task: sampled accuracy before and after, tokens against GRPO's.

`python benchmarks/ppo.py [--folder runs/ppo]` trains `configs/ppo_letter_count.yaml` and `configs/quickstart.yaml` with
seeds 0, 1 and 2. Limits: from at most 0.50 to at least 0.70 with at most twice the tokens that GRPO generates.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "benchmarks"))

from cells import metrics, trained  # noqa: E402

SEEDS = (0, 1, 2)
CONFIGS = {name: ROOT / "configs" / f"{name}.yaml" for name in ("ppo_letter_count", "quickstart")}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path("runs/ppo"))
    folder = parser.parse_args().folder.absolute()
    print("| seed | | sampled before | after | no answer after | tokens | explained variance, last 10 steps | s |")
    print("|---|---|---|---|---|---|---|---|")
    good = True
    for seed in SEEDS:
        tokens = {}
        for name, config in CONFIGS.items():
            run_dir = folder / f"{name}-{seed}"
            seconds = trained(run_dir, config, [f"run.seed={seed}"])
            rows = metrics(run_dir, "online")
            before, after = (row["held_out/sampled_accuracy"] for row in (rows[0], rows[-1]))
            tokens[name] = sum(row.get("rollout/generated_tokens", 0) for row in rows)
            explained = [row["value/explained_variance"] for row in rows[-10:] if "value/explained_variance" in row]
            shown = f"{sum(explained) / len(explained):.3f}" if explained else ""
            missing = rows[-1]["held_out/sampled_no_answer_rate"]
            row = [f"{before:.3f}", f"{after:.3f}", f"{missing:.3f}", f"{tokens[name]:,.0f}", shown, f"{seconds:.0f}"]
            print(f"| {seed} | {name} | " + " | ".join(row) + " |")
            if name == "ppo_letter_count":
                good &= before <= 0.50 and after >= 0.70
        good &= tokens["ppo_letter_count"] <= 2 * tokens["quickstart"]
    return int(not good)


if __name__ == "__main__":
    sys.exit(main())
