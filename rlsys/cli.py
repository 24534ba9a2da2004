"""The command line: train, check, evaluate.

Exit codes: 0 the run reached its end; 1 it failed; 2 the input is not usable; 128 + n it was stopped by
signal n, with its state saved.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from rlsys import resources
from rlsys.config import Config
from rlsys.config_file import dump_config, load_config
from rlsys.errors import ConfigError, InterruptedRunError, RlsysError

app = typer.Typer(
    help="Post-training of reasoning models with Ray actors, vLLM, DeepSpeed and a verified weight-sync bus.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
ConfigPath = Annotated[str, typer.Argument(help="YAML file.")]
Overrides = Annotated[list[str] | None, typer.Argument(help="section.key=value, any number.")]


def main() -> None:
    """Entry point. Expected errors become one line and an exit code, never a traceback."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
    _exit_with(app)


def _exit_with(command: Callable[[], None]) -> None:
    try:
        command()
    except ConfigError as error:
        _fail(f"error: {error.message}", 2)
    except InterruptedRunError as error:
        number = signal.Signals[error.message].value
        _fail(f"stopped by {error.message}; the state is saved, the same command continues", 128 + number)
    except RlsysError as error:
        _fail(f"error: {type(error).__name__}: {error.message}", 1)
    except KeyboardInterrupt:
        _fail("stopped before anything was trained", 130)


def _fail(message: str, code: int) -> None:
    print(message, file=sys.stderr)
    sys.exit(code)


@app.command()
def train(config: ConfigPath, overrides: Overrides = None) -> None:
    """Train, or continue a run."""
    resolved = load_config(config, overrides or [])
    from rlsys import launch

    launch.train(resolved)


@app.command()
def check(config: ConfigPath, overrides: Overrides = None) -> None:
    """Validate a config, its model and its data; print the resolved config and the resource plan; start nothing."""
    resolved = load_config(config, overrides or [])
    from rlsys.inputs import Inputs
    from rlsys.setup import prepare_model

    with tempfile.TemporaryDirectory() as folder:
        model = prepare_model(resolved, Path(folder))
        needs = resources.plan(resolved, model)
        Inputs(resolved, model)
    print(dump_config(resolved))
    _show_plan(resolved, needs)
    resources.check(needs)


def _show_plan(config: Config, needs: list[resources.Need]) -> None:
    table = Table(title=f"resource plan: {config.actors.count} actors, {config.learner.ranks} learner ranks")
    for column in ("phase", "needs", "amount", "this machine"):
        table.add_column(column)
    for need in needs:
        table.add_row(need.phase, need.what, f"{need.amount:.4g}", f"{need.available:.4g}")
    if config.run.device == "cuda":
        gpus = config.actors.count * config.actors.tensor_parallel_size + config.learner.ranks
        table.add_row("all", "GPUs", str(gpus), "the cluster's")
    Console().print(table)


@app.command()
def evaluate(
    target: Annotated[str, typer.Argument(help="Run directory, checkpoint or model folder.")],
    overrides: Overrides = None,
    config: Annotated[str | None, typer.Option(help="Config that tells the task; default: the run's.")] = None,
    output: Annotated[str | None, typer.Option(help="Also write the figures to this JSON file.")] = None,
) -> None:
    """Greedy and sampled accuracy, pass@k and no-answer rate on held-out problems, with intervals."""
    from rlsys import evaluate as evaluation

    found = evaluation.run(evaluation.find_target(target, config, overrides or []))
    evaluation.show(found, Console())
    if output:
        Path(output).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
