"""Check the rules of adapters (model.lora)."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rlsys.config.schema import Config


def adapter_has_no_critic(config: Config) -> None:
    """Raise if a policy with an adapter has a critic, which would be a whole second model."""
    if config.model.lora is not None and config.objective.value.used and "online" in config.stages:
        raise ValueError(
            "model.lora cannot be combined with a critic, which trains all weights of a second model: set "
            "objective.policy.estimator to another than gae and objective.value.weight to 0, or take model.lora out"
        )


def adapter_stays_on_its_device(config: Config) -> None:
    """Raise if frozen weights would have to leave a GPU, which DeepSpeed does not do for them."""
    if config.model.lora is not None and config.placement == "colocated" and config.run.device == "cuda":
        raise ValueError(
            "model.lora cannot be combined with placement colocated on run.device cuda: choose placement spread"
        )
