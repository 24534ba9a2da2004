"""Progress of a run: a live panel on a terminal, plain lines elsewhere.

The display only shows. A terminal that goes away or a closed pipe silences it and never ends the run.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import ClassVar, Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

# Metric, label, format: what is worth a look while a run goes on. The rest is in TensorBoard.
FIGURES = (
    ("rollout/reward", "reward", "{:.3f}"),
    ("search/reward", "search reward", "{:.3f}"),
    ("search/solved", "solved trees", "{:.3f}"),
    ("objective/sft_loss", "sft loss", "{:.3f}"),
    ("objective/preference_loss", "preference loss", "{:.3f}"),
    ("held_out/greedy_accuracy", "held-out greedy", "{:.3f}"),
    ("held_out/sampled_accuracy", "held-out sampled", "{:.3f}"),
    ("rollout/tokens_per_s", "actor tokens/s", "{:,.0f}"),
    ("learner/tokens_per_s", "learner tokens/s", "{:,.0f}"),
    ("rollout/staleness_mean", "staleness", "{:.2f}"),
    ("weights/probe_gap_max", "publish gap", "{:.1e}"),
    ("time/step_s", "step", "{:.2f} s"),
)
_MESSAGES = 5
_STEPS_IN_MEDIAN = 21
_FIGURE_WIDTH = 29  # columns of the terminal for a label and its number


class Display:
    """Shows stage, step, time left, the latest figures and the last messages.

    Args:
        console: where to show; by default standard output. A live panel only where it is a capable terminal.
        totals: training steps of every stage, in order, for the heading.
        interval_s: shortest time between two lines of steps where there is no terminal; messages always show.
        clock: monotonic seconds.
    """

    figures: ClassVar[tuple[tuple[str, str, str], ...]] = FIGURES

    def __init__(
        self,
        console: Console | None = None,
        totals: Mapping[str, int] | None = None,
        *,
        interval_s: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        # A colour setting in the environment makes rich take a log file for a terminal; the file knows.
        self._console = console or Console(force_terminal=None if sys.stdout.isatty() else False)
        self._totals = dict(totals or {})
        self._interval_s = interval_s
        self._clock = clock
        self._stage, self._total, self._done = "", 0, 0
        self._figures: dict[str, float] = {}
        self._messages: deque[str] = deque(maxlen=_MESSAGES)
        self._step_times: deque[float] = deque(maxlen=_STEPS_IN_MEDIAN)
        self._started = self._last_step = clock()
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
        """A stage begins (or goes on, on resume) with `done` of its `total` steps finished."""
        self._stage, self._total, self._done = name, total, done
        self._step_times.clear()
        self._last_step = self._clock()
        self._line(f"stage {name}: step {done} of {total}")

    def step(self, metrics: Mapping[str, float]) -> None:
        """A training step is finished. metrics: names of the registry; what is not given stays as it was."""
        now = self._clock()
        self._step_times.append(now - self._last_step)
        self._last_step = now
        self._done += 1
        self._figures.update(metrics)
        if now - self._last_line >= self._interval_s or self._done == self._total:
            self._last_line = now
            left = f"  left {_duration(self.seconds_left)}" if self._done < self._total else ""
            shown = "".join(f"  {label} {value}" for label, value in self._shown(metrics))
            self._line(f"{self._stage} {self._done}/{self._total}{shown}{left}")

    def update(self, metrics: Mapping[str, float]) -> None:
        """New figures without a new step."""
        self._figures.update(metrics)

    def evaluation(self, metrics: Mapping[str, float]) -> None:
        """Held-out figures were measured outside a step."""
        self._figures.update(metrics)
        self._line("evaluation" + "".join(f"  {label} {value}" for label, value in self._shown(metrics)))

    def message(self, text: str) -> None:
        """An event worth a line: a resume, a checkpoint, a warning."""
        self._messages.append(text)
        self._line(text)

    def close(self) -> None:
        """Leave the last panel on the screen. More than one call is fine."""
        if self._live and self._live.is_started:
            self._show(self._live.stop)

    @property
    def seconds_left(self) -> float | None:
        """Running median of the step times, times the stage's steps left; None before its first step."""
        if not self._step_times:
            return None
        return statistics.median(self._step_times) * (self._total - self._done)

    def _shown(self, metrics: Mapping[str, float]) -> list[tuple[str, str]]:
        return [(label, form.format(metrics[name])) for name, label, form in self.figures if name in metrics]

    def _line(self, text: str) -> None:
        """Without a terminal: one line. rich would fold it at 80 columns."""
        if not self._live:
            self._show(lambda: print(text, file=self._console.file, flush=True))

    def _show(self, action: Callable[[], object]) -> None:
        if self._silent:
            return
        try:
            action()
        except (OSError, ValueError, SystemExit):  # gone terminal, closed file; rich exits on a broken pipe
            self._silent = True

    def _panel(self) -> RenderableType:
        """Everything in one renderable; called by the refresh thread too, so it only reads."""
        heading = Text(overflow="ellipsis", no_wrap=True)
        for name, total in self._totals.items():
            heading.append(f" {name} {total} ", style="reverse" if name == self._stage else "dim")
        progress = Table.grid(padding=(0, 1), expand=True)
        progress.add_column(no_wrap=True)
        progress.add_column(ratio=1)
        progress.add_column(no_wrap=True)
        progress.add_row(
            f"{self._stage} {self._done}/{self._total}",
            ProgressBar(max(self._total, 1), self._done, complete_style="green", finished_style="green"),
            f"left {_duration(self.seconds_left)}, elapsed {_duration(self._clock() - self._started)}",
        )
        messages = [Text(line, style="dim", no_wrap=True, overflow="ellipsis") for line in list(self._messages)]
        parts: list[RenderableType] = [heading] if self._totals else []
        parts += [progress, self._figure_table(), *messages]
        return Panel(Group(*parts), title="rlsys", title_align="left")

    def _figure_table(self) -> Table:
        """Up to three figures a row. Every figure has its place from the start: the panel does not jump."""
        columns = max(1, min(3, self._console.width // _FIGURE_WIDTH))
        table = Table.grid(padding=(0, 2), expand=True)
        for _ in range(columns):
            table.add_column(style="dim", no_wrap=True)
            table.add_column(justify="right", no_wrap=True, ratio=1)
        known = dict(self._shown(dict(self._figures)))
        cells = [cell for _, label, _ in self.figures for cell in (label, known.get(label, "-"))]
        for start in range(0, len(cells), 2 * columns):
            table.add_row(*cells[start : start + 2 * columns])
        return table


def _duration(seconds: float | None) -> str:
    """h:mm:ss or m:ss; a dash where unknown."""
    if seconds is None:
        return "-"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
