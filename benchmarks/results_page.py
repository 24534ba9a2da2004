"""Write docs/results.md from the figures in docs/results/*.json, one file for each experiment that was run."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PAGE, FOLDER = ROOT / "docs" / "results.md", ROOT / "docs" / "results"
MODES = ("greedy", "sampled")
JOINT = {
    "joint_online": "The joint objective online against GRPO alone",
    "joint_hard_letter_count": "The joint objective where samples seldom succeed: letter counting in long words",
}
TASKS = {"letter_count": "letter counting", "blocksworld": "blocks world, three blocks"}


def keep(name: str, result: Mapping[str, Any]) -> None:
    """Write the figures of an experiment, and regenerate the page."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    (FOLDER / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    write()


def write_section(page: Path, begin: str, end: str, lines: Sequence[str]) -> None:
    """Replace the lines between two marks of a page. Raise ValueError if the page lacks a mark."""
    text = page.read_text(encoding="utf-8")
    start = text.index(begin) + len(begin)
    page.write_text("\n".join([text[:start], *lines, text[text.index(end, start) :]]), encoding="utf-8")


def write() -> None:
    """Regenerate the page from the stored figures."""
    results = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(FOLDER.glob("*.json"))}
    PAGE.write_text("\n".join(_page(results)), encoding="utf-8")


def _page(results: Mapping[str, Any]) -> list[str]:
    lines = ["# Measured results", ""]
    for task, title in TASKS.items():
        if result := results.get(f"ablation_{task}"):
            plot_ablation(result, FOLDER / f"ablation_{task}.png", title)
            lines += [f"## The paper's ablation: {title}", "", _settings(result), "", ablation_table(result)]
            lines += [*(f"- {effect}" for effect in result["effects"]), ""]
            lines += [f"![accuracy and no-answer rate of every row](results/ablation_{task}.png)", ""]
            lines += [*_notes(f"ablation_{task}")]
    for name, title in JOINT.items():
        if result := results.get(name):
            plot_curves(result, FOLDER / f"{name}.png")
            lines += [f"## {title}", "", *result["lines"], ""]
            lines += [f"![held-out accuracy over generated tokens](results/{name}.png)", "", *_notes(name)]
    if result := results.get("bottleneck"):
        lines += ["## The distillation bottleneck", "", *result["lines"], "", *_notes("bottleneck")]
    if result := results.get("real_model_distillation"):
        lines += ["## A pretrained model learns from a teacher", "", *result["lines"], ""]
        lines += [*_notes("real_model_distillation")]
    if result := results.get("ppo"):
        lines += ["## PPO with a critic", "", *result["lines"], "", *_notes("ppo")]
    if result := results.get("real_model"):
        plot_rewards(result, FOLDER / "real_model.png")
        lines += ["## A pretrained model learns arithmetic", "", *result["lines"], ""]
        lines += ["![reward of the online steps](results/real_model.png)", "", *_notes("real_model")]
    if result := results.get("chaos"):
        lines += ["## The quickstart in a storm of faults", "", *result["lines"], "", *_notes("chaos")]
    return lines


def _settings(result: Mapping[str, Any]) -> str:
    return (
        f"Measured by `python benchmarks/reproduce.py` in {result['seconds'] / 60:.0f} minutes on 2 cores, with "
        f"{len(result['seeds'])} seeds and {result['problems']} held-out problems for each seed. Every problem is "
        f"answered greedily and with 4 samples at temperature 1. The learning rate of every row is "
        f"{result['learning_rate']:g}, {result['why']}. Intervals are 95 % intervals over the problems, for these "
        "seeds. Differences are paired by problem and seed. Square brackets hold the lowest and the highest seed. "
        "log p(chosen) is the mean log-probability of a fixed set of shortest right chains from each seed's trees."
    )


def _notes(name: str) -> list[str]:
    """Return the hand-written notes on an experiment, if there are any."""
    path = FOLDER / f"{name}.md"
    # Links of a note are relative to its own folder, those of the page to the folder above.
    return [path.read_text(encoding="utf-8").replace("](../", "](")] if path.exists() else []


def ablation_table(result: Mapping[str, Any]) -> str:
    """Return tables of accuracy, no-answer rate, length and log p(chosen): the ablation, and the sweep of alpha."""
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
    figures, cells = row[mode], []
    for key in ("accuracy", "no_answer_rate"):
        cells += [_seeds(figures[key]), _interval(figures["against"][key], "+") if "against" in figures else ""]
    return [*cells, f"{figures['tokens']:.1f}", f"{row['chosen_logprob']:.1f}"]


def _seeds(estimate: Mapping[str, Any]) -> str:
    low, high = min(estimate["seeds"]), max(estimate["seeds"])
    return f"{_interval(estimate)} [{low:.3f}, {high:.3f}]"


def _interval(estimate: Mapping[str, Any], sign: str = "") -> str:
    return f"{estimate['mean']:{sign}.3f} ({estimate['low']:{sign}.3f} to {estimate['high']:{sign}.3f})"


def plot_ablation(result: Mapping[str, Any], path: Path, title: str) -> None:
    """Draw a bar with its interval for every row."""
    plt = _pyplot()
    rows = {name: row for name, row in result["rows"].items() if not name.startswith("alpha")}
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for axis, key in zip(axes, ("accuracy", "no_answer_rate"), strict=True):
        for number, mode in enumerate(MODES):
            estimates = [row[mode][key] for row in rows.values()]
            places = [place + 0.4 * number - 0.2 for place in range(len(rows))]
            means = [each["mean"] for each in estimates]
            below = [each["mean"] - each["low"] for each in estimates]
            above = [each["high"] - each["mean"] for each in estimates]
            errors = [below, above]
            axis.bar(places, means, 0.38, yerr=errors, label=mode, capsize=2)
        axis.set_xticks(range(len(rows)), list(rows), rotation=30, ha="right", fontsize=8)
        axis.set_title(f"{title}: {key.replace('_', ' ')}", fontsize=9)
        axis.grid(alpha=0.3, axis="y")
    axes[0].legend(fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def plot_curves(result: Mapping[str, Any], path: Path) -> None:
    """Draw the held-out accuracy of every seed over its generated tokens."""
    plt = _pyplot()
    figure, axes = plt.subplots(figsize=(7, 3.8), layout="constrained")
    highest = 0.0
    for index, (arm, curves) in enumerate(result["curves"].items()):
        for number, curve in enumerate(curves):
            label = arm if number == 0 else None
            axes.plot(_thousands(curve["tokens"]), curve["accuracy"], color=f"C{index}", alpha=0.8, label=label)
            highest = max(highest, *curve["accuracy"])
    axes.set(xlabel="generated tokens, thousands", ylabel="held-out accuracy at temperature 1")
    axes.set_ylim(0, 1 if highest > 0.5 else 1.2 * highest)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def plot_rewards(result: Mapping[str, Any], path: Path) -> None:
    """Draw the mean reward of ten online steps, for every seed."""
    plt = _pyplot()
    figure, axes = plt.subplots(figsize=(7, 3.2), layout="constrained")
    for name, seed in result["seeds"].items():
        rewards = seed["rewards"]
        parts = [rewards[start : start + 10] for start in range(0, len(rewards), 10)]
        axes.plot(
            [10 * number + 5 for number in range(len(parts))],
            [sum(part) / len(part) for part in parts],
            marker="o",
            label=f"seed {name}",
        )
    axes.set(xlabel="online step", ylabel="reward, mean of 10 steps", ylim=(0, 1))
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
