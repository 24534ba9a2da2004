"""Reproduce the paper's ablation on tiny models: SFT, DPO, length balance, cDPO, joint loss, masking, and alpha.

`python benchmarks/reproduce.py [--folder runs/reproduce] [--tasks letter_count blocksworld] [--write]`

For every seed, the config of a task makes a warm start, a search with this policy, and SFT on the longest right chain
of each tree. Every cell trains the SFT policy on preference pairs of the same trees, with the same optimizer, number of
steps and order of prompts. Each row of the table changes one setting of the row before it. (Thoughts Length Balance
also changes the rejected chain, which is the wrong chain with the closest length.) No setting depends on the seed, and
only the row decides it. Finished cells are reused, and an interrupted cell continues from its checkpoint.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)  # in place of this folder, where a file would hide the package `actors`
sys.path.append(str(ROOT / "benchmarks"))

import results_page  # noqa: E402
from cells import evaluated, seconds_of, trained  # noqa: E402

from rlsys.config.files import load_config  # noqa: E402
from rlsys.models.folder import ModelFolder  # noqa: E402
from rlsys.search import export as extraction  # noqa: E402
from rlsys.stats import mean_difference, mean_over_prompts  # noqa: E402

CONFIGS = {
    "letter_count": ROOT / "configs" / "marco_o1_v2_offline.yaml",
    "blocksworld": ROOT / "configs" / "marco_o1_v2_blocksworld.yaml",
}
SWEPT = "letter_count"
ALPHAS = (0.0, 0.5, 1.0, 1.5, 2.0)
SEEDS = (1, 2, 3)
LEARNING_RATE = 3e-4
WHY_THIS_RATE = (
    "three times that of the task's config. It was chosen after a trial with seed 0 on letter counting: at 1e-4, "
    "conservative DPO leaves no missing answers for the joint loss to restore"
)
PROBLEMS = {"letter_count": 1024, "blocksworld": 512}
SCORED = 256  # number of pairs of a seed whose chosen chains every cell scores
# Rule for the chosen chain, eps, alpha, prefix masking.
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
    parser.add_argument("--folder", type=Path, default=Path("runs/reproduce"), help="folder of the runs")
    parser.add_argument("--tasks", nargs="+", choices=list(CONFIGS), default=list(CONFIGS))
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--write", action="store_true", help=f"write {results_page.PAGE} and its figures")
    arguments = parser.parse_args()
    found: dict[str, dict[str, list[Figures]]] = {}
    for task in arguments.tasks:
        for seed in arguments.seeds:
            for name, figures in of_seed(task, seed, arguments.folder.absolute()).items():
                found.setdefault(task, {}).setdefault(name, []).append(figures)
    for task, cells in found.items():
        folders = [arguments.folder.absolute() / task / f"seed-{seed}" for seed in arguments.seeds]
        result = {
            "seeds": arguments.seeds,
            "problems": PROBLEMS[task],
            "learning_rate": LEARNING_RATE,
            "why": WHY_THIS_RATE,
            "rows": rows_of(cells),
            "effects": [*effects_of(cells), *pair_lines(folders)],
            "seconds": sum(map(seconds_of, folders)),
        }
        print("\n".join(["", task, "", results_page.ablation_table(result), *result["effects"]]))
        if arguments.write:
            results_page.keep(f"ablation_{task}", result)
    return 0


def of_seed(task: str, seed: int, folder: Path) -> dict[str, Figures]:
    """Return the figures of all cells of a task and a seed: warm start, SFT, ablation, and `alpha X` of the sweep."""
    config, own = CONFIGS[task], folder / task / f"seed-{seed}"
    quick = [f"run.seed={seed}", "evaluation.prompts=16", "evaluation.samples=0"]
    base = own / "sft"
    trained(base, config, [*quick, "stages=[warm_start,search,sft]"])
    pairs = {chosen: pairs_of(base, chosen) for chosen in ("longest", "shortest")}
    policies = {"warm start": base / "stages" / "warm_start", "SFT": base / "stages" / "sft"}
    runs = {}
    for name, (chosen, eps, alpha, masked) in {**CELLS, **(alpha_cells() if task == SWEPT else {})}.items():
        runs[name] = own / f"{chosen}-eps{eps:g}-alpha{alpha:g}{'-masked' if masked else ''}"
        policies[name] = runs[name] / "stages" / "preference"
        overrides = [
            *quick,
            "stages=[preference]",
            f"model={{path: {policies['SFT']}}}",
            f"preference.path={pairs[chosen]}",
            f"preference.optimizer.learning_rate={LEARNING_RATE}",
            f"objective.preference.label_smoothing={eps}",
            f"objective.preference.mask_prefix_dpo={str(masked).lower()}",
            f"objective.sft.weight={alpha}",
            f"objective.sft.mask_prefix_sft={str(masked).lower()}",
        ]
        trained(runs[name], config, overrides)
    found = {}
    for name, policy in policies.items():
        # For SFT and the warm start, outside the folder that `rlsys` owns. A name with a dot keeps its whole stem.
        output = runs[name] / "evaluation.json" if name in runs else own / f"{policy.name}.evaluation.json"
        figures = measured(policy, config, seed, PROBLEMS[task], output)
        found[name] = figures | {"chosen_logprob": chosen_logprob(policy, pairs["shortest"])}
    return found


def chosen_logprob(policy: Path, pairs: Path) -> float:
    """Return the mean log-probability of the chosen chains of a fixed set of pairs, summed over tokens, in nats."""
    import torch
    from transformers import AutoModelForCausalLM

    rows = pq.read_table(pairs, columns=["chosen_ids", "prompt_length"]).slice(0, SCORED).to_pylist()
    model = AutoModelForCausalLM.from_pretrained(policy).eval()
    found = []
    with torch.no_grad():
        for row in rows:
            ids = torch.tensor(row["chosen_ids"])[None]
            logprobs = torch.log_softmax(model(ids).logits[0, :-1], dim=-1)
            chosen = logprobs.gather(-1, ids[0, 1:, None])[row["prompt_length"] - 1 :]
            found.append(float(chosen.sum()))
    return float(np.mean(found))


def alpha_cells() -> dict[str, tuple[str, float, float, bool]]:
    """Return the cells of the sweep: the joint loss without masking. Alpha 0 and 1 are also in the ablation."""
    return {f"alpha {alpha:g}": ("shortest", 0.1, alpha, False) for alpha in ALPHAS}


def pairs_of(base: Path, chosen: str) -> Path:
    """Extract pairs from the trees of the base run. The chosen side is the longest or the shortest right chain."""
    output = base / "pairs" / chosen
    if not (output / "report.json").exists():
        config = load_config(base / "config.yaml", [f"extract.chosen={chosen}"])
        source = extraction.source_of(config, base / "stages" / "search" / "trees", ModelFolder(base / "model"))
        extraction.run(source, output)
    return output / "preferences.parquet"


def measured(policy: Path, config: Path, seed: int, problems: int, output: Path) -> Figures:
    """Return the held-out figures of a policy. All cells of a seed have the same problems."""
    overrides = [f"run.seed={seed}", f"evaluation.prompts={problems}", "evaluation.samples=4"]
    found = evaluated(policy, config, overrides, output)
    return {mode: found[mode]["by_problem"] for mode in MODES}


def values(cells: Sequence[Figures], mode: str, name: str) -> np.ndarray:
    """Return the values of a cell, [seeds * problems]."""
    return np.concatenate([np.array(cell[mode][name]) for cell in cells])


def rows_of(found: Mapping[str, Sequence[Figures]]) -> dict[str, Any]:
    """Return the figures of every cell with intervals. Differences to the row before are paired by problem and seed."""
    rows: dict[str, Any] = {}
    before: str | None = None
    for name, cells in found.items():
        row: dict[str, Any] = {mode: _of_mode(cells, mode) for mode in MODES}
        row["chosen_logprob"] = float(np.mean([cell["chosen_logprob"] for cell in cells]))
        against = "alpha 0" if name.startswith("alpha") else before
        for mode in MODES if against not in (None, name) else ():
            row[mode]["against"] = {
                figure: asdict(mean_difference(values(cells, mode, figure), values(found[str(against)], mode, figure)))
                for figure in ("accuracy", "no_answer_rate")
            }
        before = before if name.startswith("alpha") else name
        rows[name] = row
    return rows


def effects_of(found: Mapping[str, Sequence[Figures]]) -> list[str]:
    """Return lines about the clearest effects of the paper, with the figures that confirm or refute them."""
    lines = []
    for mode in MODES:
        sft, dpo, cdpo, joint = (
            values(found[name], mode, "no_answer_rate") for name in ("SFT", "+DPO", "+cDPO", "+joint, alpha 1")
        )
        rise = mean_difference(dpo, sft)
        holds = dpo.mean() >= 3 * sft.mean() and rise.mean >= 0.05 and rise.low > 0
        lines.append(
            f"Plain DPO on long chains, {mode}: the no-answer rate is {sft.mean():.3f} after SFT and {dpo.mean():.3f} "
            f"after DPO, difference {rise.mean:+.3f} ({rise.low:+.3f} to {rise.high:+.3f}). Expected: at least three "
            f"times as high, at least 5 points higher, and an interval above 0. Met: {'yes' if holds else 'no'}."
        )
        left = mean_difference(cdpo / 2, joint)
        lines.append(
            f"The joint loss, {mode}: the no-answer rate is {cdpo.mean():.3f} after cDPO and {joint.mean():.3f} with "
            f"alpha 1. Half of the first rate minus the second is {left.mean:+.3f} ({left.low:+.3f} to "
            f"{left.high:+.3f}). Expected: at least halved. Met: {halved(cdpo.mean(), joint.mean(), left.low)}."
        )
    return lines


def halved(before: float, after: float, low: float) -> str:
    """Judge by the means, and mention an interval that does not confirm them."""
    if before == 0:
        return "there were no missing answers"
    return "no" if after > before / 2 else "yes" if low > 0 else "yes, but the interval includes 0"


def pair_lines(folders: Sequence[Path]) -> list[str]:
    """Return lines with the number of pairs and the median lengths of both sides and their common prefix, in tokens."""
    lines = []
    for chosen in ("longest", "shortest"):
        found = [json.loads((own / "sft" / "pairs" / chosen / "report.json").read_text()) for own in folders]
        tokens = [report["tokens"] for report in found]
        medians = {side: ", ".join(f"{each[side]['median']:.0f}" for each in tokens) for side in tokens[0]}
        pairs = ", ".join(f"{report['rows']['preferences']:,}" for report in found)
        lines.append(
            f"Number of pairs with the {chosen} right chain, by seed: {pairs}. Median tokens by seed: chosen side "
            f"{medians['chosen']}; rejected side {medians['rejected']}; common prefix {medians['common_prefix']} "
            f"(at most {max(each['common_prefix']['max'] for each in tokens):.0f})."
        )
    return lines


def _of_mode(cells: Sequence[Figures], mode: str) -> dict[str, Any]:
    row: dict[str, Any] = {"tokens": float(values(cells, mode, "completion_length").mean())}
    for name in ("accuracy", "no_answer_rate"):
        estimate = mean_over_prompts(values(cells, mode, name).reshape(-1, 1))
        row[name] = asdict(estimate) | {"seeds": [float(np.mean(cell[mode][name])) for cell in cells]}
    return row


if __name__ == "__main__":
    sys.exit(main())
