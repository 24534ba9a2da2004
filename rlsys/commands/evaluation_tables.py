"""The results of `rlsys evaluate` as tables that fit 80 columns."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.console import Console

from rlsys.control.search_evaluation import show_search
from rlsys.display import print_lines, print_table
from rlsys.evaluation.comparison import MODES
from rlsys.evaluation.document import letters_of, results_of, title_of
from rlsys.evaluation.figures import DETECTORS, MACRO_MINIMUM

SHOWN = 2
"""Completions of a detector that are shown for each model."""
LINE = 79
SHORTEST_END = 12
MOST_ANSWERS = 12
Result = Mapping[str, Any]
Row = tuple[str, str, str]
PairedRow = tuple[str, str, str, str, str]
SIGNS = ("truncated rate", "repetition", "over-reflection", "ignored instruction")
"""Ends of the labels that have no row if no completion has the sign."""


def show(document: Mapping[str, Any], console: Console) -> None:
    """Print all results: a table for every task, with the differences of the models."""
    letters, results = letters_of(document), results_of(document)
    comparisons = document.get("comparisons", [])
    if len(letters) > 1:
        print_lines(console, [f"{letter}: {name}" for name, letter in letters.items()])
        for other in dict.fromkeys(each["second"] for each in comparisons if not each["same_tokenizer"]):
            pair = f"{letters[comparisons[0]['first']]} and {letters[other]}"
            note = "have different tokenizers: their texts compare, their tokens do not"
            print_lines(console, [f"{pair} {note}"])
    for task in dict.fromkeys(result["task"] for result in results):
        of_task = [result for result in results if result["task"] == task]
        _show_task(of_task, [each for each in comparisons if each["task"] == task], letters, console)


def _show_task(
    results: Sequence[Result], comparisons: Sequence[Mapping[str, Any]], letters: Mapping[str, str], console: Console
) -> None:
    first, several = results[0], len(results) > 1
    title = title_of(first)
    rows, notes = _without_absent(_paired_rows(results, comparisons, letters))
    if several:
        columns = ("figure", "", "value", "95 % interval", f"difference to {letters[first['model']['name']]}")
        cells = [row if not number else ("", *row[1:]) for of_label in rows for number, row in enumerate(of_label)]
        print_table(console, columns, cells, title=title)
    else:
        values = [(label, value, interval) for [(label, _, value, interval, _)] in rows]
        print_table(console, ("figure", "value", "95 % interval"), values, title=title)
    if "constant_answer" in first:
        constant = first["constant_answer"]
        notes.append(f"always answering {constant['answer'][:20]} would be right in {constant['accuracy']:.3f}")
    print_lines(console, notes)
    if not several:
        _show_by_answer(first, console)
    for result in results:
        if "search" in result:
            print_lines(console, [f"{letters[result['model']['name']]}: search"] if several else [])
            show_search(result["search"], result["problems"], console)
    for result in results:
        print_lines(console, _completion_lines(result, letters if several else {}))


def _rows(result: Result) -> Iterator[tuple[tuple[str, ...], Row]]:
    """Yield the rows of a result, each with the place of its difference in a comparison; () without one."""
    for mode in MODES:
        if mode not in result:
            continue
        figures = result[mode]
        for name in ("accuracy", "no_answer_rate", "truncated_rate"):
            yield (mode, name), _row(f"{mode} {name.replace('_', ' ')}", figures[name])
        if figures["out_of_turns_rate"]["mean"]:  # of episodes with an environment
            yield (mode, "out_of_turns_rate"), _row(f"{mode} out of turns rate", figures["out_of_turns_rate"])
        if figures["by_problem"]["reward"] != figures["by_problem"]["accuracy"]:
            yield (mode, "reward"), _row(f"{mode} reward", figures["reward"])
        for name in DETECTORS:
            label = f"{mode} {name.replace('over_', 'over-').replace('_', ' ')}"
            yield (mode, name), _row(label, figures["thinking"][name]["share"])
        lengths = figures["completion_lengths"]
        yield (mode, "completion_length"), _row(f"{mode} length in tokens", lengths["mean"])
        yield (), (f"{mode} median length", _value(lengths["median"]), f"95 % <= {lengths['quantile_95']:.0f}")
        steps = figures["every_step_right"]
        if steps["checked"]:
            share = f"{steps['right'] / steps['checked']:.3f}"
            yield (), (f"{mode} every step right", share, f"of {steps['checked']:,} right")
        if figures["error_rate"]:
            yield (), (f"{mode} verifier errors", f"{figures['error_rate']:.3f}", "")
    for name, shown in (("pass_at_k", "pass"), ("majority_at_k", "majority")):
        for k, estimate in result.get(name, {}).items():
            yield (name, k), _row(f"{shown}@{k}", estimate)


def _paired_rows(
    results: Sequence[Result], comparisons: Sequence[Mapping[str, Any]], letters: Mapping[str, str]
) -> list[list[PairedRow]]:
    """Return the rows of every figure, one for each model: label, letter, value, interval and difference."""
    differences = {each["second"]: each["differences"] for each in comparisons}
    by_label: dict[str, list[PairedRow]] = {}
    for result in results:
        name = result["model"]["name"]
        for place, (label, value, interval) in _rows(result):
            difference: Any = differences.get(name, {}) if place else {}
            for key in place:
                difference = difference.get(key, {})
            row = (label, letters[name], value, interval, _difference(difference))
            by_label.setdefault(label, []).append(row)
    return list(by_label.values())


def _without_absent(rows: Sequence[list[PairedRow]]) -> tuple[list[list[PairedRow]], list[str]]:
    """Return the rows without the signs that no completion of any model has, and lines that name these."""
    absent = [row for row in rows if row[0][0].endswith(SIGNS) and {value for _, _, value, _, _ in row} == {"0.000"}]
    if not absent:
        return [*rows], []
    interval = max(row[0][3] for row in absent)
    text = f"none seen ({interval}): {', '.join(row[0][0] for row in absent)}"
    lines = textwrap.wrap(text, LINE, subsequent_indent="  ", break_on_hyphens=False)
    return [row for row in rows if row not in absent], lines


def _row(label: str, estimate: Mapping[str, float]) -> Row:
    return label, _value(estimate["mean"]), f"{_value(estimate['low'])} to {_value(estimate['high'])}"


def _difference(estimate: Mapping[str, float]) -> str:
    if not estimate:
        return ""
    mean, low, high = (_value(estimate[name], "+") for name in ("mean", "low", "high"))
    return f"{mean} ({low} to {high})"


def _value(value: float, sign: str = "") -> str:
    """Format a share with three digits after the point, and a length so that it takes no more columns."""
    digits = 3 if abs(value) < 10 else 1 if abs(value) < 1000 else 0
    return f"{value:{sign}.{digits}f}"


def _show_by_answer(result: Result, console: Console) -> None:
    modes = [mode for mode in MODES if mode in result]
    answers = list(result[modes[0]].get("accuracy_by_answer", {})) if modes else []
    if not 1 < len(answers) <= MOST_ANSWERS:
        return
    rows = []
    for answer in answers:
        cells = [result[mode]["accuracy_by_answer"][answer] for mode in modes]
        rows.append((answer, str(cells[0]["problems"]), *(f"{cell['accuracy']:.3f}" for cell in cells)))
    macro = [result[mode]["macro_accuracy"] for mode in modes]
    if None not in macro:
        rows.append(("macro", f">= {MACRO_MINIMUM} each", *(f"{value:.3f}" for value in macro)))
    print_table(console, ("answer", "problems", *modes), rows, title="accuracy by true answer")


def _completion_lines(result: Result, letters: Mapping[str, str]) -> list[str]:
    """Return the first completions that each detector names, shortened. The output file has all, at full length."""
    letter = f"{letters[result['model']['name']]}: " if letters else ""
    lines = []
    for mode in MODES:
        for name in DETECTORS if mode in result else ():
            completions = result[mode]["thinking"][name]["completions"]
            if not completions:
                continue
            total = result["problems"] * (1 if mode == "greedy" else result["samples"])
            lines.append(f"{letter}{mode} {name.replace('_', ' ')}: {len(completions)} of {total} completions")
            for each in completions[:SHOWN]:
                lines.append(_shortened(f"{each['problem']}#{each['sample']}: {each['evidence']}", each["text"]))
    return lines


def _shortened(evidence: str, text: str) -> str:
    """Return a line with the evidence of a detector and the end of the text, where the fault usually shows."""
    evidence, text = (" ".join(each.split()) for each in (evidence, text))
    line = f"  {evidence[: LINE - 2]}"
    left = LINE - len(line) - len(" | ...")
    return line if left < SHORTEST_END else f"{line} | {text if len(text) <= left + 3 else '...' + text[-left:]}"
