"""Plan every stage: its loop, loss terms, data and reference policy.

docs/extending.md lists the other files of a new stage or loss term.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from rlsys.types import StageName

if TYPE_CHECKING:  # the config is checked by rules that use the plans
    from rlsys.config.objective import ObjectiveConfig
    from rlsys.config.schema import Config, OptimizerConfig

TERMS = ("policy", "kl", "value", "preference", "sft", "distill", "ranking", "custom")
"""The terms of the joint loss."""

TERMS_OF_STAGE: dict[StageName, tuple[str, ...]] = {
    "warm_start": ("sft", "distill"),
    "search": (),
    "sft": ("sft", "distill"),
    "preference": ("preference", "sft"),
    "online": TERMS,
}
_CONSTANT_WEIGHTS: tuple[StageName, ...] = ("warm_start", "sft")
"""Stages whose term sft has weight 1, whatever the section `objective` says."""

SEARCHED = "stage search:"
"""Stands for a config field in errors about files that the stage `search` has written."""

Loop = Literal["offline", "online", "search"]
Publishes = Literal["every step", "at its end", "never"]


@dataclass(frozen=True, slots=True, kw_only=True)
class StageSettings:
    """Settings of a stage for the learner ranks.

    Attributes:
        steps: training steps of the stage, >= 1.
        updates_per_step: optimizer updates of each training step.
        optimizer: the optimizer of the policy.
        critic: the optimizer of the critic; None for a stage without a critic.
        warmup_steps: first steps of the stage, in which the critic learns and the policy term has no weight.
        whole_teacher: whether the learner holds a teacher of the whole vocabulary.
    """

    stage: StageName
    steps: int
    updates_per_step: int
    optimizer: OptimizerConfig
    critic: OptimizerConfig | None = None
    warmup_steps: int = 0
    whole_teacher: bool = False

    @property
    def total_updates(self) -> int:
        """Optimizer updates of the stage, which is also the number of the critic's updates."""
        return self.steps * self.updates_per_step

    @property
    def policy_updates(self) -> int:
        """Optimizer updates of the policy."""
        return (self.steps - self.warmup_steps) * self.updates_per_step

    def sft_on_chosen(self, objective: ObjectiveConfig) -> bool:
        """Return whether the SFT term learns from the chosen side of preference pairs."""
        return self.stage == "preference" or objective.sft.source == "chosen"


@dataclass(frozen=True, slots=True, kw_only=True)
class DataSource:
    """Ordered data from which every step of a stage takes a part.

    Attributes:
        kind: worked examples of the task, supervised rows, or preference pairs.
        per_step: rows or pairs of one step.
        per_step_field: the config field that holds `per_step`.
        extracted: whether the stage `search` extracts the data.
    """

    kind: Literal["demonstrations", "rows", "pairs"]
    per_step: int
    per_step_field: str
    extracted: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class ExtractedTable:
    """A table that the stage `search` has extracted: its name without suffix, and the digest of its rows."""

    name: str
    digest: str


@dataclass(frozen=True, slots=True, kw_only=True)
class StagePlan:
    """Everything that differs between stages.

    Attributes:
        section: the config section with the number of training steps.
        loop: the loop that runs the stage. `offline` trains on data, `online` on rollouts, and `search` grows trees.
        steps: training steps; 0 for the stage `search`.
        progress_total: total of a progress display: training steps, or trees of the stage `search`.
        settings: settings for the learner ranks.
        publishes: when the learner's weights go to the actors while the stage trains. An offline stage publishes, for
            the evaluation, only if it is the last one.
        data: ordered data in addition to rollouts.
        keeps_reference: whether the learner keeps the policy that the stage began with.
        scores_pairs: whether that policy must score the pairs of a file before the first step.
        asks_for_trees: whether the actors are asked for trees.
        scores_rows: whether engines of the teacher must score the rows of a step that have no scores yet.
    """

    name: StageName
    section: str
    loop: Loop
    steps: int
    progress_total: int
    settings: StageSettings
    publishes: Publishes = "never"
    data: tuple[DataSource, ...] = ()
    keeps_reference: bool = False
    scores_pairs: bool = False
    asks_for_trees: bool = False
    scores_rows: bool = False

    @property
    def terms(self) -> tuple[str, ...]:
        """Terms of the joint loss that the stage can train."""
        return TERMS_OF_STAGE[self.name]

    @property
    def trains(self) -> bool:
        """Whether the stage changes the weights, and exports a policy at its end."""
        return self.loop != "search"

    def source(self, kind: str) -> DataSource | None:
        """Return the data source of a kind, or None if the stage has none."""
        return next((source for source in self.data if source.kind == kind), None)

    @property
    def reads_extracted(self) -> bool:
        """Whether the stage trains on data that the stage `search` has extracted."""
        return any(source.extracted for source in self.data)


def stage_plans(config: Config) -> tuple[StagePlan, ...]:
    """Return the plans of all stages of a run, in order."""
    return tuple(stage_plan(config, stage) for stage in config.stages)


def stage_plan(config: Config, stage: StageName) -> StagePlan:
    """Return the plan of a stage, which the run need not contain."""
    match stage:
        case "warm_start":
            rows = config.warm_start.rows_per_step
            return _offline(config, stage, config.warm_start.optimizer, _demonstrations(rows, "warm_start"))
        case "sft":
            rows_per_step = config.sft.rows_per_step
            return _offline(config, stage, config.sft.optimizer, _rows(config, rows_per_step, "sft"))
        case "preference":
            return _offline(config, stage, config.preference.optimizer, _pairs(config))
        case "search":
            return _search(config)
        case "online":
            return _online(config)


def _search(config: Config) -> StagePlan:
    return StagePlan(
        name="search",
        section="search",
        loop="search",
        steps=0,
        progress_total=config.search.prompts,
        settings=StageSettings(stage="search", steps=1, updates_per_step=1, optimizer=config.train.optimizer),
        asks_for_trees=True,
    )


def _online(config: Config) -> StagePlan:
    objective, train = config.objective, config.train
    sft = objective.sft
    rows: tuple[DataSource, ...] = ()
    if sft.used or objective.distill.on_rows:
        if sft.source == "demonstrations":
            rows = (_demonstrations(sft.rows_per_step, "objective.sft"),)
        elif sft.source == "file":
            rows = (_rows(config, sft.rows_per_step, "objective.sft"),)
    pairs_online = term_with_pairs(objective) and objective.preference.source == "file"
    pairs = (_pairs(config),) if pairs_online else ()
    return StagePlan(
        name="online",
        section="train",
        loop="online",
        steps=train.max_steps,
        progress_total=train.max_steps,
        settings=StageSettings(
            stage="online",
            steps=max(1, train.max_steps),
            updates_per_step=train.updates_per_step,
            optimizer=train.optimizer,
            critic=train.critic_optimizer if objective.value.used else None,
            warmup_steps=objective.value.warmup_steps,
            whole_teacher=objective.distill.used and objective.distill.divergence == "whole",
        ),
        publishes="every step",
        data=(*rows, *pairs),
        keeps_reference=(objective.policy.used and objective.kl.used)
        or (objective.preference.used and objective.preference.source == "search")
        or (objective.distill.used and objective.distill.divergence == "whole" and not config.teacher.in_learner),
        scores_pairs=bool(pairs) and objective.preference.used,
        asks_for_trees=config.search.online,
        scores_rows=bool(rows) and _scores_rows(config),
    )


def _offline(config: Config, stage: StageName, optimizer: OptimizerConfig, source: DataSource) -> StagePlan:
    steps: int = getattr(config, stage).max_steps
    distill = config.objective.distill
    whole = source.kind != "pairs" and distill.on_rows and distill.divergence == "whole"
    return StagePlan(
        name=stage,
        section=stage,
        loop="offline",
        steps=steps,
        progress_total=steps,
        settings=StageSettings(
            stage=stage, steps=max(1, steps), updates_per_step=1, optimizer=optimizer, whole_teacher=whole
        ),
        publishes="at its end" if config.stages[-1] == stage else "never",
        data=(source,),
        scores_pairs=source.kind == "pairs" and config.objective.preference.used,
        scores_rows=source.kind != "pairs" and _scores_rows(config),
        keeps_reference=whole and not config.teacher.in_learner,
    )


def _scores_rows(config: Config) -> bool:
    return config.objective.distill.on_rows and config.teacher.model is not None


def term_with_pairs(objective: ObjectiveConfig) -> str | None:
    """Return the term of the stage `online` that trains on preference pairs, as a config field, or None."""
    if objective.preference.used:
        return "objective.preference.weight"
    sft = objective.sft
    return "objective.sft.weight with source chosen" if sft.used and sft.source == "chosen" else None


def _demonstrations(per_step: int, section: str) -> DataSource:
    return DataSource(kind="demonstrations", per_step=per_step, per_step_field=f"{section}.rows_per_step")


def _rows(config: Config, per_step: int, section: str) -> DataSource:
    return DataSource(
        kind="rows",
        per_step=per_step,
        per_step_field=f"{section}.rows_per_step",
        extracted=not config.sft.path,
    )


def _pairs(config: Config) -> DataSource:
    return DataSource(
        kind="pairs",
        per_step=config.preference.pairs_per_step,
        per_step_field="preference.pairs_per_step",
        extracted=not config.preference.path,
    )


def term_weights(objective: ObjectiveConfig, settings: StageSettings, step: int) -> dict[str, float]:
    """Return the weights of a training step's loss terms by name, without terms of weight 0.

    Args:
        step: the training step within the stage, from 0.
    """
    terms = TERMS_OF_STAGE[settings.stage]
    if settings.stage in _CONSTANT_WEIGHTS:
        distill = objective.distill
        weight = distill.weight_at(step, settings.steps) if distill.on_rows else 0.0
        return {"sft": 1.0, "distill": weight} if weight else {"sft": 1.0}
    weights = {term: getattr(objective, term).weight_at(step, settings.steps) for term in terms}
    if step < objective.value.warmup_steps:
        weights.pop("policy", None)
    if not weights.get("policy"):
        weights.pop("custom", None)
    if not weights.get("policy") or objective.kl.in_reward:
        weights.pop("kl", None)
    return {term: weight for term, weight in weights.items() if weight > 0}
