"""Settings of rollout actors that do not change during a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlsys.config.environment import EnvironmentConfig
from rlsys.config.rewards import RewardsConfig
from rlsys.config.schema import ActorsConfig, LoraConfig, SamplingConfig
from rlsys.config.search import ExtractConfig, SearchConfig
from rlsys.config.tasks import TaskConfig
from rlsys.trees import Role


@dataclass(frozen=True, slots=True)
class TeacherEngines:
    """The teacher of an actor.

    Attributes:
        handles: Ray handles of its ModelActors.
        tokens: Number of its most probable tokens at every place; None for the sampled token alone.
    """

    handles: Sequence[Any]
    tokens: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ActorSettings:
    """Settings of one rollout actor.

    Attributes:
        attempt: Number of earlier processes with this name.
        weight_timeout_s: Seconds until learner rank 0 counts as lost that does not answer a question for weights.
        seed: run.seed.
        environment: Environment in use; None without one.
        folder: Folder in which the command was started; see `rlsys.plugins.load_plugin`.
        lora: Section `model.lora`; None if the actor serves whole models.
        adapter: Folder of the adapter to begin with; None for one that changes nothing.
        shares_device: Whether the engine must be able to sleep while the learner uses the device.
        teacher: The teacher that scores all trajectories; None without one.
        search: Section `search`; None if the actor never searches. All later fields concern only the search.
        role: Role of the actor's own engine in a tree: "policy", or "model" in `rlsys search` with search.model.
        auxiliary_handles: Ray handles of the ModelActors, for every other role.
        auxiliary_paths: Model folder of every other role.
    """

    name: str
    attempt: int
    model_path: Path
    device: str
    seed: int
    actors: ActorsConfig
    task: TaskConfig
    rewards: RewardsConfig
    log_file: str
    environment: EnvironmentConfig | None = None
    folder: str = ""
    lora: LoraConfig | None = None
    adapter: Path | None = None
    shares_device: bool = False
    weight_timeout_s: float = 60.0
    teacher: TeacherEngines | None = None
    search: SearchConfig | None = None
    extract: ExtractConfig = field(default_factory=ExtractConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    role: Role = "policy"
    auxiliary_handles: Mapping[Role, Sequence[Any]] = field(default_factory=dict)
    auxiliary_paths: Mapping[Role, Path] = field(default_factory=dict)
