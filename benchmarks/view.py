"""How fast `rlsys view` shows a run with many trees and many steps.

    python benchmarks/view.py --trees runs/my_search --count 10000

Copies the trees of a search under new prompt ids until there are `count`, writes as many rows of metrics as `steps`,
serves the pages, and prints the seconds until each page has come whole, and the CPU time of server and client. The
second line of a page is a repeated view.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import tempfile
import threading
import time
import urllib.request
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import psutil
import uvicorn

from rlsys.commands.view import listen
from rlsys.viewer.app import build
from rlsys.viewer.run_files import RunFiles

SHARD = 64


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


def fetch(url: str) -> tuple[float, float, int]:
    """Return the seconds, the seconds of CPU and the bytes of a page."""
    started, cpu = time.perf_counter(), time.process_time()
    with urllib.request.urlopen(url, timeout=60) as response:  # noqa: S310 - the address of our own server
        size = len(response.read())
    return time.perf_counter() - started, time.process_time() - cpu, size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trees", required=True, help="run directory of `rlsys search`")
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--steps", type=int, default=10_000)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="rlsys-view-") as name:
        run_dir = Path(name)
        size = copy_trees(Path(options.trees) / "trees", run_dir / "trees", options.count)
        write_metrics(run_dir / "metrics.jsonl", options.steps)
        print(f"{options.count:,} trees of {size / options.count / 1000:.0f} kB, {options.steps:,} steps")
        listener = listen("127.0.0.1", 0)
        server = uvicorn.Server(uvicorn.Config(build([RunFiles(run_dir)]), log_level="warning", lifespan="off"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        base = f"http://127.0.0.1:{listener.getsockname()[1]}"
        last = options.count - 1
        pages = ("/trees", f"/trees?page={options.count // 50}", "/trees?only=wrong", f"/tree/{last}", "/tree/0")
        for page in (*pages, "/", "/data.json", "/timeline"):
            for attempt in ("first", "again"):
                seconds, cpu, length = fetch(base + page)
                print(f"{page:24} {attempt}  {seconds:6.3f} s  {cpu:6.3f} s CPU  {length / 1000:5.0f} kB")
        print(f"memory of the server: {psutil.Process().memory_info().rss / 2**20:.0f} MiB")
        server.should_exit = True
        thread.join()


if __name__ == "__main__":
    main()
