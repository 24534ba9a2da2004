"""The distillation bottleneck: a small student learns from a larger teacher's long chains, from trees, and on-policy.

`python benchmarks/bottleneck.py [--folder runs/bottleneck] [--seeds 1 2 3] [--write]`

The teacher is a larger model from scratch. Its demonstrations are right but long: one letter in each thought, nearly
always with a wrong thought, its reflection and optional nodes. The student is a small model after a warm start on short
demonstrations with errors. Every arm starts from this student:

- supervised training on right chains that the teacher wrote;
- supervised training on the shortest right chains of trees that the student grew itself;
- the paper's recipe over these trees: length balance, conservative DPO without the common prefix, joint with SFT;
- on-policy distillation: the teacher scores the student's own samples; alone, and in one update with GRPO;
- GRPO alone.

Tokens are those that the student or the teacher generated for the data of an arm. Tokens that the teacher only scored
stand in a column of their own. Finished cells are reused.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)  # in place of this folder, where a file would hide the package `actors`
sys.path.append(str(ROOT / "benchmarks"))

import results_page  # noqa: E402
from cells import RLSYS, evaluated, metrics, seconds_of, trained  # noqa: E402

from rlsys.stats import mean_over_prompts  # noqa: E402

CONFIG = ROOT / "configs" / "marco_o1_v2_offline.yaml"
SEEDS = (1, 2, 3)
PROBLEMS = 512
TEACHER = [
    "model.from_scratch={hidden_size: 256, layers: 4, heads: 8, intermediate_size: 512, tie_embeddings: false}",
    "task.error_rate=0",
    "task.chunk=1",
    "task.shares={sub_task: 0.9, reclarify: 0.9, hypothesis: 0.9, double_check: 0.9, reflection: 0.9}",
    "warm_start.max_steps=400",
]
STUDENT = [
    "model.from_scratch={hidden_size: 64, layers: 2, heads: 2, intermediate_size: 128, tie_embeddings: false}",
    "task.shares={sub_task: 0.1, reclarify: 0.1, hypothesis: 0.1, double_check: 0.1, reflection: 0.1}",
]
ROOM = ["actors.max_model_len=256", "sampling.max_tokens=220"]  # for the teacher's chains
DRAWN = [  # four chains of each prompt, no tree
    "search.backtracking=false",
    "search.stop={simulations: 4, correct: []}",
    "search.max_depth=40",
    "search.tables.chain.children.start={sub_task: 4, reclarify: 1, hypothesis: 1, thinking: 4}",
]
RECIPE = ["extract.supervised=longest", "extract.chosen=shortest"]
UPDATES = 4
ONLINE = [
    "stages=[online]",
    "actors.count=1",
    f"train={{max_steps: 60, groups_per_step: 64, group_size: 8, updates_per_step: {UPDATES}}}",
    "objective.preference={weight: 0}",
    "objective.sft={weight: 0}",
]
# Rates by short runs of seed 1: GRPO learned nothing at 3e-4, and distillation was slow at 1e-4.
SCORED = ["objective.distill={weight: 1.0, divergence: sampled}", "train.optimizer.learning_rate=5.0e-4"]
REWARDED = ["train.optimizer.learning_rate=1.0e-4"]
FIGURES = ("accuracy", "no_answer_rate", "completion_length")
MODES = ("greedy", "sampled")
Cell = dict[str, Any]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path("runs/bottleneck"))
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--write", action="store_true", help=f"write {results_page.PAGE} and its figures")
    arguments = parser.parse_args()
    folders = {seed: arguments.folder.absolute() / f"seed-{seed}" for seed in arguments.seeds}
    cells = [of_seed(seed, folder) for seed, folder in folders.items()]
    shown = [
        f"Measured by `python benchmarks/bottleneck.py` in {sum(map(seconds_of, folders.values())) / 60:.0f} minutes "
        f"on 2 cores, {len(cells)} seeds, {PROBLEMS} held-out problems for each. Intervals are over the problems, for "
        "these seeds; square brackets hold the lowest and the highest seed.",
        "",
        *table(cells),
    ]
    print("\n".join(shown))
    if arguments.write:
        results_page.keep("bottleneck", {"seeds": arguments.seeds, "lines": shown})
    return 0


def of_seed(seed: int, folder: Path) -> dict[str, Cell]:
    """Return the figures of all arms of a seed."""
    quick = [f"run.seed={seed}", "evaluation.prompts=16", "evaluation.samples=0", *ROOM]
    warm = ["stages=[warm_start]", *quick]
    teacher, student = folder / "teacher", folder / "student"
    trained(teacher, CONFIG, [*warm, *TEACHER])
    trained(student, CONFIG, [*warm, *STUDENT])
    models = {"teacher": teacher / "stages" / "warm_start", "student": student / "stages" / "warm_start"}
    rows, spent = teacher_rows(folder, models["teacher"], quick)
    own = [*quick, f"model={{path: {models['student']}}}"]
    cells = {
        name: figures_of(model, seed, folder / f"{name}.evaluation.json") | {"generated": 0, "scored": 0}
        for name, model in models.items()
    }
    for number, (name, (settings, stage)) in enumerate(arms_of(models["teacher"], rows).items()):
        run_dir = folder / f"arm-{number}"
        trained(run_dir, CONFIG, [*own, *settings])
        generated = tokens_of(run_dir) + (spent if "long chains" in name else 0)
        figures = figures_of(run_dir / "stages" / stage, seed, run_dir / "evaluation.json")
        cells[name] = figures | {"generated": generated, "scored": scored_by_teacher(run_dir)}
    return cells


def arms_of(teacher: Path, rows: Path) -> dict[str, tuple[Sequence[str], str]]:
    """Return the settings of every arm, and the stage that ends it.

    Args:
        rows: File of the teacher's chains.
    """
    served = [f"teacher.model={{path: {teacher}, max_model_len: 256, kv_cache_gib: 0.2}}", *SCORED]
    return {
        "SFT on the teacher's long chains": (["stages=[sft]", f"sft.path={rows}"], "sft"),
        "SFT on the student's trees": (["stages=[search,sft]", "extract.supervised=shortest"], "sft"),
        "trees, length balance, joint loss": (["stages=[search,sft,preference]", *RECIPE], "preference"),
        "on-policy distillation": ([*ONLINE, *served, "objective.policy.weight=0"], "online"),
        "distillation joint with GRPO": ([*ONLINE, *served], "online"),
        "GRPO": ([*ONLINE, *REWARDED], "online"),
    }


def teacher_rows(folder: Path, teacher: Path, quick: Sequence[str]) -> tuple[Path, int]:
    """Return the file of the teacher's longest right chains, and the tokens that it generated for them."""
    run_dir = folder / "teacher_chains"
    if not (run_dir / "data" / "supervised.parquet").exists():
        settings = [*quick, *DRAWN, f"model={{path: {teacher}}}", f"run.dir={run_dir}", "extract.supervised=longest"]
        subprocess.run([RLSYS, "search", str(CONFIG), *settings], check=True)
        subprocess.run([RLSYS, "extract", str(run_dir), "extract.step_values=false"], check=True)
    return run_dir / "data" / "supervised.parquet", tokens_of(run_dir)


def tokens_of(run_dir: Path) -> int:
    """Return the tokens that the trees and the online steps of a run generated."""
    trees = [
        json.loads(line) for path in sorted(run_dir.rglob("trees/*.jsonl")) for line in path.read_text().splitlines()
    ]
    grown = sum(tree["tokens"] for tree in trees if "nodes" in tree)
    return int(grown + sum(row["rollout/generated_tokens"] for row in online_steps(run_dir)))


def scored_by_teacher(run_dir: Path) -> int:
    """Return the tokens that were trained with a score of the teacher, each of which was scored once."""
    return int(UPDATES * sum(row.get("objective/distill_denominator", 0.0) for row in online_steps(run_dir)))


def online_steps(run_dir: Path) -> list[dict[str, Any]]:
    """Return the metrics of the online steps of a run, without those of the evaluation before."""
    rows = metrics(run_dir, "online") if (run_dir / "metrics.jsonl").exists() else []
    return [row for row in rows if "rollout/reward" in row]


def figures_of(policy: Path, seed: int, output: Path) -> Cell:
    overrides = [f"run.seed={seed}", f"evaluation.prompts={PROBLEMS}", "evaluation.samples=4", *ROOM]
    found = evaluated(policy, CONFIG, overrides, output)
    return {mode: {figure: found[mode]["by_problem"][figure] for figure in FIGURES} for mode in MODES}


def table(cells: Sequence[Mapping[str, Cell]]) -> list[str]:
    """Return a table of the arms: accuracy, share without an answer, length and tokens."""
    heads = ["arm", "greedy accuracy", "sampled accuracy", "no answer, sampled", "tokens of a sample"]
    heads += ["generated tokens", "scored by the teacher"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for name in cells[0]:
        of_arm = [cell[name] for cell in cells]
        row = [name, _share(of_arm, "greedy", "accuracy"), _share(of_arm, "sampled", "accuracy")]
        row += [_share(of_arm, "sampled", "no_answer_rate")]
        row += [f"{np.mean([cell['sampled']['completion_length'] for cell in of_arm]):.1f}"]
        row += [f"{np.mean([cell[key] for cell in of_arm]):,.0f}" for key in ("generated", "scored")]
        lines.append(f"| {' | '.join(row)} |")
    return lines


def _share(cells: Sequence[Cell], mode: str, figure: str) -> str:
    by_seed = [np.array(cell[mode][figure]) for cell in cells]
    estimate = mean_over_prompts(np.concatenate(by_seed).reshape(-1, 1))
    seeds = [float(values.mean()) for values in by_seed]
    return f"{estimate.mean:.3f} ({estimate.low:.3f} to {estimate.high:.3f}) [{min(seeds):.3f}, {max(seeds):.3f}]"


if __name__ == "__main__":
    sys.exit(main())
