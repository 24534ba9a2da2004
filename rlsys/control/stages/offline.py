"""The loop of a stage that trains on data."""

from __future__ import annotations

import time

from rlsys.control.stages.training import TrainingStage
from rlsys.errors import NonFiniteLossError


class OfflineStage(TrainingStage):
    """Loop of a stage that trains on rows or pairs.

    No actor samples meanwhile, so the weights are published once, at the end of the run.

    Waits for the rows of a step, which are loaded while the learner makes the step before; `TrainingRun.stop` ends
    the wait.
    """

    async def train(self) -> None:
        run, plan = self.training, self.plan
        next_batch = run.load_batch(plan.name, run.state.step)
        while run.state.step < plan.steps:
            started = time.monotonic()
            batch = await run.stop.wait_for(next_batch)
            if run.state.step + 1 < plan.steps:
                next_batch = run.load_batch(plan.name, run.state.step + 1)
            try:
                metrics = await run.learn(batch)
            except NonFiniteLossError as error:  # the same data would come again, so the step counts as made
                run.skip(error)
                metrics = {}
                run.advance()
                run.count({"skipped_steps": float(run.skipped.total)})
            if run.state.step == plan.steps and plan.publishes == "at its end":
                metrics |= {**await run.publish(), **await run.evaluate()}
            await run.finish_step(plan, metrics, started)
