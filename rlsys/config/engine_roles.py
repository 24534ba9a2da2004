"""Roles of the engines that write the nodes of trees.

The rollout actors have an engine themselves. Auxiliary engines serve the other models of a search.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from rlsys.config.schema import ActorsConfig, Config
from rlsys.config.search import SearchConfig
from rlsys.config.search_values import ModelValueConfig
from rlsys.config.served_model import ServedModelConfig
from rlsys.config.stages import stage_plans
from rlsys.errors import ConfigError
from rlsys.trees import Role

# An actor holds AHEAD times as many trees as keep its engine full, so that it can begin the next one at once.
AHEAD = 2
MINIMUM_AHEAD = 8
SHARED_FIELDS = (
    "count",
    "tensor_parallel_size",
    "dtype",
    "max_model_len",
    "max_num_seqs",
    "kv_cache_gib",
    "gpu_memory_utilization",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelEngines:
    """The engines of search.model, search.reviewer, search.value or teacher.model.

    Attributes:
        role: the role of the model.
        path: the folder of the model.
        actors: the number of engines and their settings.
    """

    role: Role
    path: Path
    actors: ActorsConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Searching:
    """The engines of a search, or of training with a teacher.

    Attributes:
        role: the role of the rollout actors' engines.
        auxiliary: the engines of the other models.
        grows_trees: whether the rollout actors are asked for trees.
    """

    role: Role = "policy"
    auxiliary: tuple[ModelEngines, ...] = ()
    grows_trees: bool = True


def searches_in_training(config: Config) -> bool:
    """Return whether a training run asks its actors for trees."""
    return any(plan.asks_for_trees for plan in stage_plans(config))


def describes_a_search(config: Config) -> bool:
    """Return whether the config sets anything that only a search uses."""
    return config.search != SearchConfig() or config.evaluation.search_answers > 0 or "search" in config.stages


def section_of(role: Role) -> str:
    """Return the name of the config section of a role that is not the policy."""
    return {"teacher": "teacher.model", "judge": "search.value"}.get(role, f"search.{role}")


def given_models(config: Config) -> dict[Role, ServedModelConfig]:
    """Return the sections of models other than the policy by role, without those that the config leaves out."""
    sections: dict[Role, ServedModelConfig | None] = {
        "model": config.search.model,
        "reviewer": config.search.reviewer,
        "judge": config.search.value if isinstance(config.search.value, ModelValueConfig) else None,
        "teacher": config.teacher.model,
    }
    return {role: section for role, section in sections.items() if section is not None}


def engine_settings(config: Config, role: Role, model: ServedModelConfig) -> ActorsConfig:
    """Return the section `actors` for the engines of another model.

    The fields of SHARED_FIELDS are those of that model; the rest is as for the policy.

    Raises:
        ConfigError: an engine over several devices on CPUs.
    """
    if model.tensor_parallel_size > 1 and config.run.device != "cuda":
        raise ConfigError(f"{section_of(role)}.tensor_parallel_size above 1 needs run.device: cuda")
    return config.actors.model_copy(update={name: getattr(model, name) for name in SHARED_FIELDS})


def trees_ahead(config: Config) -> int:
    """Return the number of trees that an actor holds at once, which keeps its engine busy.

    The number is small because the time limit of a tree begins when the actor receives it.
    """
    proposer = config.search.model or config.actors
    return max(MINIMUM_AHEAD, AHEAD * proposer.max_num_seqs // config.search.parallel_simulations)


def assign_search_roles(
    config: Config, policy: Path, engines: Mapping[Role, ModelEngines]
) -> tuple[Config, Path, Searching]:
    """Return the config and the model of the rollout actors of `rlsys search`, and the engines of the search.

    The rollout actors serve search.model if it is given, and otherwise the policy. If search.model is given, no engine
    serves the policy.

    Args:
        policy: the model folder of the policy.
        engines: the engines of search.model, search.reviewer and search.value, by role.
    """
    auxiliary = tuple(role_engines for role, role_engines in engines.items() if role in ("reviewer", "judge"))
    if "model" not in engines:
        return config, policy, Searching(auxiliary=auxiliary)
    proposer = engines["model"]
    serving = config.model_copy(update={"actors": proposer.actors})
    return serving, proposer.path, Searching(role="model", auxiliary=auxiliary)
