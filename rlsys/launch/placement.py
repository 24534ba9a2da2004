"""Placement of the processes of a run: the bundles that Ray reserves, and the bundle indices of every role."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rlsys.config.engine_roles import ModelEngines
from rlsys.config.schema import Config

ROLLOUT, LEARNER = "rollout", "learner"
"""The roles of rollout actors and learner ranks. The roles of auxiliary engines are in `rlsys.trees.Role`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """Bundles of a placement group.

    Attributes:
        bundles: the resources of every process, or of the processes that share a device, by Ray's names ("CPU", "GPU").
        indices: the bundle indices of each role, one per process.
        colocated: whether rollout actor n and learner rank n share bundle n.
    """

    bundles: Sequence[Mapping[str, float]]
    indices: Mapping[str, range]
    colocated: bool = False


def place(config: Config, auxiliary: Sequence[ModelEngines] = (), *, learner: bool = False) -> Placement:
    """Give every process a bundle: rollout actors first, then auxiliary engines, then learner ranks.

    With `placement: colocated`, the ranks have the bundles of the actors.

    Args:
        config: the config of the processes.
        auxiliary: engines of other models than that of the rollout actors.
        learner: whether there are learner ranks.
    """
    counts = {ROLLOUT: (config.actors.count, config.actors.tensor_parallel_size)}
    counts |= {engines.role: (engines.actors.count, engines.actors.tensor_parallel_size) for engines in auxiliary}
    colocated = learner and config.placement == "colocated"
    if learner and not colocated:
        counts[LEARNER] = (config.learner.ranks, 1)
    bundles: list[Mapping[str, float]] = []
    indices = {}
    for role, (count, gpus) in counts.items():
        indices[role] = range(len(bundles), len(bundles) + count)
        bundles += [_bundle(config, gpus)] * count
    if colocated:
        indices[LEARNER] = indices[ROLLOUT]
        bundles[: config.actors.count] = [{**_bundle(config, 1), "CPU": 2.0}] * config.actors.count
    return Placement(bundles=bundles, indices=indices, colocated=colocated)


def _bundle(config: Config, gpus: int) -> dict[str, float]:
    return {"CPU": 1.0, **({"GPU": float(gpus)} if config.run.device == "cuda" else {})}
