"""The tables and pictures of docs/search_use.md, from the attempts that benchmarks/search_use.py measured."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import results_page

from rlsys.stats import Estimate, mean_difference, mean_over_prompts

ROOT = Path(__file__).resolve().parents[1]
PAGE, FOLDER = ROOT / "docs" / "search_use.md", ROOT / "docs" / "search_use"
SAMPLES = "independent samples"
Rows = Mapping[str, Sequence[Sequence[Mapping[str, Any]]]]
"""Rows of the prompts by arm and seed: tokens at the first right answer, all tokens, whether its steps are right."""


@dataclass(frozen=True, slots=True)
class Figures:
    """The figures of one task.

    Attributes:
        problems: What the problem of each prompt is apart from names, by seed. Such prompts are not independent.
    """

    task: str
    budgets: Sequence[int]
    rows: Rows
    problems: Sequence[Sequence[str]]

    @property
    def groups(self) -> np.ndarray:
        """Labels of the problems of all prompts, [seeds * prompts]."""
        return np.array([problem for seed in self.problems for problem in seed])

    def solved(self, arm: str) -> np.ndarray:
        """Return whether each prompt was solved within each budget, [seeds, prompts, budgets] bool."""
        at = [[np.inf if row["solved_at"] is None else row["solved_at"] for row in seed] for seed in self.rows[arm]]
        return np.array(at)[:, :, None] <= np.array(self.budgets)

    def sound(self, arm: str) -> np.ndarray:
        """Return `solved`, without the prompts whose first right chain has a wrong step or steps nobody can check."""
        right = np.array([[row["sound"] is True for row in seed] for seed in self.rows[arm]])
        return self.solved(arm) & right[:, :, None]

    def lines(self) -> list[str]:
        """Return the figures as Markdown."""
        prompts, seeds = len(self.rows[SAMPLES][0]), len(self.rows[SAMPLES])
        searches = [arm for arm in self.rows if arm != SAMPLES]
        samples = self.solved(SAMPLES)
        return [
            f"Solved fraction of {seeds * prompts} prompts (95 % interval over {len(np.unique(self.groups))} different "
            f"problems; lowest to highest of {seeds} seeds):",
            "",
            *self._table(list(self.rows), lambda arm, i: _share(self.solved(arm)[:, :, i], self.groups)),
            "",
            "Search minus independent samples, paired by prompt (95 % interval), and the ratio of both:",
            "",
            *self._table(searches, lambda arm, i: _against(self.solved(arm)[:, :, i], samples[:, :, i], self.groups)),
            "",
            "The same, if a prompt counts as solved only by a first right chain with every step right:",
            "",
            *self._table(
                searches,
                lambda arm, i: _against(self.sound(arm)[:, :, i], self.sound(SAMPLES)[:, :, i], self.groups),
            ),
            "",
            *self._ends(),
        ]

    def _table(self, arms: Sequence[str], cell: Any) -> list[str]:
        rows = [
            f"| {budget} | " + " | ".join(cell(arm, i) for arm in arms) + " |" for i, budget in enumerate(self.budgets)
        ]
        return ["| tokens | " + " | ".join(arms) + " |", "|---" * (1 + len(arms)) + "|", *rows]

    def _ends(self) -> list[str]:
        """Return a table of the chains with every step right, and of the searches that ended unsolved."""
        lines = [
            "| arm | right chains with every step right | ended unsolved, nothing left to search |",
            "|---|---|---|",
        ]
        for arm, seeds in self.rows.items():
            rows = [row for seed in seeds for row in seed]
            known = np.array([row["sound"] is not None for row in rows])
            checked = [row["sound"] for row in rows if row["sound"] is not None]
            values = np.array(checked, dtype=float)[:, None]
            sound = _interval(mean_over_prompts(values, groups=self.groups[known])) if checked else "not known"
            ended = np.mean([row["solved_at"] is None and row["total"] < max(self.budgets) for row in rows])
            lines.append(f"| {arm} | {sound} of {len(checked)} | {ended:.3f} |")
        return lines

    def plot(self, path: Path) -> None:
        """Draw the mean of the seeds as a line, and the range of the seeds as a band."""
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt

        figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
        for arm in self.rows:
            of_seeds = self.solved(arm).mean(axis=1)
            style = "k--" if arm == SAMPLES else "-o"
            [line] = axes.plot(self.budgets, of_seeds.mean(axis=0), style, label=arm, markersize=3)
            low, high = of_seeds.min(axis=0), of_seeds.max(axis=0)
            axes.fill_between(self.budgets, low, high, color=line.get_color(), alpha=0.15)
        axes.set_xscale("log", base=2)
        axes.set_xticks(self.budgets, [str(budget) for budget in self.budgets])
        axes.set(xlabel="generated tokens per prompt", ylabel="solved at least once", ylim=(0, None))
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=120)
        plt.close(figure)


def write(found: Mapping[str, Figures]) -> None:
    """Write the tables and the picture of each task between its marks of the page, and the rows beside it."""
    for task, figures in found.items():
        picture = FOLDER / f"{task}.png"
        figures.plot(picture)
        compact = {arm: [[_compact(row) for row in seed] for seed in seeds] for arm, seeds in figures.rows.items()}
        (FOLDER / f"{task}.json").write_text(json.dumps(compact) + "\n", encoding="utf-8")
        lines = [f"![solved fraction against generated tokens]({FOLDER.name}/{picture.name})", "", *figures.lines()]
        results_page.write_section(PAGE, f"<!-- {task}: written by benchmarks/search_use.py -->", "<!-- end -->", lines)


def _compact(row: Mapping[str, Any]) -> list[Any]:
    return [row["solved_at"], row["total"], row["sound"]]


def _share(solved: np.ndarray, groups: np.ndarray) -> str:
    of_seeds = solved.mean(axis=1)
    found = _interval(mean_over_prompts(solved.reshape(-1, 1), groups=groups))
    return f"{found[:-1]}; {of_seeds.min():.3f} to {of_seeds.max():.3f})"


def _against(search: np.ndarray, samples: np.ndarray, groups: np.ndarray) -> str:
    difference = _interval(mean_difference(search.ravel(), samples.ravel(), groups=groups), "+")
    return f"{difference}, {search.mean() / samples.mean():.2f}" if samples.any() else difference


def _interval(estimate: Estimate, sign: str = "") -> str:
    return f"{estimate.mean:{sign}.3f} ({estimate.low:{sign}.3f} to {estimate.high:{sign}.3f})"
