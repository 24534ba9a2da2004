"""Figures of a storm, made of what its jobs have written, and what they say of it."""

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

SLACK_MIB = 1.0  # by which what was there before a storm may differ after it


@dataclass(slots=True)
class Seen:
    """Lines that a file of JSON lines has ever held. Those that a rollback dropped are in none of its later states."""

    lines: dict[str, dict[str, Any]] = field(default_factory=dict)

    def add(self, text: str) -> list[dict[str, Any]]:
        """The lines that are new. A last one without its newline is still being written."""
        new = [line for line in text.split("\n")[:-1] if line not in self.lines]
        self.lines |= {line: json.loads(line) for line in new}
        return [self.lines[line] for line in new]

    def dropped(self, final: str) -> list[dict[str, Any]]:
        """Those that the file has lost in its final state."""
        kept = set(final.split("\n"))
        return [value for line, value in self.lines.items() if line not in kept]


def training_steps(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of training steps, without those of evaluations before the first."""
    return [row for row in rows if row["step"] > 0]


def prompts_of(ledger: Sequence[Mapping[str, Any]], cursor: int, in_flight: Sequence[int]) -> tuple[int, int]:
    """Prompts that were issued and have no fate, and those that have two.

    Args:
        ledger: lines of ledger.jsonl. cursor: prompts issued. in_flight: those whose fate is open.
    """
    fates = Counter(index for line in ledger for fate in ("before", *OUTCOMES) for index in line.get(fate, ()))
    return len(set(range(cursor)) - set(fates) - set(in_flight)), sum(count > 1 for count in fates.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class JobFigures:
    """A job of the storm beside an undisturbed run of the same config, seed and steps.

    unasked: ends of the driver that no fault was to bring about. steps: training steps that count; step_s: their
    seconds; again: those whose row was written and dropped by a rollback, so that they were trained again. two_fates:
    prompts that were trained, filtered or skipped, and then once more.
    verdicts_lost: verifications and rollouts that failed in the steps that count. undisturbed_s: from start to end of
    the undisturbed run; 0, and no accuracy of it, where the job was not finished or the run failed.
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
    """Three standard errors of the difference of two shares of `problems` held-out problems, at least one problem."""
    variance = one * (1 - one) + other * (1 - other)
    return max(3 * math.sqrt(variance / problems), 1 / problems)


def goodput(jobs: Sequence[JobFigures]) -> float:
    """Seconds that undisturbed runs of the finished jobs take from start to end, over the seconds of all."""
    return sum(job.undisturbed_s for job in jobs) / sum(job.seconds for job in jobs)


def problems_of(job: JobFigures, problems: int) -> list[str]:
    """What a job has to be blamed for.

    Args:
        problems: held-out problems of an evaluation.
    """
    found = [f"the driver ended unasked: {end}" for end in job.unasked]
    if job.prompts_lost or job.two_fates:
        found.append(f"{job.prompts_lost} prompts lost, {job.two_fates} with two fates")
    if not job.finished:
        return [*found, "the job was not finished"]
    if not job.undisturbed:
        return [*found, "its undisturbed run failed"]
    for name, expected in job.undisturbed.items():
        value, bound = job.accuracy[name], noise(job.accuracy[name], expected, problems)
        if abs(value - expected) > bound:
            found.append(f"{name} accuracy {value:.3f}, undisturbed {expected:.3f}: further apart than {bound:.3f}")
    if not (job.same_bytes or job.verdicts_lost or job.skipped_steps):
        found.append("no verdict was lost and no step skipped, and the last checkpoint has other bytes")
    return found


def growth(before: Mapping[str, float], after: Mapping[str, float]) -> list[str]:
    """What is there after a storm and was not before, and what has grown; MiB by path."""
    found = [f"left: {name}, {mib:.1f} MiB" for name, mib in after.items() if name not in before]
    for name, mib in before.items():
        if after.get(name, 0.0) - mib > SLACK_MIB:
            found.append(f"grown: {name}, from {mib:.1f} to {after[name]:.1f} MiB")
    return found


def kind_lines(faults: Sequence[Fault]) -> list[str]:
    """A table of the faults by kind."""
    heads = ["fault", "times, without effect", "process gone after, s", "next completed step after, s"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for kind in KINDS:
        injected = [fault for fault in faults if fault.kind == kind]
        found = [fault for fault in injected if fault.took_effect]
        gone = _spread([fault.gone_s for fault in found if fault.gone_s is not None])
        step = _spread([fault.next_step_s for fault in found if fault.next_step_s is not None])
        lines.append(f"| {kind} | {len(found)}, {len(injected) - len(found)} | {gone} | {step} |")
    return lines


def not_met(faults: Sequence[Fault]) -> list[str]:
    """The kinds that never took effect."""
    met = {fault.kind for fault in faults if fault.took_effect}
    return [kind for kind in KINDS if kind not in met]


def _spread(seconds: Sequence[float]) -> str:
    return f"{median(seconds):.1f} (at most {max(seconds):.1f})" if seconds else ""


def job_lines(jobs: Sequence[JobFigures]) -> list[str]:
    """A table of the jobs."""
    heads = ["run.seed", "seconds, undisturbed", "driver starts", "steps, trained again"]
    heads += ["prompts, lost, with two fates", "verdicts lost", "greedy, undisturbed", "sampled, undisturbed"]
    heads += ["same bytes"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for job in jobs:
        accuracy = [f"{job.accuracy[name]:.3f}, {value:.3f}" for name, value in job.undisturbed.items()]
        cells = [f"{job.seed}", f"{job.seconds:.0f}, {job.undisturbed_s:.0f}", f"{job.starts}"]
        cells += [f"{job.steps}, {job.again}", f"{job.prompts}, {job.prompts_lost}, {job.two_fates}"]
        cells += [f"{job.verdicts_lost}", *(accuracy or ["none"] * 2), "yes" if job.same_bytes else "no"]
        lines.append(f"| {' | '.join(cells)} |")
    return lines
