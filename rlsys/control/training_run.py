"""The state of a run and the actions that the loops of all stages share."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import psutil

from rlsys.config.stages import StagePlan, stage_plan, stage_plans
from rlsys.control.budgets import SkippedSteps
from rlsys.control.checkpointing import Checkpointing
from rlsys.control.counters import Counters
from rlsys.control.evaluation import evaluate_held_out, held_out_metrics
from rlsys.control.run_context import RunContext
from rlsys.control.stage_policies import StagePolicies
from rlsys.control.stop_request import StopRequest
from rlsys.directory import CheckpointDirectory
from rlsys.errors import NonFiniteLossError
from rlsys.fault_injection import fault
from rlsys.interpolation import TeacherShare
from rlsys.run.provenance import Provenance
from rlsys.types import RunState, StageName, TrainingBatch


class Stopwatch:
    """Seconds spent in a with block, on the monotonic clock."""

    seconds = 0.0

    def __enter__(self) -> Stopwatch:
        self._started = time.monotonic()
        return self

    def __exit__(self, *exception: object) -> None:
        self.seconds = time.monotonic() - self._started


class TrainingRun:
    """State of a run, and the actions that its stages share.

    Attributes:
        state: the present state; a checkpoint of it continues the run.
        stop: the request to end the run.
        skipped: counts the skipped training steps.
        reference_digest: the digest of the policy that the stage began with, if its loss refers to that policy.

    Args:
        checkpoint: the checkpoint that `state` comes from, if any.
    """

    def __init__(self, context: RunContext, state: RunState, checkpoint: Path | None) -> None:
        self.context, self.state = context, state
        self.config = context.config
        self.stop = StopRequest()
        self.policies = StagePolicies(
            config=context.config,
            run_dir=context.run_dir,
            model=context.model,
            policy_digest=context.policy_digest,
        )
        self.checkpointing = Checkpointing(
            config=context.config,
            store=context.checkpoints,
            learner=context.learner,
            logs=(context.metrics, context.ledger, *([context.rollouts] if context.rollouts else [])),
            tokenizer_files=context.tokenizer_files,
            provenance=self._provenance,
            say=context.display.message,
            checkpoint=checkpoint,
            saved_version=state.weight_version if checkpoint else -1,
        )
        self.skipped = SkippedSteps(
            limit=context.config.learner.max_skipped_steps, total=Counters.of(state.counters).skipped_steps
        )
        self.share = TeacherShare.of(state.counters, self.config.objective.distill.interpolation)
        self.reference_digest: str | None = None
        self._save_due = False

    def _provenance(self) -> Provenance:
        context = self.context
        return Provenance(
            inputs=context.fingerprint, extracted=context.data.extracted(), reference=self.reference_digest
        )

    def begin_stage(self, number: int) -> None:
        """Go to the first step of a stage, unless the state is already in that stage."""
        if number > self.state.stage:
            self.state = replace(self.state, stage=number, step=0, counters={})
            self.skipped.total = 0
            self.share = TeacherShare.of({}, self.config.objective.distill.interpolation)

    @property
    def newest_policy(self) -> Path:
        """The policy of the newest checkpoint, or the initial one."""
        checkpoint = self.checkpointing.checkpoint
        return CheckpointDirectory(checkpoint).policy if checkpoint else self.context.model

    @property
    def reference_policy(self) -> Path:
        """The policy that the present stage began with."""
        return self.policies.initial_policy(self.state.stage)

    # --- steps ---

    def load_batch(self, stage: StageName, step: int) -> asyncio.Task[TrainingBatch]:
        """Start to load the rows and pairs of a training step, and to let the teacher score the rows."""
        return asyncio.create_task(self._load_batch(stage, step))

    async def _load_batch(self, stage: StageName, step: int) -> TrainingBatch:
        batch = await asyncio.to_thread(self.context.data.batch, stage, step)
        missing = [row for row in batch.demonstrations if row.teacher is None]
        if not missing or not stage_plan(self.config, stage).scores_rows:
            return batch
        scored = iter(await self.context.pool.score_rows(missing, self.config.objective.distill.scored_tokens))
        rows = tuple(next(scored) if row.teacher is None else row for row in batch.demonstrations)
        return replace(batch, demonstrations=rows)

    async def learn(self, batch: TrainingBatch) -> dict[str, float]:
        """Make one training step and return its metrics.

        Raises:
            NonFiniteLossError: a loss or gradient was not finite; the step was not made.
        """
        adaptive = self.config.objective.distill.interpolation_rate > 0
        if adaptive:
            batch = replace(batch, interpolation=self.share.share)
        with Stopwatch() as watch:
            metrics = await self.context.learner.train(batch, self.state.step, self.state.weight_version + 1)
        if adaptive and "objective/distill_loss" in metrics:
            self._grow_share(metrics["objective/distill_loss"])
        self.skipped.end_row()
        self.advance()
        rate = metrics["learner/tokens"] / watch.seconds
        return {**metrics, "time/learn_s": watch.seconds, "learner/tokens_per_s": rate}

    def _grow_share(self, loss: float) -> None:
        """Set the teacher's share of the next step. The counters of the run state keep it."""
        distill, steps = self.config.objective.distill, stage_plans(self.config)[self.state.stage].settings.steps
        self.share = self.share.after(
            loss,
            linear=distill.interpolation_at(self.state.step + 1, steps),
            last=distill.final_interpolation or 1.0,
            rate=distill.interpolation_rate,
        )
        self.count({})

    def count(self, counters: Mapping[str, float]) -> None:
        """Set the counters of the stage that the run state keeps, beside the teacher's share."""
        share = self.share.as_floats() if self.config.objective.distill.interpolation_rate else {}
        kept = counters or self.state.counters
        self.state = replace(self.state, counters={**kept, **share})

    def advance(self) -> None:
        """Count a training step."""
        self.state = replace(self.state, step=self.state.step + 1, weight_version=self.state.weight_version + 1)

    def skip(self, error: NonFiniteLossError) -> None:
        """Count a training step that the learner skipped.

        Raises:
            NonFiniteStepsError: too many steps in a row were skipped.
        """
        self.skipped.skip(error)
        self.context.display.message(f"STEP SKIPPED: {error.message}")

    async def publish(self, when_sent: Callable[[], None] = lambda: None) -> Mapping[str, float]:
        """Bring every actor to the present weights and return the metrics of the publish; see `WeightBus.publish`."""
        fault("driver.publish", version=self.state.weight_version)
        return await self.context.bus.publish(self.state.weight_version, when_sent)

    async def publish_if_new(self) -> None:
        """Publish the present weights unless the actors serve them."""
        if self.context.bus.version != self.state.weight_version:
            await self.publish()

    async def evaluate(self) -> Mapping[str, float]:
        """Return the held-out metrics of the served weights, and leave the evaluation out of the engine stats."""
        context = self.context
        with Stopwatch() as watch:
            greedy, sampled = await evaluate_held_out(context.pool, context.held_out, self.config)
        await context.pool.reset_engine_stats()
        return {**held_out_metrics(greedy, sampled), "time/evaluate_s": watch.seconds}

    async def finish_step(self, plan: StagePlan, metrics: Mapping[str, float], started: float) -> None:
        """Log a step, then save if a save is due: a checkpoint never lacks the row of its step.

        Args:
            started: monotonic seconds at the beginning of the step.
        Raises:
            InterruptedRunError: an end was asked for. The last step of a stage is not interrupted, because its policy
                is still to be exported.
        """
        context = self.context
        row = {**metrics, **self._process_metrics(started)}
        context.metrics.log(plan.name, self.state.step, self.state.weight_version, row)
        context.display.step(row)
        self.checkpointing.note_metrics(self.state.weight_version, metrics)
        self._save_due |= self.state.step % self.config.checkpoint.interval == 0
        if self._save_due and not self.skipped.in_a_row:  # a return to a skipped step would count as progress
            self._save_due = False
            await self.checkpointing.save(self.state, needed=False)
        if self.state.step < plan.steps:
            self.stop.check()

    def _process_metrics(self, started: float) -> dict[str, float]:
        return {
            "time/step_s": time.monotonic() - started,
            "time/checkpoint_s": self.checkpointing.take_seconds(),
            "process/failed_saves": float(self.checkpointing.failed),
            "learner/skipped_steps": float(self.skipped.total),
            "process/actor_restarts": float(self.context.pool.restarts),
            "process/learner_restarts": float(self.context.learner.restarts),
            "process/driver_rss_mib": psutil.Process().memory_info().rss / 2**20,
        }

    async def save(self) -> None:
        """Save the present state.

        Raises:
            CheckpointError: the save failed.
        """
        await self.checkpointing.save(self.state, needed=True)
        self._save_due = False

    async def export_policy(self, stage: StageName) -> None:
        """Export the policy of a finished stage, also if the run was killed after the last save of the stage."""
        checkpoint = self.checkpointing.checkpoint
        assert checkpoint is not None  # noqa: S101 - every finished stage has saved one
        await asyncio.to_thread(self.policies.export_policy, stage, checkpoint)
