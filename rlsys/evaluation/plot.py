"""The results of an evaluation as a figure: pass@k by k, and accuracy with intervals.

matplotlib is imported inside the functions, because it is not among the dependencies of rlsys.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rlsys.errors import ConfigError
from rlsys.evaluation.document import letters_of, results_of, title_of

# Colours that people with colour blindness can tell apart (Okabe and Ito 2008).
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
AUTHOR = "rlsys evaluate"
"""Text by which `rlsys evaluate` knows a figure that it drew."""
_METADATA = {
    ".png": {"Software": AUTHOR},
    ".svg": {"Creator": AUTHOR, "Date": None},
    ".pdf": {"Creator": AUTHOR},
}
BARS = (
    ("greedy", "accuracy"), ("sampled", "accuracy"), ("greedy", "no_answer_rate"), ("sampled", "no_answer_rate"),
)  # fmt: skip


def check_plot(path: str) -> None:
    """Raise if the figure could not be written at the end.

    Raises:
        ConfigError: matplotlib is missing, does not know the suffix, or the folder does not exist.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
    except ImportError:
        raise ConfigError("--plot needs matplotlib, which is not installed; run pip install matplotlib") from None
    formats = FigureCanvasAgg.get_supported_filetypes()
    if Path(path).suffix[1:].lower() not in formats:
        raise ConfigError(f"--plot {path}: expected a file name that ends in .png, .svg or .pdf")
    if not Path(path).absolute().parent.is_dir():
        raise ConfigError(f"--plot {path}: its folder does not exist")


def plot(document: Mapping[str, Any], path: str) -> None:
    """Draw the results into a file, a row of two panels for every task."""
    from matplotlib.figure import Figure

    results, letters = results_of(document), letters_of(document)
    tasks = list(dict.fromkeys(result["task"] for result in results))
    figure = Figure(figsize=(10, 0.6 + 0.25 * len(letters) + 3.6 * len(tasks)), layout="constrained", dpi=120)
    axes = figure.subplots(len(tasks), 2, squeeze=False)
    for row, task in zip(axes, tasks, strict=True):
        of_task = [result for result in results if result["task"] == task]
        if of_task[0].get("pass_at_k"):
            _draw_pass(row[0], of_task, letters)
        else:
            row[0].set_axis_off()
        _draw_bars(row[1], of_task, letters)
        row[0].set_title(title_of(of_task[0]), fontsize=10)
    handles, labels = axes[0][1].get_legend_handles_labels()
    names = [f"{label}: {name}" for label, name in zip(labels, letters, strict=True)] if len(letters) > 1 else letters
    figure.legend(handles, names, loc="outside lower left", fontsize=8, frameon=False)
    figure.savefig(path, metadata=_METADATA.get(Path(path).suffix.lower()))


def _draw_pass(axes: Any, results: Sequence[Mapping[str, Any]], letters: Mapping[str, str]) -> None:
    for result in results:
        colour = _colour(result, letters)
        for name, style in (("pass_at_k", "o-"), ("majority_at_k", "s--")):
            estimates = result.get(name, {})
            ks = [int(k) for k in estimates]
            means, lows, highs = ([each[key] for each in estimates.values()] for key in ("mean", "low", "high"))
            axes.plot(ks, means, style, color=colour, markersize=4, linewidth=1.5)
            if name == "pass_at_k":
                axes.fill_between(ks, lows, highs, color=colour, alpha=0.15, linewidth=0)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:.0f}")
    axes.set_xlabel("k (samples)")
    axes.set_ylabel("pass@k (solid), majority@k (dashed)")
    axes.grid(alpha=0.3)


def _draw_bars(axes: Any, results: Sequence[Mapping[str, Any]], letters: Mapping[str, str]) -> None:
    bars = [(mode, name) for mode, name in BARS if mode in results[0]]
    for number, result in enumerate(results):
        offset = (number - (len(results) - 1) / 2) * 0.8 / (len(results) + 1)
        estimates = [result[mode][name] for mode, name in bars]
        below = [each["mean"] - each["low"] for each in estimates]
        above = [each["high"] - each["mean"] for each in estimates]
        axes.errorbar(
            [place + offset for place in range(len(bars))],
            [each["mean"] for each in estimates],
            yerr=[below, above],
            fmt="o",
            capsize=3,
            color=_colour(result, letters),
            label=letters[result["model"]["name"]],
        )
    axes.set_xticks(range(len(bars)), [f"{mode}\n{name.replace('_', ' ')}" for mode, name in bars], fontsize=9)
    axes.set_ylim(-0.02, 1.02)
    axes.set_title("share of problems, 95 % intervals", fontsize=10)
    axes.grid(alpha=0.3, axis="y")


def _colour(result: Mapping[str, Any], letters: Mapping[str, str]) -> str:
    return COLOURS[list(letters).index(result["model"]["name"]) % len(COLOURS)]
