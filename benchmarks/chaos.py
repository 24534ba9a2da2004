"""Run the quickstart in a seeded storm of faults, and compare it with undisturbed runs of the same config and seeds.

`python benchmarks/chaos.py [--minutes 20] [--seed 0] [section.key=value ...]` (`make chaos`) starts `rlsys train`, and
starts it again after every exit code but 0. Meanwhile processes are killed and stopped, the driver is killed or asked
to stop, the disk is full, and the newest checkpoint is damaged. A finished job is followed by a job with the next
run.seed until the time is over. The storm ends with the job that is then running.

The exit code is 1 if one of these checks fails:

- Every job finishes, with an accuracy within three standard errors of the undisturbed run's.
- If no verdict was lost and no step was skipped, the last checkpoint has the same bytes as the undisturbed run's.
- Only faults end the driver, and the start after a damaged checkpoint names it.
- Every prompt has one outcome. No process is left. /dev/shm, temporary folders and unfinished checkpoints do not grow.

Faults that never took effect are not a failure; the report names them.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "benchmarks"))

import results_page  # noqa: E402
from cells import metrics, record_of, trained  # noqa: E402
from storm import GONE_S, JobStorm  # noqa: E402
from storm_figures import (  # noqa: E402
    JobFigures,
    goodput,
    growth,
    job_lines,
    kind_lines,
    not_met,
    problems_of,
    prompts_of,
    training_steps,
)
from storm_plan import MEAN_S, schedule  # noqa: E402
from storm_processes import valid_checkpoints  # noqa: E402

from rlsys.config.files import load_config  # noqa: E402
from rlsys.errors import ConfigError  # noqa: E402
from rlsys.files import read_json, write_json  # noqa: E402
from rlsys.run.ledger import read_ledger  # noqa: E402
from rlsys.run.metrics import read_rows  # noqa: E402

CONFIG = ROOT / "configs" / "quickstart.yaml"
# Of the storm and the undisturbed runs: deadlines that suit steps of a few seconds, and more checkpoints.
OVERRIDES = (
    *("actors.start_timeout_s=60", "actors.hang_timeout_s=20", "learner.hang_timeout_s=20", "learner.timeout_s=60"),
    "checkpoint.interval=5",
)
UNDISTURBED_LIMIT_S = 3600.0  # an undisturbed run takes minutes
SHM = "/dev/shm"
WATCHED = (f"{SHM}/*", "/tmp/rl-*", "/tmp/ray", "/tmp/rlsys-*")


def main() -> int:
    arguments = parse()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # raises, so that the started processes are ended
    overrides = [*OVERRIDES, *arguments.overrides]
    try:
        held_out = load_config(CONFIG, overrides).evaluation.prompts
    except ConfigError as error:
        sys.exit(f"error: {error.message}")
    for made in arguments.undisturbed.glob("seed-*") if arguments.undisturbed else ():  # fails before the storm
        record_of(made, CONFIG, [*overrides, f"run.{made.name.replace('-', '=')}"])
    folder = arguments.folder.absolute() / f"seed-{arguments.seed}-{uuid.uuid4().hex[:8]}"
    folder.mkdir(parents=True)
    print(f"storm of seed {arguments.seed}, {arguments.minutes:g} minutes, in {folder}", flush=True)

    timeline: list[tuple[float, str]] = []

    def tell(at_s: float, what: str) -> None:
        timeline.append((round(at_s, 1), what))
        print(f"{at_s:8.1f} s  {what}", flush=True)

    before = held()
    with tempfile.TemporaryDirectory(prefix="rlsys-chaos-", ignore_cleanup_errors=True) as temporary:
        # The cache folder of torch is not a leftover.
        cache = {"TORCHINDUCTOR_CACHE_DIR": str(folder / "torchinductor")}
        environment = {"TMPDIR": temporary, "OMP_NUM_THREADS": "1", **cache}
        jobs = storm(arguments, overrides, folder, environment, tell)
        left = {str(path): size(path) for path in [*Path(temporary).iterdir(), *folder.glob("*/checkpoints/.*")]}
    after = held()
    found: dict[str, Any] = {"faults": [asdict(fault) for job, _ in jobs for fault in job.faults], "timeline": timeline}
    write_json(folder / "storm.json", found)

    reference = (arguments.undisturbed or folder / "undisturbed").absolute()
    figures = [measure(job, took, reference, overrides) for job, took in jobs]
    problems = [
        blame for (job, _), figure in zip(jobs, figures, strict=True) for blame in blames(job, figure, held_out)
    ]
    problems += growth(before, after | left)
    shown = report(arguments, [job for job, _ in jobs], figures, problems, before, after)
    print("\n".join(["", *shown]))
    if arguments.write:
        result = {"lines": shown, "seed": arguments.seed, "jobs": [asdict(figure) for figure in figures]}
        # Absolute paths mean nothing to a reader of the page.
        results_page.keep("chaos", json.loads(json.dumps(result | found).replace(f"{ROOT}/", "")))
    return int(bool(problems))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=20.0, help="minutes after which no job begins")
    parser.add_argument("--seed", type=int, default=0, help="seed of the faults")
    parser.add_argument("--mean", type=float, default=MEAN_S, help="mean seconds between faults")
    parser.add_argument("--folder", type=Path, default=Path("runs/chaos"))
    parser.add_argument("--undisturbed", type=Path, help="folder of earlier undisturbed runs; missing ones are made")
    parser.add_argument("--write", action="store_true", help=f"write {results_page.PAGE} and its figures")
    parser.add_argument("overrides", nargs="*", help="section.key=value, for the storm and the undisturbed runs")
    return parser.parse_args()


def storm(
    arguments: argparse.Namespace, overrides: Sequence[str], folder: Path, environment: Mapping[str, str], tell: Any
) -> list[tuple[JobStorm, float]]:
    """Run job after job in the storm. Return the jobs with their seconds."""
    jobs: list[tuple[JobStorm, float]] = []
    began, limit_s = time.monotonic(), 60 * arguments.minutes
    while (at := time.monotonic() - began) < limit_s and not (jobs and jobs[-1][0].given_up):
        seed = len(jobs)
        tell(at, f"the job of run.seed {seed} begins")
        run_dir = folder / f"job-{seed}-{uuid.uuid4().hex[:8]}"
        job = JobStorm(seed, run_dir, CONFIG, [*overrides, f"run.seed={seed}"], environment, began, tell)
        job.run(schedule(arguments.seed, seed, arguments.mean), began + 2 * limit_s + 600)
        jobs.append((job, job.ended_at - began - at))
    return jobs


def blames(job: JobStorm, figures: JobFigures, held_out: int) -> list[str]:
    """Return all failed checks of a job. `held_out` is the number of problems of an evaluation."""
    stuck = [f"{fault.kind} at {fault.at_s:.0f} s: never gone" for fault in job.stuck]
    orphans = [f"orphan: {orphan}" for orphan in job.orphans]
    return [f"job {job.job}: {blame}" for blame in (*problems_of(figures, held_out), *job.problems, *stuck, *orphans)]


def measure(job: JobStorm, seconds: float, reference: Path, overrides: Sequence[str]) -> JobFigures:
    """Return the figures of a job and of its undisturbed run, which is made if it is missing."""
    rows_file, saved = job.run_dir / "metrics.jsonl", valid_checkpoints(job.run_dir)
    rows = training_steps(read_rows(rows_file))
    state: Mapping[str, Any] = read_json(saved[-1] / "state.json") if saved else {"cursor": 0, "in_flight": []}
    lost, two_fates = prompts_of(read_ledger(job.run_dir / "ledger.jsonl"), state["cursor"], state["in_flight"])
    failed = sum(row.get("rollout/verifier_errors") or 0 for row in rows)
    undisturbed, undisturbed_s = reference / f"seed-{job.job}", 0.0
    if job.finished:
        try:
            undisturbed_s = trained(undisturbed, CONFIG, [*overrides, f"run.seed={job.job}"], UNDISTURBED_LIMIT_S)
        except subprocess.SubprocessError as error:  # the figures of the storm are still reported
            print(f"no undisturbed run: {error}", flush=True)
    own, expected = digests(job.run_dir), digests(undisturbed)
    return JobFigures(
        seed=job.job,
        starts=len(job.starts),
        unasked=tuple(job.unasked),
        finished=job.finished,
        steps=len(rows),
        again=len(training_steps(job.rows.dropped(rows_file.read_text() if rows_file.exists() else ""))),
        step_s=sum(row["time/step_s"] for row in rows),
        seconds=seconds,
        undisturbed_s=undisturbed_s,
        prompts=state["cursor"],
        prompts_lost=lost,
        two_fates=two_fates,
        verdicts_lost=int(failed + (rows[-1].get("rollout/failed") or 0 if rows else 0)),
        skipped_steps=int(rows[-1].get("learner/skipped_steps") or 0) if rows else 0,
        accuracy=accuracy(job.run_dir) if job.finished else {},
        undisturbed=accuracy(undisturbed) if undisturbed_s else {},
        sha256=own.get("policy/model.safetensors", ""),
        same_bytes=undisturbed_s > 0 and own == expected,
    )


def accuracy(run_dir: Path) -> dict[str, float]:
    """Return the held-out accuracies of the last row of the online stage."""
    row = metrics(run_dir, "online")[-1]
    return {name: row[f"held_out/{name}_accuracy"] for name in ("greedy", "sampled")}


def digests(run_dir: Path) -> dict[str, str]:
    """Return the sha256 of all weights and moments of the last checkpoint, by path."""
    return {
        str(path.relative_to(last)): hashlib.sha256(path.read_bytes()).hexdigest()
        for last in valid_checkpoints(run_dir)[-1:]
        for path in sorted(last.rglob("*.safetensors"))
    }


def held() -> dict[str, float]:
    """Return the sizes of the watched paths in MiB, and the used MiB of /dev/shm."""
    found = [path for pattern in WATCHED for path in Path("/").glob(pattern.lstrip("/"))]
    return {SHM: shutil.disk_usage(SHM).used / 2**20} | {str(path): size(path) for path in found}


def size(path: Path) -> float:
    """Return the MiB of a file, or of all files below a folder."""
    files = [path] if path.is_file() else [Path(root, name) for root, _, names in os.walk(path) for name in names]
    total = 0
    for file in files:
        with contextlib.suppress(OSError):
            total += file.lstat().st_size
    return total / 2**20


def report(
    arguments: argparse.Namespace,
    jobs: Sequence[JobStorm],
    figures: Sequence[JobFigures],
    problems: Sequence[str],
    before: Mapping[str, float],
    after: Mapping[str, float],
) -> list[str]:
    """Return the lines of the section of the page."""
    faults = [fault for job in jobs for fault in job.faults]
    seconds, starts = sum(job.seconds for job in figures), sum(job.starts for job in figures)
    share = sum(job.step_s for job in figures) / seconds
    made = f"reused from {arguments.undisturbed}" if arguments.undisturbed else "made after the storm"
    options = [f"--seed {arguments.seed}", f"--minutes {arguments.minutes:g}", f"--mean {arguments.mean:g}"]
    options += arguments.overrides

    def entries(held: Mapping[str, float], where: str) -> str:
        found = [mib for name, mib in held.items() if name.startswith(f"{where}/")]
        return f"{len(found)} entries of {held.get(where, sum(found)):.1f} MiB"

    return [
        f'Measured by `make chaos ARGS="{" ".join(options)}"` on {os.cpu_count()} cores: {len(faults)} faults in '
        f"{seconds / 60:.1f} minutes, one every {seconds / max(1, len(faults)):.0f} s on average. Number of driver "
        f"starts: {starts}; number of jobs: {len(figures)}. The undisturbed runs, {made}, have the same config, seeds "
        "and steps.",
        "",
        *job_lines(figures),
        "",
        *kind_lines(faults),
        "",
        *([f"**Faults that never took effect: {', '.join(missing)}.**", ""] if (missing := not_met(faults)) else ()),
        f"- Goodput {goodput(figures):.3f}: the seconds of the undisturbed runs from start to end, divided by the "
        f"seconds of the storm. The steps that count took {share:.3f} of the storm, including waits for replaced "
        "processes.",
        f"- Processes left: {sum(len(job.orphans) for job in jobs)}. The processes of a driver are counted "
        f"{GONE_S:.0f} s after each of its {starts} ends. Verifiers carry no mark of a driver, so they are counted at "
        "the same interval after the end of each job.",
        *(f"- {where}: {entries(before, where)} before, {entries(after, where)} after." for where in (SHM, "/tmp")),
        *(f"- Policy of job {job.seed}, both runs: sha256 {job.sha256}" for job in figures if job.same_bytes),
        *(f"- **{problem}**" for problem in problems),
    ]


if __name__ == "__main__":
    sys.exit(main())
