"""The start of a stage: its data, the learner's engines, the reference policy and the first comparison of weights."""

from __future__ import annotations

import asyncio
from pathlib import Path

from rlsys.config.stages import StagePlan
from rlsys.control.reference_scores import ReferenceScores
from rlsys.control.training_run import TrainingRun
from rlsys.directory import RunDirectory
from rlsys.run.provenance import check_extracted, check_reference


async def start_stage(run: TrainingRun, plan: StagePlan) -> None:
    """Load the data of a stage, start the learner on it, and compare actors and learner once per command.

    Raises:
        InterruptedRunError: an end was asked for.
        DamagedFileError: the reference policy has changed since the stage began.
        ConfigError, DataError: the data cannot be used.
    """
    context, learner = run.context, run.context.learner
    for note in await asyncio.to_thread(context.data.load, plan.name):
        context.display.message(note)
    resume = run.checkpointing.checkpoint if run.state.step > 0 else None
    if resume:
        folder = RunDirectory(context.run_dir).search_stage.data
        check_extracted(resume, context.data.extracted(), folder)
    digest = None
    if plan.keeps_reference or plan.scores_pairs:
        digest = await asyncio.to_thread(_reference_digest, run, resume)
    run.reference_digest = digest
    scores = _reference_scores(run, plan, digest) if plan.scores_pairs else None
    if scores and scores.missing and resume:  # the learner must hold the policy that the stage began with
        await learner.start_stage(plan.name, run.reference_policy, None, None)
        await _compute(run, scores)
    run.stop.check()
    reference = run.reference_policy if plan.keeps_reference else None
    await learner.start_stage(plan.name, run.newest_policy, resume, reference)
    run.stop.check()
    if scores and scores.missing:
        await _compute(run, scores)
    context.data.references = scores.scores if scores else None
    await _calibrate(run)


async def _calibrate(run: TrainingRun) -> None:
    bus = run.context.bus
    if not bus.calibrated:
        gap = await bus.calibrate()
        run.context.display.message(f"probe gap of a fresh load {gap:.1e} nats, tolerance {bus.tolerance:.1e}")


def _reference_digest(run: TrainingRun, resume: Path | None) -> str:
    """Return the digest of the policy that the stage began with. This reads all its weights.

    Raises:
        DamagedFileError: the policy has changed since the stage began.
    """
    policy = run.reference_policy
    digest = run.policies.digest(policy)
    check_reference(resume, policy, digest)
    return digest


def _reference_scores(run: TrainingRun, plan: StagePlan, digest: str | None) -> ReferenceScores:
    key = {"policy": digest, "mask_prefix_dpo": run.config.objective.preference.mask_prefix_dpo}
    path = RunDirectory(run.context.run_dir).reference_scores(plan.name)
    return ReferenceScores(path, run.context.data.pairs(), key)


async def _compute(run: TrainingRun, scores: ReferenceScores) -> None:
    run.context.display.message("scoring the preference pairs under the policy that the stage begins with")
    await scores.compute(run.context.learner, run.config.preference.pairs_per_step, run.stop.check)
