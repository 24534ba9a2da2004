"""Measure from the times of a run's steps who waits for whom, and estimate a balanced split of its processes."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rlsys.config.schema import Config

WINDOW = 21  # training steps
_NOTABLE = 0.05  # a smaller share or gain is not worth a word
Row = Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """A number of actors and learner ranks, and the estimated seconds of a training step with them."""

    actors: int
    ranks: int
    step_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Throughput:
    """Times and rates of the last training steps of a stage.

    Attributes:
        steps: number of these steps.
        step_s: median time of a step, seconds.
        generated_tokens_per_s: tokens generated for a step, by the time of the step; None without rollouts.
        trained_tokens_per_s: tokens that were trained, by the time of the step.
        shares: shares of the time of the steps, by the metrics `time/*_s`. `rollout` is the time that the learner waits
            for trajectories.
        actors_idle: share of the time in which the engines of the actors are idle; None without rollouts.
        bottleneck: the sentence about it.
        present: the present split, with its estimated step; None if no split can be estimated.
        best: the best split of the same devices.
    """

    steps: int
    step_s: float
    generated_tokens_per_s: float | None
    trained_tokens_per_s: float
    shares: Mapping[str, float]
    actors_idle: float | None
    bottleneck: str
    present: Split | None = None
    best: Split | None = None


def measure(rows: Sequence[Row], config: Config) -> Throughput | None:
    """Return what the rows of one stage say about its last WINDOW steps; None without steps."""
    last = [row for row in rows if row["step"] and row.get("time/step_s")][-WINDOW:]
    if not last:
        return None
    total = _sum(last, "time/step_s")
    shares = {
        name: _sum(last, f"time/{name}_s") / total for name in ("rollout", "learn", "publish", "checkpoint", "evaluate")
    }
    sampled = [row for row in last if row.get("rollout/idle_policy") is not None]
    idle = _sum([{"idle": row["rollout/idle_policy"] * row["time/step_s"]} for row in sampled], "idle") / total
    present, best = _splits(sampled, config) if sampled else (None, None)
    return Throughput(
        steps=len(last),
        step_s=statistics.median(row["time/step_s"] for row in last),
        generated_tokens_per_s=_sum(last, "rollout/generated_tokens") / total if sampled else None,
        trained_tokens_per_s=_sum(last, "learner/tokens") / total,
        shares=shares,
        actors_idle=idle if sampled else None,
        bottleneck=_bottleneck(shares, idle if sampled else None, overlapping=config.train.max_staleness > 0),
        present=present,
        best=best,
    )


def _sum(rows: Sequence[Row], name: str) -> float:
    return float(sum(row.get(name) or 0.0 for row in rows))


def _bottleneck(shares: Mapping[str, float], idle: float | None, *, overlapping: bool) -> str:
    """Return one sentence about the part that limits the run."""
    if idle is None:
        return f"the learner works {shares['learn']:.0%} of the time, and no actor takes part"
    side = max(("publish", "checkpoint", "evaluate"), key=lambda name: shares[name])
    if shares[side] > max(shares["rollout"], shares["learn"]):
        names = {"publish": "publishes", "checkpoint": "checkpoints", "evaluate": "evaluations"}
        return f"{names[side]} take {shares[side]:.0%} of the time, more than generation and learning"
    waits = f"the learner waits for trajectories {shares['rollout']:.0%} of the time, the actors are idle {idle:.0%}"
    if overlapping:
        if max(shares["rollout"], idle) < _NOTABLE:
            return f"none: {waits}"
        return f"{'generation' if shares['rollout'] >= idle else 'learning'}: {waits}"
    slower = "generation" if shares["rollout"] >= shares["learn"] else "learning"
    return f"{slower}: {waits}; they take turns, as train.max_staleness is 0"


def _splits(rows: Sequence[Row], config: Config) -> tuple[Split, Split] | tuple[None, None]:
    """Return the present and the best split of the devices; None if there is no choice.

    A step needs A engine-seconds of the actors and L seconds of the ranks. With a actors and r ranks it takes
    A/a + L/r + rest if they take turns, and max(A/a, L/r) + rest if they overlap. This takes the work to divide evenly.
    """
    count, ranks, width = config.actors.count, config.learner.ranks, config.actors.tensor_parallel_size
    devices = count * width + ranks
    if config.placement != "spread" or devices < 2 + width:
        return None, None
    evaluated = [row.get("time/evaluate_s") or 0.0 for row in rows]
    own = [row["time/step_s"] - seconds for row, seconds in zip(rows, evaluated, strict=True)]
    busy = [(1 - row["rollout/idle_policy"]) * seconds for row, seconds in zip(rows, own, strict=True)]
    engine_s = count * statistics.median(busy)
    rank_s = ranks * statistics.median(row.get("time/learn_s") or 0.0 for row in rows)
    rest = statistics.median((row.get("time/publish_s") or 0.0) + (row.get("time/checkpoint_s") or 0.0) for row in rows)

    def split(actors: int, ranks: int) -> Split:
        parts = engine_s / actors, rank_s / ranks
        return Split(actors=actors, ranks=ranks, step_s=(max if config.train.max_staleness else sum)(parts) + rest)

    possible = [split(actors, devices - actors * width) for actors in range(1, (devices - 1) // width + 1)]
    present, best = split(count, ranks), min(possible, key=lambda each: each.step_s)
    return present, best if best.step_s < (1 - _NOTABLE) * present.step_s else present
