"""`rlsys status`: the state of a run as a person reads it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from rlsys.display import duration_in_words, printable
from rlsys.run.held_out import figures_text
from rlsys.run.status import SILENT_S, RunStatus, read_status
from rlsys.run.step_times import PARTS
from rlsys.run.throughput import Split, Throughput

STYLES = {"running": "green", "finished": "green", "interrupted": "yellow", "failed": "red", "crashed": "red"}
_GIB, _MIB = 2**30, 2**20


def run(run_dir: Path, console: Console, *, as_json: bool) -> None:
    """Print the state of a run, as a table or as JSON."""
    status = read_status(run_dir)
    if as_json:
        print(json.dumps(asdict(status), indent=1), file=console.file)
        return
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for label, text in _lines(status):
        style = STYLES.get(status.state, "") if label == "state" else ""
        table.add_row(label, Text(printable(text), style=style))
    console.print(table)


def _lines(status: RunStatus) -> Iterator[tuple[str, str]]:
    yield "run", status.run_dir
    yield "state", f"{status.state}: {status.reason}"
    others = ", ".join(
        f"{name} {done}/{total}" for name, (done, total) in status.stages.items() if name != status.stage
    )
    yield "progress", f"{status.stage}: step {status.step} of {status.steps}{f' ({others})' if others else ''}"
    left = (
        f", about {duration_in_words(status.left_s)} left in this stage"
        if status.left_s and status.state == "running"
        else ""
    )
    yield "weight version", f"{status.weight_version}{left}"
    yield from _signs_of_life(status)
    if status.held_out:
        yield "held-out", figures_text(status.held_out)
    if status.throughput:
        yield from _throughput_lines(status.throughput)
    counts = [f"{name.replace('_', ' ')}: {value:,}" for name, value in status.counts.items() if value]
    ended = "none in the recorded steps; state says what ended the run" if status.state == "failed" else "none"
    yield "failures", ", ".join(counts) or ended
    if status.prompts:
        yield "prompts", ", ".join(f"{value:,} {name}" for name, value in status.prompts.items())
    for name, tracker in status.trackers.items():
        yield f"tracker {name}", f"has weight version {tracker['version']}, refused rows: {tracker['failures']}"
    yield "checkpoint", _checkpoint(status)
    yield "disk", f"{_size(status.disk_bytes)} used, {_size(status.free_bytes)} free"
    yield from _last_words(status)


def _signs_of_life(status: RunStatus) -> Iterator[tuple[str, str]]:
    if status.record_age_s is not None:
        yield "last step", f"{duration_in_words(status.record_age_s)} ago"
    beat = status.heartbeat
    if beat is None or status.heartbeat_age_s is None or status.state not in ("running", "unknown", "crashed"):
        return
    late = (
        "; the driver hangs or its disk is slow"
        if status.state == "running" and status.heartbeat_age_s > SILENT_S
        else ""
    )
    yield "heartbeat", f"{duration_in_words(status.heartbeat_age_s)} ago{late}"
    for actor in beat.actors:
        silent = f", {actor['silent_s']:.0f} s without progress" if actor["silent_s"] > 1 else ""
        yield actor["name"], f"{actor['state']}, {_counted(actor['calls'], 'call')} under way{silent}"
    if beat.actors:
        call = f"{beat.learner['call']} for {beat.learner['seconds']:.0f} s" if beat.learner else "no call under way"
        yield "learner", call


def _throughput_lines(measured: Throughput) -> Iterator[tuple[str, str]]:
    rates = [f"{60 / measured.step_s:.1f} steps/min"]
    if measured.generated_tokens_per_s is not None:
        rates.append(f"{measured.generated_tokens_per_s:,.0f} generated tokens/s")
    rates.append(f"{measured.trained_tokens_per_s:,.0f} trained tokens/s")
    yield "rates", f"{', '.join(rates)} (last {measured.steps} steps)"
    shares = [f"{PARTS[name][1]} {share:.0%}" for name, share in measured.shares.items() if share >= 0.005]
    yield "time of a step", f"{measured.step_s:.2f} s: {', '.join(shares)}"
    yield "bottleneck", measured.bottleneck
    present, best = measured.present, measured.best
    if present and best:
        now = _split(present)
        if present == best:
            yield "balance", f"no other split of these processes would be faster than {now}"
        else:
            change = f"{_split(best)}: {best.step_s:.2f} s a step"
            yield "balance", f"{change} in place of {present.step_s:.2f} s with {now}"
        yield "", "(estimated: engine time and learning time of a step, divided evenly over the processes)"


def _split(split: Split) -> str:
    return f"{_counted(split.actors, 'actor')} and {_counted(split.ranks, 'rank')}"


def _counted(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def _checkpoint(status: RunStatus) -> str:
    if status.checkpoint is None:
        return "none yet"
    age = duration_in_words(status.checkpoint.age_s)
    behind = status.weight_version - status.checkpoint.weight_version
    steps = f", {_counted(behind, 'step')} behind" if behind > 0 else ""
    return f"weight version {status.checkpoint.weight_version}, {age} ago{steps}"


def _last_words(status: RunStatus) -> Iterator[tuple[str, str]]:
    for number, message in enumerate(status.messages):
        yield "" if number else "messages", message
    for fault in status.faults:
        yield "damaged", fault
    if status.last_error and status.state != "finished":
        name = Path(status.last_error.file).name
        yield "last error", f"logs/{name}, {duration_in_words(status.last_error.age_s)} ago: {status.last_error.line}"


def _size(count: int) -> str:
    return f"{count / _GIB:.1f} GiB" if count >= _GIB else f"{count / _MIB:.1f} MiB"
