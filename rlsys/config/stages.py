"""What the learner ranks are told of a stage."""

from __future__ import annotations

from dataclasses import dataclass

from rlsys.config.objective import ObjectiveConfig
from rlsys.config.schema import Config, OptimizerConfig, StageName

TERMS = ("policy", "kl", "value", "preference", "sft")
"""The terms of the joint loss."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StageSettings:
    """steps, updates_per_step: training steps of the stage, and optimizer updates of each.

    critic: the optimizer of the critic; None where the stage has none. warmup_steps: of `steps`, the first ones in
    which only the critic learns.
    """

    stage: StageName
    steps: int
    updates_per_step: int
    optimizer: OptimizerConfig
    critic: OptimizerConfig | None = None
    warmup_steps: int = 0

    @property
    def total_updates(self) -> int:
        """Optimizer updates of the stage, hence of the critic."""
        return self.steps * self.updates_per_step

    @property
    def policy_updates(self) -> int:
        """Those of the policy."""
        return (self.steps - self.warmup_steps) * self.updates_per_step


def stage_settings(config: Config, stage: StageName) -> StageSettings:
    """The settings of a stage. The stage search trains nothing: its learner only hands its weights out."""
    online, value = stage == "online", config.objective.value
    optimizers = {
        "warm_start": config.warm_start.optimizer,
        "search": config.train.optimizer,
        "sft": config.sft.optimizer,
        "preference": config.preference.optimizer,
        "online": config.train.optimizer,
    }
    return StageSettings(
        stage=stage,
        steps=max(1, config.max_steps(stage)),
        updates_per_step=config.train.updates_per_step if online else 1,
        optimizer=optimizers[stage],
        critic=config.train.critic_optimizer if online and value.used else None,
        warmup_steps=value.warmup_steps if online else 0,
    )


def term_weights(objective: ObjectiveConfig, settings: StageSettings, step: int) -> dict[str, float]:
    """Weights of the terms that a training step has, by name; those of weight 0 are left out.

    Args:
        step: of the stage, from 0.
    """
    match settings.stage:
        case "warm_start" | "sft":
            return {"sft": 1.0}
        case "preference":
            names: tuple[str, ...] = ("preference", "sft")
        case "online":
            names = TERMS
        case "search":
            names = ()
    found = {name: getattr(objective, name).weight_at(step, settings.steps) for name in names}
    if step < objective.value.warmup_steps:
        found.pop("policy", None)
    if not found.get("policy") or objective.kl.in_reward:
        found.pop("kl", None)
    return {name: weight for name, weight in found.items() if weight > 0}
