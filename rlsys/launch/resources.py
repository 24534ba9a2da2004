"""The resource plan of a command: memory and threads of its processes, compared with this machine."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from rlsys.config.engine_roles import ModelEngines, Searching, section_of
from rlsys.config.schema import ActorsConfig, Config
from rlsys.config.served_model import ServedModelConfig
from rlsys.config.stages import stage_plans
from rlsys.errors import ConfigError
from rlsys.models.folder import ModelFolder
from rlsys.trees import Role

GIB = 2**30
# Resident memory of a process that has imported its frameworks and holds no model (measured).
ACTOR_BASE_GIB = 1.2
RANK_BASE_GIB = 0.8
MINIMUM_STORE_BYTES = 512 * 2**20
BUCKETS_IN_STORE = 8
LARGEST_TENSOR = 0.5  # share of the policy that one or two buckets with the embedding can take
BYTES = {"fp32": 4, "bf16": 2}
COPIED_BYTES = 12  # master weight and two moments


@dataclass(frozen=True, slots=True)
class Need:
    """One line of a resource plan.

    Attributes:
        phase: the phase that needs the resource, or "all".
        resource: the resource with its unit.
        amount: the amount that is needed.
        available: the amount that this machine has.
        field: the config fields that lower the need.
    """

    phase: str
    resource: str
    amount: float
    available: float
    field: str

    @property
    def fits(self) -> bool:
        return self.amount <= self.available


@dataclass(frozen=True, slots=True, kw_only=True)
class ResourcePlan:
    """The processes of a command and their needs.

    Attributes:
        config: the config of the processes.
        auxiliary: engines of other models than that of the rollout actors.
        ranks: learner ranks; 0 without a learner.
        needs: needs on this machine; empty if the command joins a cluster elsewhere.
    """

    config: Config
    auxiliary: Sequence[ModelEngines]
    ranks: int
    needs: Sequence[Need]

    @property
    def gpus(self) -> int:
        """GPUs of all processes."""
        return count_gpus(self.config, [engines.actors for engines in self.auxiliary], self.ranks)

    def check(self) -> None:
        """Raise ConfigError for the first need beyond this machine."""
        for need in self.needs:
            if not need.fits:
                who = "the run" if need.phase == "all" else f"the {need.phase} phase"
                name, _, unit = need.resource.partition(", ")
                form = ".4g" if unit else ",.0f"  # GiB, or a count
                raise ConfigError(
                    f"{need.field}: {who} needs {need.amount:{form}} {f'{unit} of {name}' if unit else name}, "
                    f"this machine has {need.available:{form}}; lower one of them"
                )


def count_gpus(config: Config, others: Sequence[ActorsConfig | ServedModelConfig], ranks: int) -> int:
    """Return the number of GPUs of all processes of a command.

    Args:
        config: the config of the processes.
        others: the sections of the engines of other models than that of the rollout actors.
        ranks: learner ranks, which have the GPUs of the actors if they are colocated.
    """
    own = sum(section.count * section.tensor_parallel_size for section in (config.actors, *others))
    return own if config.placement == "colocated" else own + ranks


def plan_resources(
    config: Config,
    models: Mapping[Role, ModelFolder],
    searching: Searching | None,
    *,
    learner: bool,
    trained: int | None = None,
    held: ModelFolder | None = None,
) -> ResourcePlan:
    """Plan the needs of every phase. Rollout and learning alternate on CPUs. On GPUs, host memory holds no models.

    Args:
        config: the config of the processes.
        models: the models by role.
        searching: the engines of the search; None if the rollout actors only sample from the policy.
        learner: whether there are learner ranks.
        trained: number of parameters of the adapter that is trained; None if the whole policy is.
        held: the teacher that every learner rank holds.
    """
    auxiliary = searching.auxiliary if searching else ()
    ranks = config.learner.ranks if learner else 0
    needs: list[Need] = []
    if config.run.address == "local":
        served = models[searching.role if searching else "policy"].parameters
        published = served if trained is None else trained
        store = object_store_bytes(config, published) if learner else MINIMUM_STORE_BYTES
        rank = _rank_gib(config, served, trained) + (held.parameters * BYTES[config.learner.dtype] / GIB if held else 0)
        memory = _engines_gib(config, config.actors, served) + ranks * rank
        if learner:  # rank 0 keeps the published policy for actors that start late
            memory += published * BYTES[config.learner.dtype] / GIB
        memory += sum(_engines_gib(config, engines.actors, models[engines.role].parameters) for engines in auxiliary)
        needs = _memory_needs(memory + store / GIB, store, auxiliary, learner)
        if config.run.device == "cpu":
            needs += _thread_needs(config, auxiliary, ranks)
    return ResourcePlan(config=config, auxiliary=auxiliary, ranks=ranks, needs=needs)


def _memory_needs(memory_gib: float, store: int, auxiliary: Sequence[ModelEngines], learner: bool) -> list[Need]:
    own_fields = (
        "actors.count, actors.kv_cache_gib or learner.ranks" if learner else "actors.count or actors.kv_cache_gib"
    )
    store_fields = "model or learner.dtype (or, in a container, its --shm-size)"
    total = psutil.virtual_memory().total / GIB
    return [
        Need("all", "memory, GiB", memory_gib, total, _count_fields(auxiliary) + own_fields),
        Need("all", "shared memory, GiB", store / GIB, _shared_memory_bytes() / GIB, store_fields),
    ]


def _thread_needs(config: Config, auxiliary: Sequence[ModelEngines], ranks: int) -> list[Need]:
    cores = float(len(os.sched_getaffinity(0)))
    # The engines of one tree take turns, but those of many trees compute at the same time.
    sections = (config.actors, *(engines.actors for engines in auxiliary))
    threads = sum(actors.count * actors.threads for actors in sections)
    fields = f"{_count_fields(auxiliary)}actors.count or actors.threads"
    needs = [Need("rollout", "threads", threads, cores, fields)]
    if ranks:
        threads = ranks * config.learner.threads
        needs.append(Need("learning", "threads", threads, cores, "learner.ranks or learner.threads"))
    return needs


def _count_fields(auxiliary: Sequence[ModelEngines]) -> str:
    return "".join(f"{section_of(engines.role)}.count, " for engines in auxiliary)


def object_store_bytes(config: Config, parameters: int) -> int:
    """Return the size of Ray's object store, which holds a few buckets of the policy, and trajectories.

    Args:
        config: the config of the run.
        parameters: number of published parameters: those of the policy, or of its adapter.
    """
    policy = parameters * BYTES[config.learner.dtype]
    buckets = BUCKETS_IN_STORE * config.weight_sync.bucket_mib * 2**20
    return max(MINIMUM_STORE_BYTES, int(min(2.5 * policy, LARGEST_TENSOR * policy + buckets)))


def _engines_gib(config: Config, actors: ActorsConfig, parameters: int) -> float:
    """Return the host memory of all engines of a config section."""
    if config.run.device == "cuda":
        return actors.count * ACTOR_BASE_GIB
    return actors.count * (ACTOR_BASE_GIB + actors.kv_cache_gib + parameters * BYTES[actors.dtype] / GIB)


def _rank_gib(config: Config, parameters: int, trained: int | None) -> float:
    """Return the host memory of one rank: parameters, gradients, its optimizer state, the reference and the critic.

    Several updates per step, or a critic, also need the copies by which a non-finite step is rolled back. With an
    adapter, only its parameters are trained, and the base is the reference.
    """
    learner = config.learner
    width = BYTES[learner.dtype]
    share = learner.ranks if learner.zero_stage >= 1 else 1
    whole = 1 if learner.zero_stage < 3 else 1 / learner.ranks  # of the weights, on one rank
    # Two moments, and fp32 master weights for bf16. From ZeRO 1 on, DeepSpeed keeps master weights for fp32 too.
    state = (8.0 + (4 if learner.dtype != "fp32" or learner.zero_stage >= 1 else 0)) / share
    plans = stage_plans(config)
    models = 2 if any(plan.settings.critic for plan in plans) else 1
    several = models > 1 or any(plan.settings.updates_per_step > 1 for plan in plans)
    copies = COPIED_BYTES / share if several else 0.0
    reference = width if trained is None and any(plan.keeps_reference for plan in plans) else 0
    trained = parameters if trained is None else trained
    if config.run.device == "cuda":  # the reference is in host memory, unless it is partitioned
        states = models * (copies + (state if learner.optimizer_offload else 0.0))
        return RANK_BASE_GIB + (trained * states + parameters * reference * (whole == 1)) / GIB
    weights, states = (models * width + reference) * whole, models * (width * whole + state + copies)
    return RANK_BASE_GIB + (parameters * weights + trained * states) / GIB


def _shared_memory_bytes() -> int:
    """Return the free bytes of the file system that holds Ray's object store."""
    folder = Path("/dev/shm")  # noqa: S108 - Ray's choice; nothing is written here
    return shutil.disk_usage(folder).free if folder.is_dir() else 0
