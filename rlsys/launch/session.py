"""Run a command: check its input, start Ray and the processes, and hand over to the controller."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import sys
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from rlsys.config.files import dump_config
from rlsys.config.schema import Config
from rlsys.config.stages import stage_plans
from rlsys.control.controller import Controller
from rlsys.control.fleet import Fleet
from rlsys.control.probe_check import PROBE_TOKENS
from rlsys.control.recovery import Recovery
from rlsys.control.run_context import RunContext
from rlsys.control.shared_device import SharedDevice
from rlsys.control.stages.search import TreeSearchStage
from rlsys.control.tree_search import search_model_digests
from rlsys.control.weights import WeightBus
from rlsys.data.inputs import Inputs
from rlsys.directory import CheckpointDirectory, RunDirectory
from rlsys.display import Display
from rlsys.errors import AbortedRunError, ConfigError, EngineError, InterruptedRunError
from rlsys.fault_injection import fault
from rlsys.files import write_text
from rlsys.launch.colocated import ColocatedLearner
from rlsys.launch.placement import LEARNER, Placement, place
from rlsys.launch.prepare import Evaluation, Prepared, check_settings, find_checked_start, prepare
from rlsys.launch.ray_cluster import Cluster, ray_cluster, remove_leftovers
from rlsys.launch.remote import RayLearner
from rlsys.launch.resources import object_store_bytes
from rlsys.launch.signals import TIME_LIMIT, StopSignals
from rlsys.launch.start import AdaptedModel, learner_handles, rollout_pool
from rlsys.models.chat import decode_prompt
from rlsys.models.folder import ModelFolder
from rlsys.run import report
from rlsys.run.charts import main_settings
from rlsys.run.checkpoints import CheckpointStore
from rlsys.run.journal import INTERVAL_S, Journal
from rlsys.run.ledger import Ledger
from rlsys.run.lock import RunLock
from rlsys.run.metrics import MetricsWriter
from rlsys.run.provenance import check_extraction, check_inputs
from rlsys.run.resume import Start, checkpoint_store, find_newest_start, is_complete
from rlsys.run.rollout_files import RolloutLog
from rlsys.run.trackers import following
from rlsys.trees import Role
from rlsys.types import Prompt

Measure = Callable[[Fleet, list[Prompt]], Awaitable[None]]
Grow = Callable[[Fleet, StopSignals], Awaitable[None]]
FIRST_SIGNAL = "{}: stopping after what is under way, and saving"
ONCE_MORE = "; once more to abort"
ABORTED = " for the second time; training since the last checkpoint is lost"
TREES_KEPT = "; finished trees are kept, the same command continues"
AFTER_THE_END = " while the processes of the complete run were ending; nothing is lost"


@dataclass(frozen=True, slots=True, kw_only=True)
class Session:
    """The checked input and the tools of one call of `train`."""

    config: Config
    run_dir: Path
    store: CheckpointStore
    start: Start
    prepared: Prepared
    placement: Placement
    display: Display
    journal: Journal
    stop: StopSignals


def train(config: Config) -> str:
    """Run a config to its end.

    Returns:
        The closing lines for the user.

    Raises:
        RlsysError: every expected failure. After SIGINT or SIGTERM it is an InterruptedRunError, with the state saved.
    """
    run_dir = Path(config.run.dir).absolute()
    directory = RunDirectory(run_dir)
    check_settings(config, "train")
    with StopSignals(" before anything was trained", config.run.time_limit) as stop, RunLock(run_dir):
        store = checkpoint_store(config)
        store.sweep()
        remove_leftovers(run_dir)  # before the check for a complete run, whose processes may have left some
        fault("driver.start")
        start = find_checked_start(config, run_dir, store)
        if is_complete(config, start, run_dir):
            return report.complete(config, start.state.step) + report.finished(config)
        prepared = prepare(config, "train")
        check_inputs(start.checkpoint, prepared.fingerprint())
        check_extraction(config, start.state, start.checkpoint, len(prepared.tree_prompts))
        start.prepare_directory(run_dir)  # the first change to the run directory: a refused command leaves it as it was
        write_text(directory.config, dump_config(config))
        placement = place(config, prepared.auxiliary, learner=True)
        store_bytes = object_store_bytes(config, prepared.trained_parameters)
        totals: dict[str, int] = {plan.name: plan.progress_total for plan in stage_plans(config)}
        with (
            Journal(run_dir) as journal,
            naming_logs(directory.logs),
            ray_cluster(config, run_dir, placement.bundles, store_bytes) as cluster,
            Display(totals=totals, log=journal.say) as display,
            following(run_dir, config.run.trackers, display.message),
        ):
            session = Session(
                config=config,
                run_dir=run_dir,
                store=store,
                start=start,
                prepared=prepared,
                placement=placement,
                display=display,
                journal=journal,
                stop=stop,
            )
            stop.run(cluster.watched(_train(cluster, session)))
    return report.finished(config)


def evaluate_policy(evaluation: Evaluation, measure: Measure) -> None:
    """Start actors on a policy, and give `measure` the actors and the held-out prompts.

    With evaluation.search_answers the actors search too, together with the engines of search.reviewer. The logs are
    kept if the evaluation fails, and the error names their folder.
    """
    config, prepared = evaluation.config, evaluation.prepared
    adapted = AdaptedModel(*evaluation.adapted) if evaluation.adapted else None
    bundles = place(config, prepared.auxiliary).bundles
    folder = Path(tempfile.mkdtemp(prefix="rlsys-evaluate-"))

    async def work(cluster: Cluster) -> None:
        async with rollout_pool(cluster, evaluation.policy, prepared.searching, adapted=adapted) as pool:
            await measure(pool, prepared.inputs.held_out)

    try:
        with (
            StopSignals() as stop,
            naming_logs(RunDirectory(folder).logs),
            ray_cluster(config, folder, bundles) as cluster,
        ):
            stop.run(work(cluster))
    except (AbortedRunError, ConfigError):  # their logs explain nothing
        shutil.rmtree(folder)
        raise
    shutil.rmtree(folder)


def grow_trees(config: Config, begin: Callable[[Inputs, Mapping[Role, ModelFolder]], Grow | None]) -> None:
    """Start the engines that grow trees, and give them to the function that `begin` returns.

    Args:
        config: the config of the search.
        begin: called with the checked inputs and all models, before anything is started. It returns None if nothing is
            left to do. Otherwise it returns a function that gets the actors, and the signals so that it can delay the
            end.
    """
    run_dir = Path(config.run.dir).absolute()
    check_settings(config, "search")
    with StopSignals(TREES_KEPT, config.run.time_limit) as stop, RunLock(run_dir):
        prepared = prepare(config, "search")
        _print_notes(prepared)
        grow = begin(prepared.inputs, prepared.models)
        if grow is None:
            return

        async def work(cluster: Cluster) -> None:
            async with rollout_pool(cluster, prepared.served.path, prepared.searching) as pool:
                await grow(pool, stop)

        bundles = place(prepared.config, prepared.auxiliary).bundles
        with naming_logs(RunDirectory(run_dir).logs), ray_cluster(prepared.config, run_dir, bundles) as cluster:
            stop.run(work(cluster))


def _print_notes(prepared: Prepared) -> None:
    for note in prepared.notes:
        print(note, file=sys.stderr)


@contextlib.contextmanager
def naming_logs(folder: Path) -> Iterator[None]:
    """Add the folder of the logs to the error of a broken actor or rank."""
    try:
        yield
    except EngineError as error:
        raise EngineError(f"{error.message} (logs: {folder})") from error


async def _train(cluster: Cluster, session: Session) -> None:
    """Start actors and learner, and train until the end; a lost learner is restarted."""
    config, start, display = session.config, session.start, session.display
    inputs, initial_policy = session.prepared.inputs, session.prepared.policy.path
    teacher = session.prepared.held_teacher
    serving = CheckpointDirectory(start.checkpoint).policy if start.checkpoint else initial_policy
    _announce(session)
    bus: WeightBus | None = None
    signals: list[str] = []

    def replacement_policy() -> Path:
        """Return the folder for replaced actors: after the calibration, retention may remove the checkpoint."""
        return initial_policy if bus and bus.calibrated else serving

    device, searching = SharedDevice() if session.placement.colocated else None, session.prepared.searching
    adapted = AdaptedModel(initial_policy, config.model.lora) if config.model.lora else None
    async with rollout_pool(cluster, serving, searching, replacement_policy, display.message, device, adapted) as pool:
        ranks = session.placement.indices[LEARNER]

        def spawn(attempt: int) -> list[Any]:
            return learner_handles(cluster, ranks, inputs.pad_token_id, attempt, initial_policy, teacher)

        learner = ColocatedLearner(spawn, config, device) if device else RayLearner(spawn, config)
        dtype = _lowest_dtype(config)
        probe = inputs.probe(PROBE_TOKENS if dtype == "bf16" else 0)
        bus = WeightBus(learner, pool, config.weight_sync, dtype, probe)
        display.waiting("the learner, which builds the model and its optimizer")
        recovery = Recovery(
            config=config,
            actors=pool,
            learner=learner,
            versions=bus,
            newest_start=lambda: find_newest_start(config, session.run_dir, session.store),
            sweep=session.store.sweep,
            say=display.message,
            signals=signals,
        )
        fault("driver.up")
        async with _beating(session.journal, pool, learner):
            await recovery.run(start, lambda start: _run(session, start, pool, learner, bus, signals))
        learner.close()


@contextlib.asynccontextmanager
async def _beating(journal: Journal, pool: Fleet, learner: RayLearner) -> AsyncIterator[None]:
    """Write heartbeats inside the block."""

    async def beat() -> None:
        while True:
            await asyncio.to_thread(journal.beat, pool.activity(), learner.activity())
            await asyncio.sleep(INTERVAL_S)

    task = asyncio.create_task(beat())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.wait([task])


def _announce(session: Session) -> None:
    """Show the notes of the preflight, and with which checkpoint the run begins."""
    for note in session.prepared.notes:
        session.display.message(note)
    session.display.message(session.start.describe())
    session.display.waiting("the engines of the actors, which load the model")


async def _run(
    session: Session, start: Start, pool: Fleet, learner: RayLearner, bus: WeightBus, signals: list[str]
) -> None:
    """Train from a start to the end of the last stage.

    Args:
        signals: names of the signals that asked for an end; a new one is appended.
    """
    display = session.display
    # -1 drops all rows, because an attempt that never reached a checkpoint cannot be continued.
    version = start.state.weight_version if start.checkpoint else -1
    with (
        contextlib.closing(
            MetricsWriter(session.run_dir, version, display.message, main_settings(session.config))
        ) as metrics,
        contextlib.closing(Ledger(session.run_dir, version, display.message)) as ledger,
        contextlib.closing(_rollout_log(session, version)) as rollouts,
    ):
        context = replace(_run_context(session, pool, learner, bus, metrics, ledger), rollouts=rollouts)
        controller = Controller(context, start.state, start.checkpoint)

        def ask(name: str) -> None:
            display.message(FIRST_SIGNAL.format(name) + ("" if name == TIME_LIMIT else ONCE_MORE))
            signals.append(name)
            controller.interrupt(name)

        if signals:  # a signal came while the learner was restarted; the next signal aborts
            controller.interrupt(signals[-1])
        else:
            session.stop.ask_first(ask, ABORTED)
        try:
            await controller.run()
            session.stop.ask_first(lambda _name: None, AFTER_THE_END)
        except InterruptedRunError as error:
            saved = "the state is saved" if controller.checkpoint else "nothing was trained yet"
            raise InterruptedRunError(f"{error.message}{report.interrupted(session.config, saved)}") from None


def _rollout_log(session: Session, version: int) -> RolloutLog:
    decode = partial(decode_prompt, session.prepared.policy.tokenizer)
    return RolloutLog(session.run_dir, version, session.config.run.kept_prompts, decode, session.display.message)


def _run_context(
    session: Session, pool: Fleet, learner: RayLearner, bus: WeightBus, metrics: MetricsWriter, ledger: Ledger
) -> RunContext:
    inputs, policy = session.prepared.inputs, session.prepared.policy
    return RunContext(
        config=session.config,
        run_dir=session.run_dir,
        model=policy.path,
        tokenizer_files=policy.tokenizer_files,
        pool=pool,
        learner=learner,
        bus=bus,
        checkpoints=session.store,
        metrics=metrics,
        ledger=ledger,
        display=session.display,
        prompts=inputs.prompts,
        data=inputs.data,
        held_out=inputs.held_out,
        search=_search_stage(session, pool) if session.prepared.tree_prompts else None,
        fingerprint=session.prepared.fingerprint(),
        decode=lambda token_ids: decode_prompt(policy.tokenizer, token_ids.tolist()),
    )


def _search_stage(session: Session, pool: Fleet) -> TreeSearchStage:
    """Return the stage `search`. The training data of later stages do not count among the inputs of its trees."""
    prepared = session.prepared
    data = prepared.inputs.data.fingerprint()
    digests = {name: digest for name, digest in prepared.inputs.fingerprint().items() if name not in data}
    return TreeSearchStage(
        config=session.config,
        folder=RunDirectory(session.run_dir).search_stage.path,
        model=prepared.policy,
        prompts=prepared.tree_prompts,
        inputs=digests | search_model_digests(prepared.models),
        pool=pool,
        display=session.display,
    )


def _lowest_dtype(config: Config) -> str:
    return "bf16" if "bf16" in (config.actors.dtype, config.learner.dtype) else "fp32"
