"""How fast `rlsys view` shows a run with many trees and many steps, in Chromium and over HTTP.

    python benchmarks/view.py --trees runs/my_search --count 10000

Copies the trees of a search under new prompt ids until there are `count`, and writes as many rows of metrics as
`steps`. Every round serves them anew, so that the first list of trees reads all of them, and opens the pages in the
order of the table with an empty cache: from the beginning of the navigation until the page is painted. Exits with 1
if a median misses its bound. Without Chromium or the package playwright, the times over HTTP are compared with the
bounds.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[0] = str(ROOT)  # in place of this folder, where a file would hide the package `actors`
sys.path.append(str(ROOT / "tests" / "helpers"))

import psutil  # noqa: E402
from browsers import PAINTED, NoBrowserError, chromium, served  # noqa: E402

SHARD = 64
FIRST_LIST, ONE_TREE = 2.0, 0.5  # bounds in seconds


@dataclass(frozen=True, slots=True)
class Page:
    """A page, and what must be seen in it.

    Attributes:
        shown: CSS selector of what is drawn last.
        bound: longest median time in seconds; None without one.
    """

    name: str
    path: str
    shown: str
    bound: float | None = None


def copy_trees(source: Path, folder: Path, count: int) -> int:
    """Write `count` trees into shards, and return their bytes."""
    lines = [line for path in sorted(source.glob("*.jsonl")) for line in path.read_text().splitlines()]
    if not lines:
        raise SystemExit(f"--trees: {source} has no trees")
    folder.mkdir(parents=True)
    numbered = (
        line.replace(json.dumps(json.loads(line)["prompt_id"]), json.dumps(f"train-{number}"), 1) + "\n"
        for number, line in enumerate(itertools.islice(itertools.cycle(lines), count))
    )
    for shard in itertools.count():
        text = "".join(itertools.islice(numbered, SHARD))
        if not text:
            return sum(path.stat().st_size for path in folder.iterdir())
        (folder / f"{shard:05d}.jsonl").write_text(text)


def write_metrics(path: Path, steps: int) -> None:
    """Write rows with as many metrics as a run of the stage online has."""
    names = [f"{room}/metric_{number}" for room in ("rollout", "learner", "objective", "time") for number in range(15)]
    with path.open("w") as file:
        for step in range(1, steps + 1):
            row = {"stage": "online", "step": step, "weights/version": step, "time/step_s": 1.0}
            file.write(json.dumps(row | dict.fromkeys(names, step * 0.001)) + "\n")


def number_of_largest(source: Path) -> int:
    """Return the place of the largest tree of a search among its trees."""
    sizes = [len(line) for path in sorted(source.glob("*.jsonl")) for line in path.read_text().splitlines()]
    return sizes.index(max(sizes))


def pages(count: int, largest: int) -> tuple[Page, ...]:
    """Return the pages in the order in which a round opens them."""
    row, node = "tbody tr >> nth=-1", ".node >> nth=0"
    return (
        Page("first list of trees", "/trees", row, FIRST_LIST),
        Page("second list", "/trees?page=2", row),
        Page("last list", f"/trees?page={-(-count // 50)}", row),
        Page("list of a query", "/trees?q=99", row),
        Page("first tree", "/tree/0", node, ONE_TREE),
        Page("last tree", f"/tree/{count - 1}", node, ONE_TREE),
        Page("largest tree", f"/tree/{largest}", node, ONE_TREE),
        Page("curves", "/", ".chart canvas >> nth=-1"),
        Page("times", "/timeline", "svg.time"),
    )


def fetch(url: str) -> tuple[float, int]:
    """Return the seconds and the bytes of a page over HTTP."""
    started = time.perf_counter()
    with urllib.request.urlopen(url, timeout=60) as response:  # noqa: S310 - the address of our own server
        size = len(response.read())
    return time.perf_counter() - started, size


def paint(browser: Any, base: str, shown: tuple[Page, ...]) -> Iterator[float]:
    """Open pages in a new profile, and yield the seconds until each is painted, on the clock of the browser."""
    with browser.new_context(viewport={"width": 1280, "height": 900}) as context:
        tab = context.new_page()
        for page in shown:
            tab.goto(base + page.path)
            tab.locator(page.shown).wait_for(state="attached")
            yield tab.evaluate(PAINTED)


@contextmanager
def chromium_if_any() -> Iterator[Any]:
    """Start Chromium; give None, and say why, if it is missing."""
    try:
        with chromium() as browser:
            yield browser
    except NoBrowserError as error:
        print(f"NOT measured in a browser, only over HTTP: {error}")
        yield None


def table(shown: tuple[Page, ...], seconds: Mapping[str, list[list[float]]], sizes: list[int]) -> list[str]:
    """Return the lines of the table, with a verdict for each bound.

    Args:
        seconds: of each kind of measurement, rounds of seconds, each in the order of the pages.
    """
    lines = [f"{'page':20} {'kB':>6}" + "".join(f" {kind:>20}" for kind in seconds) + "   bound"]
    for place, page in enumerate(shown):
        columns = [[each[place] for each in rounds] for rounds in seconds.values()]
        line = f"{page.name:20} {sizes[place] / 1000:6.0f}"
        line += "".join(f" {median(column):11.3f} ({max(column):.3f})" for column in columns)
        if page.bound is not None:
            verdict = "kept" if median(columns[-1]) < page.bound else "MISSED"
            line += f"   {page.bound:g} s {verdict}"
        lines.append(line)
    return lines


def measure(run_dir: Path, shown: tuple[Page, ...], rounds: int) -> list[str]:
    """Return the lines of the table."""
    seconds: dict[str, list[list[float]]] = {"HTTP": []}
    sizes: list[int] = []
    with chromium_if_any() as browser:
        if browser:
            kind = f"Chromium {browser.version.split('.')[0]}"
            seconds[kind] = []
        for _ in range(rounds):
            with served(run_dir) as base:
                fetched = [fetch(base + page.path) for page in shown]
            seconds["HTTP"].append([each for each, _ in fetched])
            sizes = [size for _, size in fetched]
            if browser:
                with served(run_dir) as base:
                    seconds[kind].append(list(paint(browser, base, shown)))
    return table(shown, seconds, sizes)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trees", required=True, help="run directory of `rlsys search`")
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    source = Path(options.trees) / "trees"
    with tempfile.TemporaryDirectory(prefix="rlsys-view-") as name:
        run_dir = Path(name)
        size = copy_trees(source, run_dir / "trees", options.count)
        write_metrics(run_dir / "metrics.jsonl", options.steps)
        print(f"{options.count:,} trees of {size / options.count / 1000:.0f} kB, {options.steps:,} steps")
        lines = measure(run_dir, pages(options.count, number_of_largest(source)), options.rounds)
    print(
        f"seconds, median of {options.rounds} rounds (slowest); load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores"
    )
    print(*lines, f"memory of the server: {psutil.Process().memory_info().rss / 2**20:.0f} MiB", sep="\n")
    return int(any(line.endswith("MISSED") for line in lines))


if __name__ == "__main__":
    sys.exit(main())
