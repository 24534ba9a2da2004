"""THE main loop. Knows only Protocols: what it drives may be real actors or recorded fakes."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import time
from collections.abc import AsyncIterator, Awaitable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import psutil

from rlsys.buffer import Buffer
from rlsys.checkpoint import CheckpointStore, state_to_json, write_json
from rlsys.config import Config, StageName
from rlsys.demonstrations import DemonstrationStream
from rlsys.display import Display
from rlsys.errors import InterruptedRunError, RlsysError
from rlsys.evaluation import held_out_metrics, sample_groups
from rlsys.failures import FailureLimit, verifier_limit
from rlsys.interfaces import Learner, RolloutPool
from rlsys.metrics import MetricsWriter
from rlsys.producer import Producer
from rlsys.prompts import PromptStream
from rlsys.rollout_metrics import engine_metrics, rollout_metrics
from rlsys.types import Demonstration, Prompt, RunState, SamplingSettings, TrainingBatch
from rlsys.weights import WeightBus

Result = TypeVar("Result")


@dataclass(frozen=True, kw_only=True)
class Parts:
    """Everything the controller drives.

    model: the initial policy folder; tokenizer_files: files to put beside a policy;
    fingerprint: digests of what the run reads (`Inputs.fingerprint`), kept in every checkpoint.
    """

    config: Config
    run_dir: Path
    model: Path
    tokenizer_files: Sequence[Path]
    pool: RolloutPool
    learner: Learner
    bus: WeightBus
    checkpoints: CheckpointStore
    metrics: MetricsWriter
    display: Display
    prompts: PromptStream
    demonstrations: DemonstrationStream
    held_out: Sequence[Prompt]
    fingerprint: Mapping[str, str] = field(default_factory=dict)


class Controller:
    """Runs the stages in order, from a run state to the end of the last one.

    Waiting for groups, for demonstrations and for the evaluation before the first step also ends when `interrupt`
    is called or the producer fails. What the learner does, a publish, its calibration and an evaluation within a
    step run to their end first; an interruption in the last step changes nothing.
    """

    def __init__(self, parts: Parts, state: RunState, checkpoint: Path | None) -> None:
        self.parts = parts
        self.state = state
        self.checkpoint = checkpoint
        self._config = parts.config
        self._stop: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._saved_version = state.weight_version if checkpoint else -1
        self._checkpoint_seconds = 0.0
        train, counters = parts.config.train, state.counters
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
                    self.state = replace(self.state, stage=number, step=0)
                total = self._config.max_steps(stage)
                if self.state.step < total:
                    shutil.rmtree(self._handed(stage), ignore_errors=True)  # of a smaller max_steps
                    await self._start_stage(stage)
                    self.parts.display.stage(stage, total, self.state.step)
                    if stage == "warm_start":
                        await self._warm_start(total)
                    else:
                        await self._online(total)
                    await self._save()
                self._hand_over(stage)  # also where a run was killed between the two
                if self._stop.done() and number + 1 < len(stages):
                    raise InterruptedRunError(self._stop.result())
        except InterruptedRunError:
            await self._save()
            raise

    async def _start_stage(self, stage: StageName) -> None:
        policy = self.checkpoint / "policy" if self.checkpoint else self.parts.model
        resume = self.checkpoint if self.state.step > 0 else None
        reference = self._reference() if stage == "online" and self._config.reference else None
        await self.parts.learner.start_stage(stage, policy, resume, reference)
        if not self.parts.bus.calibrated:
            gap = await self.parts.bus.calibrate()
            self.parts.display.message(
                f"probe gap of a fresh load {gap:.1e} nats, tolerance {self.parts.bus.tolerance:.1e}"
            )

    async def _warm_start(self, total: int) -> None:
        """Supervised steps. Nobody samples meanwhile, so the weights are published once, at the end."""
        rows = self._demonstrations(self.state.step)
        while self.state.step < total:
            started = time.monotonic()
            demonstrations = await self._until_stopped(rows)
            if self.state.step + 1 < total:  # while the learner works
                rows = self._demonstrations(self.state.step + 1)
            with Stopwatch() as learning:
                batch = TrainingBatch(demonstrations=tuple(demonstrations))
                metrics = await self.parts.learner.train(batch, self.state.step, self.state.weight_version + 1)
            self._advance()
            figures = {**metrics, **_learning_rates(metrics, learning.seconds)}
            if self.state.step == total and self._config.stages[-1] == "warm_start":
                figures |= {**await self._publish(), **await self._evaluate()}
            await self._finish_step("warm_start", figures, started)

    def _demonstrations(self, step: int) -> asyncio.Task[list[Demonstration]]:
        return asyncio.create_task(asyncio.to_thread(self.parts.demonstrations.rows, step))

    async def _online(self, total: int) -> None:
        """Sample, learn, publish, release; see the module's picture in the README."""
        parts, train = self.parts, self._config.train
        await self._publish_if_new()
        if self.state.step == 0:
            figures = await self._until_stopped(self._evaluate())
            parts.metrics.log("online", 0, self.state.weight_version, figures)
            parts.display.evaluation(figures)
        buffer = Buffer(train.groups_per_step, train.max_staleness)
        await parts.pool.search_usage()  # what the engines did before the first prompt counts for no step
        async with self._producing(buffer):
            while self.state.step < total:
                started = time.monotonic()
                with Stopwatch() as waiting:
                    groups = await self._until_stopped(buffer.take())
                figures = {
                    **rollout_metrics(groups, self.state.weight_version),
                    "time/rollout_s": waiting.seconds,
                }
                figures |= engine_metrics(await parts.pool.search_usage())
                figures["rollout/failed"] = float(self._rollouts.failed)
                self._verifications.add_verdicts(groups)
                self._check_staleness(figures["rollout/staleness_max"])
                with Stopwatch() as learning:
                    batch = TrainingBatch(groups=tuple(groups))
                    metrics = await parts.learner.train(batch, self.state.step, self.state.weight_version + 1)
                self._advance()
                figures |= {**metrics, **_learning_rates(metrics, learning.seconds), **await self._publish()}
                interval = self._config.evaluation.interval
                if self.state.step == total or (interval and self.state.step % interval == 0):
                    figures |= await self._evaluate()
                await buffer.release()
                self._snapshot(buffer)
                await self._finish_step("online", figures, started)

    @contextlib.asynccontextmanager
    async def _producing(self, buffer: Buffer) -> AsyncIterator[None]:
        """Fill the buffer in the background. Its failure ends whatever the loop waits for."""
        sampling, train = self._config.sampling, self._config.train
        self.parts.prompts.seek(self.state.cursor, self.state.in_flight)
        settings = SamplingSettings(
            samples=train.group_size,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            max_tokens=sampling.max_tokens,
            seed=self._config.run.seed,
        )
        self._rollouts.total = self._rollouts.failed + self.state.step * train.groups_per_step
        fraction = self._config.search.fraction
        producer = Producer(self.parts.pool, self.parts.prompts, buffer, settings, self._rollouts, fraction)
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
            raise InterruptedRunError(self._stop.result())
        return future.result()

    async def _publish(self) -> Mapping[str, float]:
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
        await self.parts.pool.search_usage()  # the next figures are of training rollouts alone
        return {**held_out_metrics(first, second), "time/evaluate_s": watch.seconds}

    def _advance(self) -> None:
        self.state = replace(self.state, step=self.state.step + 1, weight_version=self.state.weight_version + 1)

    def _snapshot(self, buffer: Buffer) -> None:
        self.state = replace(
            self.state,
            cursor=self.parts.prompts.cursor,
            in_flight=buffer.in_flight() + self.parts.prompts.waiting(),
            counters={
                "failed_rollouts": float(self._rollouts.failed),
                "failed_verifications": float(self._verifications.failed),
                "verifications": float(self._verifications.total),
            },
        )

    def _check_staleness(self, found: float) -> None:
        bound = self._config.train.max_staleness
        if found > bound:
            raise RlsysError(f"a group of staleness {found:.0f} reached the learner; train.max_staleness is {bound}")

    async def _finish_step(self, stage: StageName, figures: Mapping[str, float], started: float) -> None:
        """Log the step, then save where one is due, so that a checkpoint never lacks its row.

        The last step of a stage is not interrupted: its policy is still to be handed over.
        """
        rest = {
            "time/step_s": time.monotonic() - started,
            "time/checkpoint_s": self._checkpoint_seconds,
            "process/driver_rss_mib": psutil.Process().memory_info().rss / 2**20,
        }
        self._checkpoint_seconds = 0.0
        self.parts.metrics.log(stage, self.state.step, self.state.weight_version, {**figures, **rest})
        self.parts.display.step({**figures, **rest})
        if self.state.step % self._config.checkpoint.interval == 0:
            await self._save()
        if self._stop.done() and self.state.step < self._config.max_steps(stage):
            raise InterruptedRunError(self._stop.result())

    async def _save(self) -> None:
        """Commit a checkpoint of the present state, unless there is one already."""
        state, store = self.state, self.parts.checkpoints
        if self._saved_version == state.weight_version or state.weight_version == 0:
            return
        with Stopwatch() as watch:
            name = f"step_{state.weight_version:06d}"
            temporary = store.begin(name)
            try:
                await self.parts.learner.save(temporary)
                for path in self.parts.tokenizer_files:
                    shutil.copy(path, temporary / "policy")
                write_json(temporary / "state.json", state_to_json(state))
            except BaseException:
                store.discard(temporary)
                raise
            info = {
                "weight_version": state.weight_version,
                "stage": self._config.stages[state.stage],
                "inputs": dict(self.parts.fingerprint),
            }
            self.checkpoint = await asyncio.to_thread(store.commit, temporary, name, info)
        self._saved_version = state.weight_version
        self._checkpoint_seconds = watch.seconds

    def _hand_over(self, stage: StageName) -> None:
        """Keep the policy a finished stage hands to the next one, as hard links into its checkpoint where it can."""
        assert self.checkpoint is not None  # noqa: S101 - every finished stage has saved one
        target = self._handed(stage)
        temporary = target.with_name(f".{stage}")  # under its name it is complete
        for folder in (target, temporary):
            shutil.rmtree(folder, ignore_errors=True)
        temporary.mkdir(parents=True)
        for path in sorted((self.checkpoint / "policy").iterdir()):
            try:
                (temporary / path.name).hardlink_to(path)
            except OSError:  # some network file systems have no hard links
                shutil.copy(path, temporary / path.name)
        temporary.rename(target)

    def _handed(self, stage: StageName) -> Path:
        return self.parts.run_dir / "stages" / stage

    def _reference(self) -> Path:
        """The frozen anchor of the KL term: the policy that the stage before handed over, or the initial one."""
        before = self._config.stages[: self.state.stage]
        return self._handed(before[-1]) if before else self.parts.model


class Stopwatch:
    """Seconds spent in a with block, on the monotonic clock."""

    seconds = 0.0

    def __enter__(self) -> Stopwatch:
        self._started = time.monotonic()
        return self

    def __exit__(self, *exception: object) -> None:
        self.seconds = time.monotonic() - self._started


def _learning_rates(metrics: Mapping[str, float], seconds: float) -> Mapping[str, float]:
    return {"time/learn_s": seconds, "learner/tokens_per_s": metrics["learner/tokens"] / seconds}


def _first_cause(error: BaseException) -> BaseException:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
