"""Check the rules of devices: what may share one, and what one can do."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rlsys.config.schema import Config


def colocated_fit(config: Config) -> None:
    """Raise if actors and learner ranks cannot share their devices one to one and in turns."""
    if config.placement != "colocated":
        return
    if config.actors.count != config.learner.ranks:
        raise ValueError(
            "placement colocated puts one actor and one learner rank on each device: expected actors.count = "
            f"learner.ranks, found {config.actors.count} and {config.learner.ranks}"
        )
    if config.actors.tensor_parallel_size > 1:
        raise ValueError(
            "placement colocated: expected actors.tensor_parallel_size 1, found "
            f"{config.actors.tensor_parallel_size}; choose placement spread"
        )
    if config.train.max_staleness and "online" in config.stages:
        raise ValueError(
            "placement colocated: actors and learner work in turns, so expected train.max_staleness 0, found "
            f"{config.train.max_staleness}"
        )
    if config.weight_sync.transport == "collective":
        raise ValueError(
            "placement colocated: a broadcast needs the learner and the engines awake at once; expected "
            "weight_sync.transport object_store, found collective"
        )
    if config.run.device == "cuda" and config.learner.zero_stage == 0:
        raise ValueError(
            "placement colocated: expected learner.zero_stage 1, 2 or 3, whose states can leave the GPU, found 0"
        )
