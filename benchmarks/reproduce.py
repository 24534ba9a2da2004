"""The paper's ablation on tiny models: SFT, then DPO, Thoughts Length Balance, cDPO, the joint loss, masking; alpha.

`python benchmarks/reproduce.py [--folder runs/reproduce] [--tasks letter_count blocksworld] [--write]`

A task's config gives, for every seed, a warm start, a search with that policy, and SFT on the longest right chain of
each tree. Every cell trains that SFT policy on preference pairs of the same trees, with the same optimizer, number of
steps and order of prompts; a row of the table changes one thing of the row before it. Nothing is chosen by seed or by
cell. Cells that are finished are not made again, and one that was cut short goes on from its checkpoint.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)  # in place of this folder, where a file would hide the package `actors`
sys.path.append(str(ROOT / "benchmarks"))

import results_page  # noqa: E402
from cells import evaluated, metrics, trained  # noqa: E402

from rlsys import extraction  # noqa: E402
from rlsys.config_file import load_config  # noqa: E402
from rlsys.evaluation import mean_difference, mean_over_prompts  # noqa: E402

CONFIGS = {
    "letter_count": ROOT / "configs" / "marco_o1_v2_offline.yaml",
    "blocksworld": ROOT / "configs" / "marco_o1_v2_blocksworld.yaml",
}
SWEPT = "letter_count"
ALPHAS = (0.0, 0.5, 1.0, 1.5, 2.0)
SEEDS = (1, 2, 3)
# Taken after a trial with seed 0 on letter counting: at 1e-4 conservative DPO leaves no answer missing that the joint
# loss could save.
LEARNING_RATE = 3e-4
PROBLEMS = 1024
# Which right chain is the chosen side, eps, alpha, prefix masking.
CELLS: dict[str, tuple[str, float, float, bool]] = {
    "+DPO": ("longest", 0.0, 0.0, False),
    "+Thoughts Length Balance": ("shortest", 0.0, 0.0, False),
    "+cDPO": ("shortest", 0.1, 0.0, False),
    "+joint, alpha 1": ("shortest", 0.1, 1.0, False),
    "+masking": ("shortest", 0.1, 1.0, True),
}
MODES = ("greedy", "sampled")
Figures = dict[str, Any]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path("runs/reproduce"), help="where the runs are kept")
    parser.add_argument("--tasks", nargs="+", choices=list(CONFIGS), default=list(CONFIGS))
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--write", action="store_true", help=f"write {results_page.PAGE} and its figures")
    arguments = parser.parse_args()
    started = time.monotonic()
    found: dict[str, dict[str, list[Figures]]] = {}
    for task in arguments.tasks:
        for seed in arguments.seeds:
            for name, figures in of_seed(task, seed, arguments.folder.absolute()).items():
                found.setdefault(task, {}).setdefault(name, []).append(figures)
    for task, cells in found.items():
        result = {"seeds": arguments.seeds, "problems": PROBLEMS, "rows": rows_of(cells)}
        print(f"\n{task}\n\n{results_page.ablation_table(result)}")
        if arguments.write:
            results_page.keep(f"ablation_{task}", result)
    print(f"{time.monotonic() - started:.0f} s", file=sys.stderr)
    return 0


def of_seed(task: str, seed: int, folder: Path) -> dict[str, Figures]:
    """All cells of a task and a seed, by name: SFT, those of the ablation, and `alpha X` of the sweep."""
    config, own = CONFIGS[task], folder / task / f"seed-{seed}"
    quick = [f"run.seed={seed}", "evaluation.prompts=16", "evaluation.samples=0"]
    base = own / "sft"
    trained(base, config, [*quick, "stages=[warm_start,search,sft]"])
    policy = base / "stages" / "sft"
    pairs = {chosen: pairs_of(base, chosen) for chosen in ("longest", "shortest")}
    found = {
        "warm start": measured(base / "stages" / "warm_start", config, seed, own / "warm_start.json"),
        "SFT": measured(policy, config, seed, own / "sft.json"),
    }
    for name, (chosen, eps, alpha, masked) in {**CELLS, **(alpha_cells() if task == SWEPT else {})}.items():
        run_dir = own / f"{chosen}-eps{eps:g}-alpha{alpha:g}{'-masked' if masked else ''}"
        overrides = [
            *quick,
            "stages=[preference]",
            f"model={{path: {policy}}}",
            f"preference.path={pairs[chosen]}",
            f"preference.optimizer.learning_rate={LEARNING_RATE}",
            f"objective.preference.label_smoothing={eps}",
            f"objective.preference.mask_prefix_dpo={str(masked).lower()}",
            f"objective.sft.weight={alpha}",
            f"objective.sft.mask_prefix_sft={str(masked).lower()}",
        ]
        seconds = trained(run_dir, config, overrides)
        figures = measured(run_dir / "stages" / "preference", config, seed, run_dir.with_suffix(".json"))
        rows = metrics(run_dir, "preference")
        chosen_logprobs = [row["preference/chosen_logprob"] for row in rows]
        margins = [row["preference/margin"] for row in rows]
        found[name] = figures | {
            "seconds": seconds,
            "chosen_logprob": [float(np.mean(chosen_logprobs[:3])), float(np.mean(chosen_logprobs[-5:]))],
            "margin": float(np.mean(margins[-5:])),
        }
    return found


def alpha_cells() -> dict[str, tuple[str, float, float, bool]]:
    """The joint loss without masking at every alpha; alpha 0 and 1 are cells of the ablation too."""
    return {f"alpha {alpha:g}": ("shortest", 0.1, alpha, False) for alpha in ALPHAS}


def pairs_of(base: Path, chosen: str) -> Path:
    """The pairs of the base run's trees with the longest or the shortest right chain as their chosen side."""
    output = base / "pairs" / chosen
    if not (output / "report.json").exists():
        config = load_config(base / "config.yaml", [f"extract.chosen={chosen}"])
        source = extraction.source_of(config, base / "stages" / "search" / "trees", base / "model")
        extraction.run(source, output)
    return output / "preferences.parquet"


def measured(policy: Path, config: Path, seed: int, output: Path) -> Figures:
    """Held-out figures of a policy; the problems of a seed are the same for all its cells."""
    overrides = [f"run.seed={seed}", f"evaluation.prompts={PROBLEMS}", "evaluation.samples=4"]
    found = evaluated(policy, config, overrides, output)
    return {mode: found[mode]["by_problem"] for mode in MODES}


def values(cells: Sequence[Figures], mode: str, name: str) -> np.ndarray:
    """[seeds * problems] of a cell."""
    return np.concatenate([np.array(cell[mode][name]) for cell in cells])


def rows_of(found: Mapping[str, Sequence[Figures]]) -> dict[str, Any]:
    """Every cell's figures with intervals; no-answer rates against the row before it, paired by problem and seed."""
    rows: dict[str, Any] = {}
    before: str | None = None
    for name, cells in found.items():
        row: dict[str, Any] = {mode: _of_mode(cells, mode) for mode in MODES}
        if not name.startswith("alpha"):
            for mode in MODES if before else ():
                of_both = [values(found[each], mode, "no_answer_rate") for each in (name, str(before))]
                row[mode]["against_the_row_before"] = asdict(mean_difference(*of_both))
            before = name
        for key in ("seconds", "chosen_logprob", "margin"):
            if key in cells[0]:
                row[key] = np.mean([cell[key] for cell in cells], axis=0).tolist()
        rows[name] = row
    return rows


def _of_mode(cells: Sequence[Figures], mode: str) -> dict[str, Any]:
    row: dict[str, Any] = {"tokens": float(values(cells, mode, "completion_length").mean())}
    for name in ("accuracy", "no_answer_rate"):
        estimate = mean_over_prompts(values(cells, mode, name).reshape(-1, 1))
        row[name] = asdict(estimate) | {"seeds": [float(np.mean(cell[mode][name])) for cell in cells]}
    return row


if __name__ == "__main__":
    sys.exit(main())
