"""Composition root: Ray, placement group, actors, learner ranks; builds the parts and runs the controller."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import tempfile
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
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
from actors.model_actor import ModelActor, ModelSettings
from actors.rollout_actor import RolloutActor
from actors.search.build import check_tags
from actors.settings import ActorSettings
from learners.learner_actor import WATCH, LearnerActor
from learners.settings import RankSettings, learner_environment
from rlsys.config.engine_roles import ModelEngines, Searching, growing, searches_in_training
from rlsys.config.files import dump_config
from rlsys.config.schema import Config
from rlsys.config.stages import stage_plans
from rlsys.control.checkpointing import check_best_metric
from rlsys.control.controller import Controller
from rlsys.control.fleet import Fleet
from rlsys.control.parts import Parts
from rlsys.control.recovery import Recovery
from rlsys.control.search_stage import GrownSearch
from rlsys.control.tree_search import find_prompts, writer_digests
from rlsys.control.weights import WeightBus
from rlsys.data.inputs import Inputs, prepare_model
from rlsys.directory import RunDirectory
from rlsys.display import Display
from rlsys.errors import (
    AbortedRunError,
    ConfigError,
    EngineError,
    InterruptedRunError,
)
from rlsys.fault_injection import fault
from rlsys.files import write_text
from rlsys.launch import resources
from rlsys.launch.access import check_address
from rlsys.launch.ray_cluster import RENDEZVOUS, Cluster, ray_cluster, remove_leftovers
from rlsys.launch.remote import RayActor, RayLearner
from rlsys.launch.signals import TIME_LIMIT, StopSignals
from rlsys.models.folder import search_engines, tokenizer_files
from rlsys.run import report
from rlsys.run.checkpoints import CheckpointStore
from rlsys.run.ledger import Ledger
from rlsys.run.lock import RunLock
from rlsys.run.metrics import MetricsWriter
from rlsys.run.provenance import check_extraction, check_inputs
from rlsys.run.resume import Start, all_steps_made, find_again, find_start
from rlsys.transfer.object_store import ObjectStoreTransfer
from rlsys.trees import Role
from rlsys.types import Prompt

Measure = Callable[[Fleet, list[Prompt], Config], Awaitable[dict[str, Any]]]
Grow = Callable[[Fleet, StopSignals], Awaitable[None]]
FIRST_SIGNAL = "{}: stopping after what is under way, and saving"
ONCE_MORE = "; once more to abort"
ABORTED = " for the second time; training since the last checkpoint is lost"
# Calls of one actor under way. At Ray's own limit, 1000, questions for the usage would wait behind trees.
MAX_CALLS = 10_000
TREES_KEPT = "; finished trees are kept, the same command continues"
AFTER_THE_END = " while the processes of the complete run were ending; nothing is lost"


@dataclass(frozen=True, slots=True)
class Session:
    """One call of `train` once its input is known to be good."""

    config: Config
    run_dir: Path
    store: CheckpointStore
    start: Start
    model: Path
    searching: Searching | None
    inputs: Inputs
    display: Display
    stop: StopSignals
    to_search: Sequence[Prompt]


def train(config: Config) -> str:
    """Run a config to its end; answers with what there is to say about the run then.

    Raises:
        RlsysError: every expected failure; InterruptedRunError after SIGINT or SIGTERM, with the state saved.
    """
    run_dir = Path(config.run.dir).absolute()
    directory = RunDirectory(run_dir)
    check_address(config.run.address)
    check_best_metric(config)
    kept = config.checkpoint
    with StopSignals(" before anything was trained", config.run.time_limit) as stop, RunLock(run_dir):
        best = (kept.best_metric, kept.best_mode) if kept.best_metric else None
        store = CheckpointStore(directory.checkpoints, kept.keep_last, kept.keep_every, best)
        store.sweep()
        remove_leftovers(run_dir)  # here, because a run may be complete
        fault("driver.start")
        start = find_start(config, run_dir, store)
        if is_complete(config, start, run_dir):
            return report.complete(config, start.state.step) + report.finished(config)
        model = prepare_model(config, run_dir)
        searching = Searching(beside=tuple(search_engines(config).values())) if searches_in_training(config) else None
        beside = _beside(searching)
        resources.check(resources.plan(config, model, beside=beside))
        if searching:
            check_tags(config.search, {"policy": model, **{found.writer: found.path for found in beside}})
        inputs = Inputs(config, model)  # bad data must be found before anything is started
        to_search = find_prompts(config, inputs) if not all(plan.trains for plan in stage_plans(config)) else []
        check_inputs(start.checkpoint, inputs.fingerprint())
        check_extraction(config, start.state, start.checkpoint, len(to_search))
        start.settle(run_dir)  # a refused command has changed nothing
        write_text(directory.config, dump_config(config))
        bundles = actor_bundles(config) + beside_bundles(config, beside) + rank_bundles(config)
        store_bytes = resources.object_store_bytes(config, resources.parameter_count(model))
        with (
            naming_logs(directory.logs),
            ray_cluster(config, run_dir, bundles, store_bytes) as cluster,
            Display(totals=_totals(config)) as display,
        ):
            session = Session(config, run_dir, store, start, model, searching, inputs, display, stop, to_search)
            stop.run(cluster.watched(_train(cluster, session)))
    return report.finished(config)


def is_complete(config: Config, start: Start, run_dir: Path) -> bool:
    """Whether this very run has made all steps of the last stage, and has handed its policy over."""
    own = (
        start.checkpoint is not None
        and start.checkpoint.parent.resolve() == RunDirectory(run_dir).checkpoints.resolve()
    )
    handed = RunDirectory(run_dir).exported_policy(config.stages[-1]) / "config.json"
    return own and all_steps_made(config, start.state) and handed.is_file()


def evaluate_policy(policy: Path, config: Config, measure: Measure) -> dict[str, Any]:
    """Start actors alone on a policy folder and let `measure` use them on the held-out prompts.

    With evaluation.search_answers they search too, and search.reviewer is started beside them. Logs are kept where
    it fails; the error says where.
    """
    searching = growing(config, policy, search_engines(config))[2] if config.evaluation.search_answers else None
    beside = _beside(searching)
    resources.check(resources.plan(config, policy, learner=False, beside=beside))
    if searching:
        check_tags(config.search, {"policy": policy, **{found.writer: found.path for found in beside}})
    inputs = Inputs(config, policy, training=False)
    for note in inputs.notes:
        print(note, file=sys.stderr)
    folder = Path(tempfile.mkdtemp(prefix="rlsys-evaluate-"))

    async def work(cluster: Cluster) -> dict[str, Any]:
        async with rollout_pool(cluster, policy, searching) as pool:
            return await measure(pool, inputs.held_out, config)

    try:
        with (
            StopSignals() as stop,
            naming_logs(RunDirectory(folder).logs),
            ray_cluster(config, folder, actor_bundles(config) + beside_bundles(config, beside)) as cluster,
        ):
            found = stop.run(work(cluster))
    except (AbortedRunError, ConfigError):  # their logs explain nothing
        shutil.rmtree(folder)
        raise
    shutil.rmtree(folder)
    return found


def grow_trees(config: Config, run_dir: Path, prepare: Callable[[Inputs, Mapping[Role, Path]], Grow | None]) -> None:
    """Start the engines that grow trees, and let what `prepare` answers use them.

    Args:
        prepare: is called once the input is known to be good, before anything is started, with the inputs of the
            policy and the folder of every model. It answers None where nothing is left to do. What it answers else
            may ask the signals to wait for an end of its own.
    """
    with StopSignals(TREES_KEPT, config.run.time_limit) as stop, RunLock(run_dir):
        policy = prepare_model(config, run_dir)
        engines = search_engines(config)
        serving, model, searching = growing(config, policy, engines)
        resources.check(resources.plan(serving, model, learner=False, beside=searching.beside))
        models: dict[Role, Path] = {"policy": policy, **{writer: found.path for writer, found in engines.items()}}
        check_tags(config.search, models)  # of the policy too: it is what the data are for
        inputs = Inputs(config, policy, training=False)
        for note in inputs.notes:
            print(note, file=sys.stderr)
        grow = prepare(inputs, models)
        if grow is None:
            return

        async def work(cluster: Cluster) -> None:
            async with rollout_pool(cluster, model, searching) as pool:
                await grow(pool, stop)

        bundles = actor_bundles(serving) + beside_bundles(serving, searching.beside)
        with naming_logs(RunDirectory(run_dir).logs), ray_cluster(serving, run_dir, bundles) as cluster:
            stop.run(work(cluster))


@contextlib.contextmanager
def naming_logs(folder: Path) -> Iterator[None]:
    """Add the place of the logs to the error of a broken actor or rank."""
    try:
        yield
    except EngineError as error:
        raise EngineError(f"{error.message} (logs: {folder})") from error


async def _train(cluster: Cluster, session: Session) -> None:
    config, start, inputs, display = session.config, session.start, session.inputs, session.display
    serving = start.checkpoint / "policy" if start.checkpoint else session.model
    for note in inputs.notes:
        display.message(note)
    display.message(start.describe())
    bus: WeightBus | None = None

    def replacement_policy() -> Path:
        """Return the folder for replaced actors: after the calibration, retention may remove the checkpoint."""
        return session.model if bus and bus.calibrated else serving

    async with rollout_pool(cluster, serving, session.searching, replacement_policy, display.message) as pool:
        first = len(actor_bundles(config) + beside_bundles(config, _beside(session.searching)))
        learner = RayLearner(lambda attempt: learner_handles(cluster, inputs.pad_token_id, first, attempt), config)
        transfer = ObjectStoreTransfer(learner)
        bus = WeightBus(learner, transfer, pool, config.weight_sync, _dtype(config), inputs.probe())
        signals: list[str] = []
        recovery = Recovery(
            config=config,
            actors=pool,
            learner=learner,
            versions=bus,
            newest_start=lambda: find_again(config, session.run_dir, session.store),
            sweep=session.store.sweep,
            say=display.message,
            signals=signals,
        )
        fault("driver.up")
        await recovery.run(start, lambda start: _run(session, start, pool, learner, bus, signals))
        learner.close()


async def _run(
    session: Session, start: Start, pool: Fleet, learner: RayLearner, bus: WeightBus, signals: list[str]
) -> None:
    """Train from a start to the end of the last stage.

    Args:
        signals: names of the signals that asked for an end; a new one is appended.
    """
    config, run_dir, inputs, display = session.config, session.run_dir, session.inputs, session.display
    # -1 drops all rows: those of an attempt that never reached a checkpoint belong to no run.
    version = start.state.weight_version if start.checkpoint else -1
    metrics, ledger = MetricsWriter(run_dir, version, display.message), Ledger(run_dir, version, display.message)
    parts = Parts(
        config=config,
        run_dir=run_dir,
        model=session.model,
        tokenizer_files=tokenizer_files(session.model),
        pool=pool,
        learner=learner,
        bus=bus,
        checkpoints=session.store,
        metrics=metrics,
        ledger=ledger,
        display=display,
        prompts=inputs.prompts,
        data=inputs.data,
        held_out=inputs.held_out,
        search=_search_stage(session, pool) if session.to_search else None,
        fingerprint=inputs.fingerprint(),
    )
    controller = Controller(parts, start.state, start.checkpoint)

    def ask(name: str) -> None:
        display.message(FIRST_SIGNAL.format(name) + ("" if name == TIME_LIMIT else ONCE_MORE))
        signals.append(name)
        controller.interrupt(name)

    if signals:  # one came while the learner was started again; the next signal aborts
        controller.interrupt(signals[-1])
    else:
        session.stop.ask_first(ask, ABORTED)
    try:
        await controller.run()
        session.stop.ask_first(lambda _name: None, AFTER_THE_END)
    except InterruptedRunError as error:
        saved = "the state is saved" if controller.saving.checkpoint else "nothing was trained yet"
        raise InterruptedRunError(f"{error.message}{report.interrupted(config, saved)}") from None
    finally:
        metrics.close()
        ledger.close()


def _search_stage(session: Session, pool: Fleet) -> GrownSearch:
    """The stage `search`. What the stages after it read decides none of its trees."""
    inputs, beside = session.inputs, _beside(session.searching)
    data = inputs.data.fingerprint()
    digests = {name: digest for name, digest in inputs.fingerprint().items() if name not in data}
    return GrownSearch(
        config=session.config,
        folder=RunDirectory(session.run_dir).search_stage.path,
        model=session.model,
        prompts=session.to_search,
        inputs=digests | writer_digests({engines.writer: engines.path for engines in beside}),
        pool=pool,
        display=session.display,
    )


@contextlib.asynccontextmanager
async def rollout_pool(
    cluster: Cluster,
    model: Path,
    searching: Searching | None = None,
    again: Callable[[], Path] | None = None,
    say: Callable[[str], None] = lambda _text: None,
) -> AsyncIterator[Fleet]:
    """Start the rollout actors on a model folder, and the engines beside them; close them in the end.

    Args:
        searching: None where they are never asked to search.
        again: the model folder of a replaced actor, where it is not the same; asked for each. It gets the current
            weights before it serves.
        say: is told of lost actors.
    """
    config = cluster.config
    environment = engine_environment(config.actors, config.run.device)
    beside = model_handles(cluster, _beside(searching))

    def spawn(number: int, attempt: int) -> RayActor:
        settings = ActorSettings(
            name=f"{number}",
            attempt=attempt,
            model_path=again() if again and attempt else model,
            device=config.run.device,
            seed=config.run.seed,
            actors=config.actors,
            task=config.task,
            rewards=config.rewards,
            log_file=str(RunDirectory(cluster.run_dir).logs / f"actor-{number}.log"),
            **(_search_settings(config, searching, beside) if searching else {}),
        )
        options = cluster.options(number, config.actors.tensor_parallel_size, environment)
        return RayActor(_start(RolloutActor, options, settings), config, f"actor {number}")

    others = [
        (writer, number, RayActor(handle, config, f"{writer} engine {number}"))
        for writer, handles in beside.items()
        for number, handle in enumerate(handles)
    ]
    async with Fleet(
        spawn,
        config.actors.count,
        max_restarts=config.actors.max_restarts,
        hang_timeout_s=config.actors.hang_timeout_s,
        role=searching.writer if searching else "policy",
        auxiliary=others,
        say=say,
    ) as pool:
        yield pool


def _start(kind: type, options: Mapping[str, Any], settings: Any) -> Any:
    """An actor that takes calls while others are under way."""
    return ray.remote(kind).options(**options, max_concurrency=MAX_CALLS).remote(settings)


def _search_settings(config: Config, searching: Searching, beside: Mapping[Role, Sequence[Any]]) -> dict[str, Any]:
    """The fields of ActorSettings that only a search needs."""
    return {
        "search": config.search,
        "extract": config.extract,
        "sampling": config.sampling,
        "role": searching.writer,
        "auxiliary_handles": beside,
        "auxiliary_paths": {engines.writer: engines.path for engines in searching.beside},
    }


def model_handles(cluster: Cluster, beside: Sequence[ModelEngines]) -> dict[Role, list[Any]]:
    """Start the engines of other models, in the bundles after those of the rollout actors."""
    config = cluster.config
    bundle = config.actors.count
    handles: dict[Role, list[Any]] = {}
    for engines in beside:
        environment = engine_environment(engines.actors, config.run.device)
        for number in range(engines.actors.count):
            settings = ModelSettings(
                name=f"{engines.writer} engine {number}",
                model_path=engines.path,
                device=config.run.device,
                actors=engines.actors,
                log_file=str(RunDirectory(cluster.run_dir).logs / f"{engines.writer}-{number}.log"),
            )
            options = cluster.options(bundle, engines.actors.tensor_parallel_size, environment)
            handles.setdefault(engines.writer, []).append(_start(ModelActor, options, settings))
            bundle += 1
    return handles


def learner_handles(cluster: Cluster, pad_token_id: int, first_bundle: int, attempt: int) -> list[Any]:
    """Start the learner ranks. Every attempt has a meeting place of its own."""
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
            attempt=attempt,
        )
        environment = learner_environment(config.learner, config.run.device, rank)
        options = cluster.options(first_bundle + rank, 1, environment)
        log_file = str(RunDirectory(cluster.run_dir).logs / f"learner-{rank}.log")
        kind = ray.remote(concurrency_groups={WATCH: 1})(LearnerActor)
        handles.append(kind.options(**options).remote(settings, log_file))
    return handles


def actor_bundles(config: Config) -> list[dict[str, float]]:
    """Resources of the rollout actors."""
    return [_bundle(config, config.actors.tensor_parallel_size)] * config.actors.count


def beside_bundles(config: Config, beside: Sequence[ModelEngines]) -> list[dict[str, float]]:
    """Resources of the engines of other models."""
    return [
        _bundle(config, engines.actors.tensor_parallel_size) for engines in beside for _ in range(engines.actors.count)
    ]


def _beside(searching: Searching | None) -> tuple[ModelEngines, ...]:
    return searching.beside if searching else ()


def rank_bundles(config: Config) -> list[dict[str, float]]:
    """Resources of the learner ranks."""
    return [_bundle(config, 1)] * config.learner.ranks


def _bundle(config: Config, gpus: int) -> dict[str, float]:
    return {"CPU": 1.0, **({"GPU": float(gpus)} if config.run.device == "cuda" else {})}


def _dtype(config: Config) -> str:
    return "bf16" if "bf16" in (config.actors.dtype, config.learner.dtype) else "fp32"


def _totals(config: Config) -> dict[str, int]:
    """Training steps of every stage, and trees of the stage `search`."""
    return {plan.name: plan.progress_total for plan in stage_plans(config)}
