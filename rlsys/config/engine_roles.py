"""Which engines write the nodes of trees: the rollout actors' own, and those of other models beside them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from rlsys.config.schema import ActorsConfig, Config
from rlsys.config.search import SearchConfig, SearchModelConfig
from rlsys.config.stages import stage_plans
from rlsys.errors import ConfigError
from rlsys.trees import Role

# Trees that an actor may hold, over those that keep its engine full: it starts on what waits without asking.
AHEAD = 2
MINIMUM_AHEAD = 8
SHARED_FIELDS = ("count", "tensor_parallel_size", "dtype", "max_model_len", "max_num_seqs", "kv_cache_gib")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelEngines:
    """Engines of search.model or search.reviewer. actors: the settings of one, and how many there are."""

    writer: Role
    path: Path
    actors: ActorsConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Searching:
    """How rollout actors search. writer: what their own engine is to a tree; beside: engines of other models."""

    writer: Role = "policy"
    beside: tuple[ModelEngines, ...] = ()


def searches_in_training(config: Config) -> bool:
    """Whether the actors of a training run are asked for trees."""
    return any(plan.asks_for_trees for plan in stage_plans(config))


def describes_a_search(config: Config) -> bool:
    """Whether a command is meant to search with this config."""
    return config.search != SearchConfig() or config.evaluation.search_answers > 0 or "search" in config.stages


def given_models(config: Config) -> dict[Role, SearchModelConfig]:
    """Those of search.model and search.reviewer that the config gives."""
    both: dict[Role, SearchModelConfig | None] = {"model": config.search.model, "reviewer": config.search.reviewer}
    return {writer: model for writer, model in both.items() if model is not None}


def engine_settings(config: Config, writer: Role, model: SearchModelConfig) -> ActorsConfig:
    """The section `actors` as it is for a model of the search: its own sizes, the rest as for the policy.

    Raises:
        ConfigError: an engine over several devices on CPUs.
    """
    if model.tensor_parallel_size > 1 and config.run.device != "cuda":
        raise ConfigError(f"search.{writer}.tensor_parallel_size above 1 needs run.device: cuda")
    return config.actors.model_copy(update={name: getattr(model, name) for name in SHARED_FIELDS})


def trees_ahead(config: Config) -> int:
    """Trees that one actor holds at once: enough that its engine is never short of work.

    No more, since the time that a tree may take runs from when it is handed over.
    """
    proposer = config.search.model or config.actors
    return max(MINIMUM_AHEAD, AHEAD * proposer.max_num_seqs // config.search.parallel_simulations)


def growing(config: Config, policy: Path, engines: Mapping[Role, ModelEngines]) -> tuple[Config, Path, Searching]:
    """Config and model of the rollout actors of `rlsys search`, and how they search.

    Where search.model is given they serve that, and nobody serves the policy.
    """
    beside = tuple(found for writer, found in engines.items() if writer != "model")
    if "model" not in engines:
        return config, policy, Searching(beside=beside)
    own = engines["model"]
    return config.model_copy(update={"actors": own.actors}), own.path, Searching(writer="model", beside=beside)
