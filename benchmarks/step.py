"""Compare the training step of the quickstart with that of an earlier commit, in turns.

The earlier commit is checked out into a folder of its own and runs with the packages of this environment. Both sides
run `configs/quickstart.yaml` of their own with the same seed. The figure of a run is the median `time/step_s` of its
last 40 online steps. Then both sides make one online step from the same policy, and the weights must agree to 1e-6:
the norm of the difference to that of the weights. The largest difference of one weight is printed too; AdamW enlarges
the rounding of small gradients. Later weights differ, because sums in another order change sampled tokens.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)  # in place of this folder, where a file would hide the package `actors`
sys.path.append(str(ROOT / "benchmarks"))

from cells import metrics  # noqa: E402
from ratios import Ratio, keep, table  # noqa: E402

BASELINE = "650de7a"
LAST_STEPS = 40
LIMIT, TOLERANCE = 2.0, 1e-6


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3, help="number of runs of each side")
    parser.add_argument("--baseline", default=BASELINE, help="commit to compare with")
    parser.add_argument("--json", type=Path, help="also keep the ratio in this file")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        earlier = folder / "earlier"
        subprocess.run(["git", "worktree", "add", "--detach", earlier, arguments.baseline], cwd=ROOT, check=True)
        try:
            ours, peer = [], []
            for number in range(arguments.rounds):
                peer.append(seconds(earlier, folder / f"earlier-{number}"))
                ours.append(seconds(ROOT, folder / f"now-{number}"))
            policy = folder / "now-0" / "stages" / "warm_start"
            short = ["stages=[online]", f"model.path={policy}", "model.from_scratch=null", "train.max_steps=1"]
            ends = [trained(root, folder / f"one-step-{root.name}", short) for root in (earlier, ROOT)]
            gap, largest = differences(*(end / "stages" / "online" for end in ends))
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", earlier], cwd=ROOT, check=True)
    ratio = Ratio("training step of the quickstart", f"commit {arguments.baseline}", ours, peer, "s", LIMIT)
    print(table([ratio]))
    print(f"weights after one online step: {gap:.1e} apart, relative; the largest difference of one is {largest:.1e}")
    if arguments.json:
        keep(arguments.json, [ratio])
    return int(not ratio.met or gap > TOLERANCE)


def trained(root: Path, run_dir: Path, overrides: list[str]) -> Path:
    """Run the quickstart by the code in `root`; return the run directory."""
    command = [sys.executable, "-m", "rlsys.cli", "train", root / "configs" / "quickstart.yaml", f"run.dir={run_dir}"]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    subprocess.run([*command, *overrides], cwd=root, env=environment, check=True, stdout=subprocess.DEVNULL)
    return run_dir


def seconds(root: Path, run_dir: Path) -> float:
    """Return the median seconds of a run's last steps."""
    rows = metrics(trained(root, run_dir, []), "online")
    return statistics.median(row["time/step_s"] for row in rows[-LAST_STEPS:])


def differences(first: Path, second: Path) -> tuple[float, float]:
    """Return the norm of the difference of two policies to that of the weights, and the largest difference."""
    from safetensors.torch import load_file

    one, other = (load_file(next(folder.glob("*.safetensors"))) for folder in (first, second))
    apart = {name: (tensor.double() - other[name].double()) for name, tensor in one.items()}
    norms = [sum(float(each.double().square().sum()) for each in tensors.values()) for tensors in (apart, one)]
    return math.sqrt(norms[0] / norms[1]), max(float(each.abs().max()) for each in apart.values())


if __name__ == "__main__":
    sys.exit(main())
