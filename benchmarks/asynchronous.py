"""Compare the asynchronous training step with the longer of generating and learning alone.

One actor and one learner rank have one thread each. A synchronous run measures both alone, since they take turns. An
asynchronous run (`train.max_staleness: 1`) of the same policy lets them work at the same time. At best its step takes
as long as the longer of the two. The medians leave out the first steps, in which nothing overlaps yet. Every row of a
step has a KL term, so the learner leaves none out. The two runs take turns.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)  # in place of this folder, where a file would hide the package `actors`
sys.path.append(str(ROOT / "benchmarks"))

from cells import RLSYS, metrics  # noqa: E402
from ratios import Ratio, keep, table  # noqa: E402

CONFIG = ROOT / "configs" / "quickstart.yaml"
SMALL = [
    "actors.count=1",
    "learner.ranks=1",
    "evaluation.prompts=16",
    "evaluation.samples=0",
    "checkpoint.interval=100",
]
FIRST_STEPS = 3
LIMIT = 0.85


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3, help="number of runs of each kind")
    parser.add_argument("--steps", type=int, default=15, help="number of timed steps of a run")
    parser.add_argument("--json", type=Path, help="also keep the ratio in this file")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        train(folder / "warm", ["stages=[warm_start]"])
        online = ["stages=[online]", f"model.path={folder / 'warm' / 'stages' / 'warm_start'}"]
        online += ["model.from_scratch=null", "objective.kl.weight=0.01"]
        online += [f"train.max_steps={FIRST_STEPS + arguments.steps}"]
        ours, peer = [], []
        for number in range(arguments.rounds):
            alone = steps_of(folder / f"sync-{number}", [*online, "train.max_staleness=0"])
            parts = [statistics.median(row[key] for row in alone) for key in ("time/rollout_s", "time/learn_s")]
            print("alone: generating {:.2f} s, learning {:.2f} s".format(*parts), flush=True)
            peer.append(max(parts))
            together = steps_of(folder / f"async-{number}", [*online, "train.max_staleness=1"])
            ours.append(statistics.median(row["time/step_s"] for row in together))
    ratio = Ratio("asynchronous step, one core each", "the longer of the two alone", ours, peer, "s", LIMIT)
    print(table([ratio]))
    if arguments.json:
        keep(arguments.json, [ratio])
    return int(not ratio.met)


def train(run_dir: Path, overrides: list[str]) -> None:
    command = [RLSYS, "train", CONFIG, f"run.dir={run_dir}", *SMALL, *overrides]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def steps_of(run_dir: Path, overrides: list[str]) -> list[dict[str, float]]:
    """Return the rows of the timed steps of a run."""
    train(run_dir, overrides)
    return [row for row in metrics(run_dir, "online") if row["step"] > FIRST_STEPS]


if __name__ == "__main__":
    sys.exit(main())
