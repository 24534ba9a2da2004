"""Measure the rates of a run from the times of its last steps, and estimate a balanced split of its processes."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rlsys.config.schema import Config
from rlsys.display import STEPS_IN_MEDIAN
from rlsys.run.step_times import Row, bottleneck, idle_shares, is_timed, part_shares, rollout_seconds

WINDOW = STEPS_IN_MEDIAN
_NOTABLE = 0.05  # a smaller gain is not worth a change


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
        shares: shares of the parts of the time of the steps; see `rlsys.run.step_times.PARTS`.
        actors_idle: share of the time in which the engines of the actors are idle; None without rollouts.
        bottleneck: the sentence about who waits for whom.
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


def last_steps(rows: Sequence[Row]) -> list[Row]:
    """Return the last WINDOW steps of the rows of a stage."""
    return [row for row in rows if is_timed(row)][-WINDOW:]


def measure(rows: Sequence[Row], config: Config) -> Throughput | None:
    """Return what the rows of one stage say about its last WINDOW steps; None without steps."""
    last = last_steps(rows)
    if not last:
        return None
    total = _sum(last, "time/step_s")
    sampled = [row for row in last if row.get("rollout/idle_policy") is not None]
    present, best = _splits(sampled, config) if sampled else (None, None)
    return Throughput(
        steps=len(last),
        step_s=statistics.median(row["time/step_s"] for row in last),
        generated_tokens_per_s=_sum(last, "rollout/generated_tokens") / total if sampled else None,
        trained_tokens_per_s=_sum(last, "learner/tokens") / total,
        shares=part_shares(last),
        actors_idle=idle_shares(last).get("actors"),
        bottleneck=bottleneck(last, overlapping=config.train.max_staleness > 0),
        present=present,
        best=best,
    )


def _sum(rows: Sequence[Row], name: str) -> float:
    return float(sum(row.get(name) or 0.0 for row in rows))


def _splits(rows: Sequence[Row], config: Config) -> tuple[Split, Split] | tuple[None, None]:
    """Return the present and the best split of the devices; None if there is no choice.

    A step needs A engine-seconds of the actors and L seconds of the ranks. With a actors and r ranks it takes
    A/a + L/r + rest if they take turns, and max(A/a, L/r) + rest if they overlap. This takes the work to divide evenly.
    """
    count, ranks, width = config.actors.count, config.learner.ranks, config.actors.tensor_parallel_size
    devices = count * width + ranks
    if config.placement != "spread" or devices < 2 + width:
        return None, None
    engine_s = count * statistics.median((1 - row["rollout/idle_policy"]) * rollout_seconds(row) for row in rows)
    rank_s = ranks * statistics.median(row.get("time/learn_s") or 0.0 for row in rows)
    rest = statistics.median((row.get("time/publish_s") or 0.0) + (row.get("time/checkpoint_s") or 0.0) for row in rows)

    def split(actors: int, ranks: int) -> Split:
        parts = engine_s / actors, rank_s / ranks
        return Split(actors=actors, ranks=ranks, step_s=(max if config.train.max_staleness else sum)(parts) + rest)

    possible = [split(actors, devices - actors * width) for actors in range(1, (devices - 1) // width + 1)]
    present, best = split(count, ranks), min(possible, key=lambda each: each.step_s)
    return present, best if best.step_s < (1 - _NOTABLE) * present.step_s else present
