"""Run healthy jobs back to back under a changing load, and look for restarts, lost calls and growth.

`python benchmarks/soak.py [--hours 2] [--write]` (`make soak`) starts `rlsys train` again and again: the quickstart,
the same with staleness 1, with searched groups, and joint training. Beside them, processes of low priority use the
cores for random times and pause for random times, some of them for 40 s. No fault is injected.

The exit code is 1 if one of these checks fails:

- Every job ends with exit code 0. It restarts nothing, skips nothing, fails no rollout, verification or save, and every
  prompt has one outcome.
- Memory, files, sockets and stored objects of its processes do not grow from the second quarter of the stage `online`
  to the last.
- No process, file or shared memory is left, and jobs of the same kind need as much memory at the end as at the start.
"""

from __future__ import annotations

import argparse
import itertools
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
from chaos import held  # noqa: E402
from storm_figures import growth, prompts_of  # noqa: E402
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
}
LOOK_S, GONE_S, LIMIT_S = 5.0, 15.0, 3600.0
PAUSE_S, LONG_PAUSE_S = (5.0, 30.0), 40.0
# Growth that counts: MiB of memory, and numbers of files, sockets and objects.
MEMORY_MIB, ENTRIES = 48.0, 8.0
SEEN = ("driver MiB", "actor MiB", "rank MiB", "stored objects")
BURN = "while True: sum(i * i for i in range(100_000))"
NEVER = ("process/actor_restarts", "process/learner_restarts", "process/failed_saves")
OBJECTS = re.compile(r"^- num local plasma objects: (\d+)", re.MULTILINE)


@dataclass(slots=True)
class Job:
    """One finished job and what was seen of its processes.

    Attributes:
        looks: For every look: seconds since the start, and figure by name, such as "driver MiB".
        online_s: Seconds from the start to the first look in the stage `online`; 0 if there was none.
    """

    kind: str
    seconds: float = 0.0
    code: int = 0
    steps: int = 0
    online_s: float = 0.0
    looks: list[tuple[float, dict[str, float]]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def quarter(self, number: int) -> dict[str, float]:
        """Return the median of every figure in a quarter of the stage `online`, from 0."""
        online = [look for at_s, look in self.looks if at_s >= self.online_s]
        part = online[number * len(online) // 4 : (number + 1) * len(online) // 4]
        names = {name for look in part for name in look}
        return {name: statistics.median([look[name] for look in part if name in look]) for name in sorted(names)}


def main() -> int:
    arguments = parse()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # raises, so that the started processes are ended
    folder = arguments.folder.absolute() / uuid.uuid4().hex[:8]
    folder.mkdir(parents=True)
    print(f"soak of {arguments.hours:g} hours in {folder}", flush=True)
    before, began, jobs = held(), time.monotonic(), []
    with changing_load(arguments.seed):
        for number, kind in enumerate(itertools.cycle(JOBS)):
            if time.monotonic() - began > arguments.hours * 3600:
                break
            jobs.append(run(kind, folder / f"job-{number}", number, arguments.overrides))
            print(f"{time.monotonic() - began:8.0f} s  {kind}: {'; '.join(jobs[-1].problems) or 'healthy'}", flush=True)
    problems = [f"{job.kind}: {problem}" for job in jobs for problem in job.problems]
    problems += [*growth(before, held()), *growth_of_jobs(jobs)]
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
    job, started, mark = Job(kind), time.monotonic(), f"{run_dir.parent.name}-{run_dir.name}"
    command = [str(RLSYS), "train", str(ROOT / "configs" / config), f"run.dir={run_dir}", f"run.seed={seed}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", MARK: mark}
    log = run_dir.with_suffix(".log")
    with log.open("wb") as output, subprocess.Popen(
        [*command, *own, *overrides], env=environment, cwd=ROOT, stdout=output, stderr=output, start_new_session=True
    ) as driver:  # fmt: skip
        try:
            while driver.poll() is None and time.monotonic() - started < LIMIT_S:
                seconds = time.monotonic() - started
                if not job.online_s and any(row["stage"] == "online" for row in rows_of(run_dir)):
                    job.online_s = seconds
                job.looks.append((seconds, look(driver.pid, mark, run_dir)))
                time.sleep(LOOK_S)
        finally:
            if driver.poll() is None:
                os.killpg(driver.pid, signal.SIGKILL)
    job.seconds, job.code = time.monotonic() - started, driver.returncode
    time.sleep(GONE_S)
    job.problems = problems_of(job, run_dir, mark, log)
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
    middle, last = job.quarter(1), job.quarter(3)
    unseen = [name for name in SEEN if not (name in middle and name in last)]
    problems += [f"not seen: {', '.join(unseen)}"] if unseen else []
    return [*problems, *grown("within the job", middle, last)]


def grown(when: str, before: dict[str, float], after: dict[str, float]) -> list[str]:
    """Return a line for every figure that grew by more than noise."""
    lines = []
    for name in before.keys() & after.keys():
        slack = MEMORY_MIB + 0.05 * before[name] if name.endswith("MiB") else ENTRIES
        if after[name] - before[name] > slack:
            lines.append(f"{name} grew {when}, from {before[name]:.0f} to {after[name]:.0f}")
    return sorted(lines)


def growth_of_jobs(jobs: Sequence[Job]) -> list[str]:
    """Return a line for every figure that is larger in the last job of a kind than in the first."""
    lines = []
    for kind in JOBS:
        same = [job for job in jobs if job.kind == kind]
        if len(same) > 1:
            lines += [f"{kind}: {each}" for each in grown("over the jobs", same[0].quarter(3), same[-1].quarter(3))]
    return lines


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
