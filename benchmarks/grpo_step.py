"""Compare a GRPO step with that of TRL's GRPOTrainer: same model, prompts, batch, rewards and length limit.

Both sides sample, verify, learn in one update and load the new weights into their sampler. The figure is the seconds
of a step for each of its completion tokens, because sampled lengths differ. TRL runs in a process of its own, with two
threads and its fastest way to generate on this machine. `--generation` names it: `transformers`, or on GPUs `vllm` (an
engine in the process of the trainer). An engine on CPUs packs its weights, and TRL's next weights then have no place.
`trl_grpo.py` is TRL's program; `make install` puts TRL into the environment.
The sides take turns. `--policy` names the model, by default a quickstart model after a warm start of 300 steps.
"""

from __future__ import annotations

import argparse
import json
import os
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

TRL = Path(sys.prefix) / "trl"
LIMIT = 2.0
FIRST_STEPS = 2
BOUNDS = ["evaluation.prompts=1", "evaluation.samples=0", "checkpoint.interval=1000", "train.updates_per_step=1"]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--config", type=Path, default=ROOT / "configs" / "quickstart.yaml")
    parser.add_argument("--policy", type=Path, help="model folder; by default the quickstart's, after its warm start")
    parser.add_argument("--name", default="1M", help="size of the model, for the table")
    parser.add_argument("--generation", choices=("vllm", "transformers"), default="transformers")
    parser.add_argument("--rounds", type=int, default=3, help="number of runs of each side")
    parser.add_argument("--steps", type=int, default=6, help="number of timed steps of a run")
    parser.add_argument("--json", type=Path, help="also keep the ratio in this file")
    parser.add_argument("overrides", nargs="*", help="overrides of the config, for both sides")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        policy = arguments.policy.absolute() if arguments.policy else warm_policy(arguments.config, folder)
        overrides = ["stages=[online]", f"model.path={policy}", *BOUNDS, *arguments.overrides]
        if not arguments.policy:
            overrides.append("model.from_scratch=null")
        overrides.append(f"train.max_steps={FIRST_STEPS + arguments.steps}")
        ours, peer = [], []
        for number in range(arguments.rounds):
            ours.append(our_seconds(arguments.config, folder / f"ours-{number}", overrides))
            peer.append(trl_seconds(arguments.config, folder / f"trl-{number}", overrides, arguments.generation))
    against = f"TRL's GRPOTrainer, {arguments.generation}"
    ratio = Ratio(f"GRPO step, {arguments.name}", against, ours, peer, "us a token", LIMIT)
    print(table([ratio]))
    if arguments.json:
        keep(arguments.json, [ratio])
    return int(not ratio.met)


def warm_policy(config: Path, folder: Path) -> Path:
    run_dir = folder / "warm"
    command = [RLSYS, "train", config, f"run.dir={run_dir}", "stages=[warm_start]", *BOUNDS]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return run_dir / "stages" / "warm_start"


def our_seconds(config: Path, run_dir: Path, overrides: list[str]) -> float:
    """Return the median microseconds of a step for each completion token."""
    command = [RLSYS, "train", config, f"run.dir={run_dir}", *overrides]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    rows = [row for row in metrics(run_dir, "online") if row["step"] > FIRST_STEPS]
    return 1e6 * statistics.median(row["time/step_s"] / row["rollout/tokens"] for row in rows)


def trl_seconds(config: Path, folder: Path, overrides: list[str], generation: str) -> float:
    """Return the same figure of TRL."""
    folder.mkdir()
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{TRL}", "OMP_NUM_THREADS": "2"}
    command = [sys.executable, ROOT / "benchmarks" / "trl_grpo.py", config, folder, generation, *overrides]
    with (folder / "log").open("w", encoding="utf-8") as log:
        code = subprocess.run(command, env=environment, stdout=log, stderr=log, check=False).returncode
    if code:
        raise SystemExit((folder / "log").read_text(encoding="utf-8")[-3000:])
    steps = json.loads((folder / "steps.json").read_text(encoding="utf-8"))[FIRST_STEPS:]
    return 1e6 * statistics.median(step["seconds"] / step["tokens"] for step in steps)


if __name__ == "__main__":
    sys.exit(main())
