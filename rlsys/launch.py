"""Composition root: Ray, placement group, actors, learner ranks; builds the parts and runs the controller."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import shutil
import signal
import tempfile
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Without this, Ray binds its services to every interface. It must be set before ray is imported.
os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
# Ray runs its workers at nice 15, which starves them beside anything else.
os.environ.setdefault("RAY_worker_niceness", "0")
# The raylet drains for 30 s on SIGTERM; here nobody else uses it.
os.environ.setdefault("RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S", "0")

import psutil
import ray
from ray.util.placement_group import PlacementGroup, placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from actors.engine import engine_environment
from actors.rollout_actor import ActorSettings, RolloutActor
from learners.learner_actor import LearnerActor
from learners.rank_settings import RankSettings, learner_environment
from rlsys import resources
from rlsys.checkpoint import CheckpointStore, RunLock
from rlsys.config import Config
from rlsys.config_file import dump_config
from rlsys.controller import Controller, Parts
from rlsys.display import Display
from rlsys.errors import ConfigError
from rlsys.inputs import Inputs
from rlsys.metrics import MetricsWriter
from rlsys.process import kill_and_wait, kill_with_this_process
from rlsys.remote import RayLearner, RayRolloutPool
from rlsys.resume import Start, find_start
from rlsys.setup import prepare_model, tokenizer_files
from rlsys.types import Prompt
from rlsys.weights import WeightBus

PLACEMENT_TIMEOUT_S = 180.0
SHUTDOWN_TIMEOUT_S = 10.0
TEMPORARY_NOTE = ".temporary-folder"
RENDEZVOUS = ".rendezvous-"
Measure = Callable[[RayRolloutPool, list[Prompt], Config], Awaitable[dict[str, Any]]]


@dataclass(frozen=True, slots=True)
class Cluster:
    """A running Ray and the bundles of a placement group: actors first, then learner ranks."""

    group: PlacementGroup
    config: Config
    run_dir: Path
    temporary: Path

    def options(self, bundle: int, gpus: int, environment: dict[str, str]) -> dict[str, Any]:
        strategy = PlacementGroupSchedulingStrategy(self.group, placement_group_bundle_index=bundle)
        return {
            "num_cpus": 1,
            "num_gpus": gpus if self.config.run.device == "cuda" else 0,
            "scheduling_strategy": strategy,
            "runtime_env": {"env_vars": environment},
            "max_restarts": 0,
            "max_task_retries": 0,
        }


def train(config: Config) -> None:
    """Run a config to its end.

    Raises:
        RlsysError: every expected failure; InterruptedRunError after SIGINT or SIGTERM, with the state saved.
    """
    run_dir = Path(config.run.dir).absolute()
    with RunLock(run_dir):
        store = CheckpointStore(run_dir / "checkpoints", config.checkpoint.keep_last)
        store.sweep()
        start = find_start(config, run_dir, store)
        model = prepare_model(config, run_dir)
        resources.check(resources.plan(config, model))
        inputs = Inputs(config, model)  # bad data must be found before anything is started
        (run_dir / "config.yaml").write_text(dump_config(config))  # a refused command leaves the run's own
        bundles = actor_bundles(config) + rank_bundles(config)
        with ray_cluster(config, run_dir, bundles) as cluster, Display(totals=_totals(config)) as display:
            asyncio.run(_train(cluster, store, start, model, inputs, display))


async def evaluate_policy(policy: Path, config: Config, measure: Measure) -> dict[str, Any]:
    """Start actors alone on a policy folder and let `measure` use them on the held-out prompts."""
    resources.check(resources.plan(config, policy))
    inputs = Inputs(config, policy)
    with (
        tempfile.TemporaryDirectory() as folder,
        ray_cluster(config, Path(folder), actor_bundles(config)) as cluster,
    ):
        async with rollout_pool(cluster, policy) as pool:
            return await measure(pool, inputs.held_out, config)


async def _train(
    cluster: Cluster, store: CheckpointStore, start: Start, model: Path, inputs: Inputs, display: Display
) -> None:
    config, run_dir = cluster.config, cluster.run_dir
    serving = start.checkpoint / "policy" if start.checkpoint else model
    display.message(start.describe())
    async with rollout_pool(cluster, serving) as pool:
        learner = RayLearner(learner_handles(cluster, inputs.pad_token_id), config)
        # Rows of an attempt that never reached a checkpoint are of no run: -1 drops them all.
        metrics = MetricsWriter(run_dir, start.state.weight_version if start.checkpoint else -1)
        parts = Parts(
            config=config,
            run_dir=run_dir,
            model=model,
            tokenizer_files=tokenizer_files(model),
            pool=pool,
            learner=learner,
            bus=WeightBus(learner, pool, config.weight_sync, _dtype(config), inputs.probe()),
            checkpoints=store,
            metrics=metrics,
            display=display,
            prompts=inputs.prompts,
            demonstrations=inputs.demonstrations,
            held_out=inputs.held_out,
        )
        controller = Controller(parts, start.state, start.checkpoint)
        _on_signals(controller)
        try:
            await controller.run()
        finally:
            metrics.close()


@contextlib.contextmanager
def ray_cluster(config: Config, run_dir: Path, bundles: list[dict[str, float]]) -> Iterator[Cluster]:
    """Start Ray (on loopback) or join a cluster, and reserve everything the run needs."""
    local = config.run.address == "local"
    temporary = _temporary_folder(run_dir)
    options: dict[str, Any] = {"log_to_driver": False, "configure_logging": False, "include_dashboard": False}
    if local:
        os.environ.pop("RAY_ADDRESS", None)
        options |= {
            "address": "local",
            "_temp_dir": str(temporary),
            "num_cpus": len(bundles),  # logical: phases alternate, threads are set by OMP_NUM_THREADS
            "object_store_memory": 512 * 2**20,
            "_node_ip_address": "127.0.0.1",
        }
    else:
        options = {"address": config.run.address, "log_to_driver": False}
    ray.init(**options)
    try:
        group = placement_group(bundles, strategy="PACK")
        if not group.wait(PLACEMENT_TIMEOUT_S):
            raise ConfigError(f"the cluster cannot place {bundles}: {ray.cluster_resources()} exist; see `rlsys check`")
        with kill_with_this_process():
            yield Cluster(group, config, run_dir, temporary)
    finally:
        started = psutil.Process().children(recursive=True) if local else []
        ray.shutdown()
        kill_and_wait(started, SHUTDOWN_TIMEOUT_S)  # on a busy machine workers would outlive the driver by seconds
        _remove_leftovers(run_dir)


@contextlib.asynccontextmanager
async def rollout_pool(cluster: Cluster, model: Path) -> AsyncIterator[RayRolloutPool]:
    """Start the rollout actors on a model folder; close them in the end."""
    config = cluster.config
    environment = {
        **_common_environment(cluster),
        **engine_environment(config.actors, config.run.device),
    }
    handles = []
    for number in range(config.actors.count):
        settings = ActorSettings(
            name=f"{number}",
            model_path=model,
            device=config.run.device,
            seed=config.run.seed,
            actors=config.actors,
            task=config.task,
            rewards=config.rewards,
            log_file=str(cluster.run_dir / "logs" / f"actor-{number}.log"),
        )
        options = cluster.options(number, config.actors.tensor_parallel_size, environment)
        handles.append(ray.remote(RolloutActor).options(**options).remote(settings))
    pool = RayRolloutPool(handles, config)
    try:
        await pool.start()
        yield pool
    finally:
        await pool.close()


def learner_handles(cluster: Cluster, pad_token_id: int) -> list[Any]:
    """Start the learner ranks."""
    config = cluster.config
    store = cluster.run_dir / f"{RENDEZVOUS}{uuid.uuid4().hex}"
    handles = []
    for rank in range(config.learner.ranks):
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
        )
        environment = {
            **_common_environment(cluster),
            **learner_environment(config.learner, config.run.device, rank),
        }
        options = cluster.options(config.actors.count + rank, 1, environment)
        log_file = str(cluster.run_dir / "logs" / f"learner-{rank}.log")
        handles.append(ray.remote(LearnerActor).options(**options).remote(settings, log_file))
    return handles


def actor_bundles(config: Config) -> list[dict[str, float]]:
    """Resources of the rollout actors."""
    return [_bundle(config, config.actors.tensor_parallel_size)] * config.actors.count


def rank_bundles(config: Config) -> list[dict[str, float]]:
    """Resources of the learner ranks."""
    return [_bundle(config, 1)] * config.learner.ranks


def _bundle(config: Config, gpus: int) -> dict[str, float]:
    return {"CPU": 1.0, **({"GPU": float(gpus)} if config.run.device == "cuda" else {})}


def _temporary_folder(run_dir: Path) -> Path:
    """A new folder for sockets and scratch files, noted in the run directory so that it can never be lost.

    Socket paths below it must stay under 107 bytes, so neither $TMPDIR nor the run directory itself will do.
    """
    _remove_leftovers(run_dir)
    folder = Path(f"/tmp/rl-{uuid.uuid4().hex[:8]}")  # noqa: S108 - unpredictable name, mode 700
    (run_dir / TEMPORARY_NOTE).write_text(str(folder), encoding="utf-8")
    (folder / "tmp").mkdir(parents=True, mode=0o700)
    folder.chmod(0o700)
    return folder


def _remove_leftovers(run_dir: Path) -> None:
    """Remove the scratch folder of this or a killed attempt, and rendezvous files."""
    note = run_dir / TEMPORARY_NOTE
    if note.exists():
        folder = Path(note.read_text(encoding="utf-8"))
        if re.fullmatch(r"/tmp/rl-[0-9a-f]{8}", str(folder)):  # noqa: S108 - nothing else is ever removed
            shutil.rmtree(folder, ignore_errors=True)
        note.unlink()
    for path in run_dir.glob(f"{RENDEZVOUS}*"):
        path.unlink(missing_ok=True)


def _common_environment(cluster: Cluster) -> dict[str, str]:
    kept = {name: os.environ[name] for name in ("RLSYS_FAULTS", "RLSYS_DATA", "HF_HUB_OFFLINE") if name in os.environ}
    scratch = {"TMPDIR": str(cluster.temporary / "tmp")} if cluster.config.run.address == "local" else {}
    return {"RLSYS_RUN_ID": cluster.run_dir.name, "TOKENIZERS_PARALLELISM": "false", **scratch, **kept}


def _dtype(config: Config) -> str:
    return "bf16" if "bf16" in (config.actors.dtype, config.learner.dtype) else "fp32"


def _totals(config: Config) -> dict[str, int]:
    return {stage: config.max_steps(stage) for stage in config.stages}


def _on_signals(controller: Controller) -> None:
    """After ray.init, which installs a SIGTERM handler of its own."""
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, controller.interrupt, signal.Signals(number).name)
