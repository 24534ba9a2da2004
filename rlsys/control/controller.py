"""THE main loop. Knows only Protocols: what it drives may be real actors or recorded fakes."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import time
from collections.abc import AsyncIterator, Awaitable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import psutil

from rlsys.config.stages import stage_plan
from rlsys.control.budgets import FailureLimit, SkippedSteps, verifier_limit
from rlsys.control.buffer import Buffer
from rlsys.control.checkpointing import Saving
from rlsys.control.dynamic_sampling import GroupFilter, has_signal
from rlsys.control.evaluation import held_out_metrics, sample_groups
from rlsys.control.parts import Parts
from rlsys.control.producer import Producer
from rlsys.control.reference_scores import ReferenceScores
from rlsys.control.rollout_metrics import engine_metrics, rollout_metrics
from rlsys.directory import RunDirectory
from rlsys.errors import InterruptedRunError, NonFiniteLossError, RlsysError
from rlsys.fault_injection import fault
from rlsys.run.provenance import check_extracted, check_reference
from rlsys.types import RunState, SamplingSettings, StageName, TrainingBatch, TrajectoryGroup

Result = TypeVar("Result")


class Controller:
    """Runs the stages in order, from a run state to the end of the last one.

    Waiting for groups, for rows of data and for the evaluation before the first step also ends when `interrupt`
    is called or the producer fails. What the learner does, a publish, its calibration, an evaluation within a
    step and the trees that actors hold come to their end first; an interruption in the last step changes nothing.
    """

    def __init__(self, parts: Parts, state: RunState, checkpoint: Path | None) -> None:
        self.parts = parts
        self.state = state
        self.saving = Saving(parts, state, checkpoint)
        self._config = parts.config
        self._save_due = False
        self._stop: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        train, counters = parts.config.train, state.counters
        self._skipped = SkippedSteps(
            limit=parts.config.learner.max_skipped_steps, total=int(counters.get("skipped_steps", 0))
        )
        self._rollouts = FailureLimit(
            what="rollouts",
            field="train.max_failed_rollouts",
            share=train.max_failed_rollouts,
            failed=int(counters.get("failed_rollouts", 0)),
        )
        self._verifications = verifier_limit(
            train.max_verifier_failures,
            failed=int(counters.get("failed_verifications", 0)),
            total=int(counters.get("verifications", 0)),
        )
        self._filtering = GroupFilter(
            rounds=train.dynamic_sampling_rounds,
            has_signal=partial(
                has_signal, objective=parts.config.objective, max_tokens=parts.config.sampling.max_tokens
            ),
            verifications=self._verifications,
            groups=int(counters.get("filtered_groups", 0)),
            tokens=int(counters.get("filtered_tokens", 0)),
            unlogged_tokens=int(counters.get("unlogged_tokens", 0)),
        )

    def interrupt(self, reason: str) -> None:
        """Ask for an orderly end: a checkpoint, then InterruptedRunError."""
        if not self._stop.done():
            self._stop.set_result(reason)

    async def run(self) -> None:
        """Train until the last stage has made its max_steps.

        Raises:
            InterruptedRunError: after `interrupt`, once the state is saved, where anything is left to do.
        """
        stages = self._config.stages
        try:
            for number in range(self.state.stage, len(stages)):
                stage = stages[number]
                if number > self.state.stage:
                    self.state = replace(self.state, stage=number, step=0, counters={})
                    self._skipped.total = 0
                if stage == "search":
                    await self._search()
                else:
                    await self._train(stage)
                if number + 1 < len(stages):
                    self._check_stopped()
        except InterruptedRunError:
            await self.saving.save(self.state, needed=True)
            raise

    async def _train(self, stage: StageName) -> None:
        total = self._config.max_steps(stage)
        if self.state.step < total:
            shutil.rmtree(self.saving.handed(stage), ignore_errors=True)  # of a smaller max_steps
            await self._start_stage(stage)
            self.parts.display.stage(stage, total, self.state.step)
            if stage == "online":
                await self._online(total)
            else:
                await self._offline(stage, total)
            await self.saving.save(self.state, needed=True)
            self._save_due = False
        await asyncio.to_thread(self.saving.hand_over, stage)  # also where a run was killed between the two

    async def _search(self) -> None:
        """Trees of the present policy and the data made of them. No weights change, and nothing is left to do twice."""
        parts = self.parts
        assert parts.search is not None  # noqa: S101 - given wherever the config names the stage
        policy = self.saving.policy()
        if not await asyncio.to_thread(parts.search.is_complete, policy):
            await self._start_stage("search")
            await self._publish_if_new()
            self._check_stopped()
        figures = await parts.search.run(policy, self._stop)
        parts.metrics.log("search", 0, self.state.weight_version, figures)

    async def _start_stage(self, stage: StageName) -> None:
        learner, bus = self.parts.learner, self.parts.bus
        for note in await asyncio.to_thread(self.parts.data.load, stage):
            self.parts.display.message(note)
        resume = self.saving.checkpoint if self.state.step > 0 else None
        if resume:
            folder = RunDirectory(self.parts.run_dir).search_stage.data
            check_extracted(resume, self.parts.data.extracted(), folder)
        plan = stage_plan(self._config, stage)
        reference = self.saving.reference(self.state.stage) if plan.keeps_reference else None
        scored = plan.scores_pairs
        self.saving.anchor = await asyncio.to_thread(self._anchor, resume) if reference or scored else {}
        scores = self._reference_scores(stage) if scored else None
        if scores and scores.missing and resume:  # the learner is to hold the policy that the stage began with
            await learner.start_stage(stage, self.saving.reference(self.state.stage), None, None)
            await self._score(scores)
        self._check_stopped()
        await learner.start_stage(stage, self.saving.policy(), resume, reference)
        self._check_stopped()
        if scores and scores.missing:
            await self._score(scores)
        self.parts.data.references = scores.scores if scores else None
        if not bus.calibrated:
            gap = await bus.calibrate()
            self.parts.display.message(f"probe gap of a fresh load {gap:.1e} nats, tolerance {bus.tolerance:.1e}")

    def _anchor(self, resume: Path | None) -> dict[str, str]:
        """The digest of the policy that the stage began with, which reads all weights of it.

        Raises:
            CheckpointError: it is not the one any more.
        """
        policy = self.saving.reference(self.state.stage)
        digest = self.saving.digest(policy)
        check_reference(resume, policy, digest)
        return {"reference": digest}

    def _reference_scores(self, stage: StageName) -> ReferenceScores:
        """What the policy that a stage begins with says of the pairs of a file."""
        preference = self._config.objective.preference
        key = {"policy": self.saving.anchor["reference"], "mask_prefix_dpo": preference.mask_prefix_dpo}
        path = RunDirectory(self.parts.run_dir).reference_scores(stage)
        return ReferenceScores(path, self.parts.data.pairs(), key)

    async def _score(self, scores: ReferenceScores) -> None:
        self.parts.display.message("scoring the preference pairs under the policy that the stage begins with")
        await scores.compute(self.parts.learner, self._config.preference.pairs_per_step, self._check_stopped)

    async def _offline(self, stage: StageName, total: int) -> None:
        """Steps on data that is there. Nobody samples meanwhile, so the weights are published once, at the end."""
        upcoming = self._batch(stage, self.state.step)
        while self.state.step < total:
            started = time.monotonic()
            batch = await self._until_stopped(upcoming)
            if self.state.step + 1 < total:  # while the learner works
                upcoming = self._batch(stage, self.state.step + 1)
            try:
                figures = await self._learn(batch)
            except NonFiniteLossError as error:  # the same data would come again, so the step counts as made
                self._skip(error)
                figures = {}
                self._advance()
                self.state = replace(self.state, counters={"skipped_steps": float(self._skipped.total)})
            if self.state.step == total and self._config.stages[-1] == stage:
                figures |= {**await self._publish(), **await self._evaluate()}
            await self._finish_step(stage, figures, started)

    def _batch(self, stage: StageName, step: int) -> asyncio.Task[TrainingBatch]:
        return asyncio.create_task(asyncio.to_thread(self.parts.data.batch, stage, step))

    async def _learn(self, batch: TrainingBatch) -> dict[str, float]:
        """One training step; answers with its figures."""
        with Stopwatch() as watch:
            metrics = await self.parts.learner.train(batch, self.state.step, self.state.weight_version + 1)
        self._skipped.made()
        self._advance()
        rate = metrics["learner/tokens"] / watch.seconds
        return {**metrics, "time/learn_s": watch.seconds, "learner/tokens_per_s": rate}

    def _advance(self) -> None:
        self.state = replace(self.state, step=self.state.step + 1, weight_version=self.state.weight_version + 1)

    def _skip(self, error: NonFiniteLossError) -> None:
        """Count a training step that the learner left out."""
        self._skipped.skip(error)
        self.parts.display.message(f"STEP SKIPPED: {error.message}")

    async def _online(self, total: int) -> None:
        """Sample, learn, publish, release; see the module's picture in the README."""
        parts, train = self.parts, self._config.train
        await self._publish_if_new()
        if self.state.step == 0:
            figures = await self._until_stopped(self._evaluate())
            parts.metrics.log("online", 0, self.state.weight_version, figures)
            parts.display.evaluation(figures)
        buffer = Buffer(train.groups_per_step, train.max_staleness)
        await parts.pool.reset_engine_stats()  # what the engines did before the first prompt counts for no step
        async with self._producing(buffer):
            while self.state.step < total:
                started = time.monotonic()
                fault("driver.rollout", step=self.state.step + 1)
                with Stopwatch() as waiting:
                    groups = await self._until_stopped(buffer.take())
                figures = await self._rollout_figures(groups, waiting.seconds)
                beside = await self._batch("online", self.state.step)
                try:
                    figures |= await self._learn(replace(beside, groups=tuple(groups)))
                except NonFiniteLossError as error:
                    self._skip(error)
                    self._filtering.unlogged_tokens += int(figures["rollout/generated_tokens"])
                    parts.ledger.note("skipped", await buffer.release())
                    continue
                figures |= await self._publish()
                interval = self._config.evaluation.interval
                if self.state.step == total or (interval and self.state.step % interval == 0):
                    figures |= await self._evaluate()
                parts.ledger.note("trained", await buffer.release())
                self._snapshot(buffer)
                await self._finish_step("online", figures, started)

    async def _rollout_figures(self, groups: Sequence[TrajectoryGroup], seconds: float) -> dict[str, float]:
        """What there is to say of a step's groups, which are checked and counted here."""
        figures = {
            **rollout_metrics(groups, self.state.weight_version, self._filtering.take_unlogged()),
            "rollout/filtered": float(self._filtering.groups),
            "rollout/filtered_tokens": float(self._filtering.tokens),
            "time/rollout_s": seconds,
        }
        figures |= engine_metrics(await self.parts.pool.engine_stats())
        figures["rollout/failed"] = float(self._rollouts.failed)
        self._verifications.add_verdicts(groups)
        self._check_staleness(figures["rollout/staleness_max"])
        self._check_attempt(groups)
        return figures

    @contextlib.asynccontextmanager
    async def _producing(self, buffer: Buffer) -> AsyncIterator[None]:
        """Fill the buffer in the background. Its failure ends whatever the loop waits for."""
        sampling, train = self._config.sampling, self._config.train
        self.parts.prompts.seek(self.state.cursor, self.state.in_flight)
        self.parts.ledger.resume(self.state.cursor, self.state.in_flight)
        settings = SamplingSettings(
            samples=train.group_size,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            max_tokens=sampling.max_tokens,
            seed=self._config.run.seed,
        )
        trained = (self.state.step + self._skipped.total) * train.groups_per_step
        self._rollouts.total = self._rollouts.failed + self._filtering.groups + trained
        parts, fraction = self.parts, self._config.search.fraction
        producer = Producer(parts.pool, parts.prompts, buffer, settings, self._rollouts, fraction, self._filtering)
        task = asyncio.create_task(producer.run())
        task.add_done_callback(self._producer_ended)
        try:
            yield
        finally:
            task.cancel()
            await asyncio.wait([task])

    def _producer_ended(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) and not self._stop.done():
            self._stop.set_exception(_first_cause(error))

    async def _until_stopped(self, work: Awaitable[Result]) -> Result:
        """Wait for `work`, or raise at once when the run is interrupted or the producer failed."""
        future = asyncio.ensure_future(work)
        waiting: list[asyncio.Future[Any]] = [future, self._stop]
        await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        if self._stop.done():
            future.cancel()
        self._check_stopped()
        return future.result()

    def _check_stopped(self) -> None:
        if self._stop.done():
            raise InterruptedRunError(self._stop.result())

    async def _publish(self) -> Mapping[str, float]:
        fault("driver.publish", version=self.state.weight_version)
        return await self.parts.bus.publish(self.state.weight_version)

    async def _publish_if_new(self) -> None:
        if self.parts.bus.version != self.state.weight_version:
            await self._publish()

    async def _evaluate(self) -> Mapping[str, float]:
        """Held-out figures. Within a step it runs to its end: the weights are a step ahead of the saved state."""
        evaluation = self._config.evaluation
        greedy = SamplingSettings(
            samples=1,
            temperature=0.0,
            top_p=1.0,
            max_tokens=self._config.sampling.max_tokens,
            seed=self._config.run.seed,
        )
        sampled = replace(greedy, samples=evaluation.samples, temperature=1.0)
        with Stopwatch() as watch:
            pool, prompts = self.parts.pool, self.parts.held_out
            limit = self._config.train.max_verifier_failures
            first = await sample_groups(pool, prompts, greedy, limit) if evaluation.greedy else []
            second = await sample_groups(pool, prompts, sampled, limit) if evaluation.samples else []
        await self.parts.pool.reset_engine_stats()  # the next figures are of training rollouts alone
        return {**held_out_metrics(first, second), "time/evaluate_s": watch.seconds}

    def _snapshot(self, buffer: Buffer) -> None:
        self.state = replace(
            self.state,
            cursor=self.parts.prompts.cursor,
            in_flight=buffer.in_flight() + self.parts.prompts.waiting(),
            counters={
                "failed_rollouts": float(self._rollouts.failed),
                "failed_verifications": float(self._verifications.failed),
                "verifications": float(self._verifications.total),
                "filtered_groups": float(self._filtering.groups),
                "filtered_tokens": float(self._filtering.tokens),
                "unlogged_tokens": float(self._filtering.unlogged_tokens),
                "skipped_steps": float(self._skipped.total),
            },
        )
        ledger, state = self.parts.ledger, self.state
        ledger.note("filtered", buffer.take_unused())
        ledger.close_step(state.weight_version, state.cursor, state.in_flight)

    def _check_staleness(self, found: float) -> None:
        bound = self._config.train.max_staleness
        if found > bound:
            raise RlsysError(f"a group of staleness {found:.0f} reached the learner; train.max_staleness is {bound}")

    def _check_attempt(self, groups: Sequence[TrajectoryGroup]) -> None:
        """After a return to a checkpoint nothing that was sampled for the steps that were lost may be trained."""
        spans = (span for group in groups for trajectory in group.trajectories for span in trajectory.versions)
        other = next((span for span in spans if span.attempt != self.parts.learner.restarts), None)
        if other:
            raise RlsysError(
                f"a group that attempt {other.attempt} of the learner sampled, with weight version {other.version}, "
                f"reached the learner in attempt {self.parts.learner.restarts}"
            )

    async def _finish_step(self, stage: StageName, figures: Mapping[str, float], started: float) -> None:
        """Log the step, then save where one is due, so that a checkpoint never lacks its row.

        The last step of a stage is not interrupted: its policy is still to be handed over.
        """
        rest = {
            "time/step_s": time.monotonic() - started,
            "time/checkpoint_s": self.saving.take_seconds(),
            "process/failed_saves": float(self.saving.failed),
            "learner/skipped_steps": float(self._skipped.total),
            "process/actor_restarts": float(self.parts.pool.restarts),
            "process/learner_restarts": float(self.parts.learner.restarts),
            "process/driver_rss_mib": psutil.Process().memory_info().rss / 2**20,
        }
        self.parts.metrics.log(stage, self.state.step, self.state.weight_version, {**figures, **rest})
        self.parts.display.step({**figures, **rest})
        self.saving.measured(self.state.weight_version, figures)
        self._save_due |= self.state.step % self._config.checkpoint.interval == 0
        if self._save_due and not self._skipped.in_a_row:  # else a return to it would count as progress
            self._save_due = False
            await self.saving.save(self.state, needed=False)
        if self.state.step < self._config.max_steps(stage):
            self._check_stopped()


class Stopwatch:
    """Seconds spent in a with block, on the monotonic clock."""

    seconds = 0.0

    def __enter__(self) -> Stopwatch:
        self._started = time.monotonic()
        return self

    def __exit__(self, *exception: object) -> None:
        self.seconds = time.monotonic() - self._started


def _first_cause(error: BaseException) -> BaseException:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
