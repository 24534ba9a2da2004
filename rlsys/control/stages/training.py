"""The frame of every stage that trains: start, steps, checkpoint, export of the policy."""

from __future__ import annotations

from abc import ABC, abstractmethod

from rlsys.config.stages import StagePlan
from rlsys.control.stages.start import start_stage
from rlsys.control.training_run import TrainingRun


class TrainingStage(ABC):
    """A stage that trains. A subclass makes the steps."""

    def __init__(self, run: TrainingRun, plan: StagePlan) -> None:
        self.training, self.plan = run, plan

    async def run(self) -> None:
        """Make the missing steps of the stage, save, and export the policy."""
        run, plan = self.training, self.plan
        run.policies.discard(plan.name)
        if run.state.step < plan.steps:
            await start_stage(run, plan)
            run.context.display.stage(plan.name, plan.steps, run.state.step)
            await self.train()
            await run.save()
        await run.export_policy(plan.name)

    @abstractmethod
    async def train(self) -> None:
        """Make the missing steps of the stage."""
