"""Run healthy jobs back to back under a changing load, and look for restarts, lost calls and growth.

`python benchmarks/soak.py [--hours 2] [--write]` (`make soak`) starts `rlsys train` again and again: the quickstart,
the same with staleness 1, with searched groups, joint training, and a long quickstart. Beside them, processes of low
priority use the cores for random times and pause for random times, some of them for 40 s. No fault is injected.

The exit code is 1 if one of these checks fails:

- Every job ends with exit code 0. It restarts nothing, skips nothing, fails no rollout, verification or save, and every
  prompt has one outcome.
- Files, sockets and stored objects of its processes do not grow after the first quarter of the stage `online`. Nor does
  their memory after the first half of the long jobs: before, caches of allocators fill.
- No process of a job, no temporary folder and no shared memory that its processes used is left after it.

Memory varies with the lengths of the samples, and what an allocator has kept is not given back at once. So a rise
counts as growth if it is larger than a bound and also larger than three standard deviations of a random walk with the
changes that were seen from minute to minute.
"""

from __future__ import annotations

import argparse
import itertools
import math
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "benchmarks"))

import results_page  # noqa: E402
from cells import RLSYS  # noqa: E402
from storm_figures import prompts_of  # noqa: E402
from storm_processes import MARK, RUN_ID, line, marked, running  # noqa: E402

from rlsys.files import read_json  # noqa: E402
from rlsys.run.ledger import read_ledger  # noqa: E402
from rlsys.run.metrics import read_rows  # noqa: E402

PAGE = ROOT / "docs" / "reliability.md"
BEGIN, END = "<!-- soak: written by make soak -->", "<!-- end of soak -->"
JOBS: dict[str, tuple[str, tuple[str, ...]]] = {
    "quickstart": ("quickstart.yaml", ()),
    "staleness 1": ("quickstart.yaml", ("train.max_staleness=1",)),
    "searched groups": ("quickstart.yaml", ("search.fraction=0.25", "train.max_steps=40")),
    "joint": ("joint_online.yaml", ()),
    "long quickstart": ("quickstart.yaml", ("train.max_steps=300",)),
}
# Pages of the KV cache count when they are first used. A small cache is used whole within the first steps.
SMALL_CACHE = "actors.kv_cache_gib=0.25"
LOOK_S, GONE_S, LIMIT_S = 5.0, 15.0, 3600.0
PAUSE_S, LONG_PAUSE_S = (5.0, 30.0), 40.0
# Growth that counts: MiB of memory, and numbers of files, sockets and objects.
MEMORY_MIB, ENTRIES = 48.0, 8.0
# Minutes of the stage `online` that tell growth from the filling of caches, which takes about 150 steps.
MEMORY_MINUTES = 14
SEEN = ("driver MiB", "actor MiB", "rank MiB", "stored objects")
BURN = "while True: sum(i * i for i in range(100_000))"
NEVER = ("process/actor_restarts", "process/learner_restarts", "process/failed_saves")
OBJECTS = re.compile(r"^- num local plasma objects: (\d+)", re.MULTILINE)


@dataclass(slots=True)
class Job:
    """One job and what was seen of its processes.

    Attributes:
        minutes: Median of every figure, such as "driver MiB", in each minute of the stage `online`.
    """

    kind: str
    seconds: float = 0.0
    code: int = 0
    steps: int = 0
    minutes: dict[str, list[float]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def quarter(self, number: int) -> dict[str, float]:
        """Return the median of every figure in a quarter of the stage `online`, from 0."""
        parts = {name: values[_quarter(values, number) : _quarter(values, number + 1)] for name, values in self}
        return {name: statistics.median(part) for name, part in parts.items() if part}

    def settled(self) -> dict[str, list[float]]:
        """Return the figures of the minutes in which they must not grow.

        These are the minutes after the first quarter; for memory after the first half, if there are enough of them.
        """
        later = {}
        for name, values in self:
            memory = name.endswith("MiB")
            if not memory or len(values) >= MEMORY_MINUTES:
                later[name] = values[_quarter(values, 2 if memory else 1) :]
        return later

    def __iter__(self) -> Iterator[tuple[str, list[float]]]:
        return iter(sorted(self.minutes.items()))


def _quarter(values: Sequence[float], number: int) -> int:
    return number * len(values) // 4


def by_minute(looks: Sequence[tuple[float, dict[str, float]]]) -> dict[str, list[float]]:
    """Return the median of every figure in each minute, from looks of (seconds since the start, figure by name)."""
    figures: dict[str, dict[int, list[float]]] = {}
    for at_s, look in looks:
        for name, value in look.items():
            figures.setdefault(name, {}).setdefault(int(at_s // 60), []).append(value)
    return {name: [round(statistics.median(minute), 1) for minute in each.values()] for name, each in figures.items()}


def main() -> int:
    arguments = parse()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # raises, so that the started processes are ended
    folder = arguments.folder.absolute() / uuid.uuid4().hex[:8]
    folder.mkdir(parents=True)
    print(f"soak of {arguments.hours:g} hours in {folder}", flush=True)
    began, jobs = time.monotonic(), []
    with changing_load(arguments.seed):
        for number, kind in enumerate(itertools.cycle(JOBS)):
            if time.monotonic() - began > arguments.hours * 3600:
                break
            jobs.append(run(kind, folder / f"job-{number}", number, arguments.overrides))
            print(f"{time.monotonic() - began:8.0f} s  {kind}: {'; '.join(jobs[-1].problems) or 'healthy'}", flush=True)
    problems = [f"{job.kind}: {problem}" for job in jobs for problem in job.problems]
    problems += growth(jobs)
    shown = report(jobs, problems, time.monotonic() - began)
    print("\n".join(["", *shown]))
    if arguments.write:
        page = PAGE.read_text(encoding="utf-8")
        start, end = page.index(BEGIN) + len(BEGIN), page.index(END)
        PAGE.write_text("\n".join([page[:start], *shown, page[end:]]), encoding="utf-8")
        results_page.keep("soak", {"jobs": [asdict(job) for job in jobs], "problems": problems})
    return int(bool(problems))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--hours", type=float, default=2.0, help="hours after which no job begins")
    parser.add_argument("--seed", type=int, default=0, help="seed of the load")
    parser.add_argument("--folder", type=Path, default=Path("runs/soak"))
    parser.add_argument("--write", action="store_true", help=f"write {PAGE.name}")
    parser.add_argument("overrides", nargs="*", help="section.key=value, for all jobs")
    return parser.parse_args()


@contextmanager
def changing_load(seed: int) -> Iterator[None]:
    """Use the cores with processes of low priority, which pause at random, in the with block."""
    burners = [
        psutil.Popen(["nice", "-n", "10", sys.executable, "-c", BURN]) for _ in range(max(1, os.cpu_count() or 1))
    ]
    over = threading.Event()

    def change() -> None:
        draw = random.Random(seed)
        while not over.is_set():
            for burner in burners:
                draw.choice((burner.suspend, burner.resume))()
            over.wait(LONG_PAUSE_S if draw.random() < 0.2 else draw.uniform(*PAUSE_S))

    thread = threading.Thread(target=change)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        for burner in burners:
            burner.kill()
            burner.wait()


def run(kind: str, run_dir: Path, seed: int, overrides: Sequence[str]) -> Job:
    """Run a job to its end, and look at its processes meanwhile."""
    config, own = JOBS[kind]
    looks: list[tuple[float, dict[str, float]]] = []
    paths: set[Path] = set()
    job, started, mark = Job(kind), time.monotonic(), f"{run_dir.parent.name}-{run_dir.name}"
    command = [str(RLSYS), "train", str(ROOT / "configs" / config), f"run.dir={run_dir}", f"run.seed={seed}"]
    command += [SMALL_CACHE, *own, *overrides]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", MARK: mark}
    log = run_dir.with_suffix(".log")
    with log.open("wb") as output, subprocess.Popen(
        command, env=environment, cwd=ROOT, stdout=output, stderr=output, start_new_session=True
    ) as driver:  # fmt: skip
        try:
            while driver.poll() is None and time.monotonic() - started < LIMIT_S:
                seconds = time.monotonic() - started
                if any(row["stage"] == "online" for row in rows_of(run_dir)):
                    looks.append((seconds, look(driver.pid, mark, run_dir)))
                paths |= used_paths(mark, run_dir)
                time.sleep(LOOK_S)
        finally:
            if driver.poll() is None:
                os.killpg(driver.pid, signal.SIGKILL)
    job.seconds, job.code, job.minutes = time.monotonic() - started, driver.returncode, by_minute(looks)
    time.sleep(GONE_S)
    job.problems = [
        *problems_of(job, run_dir, mark, log),
        *(f"left: {path}" for path in sorted(paths) if path.exists()),
    ]
    return job


def rows_of(run_dir: Path) -> list[dict[str, object]]:
    path = run_dir / "metrics.jsonl"
    return read_rows(path) if path.exists() else []


def look(driver: int, mark: str, run_dir: Path) -> dict[str, float]:
    """Return memory in MiB, and numbers of files and sockets, of the processes by kind; the objects of the store."""
    figures: dict[str, float] = {}
    kinds = {"driver": [driver], **{kind: [each.pid for each in running(kind, mark)] for kind in ("actor", "rank")}}
    for kind, pids in kinds.items():
        for pid in pids:
            with suppress(psutil.Error):
                process = psutil.Process(pid)
                for name, value in (
                    ("MiB", process.memory_info().rss / 2**20),
                    ("files", process.num_fds()),
                    ("sockets", len(process.net_connections("all"))),
                ):
                    figures[f"{kind} {name}"] = figures.get(f"{kind} {name}", 0.0) + value
    with suppress(OSError):
        for folder in (run_dir / ".temporary-folder").read_text().split():
            state = Path(folder, "ray", "session_latest", "logs", "debug_state.txt").read_text()
            if match := OBJECTS.search(state):
                figures["stored objects"] = float(match[1])
    return figures


def used_paths(mark: str, run_dir: Path) -> set[Path]:
    """Return the temporary folders of a job, and the files in shared memory that its processes have mapped."""
    paths = set()
    with suppress(OSError):
        paths.update(map(Path, (run_dir / ".temporary-folder").read_text().split()))
    for process in marked(MARK, mark):
        with suppress(OSError):
            text = Path(f"/proc/{process.pid}/maps").read_text()
            paths.update(Path(path) for path in re.findall(r"(/dev/shm/\S+)$", text, re.MULTILINE))
    return paths


def problems_of(job: Job, run_dir: Path, mark: str, log: Path) -> list[str]:
    """Return a line for everything that a healthy job does not do."""
    problems = [f"exit code {job.code}; {log}"] if job.code else []
    rows = rows_of(run_dir)
    job.steps = sum(row["stage"] == "online" for row in rows)
    for name in NEVER:
        if count := max((float(str(row.get(name) or 0)) for row in rows), default=0.0):
            problems.append(f"{name} {count:g}")
    text = log.read_text(errors="replace")
    problems += [f"says: {said}" for said in text.splitlines() if re.search("lost|SKIPPED|FAILED|skipped", said)]
    checkpoints = sorted((run_dir / "checkpoints").glob("step_*/state.json"))
    if checkpoints:
        state = read_json(checkpoints[-1])
        lost, twice = prompts_of(read_ledger(run_dir / "ledger.jsonl"), state["cursor"], state["in_flight"])
        problems += [f"{lost} prompts lost"] if lost else []
        problems += [f"{twice} prompts with two outcomes"] if twice else []
    left = [*marked(MARK, mark), *marked(RUN_ID, run_dir.name)]
    problems += [f"process left: {process.pid} {line(process)[:60]}" for process in left]
    unseen = [name for name in SEEN if name not in job.minutes]
    return [*problems, *([f"not seen: {', '.join(unseen)}"] if unseen else [])]


def grown(when: str, series: dict[str, list[float]]) -> list[str]:
    """Return a line for every figure whose rise from the first value to the last is growth."""
    lines = []
    for name, values in series.items():
        changes = [after - before for before, after in itertools.pairwise(values)]
        slack = MEMORY_MIB if name.endswith("MiB") else ENTRIES
        walk = 3 * statistics.stdev(changes) * math.sqrt(len(changes)) if len(changes) > 1 else 0.0
        if sum(changes) > max(slack, walk):
            lines.append(f"{name} grew {when}, from {values[0]:.0f} to {values[-1]:.0f}")
    return lines


def growth(jobs: Sequence[Job]) -> list[str]:
    """Return a line for every figure that grows within a job. Every job has new processes, so none grows over jobs."""
    return [f"{job.kind}: {each}" for job in jobs for each in grown("within the job", job.settled())]


def report(jobs: Sequence[Job], problems: Sequence[str], seconds: float) -> list[str]:
    """Return the lines of the section of the page."""
    heads = ["job", "minutes", "steps", "driver MiB", "actors MiB", "ranks MiB", "files", "sockets", "stored objects"]
    lines = [
        f"`make soak` on {os.cpu_count()} cores: {len(jobs)} healthy jobs in {seconds / 3600:.1f} hours, with "
        f"{sum(job.steps for job in jobs)} online steps. Figures are medians in the second and the last quarter of the "
        "stage `online`. Files and sockets are those of driver, actors and ranks together.",
        "",
        f"| {' | '.join(heads)} |",
        f"|{'---|' * len(heads)}",
    ]
    for job in jobs:
        middle, last = job.quarter(1), job.quarter(3)

        def pair(*names: str, middle: dict[str, float] = middle, last: dict[str, float] = last) -> str:
            if not all(name in part for part in (middle, last) for name in names):
                return "not seen"
            first, then = (sum(part[name] for name in names) for part in (middle, last))
            return f"{first:,.0f} → {then:,.0f}"

        cells = [job.kind, f"{job.seconds / 60:.1f}", str(job.steps), pair("driver MiB"), pair("actor MiB")]
        cells += [
            pair("rank MiB"),
            *(pair(*(f"{kind} {of}" for kind in ("driver", "actor", "rank"))) for of in ("files", "sockets")),
        ]
        lines.append(f"| {' | '.join([*cells, pair('stored objects')])} |")
    verdict = problems or ["No restart, no lost call, no lost prompt, no growth, nothing left."]
    return [*lines, "", *(f"- {each}" for each in verdict), ""]


if __name__ == "__main__":
    sys.exit(main())
