"""The loop of the stage `online`: sample, learn, publish, release.

With train.max_staleness above 0, actors sample while the learner trains, and they load new weights while the learner
makes the next step.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from rlsys.config.stages import StagePlan
from rlsys.control.budgets import FailureLimit, verifier_limit
from rlsys.control.buffer import Buffer
from rlsys.control.counters import Counters
from rlsys.control.dynamic_sampling import GroupFilter, has_signal
from rlsys.control.producer import Producer
from rlsys.control.rollout_details import EXAMPLE_INTERVAL, examples, histograms
from rlsys.control.rollout_metrics import engine_metrics, rollout_metrics
from rlsys.control.signal_watch import signal_watch
from rlsys.control.stages.training import TrainingStage
from rlsys.control.training_run import Stopwatch, TrainingRun
from rlsys.errors import NonFiniteLossError, RlsysError
from rlsys.fault_injection import fault
from rlsys.run.rollout_files import KeptRollouts
from rlsys.run.rollouts import is_kept
from rlsys.types import SamplingSettings, TrajectoryGroup


class OnlineStage(TrainingStage):
    """Loop of the stage that trains on rollouts, which a producer keeps ready in a buffer.

    Waits for the groups of a step; the producer finishes them, and `TrainingRun.stop` or an error of the producer ends
    the wait. Learner, publish and evaluation within a step are not interrupted: the weights would be a step ahead of
    the saved state.
    """

    def __init__(self, run: TrainingRun, plan: StagePlan) -> None:
        super().__init__(run, plan)
        config, counters = run.config, Counters.of(run.state.counters)
        train = config.train
        self._rollouts = FailureLimit(
            noun="rollouts",
            field="train.max_failed_rollouts",
            share=train.max_failed_rollouts,
            failed=counters.failed_rollouts,
        )
        self._verifications = verifier_limit(
            train.max_verifier_failures, failed=counters.failed_verifications, total=counters.verifications
        )
        self._filtering = GroupFilter(
            rounds=train.dynamic_sampling_rounds,
            has_signal=partial(has_signal, objective=config.objective, max_tokens=config.sampling.max_tokens),
            verifications=self._verifications,
            groups=counters.filtered_groups,
            tokens=counters.filtered_tokens,
            unlogged_tokens=counters.unlogged_tokens,
        )
        self._buffer = Buffer(train.groups_per_step, train.max_staleness)
        self._signal = signal_watch(config, run.context.display.message)
        self._publishing: asyncio.Task[Mapping[str, float]] | None = None  # beside the next step

    async def train(self) -> None:
        run, plan, buffer = self.training, self.plan, self._buffer
        context = run.context
        await run.publish_if_new()
        if run.state.step == 0:
            await self._evaluate_first()
        await context.pool.reset_engine_stats()
        context.display.waiting("the first rollouts")
        async with self._producing(), self._ended_publish():
            while run.state.step < plan.steps:
                started = time.monotonic()
                fault("driver.rollout", step=run.state.step + 1)
                loading = run.load_batch(plan.name, run.state.step)
                with Stopwatch() as waiting:
                    groups = await run.stop.wait_for(buffer.take())
                metrics = await self._check_groups(groups, waiting.seconds)
                data = await run.stop.wait_for(loading)
                kept = self._keep_rollouts(groups)
                try:
                    places = kept.places if kept else ()
                    metrics |= await run.learn(replace(data, groups=tuple(groups), kept=places))
                except NonFiniteLossError as error:
                    if kept:
                        await kept.skip()
                    run.skip(error)
                    self._filtering.unlogged_tokens += int(metrics["rollout/generated_tokens"])
                    await self._finish_publish()
                    await buffer.release()
                    context.ledger.note("skipped", buffer.taken)
                    continue
                if kept:
                    await kept.finish(await context.learner.token_values())
                metrics |= await self._publish()
                context.ledger.note("trained", buffer.taken)
                self._record_state()
                self._signal.add(metrics)
                self._show_rollouts(groups)
                await run.finish_step(plan, metrics, started)

    def _keep_rollouts(self, groups: Sequence[TrajectoryGroup]) -> KeptRollouts | None:
        """Begin to make the rows of some rollouts of the next step, beside the learner's call."""
        state, rollouts = self.training.state, self.training.context.rollouts
        step = state.step + 1
        if rollouts is None or not is_kept(step, self.plan.steps):
            return None
        return rollouts.start(groups, self.plan.name, step, state.weight_version + 1)

    # --- publish ---

    async def _publish(self) -> dict[str, float]:
        """Publish the weights of a step, evaluate them if that is due, and free the slots of the step.

        With staleness, a publish without evaluation goes on beside the next step; the metrics are then those of the
        publish that ended meanwhile.
        """
        run = self.training
        evaluates = _is_evaluated(run.state.step, self.plan.steps, run.config.evaluation.interval)
        overlaps = run.config.train.max_staleness > 0 and not evaluates
        with Stopwatch() as waiting:
            metrics = dict(await self._finish_publish())
            if overlaps:
                await self._begin_publish()
            else:
                metrics |= await run.publish()
        metrics["time/publish_s"] = waiting.seconds
        if evaluates:
            metrics |= await run.evaluate()
        if not overlaps:
            await self._buffer.release()
        return metrics

    async def _begin_publish(self) -> None:
        """Begin to publish, and return when the learner has sent everything. The end of the publish frees the slots."""
        sent = asyncio.Event()

        async def publish_and_release() -> Mapping[str, float]:
            metrics = await self.training.publish(sent.set)
            await self._buffer.release()
            return metrics

        self._publishing = asyncio.create_task(publish_and_release())
        self._publishing.add_done_callback(self._background_ended)
        waiting = asyncio.create_task(sent.wait())
        await asyncio.wait({waiting, self._publishing}, return_when=asyncio.FIRST_COMPLETED)
        waiting.cancel()

    async def _finish_publish(self) -> Mapping[str, float]:
        """Wait for the end of the publish under way, if any, and return its metrics."""
        if self._publishing is None:
            return {}
        publishing, self._publishing = self._publishing, None
        return await publishing

    @contextlib.asynccontextmanager
    async def _ended_publish(self) -> AsyncIterator[None]:
        """Leave no publish behind after an error. A cancelled one would leave engines with half their weights."""
        try:
            yield
        finally:
            if self._publishing is not None:
                await asyncio.wait([self._publishing])

    async def _evaluate_first(self) -> None:
        """Evaluate the policy before the first step."""
        run = self.training
        run.context.display.waiting("the evaluation before the first step")
        metrics = await run.stop.wait_for(run.evaluate())
        run.context.metrics.log("online", 0, run.state.weight_version, metrics)
        run.context.display.evaluation(metrics)

    async def _check_groups(self, groups: Sequence[TrajectoryGroup], seconds: float) -> dict[str, float]:
        """Count and check the groups of a step, and return their metrics.

        Args:
            seconds: the wait for the groups.
        """
        run = self.training
        shaping = run.config.objective.policy.overlong_shaping(run.config.sampling.max_tokens)
        metrics = {
            **rollout_metrics(groups, run.state.weight_version, self._filtering.take_unlogged(), shaping),
            "rollout/filtered": float(self._filtering.groups),
            "rollout/filtered_tokens": float(self._filtering.tokens),
            "time/rollout_s": seconds,
        }
        metrics |= engine_metrics(await run.context.pool.engine_stats())
        metrics["rollout/failed"] = float(self._rollouts.failed)
        self._verifications.add_verdicts(groups)
        self._check_staleness(metrics["rollout/staleness_max"])
        self._check_attempt(groups)
        return metrics

    def _show_rollouts(self, groups: Sequence[TrajectoryGroup]) -> None:
        """Write the distributions of a step, and sometimes examples, for TensorBoard."""
        run, context = self.training, self.training.context
        shows = run.state.step == 1 or run.state.step % EXAMPLE_INTERVAL == 0
        try:
            texts = examples(groups, context.decode) if shows else {}
            context.metrics.show(run.state.weight_version, histograms(groups), texts)
        except Exception as error:  # noqa: BLE001 - what people look at must not end a run
            context.display.message(f"no distributions of this step in TensorBoard: {type(error).__name__}: {error}")

    def _check_staleness(self, staleness: float) -> None:
        bound = self.training.config.train.max_staleness
        if staleness > bound:
            raise RlsysError(
                f"a group of staleness {staleness:.0f} reached the learner; train.max_staleness is {bound}"
            )

    def _check_attempt(self, groups: Sequence[TrajectoryGroup]) -> None:
        """Raise if a group was sampled by an earlier attempt of the learner, before a return to a checkpoint."""
        restarts = self.training.context.learner.restarts
        spans = (span for group in groups for trajectory in group.trajectories for span in trajectory.versions)
        other = next((span for span in spans if span.attempt != restarts), None)
        if other:
            raise RlsysError(
                f"a group that attempt {other.attempt} of the learner sampled, with weight version {other.version}, "
                f"reached the learner in attempt {restarts}"
            )

    @contextlib.asynccontextmanager
    async def _producing(self) -> AsyncIterator[None]:
        """Fill the buffer in the background. An error of the producer ends the wait for groups."""
        run, context = self.training, self.training.context
        sampling, train = run.config.sampling, run.config.train
        context.prompts.seek(run.state.cursor, run.state.in_flight)
        context.ledger.resume(run.state.cursor, run.state.in_flight)
        settings = SamplingSettings(
            samples=train.group_size,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            max_tokens=sampling.max_tokens,
            seed=run.config.run.seed,
            teacher=run.config.objective.scores_chains,
        )
        trained = (run.state.step + run.skipped.total) * train.groups_per_step
        self._rollouts.total = self._rollouts.failed + self._filtering.groups + trained
        producer = Producer(
            context.pool,
            context.prompts,
            self._buffer,
            settings,
            self._rollouts,
            run.config.search,
            self._filtering,
        )
        task = asyncio.create_task(producer.run())
        task.add_done_callback(self._background_ended)
        try:
            yield
        finally:
            task.cancel()
            await asyncio.wait([task])

    def _background_ended(self, task: asyncio.Task[Any]) -> None:
        if not task.cancelled() and (error := task.exception()):
            self.training.stop.fail(_first_cause(error))

    def _record_state(self) -> None:
        """Put the prompts in flight and the counters into the run state, and close the step in the ledger."""
        run, context = self.training, self.training.context
        counters = Counters(
            failed_rollouts=self._rollouts.failed,
            failed_verifications=self._verifications.failed,
            verifications=self._verifications.total,
            filtered_groups=self._filtering.groups,
            filtered_tokens=self._filtering.tokens,
            unlogged_tokens=self._filtering.unlogged_tokens,
            skipped_steps=run.skipped.total,
        )
        run.state = replace(
            run.state,
            cursor=context.prompts.cursor,
            in_flight=self._buffer.in_flight() + context.prompts.waiting(),
        )
        run.count(counters.as_floats())
        context.ledger.note("filtered", self._buffer.take_unused())
        context.ledger.close_step(run.state.weight_version, run.state.cursor, run.state.in_flight)


def _is_evaluated(step: int, steps: int, interval: int) -> bool:
    """Return whether the policy is evaluated after a step: the last one, or one of the interval; 0 for none."""
    return step == steps or bool(interval and step % interval == 0)


def _first_cause(error: BaseException) -> BaseException:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
