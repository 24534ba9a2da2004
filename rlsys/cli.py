"""The command line: train, check, evaluate, export, search, score, extract, teach, show, view, status, doctor, keys.

Exit codes: 0 the command reached its end; 1 it failed; 2 the input is not usable, also the files of the run to be
resumed, and the same command fails again until the user acts; 75 run.time_limit has passed; 128 + n it was stopped by
signal n (130 SIGINT, 143 SIGTERM). For the last two, the last line of output says whether the state is saved.
"""

from __future__ import annotations

import os
import re
import signal
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from typer.core import TyperCommand

# Each command imports the rest itself, so that `rlsys --help` stays fast.
from rlsys import fault_injection as faults
from rlsys.errors import AbortedRunError, ConfigError, InterruptedRunError, RlsysError

app = typer.Typer(
    help="Post-training of reasoning models with Ray actors, vLLM, DeepSpeed and a verified weight-sync bus.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


class Command(TyperCommand):
    """A command whose usage line has the names of required arguments without braces."""

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        """Return the pieces of the usage line."""
        return [re.sub(r"^\{(.*)\}(\.\.\.)?$", r"\1", piece) for piece in super().collect_usage_pieces(ctx)]

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse the arguments. ConfigError: an override is written as an option."""
        for position, argument in enumerate(args):
            name, separator, value = argument.partition("=")
            if argument.startswith("--") and "." in name:
                written = value if separator else next(iter(args[position + 1 :]), "VALUE")
                raise ConfigError(f"no such option {name}; overrides are written KEY=VALUE: {name[2:]}={written}")
        return super().parse_args(ctx, args)


command = partial(app.command, cls=Command)
ConfigPath = Annotated[str, typer.Argument(metavar="CONFIG", help="YAML file.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Any number of section.key=value.", show_default=False)
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an output that exists.")]
Foreign = Annotated[bool, typer.Option("--overwrite", help="Also replace files that this command did not write.")]


def main() -> None:
    """Run the command line. Expected errors become one line and an exit code, never a traceback."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    import logging

    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
    _exit_with(_command)


def _command() -> None:
    faults.parse(os.environ.get(faults.VARIABLE, ""))
    app()


def _exit_with(command: Callable[[], None]) -> None:
    try:
        command()
    except ConfigError as error:
        _fail(f"error: {error.message}", 2)
    except (InterruptedRunError, AbortedRunError) as error:
        from rlsys.launch.signals import TIME_LIMIT

        name = error.message.split()[0].rstrip(";")
        code = os.EX_TEMPFAIL if name == TIME_LIMIT else 128 + signal.Signals[name].value
        _fail(f"stopped by {error.message}", code)
    except RlsysError as error:
        _fail(f"error: {error.message}", 1)
    except PermissionError as error:
        _fail(f"error: {_named(error)}; change the permissions, or choose another path", 2)
    except OSError as error:  # no space left
        _fail(f"error: {_named(error)}", 1)
    except KeyboardInterrupt:
        _fail("stopped by SIGINT", 130)
    except SystemExit as end:
        if end.code == 130:  # typer turns an interrupt into it, without a word
            _fail("stopped by SIGINT", 130)
        raise


def _named(error: OSError) -> str:
    """Return the error with its file in front, without its number."""
    return f"{error.filename}: {error.strerror}" if error.filename and error.strerror else str(error)


def _fail(message: str, code: int) -> None:
    print(message, file=sys.stderr)
    sys.exit(code)


def _show_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        print(f"rlsys {version('rlsys')}")
        raise typer.Exit


@app.callback()
def options(
    show_version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Define the options of the program itself. Typer shows the help of `app` instead of this."""


@command()
def train(config: ConfigPath, overrides: Overrides = None) -> None:
    """Train, or continue a run."""
    from rlsys.config.files import load_config

    resolved = load_config(config, overrides or [])
    from rlsys.launch import session as launch

    print(launch.train(resolved))


@command()
def check(
    config: ConfigPath,
    overrides: Overrides = None,
    resolved: Annotated[bool, typer.Option("--resolved", help="First print the config with all defaults.")] = False,
) -> None:
    """Validate a config, its model and its data, and say what a run would do. It starts nothing."""
    from rlsys.config.files import load_config

    loaded = load_config(config, overrides or [])
    from rlsys.commands import check as check_command

    check_command.run(loaded, resolved=resolved)


@command()
def evaluate(
    arguments: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL... [KEY=VALUE...]",
            help="Run directories, checkpoints, model folders or hub ids; and any number of section.key=value.",
        ),
    ],
    config: Annotated[str | None, typer.Option(help="Config that names the task. Default: the first run's.")] = None,
    task: Annotated[
        list[str] | None, typer.Option(help="YAML file with one more task: the keys of its section, or a config.")
    ] = None,
    output: Annotated[
        str | None,
        typer.Option(help="Also write the figures to this JSON file. Finished parts are kept in OUTPUT.parts."),
    ] = None,
    plot: Annotated[str | None, typer.Option(help="Also draw pass@k and accuracy into this file (.png).")] = None,
    overwrite: Foreign = False,
) -> None:
    """Measure and compare models on held-out problems: accuracy, pass@k, lengths, signs of empty reasoning."""
    from rlsys.commands import evaluate as evaluation
    from rlsys.commands.evaluation_targets import find_target, find_tasks, split_arguments
    from rlsys.display import standard_output

    models, overrides = split_arguments(arguments)
    evaluation.run(
        targets := [find_target(model) for model in models],
        find_tasks(targets, config, task or [], overrides),
        output=output,
        plot=plot,
        overwrite=overwrite,
        console=standard_output(),
        say=lambda line: print(line, file=sys.stderr, flush=True),
    )


@command()
def export(
    target: Annotated[str, typer.Argument(metavar="RUN", help="Run directory, checkpoint or policy folder of a run.")],
    output: Annotated[str, typer.Option(help="New or empty folder to write.")],
    stage: Annotated[str | None, typer.Option(help="A finished stage of the run. Default: the newest policy.")] = None,
    step: Annotated[int | None, typer.Option(help="A checkpoint of the run: 340 for step_000340.")] = None,
    merge: Annotated[
        bool, typer.Option("--merge/--adapter", help="With model.lora: a whole model, or the adapter alone.")
    ] = True,
    dtype: Annotated[
        Literal["fp32", "bf16"] | None, typer.Option(help="Number format of the weights. Default: as they are.")
    ] = None,
    overwrite: Overwrite = False,
) -> None:
    """Write a policy of a run as a Hugging Face folder with a model card, for vLLM, transformers and others."""
    from rlsys.commands import export as export_command
    from rlsys.run.policies import find_run_policy

    policy = find_run_policy(target, stage, step)
    print(export_command.run(policy, Path(output), merge=merge, dtype=dtype, overwrite=overwrite))


@command()
def extract(
    run_dir: Annotated[str, typer.Argument(metavar="RUN", help="Run directory of `rlsys search`.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="extract.key=value or model.path=PATH.")
    ] = None,
    output: Annotated[str | None, typer.Option(help="Folder of the files. Default: RUN/data.")] = None,
    overwrite: Foreign = False,
) -> None:
    """Extract supervised rows, preference pairs and step values from the trees of a search, as JSONL and Parquet."""
    from rlsys.commands import extract as extract_command
    from rlsys.directory import SearchDirectory
    from rlsys.display import standard_output

    source = extract_command.find_source(Path(run_dir), overrides or [])
    folder = Path(output) if output else SearchDirectory(Path(run_dir)).data
    extract_command.check_output(folder, Path(run_dir), overwrite=overwrite)
    extract_command.show(extract_command.run(source, folder), folder, standard_output())


@command()
def score(
    run_dir: Annotated[str, typer.Argument(metavar="RUN", help="Run directory of `rlsys search`.")],
    teacher: Annotated[str, typer.Argument(metavar="TEACHER", help="Model folder or hub id of the teacher.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="model.path=PATH of the policy.")
    ] = None,
) -> None:
    """Score the right chains of a search with the policy and a teacher, for `rlsys extract` with rule divergence."""
    from rlsys.commands import extract as extract_command
    from rlsys.commands import score as score_command
    from rlsys.directory import SearchDirectory

    source = extract_command.find_source(Path(run_dir), overrides or [])
    print(score_command.run(source, teacher, SearchDirectory(Path(run_dir)).scores))


@command()
def search(config: ConfigPath, overrides: Overrides = None) -> None:
    """Search a tree of thought nodes for every prompt, or continue a search. See also `rlsys extract`."""
    from rlsys.config.files import load_config

    resolved = load_config(config, overrides or [])
    from rlsys.commands import search as search_command

    print(search_command.run(resolved))


@command()
def teach(
    config: ConfigPath,
    output: Annotated[
        str, typer.Argument(metavar="FILE", help="Parquet file to write, for sft.path of a training run.")
    ],
    overrides: Overrides = None,
    overwrite: Overwrite = False,
) -> None:
    """Write the rows of sft.path with the scores of teacher.model, for objective.distill without a teacher's engine."""
    from rlsys.config.files import load_config

    resolved = load_config(config, overrides or [])
    from rlsys.commands import teach as teach_command

    print(teach_command.run(resolved, Path(output), overwrite=overwrite))


@command()
def show(
    run_dir: Annotated[str, typer.Argument(metavar="RUN", help="Run directory with rollouts or trees.")],
    prompt: Annotated[
        str, typer.Argument(metavar="PROMPT", help="Id of a prompt: show its tree, or without trees its rollouts.")
    ] = "",
    step: Annotated[int | None, typer.Option(help="Rollouts of this online step. Default: the last one.")] = None,
    pick: Annotated[
        str | None,
        typer.Option(
            help="Show the `best`, `worst` or `random` rollouts of the step, or the newest `wrong` ones of all steps."
        ),
    ] = None,
) -> None:
    """Show some rollouts of a step and list the trees, or show the tree of a prompt."""
    from rlsys.commands import show as show_command
    from rlsys.display import standard_output

    show_command.run(Path(run_dir), prompt, standard_output(), step=step, pick=pick)


@command()
def view(
    run_dir: Annotated[str, typer.Argument(metavar="RUN", help="Run directory of `rlsys train` or `rlsys search`.")],
    other: Annotated[str | None, typer.Argument(metavar="RUN2", help="A second run, to compare with.")] = None,
    host: Annotated[str, typer.Option(help="Address to serve on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0: any free one.")] = 6007,
    export: Annotated[str | None, typer.Option(help="Write one HTML file instead, and serve nothing.")] = None,
    overwrite: Foreign = False,
) -> None:
    """Show curves, times, rollouts and trees of a run in a browser, also while it goes on."""
    from rlsys.commands import view as view_command

    runs = [Path(path) for path in (run_dir, other) if path]
    view_command.run(runs, host, port, Path(export) if export else None, overwrite=overwrite)


@command()
def status(
    run_dir: Annotated[str, typer.Argument(metavar="RUN", help="Run directory of `rlsys train`.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show the state of a run from its files: progress, rates, who waits for whom, failures, checkpoint."""
    from rlsys.commands import status as status_command
    from rlsys.display import standard_output

    status_command.run(Path(run_dir), standard_output(), as_json=as_json)


@command()
def doctor(
    run_dir: Annotated[str, typer.Argument(metavar="FOLDER", help="Folder in which a run would write.")] = "runs",
    self_test: Annotated[bool, typer.Option(help="Also let a tiny engine and learner work.")] = True,
) -> None:
    """Check this machine: versions, devices, memory, disk, ports, and a short self-test. Exit code 1 on a failure."""
    from rlsys.commands import doctor as doctor_command
    from rlsys.display import standard_output

    if not doctor_command.run(Path(run_dir), standard_output(), self_test=self_test):
        raise typer.Exit(1)


@command()
def keys(
    sections: Annotated[
        list[str] | None, typer.Argument(metavar="SECTION", help="Show only these sections or keys, e.g. train.")
    ] = None,
) -> None:
    """Show every key of a config file with its type, default and meaning."""
    from rlsys.commands import keys as keys_command

    keys_command.run(sections or [])


if __name__ == "__main__":
    main()
