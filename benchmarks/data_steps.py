"""Train the warm-started quickstart model for 20 steps by each data step over its own trees; `methods.py` calls it.

Trees of 512 problems are grown and scored once for all rows; the row of the revision has trees of its own. The SFT rows
of a data step are extracted, and trained with `configs/data_steps.yaml`. Finished runs are not made twice.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cells import RLSYS, metrics, trained

ROOT = Path(__file__).resolve().parents[1]
CONFIG = ROOT / "configs" / "data_steps.yaml"
SEARCH, PLANS = (ROOT / "configs" / f"{name}_letter_count.yaml" for name in ("search", "plan_execute"))
GUIDED = (
    "search.prompts=512",
    "search.nodes.thinking.writer=reviewer",
    "search.reviewer={path: TEACHER, max_model_len: 192, kv_cache_gib: 0.2}",
    "actors.count=1",
)
REVISION = (
    "search.selection={type: revision, chains: 8, draws: 4}",
    "search.backtracking=false",
    "search.stop.correct=[]",
)


@dataclass(frozen=True, slots=True)
class DataStep:
    """Settings of a row.

    Attributes:
        extract: overrides of `rlsys extract`; None for a row without extracted rows.
        train: overrides of `configs/data_steps.yaml`.
        trees: overrides of the search, for trees of its own; TEACHER stands for the trained quickstart model.
        search: config of the search.
    """

    extract: Sequence[str] | None
    train: Sequence[str] = ()
    trees: Sequence[str] = ()
    search: Path = SEARCH


LONGEST, SHORTEST = "extract.supervised=longest", "extract.supervised=shortest"
STEPS = {
    "SFT, longest chains": DataStep([LONGEST]),
    "SFT, shortest chains": DataStep([SHORTEST]),
    "Masked Thought": DataStep([LONGEST], ["objective.sft.mask_share=0.2"]),
    "Skip-Thinking, one node a row": DataStep([LONGEST, "extract.supervised_rows=node"]),
    "Skip-Thinking, skips": DataStep([LONGEST, "extract.skip=[reflection, double_check]"]),
    "LiteCoT": DataStep(["extract.supervised=by_difficulty"]),
    "Retro-Search, by selection": DataStep(["extract.supervised=retrospective"]),
    "Retro-Search, by search": DataStep(["extract.supervised=retrospective"], trees=REVISION),
    "DASD": DataStep(["extract.supervised=divergence"]),
    "plans alone": DataStep([LONGEST, "extract.supervised_nodes=[sub_task, hypothesis, reclarify]"]),
    "AFT": DataStep(
        None,
        [
            "stages=[online]",
            "objective.policy.weight=0",
            "objective.ranking.weight=1",
            "objective.sft={weight: 1, source: demonstrations}",
        ],
    ),
    "Explore-Execute, plans of its own search": DataStep([], trees=("search.prompts=512",), search=PLANS),
    "SGFT, a second model solves by the plans": DataStep([], trees=GUIDED, search=PLANS),
}


def table(folder: Path, quickstart: Path, *, finished: bool) -> list[str]:
    """Return the lines of the table.

    Args:
        folder: where runs are made.
        quickstart: folder of the quickstart's stages.
        finished: whether to make no run, and to leave out the rows of runs that are not finished.
    """
    model = f"model.path={quickstart / 'warm_start'}"
    lines = ["| data step | rows | trained tokens a row | sampled accuracy | greedy | no answer | tokens |"]
    lines.append("|---|" + "---|" * 6)
    before = metrics(quickstart.parent, "online")[0]
    lines.append(f"| before | | | {_figures(before)} |")
    for number, (name, step) in enumerate(STEPS.items()):
        run_dir = folder / f"run_{number}"
        if finished and not _is_finished(run_dir):
            continue
        rows, tokens, path = "", "", []
        if step.extract is not None:
            search = folder / (f"search_{number}" if step.trees else "search")
            teacher = str(quickstart / "online")
            grown(search, step.search, [model, *(each.replace("TEACHER", teacher) for each in step.trees)])
            if "extract.supervised=divergence" in step.extract and not (search / "scores.jsonl").exists():
                subprocess.run([RLSYS, "score", search, quickstart / "online"], check=True)
            data = folder / f"data_{number}"
            rows, tokens = extracted(search, data, step.extract)
            path = [f"sft.path={data / 'supervised.parquet'}"]
        trained(run_dir, CONFIG, [model, *path, *step.train])
        last = metrics(run_dir, "sft" if path else "online")[-1]
        lines.append(f"| {name} | {rows} | {tokens} | {_figures(last)} |")
    return lines


def _is_finished(run_dir: Path) -> bool:
    record = run_dir / "cell.json"
    return record.exists() and bool(json.loads(record.read_text())["done"])


def grown(run_dir: Path, config: Path, overrides: Sequence[str]) -> None:
    """Grow the trees of a search, unless they are there."""
    if not (run_dir / "summary.json").exists():
        subprocess.run([RLSYS, "search", config, f"run.dir={run_dir}", *overrides], check=True)


def extracted(search: Path, data: Path, overrides: Sequence[str]) -> tuple[str, str]:
    """Extract the rows of a search, unless they are there; return their number and their mean trained tokens."""
    if not data.exists():
        without = ["extract.step_values=false", "extract.step_preferences=false", "extract.chosen=none"]
        subprocess.run([RLSYS, "extract", search, f"--output={data}", *without, *overrides], check=True)
    lines = (data / "supervised.jsonl").read_text().splitlines()
    tokens = [sum(json.loads(line)["loss_mask"]) for line in lines]
    return str(len(tokens)), f"{sum(tokens) / len(tokens):.1f}"


def _figures(row: dict[str, float]) -> str:
    names = ("sampled_accuracy", "greedy_accuracy", "sampled_no_answer_rate")
    return " | ".join(
        [*(f"{row[f'held_out/{name}']:.3f}" for name in names), f"{row['held_out/completion_length']:.1f}"]
    )
