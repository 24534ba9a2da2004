"""Run the quickstart on several seeds: a table of accuracies and times, and a picture of the learning curves.

`python benchmarks/quickstart.py [runs folder]` runs `configs/quickstart.yaml` with seeds 0, 1 and 2 one after
the other (runs that are finished are reused), prints the table and writes docs/quickstart.png. Exit code 1 if
a limit is missed: mean sampled accuracy at most 0.50 before and at least 0.80 after, no seed below 0.76 after,
and at most 4 minutes a run.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

SEEDS = (0, 1, 2)
CONFIG = "configs/quickstart.yaml"
PICTURE = Path("docs/quickstart.png")


def main() -> int:
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/quickstart-seeds")
    curves = {seed: run(seed, folder / f"seed-{seed}") for seed in SEEDS}
    results = [summary(seed, rows, folder / f"seed-{seed}") for seed, rows in curves.items()]
    print("| seed | sampled before | sampled after | greedy before | greedy after | no answer after | wall time |")
    print("|---|---|---|---|---|---|---|")
    for r in results:
        figures = [r["before"], r["after"], r["greedy_before"], r["greedy_after"], r["no_answer"]]
        print(f"| {r['seed']} | " + " | ".join(f"{value:.3f}" for value in figures) + f" | {r['seconds']:.0f} s |")
    before, after = (sum(r[name] for r in results) / len(results) for name in ("before", "after"))
    print(f"| mean | {before:.3f} | {after:.3f} | | | | |")
    plot(curves)
    slowest = max(r["seconds"] for r in results)
    return int(not (before <= 0.5 and after >= 0.8 and min(r["after"] for r in results) >= 0.76 and slowest <= 240))


def run(seed: int, run_dir: Path) -> list[dict[str, Any]]:
    """Make the run of a seed unless it is finished, and return its rows of metrics.jsonl."""
    seconds = run_dir / "wall-seconds"
    if not seconds.exists():
        if (run_dir / "metrics.jsonl").exists():
            sys.exit(f"{run_dir} holds a run that was cut short: its time would start at the resume; move it away")
        started = time.monotonic()
        command = ["rlsys", "train", CONFIG, f"run.dir={run_dir}", f"run.seed={seed}"]
        subprocess.run([Path(sys.executable).parent / command[0], *command[1:]], check=True)
        seconds.write_text(f"{time.monotonic() - started:.1f}\n")
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def summary(seed: int, rows: list[dict[str, Any]], run_dir: Path) -> dict[str, float]:
    online = [row for row in rows if row["stage"] == "online"]
    first, last = online[0], online[-1]
    return {
        "seed": seed,
        "before": first["held_out/sampled_accuracy"],
        "after": last["held_out/sampled_accuracy"],
        "greedy_before": first["held_out/greedy_accuracy"],
        "greedy_after": last["held_out/greedy_accuracy"],
        "no_answer": last["held_out/sampled_no_answer_rate"],
        "seconds": float((run_dir / "wall-seconds").read_text()),
    }


def plot(curves: dict[int, list[dict[str, Any]]]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 3.6), layout="constrained")
    for seed, rows in curves.items():
        online = [row for row in rows if row["stage"] == "online" and "rollout/reward" in row]
        line = axes.plot(
            [row["step"] for row in online], [row["rollout/reward"] for row in online], label=f"seed {seed}"
        )
        held_out = [row for row in rows if row.get("held_out/sampled_accuracy") is not None]
        points = [row["held_out/sampled_accuracy"] for row in held_out]
        axes.plot([row["step"] for row in held_out], points, "o", color=line[0].get_color())
    axes.set(xlabel="online training step", ylabel="accuracy at temperature 1", ylim=(0, 1))
    axes.set_title("quickstart: reward of each step (lines), 512 held-out prompts x 4 samples (points)", fontsize=9)
    axes.grid(alpha=0.3)
    axes.legend()
    PICTURE.parent.mkdir(exist_ok=True)
    figure.savefig(PICTURE, dpi=120)


if __name__ == "__main__":
    sys.exit(main())
