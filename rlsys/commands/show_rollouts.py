"""`rlsys show`: the kept rollouts of a step as a person reads them."""

from __future__ import annotations

import random
from collections.abc import Container, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from rlsys.config.files import load_config
from rlsys.directory import RunDirectory
from rlsys.display import print_lines
from rlsys.errors import ConfigError, DamagedFileError, RlsysError
from rlsys.run.journal import read_heartbeat
from rlsys.run.judgements import by_reward, heading
from rlsys.run.metrics import read_rows
from rlsys.run.rollout_files import cut_off_faults, read_rollouts, rollout_files
from rlsys.run.rollouts import COMPLETIONS, training_facts

SHOWN = 4
SHOWN_WRONG = 10
PICKS = ("best", "worst", "random", "wrong")
Rows = Sequence[Mapping[str, Any]]


def has_rollouts(run_dir: Path) -> bool:
    """Return whether a run has kept rollouts."""
    return bool(rollout_files(RunDirectory(run_dir).rollouts))


def find_rows(run_dir: Path, step: int | None, prompt_id: str = "") -> Rows:
    """Return the rows of an online step, or of a prompt in it; by default of the last such step.

    Raises:
        ConfigError: no rollouts of this step or prompt are kept.
        DamagedFileError: a file cannot be read.
    """
    steps: set[int] = set()
    for first, _ in reversed(rollout_files(RunDirectory(run_dir).rollouts)):
        for _, rows in sorted(read_rollouts(run_dir, first).items(), reverse=True):
            chosen = [row for row in rows if prompt_id in ("", row["prompt_id"])]
            if chosen and step in (None, rows[0]["step"]):
                return chosen
            steps.add(rows[0]["step"])
    if steps and prompt_id:
        where = f" in step {step}" if step is not None else ""
        raise ConfigError(f"{run_dir}: it has no tree and no kept rollouts of prompt {prompt_id!r}{where}")
    if not steps and (faults := cut_off_faults(run_dir)):
        raise DamagedFileError(faults[0])
    if not steps:
        rule = f"a run keeps those of run.kept_prompts prompts of a step{early_end(run_dir)}"
        raise ConfigError(f"{run_dir}: it has no rollouts; {rule}")
    near = min(steps, key=lambda kept: abs(kept - (step or 0)))
    raise ConfigError(f"--step: no rollouts of step {step} are kept; the nearest step with some is {near}")


def early_end(run_dir: Path) -> str:
    """Return the end of a message that a run has nothing to show, if its last command ended early."""
    try:
        beat = read_heartbeat(run_dir)
    except DamagedFileError:
        return ""
    is_early = beat is not None and beat.end.startswith(("failed", "interrupted"))
    return f"; it ended early: `rlsys status {run_dir}` has the reason" if is_early else ""


def show_rollouts(rows: Rows, pick: str | None, console: Console) -> None:
    """Print some completions of a step; see `choose`."""
    shown = choose(rows, pick)
    step, version = rows[0]["step"], rows[0]["version"]
    lines = [f"rollouts of step {step} (weight version {version}): {len(shown)} of the {len(rows)} kept completions"]
    print_lines(console, [line for text in [*lines, *_texts(shown)] for line in text.split("\n")])


def _texts(rows: Rows, *, steps: bool = False) -> list[str]:
    """Return completions with their prompts and judgements as texts, and the step of each prompt if asked for."""
    lines: list[str] = []
    group = None
    for row in rows:
        if (row["step"], row["prompt_id"]) != group:
            group = (row["step"], row["prompt_id"])
            title = f"== {row['prompt_id']}, reference {row['reference'] or 'none'}"
            lines += ["", f"{title}, step {row['step']}" if steps else title, row["prompt"].strip()]
        lines += ["", f"-- {', '.join([heading(row), *training_facts(row)])}", row["completion"].strip()]
        lines += [f"   {name}: {value:g}" for name, value in row["parts"].items()]
        lines += [f"   verifier: {row['detail']}"] if row["detail"] else []
    return lines


def show_wrong(run_dir: Path, step: int | None, prompt_id: str, console: Console) -> None:
    """Print the newest kept completions that are not right, of all online steps or of one.

    Raises:
        ConfigError, DamagedFileError: as for `find_rows`.
    """
    find_rows(run_dir, step, prompt_id)  # the same words if there is nothing to show
    shown: list[Mapping[str, Any]] = []
    total = wrong = 0
    steps: set[int] = set()
    for first, _ in reversed(rollout_files(RunDirectory(run_dir).rollouts)):
        for _, rows in sorted(read_rollouts(run_dir, first).items(), reverse=True):
            if step not in (None, rows[0]["step"]):
                continue
            chosen = [row for row in rows if prompt_id in ("", row["prompt_id"])]
            faulty = [row for row in chosen if not row["correct"]]
            steps.add(rows[0]["step"])
            total, wrong = total + len(chosen), wrong + len(faulty)
            shown += faulty[: SHOWN_WRONG - len(shown)]
    more = f", the newest {len(shown)}" if wrong > len(shown) else ""
    where = "" if step is None else f" of step {step}"
    lines = [f"rollouts{where} that are not right: {wrong} of the {total} kept completions{more}"]
    lines += [] if prompt_id else _not_kept(RunDirectory(run_dir), steps, total)
    print_lines(console, [line for text in [*lines, *_texts(shown, steps=True)] for line in text.split("\n")])


def _not_kept(directory: RunDirectory, steps: Container[int], kept: int) -> list[str]:
    """Return a line about the completions of steps that are not kept, if there can be any.

    Args:
        steps: the online steps with kept completions.
        kept: the number of these.
    """
    rule = f"a run keeps up to {COMPLETIONS} completions of each of run.kept_prompts prompts of a step"
    try:
        config = load_config(directory.config)
        rows = [row for row in read_rows(directory.metrics) if row["stage"] == "online" and row["step"] in steps]
    except RlsysError:  # a config of another version, or files that other commands read
        return [f"({rule}, not the others)"]
    groups, size = config.train.groups_per_step, config.train.group_size
    wrong = [round((1 - row["rollout/accuracy"]) * groups * size) for row in rows if "rollout/accuracy" in row]
    if kept >= groups * size * len(rows) > 0:
        return []
    # Searched groups are not in the accuracy, and an earlier command may have had steps of another size.
    is_known = (
        len(wrong) == len(rows) > 0 and not config.search.online and not any(directory.path.glob("config.until_*"))
    )
    counts = f"; {sum(wrong)} of all {groups * size * len(rows)} of these steps were not right (rollout/accuracy)"
    rule = rule.replace("run.kept_prompts", f"run.kept_prompts = {config.run.kept_prompts} of the {groups}")
    return [f"({rule}{counts if is_known else ', not the others'})"]


def choose(rows: Rows, pick: str | None) -> list[Mapping[str, Any]]:
    """Return the rows to print; those of a prompt follow one another unless they are ordered by reward."""
    if pick in ("best", "worst"):
        return by_reward(rows, "best" if pick == "best" else "worst", lambda row: row["reward"])[:SHOWN]
    if pick == "random":
        chosen = random.sample(range(len(rows)), min(SHOWN, len(rows)))
        return [rows[number] for number in sorted(chosen)]
    return list(rows[:SHOWN])
