"""What a run needs of the machine it starts on: threads of each phase, and memory."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from rlsys.config.engine_roles import ModelEngines
from rlsys.config.schema import ActorsConfig, Config
from rlsys.config.stages import stage_plans
from rlsys.errors import ConfigError
from rlsys.models.scratch import tensor_header

GIB = 2**30
# Resident memory of a process that has imported its frameworks and holds no model (measured).
ACTOR_BASE_GIB = 1.2
RANK_BASE_GIB = 0.8
MINIMUM_STORE_BYTES = 512 * 2**20
VERSIONS_IN_STORE = 2.5
BYTES = {"fp32": 4, "bf16": 2}
COPIED_BYTES = 12  # master weight and two moments


@dataclass(frozen=True, slots=True)
class Need:
    """One line of the plan. field: what to change in the config."""

    phase: str
    what: str
    amount: float
    available: float
    field: str

    @property
    def fits(self) -> bool:
        return self.amount <= self.available


def plan(config: Config, model: Path, learner: bool = True, beside: Sequence[ModelEngines] = ()) -> list[Need]:
    """Needs of every phase against this machine; none where the run joins a cluster elsewhere.

    Rollout and learning alternate on CPUs. On GPUs, memory of this machine holds no models.

    Args:
        learner: False for the actors alone.
        beside: engines of other models, which write nodes of trees.
    """
    if config.run.address != "local":
        return []
    cores = float(len(os.sched_getaffinity(0)))
    parameters = parameter_count(model)
    store = object_store_bytes(config, parameters) if learner else MINIMUM_STORE_BYTES
    ranks = config.learner.ranks if learner else 0
    memory = _engines_gib(config, config.actors, parameters) + ranks * _rank_gib(config, parameters)
    memory += sum(_engines_gib(config, engines.actors, parameter_count(engines.path)) for engines in beside)
    memory_fields = (
        "actors.count, actors.kv_cache_gib or learner.ranks" if learner else "actors.count or actors.kv_cache_gib"
    )
    others = "".join(f"search.{engines.writer}.count, " for engines in beside)
    store_fields = "model or learner.dtype (or, in a container, its --shm-size)"
    needs = [
        Need("all", "memory, GiB", memory + store / GIB, psutil.virtual_memory().total / GIB, others + memory_fields),
        Need("all", "shared memory, GiB", store / GIB, _shared_memory_bytes() / GIB, store_fields),
    ]
    if config.run.device == "cpu":
        # Engines of a tree's models take turns, but those of many trees compute at the same time.
        threads = sum(actors.count * actors.threads for actors in (config.actors, *(e.actors for e in beside)))
        needs.append(Need("rollout", "threads", threads, cores, f"{others}actors.count or actors.threads"))
        if learner:
            threads = ranks * config.learner.threads
            needs.append(Need("learning", "threads", threads, cores, "learner.ranks or learner.threads"))
    return needs


def check(needs: Sequence[Need]) -> None:
    """Raises ConfigError for the first need beyond the machine's."""
    for need in needs:
        if not need.fits:
            who = "the run" if need.phase == "all" else f"the {need.phase} phase"
            raise ConfigError(
                f"{need.field}: {who} needs {need.amount:.4g} {need.what}, "
                f"this machine has {need.available:.4g}; lower one of them"
            )


def object_store_bytes(config: Config, parameters: int) -> int:
    """Size of Ray's object store: during a publish it holds two versions of the policy, besides trajectories."""
    return max(MINIMUM_STORE_BYTES, int(VERSIONS_IN_STORE * parameters * BYTES[config.learner.dtype]))


def _engines_gib(config: Config, actors: ActorsConfig, parameters: int) -> float:
    """Host memory of all actors of a section."""
    if config.run.device == "cuda":
        return actors.count * ACTOR_BASE_GIB
    return actors.count * (ACTOR_BASE_GIB + actors.kv_cache_gib + parameters * BYTES[actors.dtype] / GIB)


def _rank_gib(config: Config, parameters: int) -> float:
    """Host memory of one rank: parameters, gradients, its part of the optimizer's state; a reference and a critic.

    With several updates a step, or a critic, also copies by which a step that is not finite is taken back.
    """
    learner = config.learner
    width = BYTES[learner.dtype]
    share = learner.ranks if learner.zero_stage >= 1 else 1
    # Two moments, and master weights: beside bf16, and from ZeRO 1 on DeepSpeed keeps its own in fp32 too.
    state = (8.0 + (4 if learner.dtype != "fp32" or learner.zero_stage >= 1 else 0)) / share
    stages = [plan.settings for plan in stage_plans(config)]
    models = 2 if any(stage.critic for stage in stages) else 1
    several = models > 1 or any(stage.updates_per_step > 1 for stage in stages)
    copies = COPIED_BYTES / share if several else 0.0
    if config.run.device == "cuda":
        return RANK_BASE_GIB + models * parameters * (copies + (state if learner.optimizer_offload else 0.0)) / GIB
    reference = width if any(plan.keeps_reference for plan in stage_plans(config)) else 0
    return RANK_BASE_GIB + parameters * (models * (2 * width + state + copies) + reference) / GIB


def _shared_memory_bytes() -> int:
    """Free bytes of the file system that Ray's object store lies in."""
    folder = Path("/dev/shm")  # noqa: S108 - Ray's choice; nothing is written here
    return shutil.disk_usage(folder).free if folder.is_dir() else 0


def parameter_count(model: Path) -> int:
    """Elements of all tensors in a folder's safetensors files, from their headers."""
    files = sorted(model.glob("*.safetensors"))
    return sum(math.prod(tensor["shape"]) for path in files for tensor in tensor_header(path).values())
