"""The display shows the right numbers, on a terminal and elsewhere, and never ends a run."""

from __future__ import annotations

import io
import sys

import pytest
from rich.console import Console

from rlsys.display import FIGURES, SEARCH_FIGURES, Display, duration_in_words, print_table
from rlsys.run.metrics import METRICS

STEP = {
    "rollout/reward": 0.5123,
    "rollout/tokens_per_s": 12345.6,
    "rollout/staleness_mean": 0.5,
    "weights/probe_gap_max": 2.3e-6,
    "learner/loss": 0.1,
}


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def plain(clock: Clock, interval_s: float = 10.0) -> tuple[Display, io.StringIO]:
    output = io.StringIO()
    return Display(Console(file=output, force_terminal=False), interval_s=interval_s, clock=clock), output


def terminal(clock: Clock, width: int = 100) -> tuple[Display, Console, io.StringIO]:
    output = io.StringIO()
    console = Console(file=output, force_terminal=True, width=width, height=40, color_system=None)
    return Display(console, {"warm_start": 300, "online": 80}, clock=clock), console, output


def steps(display: Display, clock: Clock, times: list[float]) -> None:
    for seconds in times:
        clock.now += seconds
        display.step(STEP)


def test_figures_are_in_the_registry() -> None:
    of_searches = {name for name, _, _ in SEARCH_FIGURES}  # rates while trees grow, which no row of metrics has
    assert {name for name, _, _ in FIGURES} <= set(METRICS) | of_searches


def test_plain_lines() -> None:
    clock = Clock()
    display, output = plain(clock)
    with display:
        display.stage("online", 4, 1)
        steps(display, clock, [3.0])  # 2 steps of 3 s are left
        display.message("checkpoint [step-2] written")
        display.evaluation({"held_out/greedy_accuracy": 0.84})
        steps(display, clock, [3.0])  # 3 s after the last line, below the interval: no line
        steps(display, clock, [3.0])  # the last step always has one
    assert output.getvalue().splitlines() == [
        "stage online: step 1 of 4",
        "online 2/4  reward 0.512  actor tokens/s 12,346  staleness 0.50  publish gap 2.3e-06  left 0:06",
        "checkpoint [step-2] written",
        "evaluation  held-out greedy 0.840",
        "online 4/4  reward 0.512  actor tokens/s 12,346  staleness 0.50  publish gap 2.3e-06",
    ]


def test_a_step_of_searched_prompts_shows_its_reward() -> None:
    clock = Clock()
    display, output = plain(clock)
    display.stage("online", 2, 1)
    display.step({"search/trees": 2.0, "search/reward": 0.4, "rollout/staleness_mean": 0.0})
    assert output.getvalue().splitlines()[1] == "online 2/2  search reward 0.400  staleness 0.00"


def test_plain_steps_at_most_every_interval() -> None:
    clock = Clock()
    display, output = plain(clock, interval_s=10.0)
    display.stage("online", 100, 0)
    steps(display, clock, [4.0] * 9)  # at 4, 8, ..., 36 s: shown at 4, 16 (12 later), 28
    shown = [line.split()[1] for line in output.getvalue().splitlines()[1:]]
    assert shown == ["1/100", "4/100", "7/100"]


def test_time_left_is_the_median_times_the_steps_left() -> None:
    clock = Clock()
    display, _ = plain(clock)
    display.stage("online", 10, 4)
    assert display.seconds_left is None
    steps(display, clock, [2.0, 60.0, 3.0])  # median 3, 10 - 7 = 3 steps left; the mean would say 65
    assert display.seconds_left == 9.0
    display.stage("other", 5, 0)
    assert display.seconds_left is None


def test_terminal_panel() -> None:
    clock = Clock()
    display, _, output = terminal(clock)
    with display:
        display.stage("online", 80, 20)
        steps(display, clock, [2.5, 2.5, 2.5])  # 57 steps left * 2.5 s = 142.5 s, shown as 2:22
        display.evaluation({"held_out/greedy_accuracy": 0.84, "held_out/sampled_accuracy": float("nan")})
        display.message("checkpoint [step-23] written")
    last = output.getvalue().rpartition("rlsys")[2]
    for text in (
        "warm_start 300",
        "online 23/80",
        "left 2:22, elapsed 0:08",
        "0.512",
        "0.840",
        "nan",
        "12,346",
        "0.50",
        "2.3e-06",
        "checkpoint [step-23] written",
    ):
        assert text in last
    assert "stage online" not in output.getvalue(), "no plain lines on a terminal"


def test_a_wait_is_shown_until_the_next_step() -> None:
    clock = Clock()
    display, console, output = terminal(clock)
    display.stage("online", 80, 0)
    display.waiting("the first rollouts")
    console.print(display._panel())
    assert "waiting for the first rollouts" in output.getvalue()
    steps(display, clock, [2.0])
    console.print(display._panel())
    assert output.getvalue().count("waiting for") == 1
    plain_display, lines = plain(clock)
    plain_display.waiting("the engines")
    assert lines.getvalue() == "waiting for the engines\n"


def test_panel_keeps_the_last_messages() -> None:
    display, console, output = terminal(Clock())
    for number in range(9):
        display.message(f"event {number}")
    console.print(display._panel())
    assert [f"event {number}" in output.getvalue() for number in range(9)] == [False] * 4 + [True] * 5


def test_the_height_of_the_panel_does_not_depend_on_the_figures() -> None:
    clock = Clock()
    display, console, output = terminal(clock)
    display.stage("online", 80, 0)
    console.print(display._panel())
    before = output.getvalue().count("\n")
    steps(display, clock, [1.0])
    console.print(display._panel())
    assert output.getvalue().count("\n") == 2 * before


@pytest.mark.parametrize("width", [1, 2, 5, 20, 40, 66, 300])
def test_any_width(width: int) -> None:
    clock = Clock()
    display, _, output = terminal(clock, width)
    with display:
        display.stage("a stage with a long name", 0, 0)
        display.message("long " * 200)
        steps(display, clock, [1.0])
    if width >= 40:
        assert "0.512" in output.getvalue()
        assert "2.3e-06" in output.getvalue()


def test_trees_show_the_latest_rates_and_a_mean_time_left() -> None:
    clock, output = Clock(), io.StringIO()
    display = Display(Console(file=output, force_terminal=False), figures=SEARCH_FIGURES, interval_s=0, clock=clock)
    display.trees(10, 4)
    assert display.seconds_left is None
    for seconds, solved in ((9.0, 1.0), (0.0, 0.5), (0.0, 2 / 3)):  # 3 trees in 9 s: 3 are left, at 3 s each
        clock.now += seconds
        display.step({"search/failed": 0, "search/solved": solved})
        display.update({"search/tokens_per_s": 5000.0, "search/prefix_hits": 0.25})
    assert display.seconds_left == 9.0
    assert output.getvalue().splitlines() == [
        "trees: 4 of 10 are finished",
        "trees 5/10  solved 1.000  failed trees 0  left 0:45",
        "trees 6/10  solved 0.500  tokens/s 5,000  prefix-cache hits 0.250  failed trees 0  left 0:18",
        "trees 7/10  solved 0.667  tokens/s 5,000  prefix-cache hits 0.250  failed trees 0  left 0:09",
    ]


def test_a_stage_after_a_search_shows_none_of_its_rates() -> None:
    clock = Clock()
    display, output = plain(clock, interval_s=0)
    display.trees(1, 0)
    display.update({"search/tokens_per_s": 5000.0})
    display.stage("sft", 1, 0)
    display.step({"objective/sft_loss": 2.0})
    assert output.getvalue().splitlines()[-1] == "sft 1/1  sft loss 2.000"


COLUMNS, ROWS = ("key", "default", "meaning"), [("a.b", "[x]", "Long words. " * 20), ("a.long_one", "2", "Short.")]


def table(*, terminal: bool, width: int, below: bool = False) -> list[str]:
    output = io.StringIO()
    console = Console(file=output, force_terminal=terminal, width=width, color_system=None)
    print_table(console, COLUMNS, ROWS, title="all [keys]", below=below)
    return output.getvalue().splitlines()


@pytest.mark.parametrize(("terminal", "width"), [(False, 80), (False, 200), (True, 99)])
def test_a_table_is_plain_lines_without_a_wide_terminal(terminal: bool, width: int) -> None:
    meaning = ROWS[0][2].strip()
    assert table(terminal=terminal, width=width) == [
        "all [keys]",
        "key         default  meaning",
        f"a.b         [x]      {meaning}",
        "a.long_one  2        Short.",
    ]
    below = [line.rstrip() for line in table(terminal=terminal, width=width, below=True)]
    assert below == [
        "all [keys]",
        "a.b  [x]",
        f"    {meaning}",
        "a.long_one  2",
        "    Short.",
    ]


def test_a_table_is_a_box_on_a_wide_terminal() -> None:
    shown = table(terminal=True, width=100)
    assert shown[0].strip() == "all [keys]" and shown[1].startswith("┏")
    assert max(map(len, shown)) <= 100
    assert [cell.strip() for cell in shown[-2].strip("│").split("│")] == ["a.long_one", "2", "Short."]


class Broken(io.StringIO):
    """A terminal or pipe that breaks after some writes."""

    def __init__(self, writes: int, error: Exception) -> None:
        super().__init__()
        self.left, self.error = writes, error

    def write(self, text: str) -> int:
        self.left -= 1
        if self.left < 0:
            raise self.error
        return super().write(text)


@pytest.mark.parametrize("force_terminal", [True, False])
@pytest.mark.parametrize("error", [BrokenPipeError(), OSError(5, "EIO"), ValueError("closed file")], ids=repr)
@pytest.mark.parametrize("writes", [0, 1, 2])
def test_a_broken_output_never_ends_the_run(force_terminal: bool, error: Exception, writes: int) -> None:
    clock = Clock()
    console = Console(file=Broken(writes, error), force_terminal=force_terminal)
    with Display(console, clock=clock) as display:
        display.stage("online", 3, 0)
        steps(display, clock, [1.0, 20.0, 20.0])
        display.message("done")


def test_without_a_terminal_a_colour_setting_changes_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert not sys.stdout.isatty()
    with Display() as display:
        display.message("resumed")
    assert capsys.readouterr().out == "resumed\n"


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0, "0 s"),
        (0.2, "0 s"),
        (45, "45 s"),
        (60, "1 min"),
        (749, "12 min 29 s"),
        (11100, "3 h 5 min"),
        (187200, "2 d 4 h"),
    ],
)
def test_a_duration_in_words(seconds: float, words: str) -> None:
    assert duration_in_words(seconds) == words
