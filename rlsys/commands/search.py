"""`rlsys search`: grow a tree for each prompt of a task, and write every finished tree at once."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Coroutine, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from rlsys.config.files import dump_config
from rlsys.config.schema import Config
from rlsys.control.dispatch import TreePool
from rlsys.control.tree_search import Search, check_answers, find_prompts, open_trees, search_model_digests
from rlsys.data.inputs import Inputs
from rlsys.directory import RunDirectory, SearchDirectory
from rlsys.display import SEARCH_FIGURES, Display, print_table, standard_output
from rlsys.errors import ConfigError
from rlsys.files import write_json, write_text
from rlsys.launch.signals import StopSignals
from rlsys.models.folder import ModelFolder
from rlsys.search.stats import figure_rows
from rlsys.trees import Role

FIRST_SIGNAL = "{}: the trees that the actors hold are finished and kept, no others are begun; once more to abort"
ABORTED = " for the second time; the trees under way are lost, the same command continues"
AFTER_THE_END = " while the processes of the complete search were ending; nothing is lost"


def run(config: Config) -> str:
    """Grow the missing trees of a config.

    Returns:
        The closing lines for the user.

    Raises:
        RlsysError: every expected failure. After SIGINT or SIGTERM it is an InterruptedRunError, with finished trees
            kept.
    """
    from rlsys.launch import session as launch

    run_dir = Path(config.run.dir).absolute()
    check_trained(config)
    searches: list[Search] = []

    def begin(inputs: Inputs, models: Mapping[Role, ModelFolder]) -> launch.Grow | None:
        searches.append(open_search(config, run_dir, inputs, models))
        return grow_missing(searches[0]) if searches[0].missing() else None

    launch.grow_trees(config, begin)
    return conclude(searches[0], config, run_dir, standard_output())


def check_trained(config: Config) -> None:
    """Refuse a search with the initial weights of a model from scratch.

    Raises:
        ConfigError: the trees would be grown with such a model.
    """
    if config.model.from_scratch and config.search.model is None:
        policies = RunDirectory(Path(config.run.dir))
        trained = [str(policies.exported_policy(stage)) for stage in config.stages]
        ready = next((path for path in reversed(trained) if Path(path).is_dir()), None)
        advice = f"model={{path: {ready}}} run.dir=runs/NEW takes that of this run" if ready else "or set model.path"
        raise ConfigError(f"model.from_scratch: the model is made from scratch and untrained: train it first, {advice}")


def open_search(config: Config, run_dir: Path, inputs: Inputs, models: Mapping[Role, ModelFolder]) -> Search:
    """Check that the run directory holds no other search, and read its trees.

    Raises:
        ConfigError, DataError: it holds another search, a training run, or damaged files; nothing was changed.
        TooManyFailuresError: more of the finished trees have failed than allowed.
    """
    if RunDirectory(run_dir).checkpoints.exists():
        raise ConfigError(f"run.dir: {run_dir} holds a training run; choose another one for the search")
    digests = inputs.fingerprint() | search_model_digests(models)
    search = open_trees(config, run_dir, find_prompts(config, inputs), digests)
    write_text(RunDirectory(run_dir).config, dump_config(config))
    return search


def grow_missing(search: Search) -> Callable[[TreePool, StopSignals], Coroutine[Any, Any, None]]:
    """Return the function that grows the missing trees once the actors are up."""

    async def work(pool: TreePool, stop: StopSignals) -> None:
        with Display(figures=SEARCH_FIGURES) as display:

            def ask(name: str) -> None:
                display.message(FIRST_SIGNAL.format(name))
                search.stop(name)

            stop.ask_first(ask, ABORTED)
            await search.run(pool, display)
            stop.ask_first(lambda _name: None, AFTER_THE_END)

    return work


def conclude(search: Search, config: Config, run_dir: Path, console: Console) -> str:
    """Show the figures, write summary.json and return the closing lines.

    A command that grew no trees keeps the rates of the last command that grew some.

    Raises:
        TooManyFailuresError: no tree has a scored answer.
    """
    trees = search.trees.report()
    engines = search.engines.report(search.wall_s, search.grown) if search.grown else None
    path = SearchDirectory(run_dir).summary
    if engines is not None or not _is_summary_of(path, trees):
        write_json(path, {"trees": trees, "last_command": engines})
    print_table(console, ("figure", "value"), figure_rows(trees, engines), title=f"{trees['trees']} trees")
    for note in check_answers(config, search.trees):
        console.print(note, markup=False, highlight=False)
    already = "" if engines else f"already complete ({len(search.trees.solved)} trees)\n"
    return f"{already}run directory: {config.run.dir}\nextract: rlsys extract {config.run.dir}"


def _is_summary_of(path: Path, trees: Mapping[str, Any]) -> bool:
    with contextlib.suppress(OSError, ValueError):
        summary = json.loads(path.read_text(encoding="utf-8"))
        return isinstance(summary, dict) and summary.get("trees") == json.loads(json.dumps(trees))
    return False
