"""Output of the commands: the progress of a run, and tables.

A run's progress is a live panel on a terminal, and plain lines elsewhere. A terminal that goes away or a closed pipe
silences the display and never ends the run.
"""

from __future__ import annotations

import os
import re
import statistics
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
"""Control characters except tab and line feed."""
Figures = Sequence[tuple[str, str, str]]  # metric, label, format

# The metrics worth watching during a run. TensorBoard has the others.
FIGURES: Figures = (
    ("rollout/reward", "reward", "{:.3f}"),
    ("search/reward", "search reward", "{:.3f}"),
    ("search/solved", "solved trees", "{:.3f}"),
    ("objective/sft_loss", "sft loss", "{:.3f}"),
    ("objective/preference_loss", "preference loss", "{:.3f}"),
    ("rollout/no_answer_rate", "no answer", "{:.3f}"),
    ("rollout/truncated_rate", "cut off", "{:.3f}"),
    ("rollout/zero_advantage_groups", "equal groups", "{:.3f}"),
    ("held_out/greedy_accuracy", "held-out greedy", "{:.3f}"),
    ("held_out/sampled_accuracy", "held-out sampled", "{:.3f}"),
    ("rollout/tokens_per_s", "actor tokens/s", "{:,.0f}"),
    ("search/tokens_per_s", "search tokens/s", "{:,.0f}"),
    ("learner/tokens_per_s", "learner tokens/s", "{:,.0f}"),
    ("rollout/staleness_mean", "staleness", "{:.2f}"),
    ("weights/probe_gap_max", "publish gap", "{:.1e}"),
    ("time/step_s", "step", "{:.2f} s"),
)
# The same for `rlsys search`.
SEARCH_FIGURES: Figures = (
    ("search/solved", "solved", "{:.3f}"),
    ("search/tokens_per_s", "tokens/s", "{:,.0f}"),
    ("search/prefix_hits", "prefix-cache hits", "{:.3f}"),
    ("search/failed", "failed trees", "{:.0f}"),
)
_MESSAGES = 5
STEPS_IN_MEDIAN = 21  # last steps whose times tell how long the next ones take
_FIGURE_WIDTH = 29  # columns of the terminal for a label and its number
_TABLE_WIDTH = 100  # a narrower terminal gets plain lines


class Display:
    """Show the stage, its progress in steps or trees, the time left, the latest figures and the last messages.

    Args:
        console: where to show; standard output by default. The live panel needs a capable terminal.
        totals: number of steps or trees of every stage, in order, for the heading.
        figures: the metrics to show.
        interval_s: shortest time between two plain lines of progress, seconds; messages always show.
        clock: monotonic seconds.
        log: also gets every message.
    """

    def __init__(
        self,
        console: Console | None = None,
        totals: Mapping[str, int] | None = None,
        *,
        figures: Figures = FIGURES,
        interval_s: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
        log: Callable[[str], None] = lambda _text: None,
    ) -> None:
        self._console = console or standard_output()
        self._totals = dict(totals or {})
        self._shown_figures = figures
        self._interval_s = interval_s
        self._clock, self._log = clock, log
        self._stage, self._unit, self._total, self._done = "", "", 0, 0
        self._done_before = 0  # steps or trees that an earlier command has finished
        self._waiting = ""
        self._figures: dict[str, float] = {}
        self._rates: dict[str, float] = {}  # updates of a stage that counts trees
        self._messages: deque[str] = deque(maxlen=_MESSAGES)
        self._step_times: deque[float] = deque(maxlen=STEPS_IN_MEDIAN)
        self._started = self._stage_started = self._last_step = clock()
        self._last_line = -interval_s
        self._silent = False
        self._live: Live | None = None
        if self._console.is_terminal and not self._console.is_dumb_terminal:
            self._live = Live(console=self._console, get_renderable=self._panel, refresh_per_second=2)

    def __enter__(self) -> Self:
        if self._live:
            self._show(self._live.start)
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def stage(self, name: str, total: int, done: int) -> None:
        """Begin or resume a stage of training, with `done` of its `total` steps finished."""
        self._begin(name, name, total, done)
        self._line(f"stage {name}: step {done} of {total}")

    def trees(self, total: int, done: int) -> None:
        """Begin or resume a search, with `done` of its `total` trees finished."""
        self._begin("search", "trees", total, done)
        self._line(f"trees: {done} of {total} are finished")

    def step(self, metrics: Mapping[str, float]) -> None:
        """Count a finished training step or tree.

        Args:
            metrics: names of the registry; a metric that is not given keeps its last value.
        """
        now, self._waiting = self._clock(), ""
        self._step_times.append(now - self._last_step)
        self._last_step = now
        self._done += 1
        self._figures.update(metrics)
        if now - self._last_line >= self._interval_s or self._done == self._total:
            self._last_line = now
            left = f"  left {duration(self.seconds_left)}" if self._done < self._total else ""
            self._line(f"{self._unit} {self._done}/{self._total}{self._labelled({**self._rates, **metrics})}{left}")

    def update(self, metrics: Mapping[str, float]) -> None:
        """Show new figures without a new step."""
        self._figures.update(metrics)
        if self._unit == "trees":
            self._rates.update(metrics)

    def evaluation(self, metrics: Mapping[str, float]) -> None:
        """Show held-out figures that were measured outside a step."""
        self._figures.update(metrics)
        self._line(f"evaluation{self._labelled(metrics)}")

    def waiting(self, text: str) -> None:
        """Show what the run waits for until the next step, such as the engines at its start."""
        self._waiting = text
        self._line(f"waiting for {text}")

    def message(self, text: str) -> None:
        """Show an event, such as a resume, a checkpoint or a warning."""
        self._log(text)
        self._messages.append(text)
        self._line(text)

    def close(self) -> None:
        """Leave the last panel on the screen. Further calls do nothing."""
        if self._live and self._live.is_started:
            self._show(self._live.stop)

    @property
    def seconds_left(self) -> float | None:
        """Estimated seconds until the end of the stage; None before its first step.

        Steps use the median of the last step times. Trees end in bursts, so they use the mean.
        """
        if not self._step_times:
            return None
        if self._unit == "trees":
            per_step = (self._clock() - self._stage_started) / (self._done - self._done_before)
        else:
            per_step = statistics.median(self._step_times)
        return per_step * (self._total - self._done)

    def _begin(self, stage: str, unit: str, total: int, done: int) -> None:
        self._stage, self._unit, self._total, self._done, self._done_before = stage, unit, total, done, done
        self._step_times.clear()
        self._rates.clear()
        self._stage_started = self._last_step = self._clock()

    def _labelled(self, metrics: Mapping[str, float]) -> str:
        return "".join(f"  {label} {value}" for label, value in self._formatted(metrics))

    def _formatted(self, metrics: Mapping[str, float]) -> list[tuple[str, str]]:
        return [(label, form.format(metrics[name])) for name, label, form in self._shown_figures if name in metrics]

    def _line(self, text: str) -> None:
        """Print a line, unless there is a panel. rich would wrap it at 80 columns."""
        if not self._live:
            self._show(lambda: print(text, file=self._console.file, flush=True))

    def _show(self, action: Callable[[], object]) -> None:
        if self._silent:
            return
        try:
            action()
        except (OSError, ValueError, SystemExit):  # a lost terminal, a closed file; rich exits on a broken pipe
            self._silent = True

    def _panel(self) -> RenderableType:
        """Render everything. The refresh thread calls this too, so it only reads."""
        heading = Text(overflow="ellipsis", no_wrap=True)
        for name, total in self._totals.items():
            heading.append(f" {name} {total} ", style="reverse" if name == self._stage else "dim")
        progress = Table.grid(padding=(0, 1), expand=True)
        progress.add_column(no_wrap=True)
        progress.add_column(ratio=1)
        progress.add_column(no_wrap=True)
        progress.add_row(
            f"{self._unit} {self._done}/{self._total}",
            ProgressBar(max(self._total, 1), self._done, complete_style="green", finished_style="green"),
            f"left {duration(self.seconds_left)}, elapsed {duration(self._clock() - self._started)}",
        )
        messages = [Text(line, style="dim", no_wrap=True, overflow="ellipsis") for line in list(self._messages)]
        parts: list[RenderableType] = [heading] if self._totals else []
        waiting = [Text(f"waiting for {self._waiting}", style="yellow")] if self._waiting else []
        parts += [progress, *waiting, self._figure_table(), *messages]
        return Panel(Group(*parts), title="rlsys", title_align="left")

    def _figure_table(self) -> Table:
        """Place up to three figures in a row, each at a fixed place, so that the panel does not jump."""
        columns = max(1, min(3, self._console.width // _FIGURE_WIDTH))
        table = Table.grid(padding=(0, 2), expand=True)
        for _ in range(columns):
            table.add_column(style="dim", no_wrap=True)
            table.add_column(justify="right", no_wrap=True, ratio=1)
        known = dict(self._formatted(dict(self._figures)))
        cells = [cell for _, label, _ in self._shown_figures for cell in (label, known.get(label, "-"))]
        for start in range(0, len(cells), 2 * columns):
            table.add_row(*cells[start : start + 2 * columns])
        return table


def duration(seconds: float | None) -> str:
    """Format seconds as h:mm:ss or m:ss, and None as a dash."""
    if seconds is None:
        return "-"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def duration_in_words(seconds: float) -> str:
    """Format seconds as 45 s, 12 min 29 s, 3 h 5 min, or 2 d 4 h."""
    rest = max(0, round(seconds))
    parts: list[str] = []
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60), ("s", 1)):
        count, rest = divmod(rest, size)
        if count or parts:
            parts.append(f"{count} {unit}" if count else "")
    return " ".join(filter(None, parts[:2])) or "0 s"


def standard_output() -> Console:
    """Return a console on standard output. It is a terminal only if standard output is one.

    A colour setting in the environment makes rich take a log file for a terminal.
    """
    return Console(force_terminal=None if sys.stdout.isatty() else False)


def printable(text: str) -> str:
    """Return a text whose control characters are spelled out, as a model may write ones that move the cursor."""
    return CONTROL.sub(lambda match: f"\\x{ord(match[0]):02x}", text)


def print_lines(console: Console, lines: Iterable[str]) -> None:
    """Print lines without wrapping. A reader that has gone, such as `head`, is not an error."""
    try:
        for line in lines:
            print(printable(line), file=console.file)
        console.file.flush()
    except BrokenPipeError:
        # Python flushes the file again at exit, which would fail.
        os.dup2(os.open(os.devnull, os.O_WRONLY), console.file.fileno())


def print_table(
    console: Console, columns: Sequence[str], rows: Sequence[Sequence[str]], *, title: str = "", below: bool = False
) -> None:
    """Print a table in a box on a terminal of at least 100 columns, and as plain lines elsewhere.

    Args:
        columns: the headings.
        rows: the cells, one for each column.
        below: put the last cell of each plain line on an indented line below it, and leave the headings out.
    """
    if not console.is_terminal or console.width < _TABLE_WIDTH:
        print_lines(console, _plain_lines(columns, rows, title, below))
        return
    table = Table(title=escape(title) or None)
    for number, column in enumerate(columns):
        table.add_column(column, overflow="fold", no_wrap=not number)
    for row in rows:
        table.add_row(*map(escape, row))
    console.print(table)


def _plain_lines(columns: Sequence[str], rows: Sequence[Sequence[str]], title: str, below: bool) -> list[str]:
    lines = [title] if title else []
    if below:
        for row in rows:
            lines += ["  ".join(row[:-1]), f"    {row[-1]}"]
        return lines
    cells = [columns, *rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    aligned = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in cells)
    return lines + [line.rstrip() for line in aligned]
