"""Start the processes of a run in their bundles: rollout actors, auxiliary engines and learner ranks."""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ray

from actors.engine_build import engine_environment
from actors.model_actor import ModelActor, ModelSettings
from actors.rollout_actor import RolloutActor
from actors.settings import ActorSettings, TeacherEngines
from learners.learner_actor import TRANSFER, WATCH, LearnerActor
from learners.settings import RankSettings, learner_environment
from rlsys.config.engine_roles import ModelEngines, Searching
from rlsys.config.environment import active_environment
from rlsys.config.schema import LoraConfig
from rlsys.control.fleet import Fleet
from rlsys.control.shared_device import SharedDevice
from rlsys.directory import RunDirectory
from rlsys.launch.colocated import ColocatedActor
from rlsys.launch.placement import ROLLOUT, Placement, place
from rlsys.launch.ray_cluster import RENDEZVOUS, Cluster
from rlsys.launch.remote import RayActor
from rlsys.models.folder import ModelFolder, is_adapter
from rlsys.plugins import command_folder
from rlsys.trees import Role

# Concurrent calls of one actor. With Ray's default of 1000, calls for statistics would wait behind trees.
MAX_CALLS = 10_000
SHARE = 0.5  # of a GPU, for an actor or a rank that share it


@dataclass(frozen=True, slots=True)
class AdaptedModel:
    """The base model of policies that are adapters: its folder, and the section `model.lora`."""

    base: Path
    lora: LoraConfig


@contextlib.asynccontextmanager
async def rollout_pool(
    cluster: Cluster,
    model: Path,
    searching: Searching | None = None,
    replacement_model: Callable[[], Path] | None = None,
    say: Callable[[str], None] = lambda _text: None,
    device: SharedDevice | None = None,
    adapted: AdaptedModel | None = None,
) -> AsyncIterator[Fleet]:
    """Start the rollout actors and auxiliary engines; close them at the end of the block.

    Args:
        cluster: the Ray that starts them.
        model: the model folder that the rollout actors load.
        searching: the engines of the search; None if the actors grow no trees.
        replacement_model: returns the model folder of a replaced actor; None if it is `model`. The actor gets the
            current weights before it serves.
        say: gets a message about every lost actor.
        device: the devices that the actors share with the learner; None if they have devices of their own.
        adapted: the base model, if the actors serve adapters.
    """
    config = cluster.config
    auxiliary = searching.auxiliary if searching else ()
    placement = place(config, auxiliary)
    environment = engine_environment(config.actors, config.run.device)
    handles = _auxiliary_handles(cluster, auxiliary, placement)

    def spawn(number: int, attempt: int) -> RayActor:
        folder = replacement_model() if replacement_model and attempt else model
        settings = adapted_settings(_actor_settings(cluster, number, attempt, folder, searching, handles), adapted)
        gpus = SHARE if device else config.actors.tensor_parallel_size
        options = cluster.options(placement.indices[ROLLOUT][number], gpus, environment)
        if device:
            return ColocatedActor(lambda: _start(RolloutActor, options, settings), config, f"actor {number}", device)
        return RayActor(_start(RolloutActor, options, settings), config, f"actor {number}")

    engines = [
        (role, number, RayActor(handle, config, f"{role} engine {number}"))
        for role, role_handles in handles.items()
        for number, handle in enumerate(role_handles)
    ]
    async with Fleet(
        spawn,
        config.actors.count,
        max_restarts=config.actors.max_restarts,
        hang_timeout_s=config.actors.hang_timeout_s,
        role=searching.role if searching else "policy",
        auxiliary=engines,
        say=say,
    ) as pool:
        yield pool


def _start(kind: type, options: Mapping[str, Any], settings: Any) -> Any:
    """Start an actor that takes calls out of order, and while others are under way."""
    return ray.remote(kind).options(**options, max_concurrency=MAX_CALLS).remote(settings)


def _actor_settings(
    cluster: Cluster,
    number: int,
    attempt: int,
    model: Path,
    searching: Searching | None,
    handles: Mapping[Role, Sequence[Any]],
) -> ActorSettings:
    """Return the settings of a rollout actor; `handles` are those of the auxiliary engines."""
    config = cluster.config
    teacher, search = None, dict[str, Any]()
    if "teacher" in handles:
        teacher = TeacherEngines(handles["teacher"], config.objective.distill.scored_tokens)
    if searching and searching.grows_trees:
        search = {
            "search": config.search,
            "extract": config.extract,
            "sampling": config.sampling,
            "role": searching.role,
            "auxiliary_handles": {role: each for role, each in handles.items() if role != "teacher"},
            "auxiliary_paths": {engines.role: engines.path for engines in searching.auxiliary},
        }
    return ActorSettings(
        name=f"{number}",
        attempt=attempt,
        model_path=model,
        device=config.run.device,
        seed=config.run.seed,
        actors=config.actors,
        task=config.task,
        rewards=config.rewards,
        environment=active_environment(config.environment, config.task),
        folder=command_folder(),
        log_file=str(RunDirectory(cluster.run_dir).logs / f"actor-{number}.log"),
        shares_device=config.placement == "colocated",
        weight_timeout_s=config.weight_sync.timeout_s,
        teacher=teacher,
        **search,
    )


def adapted_settings(settings: ActorSettings, adapted: AdaptedModel | None) -> ActorSettings:
    """Return the settings of an actor that serves an adapter, if its policies are adapters of one base model."""
    if adapted is None:
        return settings
    adapter = settings.model_path if is_adapter(settings.model_path) else None
    return replace(settings, model_path=adapted.base, lora=adapted.lora, adapter=adapter)


def _auxiliary_handles(
    cluster: Cluster, auxiliary: Sequence[ModelEngines], placement: Placement
) -> dict[Role, list[Any]]:
    """Start the engines of other models; return their handles by role."""
    config = cluster.config
    handles: dict[Role, list[Any]] = {}
    for engines in auxiliary:
        environment = engine_environment(engines.actors, config.run.device)
        for number, bundle in enumerate(placement.indices[engines.role]):
            settings = ModelSettings(
                name=f"{engines.role} engine {number}",
                model_path=engines.path,
                device=config.run.device,
                actors=engines.actors,
                log_file=str(RunDirectory(cluster.run_dir).logs / f"{engines.role}-{number}.log"),
            )
            options = cluster.options(bundle, engines.actors.tensor_parallel_size, environment)
            handles.setdefault(engines.role, []).append(_start(ModelActor, options, settings))
    return handles


def learner_handles(
    cluster: Cluster,
    bundles: Sequence[int],
    pad_token_id: int,
    attempt: int,
    base: Path,
    teacher: ModelFolder | None = None,
) -> list[Any]:
    """Start the learner ranks and return their handles. Every attempt has its own rendezvous file.

    Args:
        cluster: the Ray that starts them.
        bundles: the bundle index of every rank.
        pad_token_id: the token that fills up rows of a batch.
        attempt: number of earlier restarts of the learner.
        base: the initial policy, which is the base model of adapters.
        teacher: the model `teacher.in_learner`; None for none.
    """
    config = cluster.config
    store = cluster.run_dir / f"{RENDEZVOUS}{uuid.uuid4().hex}"
    handles = []
    for rank, bundle in enumerate(bundles):
        settings = RankSettings(
            rank=rank,
            ranks=config.learner.ranks,
            device=config.run.device,
            store=str(store),
            seed=config.run.seed,
            pad_token_id=pad_token_id,
            temperature=config.sampling.temperature,
            max_tokens=config.sampling.max_tokens,
            learner=config.learner,
            objective=config.objective,
            weight_sync=config.weight_sync,
            engine_workers=config.actors.tensor_parallel_size,
            attempt=attempt,
            lora=config.model.lora,
            base=base,
            teacher=teacher.path if teacher else None,
        )
        environment = learner_environment(config.learner, config.run.device, rank)
        options = cluster.options(bundle, SHARE if config.placement == "colocated" else 1, environment)
        log_file = str(RunDirectory(cluster.run_dir).logs / f"learner-{rank}.log")
        handles.append(start_rank(LearnerActor, options, settings, log_file, takers=config.actors.count))
    return handles


def start_rank(kind: type, options: Mapping[str, Any], *arguments: Any, takers: int = 1) -> Any:
    """Start the process of a learner rank, which answers calls of two groups while another call runs.

    Its calls carry no order, so that none waits for a lost one. The driver makes one call for training at a time, and
    the rank has one thread for them.

    Args:
        takers: number of actors that take weights at the same time. Lost ones may still wait for an answer.
    """
    actor = ray.remote(concurrency_groups={WATCH: 1, TRANSFER: 2 * takers})(kind)
    return actor.options(**options, allow_out_of_order_execution=True).remote(*arguments)
