"""Train the warm-started quickstart model for 20 steps by each method with a teacher, and by each data step.

`python benchmarks/methods.py [--quickstart runs/quickstart] [--write]` runs `configs/quickstart_distill.yaml` with the
settings of each row, and without the teacher. The teacher is the trained quickstart model, so the table shows that the
methods work, not what they are worth: the same model can be had by RL alone. `--tables data` makes the table of
`data_steps.py` alone, and `--tables teacher` the other one. Finished runs are not made twice.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)  # in place of this folder, where a file would hide the package `actors`
sys.path.append(str(ROOT / "benchmarks"))

import data_steps  # noqa: E402
import results_page  # noqa: E402
from cells import metrics, trained  # noqa: E402

CONFIG = ROOT / "configs" / "quickstart_distill.yaml"
PAGE = ROOT / "docs" / "methods.md"
MARKERS = {
    "teacher": ("<!-- runs: written by benchmarks/methods.py -->", "<!-- end of runs -->"),
    "data": ("<!-- data runs: written by benchmarks/methods.py -->", "<!-- end of data runs -->"),
}
ALONE = "objective.policy.weight=0"
TOP_K = "objective.distill.divergence=top_k"
TAID = [ALONE, TOP_K, "objective.distill.interpolation=0.4", "objective.distill.final_interpolation=1"]
DEMONSTRATIONS = "objective.sft.source=demonstrations"
METHODS: Mapping[str, Sequence[str]] = {
    "GRPO, no teacher": ["objective.distill.weight=0", "teacher.model=null"],
    "sampled tokens, beside GRPO": [],
    "sampled tokens, alone": [ALONE],
    "GKD, forward, alone": [ALONE, TOP_K],
    "GKD, beta 0.5, alone": [ALONE, TOP_K, "objective.distill.beta=0.5"],
    "GKD, forward, beside GRPO": [TOP_K],
    "TAID, alone": TAID,
    "GKD, half over demonstrations, alone": [ALONE, TOP_K, "objective.distill.on_policy_share=0.5", DEMONSTRATIONS],
    "TAID with the fall of the loss, alone": [*TAID, "objective.distill.interpolation_rate=5e-4"],
    "FIRST over demonstrations, beside GRPO": [
        "objective.distill.divergence=top_k",
        "objective.distill.top_k=5",
        "objective.distill.teacher_temperature=1.5",
        "objective.distill.on_policy_share=0",
        DEMONSTRATIONS,
    ],
    "TSD-KD, direct part, alone": [
        ALONE,
        TOP_K,
        "objective.distill.beta=0.9",
        "objective.distill.confidence_gate=true",
        "objective.distill.entropy_coef=1",
    ],
    "CurioSFT beside GRPO, no teacher": [
        "objective.distill.weight=0",
        "teacher.model=null",
        DEMONSTRATIONS,
        "objective.sft.weight=0.1",
        "objective.sft.curiosity=1",
    ],
    "whole vocabulary of the first policy beside GRPO, no teacher": [
        "teacher.model=null",
        "objective.distill.divergence=whole",
        "objective.distill.weight=0.1",
    ],
    "RLAD": ["objective.distill.weight=0", "objective.policy.teacher_share=0.5"],
    "GKD, the whole vocabulary, teacher in the learner": [
        "teacher.model=null",
        "teacher.in_learner=TEACHER",
        "objective.distill.divergence=whole",
        "objective.distill.beta=0.5",
    ],
}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quickstart", type=Path, default=Path("runs/quickstart"), help="a finished quickstart")
    parser.add_argument("--folder", type=Path, default=Path("runs/methods"))
    parser.add_argument("--tables", choices=("teacher", "data", "both"), default="both")
    parser.add_argument("--finished", action="store_true", help="data steps: make no run, show those that are finished")
    parser.add_argument("--write", action="store_true", help=f"write the tables of {PAGE.name}")
    arguments = parser.parse_args()
    stages, folder = arguments.quickstart.absolute() / "stages", arguments.folder.absolute()
    tables = {
        "teacher": lambda: teacher_table(folder, stages),
        "data": lambda: data_steps.table(folder, stages, finished=arguments.finished),
    }
    for name, table in tables.items():
        if arguments.tables in (name, "both"):
            lines = table()
            print("\n".join(lines))
            if arguments.write:
                results_page.write_section(PAGE, *MARKERS[name], lines)
    return 0


def teacher_table(folder: Path, stages: Path) -> list[str]:
    """Return the lines of the table of the methods with a teacher."""
    lines = [
        "| method | sampled accuracy before | after | greedy after | no answer after | first divergence | last |",
        "|---|" + "---|" * 6,
    ]
    for number, (name, settings) in enumerate(METHODS.items()):
        lines.append(row(name, folder / f"{number}", stages, settings))
    return lines


def row(name: str, run_dir: Path, stages: Path, settings: Sequence[str]) -> str:
    """Return the row of a method."""
    models = [f"model.path={stages / 'warm_start'}"]
    if "teacher.model=null" not in settings:
        models.append(f"teacher.model.path={stages / 'online'}")
    trained(run_dir, CONFIG, [*models, *(each.replace("TEACHER", str(stages / "online")) for each in settings)])
    first, *steps = metrics(run_dir, "online")
    held_out = [first["held_out/sampled_accuracy"]]
    held_out += [
        steps[-1][f"held_out/{figure}"] for figure in ("sampled_accuracy", "greedy_accuracy", "sampled_no_answer_rate")
    ]
    cells = [f"{value:.3f}" for value in held_out]
    cells += [
        f"{step['distill/divergence']:.4f}" if "distill/divergence" in step else "" for step in (steps[0], steps[-1])
    ]
    return f"| {name} | {' | '.join(cells)} |"


if __name__ == "__main__":
    sys.exit(main())
