"""docs/results.md: made of the figures that the experiments keep beside it, of those that have been run."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PAGE, FOLDER = ROOT / "docs" / "results.md", ROOT / "docs" / "results"
MODES = ("greedy", "sampled")
TASKS = {"letter_count": "letter counting", "blocksworld": "blocks world, three blocks"}


def keep(name: str, result: Mapping[str, Any]) -> None:
    """Write the figures of an experiment, and the page anew."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    (FOLDER / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    write()


def write() -> None:
    found = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(FOLDER.glob("*.json"))}
    PAGE.write_text("\n".join(_page(found)), encoding="utf-8")


def _page(found: Mapping[str, Any]) -> list[str]:
    lines = ["# Measured results", ""]
    for task, title in TASKS.items():
        if result := found.get(f"ablation_{task}"):
            plot_ablation(result, FOLDER / f"ablation_{task}.png", title)
            lines += [f"## The paper's ablation: {title}", "", _settings(result), "", ablation_table(result)]
            lines += [*(f"- {effect}" for effect in result["effects"]), ""]
            lines += [f"![accuracy and no-answer rate of every row](results/ablation_{task}.png)", ""]
            lines += [*_notes(f"ablation_{task}")]
    if result := found.get("joint_online"):
        plot_curves(result, FOLDER / "joint_online.png")
        lines += ["## The joint objective online against GRPO alone", "", *result["lines"], ""]
        lines += ["![held-out accuracy over generated tokens](results/joint_online.png)", "", *_notes("joint_online")]
    if result := found.get("ppo"):
        lines += ["## PPO with a critic", "", *result["lines"], "", *_notes("ppo")]
    if result := found.get("chaos"):
        lines += ["## The quickstart in a storm of faults", "", *result["lines"], "", *_notes("chaos")]
    return lines


def _settings(result: Mapping[str, Any]) -> str:
    return (
        f"`python benchmarks/reproduce.py`; {len(result['seeds'])} seeds with {result['problems']} held-out problems "
        f"each, greedy and 4 samples at temperature 1; {result['seconds'] / 60:.0f} minutes on 2 cores. The learning "
        f"rate of every cell is {result['learning_rate']:g}: {result['why']}. Intervals are 95 % over problems, given "
        "these seeds; differences are paired by problem and seed; in square brackets the lowest and the highest seed. "
        "log p(chosen) is of one set of shortest right chains of each seed's trees."
    )


def _notes(name: str) -> list[str]:
    """What a reader should make of the figures, written by hand beside them."""
    path = FOLDER / f"{name}.md"
    return [path.read_text(encoding="utf-8")] if path.exists() else []


def ablation_table(result: Mapping[str, Any]) -> str:
    """Accuracy, no-answer rate, length and chosen log-probability of every row, and the sweep of alpha."""
    rows = {name: row for name, row in result["rows"].items() if not name.startswith("alpha")}
    sweep = {name: row for name, row in result["rows"].items() if name.startswith("alpha")}
    lines = []
    for part, before in ((rows, "the row before"), (sweep, "alpha 0")):
        for mode in MODES if part else ():
            heads = [mode, "accuracy", f"minus {before}", "no answer", f"minus {before}", "tokens", "log p(chosen)"]
            lines += [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
            for name, row in part.items():
                lines.append(f"| {name} | {' | '.join(_cells(row, mode))} |")
            lines.append("")
    return "\n".join(lines)


def _cells(row: Mapping[str, Any], mode: str) -> list[str]:
    found, cells = row[mode], []
    for key in ("accuracy", "no_answer_rate"):
        cells += [_seeds(found[key]), _interval(found["against"][key], "+") if "against" in found else ""]
    return [*cells, f"{found['tokens']:.1f}", f"{row['chosen_logprob']:.1f}"]


def _seeds(found: Mapping[str, Any]) -> str:
    low, high = min(found["seeds"]), max(found["seeds"])
    return f"{_interval(found)} [{low:.3f}, {high:.3f}]"


def _interval(found: Mapping[str, Any], sign: str = "") -> str:
    return f"{found['mean']:{sign}.3f} ({found['low']:{sign}.3f} to {found['high']:{sign}.3f})"


def plot_ablation(result: Mapping[str, Any], path: Path, title: str) -> None:
    """Bars of every row, with their intervals."""
    plt = _pyplot()
    rows = {name: row for name, row in result["rows"].items() if not name.startswith("alpha")}
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for axis, key in zip(axes, ("accuracy", "no_answer_rate"), strict=True):
        for number, mode in enumerate(MODES):
            found = [row[mode][key] for row in rows.values()]
            places = [place + 0.4 * number - 0.2 for place in range(len(rows))]
            errors = [[each["mean"] - each["low"] for each in found], [each["high"] - each["mean"] for each in found]]
            axis.bar(places, [each["mean"] for each in found], 0.38, yerr=errors, label=mode, capsize=2)
        axis.set_xticks(range(len(rows)), list(rows), rotation=30, ha="right", fontsize=8)
        axis.set_title(f"{title}: {key.replace('_', ' ')}", fontsize=9)
        axis.grid(alpha=0.3, axis="y")
    axes[0].legend(fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def plot_curves(result: Mapping[str, Any], path: Path) -> None:
    """Held-out accuracy of every seed over generated tokens."""
    plt = _pyplot()
    figure, axes = plt.subplots(figsize=(7, 3.8), layout="constrained")
    for (arm, curves), color in zip(result["curves"].items(), ("C0", "C1"), strict=True):
        for number, curve in enumerate(curves):
            label = arm if number == 0 else None
            axes.plot(_thousands(curve["tokens"]), curve["accuracy"], color=color, alpha=0.8, label=label)
    axes.set(xlabel="generated tokens, thousands", ylabel="held-out accuracy at temperature 1", ylim=(0, 1))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _thousands(values: Sequence[float]) -> list[float]:
    return [value / 1000 for value in values]


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


if __name__ == "__main__":
    write()
