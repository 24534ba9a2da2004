"""Figures of a storm from the files of its jobs, and the checks of these figures."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from storm_plan import KINDS, Fault

from rlsys.run.ledger import OUTCOMES

SLACK_MIB = 1.0  # growth of a path during a storm that is not a failure


@dataclass(slots=True)
class Seen:
    """All lines that a file of JSON lines ever had, including those that a rollback has dropped since."""

    lines: dict[str, dict[str, Any]] = field(default_factory=dict)

    def add(self, text: str) -> list[dict[str, Any]]:
        """Return the new lines. A last line without a newline is still being written and is left out."""
        new = [line for line in text.split("\n")[:-1] if line not in self.lines]
        self.lines |= {line: json.loads(line) for line in new}
        return [self.lines[line] for line in new]

    def dropped(self, final: str) -> list[dict[str, Any]]:
        """Return the lines that are not in the final state of the file."""
        kept = set(final.split("\n"))
        return [value for line, value in self.lines.items() if line not in kept]


def training_steps(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows of training steps, without those of evaluations before the first step."""
    return [row for row in rows if row["step"] > 0]


def prompts_of(ledger: Sequence[Mapping[str, Any]], cursor: int, in_flight: Sequence[int]) -> tuple[int, int]:
    """Return the number of issued prompts without an outcome, and of prompts with two outcomes.

    Args:
        ledger: Lines of ledger.jsonl.
        cursor: Number of issued prompts.
        in_flight: Prompts whose outcome is still open.
    """
    counts = Counter(index for line in ledger for key in ("before", *OUTCOMES) for index in line.get(key, ()))
    return len(set(range(cursor)) - set(counts) - set(in_flight)), sum(count > 1 for count in counts.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class JobFigures:
    """Figures of a job of the storm and of an undisturbed run with the same config, seed and steps.

    Attributes:
        unasked: Ends of the driver that no fault caused.
        steps: Number of training steps that count.
        again: Number of steps whose row was dropped by a rollback, so that they were trained again.
        step_s: Seconds of the steps that count.
        undisturbed_s: Seconds of the undisturbed run; 0 if the job was not finished or this run failed.
        two_fates: Number of prompts that have two outcomes (trained, filtered or skipped).
        verdicts_lost: Number of failed verifications and rollouts in the steps that count.
        accuracy: Held-out accuracies after the job.
        undisturbed: Held-out accuracies after the undisturbed run; empty if `undisturbed_s` is 0.
    """

    seed: int
    starts: int
    unasked: tuple[str, ...]
    finished: bool
    steps: int
    again: int
    step_s: float
    seconds: float
    undisturbed_s: float
    prompts: int
    prompts_lost: int
    two_fates: int
    verdicts_lost: int
    skipped_steps: int
    accuracy: Mapping[str, float]
    undisturbed: Mapping[str, float]
    sha256: str
    same_bytes: bool


def noise(one: float, other: float, problems: int) -> float:
    """Return three standard errors of the difference of two shares of `problems` problems, at least one problem."""
    variance = one * (1 - one) + other * (1 - other)
    return max(3 * math.sqrt(variance / problems), 1 / problems)


def goodput(jobs: Sequence[JobFigures]) -> float:
    """Return the seconds of the undisturbed runs of the finished jobs, divided by the seconds of all jobs."""
    return sum(job.undisturbed_s for job in jobs) / sum(job.seconds for job in jobs)


def problems_of(job: JobFigures, problems: int) -> list[str]:
    """Return the failed checks of a job.

    Args:
        problems: Number of held-out problems of an evaluation.
    """
    faults = [f"the driver ended unasked: {end}" for end in job.unasked]
    if job.prompts_lost or job.two_fates:
        faults.append(f"{job.prompts_lost} prompts lost, {job.two_fates} with two outcomes")
    if not job.finished:
        return [*faults, "the job was not finished"]
    if not job.undisturbed:
        return [*faults, "its undisturbed run failed"]
    for name, expected in job.undisturbed.items():
        value, bound = job.accuracy[name], noise(job.accuracy[name], expected, problems)
        if abs(value - expected) > bound:
            faults.append(f"{name} accuracy {value:.3f}, undisturbed {expected:.3f}: differ by more than {bound:.3f}")
    if not (job.same_bytes or job.verdicts_lost or job.skipped_steps):
        faults.append("no verdict was lost and no step skipped, but the last checkpoint has other bytes")
    return faults


def growth(before: Mapping[str, float], after: Mapping[str, float]) -> list[str]:
    """Return lines about the paths that are new after a storm or have grown. The arguments have MiB by path."""
    lines = [f"left: {name}, {mib:.1f} MiB" for name, mib in after.items() if name not in before]
    for name, mib in before.items():
        if after.get(name, 0.0) - mib > SLACK_MIB:
            lines.append(f"grown: {name}, from {mib:.1f} to {after[name]:.1f} MiB")
    return lines


def kind_lines(faults: Sequence[Fault]) -> list[str]:
    """Return a table of the faults by kind."""
    heads = ["fault", "with effect, without effect", "seconds until the process was gone"]
    heads += ["seconds until the next completed step"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for kind in KINDS:
        injected = [fault for fault in faults if fault.kind == kind]
        effective = [fault for fault in injected if fault.took_effect]
        gone = _spread([fault.gone_s for fault in effective if fault.gone_s is not None])
        step = _spread([fault.next_step_s for fault in effective if fault.next_step_s is not None])
        lines.append(f"| {kind} | {len(effective)}, {len(injected) - len(effective)} | {gone} | {step} |")
    return lines


def not_met(faults: Sequence[Fault]) -> list[str]:
    """Return the kinds of faults that never took effect."""
    met = {fault.kind for fault in faults if fault.took_effect}
    return [kind for kind in KINDS if kind not in met]


def _spread(seconds: Sequence[float]) -> str:
    return f"{median(seconds):.1f} (at most {max(seconds):.1f})" if seconds else ""


def job_lines(jobs: Sequence[JobFigures]) -> list[str]:
    """Return a table of the jobs."""
    heads = ["run.seed", "seconds, undisturbed", "driver starts", "steps, trained again"]
    heads += ["prompts, lost, with two outcomes", "verdicts lost", "greedy, undisturbed", "sampled, undisturbed"]
    heads += ["same bytes"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for job in jobs:
        accuracy = [f"{job.accuracy[name]:.3f}, {value:.3f}" for name, value in job.undisturbed.items()]
        cells = [f"{job.seed}", f"{job.seconds:.0f}, {job.undisturbed_s:.0f}", f"{job.starts}"]
        cells += [f"{job.steps}, {job.again}", f"{job.prompts}, {job.prompts_lost}, {job.two_fates}"]
        cells += [f"{job.verdicts_lost}", *(accuracy or ["none"] * 2), "yes" if job.same_bytes else "no"]
        lines.append(f"| {' | '.join(cells)} |")
    return lines
