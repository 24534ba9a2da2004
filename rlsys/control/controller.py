"""Run the stages of a run in order."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from rlsys.config.stages import Loop, StagePlan, stage_plans
from rlsys.control.run_context import RunContext
from rlsys.control.stages.offline import OfflineStage
from rlsys.control.stages.online import OnlineStage
from rlsys.control.stages.search import SearchLoop
from rlsys.control.training_run import TrainingRun
from rlsys.errors import InterruptedRunError
from rlsys.types import RunState


class StageLoop(Protocol):
    """The loop of a stage, built when the stage begins."""

    def __init__(self, run: TrainingRun, plan: StagePlan) -> None: ...

    async def run(self) -> None:
        """Do the remaining work of the stage."""
        ...


LOOPS: dict[Loop, type[StageLoop]] = {"offline": OfflineStage, "online": OnlineStage, "search": SearchLoop}


class Controller:
    """Controller that runs the stages in order, from a run state to the end of the last stage.

    An interruption ends three waits at once: for groups, for rows of data and for the evaluation before the first
    step. Other work is finished first: a call of the learner, a publish, its calibration, an evaluation within a step,
    and the trees that actors hold. An interruption in the last step changes nothing.

    Args:
        checkpoint: the checkpoint that `state` comes from, if any.
    """

    def __init__(self, context: RunContext, state: RunState, checkpoint: Path | None) -> None:
        self._run = TrainingRun(context, state, checkpoint)

    @property
    def checkpoint(self) -> Path | None:
        """The newest checkpoint."""
        return self._run.checkpointing.checkpoint

    def interrupt(self, reason: str) -> None:
        """Request an orderly end: a checkpoint, then InterruptedRunError."""
        self._run.stop.request(reason)

    async def run(self) -> None:
        """Train until the last stage has made its max_steps.

        Raises:
            InterruptedRunError: after `interrupt`, once the state is saved, if work is left.
        """
        run, plans = self._run, stage_plans(self._run.config)
        try:
            for number in range(run.state.stage, len(plans)):
                run.begin_stage(number)
                await LOOPS[plans[number].loop](run, plans[number]).run()
                if number + 1 < len(plans):
                    run.stop.check()
        except InterruptedRunError:
            await run.save()
            raise
