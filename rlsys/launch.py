"""Composition root: Ray, placement group, actors, learner ranks; builds the parts and runs the controller."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import sys
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

import ray

from actors.engine import engine_environment
from actors.rollout_actor import ActorSettings, RolloutActor
from learners.learner_actor import LearnerActor
from learners.rank_settings import RankSettings, learner_environment
from rlsys import report, resources
from rlsys.checkpoint import CheckpointStore, RunLock, write_text
from rlsys.cluster import RENDEZVOUS, Cluster, ray_cluster
from rlsys.config import Config
from rlsys.config_file import dump_config
from rlsys.controller import Controller, Parts
from rlsys.display import Display
from rlsys.errors import AbortedRunError, ConfigError, EngineError, InterruptedRunError
from rlsys.inputs import Inputs
from rlsys.metrics import MetricsWriter
from rlsys.remote import RayLearner, RayRolloutPool
from rlsys.resume import Start, all_steps_made, check_inputs, find_start
from rlsys.setup import prepare_model, tokenizer_files
from rlsys.stop_signals import StopSignals
from rlsys.types import Prompt
from rlsys.weights import WeightBus

Measure = Callable[[RayRolloutPool, list[Prompt], Config], Awaitable[dict[str, Any]]]
FIRST_SIGNAL = "{}: stopping after what is under way, and saving; once more to abort"
ABORTED = " for the second time; training since the last checkpoint is lost"
AFTER_THE_END = " while the processes of the complete run were ending; nothing is lost"


@dataclass(frozen=True, slots=True)
class Session:
    """One call of `train` once its input is known to be good."""

    config: Config
    run_dir: Path
    store: CheckpointStore
    start: Start
    model: Path
    inputs: Inputs
    display: Display
    stop: StopSignals


def train(config: Config) -> str:
    """Run a config to its end; answers with what there is to say about the run then.

    Raises:
        RlsysError: every expected failure; InterruptedRunError after SIGINT or SIGTERM, with the state saved.
    """
    run_dir = Path(config.run.dir).absolute()
    with StopSignals(" before anything was trained") as stop, RunLock(run_dir):
        store = CheckpointStore(run_dir / "checkpoints", config.checkpoint.keep_last)
        store.sweep()
        start = find_start(config, run_dir, store)
        if is_complete(config, start, run_dir):
            return report.complete(config, start.state.step) + report.finished(config)
        model = prepare_model(config, run_dir)
        resources.check(resources.plan(config, model))
        inputs = Inputs(config, model)  # bad data must be found before anything is started
        check_inputs(start, inputs.fingerprint())
        start.settle(run_dir)  # a refused command has changed nothing
        write_text(run_dir / "config.yaml", dump_config(config))
        bundles = actor_bundles(config) + rank_bundles(config)
        store_bytes = resources.object_store_bytes(config, resources.parameter_count(model))
        with (
            naming_logs(run_dir / "logs"),
            ray_cluster(config, run_dir, bundles, store_bytes) as cluster,
            Display(totals=_totals(config)) as display,
        ):
            try:
                stop.run(_train(cluster, Session(config, run_dir, store, start, model, inputs, display, stop)))
            except InterruptedRunError as error:
                raise InterruptedRunError(f"{error.message}{report.interrupted(config)}") from None
    return report.finished(config)


def is_complete(config: Config, start: Start, run_dir: Path) -> bool:
    """Whether this very run has made all steps of the last stage, and has handed its policy over."""
    own = start.checkpoint is not None and start.checkpoint.parent.resolve() == (run_dir / "checkpoints").resolve()
    handed = run_dir / "stages" / config.stages[-1] / "config.json"
    return own and all_steps_made(config, start.state) and handed.is_file()


def evaluate_policy(policy: Path, config: Config, measure: Measure) -> dict[str, Any]:
    """Start actors alone on a policy folder and let `measure` use them on the held-out prompts.

    Logs are kept where it fails; the error says where.
    """
    resources.check(resources.plan(config, policy, learner=False))
    inputs = Inputs(config, policy, training=False)
    for note in inputs.notes:
        print(note, file=sys.stderr)
    folder = Path(tempfile.mkdtemp(prefix="rlsys-evaluate-"))

    async def work(cluster: Cluster) -> dict[str, Any]:
        async with rollout_pool(cluster, policy) as pool:
            return await measure(pool, inputs.held_out, config)

    try:
        with (
            StopSignals() as stop,
            naming_logs(folder / "logs"),
            ray_cluster(config, folder, actor_bundles(config)) as cluster,
        ):
            found = stop.run(work(cluster))
    except (AbortedRunError, ConfigError):  # their logs explain nothing
        shutil.rmtree(folder)
        raise
    shutil.rmtree(folder)
    return found


@contextlib.contextmanager
def naming_logs(folder: Path) -> Iterator[None]:
    """Add the place of the logs to the error of a broken actor or rank."""
    try:
        yield
    except EngineError as error:
        raise EngineError(f"{error.message} (logs: {folder})") from error


async def _train(cluster: Cluster, session: Session) -> None:
    config, run_dir, start, inputs = session.config, session.run_dir, session.start, session.inputs
    display = session.display
    serving = start.checkpoint / "policy" if start.checkpoint else session.model
    for note in inputs.notes:
        display.message(note)
    display.message(start.describe())
    async with rollout_pool(cluster, serving) as pool:
        learner = RayLearner(learner_handles(cluster, inputs.pad_token_id), config)
        # Rows of an attempt that never reached a checkpoint are of no run: -1 drops them all.
        metrics = MetricsWriter(run_dir, start.state.weight_version if start.checkpoint else -1)
        parts = Parts(
            config=config,
            run_dir=run_dir,
            model=session.model,
            tokenizer_files=tokenizer_files(session.model),
            pool=pool,
            learner=learner,
            bus=WeightBus(learner, pool, config.weight_sync, _dtype(config), inputs.probe()),
            checkpoints=session.store,
            metrics=metrics,
            display=display,
            prompts=inputs.prompts,
            demonstrations=inputs.demonstrations,
            held_out=inputs.held_out,
            fingerprint=inputs.fingerprint(),
        )
        controller = Controller(parts, start.state, start.checkpoint)

        def ask(name: str) -> None:
            display.message(FIRST_SIGNAL.format(name))
            controller.interrupt(name)

        session.stop.ask_first(ask, ABORTED)
        try:
            await controller.run()
            session.stop.ask_first(lambda _name: None, AFTER_THE_END)
        finally:
            metrics.close()


@contextlib.asynccontextmanager
async def rollout_pool(cluster: Cluster, model: Path) -> AsyncIterator[RayRolloutPool]:
    """Start the rollout actors on a model folder; close them in the end."""
    config = cluster.config
    environment = engine_environment(config.actors, config.run.device)
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
        task = asyncio.current_task()
        if task is None or not task.cancelling():  # aborted: the processes are killed at once
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
        environment = learner_environment(config.learner, config.run.device, rank)
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


def _dtype(config: Config) -> str:
    return "bf16" if "bf16" in (config.actors.dtype, config.learner.dtype) else "fp32"


def _totals(config: Config) -> dict[str, int]:
    return {stage: config.max_steps(stage) for stage in config.stages}
