"""`rlsys extract`: export the trees of a search as training data, see `rlsys.search.export`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from rlsys.config.files import load_config
from rlsys.data.inputs import prepare_model
from rlsys.directory import CARD, REPORT, RunDirectory, SearchDirectory
from rlsys.display import print_lines, print_table
from rlsys.earlier_runs import check_run_folder
from rlsys.errors import ConfigError
from rlsys.search.export import NO_PAIR, QUANTILES, Source, report_fault, run, source_of
from rlsys.tables.schemas import TABLES

__all__ = ["Source", "find_source", "run", "show"]


def find_source(run_dir: Path, overrides: Sequence[str]) -> Source:
    """Return the trees of a run directory, with the policy that is trained on them.

    Args:
        run_dir: the run directory of `rlsys search`.
        overrides: overrides of extract.* and model.path.

    Raises:
        ConfigError: the folder holds no search, or an override changes a setting that decided the trees.
    """
    check_run_folder(run_dir)
    path = RunDirectory(run_dir).config
    if not path.is_file():
        raise ConfigError(f"{run_dir}: expected the run directory of `rlsys search`, found no config.yaml in it")
    config = load_config(path, overrides)
    search_config = load_config(path)
    if search_config.model_copy(update={"extract": config.extract, "model": config.model}) != config:
        raise ConfigError(f"{run_dir}: only extract.* and model.path can differ from the search; drop other overrides")
    if config.model != search_config.model and config.model.from_scratch:
        raise ConfigError(f"{run_dir}: a model.from_scratch cannot differ from the search; give model.path instead")
    trees = SearchDirectory(run_dir).trees
    if not any(trees.glob("*.jsonl")):
        remedy = f"`rlsys search {path}` writes them"
        if RunDirectory(run_dir).metrics.exists():
            remedy = f"this is a training run; search in a directory of its own: `rlsys search {path} run.dir=runs/NEW`"
        raise ConfigError(f"{trees}: expected *.jsonl files of trees, found none; {remedy}")
    return source_of(config, trees, prepare_model(config, run_dir))


def check_output(output: Path, run_dir: Path, *, overwrite: bool) -> None:
    """Raise if the folder has files that the command did not write and would replace.

    Args:
        output: the folder of the tables; that in the run directory is the command's own.
        overwrite: whether the user asked to replace files.

    Raises:
        ConfigError: it is a file, or has such files.
    """
    if output.exists() and not output.is_dir():
        raise ConfigError(f"--output {output}: expected a folder, found a file; choose another name")
    report = output / REPORT
    is_own = output.resolve() == SearchDirectory(run_dir).data.resolve()
    fault = report_fault(report.read_bytes()) if report.is_file() else ""
    is_own = is_own or (report.is_file() and not fault)
    names = [CARD, REPORT, *(f"{table.name}.{suffix}" for table in TABLES for suffix in ("jsonl", "parquet"))]
    foreign = [name for name in names if not is_own and (output / name).exists()]
    if foreign and fault and not overwrite:
        raise ConfigError(
            f"--output {output}: {REPORT} is not a report of `rlsys extract` ({fault}), so the folder may have files "
            "of something else; restore it, choose another name, or replace its files with --overwrite"
        )
    if foreign and not overwrite:
        raise ConfigError(
            f"--output {output}: it has a file {foreign[0]} that `rlsys extract` did not write; choose another name, "
            "or replace it with --overwrite"
        )


def show(report: Mapping[str, Any], output: Path, console: Console) -> None:
    """Print the report as tables."""
    for title, columns, rows in _tables(report):
        print_table(console, columns, rows, title=title)
    lines = [f"written to {output}"]
    if report["missing"]:
        lines.insert(
            0,
            f"{report['missing']} of the prompts that search.prompts asks for have no tree in a finished file: "
            "the search is not finished, or its data set is smaller",
        )
    steps = report["supervised_steps"]
    if wrong := steps["checked"] - steps["every_step_right"]:
        lines.insert(
            0,
            f"{wrong} of {steps['checked']} supervised chains reach the right answer by a wrong step; a search with "
            "search.value.type=steps ends such chains",
        )
    if report["marked"]:
        lines.insert(0, f"chains marked as bad and left out: {report['marked']}")
    print_lines(console, lines)


def _tables(report: Mapping[str, Any]) -> Iterator[tuple[str, list[str], list[list[str]]]]:
    solved = f"{report['solved']} of {report['trees']} trees solved, {report['failed']} prompts failed"
    rows = [[name, str(count), str(report["duplicates"][name])] for name, count in report["rows"].items()]
    yield solved, ["rows", "written", "duplicates dropped"], rows
    steps = report["supervised_steps"]
    if steps["checked"]:
        rows = [[str(steps["every_step_right"]), str(steps["checked"])]]
        yield "supervised chains by the task's check of steps", ["every step right", "checked"], rows
    lengths = {name: quantiles for name, quantiles in report["tokens"].items() if quantiles}
    if lengths:
        rows = [[name.replace("_", " "), *(f"{values[q]:g}" for q in QUANTILES)] for name, values in lengths.items()]
        yield "tokens after the prompt", ["", *QUANTILES], rows
    pair_tokens = report["pair_tokens"]
    if any(pair_tokens.values()):
        rows = [[name.replace("_", " "), str(count)] for name, count in pair_tokens.items()]
        yield "tokens of the pairs, by who chose them", ["", "tokens"], rows
    without = {name: count for name, count in report["trees_without_pair"].items() if count}
    if without:
        yield "trees without a pair", ["why", "trees"], [[NO_PAIR[name], str(n)] for name, n in without.items()]
